"""Files and directories that survive a kill or a full disk, and that never replace what others wrote."""
import collections, contextlib, errno, hashlib, json, os, re, shutil
from pathlib import Path

from safetensors import SafetensorError

from data import UserError


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


@contextlib.contextmanager
def reading(path):
    """Names the file in an OSError that read() raises: Python names it only in those of open()."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def disk_full(directory, wanted):
    """Turns what safetensors and torch.save raise where a file cannot be written into the OSError that it is."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from None
        if shutil.disk_usage(directory).free < wanted or "failed writing file" in str(error):
            raise OSError(errno.ENOSPC, f"no space left while writing ({error})") from None
        raise


def read_json(path):
    """A file's JSON object as a dict. Raises UserError."""
    try:
        with reading(path):
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")        # half a surrogate pair can be read, not written
    except (ValueError, OSError, RecursionError) as error:           # RecursionError: lists in lists without end
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
