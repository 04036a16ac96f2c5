"""What every script shares at the command line. It lives here because data/ is where all imports begin."""
import argparse, difflib, errno, os, sys


class UserError(Exception):
    """A mistake a person can fix: one clear sentence that names the flag or the file and the way out."""


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as help, and one sentence instead of a page when a flag is wrong."""
    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def parse_args(self, argv=None, namespace=None):
        self._given = sys.argv[1:] if argv is None else argv
        return super().parse_args(argv, namespace)

    def error(self, message):
        flags = [a.split("=")[0] for a in self._given if a.startswith("--")]
        near = [m for f in flags if f not in self._option_string_actions
                for m in difflib.get_close_matches(f, self._option_string_actions, 1)]
        raise UserError(message + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"))


def run(main):
    """Calls main() as a command: mistakes end in one sentence and exit code 2, bugs keep their traceback."""
    for stream in (sys.stdout, sys.stderr):                  # a Windows console or a pipe may not be utf-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    code, message = 2, None
    try:
        main()
        sys.stdout.flush()                                   # so that a closed pipe shows here, not at interpreter exit
        return
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "\nstopped"
    except BrokenPipeError:                                  # `python sample.py ... | head`: nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = "error: the disk is full; what was there before is whole: free some space and run it again"
        elif error.filename is not None:
            message = f"error: {error.filename}: {error.strerror}"
        else:
            raise
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)
