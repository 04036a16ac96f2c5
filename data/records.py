"""
Records of a file, a dict each: lines of JSON, JSON, a table with a header, Parquet; also packed as .gz or .zst.

    for place, fields in records.objects(Path("faq.csv.gz"), "faq.csv.gz"): ...

A record is read at a time, so that memory stays bounded for a file of any size. `place` names file
and line (.jsonl, .csv), record (.json) or row (.parquet), for messages.
"""
import codecs, contextlib, csv, functools, gzip, io, itertools, json, os, re, zlib

from data import UserError
from data.files import reading

PIECE, LONGEST = 1 << 20, 64 << 20  # characters: read at a time, and of one record or line at most
ROWS = 64  # of a Parquet file, decoded at a time
LISTS = {"data", "documents", "entries", "examples", "items", "pairs", "questions", "records", "rows", "samples"}
BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # first, as UTF-32's begins with UTF-16's
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
SPACE, DECODE = re.compile(r"[ \t\r\n]*"), json.JSONDecoder().raw_decode


def format_of(path):
    """(ending of the content, packing) of a file's name: (".csv", ".gz") of faq.CSV.gz, (".csv", "") of faq.csv."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], last) if last in (".gz", ".zst") else (last, "")


def holds_records(path):
    """Whether a file is one of records, by its name."""
    return format_of(path)[0] in READERS


def objects(path, name):
    """Yields (place, dict) per record of a file; {} for JSON that is no object.

    Raises UserError, naming the place, for what cannot be read, and for a missing package.
    """
    with reading(path), unpacked(path, name) as file:
        for place, row in READERS[format_of(path)[0]](file, name):
            yield place, row if isinstance(row, dict) else {}


@contextlib.contextmanager
def unpacked(path, name):
    """Opens a file to read the bytes of its content, decompressed. Raises UserError if it is broken."""
    packing, broken = format_of(path)[1], ()
    with open(path, "rb") as file:
        if packing == ".gz":
            file, broken = gzip.GzipFile(fileobj=file), (EOFError, zlib.error, gzip.BadGzipFile)
        elif packing == ".zst":
            zstd = zstd_library(name)
            file, broken = zstd.ZstdFile(file), (EOFError, zstd.ZstdError)
        try:
            yield file
        except broken as error:
            raise UserError(f"{name}: not a whole {packing} file ({error}); fetch or pack it again") from None


def zstd_library(name):
    """Python's module for .zst; not the package `zstandard`, whose reader takes a cut file for a whole one.

    Raises UserError if it is missing.
    """
    try:
        from compression import zstd                             # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(f"{name}: .zst needs a package: pip install backports.zstd, or unpack the file") from None
    return zstd


def parquet_library(name):
    """The module pyarrow.parquet. Raises UserError if it is missing."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name}: Parquet needs a package: pip install pyarrow") from None
    return parquet


def encoding_of(head):
    """The encoding that the first four bytes of a text say by a byte-order mark; UTF-8 without one."""
    return next((name for mark, name in BOMS.items() if head.startswith(mark)), "utf-8-sig")


def open_text(file, newline):
    """Text of an open file of bytes. Bytes that are not UTF-8 become what `checked` refuses."""
    encoding = encoding_of(file.read(4))
    file.seek(0)
    return io.TextIOWrapper(file, encoding, "surrogateescape", newline)


def checked(read, size, place):
    """The text of read(size), a method of `open_text`. Raises UserError if it is not text."""
    try:
        text = read(size)
        text.encode("utf-8")  # a byte that could not be decoded is half a surrogate pair, which has no UTF-8
    except UnicodeError:
        text = "\0"
    if "\0" in text:  # also of UTF-16 without a byte-order mark
        raise UserError(f"{place}: not UTF-8 text; save the file as UTF-8 (in Excel: CSV UTF-8)")
    return text


def too_long(place):
    """The UserError for a record that memory may not hold."""
    return UserError(f"{place}: longer than {LONGEST >> 20} million characters; cut it into several")


def text_lines(file, name, newline):
    """Yields (place, line) of an open file. Raises UserError."""
    text = open_text(file, newline)
    for number in itertools.count(1):
        place = f"{name}, line {number}"
        line = checked(text.readline, LONGEST, place)
        if len(line) == LONGEST:
            raise too_long(place)
        if not line:
            return
        yield place, line


def json_lines(file, name):
    """Yields (place, value) per line that is not blank."""
    for place, line in text_lines(file, name, "\n"):
        if not line.strip():
            continue
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON ({error}); repair or remove the line") from None


