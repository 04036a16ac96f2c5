"""Files and directories that survive a kill or a full disk and never replace a stranger's files."""
import collections, contextlib, errno, hashlib, json, os, re, shutil
from pathlib import Path

from safetensors import SafetensorError

from data import UserError

# A kind of directory that this project writes. names: of all files; marker: the JSON file that is
# written last; key: a key of the marker that proves that this project wrote it.
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
EVERYTHING = MODEL.names | DATASET.names | LABELS.names | RUN | REPORT | {"chain.json", "chain.json.new", "fit.json"}


def named(path):
    """The path with a last part, for `beside`: links, "." and ".." are resolved."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() or not path.name or path.name == ".." else path


def beside(path, ending):
    """.NAME.ending beside a path, for unfinished or old files. A user's copy would be NAME.old."""
    path = named(path)
    return path.with_name(f".{path.name}.{ending}")


def is_ours(name, names):
    """Whether a file's name is one of `names`, or `beside` such a name with the ending "new"."""
    return name in names or name.startswith(".") and name.endswith(".new") and name[1:-4] in names


def remove_tree(directory, flag="--out"):
    """Deletes a directory. Raises UserError, and deletes nothing, if it holds a stranger's file."""
    for folder, _, files in os.walk(directory):
        for name in sorted(files):
            if not is_ours(name, EVERYTHING):
                raise UserError(f"{Path(folder, name)} is nothing that these scripts wrote and would be deleted: move "
                                f"it away, or give another {flag}")
    if Path(directory).is_dir():
        shutil.rmtree(directory)


def refuse_foreign(directory, kind, flag="--out"):
    """Raises UserError if a directory, or a leftover beside it, holds a stranger's file."""
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
    """The content of a directory's marker, a dict; {} without a marker, or if it is not JSON."""
    try:
        content = json.loads((directory / kind.marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def replacing(directory, kind):
    """Replaces a directory atomically: the caller fills the yielded new one, the marker last.

    After a kill at any moment the first complete one of DIR, .DIR.new and .DIR.old is the latest;
    `settle` renames it to DIR. After an exception DIR is unchanged and the new directory is
    removed. Raises UserError as refuse_foreign does.
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
    """Renames a complete new directory to `directory`. The old one is deleted after that."""
    old = beside(directory, "old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    with contextlib.suppress(OSError):                       # the renames are on disk, too; not on Windows
        parent = os.open(directory.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(directory, kind):
    """Finishes or undoes a killed `replacing` or `resumable`. Returns the directory's path."""
    directory = named(directory)
    for ending in ("new", "part", "old"):
        other = beside(directory, ending)
        if not directory.exists() and (other / kind.marker).is_file():
            other.rename(directory)
    if (directory / kind.marker).is_file():
        for ending in ("new", "old"):
            shutil.rmtree(beside(directory, ending), ignore_errors=True)
        for name in kind.names & {"progress.json", "--input.rows", "--val.rows"}:
            (directory / name).unlink(missing_ok=True)       # of a complete .part
    return directory


@contextlib.contextmanager
def replacing_file(path):
    """Replaces a file atomically: the caller writes the yielded path, which is then renamed.

    A kill or a full disk leaves the old file; after an exception the new one is removed.
    """
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
    """Yields (.DIR.part, content of progress.json) for work that may be interrupted.

    At the end .DIR.part is renamed to DIR. The same command continues with the .DIR.part of an
    interrupted one, once the caller has added a key to progress.json. Other errors remove
    .DIR.part, as the same command would fail again.

    made_from   everything that the result depends on; a .DIR.part made from others is removed

    Raises UserError as refuse_foreign does.
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
    """Writes a JSON file atomically."""
    with replacing_file(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def sync(path):
    """Waits until a file is on disk."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def reading(path):
    """Adds the file name to an OSError of read(); Python does so for open() only."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def disk_full(directory, wanted):
    """Turns a failed write's exception in safetensors or torch.save into the OSError behind it.

    wanted: bytes to write; the disk is full if it has less
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from None
        if shutil.disk_usage(directory).free < wanted or "failed writing file" in str(error):
            raise OSError(errno.ENOSPC, f"no space left while writing ({error})") from None
        raise


def read_json(path):
    """The JSON object in a file, a dict. Raises UserError."""
    try:
        with reading(path):
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")        # half a surrogate pair is read, but not written
    except (ValueError, OSError, RecursionError) as error:           # RecursionError: deeply nested lists
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
