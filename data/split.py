"""Which documents are for validation: near-duplicates stay on one side (MinHash, Broder 1997)."""
import hashlib, itertools, zlib
from array import array

import numpy as np
from tqdm import tqdm

from data import UserError, corpora
from data.files import sync, write_json

SMOKE_BYTES = 1 << 20
FEW = 10  # fewer documents (or groups of near-identical ones) than this are split inside each
BANDS, ROWS = 8, 4  # near-duplicates: MinHash (Broder 1997) of 32 values, candidates agree in all 4 values of a band
HASH_A, HASH_B = np.random.default_rng(0).integers(1, 2**63, (2, BANDS * ROWS), dtype=np.uint64) | np.uint64(1)
NO_HASH = 2**32 - 1
NO_HASHES = np.full(BANDS * ROWS, NO_HASH, np.uint32)
ROW = np.dtype([("size", "<i8"), ("digest", "u1", 16), ("signature", "<u4", BANDS * ROWS), ("usable", "?")])  # on disk
TRAIN, VAL, BOTH, DROP = 0, 1, 2, 3


class Scan:
    """One pass over the documents of `files`. Rows are documents, skipped ones too, so that a second pass can count.

    sizes (n,) int64 utf-8 bytes; digests (n, 16) uint8; usable (n,) bool; signatures() (n, 32) uint32, left on disk;
    kind "text" or "examples"; sha256 hex over names and contents
    The rows are kept in part/LABEL, the rest under `label` in `progress`: what is there already is not read again.
    """

    def __init__(self, files, skipped, smoke, label, part, progress):
        self.path = part / f"{label}.rows"
        if label not in progress:
            progress[label] = self._read(files, smoke, label)
            write_json(part / "progress.json", progress)
        self.kind, self.sha256 = progress[label]["kind"], progress[label]["sha256"]
        its = corpora.Skipped(progress[label]["skipped"], progress[label]["skipped_names"])
        skipped.update(its)
        for reason, few in its.names.items():
            skipped.names[reason] = (skipped.names.get(reason, []) + few)[:5]
        rows = self._rows()
        self.sizes, self.usable, self.digests = (np.array(rows[name]) for name in ("size", "usable", "digest"))

    def _rows(self):
        return np.memmap(self.path, ROW, "r") if self.path.stat().st_size else np.zeros(0, ROW)  # nothing is no map

    def signatures(self):
        return self._rows()["signature"]

    def _read(self, files, smoke, label):
        kinds, skipped, total, whole = {}, corpora.Skipped(), 0, hashlib.sha256()  # kinds: the first document of each
        expected = sum(path.stat().st_size for path in (f.path for f in files) if path.is_file())
        bar = tqdm(total=None if smoke else expected, unit="B", unit_scale=True, desc=f"read {label}", disable=None,
                   leave=False)
        with open(self.path, "wb") as rows, bar:
            for name, parts in corpora.documents(files, skipped):
                digest, size, signature, usable = hashlib.sha256(), 0, NO_HASHES, False
                try:
                    for text, data in utf8(parts, smoke):
                        # of an example the response only: prompts may be alike on both sides of the split
                        hashed = minhash(data if text is not None else parts.response.encode("utf-8"))
                        signature = np.minimum(signature, hashed)
                        digest.update(data)
                        size += len(data)
                        bar.update(len(data))
                    if size == 0:
                        raise corpora.Skip("empty")
                    if isinstance(parts, tuple) and not parts.response.strip():
                        raise corpora.Skip("empty response")
                    whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest.digest())
                    kinds.setdefault("examples" if isinstance(parts, tuple) else "text", name)
                    if len(kinds) == 2:
                        raise UserError(f"{kinds['text']} is text and {kinds['examples']} is a prompt and its "
                                        "response: make two datasets of them (two --name)")
                    usable = True
                    total += size
                except corpora.Skip as reason:
                    skipped.add(str(reason), name)
                rows.write(b"".join((size.to_bytes(8, "little"), digest.digest()[:16],
                                     signature.astype("<u4").tobytes(), bytes([usable]))))
                if smoke and total > SMOKE_BYTES:
                    break
        sync(self.path)
        return {"kind": next(iter(kinds), None), "sha256": whole.hexdigest(), "skipped": skipped,
                "skipped_names": skipped.names}