class Scanner:
    """Takes JSON from text a value at a time. The buffer holds that value and a piece more."""

    def __init__(self, text, name):
        self.text, self.name, self.number = text, name, 1
        self.buffer, self.at, self.passed = "", 0, 0  # passed: characters before the buffer

    def place(self):
        """File and record, for messages."""
        return f"{self.name}, record {self.number}"

    def broken(self, reason):
        """The UserError for text that is not JSON."""
        return UserError(f"{self.place()}: not valid JSON ({reason}); repair or remove it")

    def more(self):
        """Doubles the text from here on; False at the end of the file."""
        rest = self.buffer[self.at:]
        if len(rest) >= LONGEST:
            raise too_long(self.place())
        piece = checked(self.text.read, max(PIECE, len(rest)), self.place())
        self.buffer, self.at, self.passed = rest + piece, 0, self.passed + self.at
        return bool(piece)

    def peek(self):
        """The next character after white space, which is passed over; "" at the end."""
        while True:
            self.at = SPACE.match(self.buffer, self.at).end()
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at:self.at + 1]

    def take(self, wanted):
        """Takes the next character, which must be `wanted`."""
        char = self.peek()
        if char != wanted:
            raise self.broken(f"{char or 'the end'} where {wanted} should be")
        self.at += 1

    def value(self):
        """Takes the next value, whole."""
        self.peek()
        ended = False
        while True:
            try:
                value, end = DECODE(self.buffer, self.at)
                if ended or end < len(self.buffer):  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:  # near the end of the buffer, more text may mend it
                mendable = error.pos + 16 > len(self.buffer) or error.msg.startswith("Unterminated")
                if ended or not mendable:
                    raise self.broken(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(error) from None
            ended = not self.more()

    def record(self, value):
        """(place, value) of the next record."""
        place = self.place()
        self.number += 1
        return place, value

    def elements(self):
        """Yields the records of an array."""
        self.take("[")
        while self.peek() != "]":
            yield self.record(self.value())
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def members(self):
        """Yields the records of an array in an object: under a name of LISTS, or alone; else the object.

        An array of the turns of a conversation is no array of records.
        """
        start, fields, listed = self.passed + self.at, {}, False
        self.take("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise self.broken("the name of a field is no string")
            self.take(":")
            if key in LISTS and self.peek() == "[":
                listed = True
                yield from self.elements()
            else:
                fields[key] = self.value()
            if not listed and self.passed + self.at - start > LONGEST:
                raise too_long(self.place())
            if self.peek() != "}":
                self.take(",")
        self.take("}")
        only = next(iter(fields.values())) if len(fields) == 1 else None
        if listed:
            return
        if isinstance(only, list) and only and isinstance(only[0], dict) and not {"role", "from"} & only[0].keys():
            yield from map(self.record, only)
        else:
            yield self.record(fields)


def json_values(file, name):
    """Yields (place, value) of each record in JSON: an array, an object, or several of them."""
    scanner = Scanner(open_text(file, ""), name)
    while first := scanner.peek():
        if first == "[":
            yield from scanner.elements()
        elif first == "{":
            yield from scanner.members()
        else:
            yield scanner.record(scanner.value())


def table_rows(file, name, delimiters=",;\t"):
    """Yields (place, {column: str}) per row of a table with a header; cells that are missing are "".

    The delimiter is the one that cuts the header into most cells. Columns without a name and empty
    rows are left out. Raises UserError for a name that stands twice, or a row longer than the header.
    """
    csv.field_size_limit(LONGEST)
    texts = (text for _, text in text_lines(file, name, ""))
    first, header, line = next(texts, ""), None, 1
    delimiter = max(delimiters, key=lambda each: len(next(csv.reader([first], delimiter=each), [])))
    rows = csv.reader(itertools.chain([first], texts), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            place, line = f"{name}, line {line}", rows.line_num + 1
            if header is None and any(row):
                header = [cell.strip() for cell in row]
                named = [cell for cell in header if cell]
                if len(set(named)) < len(named):
                    raise UserError(f"{place}: two columns have one name; add or repair the header")
            elif any(row[len(header or ()):]):
                raise UserError(f"{place}: {len(row)} cells, but the header has {len(header)}; put quotes around text "
                                "that holds the delimiter")
            elif any(row):
                cells = dict(itertools.zip_longest(header, row[:len(header)], fillvalue=""))
                yield place, {column: cell for column, cell in cells.items() if column}
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: not a valid table ({error}); repair or remove the row") from None


def parquet_rows(file, name):
    """Yields (place, dict) per row; values that JSON does not know, such as dates, become str."""
    library, number = parquet_library(name), 0
    try:
        content = library.ParquetFile(file, buffer_size=PIECE, pre_buffer=False)  # so a row group is never held whole
        for batch in content.iter_batches(ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", json.loads(json.dumps(row, default=str))
    except (OSError, ValueError, NotImplementedError) as error:  # of pyarrow, without a number
        if getattr(error, "errno", None) or isinstance(error, gzip.BadGzipFile):
            raise
        raise UserError(f"{name}: cannot be read as Parquet ({' '.join(str(error).split())}); fetch or write it "
                        "again") from None


READERS = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_values, ".csv": table_rows,
           ".tsv": functools.partial(table_rows, delimiters="\t"), ".parquet": parquet_rows}
