"""
Where documents come from: the standard library's source, files and folders of text, .jsonl files.

    for name, parts in corpora.documents(corpora.source(["notes/", "faq.jsonl"]), skipped := corpora.Skipped()): ...

A document is a name and parts. The parts of a text are an iterator of pieces (str, about 1 MB each,
so that a large file is never held whole); a conversation is an Example. Nothing is
normalized: line ends stay, only a byte-order mark is removed. Documents that cannot be used are
counted in `skipped` by reason.
"""

import codecs, io, json, os, re, sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data import UserError, conversation
from data.files import reading

KNOWN = ["stdlib"]  # corpora that need no file and no network; download.py has others
PIECE, HARD_CUT = 1 << 20, 8 << 20  # characters
# A word border for Qwen2, GPT-2 and Llama 3: white space after a letter or digit begins a word.
# After a newline would be wrong: to GPT-2 "\n\n" is one word at the end of a text, two within.
BOUNDARY = re.compile(r"(?<=[^\W_])(?=[ \r\n])")
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


class File(NamedTuple):
    """A file of documents."""
    name: str  # relative and posix: the same on every machine
    path: Path
    lf: bool = False  # turn CRLF into LF
    end: bytes = b""  # the separator of documents, for a file that holds many
    names: conversation.Names = conversation.Names()  # of the fields to read


class Example(NamedTuple):
    """A conversation, in which the assistant's turns are learned."""
    messages: list  # as data/conversation.py reads them
    fields: dict  # all of the record
    place: str  # file and line, for messages

    def response(self):
        """All that is learned, as one text."""
        return "\n".join(self.messages[i]["content"] for i in conversation.answers(self.messages))

    def contents(self):
        """The texts of all messages, a list."""
        return [message["content"] for message in self.messages]


class Skip(Exception):
    """This document cannot be used; the message is the reason under which it is counted."""


class Skipped(Counter):
    """Counts documents that could not be used, by reason; `names` lists the first five of each.

    shapes   a Counter of records by their shape in words
    """
    def __init__(self, counts=(), names=()):
        super().__init__(counts)
        self.shapes = Counter()
        self.names = {reason: list(few) for reason, few in dict(names).items()}

    def add(self, reason, name):
        """Counts one document."""
        self[reason] += 1
        self.names[reason] = (self.names.get(reason, []) + [printable(name)])[:5]

    def merge(self, other):
        """Adds the counts and names of another Skipped."""
        self.update(other)
        for reason, few in other.names.items():
            self.names[reason] = (self.names.get(reason, []) + few)[:5]

    def counts(self):
        """{reason: number}, sorted, without zeros."""
        return {reason: n for reason, n in sorted(self.items()) if n}

    def __str__(self):
        def line(reason, n):
            few = self.names.get(reason, ())
            return f"{n:,} {reason}" + (f" ({', '.join(few)}{', ...' * (n > len(few))})" if few else "")
        return ", ".join(line(reason, n) for reason, n in self.counts().items())


