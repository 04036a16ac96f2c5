"""
Turn text into a dataset: train.bin and val.bin (token ids), tokenizer.json and meta.json in data/NAME/.

    python data/prepare.py stdlib                                 # the standard library's source: needs no file
    python data/prepare.py --input notes/ book.txt --name notes   # your own files and folders
    python data/prepare.py --input faq.jsonl                      # lines of {"prompt", "response"} or of {"text"}
    python data/prepare.py --input a.txt --val b.txt --tokenizer MODEL_DIR    # a test set and a tokenizer you have
    python data/prepare.py shakespeare                            # or wikitext2, tinystories: these are downloaded

The text is read twice and never held whole: once for sizes, duplicates and the split, once to encode. The result is
written to NAME.part and renamed when complete, so an interrupted run leaves what was there before, and the same command
goes on from it.

Files: *.bin are little-endian uint16 (uint32 from 65,536 ids on), each document followed by the end-of-text token.
Examples end with the token that ends the template's turn instead (<|im_end|>), and have *.mask.bin beside them, a uint8
per token: bit 0 set where the token is learned (the response and its end), bit 1 at the first token of an example.
Those held out are in val.jsonl too, with all their fields, for sample.py --eval.
"""

import contextlib, difflib, json, os, platform, re, sys, time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # run as a script, the first import path is data/, not the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.files import DATASET, marker_of, refuse_foreign, resumable, settle, sync, write_json
from data.console import Parser, run
from data import UserError, corpora, download
from data.loader import FIRST, LEARNED
from data.tokenizer import SPECIALS, Tokenizer
from data.split import BOTH, DROP, TRAIN, VAL, Scan, split, utf8

HERE, KNOWN = Path(__file__).resolve().parent, [*corpora.KNOWN, *download.CORPORA]
BPE_BYTES = 64 << 20  # text the tokenizer is trained on at most, taken evenly from the whole
TASK = 256 << 10  # bytes that a thread encodes at a time: enough for few hand-overs, few enough for a small queue
SAVE_EVERY = 256  # tasks (64 MB of text): what a kill costs at most


def find(name_or_dir, smoke=False, flag="--data"):
    """The prepared directory that a flag names; None for one that can be prepared without a network.

    smoke=True prefers NAME-smoke where there is one. Raises UserError, with the nearest name, if there is neither.
    """
    names = [f"{name_or_dir}-smoke"] * smoke + [str(name_or_dir)]
    for path in [p for name in names for p in (Path(name), HERE / name)]:
        settle(path, DATASET)
        if (path / "meta.json").is_file():
            return path
    if str(name_or_dir) in corpora.KNOWN:
        return None
    if str(name_or_dir) in download.CORPORA:
        raise UserError(f"{flag} {name_or_dir} is not here yet: python data/prepare.py {name_or_dir} downloads and "
                        "prepares it")
    if Path(name_or_dir).exists():
        raise UserError(f"{flag} {name_or_dir} is not a prepared dataset (it has no meta.json): "
                        f"python data/prepare.py --input {name_or_dir} --name NAME makes one")
    raise UserError(f"{flag} {name_or_dir}: no such dataset{nearest(str(name_or_dir))}; python data/prepare.py "
                    "--input PATH --name NAME makes one")


def nearest(name):
    """' (did you mean X?)' or '', with the corpora and the prepared datasets."""
    known = {*KNOWN, *(p.parent.name for p in HERE.glob("*/meta.json"))}
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------------------- first pass: what is there, what is alike


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


def training_texts(files, side, sizes, fraction, smoke):
    """Yield about BPE_BYTES of the training text as pieces taken evenly: the tokenizer never sees validation."""
    rate, debt = min(1.0, BPE_BYTES / max(1, int(sizes[side != DROP].sum()))), 0.0
    for i, (_, parts) in zip(range(len(side)), corpora.documents(files, corpora.Skipped())):
        if side[i] not in (TRAIN, BOTH):
            continue
        for which, text, _ in placed(parts, side[i], sizes[i], fraction, smoke):
            text = "\n".join(parts[:2]) if text is None else text
            debt += rate * len(text)
            if which == TRAIN and (debt >= len(text) or rate == 1):
                debt -= len(text)
                yield text


def encode_example(tokenizer, prompt, response):
    """(ids, mask) of one example in the tokenizer's chat template: see encode_examples."""
    return encode_examples(tokenizer, [(prompt, response)])[0]


