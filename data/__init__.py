"""Errors, flags, and directories that survive a kill, shared by every script. Here, as data/ is where imports begin."""
import argparse, collections, contextlib, difflib, errno, hashlib, json, os, shutil, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# A kind of directory that this project writes. names: of all its files; marker: the one that is written last; key: what
# this JSON file has only if this project wrote it.
Kind = collections.namedtuple("Kind", "noun marker key names")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MODEL = Kind("model", "config.json", "slm_format", {
    "config.json", "model.safetensors", "generation_config.json", "README.md", "training_state.pt", *TOKENIZER})
DATASET = Kind("dataset", "meta.json", "splits", {
    "meta.json", "train.bin", "val.bin", "train.mask.bin", "val.mask.bin", "val.jsonl", "progress.json", "--input.rows",
    "--val.rows", *TOKENIZER})
LABELS = Kind("cache of labels", "header.json", "teacher", {
    "header.json", "lengths.bin", "ids.bin", "counts.bin", "offsets.bin"})
RUN = {"log.jsonl", "log.jsonl.new", "loss.png", "report.md", "report.json", "report.png", "samples.jsonl"}
REPORT = {"results.jsonl", "report.md", "tradeoff.png"}
EVERYTHING = MODEL.names | DATASET.names | LABELS.names | RUN | REPORT | {"chain.json", "chain.json.new"}


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


