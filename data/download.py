"""
Corpora that `python data/prepare.py NAME` downloads to data/downloads/NAME/, once, and only on request.

    train, val = download.files("tinystories")      # lists of corpora.File

A file that exists is not fetched, so a file put there by hand will do. A download under way is
FILE.part: the same command resumes it by a Range request, if the server says by an ETag that the
file is still the same.
"""

import errno, hashlib, http.client, re, time, urllib.error, urllib.request
from pathlib import Path

from tqdm import tqdm

from data import UserError, corpora
from data.files import sync
from data.records import parquet_library

FOLDER = Path(__file__).resolve().parent / "downloads"
TRIES, WAIT = 6, 1  # of one request; seconds before the second, twice as many before each further one
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP states that may be over in a while
GITHUB, HUB = "https://raw.githubusercontent.com/", "https://huggingface.co/datasets/"
CORPORA = {  # name: (address of a fixed revision, {file: git's id of the content or sha256, or None: not known})
    "shakespeare": (GITHUB + "karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
                    {"input.txt": "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9"}),
    "wikitext2": (GITHUB + "pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/"
                  "wikitext-2/",
                  {"train.txt": "2d84b35af79e411d73ea7cae83c73964c6ac83b4",
                   "valid.txt": "eec944eb2d9e46061cd34a6913528797db6842fc",
                   "test.txt": "6f3fc88e4cd88456ea892971f9f12243e8428624"}),
    "tinystories": (HUB + "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/",
                    {"TinyStoriesV2-GPT4-train.txt": None, "TinyStoriesV2-GPT4-valid.txt": None}),
    "fineweb-edu": (HUB + "HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/",
                    {"013_00000.parquet": "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de"}),
}  # of the 14 files of fineweb-edu's sample this is the smallest, 541 MB; the sum is as public lock files give it
SIZES = {"fineweb-edu": 100_000_000}  # bytes of text that are taken, if --size does not say it


class Failed(Exception):
    """A download failed, after one attempt or after all; the message gives the reason."""


def files(name):
    """(training, validation) files of the corpus `name`, two lists of corpora.File; fetches them.

    Raises UserError if a file cannot be fetched, or is not the known one.
    """
    known = CORPORA[name][1]
    for file in known:
        if file.endswith(".parquet"):
            parquet_library(name)  # before a long download, not after it
        fetch(name, file)
    end = b"<|endoftext|>" if name == "tinystories" else b""
    texts = [corpora.File(file, FOLDER / name / file, end=end) for file in known if file != "test.txt"]  # for --text
    return [f for f in texts if "valid" not in f.name], [f for f in texts if "valid" in f.name]


def fetch(name, file):
    """Downloads a missing file of a corpus, and checks the content. Raises UserError."""
    base, known = CORPORA[name]
    path, url, blob = FOLDER / name / file, base + file, known[file]
    missing = not path.is_file()
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(url, path)
        except Failed as reason:
            todo = ", ".join(f for f in known if not (path.parent / f).is_file())
            raise UserError(f"{name} could not be downloaded ({reason}): run it again, or put {todo} of {base} into"
                            f" {path.parent} by hand") from None
    if not missing and not blob:
        return
    sha256, actual = digests(path)
    if blob not in (None, actual, sha256):
        kind, actual = ("sha256", sha256) if len(blob) == len(sha256) else ("git's id", actual)
        raise UserError(f"{path} is not the file of {url} ({kind} {blob[:12]}, but here {actual[:12]}): "
                        "remove it and run it again")
    if missing:
        print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 {sha256}"
              + ("" if blob else "; we know of no checksum to compare that with"))


def digests(path):
    """(sha256, git's blob id) of a file, in hex."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest()


def download(url, path):
    """Fetches `url` into PATH.part, then PATH, in several attempts if need be. Raises Failed."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    persist(lambda: receive(url, part, tag))
    sync(part)
    part.replace(path)
    tag.unlink(missing_ok=True)


def persist(attempt):
    """Calls attempt() up to TRIES times, until it returns. Raises Failed, or the disk's OSError."""
    for failures in range(TRIES):
        try:
            return attempt()
        except (OSError, http.client.HTTPException, Failed) as error:
            reason, wait = after_failure(error, failures)
        if wait is None:
            break
        if failures < TRIES - 1:
            time.sleep(wait)
    raise Failed(reason)


def after_failure(error, failures):
    """(reason, seconds to wait, or None to give up) after an error that `failures` others preceded.

    Raises the error again if it is the disk's: a full one, or a file that cannot be written.
    """
    wait = WAIT * 2 ** failures
    if isinstance(error, urllib.error.HTTPError):
        after = error.headers.get("Retry-After", "")
        if error.code not in PASSING:
            wait = None
        elif after.isdigit():
            wait = min(int(after), 300)
        elif error.code == 429:
            wait = 60 * WAIT
        return f"the server answers {error.code} {error.reason}", wait
    if getattr(error, "errno", None) == errno.ENOSPC or getattr(error, "filename", None):
        raise error
    if isinstance(error, urllib.error.URLError) and failures == 0:
        wait = None  # no connection at all: there is no network, or none that waiting brings
    return getattr(error, "reason", None) or str(error) or type(error).__name__, wait


def receive(url, part, tag):
    """Fetches the rest of a file into `part` over one connection, the ETag into `tag`.

    Raises Failed.
    """
    have = part.stat().st_size if part.is_file() and tag.is_file() else 0
    etag = tag.read_text(encoding="utf-8") if have else None
    headers = {"User-Agent": "data/prepare.py"}
    if have:  # If-Range: the rest of the file that has this ETag, else the whole one
        headers.update({"Range": f"bytes={have}-", "If-Range": etag})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # the part is the whole file
        tag.unlink()
        raise Failed("there is less on the server than what came before") from None
    with response:
        first, total = span(response, have, etag)
        if not first:
            tag.unlink(missing_ok=True)
        if first is None:
            raise Failed("the server sent another part, or one of another file, than was asked for")
        bar = tqdm(total=total, initial=first, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with open(part, "ab" if first else "wb") as f, bar:
            new = response.headers.get("ETag", "")
            if new.startswith('"'):  # a weak one, W/"...", does not vouch for each byte
                tag.write_text(new, encoding="utf-8")
            while block := response.read1(1 << 20):
                f.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise Failed(f"{part.stat().st_size:,} of {total:,} bytes came")


def span(response, have, etag):
    """(first byte that a response sends, size of the file, or None if the server does not say it).

    The first byte is None for another part than the one after `have` bytes of the file `etag`.
    """
    if response.status != 206:
        length = response.headers.get("Content-Length")
        return 0, None if length is None else int(length)
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if match and int(match[1]) == have and response.headers.get("ETag", "") == etag:
        return have, int(match[2])
    return None, None