def encode_examples(tokenizer, examples):
    """(ids, mask) of each (prompt, response) in the tokenizer's chat template.

    An example is tokenized as one text that begins as a chat does. Special tokens are recognised in the template only.
    The words of the template after the end token are left out.
    """
    chats = []
    for prompt, response in examples:
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
        chats += [([user], True), ([user, assistant], False)]
    texts = tokenizer.render_all(chats)
    return [encode_texts(tokenizer, *texts[i:i + 2]) for i in range(0, len(texts), 2)]


def encode_texts(tokenizer, prompt, full):
    """(ids, mask) of a rendered prompt and of the same text with its response; the mask has LEARNED in the response."""
    if not full.startswith(prompt):
        raise UserError("the tokenizer's chat template does not write an answer right after its generation prompt")
    rest, encoded = full[len(prompt):], lambda text: tokenizer.encode_array(text, special=True)
    head = encoded(prompt)
    # Where one token would span the border of prompt and response, the head stays as in a chat, and the response is
    # encoded behind a text that it does not melt with. Alone, SentencePiece's kind would put a space before it.
    for before in (prompt, "") if tokenizer.pattern else (prompt, "\n", ".", ""):
        start, both = head if before == prompt else encoded(before), encoded(before + rest)
        if np.array_equal(both[:len(start)], start):
            break
    tail = both[len(start):]
    if tokenizer.bos_id is not None and head[:1].tolist() != [tokenizer.bos_id]:  # as in a chat
        head = np.append(np.uint32(tokenizer.bos_id), head)
    ends = np.flatnonzero(np.isin(tail, tokenizer.eos_ids))
    tail = tail[:ends[-1] + 1] if len(ends) else np.append(tail, np.uint32(tokenizer.eos_id))
    mask = np.zeros(len(head) + len(tail), np.uint8)
    mask[len(head):] = LEARNED
    mask[0] |= FIRST
    return np.concatenate([head, tail]), mask


def tasks(sources, kind, fraction, smoke, stats):
    """Yield (task, its bytes), the same each time: a list of (TRAIN or VAL, text, example or None at a document's end).

    Counts documents and bytes in `stats`, a dict per split. Raises UserError if a file changed since the first pass.
    """
    task, held = [], 0
    for files, side, sizes in sources:
        for i, (name, parts) in zip(range(len(side)), corpora.documents(files, corpora.Skipped())):
            if side[i] == DROP:
                continue
            size = 0
            try:
                for which, piece, data in placed(parts, side[i], sizes[i], fraction, smoke):
                    size, held = size + len(data), held + len(data)
                    stats[which]["bytes"] += len(data)
                    task.append((which, parts if piece is None else piece))
                    if held > TASK:
                        yield task, held
                        task, held = [], 0
            except corpora.Skip:
                size = -1
            if size != sizes[i]:
                raise UserError(f"{name} changed while it was read; run it again")
            for which in (TRAIN, VAL) if side[i] == BOTH else (side[i],):
                stats[which]["documents"] += 1
                if kind == "text":
                    task.append((which, None))
            if kind == "examples":
                stats[which]["bytes"] -= 1  # the \0 between the two
                stats[which]["response_bytes"] += len(parts.response.encode("utf-8"))
    yield task, held


def encode(tokenizer, task, dtype):
    """What `task` adds to train.bin, val.bin, train.mask.bin and val.mask.bin: a list of bytes."""
    added = [bytearray() for _ in range(4)]
    examples = [(item.prompt, item.response) for _, item in task if isinstance(item, tuple)]
    examples = iter(encode_examples(tokenizer, examples))
    for which, item in task:
        if isinstance(item, tuple):
            ids, mask = next(examples)
            added[2 + which] += mask.tobytes()
        else:
            ids = np.array([tokenizer.eos_id]) if item is None else tokenizer.encode_array(item)
        added[which] += ids.astype(dtype).tobytes()
    return added