def utf8(parts, smoke=False):
    """Yield (piece, its bytes) of a text, or (None, bytes) of an example; a smoke run takes the first piece only."""
    if isinstance(parts, tuple):
        yield None, "\0".join(parts[:2]).encode("utf-8")
    else:
        yield from ((piece, piece.encode("utf-8")) for piece in itertools.islice(parts, 1 if smoke else None))


def minhash(data):
    """uint32 (32,): smallest value of each of 32 hashes over the lines and sentences (those longer than 8 bytes)."""
    units = map(bytes.strip, data.replace(b". ", b"\n").split(b"\n"))
    units = [zlib.crc32(unit) for unit in units if len(unit) > 8]
    if not units:
        return NO_HASHES
    hashes = np.array(units, np.uint64)[:, None] * HASH_A + HASH_B  # (units, 32), multiply-shift modulo 2^64
    return (hashes.min(axis=0) >> np.uint64(32)).astype(np.uint32)


def groups(scan, rows):
    """For each of `rows` the first row near-identical to it (directly or through others): (len(rows),) int."""
    signatures, parent = scan.signatures(), array("q", range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    has = np.flatnonzero(signatures[rows, 0] != NO_HASH)
    for band in range(BANDS):
        key = np.zeros(len(has), np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):
            key = key * HASH_A[0] + signatures[rows[has], column]
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
        for some in np.array_split(same, len(same) // 65536 + 1):  # not all signatures in memory at once
            a, b = has[order[some]], has[order[some + 1]]
            alike = (signatures[rows[a]] == signatures[rows[b]]).mean(axis=1) >= 0.5  # estimates Jaccard similarity
            for i, j in zip(a[alike].tolist(), b[alike].tolist()):
                i, j = root(i), root(j)
                parent[max(i, j)] = min(i, j)
    return np.fromiter(map(root, range(len(rows))), np.int64, len(rows))


def split(scan, held_out, fraction, seed, skipped):
    """The side of each document, (n,) int8 of TRAIN, VAL, BOTH, DROP: a function of contents and seed, not of order.

    Exact duplicates are dropped; near-identical documents, or examples whose responses are, stay on one side.
    held_out: digests (m, 16) of a given validation set, or None to take `fraction` of the bytes.
    """
    side = np.full(len(scan.sizes), DROP, np.int8)
    usable = np.flatnonzero(scan.usable)
    as_keys = lambda digests: np.ascontiguousarray(digests).view("V16").ravel()
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
    group = np.unique(groups(scan, rows), return_inverse=True)[1]  # (rows,) numbers from 0 on
    near = len(rows) - int(group.max()) - 1
    if len(rows) - near < FEW and scan.kind == "examples":  # such as two classes as responses
        group, near = np.arange(len(rows)), 0
        print("fewer than ten distinct responses: examples are split one by one")
    elif len(rows) - near < FEW:
        print(f"fewer than {FEW} distinct documents: the end of each ({fraction:.0%}) goes to validation")
        side[rows] = BOTH
        return side
    if near:
        print(f"{near:,} documents are near-identical to another one and stay on its side of the split")
    digests = scan.digests[rows]
    ordered = np.argsort(as_keys(digests), kind="stable")
    smallest = digests[ordered[np.unique(group[ordered], return_index=True)[1]]]  # of each group's digests
    salted = (hashlib.sha256(b"%d " % seed + bytes(d)).digest()[:8] for d in smallest)
    queue = np.argsort(np.fromiter((int.from_bytes(s, "big") for s in salted), np.uint64, len(smallest)))
    size = np.bincount(group, scan.sizes[rows]).astype(np.int64)  # (groups,) bytes
    target, taken, chosen = fraction * size.sum(), 0, np.zeros(len(size), bool)
    if len(queue) < 2:
        raise UserError("the examples are all the same: at least two different ones are needed, or --val PATH")
    for g in queue:
        if taken >= target:
            break
        if taken + size[g] <= 1.5 * target:  # a group too large for validation stays in training
            chosen[g], taken = True, taken + size[g]
    if not taken:  # every group is larger than that: then the smallest
        chosen[queue[np.argmin(size[queue])]] = True
    side[rows[chosen[group]]] = VAL
    return side