def printable(name):
    """A file's name as text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def source(inputs, name=None, flag="--input", skipped=None):
    """The files of `inputs` (paths), or of the known corpus `name`: a list of File.

    Each folder is sorted. Hidden files, __pycache__, node_modules and links to folders are left
    out. Raises UserError, naming `flag`, for a path that does not exist.
    """
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        # Windows installs CRLF; _sysconfigdata* is not the library's: this machine's build wrote it
        return sorted(File(p.relative_to(root).as_posix(), p, lf=True) for p in walk(root, STDLIB_SKIPS, ".py")
                      if not p.name.startswith("_sysconfigdata"))
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            paths = walk(path, {"__pycache__", "node_modules"}, skipped=skipped)
            files += sorted(File(p.relative_to(path).as_posix(), p) for p in paths)
        elif path.exists():
            files.append(File(path.name, path))
        else:
            raise UserError(f"{flag} {path}: there is no such file or folder")
    unique = {}  # a file given twice, or inside a folder that was given too, is one file
    for file in files:
        unique.setdefault(os.path.realpath(file.path), file)
    return list(unique.values())


def walk(root, skip, suffix="", skipped=None):
    """Yields files under `root`, without prepared datasets and links to folders, which may loop.

    Folders that cannot be read are counted in `skipped`.
    """
    def unreadable(error):
        if skipped is not None:
            skipped.add(f"folder that cannot be read: {error.strerror}", os.path.relpath(error.filename, root))
    for folder, folders, files in os.walk(root, onerror=unreadable):
        if "meta.json" in files and "train.bin" in files or "progress.json" in files and folder.endswith(".part"):
            folders[:], files = [], []
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        yield from (Path(folder, f) for f in files if not f.startswith(".") and f.endswith(suffix))


def documents(files, skipped):
    """Yields (name, parts) of each document in `files` (see `source`); counts in `skipped`.

    Reading `parts` of a text may raise Skip: the caller then drops and counts the whole document.
    Raises UserError for a broken .jsonl line.
    """
    for name, path, lf, end, names in files:
        if not path.is_file():  # a dangling link, a pipe, a socket
            skipped.add("not a regular file", name)
        elif path.suffix.lower() == ".jsonl":
            yield from jsonl(path, name, names, skipped)
        elif end:
            yield from separated(path, name, end)
        else:
            yield name, pieces(blocks(path, lf))


def separated(path, name, end):
    """Yields (place, parts) of each text that is not blank, between separators `end` (bytes)."""
    number, rest, block = 0, b"", b" "
    with reading(path), open(path, "rb") as f:
        while block:
            block = f.read(PIECE)
            *texts, rest = (rest + (block or end)).split(end)
            for text in filter(bytes.strip, texts):
                number += 1
                yield f"{name}, document {number}", pieces(blocks(io.BytesIO(text.strip(b"\r\n"))))


def blocks(path, lf=False):
    """Yields the text of a file (or an open one) as str of about 1 MB.

    Raises Skip if the file is not UTF-8, binary, blank or unreadable.
    """
    decoder, empty = codecs.getincrementaldecoder("utf-8-sig")(), True
    try:
        f = path if isinstance(path, io.BytesIO) else open(path, "rb")
    except PermissionError:
        raise Skip("no permission to read") from None
    with f:
        while block := read_block(f):
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
        if decoder.getstate()[0]:  # ends within a character, or within a byte-order mark
            raise Skip("not UTF-8")
    if empty:
        raise Skip("empty")


def read_block(file):
    """The next PIECE bytes of an open file. Raises Skip where the disk or the system refuses."""
    try:
        return file.read(PIECE)
    except OSError as error:
        raise Skip(f"cannot be read: {error.strerror or error}") from None


def pieces(texts):
    """Joins and cuts `texts` (str) into pieces of about PIECE characters, at word boundaries.

    A document tokenized piece by piece so has the ids of the whole. A text without a boundary for
    HARD_CUT characters, which no prose is, is cut anywhere.
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


def jsonl(path, name, names, skipped):
    """Yields (place, parts) per line. Raises UserError, naming file and line, for other lines."""
    for place, fields in objects(path, name):
        yield document_of(place, fields, names, skipped)


def document_of(place, fields, names, skipped):
    """(place, parts) of a record, a dict: a conversation as an Example, a text as pieces.

    The shape is counted in skipped.shapes. Raises UserError, naming the place, for a record of no
    known shape.
    """
    found = conversation.of_record(place, fields, names)
    if found:
        parts, shape = Example(found[0], fields, place), found[1]
    else:
        text, shape = conversation.text_of_record(place, fields, names)
        parts = pieces(text[i:i + PIECE] for i in range(0, len(text), PIECE))
    skipped.shapes[shape] += 1
    return place, parts


def objects(path, name):
    """Yields (place, dict) per line of a .jsonl file that is not blank; {} for other JSON.

    Raises UserError, naming file and line, for a line that is not UTF-8 or not JSON.
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
