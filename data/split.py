"""Which documents are for validation: near-duplicates stay on one side (MinHash, Broder 1997)."""
import hashlib, itertools, zlib
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import UserError, corpora
from data.conversation import answers
from data.files import sync, write_json

SMOKE_BYTES = 1 << 20
FEW = 10  # fewer documents (or groups of near-identical ones) than this are split inside each
BANDS, ROWS = 8, 4  # MinHash of 32 values; candidates for near-duplicates agree in all 4 values of a band
HASH_A, HASH_B = np.random.default_rng(0).integers(1, 2**63, (2, BANDS * ROWS), dtype=np.uint64) | np.uint64(1)
NO_HASH = 2**32 - 1
NO_HASHES = np.full(BANDS * ROWS, NO_HASH, np.uint32)
ROW = np.dtype([("size", "<i8"), ("digest", "u1", 16), ("signature", "<u4", BANDS * ROWS), ("usable", "?")])  # on disk
TRAIN, VAL, BOTH, DROP = 0, 1, 2, 3


class Scan:
    """One pass over the documents of `files`, a row each, also for skipped ones.

    sizes (n,) int64      UTF-8 bytes
    digests (n, 16) uint8 sha256 of the content, shortened
    usable (n,) bool      false for a skipped document
    kind                  "text" or "examples"
    sha256                hex, over names and contents
    shapes                {a shape of records in words: number}; {} without records

    limit: bytes of text after which no further document is read; smoke: about a megabyte.
    The rows are stored in part/LABEL.rows, the rest under `label` in `progress`. A scan that is
    stored there is not repeated. Raises UserError if files of both kinds are among `files`.
    """

    def __init__(self, files, skipped, smoke, label, part, progress, limit=None):
        self.path = part / f"{label}.rows"
        if label not in progress:
            progress[label] = self._read(files, smoke, label, SMOKE_BYTES if smoke else limit or float("inf"))
            write_json(part / "progress.json", progress)
        self.kind, self.sha256 = progress[label]["kind"], progress[label]["sha256"]
        skipped.merge(corpora.Skipped(progress[label]["skipped"], progress[label]["skipped_names"]))
        self.shapes = progress[label].get("shapes", {})
        rows = self._rows()
        self.sizes, self.usable, self.digests = (np.array(rows[name]) for name in ("size", "usable", "digest"))

    def _rows(self):
        return np.memmap(self.path, ROW, "r") if self.path.stat().st_size else np.zeros(0, ROW)  # nothing is no map

    def signatures(self):
        """MinHash signatures (n, 32) uint32, mapped from disk."""
        return self._rows()["signature"]

    def _read(self, files, smoke, label, limit):
        first_of, skipped, total, whole, read, last = {}, corpora.Skipped(), 0, hashlib.sha256(), Counter(), None
        expected = sum(path.stat().st_size for path in (f.path for f in files) if path.is_file())
        bar = tqdm(total=None if smoke else expected, unit="B", unit_scale=True, desc=f"read {label}", disable=None,
                   leave=False)
        with open(self.path, "wb") as rows, bar:
            for file, name, parts in ((f, *document) for f in files for document in corpora.documents([f], skipped)):
                row = np.zeros(1, ROW)
                try:
                    size, digest, signature = scan_document(parts, smoke, bar)
                    row[0] = size, np.frombuffer(digest[:16], np.uint8), signature, True
                    whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest)
                    read[corpora.kind_of(file.path)] += file is not last
                    last = file
                    first_of.setdefault("examples" if isinstance(parts, tuple) else "text", name)
                    total += size
                except corpora.Skip as reason:
                    skipped.add(str(reason), name)
                if len(first_of) == 2:
                    raise UserError(f"{first_of['text']} is text and {first_of['examples']} is a prompt and its "
                                    "response, or a conversation: make two datasets of them (two --name)")
                rows.write(row.tobytes())
                if total >= limit:
                    break
        sync(self.path)
        if read:
            print("" if label == "--input" else f"{label}: ", "read ", corpora.listed(read), sep="")
        return {"kind": next(iter(first_of), None), "sha256": whole.hexdigest(), "skipped": skipped,
                "skipped_names": skipped.names, "shapes": skipped.shapes}


