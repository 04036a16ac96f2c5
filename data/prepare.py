"""
Turn text into a dataset: train.bin and val.bin (token ids), tokenizer.json and meta.json in data/NAME/.

    python data/prepare.py stdlib                                 # the standard library's source: needs no file
    python data/prepare.py --input notes/ book.txt --name notes   # your own files and folders
    python data/prepare.py --input faq.jsonl                      # lines of {"prompt", "response"} or of {"text"}
    python data/prepare.py --input a.txt --val b.txt --tokenizer MODEL_DIR    # a test set and a tokenizer you have

The text is read twice and never held whole: once for sizes, duplicates and the split, once to encode. The result is
written to NAME.new and renamed when complete, so an interrupted run leaves what was there before.

Files: *.bin are little-endian uint16 (uint32 from 65,536 ids on), each document followed by the end-of-text token.
Examples end with the token that ends the template's turn instead (<|im_end|>), and have *.mask.bin beside them, a uint8
per token: bit 0 set where the token is learned (the response and its end), bit 1 at the first token of an example.
"""

import difflib
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
import zlib
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # run as a script, the first import path is data/, not the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import Parser, UserError, corpora, replacing, run, settle, sync
from data.tokenizer import SPECIALS, Tokenizer

HERE = Path(__file__).resolve().parent
BPE_BYTES = 64 << 20  # text the tokenizer is trained on at most, taken evenly from the whole
SMOKE_BYTES = 1 << 20
IN_FLIGHT = 16 << 20  # bytes handed to the encoder's threads at a time
FEW = 10  # fewer documents (or groups of near-identical ones) than this are split inside each
TRAIN, VAL, BOTH, DROP = 0, 1, 2, 3

BANDS, ROWS = 8, 4  # near-duplicates: MinHash (Broder 1997) of 32 values, candidates agree in all 4 values of a band
HASH_A, HASH_B = np.random.default_rng(0).integers(1, 2**63, (2, BANDS * ROWS), dtype=np.uint64) | np.uint64(1)
NO_HASH = 2**32 - 1


def find(name_or_dir, smoke=False):
    """The prepared directory that --data NAME_OR_DIR means; None for a known corpus that is not prepared yet.

    smoke=True prefers NAME-smoke where there is one. Raises UserError, with the nearest name, if there is neither.
    """
    names = [f"{name_or_dir}-smoke"] * smoke + [str(name_or_dir)]
    for path in [p for name in names for p in (Path(name), HERE / name)]:
        settle(path, "meta.json")
        if (path / "meta.json").is_file():
            return path
    if str(name_or_dir) in corpora.KNOWN:
        return None
    if Path(name_or_dir).exists():
        raise UserError(f"--data {name_or_dir} is not a prepared dataset (it has no meta.json): "
                        f"python data/prepare.py --input {name_or_dir} --name NAME makes one")
    raise UserError(f"--data {name_or_dir}: no such dataset{nearest(str(name_or_dir))}; python data/prepare.py "
                    "--input PATH --name NAME makes one")


def nearest(name):
    """' (did you mean X?)' or '', with the corpora and the prepared datasets."""
    known = {*corpora.KNOWN, *(p.parent.name for p in HERE.glob("*/meta.json"))}
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------------------- first pass: what is there, what is alike


class Scan:
    """One pass over the documents of `files`. Rows are documents, skipped ones too, so that a second pass can count.

    sizes (n,) int64 utf-8 bytes; digests (n, 16) uint8; signatures (n, 32) uint32; usable (n,) bool;
    kind "text" or "examples"; sha256 hex over names and contents
    """

    def __init__(self, files, skipped, smoke, label):
        sizes, digests, signatures, usable, self.kind = array("q"), bytearray(), bytearray(), bytearray(), None
        total, whole = 0, hashlib.sha256()
        expected = sum(path.stat().st_size for path in (f.path for f in files) if path.is_file())
        bar = tqdm(total=None if smoke else expected, unit="B", unit_scale=True, desc=label, disable=None, leave=False)
        for name, parts in corpora.documents(files, skipped):
            digest, size, signature = hashlib.sha256(), 0, np.full(BANDS * ROWS, NO_HASH, np.uint32)
            try:
                for text, data in utf8(parts, smoke):
                    # of an example the response only: prompts may be alike on both sides of the split
                    signature = np.minimum(signature, minhash(data if text is not None else parts[1].encode("utf-8")))
                    digest.update(data)
                    size += len(data)
                    bar.update(len(data))
                if size == 0:
                    raise corpora.Skip("empty")
                if isinstance(parts, tuple) and not parts[1].strip():
                    raise corpora.Skip("empty response")
                whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest.digest())
                self.kind = "examples" if isinstance(parts, tuple) else "text"
                usable.append(1)
                total += size
            except corpora.Skip as reason:
                skipped[str(reason)] += 1
                usable.append(0)
            sizes.append(size)
            digests += digest.digest()[:16]
            signatures += signature.tobytes()
            if smoke and total > SMOKE_BYTES:
                break
        bar.close()
        self.sizes, self.usable = np.array(sizes, np.int64), np.frombuffer(usable, np.uint8).astype(bool)
        self.digests = np.frombuffer(digests, np.uint8).reshape(-1, 16)
        self.signatures = np.frombuffer(signatures, np.uint32).reshape(-1, BANDS * ROWS)
        self.sha256 = whole.hexdigest()


