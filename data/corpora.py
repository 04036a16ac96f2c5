"""
Where documents come from: the standard library's source, files and folders of text and of records.

    for name, parts in corpora.documents(corpora.source(["notes/", "faq.jsonl"]), skipped := corpora.Skipped()): ...

A document is a name and parts. The parts of a text are an iterator of pieces (str, about 1 MB each,
so that a large file is never held whole); a conversation is an Example. Nothing is
normalized: line ends stay, only a byte-order mark is removed. Documents that cannot be used are
counted in `skipped` by reason. records.py reads files of records, and packed ones.
"""

import codecs, gzip, io, os, re, sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data import UserError, conversation
from data.files import reading
from data.records import encoding_of, format_of, holds_records, objects, unpacked

KNOWN = ["stdlib"]  # corpora that need no file and no network; download.py has others
PIECE, HARD_CUT = 1 << 20, 8 << 20  # characters
# A word border for Qwen2, GPT-2 and Llama 3: white space after a letter or digit begins a word.
# After a newline would be wrong: to GPT-2 "\n\n" is one word at the end of a text, two within.
BOUNDARY = re.compile(r"(?<=[^\W_])(?=[ \r\n])")
ARCHIVE, PAGES = "archive, to be unpacked", "to be saved as text"
FOREIGN = {**dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz"), ARCHIVE), ".pdf": f"PDF, {PAGES}",
           **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx"), f"from a word processor, {PAGES}"),
           **dict.fromkeys((".xls", ".xlsx", ".ods"), "spreadsheet, to be saved as .csv")}
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


class File(NamedTuple):
    """A file of documents."""
    name: str  # relative and posix: the same on every machine
    path: Path
    lf: bool = False  # turn CRLF into LF
    end: bytes = b""  # the separator of documents, for a file that holds many
    names: conversation.Names = conversation.Names()  # of the fields to read
    found: bool = False  # in a folder, not named itself


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
            files += sorted(File(p.relative_to(path).as_posix(), p, found=True) for p in paths)
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
    Raises UserError for a broken record or a broken packed file.
    """
    for name, path, lf, end, names, found in files:
        if not path.is_file():  # a dangling link, a pipe, a socket
            skipped.add("not a regular file", name)
        elif format_of(path)[0] in FOREIGN:
            skipped.add(FOREIGN[format_of(path)[0]], name)
        elif holds_records(path):
            yield from from_records(path, name, found, names, skipped)
        elif end:
            yield from separated(path, name, end)
        else:
            yield name, pieces(blocks(path, lf))


def from_records(path, name, found, names, skipped):
    """Yields (place, parts) of each record of a file.

    In a folder a table or .json may as well be settings or figures: a file `found` there is skipped
    if the first record is no document. Raises UserError for all other records that are none.
    """
    all_of = (document_of(place, fields, names, skipped) for place, fields in objects(path, name))
    try:
        first = next(all_of, None)
    except UserError as error:
        if found and format_of(path) in ((".json", ""), (".csv", ""), (".tsv", "")):
            return skipped.add("without text, or prompt and response", name)
        is_table = format_of(path)[0] in (".csv", ".tsv") and "not UTF-8" not in str(error)
        header = "; the first line of a table must name the columns" * is_table
        raise UserError(f"{error}{header}") from None
    if not first:
        return skipped.add("empty", name)
    yield first
    yield from all_of


def kind_of(path):
    """("records" or "text", the ending of the name), for `listed`."""
    return "records" if holds_records(path) else "text", "".join(format_of(path)) or "without ending"


def listed(kinds):
    """A Counter of files by `kind_of` as text: "as records: 2 .csv, 1 .json; as text: 14 .md"."""
    lists = {}
    for (taken, ending), number in kinds.most_common():
        lists.setdefault(taken, []).append(f"{number:,} {ending}")
    few = {taken: ", ".join([*each[:5], *["..."] * (len(each) > 5)]) for taken, each in sorted(lists.items())}
    return "; ".join(f"as {taken}: {endings}" for taken, endings in few.items())


def separated(path, name, end):
    """Yields (place, parts) of each text that is not blank, between separators `end` (bytes)."""
    number, rest, block = 0, b"", b" "
    with reading(path), open(path, "rb") as f:
        while block:
            block = f.read(PIECE)
            *texts, rest = (rest + (block or end)).split(end)
            for text in filter(bytes.strip, texts):
                number += 1
                yield f"{name}, document {number}", pieces(decoded_blocks(io.BytesIO(text.strip(b"\r\n"))))


def blocks(path, lf=False):
    """Yields the text of a file, unpacked, as str of about 1 MB.

    Raises Skip if the file is unreadable or not text, UserError if it is packed and broken.
    """
    try:
        with unpacked(path, path.name) as file:
            yield from decoded_blocks(file, lf)
    except PermissionError:
        raise Skip("no permission to read") from None


def decoded_blocks(file, lf=False):
    """Yields the text of an open file as str of about 1 MB.

    Raises Skip if the file is not UTF-8 (or UTF-16 or UTF-32 with a byte-order mark), binary or blank.
    """
    encoding, empty = encoding_of(block := read_block(file)), True
    decoder, undecodable = codecs.getincrementaldecoder(encoding)(), f"not {encoding.removesuffix('-sig').upper()}"
    while block:
        if encoding == "utf-8-sig" and b"\0" in block:
            raise Skip("binary (has NUL bytes)")
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError:
            raise Skip(undecodable) from None
        empty = empty and not text.strip()
        yield text.replace("\r\n", "\n") if lf else text
        block = read_block(file)
    if decoder.getstate()[0]:  # ends within a character, or within a byte-order mark
        raise Skip(undecodable)
    if empty:
        raise Skip("empty")


def read_block(file):
    """The next PIECE bytes of an open file. Raises Skip where the disk or the system refuses."""
    try:
        return file.read(PIECE)
    except gzip.BadGzipFile:
        raise
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