def scan_document(parts, smoke, bar):
    """(size, sha256 digest (32 bytes), MinHash signature (32,)) of a document. Raises Skip.

    An example has the signature of its responses: prompts may be alike on both sides of the split.
    """
    digest, size, signature = hashlib.sha256(), 0, NO_HASHES
    if isinstance(parts, tuple) and not answers(parts.messages):
        raise corpora.Skip("conversation without an answer of the assistant to the user")
    for text, data in utf8(parts, smoke):
        signature = np.minimum(signature, minhash(data if text is not None else parts.response().encode("utf-8")))
        digest.update(data)
        size += len(data)
        bar.update(len(data))
    if size == 0:
        raise corpora.Skip("empty")
    if isinstance(parts, tuple) and not all(parts.messages[i]["content"].strip() for i in answers(parts.messages)):
        raise corpora.Skip("empty response")
    return size, digest.digest(), signature


def utf8(parts, smoke=False):
    """Yields (piece, UTF-8 bytes) of a text (smoke: the first), (None, bytes) of an example."""
    if isinstance(parts, tuple):
        yield None, "\0".join(parts.contents()).encode("utf-8")
    else:
        yield from ((piece, piece.encode("utf-8")) for piece in itertools.islice(parts, 1 if smoke else None))


def minhash(data):
    """Smallest values of 32 hashes over lines and sentences longer than 8 bytes: uint32 (32,)."""
    units = map(bytes.strip, data.replace(b". ", b"\n").split(b"\n"))
    units = [zlib.crc32(unit) for unit in units if len(unit) > 8]
    if not units:
        return NO_HASHES
    hashes = np.array(units, np.uint64)[:, None] * HASH_A + HASH_B  # (units, 32), multiply-shift modulo 2^64
    return (hashes.min(axis=0) >> np.uint64(32)).astype(np.uint32)


def split(scan, held_out, fraction, seed, skipped):
    """The side of each document, (n,) int8 of TRAIN, VAL, BOTH, DROP.

    The split depends on contents and seed, not on names or order. Exact duplicates are dropped.
    Near-identical documents, or examples with near-identical responses, stay on one side.
    BOTH: the end of the document is for validation.
    held_out: digests (m, 16) of a given validation set, or None to take `fraction` of the bytes.
    """
    side = np.full(len(scan.sizes), DROP, np.int8)
    usable = np.flatnonzero(scan.usable)
    _, first = np.unique(as_keys(scan.digests[usable]), return_index=True)
    rows = usable[np.sort(first)]
    skipped["exact duplicate"] += len(usable) - len(rows)
    if held_out is not None:
        known = set(map(bytes, held_out))
        fresh = np.array([bytes(d) not in known for d in scan.digests[rows]], bool)
        skipped["identical to a validation document"] += int((~fresh).sum())
        side[rows[fresh]] = TRAIN
        return side
    side[rows] = TRAIN
    group = np.unique(near_duplicates(scan, rows), return_inverse=True)[1]  # (rows,) numbers from 0 on
    distinct = int(group.max()) + 1
    if distinct < FEW and scan.kind == "examples":  # such as two classes as responses
        group, distinct = np.arange(len(rows)), len(rows)
        print("fewer than ten distinct responses: examples are split one by one")
    elif distinct < FEW:
        print(f"fewer than {FEW} distinct documents: the end of each ({fraction:.0%}) goes to validation")
        side[rows] = BOTH
        return side
    if distinct < len(rows):
        print(f"near-duplicates of another document, which stay on one side of the split: {len(rows) - distinct:,}")
    chosen = validation_groups(group, scan.digests[rows], scan.sizes[rows], fraction, seed)
    side[rows[chosen[group]]] = VAL
    return side


