"""Commands: flags, standard streams, and one sentence for each mistake of a user."""
import argparse, dataclasses, difflib, errno, functools, inspect, os, re, sys

from data import UserError


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as --help and UserError for a wrong flag."""
    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    flags = ()                                               # of the last command line that was parsed

    def parse_args(self, argv=None, namespace=None):
        self.argv, Parser.flags = sys.argv[1:] if argv is None else argv, self._option_string_actions
        return super().parse_args(argv, namespace)

    def error(self, message):
        flags = [a.split("=")[0] for a in self.argv if a.startswith("--")]
        near = [match for flag in flags if flag not in self._option_string_actions
                for match in difflib.get_close_matches(flag, self._option_string_actions, 1)]
        raise UserError(message + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"))


def open_streams():
    """Opens closed standard streams on the null device, and sets all of them to UTF-8."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                   # takes the lowest free number, which is this one
        stream = getattr(sys, name) or open(os.devnull, "w" if number else "r", encoding="utf-8")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):                   # a Windows console or a pipe may not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")


# Lower ones of these flags need less memory.
MEMORY_FLAGS = ("--micro-batch", "--batch-size", "--context", "--samples", "--max-new-tokens", "--calibration-windows",
                "--prompt-tokens")


def sentence(error):
    """The message for an error of the operating system; None for a bug."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return "the disk is full, or your share of it; the old files are whole: free some space and run it again"
    if number == errno.EFBIG:
        return "a file became larger than this system allows (ulimit -f); the old files are whole"
    if isinstance(error, OSError) and number:
        return (f"{error.filename}: " if error.filename is not None else "") + (error.strerror or str(error))
    memory = ("can't allocate memory", "Storage size calculation overflowed", "out of memory", "not enough memory")
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(m in str(error) for m in memory):
        lower = [flag for flag in MEMORY_FLAGS if flag in Parser.flags]
        place = "GPU" if "CUDA" in str(error) else "machine"
        return (f"this does not fit the memory of this {place}: " + f"lower {' or '.join(lower)}, or " * bool(lower) +
                "take a smaller model" + ", or --device cpu" * (place == "GPU"))
    return None


def run(main):
    """Calls main(): mistakes end with one sentence and exit code 2, bugs with a traceback."""
    open_streams()
    code, message = 0, None
    try:
        main()
        sys.stdout.flush()                                   # so that a closed pipe shows here, not at interpreter exit
    except UserError as error:
        code, message = 2, f"error: {error}"
    except SystemExit as end:                                # --help, or a process that leaves the message to another
        code = end.code or 0
    except KeyboardInterrupt:
        code, message = 130, "\nstopped"
    except BrokenPipeError:                                  # `python sample.py ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (OSError, MemoryError, RuntimeError) as error:
        if not (text := sentence(error)):
            raise
        code, message = 2, f"error: {text}"
    if message:
        print(message[0] + message[1:].replace("\n", " "), file=sys.stderr)
    if processes := sys.modules.get("data.processes"):       # not imported for this, as torch takes a second
        processes.leave(code)
    if code:
        sys.exit(code)


def flags_of(config_class, description, argv=None, positional=(), hidden=()):
    """{field: value} of the given flags: a dataclass's fields are flags, the comments their help.

    Fields in `positional` need no flag; fields in `hidden` have none. Raises UserError.
    """
    parser = Parser(description)
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", "".join(inspect.getsource(c) for c in
                                                                  reversed(config_class.__mro__[:-1])), re.M))
    for f in dataclasses.fields(config_class):
        if f.name in hidden:
            continue
        flag, help = "--" + f.name.replace("_", "-"), comments.get(f.name, "").replace("%", "%%")
        if f.name in positional:
            parser.add_argument(f.name, nargs="?", default=argparse.SUPPRESS, help=help)
            continue
        help += f" (default: {f.default!r})"
        if f.type in (bool, "bool"):                             # --no-compile overrides a preset
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            parser.add_argument(flag, type=type(f.default), default=argparse.SUPPRESS, help=help)
    return vars(parser.parse_args(argv))


def numbers(text, flag, first, last):
    """The whole numbers in "0,2,5". Raises UserError if one is not in first ... last."""
    if not all(n.strip().isdigit() and first <= int(n) <= last for n in text.split(",")):
        raise UserError(f"{flag} {text} must be whole numbers from {first} to {last}, with commas between them")
    return [int(n) for n in text.split(",")]


def decoded(data, where):
    """Bytes as UTF-8 text. Raises UserError; `where` begins the message."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text") from None


@functools.cache
def say_once(text):
    """Prints a sentence to standard error, once per process."""
    print(text, file=sys.stderr)