def utf8(parts, smoke=False):
    """Yield (piece, its bytes) of a text, or (None, bytes) of an example; a smoke run takes the first piece only."""
    if isinstance(parts, tuple):
        yield None, "\0".join(parts).encode("utf-8")
    else:
        yield from ((piece, piece.encode("utf-8")) for piece in itertools.islice(parts, 1 if smoke else None))


def minhash(data):
    """uint32 (32,): smallest value of each of 32 hashes over the lines and sentences (those longer than 8 bytes)."""
    units = map(bytes.strip, data.replace(b". ", b"\n").split(b"\n"))
    units = [zlib.crc32(unit) for unit in units if len(unit) > 8]
    if not units:
        return np.full(BANDS * ROWS, NO_HASH, np.uint32)
    hashes = np.array(units, np.uint64)[:, None] * HASH_A + HASH_B  # (units, 32), multiply-shift modulo 2^64
    return (hashes >> np.uint64(32)).min(axis=0).astype(np.uint32)


def groups(scan, rows):
    """For each of `rows` the first row near-identical to it (directly or through others): (len(rows),) int."""
    signatures, parent = scan.signatures[rows], list(range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    has = np.flatnonzero(signatures[:, 0] != NO_HASH)
    for band in range(BANDS):
        key = np.zeros(len(has), np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):
            key = key * HASH_A[0] + signatures[has, column]
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
        a, b = has[order[same]], has[order[same + 1]]
        alike = (signatures[a] == signatures[b]).mean(axis=1) >= 0.5  # estimates the Jaccard similarity
        for i, j in zip(a[alike].tolist(), b[alike].tolist()):
            i, j = root(i), root(j)
            parent[max(i, j)] = min(i, j)
    return np.array([root(i) for i in range(len(rows))], np.int64)


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
    group = groups(scan, rows)
    near = len(rows) - len(set(group.tolist()))
    if len(rows) - near < FEW and scan.kind == "examples":  # such as two classes as responses
        group, near = np.arange(len(rows)), 0
        print("fewer than ten distinct responses: examples are split one by one")
    elif len(rows) - near < FEW:
        print(f"fewer than {FEW} distinct documents: the end of each ({fraction:.0%}) goes to validation")
        side[rows] = BOTH
        return side
    if near:
        print(f"{near:,} documents are near-identical to another one and stay on its side of the split")
    members = {}
    for row, g in zip(rows.tolist(), group.tolist()):
        members.setdefault(g, []).append(row)
    salted = lambda m: hashlib.sha256(b"%d " % seed + min(bytes(scan.digests[i]) for i in m)).digest()
    queue = sorted(members.values(), key=salted)
    target, taken = fraction * scan.sizes[rows].sum(), 0
    if len(queue) < 2:
        raise UserError("the examples are all the same: at least two different ones are needed, or --val PATH")
    for m in queue:
        size = scan.sizes[m].sum()
        if taken < target and taken + size <= 1.5 * target:  # a group too large for validation stays in training
            side[m], taken = VAL, taken + size
    if not taken:  # every group is larger than that: then the smallest
        side[min(queue, key=lambda m: scan.sizes[m].sum())] = VAL
    return side


# ------------------------------------------------------------------------------------------ second pass: encode, write


def placed(parts, side, size, fraction, smoke):
    """Yield (TRAIN or VAL, piece, its utf-8 bytes) of a document of `size` bytes; see `utf8`.

    side BOTH: the last `fraction` is VAL, from a line start on (from any character if the piece has no further line).
    """
    at, end = int(size * (1 - fraction)), 0
    for text, data in utf8(parts, smoke):
        start, end = end, end + len(data)
        if side != BOTH or not start <= at < end:
            yield int(end > at) if side == BOTH else side, text, data
            continue
        chars = len(data[:at - start].decode("utf-8", errors="ignore"))
        line = text.find("\n", chars) + 1
        cut = line if 0 < line < len(text) else chars
        yield TRAIN, text[:cut], text[:cut].encode("utf-8")
        yield VAL, text[cut:], text[cut:].encode("utf-8")


def training_text(files, side, sizes, fraction, smoke):
    """Yield about BPE_BYTES of the training text as pieces taken evenly: the tokenizer never sees validation."""
    rate, debt = min(1.0, BPE_BYTES / max(1, int(sizes[side != DROP].sum()))), 0.0
    for i, (_, parts) in zip(range(len(side)), corpora.documents(files, Counter())):
        if side[i] not in (TRAIN, BOTH):
            continue
        for which, text, _ in placed(parts, side[i], sizes[i], fraction, smoke):
            text = "\n".join(parts) if text is None else text
            debt += rate * len(text)
            if which == TRAIN and (debt >= len(text) or rate == 1):
                debt -= len(text)
                yield text


def encode_example(tokenizer, prompt, response):
    """(ids, mask) of one example in the tokenizer's chat template; the two parts are tokenized apart, as when chatting.

    Special tokens are recognised in the template only. What the template writes after the end token is left out.
    """
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    head = tokenizer.render([user])
    full = tokenizer.render([user, assistant], add_generation_prompt=False)
    if not full.startswith(head):
        raise UserError("the tokenizer's chat template does not write an answer right after its generation prompt")
    head, tail = tokenizer.encode_array(head, special=True), tokenizer.encode_array(full[len(head):], special=True)
    ends = np.flatnonzero(np.isin(tail, tokenizer.eos_ids))
    tail = tail[:ends[-1] + 1] if len(ends) else np.append(tail, np.uint32(tokenizer.eos_id))
    mask = np.zeros(len(head) + len(tail), np.uint8)
    mask[len(head):] = 1
    mask[0] |= 2
    return np.concatenate([head, tail]), mask


def write(out, tokenizer, sources, kind, fraction, smoke):
    """Encode `sources`, a list of (files, side, sizes), into out/{train,val}.bin, in their order; threads encode.

    Returns (meta.json's "splits", dtype name). Raises UserError if a file changed since the first pass.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")
    names, keys = ("train", "val"), ("documents", "tokens", "bytes")
    keys += ("response_tokens", "response_bytes") if kind == "examples" else ()
    stats = [dict.fromkeys(keys, 0) for _ in names]
    total = sum(int(sizes[side != DROP].sum()) for _, side, sizes in sources)
    batch, held = [], 0  # (split, text or (prompt, response) or None for the end of a document), characters

    def encode(item):
        if item[1] is None:
            return np.array([tokenizer.eos_id]), None
        return encode_example(tokenizer, *item[1]) if kind == "examples" else (tokenizer.encode_array(item[1]), None)

    def flush():
        for (which, _), (ids, mask) in zip(batch, pool.map(encode, batch)):
            bins[which].write(ids.astype(dtype).tobytes())
            stats[which]["tokens"] += len(ids)
            if mask is not None:
                masks[which].write(mask.tobytes())
                stats[which]["response_tokens"] += int((mask & 1).sum())
        batch.clear()

    with ExitStack() as stack:
        opened = lambda name: stack.enter_context(open(out / name, "wb"))
        bins = [opened(f"{name}.bin") for name in names]
        masks = [opened(f"{name}.mask.bin") for name in names] if kind == "examples" else []
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None, leave=False)
        stack.enter_context(bar)
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
        for files, side, sizes in sources:
            for i, (name, parts) in zip(range(len(side)), corpora.documents(files, Counter())):
                if side[i] == DROP:
                    continue
                size = 0
                try:
                    for which, piece, data in placed(parts, side[i], sizes[i], fraction, smoke):
                        size, held = size + len(data), held + len(data)
                        bar.update(len(data))
                        stats[which]["bytes"] += len(data)
                        batch.append((which, parts if piece is None else piece))
                        if held > IN_FLIGHT:
                            flush()
                            held = 0
                except corpora.Skip:
                    size = -1
                if size != sizes[i]:
                    raise UserError(f"{name} changed while it was read; run it again")
                for which in (TRAIN, VAL) if side[i] == BOTH else (side[i],):
                    stats[which]["documents"] += 1
                    if kind == "text":
                        batch.append((which, None))
                if kind == "examples":
                    stats[which]["bytes"] -= 1  # the \0 between the two
                    stats[which]["response_bytes"] += len(parts[1].encode("utf-8"))
        flush()
        for f in bins + masks:
            f.flush()
            os.fsync(f.fileno())
    return dict(zip(names, stats)), dtype.name


# ---------------------------------------------------------------------------------------------------------- the command


def choose_name(name, inputs, out):
    """The dataset's name, from --name, --out or the first input. Raises UserError if it cannot be a folder's."""
    if not inputs:
        if name not in corpora.KNOWN:
            raise UserError(f"{name!r} is not a corpus known here{nearest(name or '')}; known: "
                            f"{', '.join(corpora.KNOWN)}; for your own text: --input PATH --name NAME")
        return name
    name = name or (Path(out).name if out else re.sub(r"[^\w-]+", "-", Path(inputs[0]).resolve().stem).strip("-"))
    if not re.fullmatch(r"\w[\w.-]*", name) or name in corpora.KNOWN or name.endswith((".new", ".old", "-smoke")):
        raise UserError(f"--name {name!r} cannot name your dataset: take letters, digits, _ and -, and no known corpus")
    return name


def choose_tokenizer(tokenizer):
    """The Tokenizer that --tokenizer bytes|gpt2|DIR means (a run's directory means its best/), None to train one."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer in ("bytes", "gpt2") and not Path(tokenizer).is_dir():
        return Tokenizer.from_bytes() if tokenizer == "bytes" else Tokenizer.gpt2()
    if not Path(tokenizer).is_dir():
        raise UserError(f"--tokenizer {tokenizer}: no such directory; give bytes, gpt2 or one with tokenizer.json")
    best = Path(tokenizer, "best")
    return Tokenizer.load(best if best.is_dir() and not Path(tokenizer, "tokenizer.json").is_file() else tokenizer)


def prepare(name=None, inputs=(), val=(), out=None, vocab_size=None, tokenizer=None, val_fraction=0.05, seed=0,
            overwrite=False, smoke=False):
    """Write a dataset and return its directory (data/NAME, or data/NAME-smoke for a smoke run, unless `out`).

    name: a known corpus, or with `inputs` (paths) the dataset's name. vocab_size: ids of a BPE trained here (4096).
    tokenizer: "bytes", "gpt2", a directory or a Tokenizer; then none is trained. Raises UserError.
    """
    start, name = time.perf_counter(), choose_name(name, inputs, out)
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"--val-fraction {val_fraction} must be above 0 and at most 0.5")
    if tokenizer is not None and vocab_size is not None:
        raise UserError("--vocab-size is for a tokenizer trained here; leave it out with --tokenizer")
    if vocab_size is not None and vocab_size < 256 + len(SPECIALS):
        raise UserError(f"--vocab-size {vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens need "
                        f"{256 + len(SPECIALS)} ids")
    out = Path(out).resolve() if out else HERE / (f"{name}-smoke" if smoke else name)
    settle(out, "meta.json")
    if out.exists() and not (out / "meta.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out.name} is there already and is not a dataset; choose another --out or --name")
    if (out / "meta.json").is_file() and not overwrite and not out.name.endswith("-smoke"):
        raise UserError(f"the dataset {out.name} is there already; --overwrite makes it anew, --name NAME another one")
    tokenizer = choose_tokenizer(tokenizer)

    skipped = Counter()
    files = corpora.source(inputs, None if inputs else name)
    val_files = corpora.source(val, flag="--val")
    scan = Scan(files, skipped, smoke, "read")
    held = Scan(val_files, skipped, smoke, "read --val") if val else None
    for s, flag in (scan, "--input"), (held, "--val"):
        if s and not s.usable.any():
            why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "there are no files"
            raise UserError(f"{flag} {' '.join(map(str, val if s is held else inputs))}: no text to use ({why}); "
                            "it must be UTF-8 text or .jsonl")
    if held and held.kind != scan.kind:
        raise UserError(f"--input is {scan.kind} but --val is {held.kind}; both must be of one kind")
    side = split(scan, held.digests[held.usable] if held else None, val_fraction, seed, skipped)
    if not (side != DROP).any():
        raise UserError("every document of --input is also in --val, so there is nothing to train on")

    if tokenizer is None:
        print(f"training a byte-level BPE of {vocab_size or 4096:,} ids on the training split")
        texts, trained = training_text(files, side, scan.sizes, val_fraction, smoke), time.perf_counter()
        tokenizer = Tokenizer.train(texts, vocab_size or 4096)
        print(f"... in {time.perf_counter() - trained:.1f} s")
        if tokenizer.vocab_size < (vocab_size or 4096):
            print(f"the text is too small for {vocab_size or 4096:,} ids: the tokenizer has {tokenizer.vocab_size:,}")

    with replacing(out, "meta.json") as new:
        sources = [(files, side, scan.sizes)]
        if held:
            sources.append((val_files, np.where(held.usable, VAL, DROP), held.sizes))
        splits, dtype = write(new, tokenizer, sources, scan.kind, val_fraction, smoke)
        tokenizer.save(new)
        skipped = {reason: n for reason, n in sorted(skipped.items()) if n}
        names = lambda paths: [Path(p).resolve().name for p in paths]  # never a path of this machine
        meta = {
            "format": 1, "name": name, "source": names(inputs) or [name], "val_source": names(val),
            "kind": scan.kind, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash,
            "split_seed": seed, "val_fraction": None if held else val_fraction, "sha256": scan.sha256, "smoke": smoke,
            **({} if inputs else {"python": platform.python_version()}), "skipped": skipped, "splits": splits,
        }
        text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
        (new / "meta.json").write_text(text, encoding="utf-8", newline="\n")
        sync(new / "meta.json")

    for which, s in splits.items():
        learned = f", {s['response_tokens']:,} of them learned" if "response_tokens" in s else ""
        print(f"{which:5} {s['documents']:9,} documents {s['bytes']:14,} bytes {s['tokens']:13,} tokens{learned}"
              f" ({s['bytes'] / max(1, s['tokens']):.2f} bytes per token)")
    print("skipped: " + (", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "nothing"))
    seconds, read = time.perf_counter() - start, sum(s["bytes"] for s in splits.values())
    print(f"wrote {out.name}: {scan.kind}, {tokenizer.vocab_size:,} ids, {dtype}, sha256 {scan.sha256[:12]}; "
          f"{seconds:.1f} s, {read / seconds / 1e6:.1f} MB/s")
    return out


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("corpus", nargs="?", help=f"a corpus known here: {', '.join(corpora.KNOWN)}")
    add("--input", nargs="+", metavar="PATH", default=[], help="files and folders of UTF-8 text, or .jsonl")
    add("--name", help="name of the dataset (default: from the first input)")
    add("--val", nargs="+", metavar="PATH", default=[], help="take this text as the whole validation split")
    add("--vocab-size", type=int, metavar="N", help="ids of the tokenizer trained on the text (default 4096)")
    add("--tokenizer", metavar="bytes|gpt2|DIR", help="use this tokenizer and train none; gpt2 is downloaded once")
    add("--val-fraction", type=float, default=0.05, metavar="F", help="validation's share of the bytes (default 0.05)")
    add("--seed", type=int, default=0, help="of the split (default 0)")
    add("--out", metavar="DIR", help="where to write (default data/NAME)")
    add("--overwrite", action="store_true", help="replace the dataset that is there")
    add("--smoke", action="store_true", help="the first megabyte only, into data/NAME-smoke")
    args = parser.parse_args()
    if args.corpus and (args.input or args.name):
        raise UserError(f"give a corpus ({args.corpus}) or --input PATH --name NAME, not both")
    if not args.corpus and not args.input:
        raise UserError("nothing to prepare: give a corpus (stdlib) or --input PATH")
    if args.corpus and args.corpus not in corpora.KNOWN and Path(args.corpus).exists():
        raise UserError(f"{args.corpus} is a path: use --input {args.corpus}")
    prepare(args.corpus or args.name, args.input, args.val, args.out, args.vocab_size, args.tokenizer,
            args.val_fraction, args.seed, args.overwrite, args.smoke)


if __name__ == "__main__":
    run(main)