def as_keys(digests):
    """Digests (n, 16) uint8 as (n,) keys that numpy can sort."""
    return np.ascontiguousarray(digests).view("V16").ravel()  # (n, 16) -> (n,)


def near_duplicates(scan, rows):
    """For each of `rows` the first row like it, directly or through others: (len(rows),) int."""
    signatures, parent = scan.signatures(), array("q", range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    hashed = np.flatnonzero(signatures[rows, 0] != NO_HASH)
    for band in range(BANDS):
        key = np.zeros(len(hashed), np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):
            key = key * HASH_A[0] + signatures[rows[hashed], column]
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
        for some in np.array_split(same, len(same) // 65536 + 1):  # not all signatures in memory at once
            a, b = hashed[order[some]], hashed[order[some + 1]]
            alike = (signatures[rows[a]] == signatures[rows[b]]).mean(axis=1) >= 0.5  # estimates Jaccard similarity
            for i, j in zip(a[alike].tolist(), b[alike].tolist()):
                i, j = root(i), root(j)
                parent[max(i, j)] = min(i, j)
    return np.fromiter(map(root, range(len(rows))), np.int64, len(rows))


def validation_groups(group, digests, sizes, fraction, seed):
    """Chooses whole groups at random until about `fraction` of the bytes is taken: (groups,) bool.

    group (rows,) int, digests (rows, 16), sizes (rows,). Raises UserError for a single group.
    """
    ordered = np.argsort(as_keys(digests), kind="stable")
    smallest = digests[ordered[np.unique(group[ordered], return_index=True)[1]]]  # of each group's digests
    salted = (hashlib.sha256(b"%d " % seed + bytes(d)).digest()[:8] for d in smallest)
    queue = np.argsort(np.fromiter((int.from_bytes(s, "big") for s in salted), np.uint64, len(smallest)))
    size = np.bincount(group, sizes).astype(np.int64)  # (groups,) bytes
    target, total, chosen = fraction * size.sum(), 0, np.zeros(len(size), bool)
    if len(queue) < 2:
        raise UserError("the examples are all the same: at least two different ones are needed, or --val PATH")
    for g in queue:
        if total >= target:
            break
        if total + size[g] <= 1.5 * target:  # a group too large for validation stays in training
            chosen[g] = True
            total += size[g]
    if not total:  # every group is too large: then the smallest
        chosen[queue[np.argmin(size[queue])]] = True
    return chosen


class Source(NamedTuple):
    """Files, and the side and size of each document: the second pass reads the same documents."""
    files: list        # of corpora.File
    side: np.ndarray   # (n,) of TRAIN, VAL, BOTH, DROP
    sizes: np.ndarray  # (n,) UTF-8 bytes
    fraction: float    # of a document on BOTH sides that is for validation
    smoke: bool

    def total_bytes(self):
        """UTF-8 bytes of all documents that are not dropped."""
        return int(self.sizes[self.side != DROP].sum())

    def documents(self, *sides):
        """Yields (name, parts, side, size) of each document on one of `sides`, in order."""
        rows = zip(self.side, self.sizes, corpora.documents(self.files, corpora.Skipped()))
        yield from ((name, parts, side, size) for side, size, (name, parts) in rows if side in sides)

    def pieces(self, parts, side, size):
        """Yields (TRAIN or VAL, piece, UTF-8 bytes) of a document; see utf8.

        Of a document on BOTH sides the last `fraction` is for validation, from a line start on, or
        from any character if the piece has no further line.
        """
        border, end = int(size * (1 - self.fraction)), 0
        for text, data in utf8(parts, self.smoke):
            start, end = end, end + len(data)
            if side != BOTH:
                yield side, text, data
            elif end <= border or start > border:
                yield int(end > border), text, data
            else:
                chars = len(data[:border - start].decode("utf-8", errors="ignore"))
                line = text.find("\n", chars) + 1
                cut = line if 0 < line < len(text) else chars
                yield TRAIN, text[:cut], text[:cut].encode("utf-8")
                yield VAL, text[cut:], text[cut:].encode("utf-8")
