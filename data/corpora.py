"""
Where documents come from: the standard library's own source, files and folders of text, .jsonl files.

    for name, parts in corpora.documents(corpora.source(["notes/", "faq.jsonl"]), skipped := corpora.Skipped()): ...

A document is its name and its parts. Text comes as an iterator of pieces (str, about 1 MB each, so that a large file is
never held whole); prompt and response as an Example. Nothing is normalized: line ends stay as they are, only a
byte-order mark goes. What cannot be used is counted in `skipped` by reason.
"""

import codecs, io, json, os, re, sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data import UserError
from data.files import reading

KNOWN = ["stdlib"]  # corpora that need no file and no network; download.py has others
PIECE, HARD_CUT = 1 << 20, 8 << 20  # characters
# A place between two words in every pattern we know (Qwen2, GPT-2, Llama 3): white space after a letter or digit begins
# a new one. A cut *after* a newline would not do: GPT-2 takes "\n\n" as one word at the end of a text, as two within.
BOUNDARY = re.compile(r"(?<=[^\W_])(?=[ \r\n])")
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


class File(NamedTuple):
    name: str  # relative and posix: the same on every machine
    path: Path
    lf: bool = False  # turn CRLF into LF
    end: bytes = b""  # what stands between documents, of a file that holds many


class Example(NamedTuple):
    prompt: str
    response: str
    fields: dict  # all of the line


class Skip(Exception):
    """This document cannot be used; the message is the reason it is counted under."""


class Skipped(Counter):
    """How many documents could not be used, by reason, and the names of the first few of each."""
    def __init__(self, counts=(), names=()):
        super().__init__(counts)
        self.names = {reason: list(few) for reason, few in dict(names).items()}

    def add(self, reason, name):
        self[reason] += 1
        few = self.names.setdefault(reason, [])
        few += [printable(name)] * (len(few) < 5)

    def __str__(self):
        def of(reason, n):
            few = self.names.get(reason, ())
            return f"{n:,} {reason}" + (f" ({', '.join(few)}{', ...' * (n > len(few))})" if few else "")
        return ", ".join(of(reason, n) for reason, n in sorted(self.items()) if n)


