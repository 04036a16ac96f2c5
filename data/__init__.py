"""Errors, flags, and directories that survive a kill, shared by every script. Here, as data/ is where imports begin."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake a person can fix: one clear sentence that names the flag or the file and the way out."""


def stopped(kind, error, trace):
    """Says "stopped" where Ctrl-C meets no one, as during imports; other errors keep their traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if (SCRIPT := Path(sys.argv[0] or ".")).suffix == ".py" and SCRIPT.resolve().parent in (HERE.parent, HERE):
    sys.excepthook = stopped                                 # of our scripts: torch, imported next, takes seconds