def stopped(kind, error, trace):
    """Says "stopped" where Ctrl-C meets no one, as during imports; other errors keep their traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if (SCRIPT := Path(sys.argv[0] or ".")).suffix == ".py" and SCRIPT.resolve().parent in (HERE.parent, HERE):
    sys.excepthook = stopped                                 # of our scripts: torch, imported next, takes seconds


def open_streams():
    """Gives the standard streams that a caller has closed an end that takes everything, and all of them utf-8."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                   # takes the lowest free number: this one
        stream = getattr(sys, name) or open(os.devnull, "w" if number else "r", encoding="utf-8")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):                   # a Windows console or a pipe may not be utf-8
            stream.reconfigure(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def reading(path):
    """Names the file in an OSError that read() raises: Python names it only in those of open()."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sentence(error):
    """What to say of an error that the system raised, or None: it is a bug and keeps its traceback."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return "the disk is full, or your share of it; what was there before is whole: free some space and run it again"
    if number == errno.EFBIG:
        return "a file became larger than this system allows (ulimit -f); what was there before is whole"
    if isinstance(error, OSError) and number:
        return (f"{error.filename}: " if error.filename is not None else "") + (error.strerror or str(error))
    memory = ("can't allocate memory", "Storage size calculation overflowed", "out of memory", "not enough memory")
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(m in str(error) for m in memory):
        return ("this does not fit the memory of this machine: take a smaller model, or lower --batch-size, "
                "--micro-batch or --context")
    return None


def run(main):
    """Calls main() as a command: mistakes end in one sentence and exit code 2, bugs keep their traceback."""
    open_streams()
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
    except (OSError, MemoryError, RuntimeError) as error:
        if not (said := sentence(error)):
            raise
        message = f"error: {said}"
    if message:
        print(message[0] + message[1:].replace("\n", " "), file=sys.stderr)
    sys.exit(code)


def named(path):
    """The path itself, with a name to write beside: "." and links have one of their own."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() or not path.name or path.name == ".." else path


def beside(path, ending):
    """.NAME.ending beside a path, where something is made or waits to be deleted. People's own copies, such as
    NAME.old, have other names."""
    path = named(path)
    return path.with_name(f".{path.name}.{ending}")


def is_ours(name, names):
    """Whether a file's name is one of `names`, or of the new one that takes the place of such a file."""
    return name in names or name.startswith(".") and name.endswith(".new") and name[1:-4] in names


def remove_tree(directory, flag="--out"):
    """Deletes a directory and all in it. Raises UserError, and deletes nothing, if a file in it has a name that this
    project does not write."""
    for folder, _, files in os.walk(directory):
        for name in sorted(files):
            if not is_ours(name, EVERYTHING):
                raise UserError(f"{Path(folder, name)} is nothing that these scripts wrote and would be deleted: move "
                                f"it away, or give another {flag}")
    if Path(directory).is_dir():
        shutil.rmtree(directory)


def refuse_foreign(directory, kind, flag="--out"):
    """Raises UserError if a directory, or what a kill left beside it, holds anything that this project did not write:
    to replace it would delete that."""
    directory = named(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{flag} {directory} is a file; a {kind.noun} is a directory: give another name")
    for place in (directory, *(beside(directory, ending) for ending in ("new", "old", "part"))):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.is_dir() or not is_ours(file.name, kind.names):
                raise UserError(f"{place} is there and holds something else than a {kind.noun}, {file.name}, which "
                                f"would be deleted: move it away, or give another {flag}")
    if directory.is_dir() and any(directory.iterdir()) and kind.key not in marker_of(directory, kind):
        raise UserError(f"{directory} is there and holds something else than a {kind.noun} that these scripts wrote: "
                        f"give another {flag}")


def marker_of(directory, kind):
    """The content of a directory's marker, a dict; {} if it is not there or not JSON."""
    try:
        content = json.loads((directory / kind.marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def replacing(directory, kind):
    """Write a directory so that a kill at any moment leaves a whole one: fill the yielded new one, its marker last,
    then swap names.

    After a kill the first whole one of DIR, .DIR.new and .DIR.old is the latest; `settle` renames it to DIR. On an
    exception DIR is untouched and what was new is removed. Raises UserError as refuse_foreign does.
    """
    refuse_foreign(directory, kind)
    directory = settle(directory, kind)
    new = beside(directory, "new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        swap(new, directory)
    except BaseException:                                    # Ctrl-C and a full disk too
        shutil.rmtree(new, ignore_errors=True)
        settle(directory, kind)
        raise


def swap(new, directory):
    """Puts a whole new directory in the place of another. What was there is kept until the new one is in its place."""
    old = beside(directory, "old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    with contextlib.suppress(OSError):                       # the renames too are on disk, where a directory can be
        parent = os.open(directory.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(directory, kind):
    """The path of a directory, after finishing or undoing what a kill in `replacing` left."""
    directory = named(directory)
    for ending in ("new", "part", "old"):
        other = beside(directory, ending)
        if not directory.exists() and (other / kind.marker).is_file():
            other.rename(directory)
    if (directory / kind.marker).is_file():
        for ending in ("new", "old"):
            shutil.rmtree(beside(directory, ending), ignore_errors=True)
        for name in kind.names & {"progress.json", "--input.rows", "--val.rows"}:
            (directory / name).unlink(missing_ok=True)       # of a .part that was whole
    return directory


@contextlib.contextmanager
def replacing_file(path):
    """Write a file so that a kill or a full disk at any moment leaves what was there: fill the yielded new one, which
    then takes its place. On an exception it is removed."""
    path = named(path)
    new = beside(path, "new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        sync(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def resumable(directory, kind, made_from):
    """Yield (.DIR.part, its progress.json as a dict): there already if a kill, Ctrl-C or a full disk left it half done.
    At the end it takes the place of DIR.

    made_from   an iterable of all that the result depends on: what was begun from anything else is removed
    Work counts as worth going on with once the caller has added to progress.json. After an error that the same command
    would meet again it is removed. Raises UserError as refuse_foreign does.
    """
    refuse_foreign(directory, kind)
    directory = settle(directory, kind)
    part, key = beside(directory, "part"), hashlib.sha256()
    for item in made_from:
        key.update(repr(item).encode("utf-8", "surrogateescape"))
    progress = marker_of(part, kind._replace(marker="progress.json"))
    if progress.get("key") == key.hexdigest() and len(progress) > 1:
        print(f"going on from what an interrupted run left in {part.name}")
    else:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        progress = {"key": key.hexdigest()}
    try:
        yield part, progress
        swap(part, directory)
        settle(directory, kind)
    except (KeyboardInterrupt, OSError):
        settle(directory, kind)
        if len(progress) > 1 and part.exists():
            print(f"\nwhat is done is kept in {part.name}: the same command goes on from there")
        else:
            shutil.rmtree(part, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_json(path, content):
    with replacing_file(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def sync(path):
    """Returns when a file is on disk."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())