def printable(name):
    """A file's name as text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def source(inputs, name=None, flag="--input", skipped=None):
    """The files behind `inputs` (paths), or behind the known corpus `name`: a list of File, sorted within each folder.

    Hidden files, __pycache__, node_modules and links to folders are passed over. Raises UserError, naming `flag`, for
    a path that is not there.
    """
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        # Windows installs it with CRLF; _sysconfigdata* is written by this machine's build, it is not the library's
        return sorted(File(p.relative_to(root).as_posix(), p, lf=True) for p in walk(root, STDLIB_SKIPS, ".py")
                      if not p.name.startswith("_sysconfigdata"))
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = walk(path, {"__pycache__", "node_modules"}, skipped=skipped)
            files += sorted(File(p.relative_to(path).as_posix(), p) for p in found)
        elif path.exists():
            files.append(File(path.name, path))
        else:
            raise UserError(f"{flag} {path}: there is no such file or folder")
    seen = set()  # a file given twice, or inside a folder that was given too, is one file
    return [f for f in files if (key := os.path.realpath(f.path)) not in seen and not seen.add(key)]


def walk(root, skip, suffix="", skipped=None):
    """Files under `root`; links to folders are not followed, so there is no loop, and our own datasets not entered.
    Folders that cannot be read are counted in `skipped`."""
    def unreadable(error):
        if skipped is not None:
            skipped.add(f"folder that cannot be read: {error.strerror}", os.path.relpath(error.filename, root))
    for folder, folders, files in os.walk(root, onerror=unreadable):
        if "meta.json" in files and "train.bin" in files or "progress.json" in files and folder.endswith(".part"):
            folders[:], files = [], []
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        yield from (Path(folder, f) for f in files if not f.startswith(".") and f.endswith(suffix))


def documents(files, skipped):
    """Yield (name, parts) for each document of `files` (see `source`); counts in `skipped`, a Skipped.

    Reading `parts` of a text may raise Skip: then the whole document is to be dropped and counted by the caller.
    Raises UserError for a broken .jsonl line.
    """
    for name, path, lf, end in files:
        if not path.is_file():  # a dangling link, a pipe, a socket
            skipped.add("not a regular file", name)
            continue
        yield from (jsonl(path, name) if path.suffix.lower() == ".jsonl" else between(path, name, end) if end else
                    [(name, pieces(blocks(path, lf)))])


def between(path, name, end):
    """Yield (place, parts) of each text that `end` (bytes) ends or parts from the next; blank ones are passed over."""
    number, rest, block = 0, b"", b" "
    with reading(path), open(path, "rb") as f:
        while block:
            block = f.read(PIECE)
            *texts, rest = (rest + (block or end)).split(end)
            for text in filter(bytes.strip, texts):
                number += 1
                yield f"{name}, document {number}", pieces(blocks(io.BytesIO(text.strip(b"\r\n"))))


def blocks(path, lf=False):
    """The text of a file (or an open one) as str of about 1 MB. Raises Skip if it is not UTF-8, is binary, or blank."""
    decoder, empty = codecs.getincrementaldecoder("utf-8-sig")(), True
    try:
        f = path if isinstance(path, io.BytesIO) else open(path, "rb")
    except PermissionError:
        raise Skip("no permission to read") from None
    with f:
        while block := readable(f):
            if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and empty:
                raise Skip("UTF-16, to be saved as UTF-8")
            if b"\0" in block:
                raise Skip("binary (has NUL bytes)")
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError:
                raise Skip("not UTF-8") from None
            empty = empty and not text.strip()
            yield text.replace("\r\n", "\n") if lf else text
        if decoder.getstate()[0]:  # ends within a character (a lone part of a byte-order mark too)
            raise Skip("not UTF-8")
    if empty:
        raise Skip("empty")


def readable(file):
    """The next PIECE of an open file. Raises Skip where the disk, or the system, does not give it."""
    try:
        return file.read(PIECE)
    except OSError as error:
        raise Skip(f"cannot be read: {error.strerror or error}") from None


def pieces(texts):
    """Join and cut `texts` (an iterator of str) into pieces of about PIECE characters, at word boundaries.

    So a document tokenized by pieces has the ids of the whole. Only text without a boundary for HARD_CUT characters
    (nobody's prose) is cut anywhere.
    """
    buffer = ""
    for text in texts:
        buffer += text
        if len(buffer) < PIECE:
            continue
        cut = max((m.start() for m in BOUNDARY.finditer(buffer, len(buffer) - 65536)), default=0)
        if cut == 0 and len(buffer) >= HARD_CUT:
            cut = len(buffer)
        if cut:
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def jsonl(path, name):
    """Yield (place, parts) per line: {"text"} as pieces, {"prompt", "response"} as an Example.

    Raises UserError naming file and line for anything else; blank lines are passed over.
    """
    for place, fields in objects(path, name):
        text = fields.get("text")
        if all(isinstance(fields.get(key), str) for key in ("prompt", "response")):
            yield place, Example(clean(fields["prompt"]), clean(fields["response"]), fields)
        elif isinstance(text, str):
            text = clean(text)
            yield place, pieces(text[i:i + PIECE] for i in range(0, len(text), PIECE))
        else:
            raise UserError(f'{place}: needs the string field "text", or the two "prompt" and "response"')


def objects(path, name):
    """Yield (place, dict) per line of a .jsonl file that is not blank; {} for JSON that is no object.

    Raises UserError naming file and line for what is not UTF-8 or not JSON.
    """
    with reading(path), open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            place = f"{name}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{place}: not UTF-8; save the file as UTF-8") from None
            except (ValueError, RecursionError) as e:
                raise UserError(f"{place}: not valid JSON ({e}); repair or remove the line") from None
            yield place, row if isinstance(row, dict) else {}


def clean(text):
    """JSON can spell half a surrogate pair ("\\ud83d"), which is no text: it becomes U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
