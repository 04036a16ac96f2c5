"""What every script shares: errors, flags, directories that survive a kill. Here, as data/ is where imports begin."""
import argparse, contextlib, difflib, errno, hashlib, json, os, shutil, sys
from pathlib import Path


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
    for stream in (sys.stdin, sys.stdout, sys.stderr):       # a Windows console or a pipe may not be utf-8
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


@contextlib.contextmanager
def replacing(directory, marker):
    """Write a directory so that a kill at any moment leaves a whole one: fill the yielded DIR.new, then swap names.

    marker  the file that is written last: a directory that has it is whole
    After a kill the first whole one of DIR, DIR.new and DIR.old is the latest; `settle` renames it to DIR. On an
    exception DIR is untouched and DIR.new is removed.
    """
    directory = settle(directory, marker)
    new, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        new.rename(directory)
    except BaseException:                                    # Ctrl-C and a full disk too
        shutil.rmtree(new, ignore_errors=True)
        settle(directory, marker)
        raise
    with contextlib.suppress(OSError):                       # the renames too are on disk, where a directory can be
        parent = os.open(directory.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(directory, marker):
    """The path of a directory, after finishing or undoing what a kill in `replacing` left."""
    directory = Path(directory) if Path(directory).name else Path(directory).resolve()      # "." has no name to add to
    for ending in (".new", ".old"):
        other = directory.with_name(directory.name + ending)
        if not directory.exists() and (other / marker).is_file():
            other.rename(directory)
    return directory


@contextlib.contextmanager
def replacing_file(path):
    """Write a file so that a kill or a full disk at any moment leaves what was there: fill the yielded PATH.new, then
    swap. On an exception PATH.new is removed."""
    new = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        sync(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def resumable(directory, made_from):
    """Yield (DIR.part, its progress.json as a dict): there already if a kill, Ctrl-C or a full disk left it half done.

    made_from   an iterable of all that the result depends on: what was begun from anything else is removed
    What is worth keeping has written more into progress.json (`write_json`) than what is there at first. DIR.part is
    removed at the end, and after any error that the same command would meet again.
    """
    part, key = directory.with_name(directory.name + ".part"), hashlib.sha256()
    for item in made_from:
        key.update(repr(item).encode("utf-8", "surrogateescape"))
    progress = part / "progress.json"
    progress = json.loads(progress.read_text(encoding="utf-8")) if progress.is_file() else {}
    if progress.get("key") == key.hexdigest() and len(progress) > 1:
        print(f"going on from what an interrupted run left in {part.name}")
    else:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        progress = {"key": key.hexdigest()}
    try:
        yield part, progress
    except (KeyboardInterrupt, OSError):
        if len(progress) > 1:
            print(f"\nwhat is done is kept in {part.name}: the same command goes on from there")
        else:
            shutil.rmtree(part, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(part, ignore_errors=True)


def write_json(path, content):
    with replacing_file(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def sync(path):
    """Returns when a file is on disk."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())