def write(part, progress, tokenizer, sources, kind, fraction, smoke):
    """Encode `sources`, a list of (files, side, sizes), into part/{train,val}.bin, in their order; threads encode.

    Every SAVE_EVERY tasks part/progress.json says how many are done and how long the files were: after a kill they are
    cut to that, and tasks already done are counted only. Returns (meta.json's "splits", dtype name).
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")
    keys = ("documents", "tokens", "bytes") + ("response_tokens", "response_bytes") * (kind == "examples")
    stats, names = [dict.fromkeys(keys, 0) for _ in range(2)], ["train.bin", "val.bin"]
    names += ["train.mask.bin", "val.mask.bin"] * (kind == "examples")
    there = [(part / name).is_file() and (part / name).stat().st_size for name in names]
    if "tasks" not in progress or any(a < b for a, b in zip(there, progress["sizes"])):
        progress.update(tasks=0, sizes=[0] * len(names), learned=[0, 0])
    done, pending, cores = progress["tasks"], deque(), os.cpu_count() or 1

    def store():
        for i, added in enumerate(pending.popleft().result()[:len(names)]):
            files[i].write(added)
            progress["sizes"][i] += len(added)
            if i >= 2:
                progress["learned"][i - 2] += int((np.frombuffer(added, np.uint8) & 1).sum())
        progress["tasks"] += 1

    def save():
        for f in files:  # on disk before progress.json says so
            f.flush()
            os.fsync(f.fileno())
        write_json(part / "progress.json", progress)

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part / name, "ab")) for name in names]
        for f, size in zip(files, progress["sizes"]):
            f.truncate(size)
        total = sum(int(sizes[side != DROP].sum()) for _, side, sizes in sources)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None, leave=False)
        stack.enter_context(bar)
        pool = stack.enter_context(ThreadPoolExecutor(cores))
        for number, (task, size) in enumerate(tasks(sources, kind, fraction, smoke, stats), 1):
            bar.update(size)
            if number <= done:
                continue
            pending.append(pool.submit(encode, tokenizer, task, dtype))
            if len(pending) > 2 * cores:
                store()
            if number % SAVE_EVERY == 0:
                save()
        while pending:
            store()
        save()
    for which, s in enumerate(stats):
        s["tokens"] = progress["sizes"][which] // dtype.itemsize
        if kind == "examples":
            s["response_tokens"] = progress["learned"][which]
    return dict(zip(("train", "val"), stats)), dtype.name


def write_held_out(path, sources):
    """The validation examples of `sources`, as they were, a line each."""
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for files, side, _ in sources:
            for which, (_, example) in zip(side, corpora.documents(files, corpora.Skipped())):
                if which == VAL:
                    out.write(corpora.clean(json.dumps(example.fields, ensure_ascii=False)) + "\n")
    sync(path)


# ---------------------------------------------------------------------------------------------------------- the command


def choose_name(name, inputs, out):
    """The dataset's name, from --name, --out or the first input. Raises UserError if it cannot be a folder's."""
    if not inputs:
        if name not in KNOWN:
            raise UserError(f"{name!r} is not a corpus known here{nearest(name or '')}; known: "
                            f"{', '.join(KNOWN)}; for your own text: --input PATH --name NAME")
        return name
    name = name or (Path(out).name if out else re.sub(r"[^\w-]+", "-", Path(inputs[0]).resolve().stem).strip("-"))
    ours = (".new", ".old", ".part", "-smoke")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in KNOWN or name.endswith(ours):
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


class Same(Exception):
    """The dataset that is there is the one that is asked for."""


def prepare(name=None, inputs=(), val=(), out=None, vocab_size=None, tokenizer=None, val_fraction=0.05, seed=0,
            overwrite=False, smoke=False):
    """Write a dataset and return its directory (data/NAME, or data/NAME-smoke for a smoke run, unless `out`).

    name: a known corpus, or with `inputs` (paths) the dataset's name. vocab_size: ids of a BPE trained here (4096).
    tokenizer: "bytes", "gpt2", a directory or a Tokenizer; then none is trained., such as
    "1GB". Raises UserError.
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
    settle(out, DATASET)
    if out.exists() and not (out / "meta.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out.name} is there already and is not a dataset; choose another --out or --name")
    refuse_foreign(out, DATASET)
    for path in (*inputs, *val):
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UserError(f"--input {path} lies in {out.name}, which would be replaced: choose another --out or "
                            "--name")
    there = {} if overwrite or out.name.endswith("-smoke") else marker_of(out, DATASET)
    tokenizer = choose_tokenizer(tokenizer)

    skipped = corpora.Skipped()
    files = corpora.source(inputs, None if inputs else name, skipped=skipped)
    val_files = corpora.source(val, flag="--val", skipped=skipped)
    if not inputs and name in download.CORPORA:
        files, held_out = download.files(name)
        val_files = val_files or held_out
    stamp = lambda f: (f, f.path.is_file() and (f.path.stat().st_size, f.path.stat().st_mtime_ns))
    made_from = (*map(stamp, files), "--val", *map(stamp, val_files), val_fraction, seed, smoke, TASK,
                 (tokenizer.hash, tokenizer.chat_template) if tokenizer else vocab_size)
    with contextlib.suppress(Same), resumable(out, DATASET, made_from) as (part, progress):
        scan = Scan(files, skipped, smoke, "--input", part, progress)
        held = Scan(val_files, skipped, smoke, "--val", part, progress) if val_files else None
        for s, flag in (scan, "--input"), (held, "--val"):
            if s and not s.usable.any():
                why = str(skipped) or "there are no files"
                raise UserError(f"{flag} {' '.join(map(str, val if s is held else inputs))}: no text to use ({why}); "
                                "it must be UTF-8 text or .jsonl")
        if held and held.kind != scan.kind:
            raise UserError(f"--input is {scan.kind} but --val is {held.kind}; both must be of one kind")
        settings = {"kind": scan.kind, "sha256": scan.sha256, "val_sha256": held and held.sha256, "split_seed": seed,
                    "val_fraction": None if held else val_fraction, "smoke": smoke,
                    "trained_ids": None if tokenizer else vocab_size or 4096,
                    **({"tokenizer_hash": tokenizer.hash} if tokenizer else {})}
        if there and any(there.get(key) != value for key, value in settings.items()):
            raise UserError(f"the dataset {out.name} is there already, made of other text or in another way; "
                            "--overwrite makes it anew, --name NAME another one")
        if there:
            print(f"the dataset {out.name} is there already, and is what this command makes")
            raise Same
        side = split(scan, held.digests[held.usable] if held else None, val_fraction, seed, skipped)
        if not (side != DROP).any():
            raise UserError("every document of --input is also in --val, so there is nothing to train on")

        if tokenizer is None and "tokenizer" in progress:
            tokenizer = Tokenizer.load(part)
        elif tokenizer is None:
            print(f"training a byte-level BPE of {vocab_size or 4096:,} ids on the training split")
            texts, trained = training_texts(files, side, scan.sizes, val_fraction, smoke), time.perf_counter()
            tokenizer = Tokenizer.train(texts, vocab_size or 4096)
            print(f"... in {time.perf_counter() - trained:.1f} s")
            if tokenizer.vocab_size < (vocab_size or 4096):
                print(f"the text is too small for {vocab_size or 4096:,} ids: the tokenizer has "
                      f"{tokenizer.vocab_size:,}")
        if "tokenizer" not in progress:
            tokenizer.save(part)
            progress["tokenizer"] = tokenizer.hash
            write_json(part / "progress.json", progress)

        sources = [(files, side, scan.sizes)]
        if held:
            sources.append((val_files, np.where(held.usable, VAL, DROP), held.sizes))
        if scan.kind == "examples":
            write_held_out(part / "val.jsonl", sources)
        splits, dtype = write(part, progress, tokenizer, sources, scan.kind, val_fraction, smoke)
        names = lambda paths: [corpora.printable(Path(p).resolve().name) for p in paths]  # never a path of this machine
        write_json(part / "meta.json", {
            "format": 1, "name": name, "source": names(inputs) or [name],
            "val_source": names(val or [f.path for f in val_files]), "dtype": dtype,
            "vocab_size": tokenizer.vocab_size, **settings, "tokenizer_hash": tokenizer.hash,
            **({} if inputs else {"python": platform.python_version()}), "splits": splits,
            "skipped": {reason: n for reason, n in sorted(skipped.items()) if n},
        })

    if there:
        return out
    for which, s in splits.items():
        learned = f", {s['response_tokens']:,} of them learned" if "response_tokens" in s else ""
        print(f"{which:5} {s['documents']:9,} documents {s['bytes']:14,} bytes {s['tokens']:13,} tokens{learned}"
              f" ({s['bytes'] / max(1, s['tokens']):.2f} bytes per token)")
    print("skipped: " + (str(skipped) or "nothing"))
    seconds, read = time.perf_counter() - start, sum(s["bytes"] for s in splits.values())
    print(f"wrote {out.name}: {scan.kind}, {tokenizer.vocab_size:,} ids, {dtype}, sha256 {scan.sha256[:12]}; "
          f"{seconds:.1f} s, {read / seconds / 1e6:.1f} MB/s")
    return out


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("corpus", nargs="?", help=f"a corpus known here: {', '.join(KNOWN)} (all but stdlib are downloaded)")
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
    if args.corpus and args.corpus not in KNOWN and Path(args.corpus).exists():
        raise UserError(f"{args.corpus} is a path: use --input {args.corpus}")
    prepare(args.corpus or args.name, args.input, args.val, args.out, args.vocab_size, args.tokenizer,
            args.val_fraction, args.seed, args.overwrite, args.smoke)


if __name__ == "__main__":
    run(main)
