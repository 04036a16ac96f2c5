"""
Corpora that `python data/prepare.py NAME` downloads to data/downloads/NAME/, once, and only if they are named.

    train, val = download.files("tinystories")      # lists of corpora.File

A file that is there already is not fetched, so one that was put there by hand will do. What is under way is FILE.part:
the same command goes on from it by a Range request, if the server says by an ETag that the file is still the same.
"""

import errno, hashlib, http.client, re, time, urllib.error, urllib.request
from pathlib import Path

from tqdm import tqdm

from data import UserError, corpora
from data.files import sync

FOLDER = Path(__file__).resolve().parent / "downloads"
TRIES, WAIT = 6, 1  # of one request; seconds before the second, twice as many before each further one
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP states that may be over in a while
GITHUB, HUB = "https://raw.githubusercontent.com/", "https://huggingface.co/datasets/"
CORPORA = {  # name: (address of a fixed revision, {file: the id by which git knows its content, or None: not known})
    "shakespeare": (GITHUB + "karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
                    {"input.txt": "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9"}),
    "wikitext2": (GITHUB + "pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/"
                  "wikitext-2/",
                  {"train.txt": "2d84b35af79e411d73ea7cae83c73964c6ac83b4",
                   "valid.txt": "eec944eb2d9e46061cd34a6913528797db6842fc",
                   "test.txt": "6f3fc88e4cd88456ea892971f9f12243e8428624"}),
    "tinystories": (HUB + "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/",
                    {"TinyStoriesV2-GPT4-train.txt": None, "TinyStoriesV2-GPT4-valid.txt": None}),
}


class Failed(Exception):
    """An attempt to download something, or after some of them all; the message says why."""


def files(name):
    """(training, validation): lists of corpora.File of the corpus `name`, after fetching what is not there.

    Raises UserError if a file cannot be had, or is not the one that we know.
    """
    base, known = CORPORA[name]
    missing = [file for file in known if not (FOLDER / name / file).is_file()]
    for file, blob in known.items():
        path, url = FOLDER / name / file, base + file
        if file in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                download(url, path)
            except Failed as reason:
                todo = ", ".join(f for f in missing if not (FOLDER / name / f).is_file())
                raise UserError(f"{name} could not be downloaded ({reason}): run it again, or put {todo} of {base} into"
                                f" {path.parent} by hand") from None
        sha256, found = digests(path) if blob or file in missing else ("", None)
        if blob and found != blob:
            raise UserError(f"{path} is not the file of {url} (git calls that {blob[:12]}, this one {found[:12]}): "
                            "remove it and run it again")
        if file in missing:
            print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 {sha256}"
                  + ("" if blob else "; we know of no checksum to compare that with"))
    end = b"<|endoftext|>" if name == "tinystories" else b""
    found = [corpora.File(file, FOLDER / name / file, end=end) for file in known if file != "test.txt"]  # for --text
    return [f for f in found if "valid" not in f.name], [f for f in found if "valid" in f.name]


def digests(path):
    """(sha256, git's blob id) of a file, in hex."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest()


def persist(attempt):
    """attempt() until it returns, TRIES times at most. Raises Failed; a full disk stays the OSError that it is."""
    for failures in range(TRIES):
        wait = WAIT * 2 ** failures
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code not in PASSING:
                break
            after = error.headers.get("Retry-After", "")
            wait = min(int(after), 300) if after.isdigit() else 60 * WAIT if error.code == 429 else wait
        except (OSError, http.client.HTTPException, Failed) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or getattr(error, "filename", None):
                raise
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            if isinstance(error, urllib.error.URLError) and failures == 0:
                break  # no connection at all: there is no network, or none that waiting brings
        if failures < TRIES - 1:
            time.sleep(wait)
    raise Failed(reason)


def get(url, **headers):
    request = urllib.request.Request(url, headers={"User-Agent": "data/prepare.py", **headers})
    return urllib.request.urlopen(request, timeout=60)


def download(url, path):
    """Fetch `url` into `path`, over as many connections as it takes; PATH.part is what came. Raises Failed."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")

    def attempt():
        have = part.stat().st_size if part.is_file() and tag.is_file() else 0
        etag = tag.read_text(encoding="utf-8") if have else None
        try:  # If-Range: the rest of the file that has this ETag, else the whole one
            response = get(url, **({"Range": f"bytes={have}-", "If-Range": etag} if have else {}))
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return  # all was there already
            tag.unlink()
            raise Failed("there is less on the server than what came before") from None
        with response:
            new = response.headers.get("ETag", "")
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status != 206:
                have, total = 0, int(response.headers.get("Content-Length", -1))
            elif span and int(span[1]) == have and new == etag:
                total = int(span[2])
            else:
                tag.unlink(missing_ok=True)
                raise Failed("the server sent another part, or one of another file, than was asked for")
            if have == 0:
                tag.unlink(missing_ok=True)
            bar = tqdm(total=total if total >= 0 else None, initial=have, unit="B", unit_scale=True, desc=path.name,
                       disable=None)
            with open(part, "ab" if have else "wb") as f, bar:
                if new.startswith('"'):  # a weak one, W/"...", does not vouch for each byte
                    tag.write_text(new, encoding="utf-8")
                while block := response.read1(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if total >= 0 and part.stat().st_size != total:
            raise Failed(f"{part.stat().st_size:,} of {total:,} bytes came")

    persist(attempt)
    sync(part)
    part.replace(path)
    tag.unlink(missing_ok=True)
