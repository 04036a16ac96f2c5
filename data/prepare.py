"""
Turns text into a dataset data/NAME/: train.bin and val.bin (token ids), tokenizer.json, meta.json.

    python data/prepare.py stdlib                                 # the standard library's source: needs no file
    python data/prepare.py --input notes/ book.txt --name notes   # your own files and folders
    python data/prepare.py --input faq.jsonl                      # lines of {"messages"}, {"prompt", "response"} ...
    python data/prepare.py --input faq.csv                        # columns of these names; or .json, .tsv, .parquet
    python data/prepare.py --input a.txt --val b.txt --tokenizer MODEL_DIR    # a test set and a tokenizer you have
    python data/prepare.py shakespeare                            # or wikitext2, tinystories: these are downloaded
    python data/prepare.py fineweb-edu --size 300MB               # web pages, downloaded; needs pyarrow

The text is read twice and never held whole: once for sizes, duplicates and the split, once to
encode. The result is written to .NAME.part and renamed when complete. An interrupted run so leaves
an older dataset untouched, and the same command resumes.

Of a folder all files are read: as records by the endings .jsonl, .ndjson, .json, .csv, .tsv and
.parquet, else as text; .gz and .zst are unpacked. README.md in this folder has a table of formats.

Files: *.bin are little-endian uint16 (uint32 from 65,536 ids on), each document followed by the
end-of-text token. Examples end with the token that ends the template's turn instead (<|im_end|>),
and have *.mask.bin beside them, a uint8 per token: bit 0 set where the token is learned (each turn
of the assistant and its end token), bit 1 at the first token of an example. Held-out examples are
in val.jsonl too, with all their fields, for sample.py --eval.
"""

import contextlib, difflib, os, platform, re, shlex, sys, time
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a script, the first import path is data/, not the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import UserError, corpora, download, encoding
from data.console import Parser, run
from data.conversation import Names, asked
from data.files import DATASET, MODEL, marker_of, refuse_foreign, resumable, settle, write_json
from data.screen import road
from data.split import BOTH, DROP, TRAIN, VAL, Scan, Source, split
from data.tokenizer import SPECIALS, Tokenizer

HERE, KNOWN = Path(__file__).resolve().parent, [*corpora.KNOWN, *download.CORPORA]
VOCAB_SIZE = 4096  # ids of a tokenizer trained here
BPE_BYTES = 64 << 20  # text the tokenizer is trained on at most, taken evenly from the whole


def find(name_or_dir, smoke=False, flag="--data"):
    """The prepared directory that a flag names; None for a corpus that needs no network to prepare.

    smoke=True prefers NAME-smoke. Raises UserError, with the nearest name, if there is neither.
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


def choose_name(name, inputs, out):
    """The dataset's name: --name, --out or the first input. Raises UserError for a bad one."""
    if not inputs:
        if name not in KNOWN:
            raise UserError(f"{name!r} is not a corpus known here{nearest(name or '')}; known: "
                            f"{', '.join(KNOWN)}; for your own text: --input PATH --name NAME")
        return name
    if not name and out:
        name = Path(out).name
    if not name:
        name = re.sub(r"[^\w-]+", "-", Path(inputs[0]).resolve().stem).strip("-")
    reserved = (".new", ".old", ".part", "-smoke")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in KNOWN or name.endswith(reserved):
        raise UserError(f"--name {name!r} cannot name your dataset: take letters, digits, _ and -, and no known corpus")
    return name


def choose_directory(name, paths, out, smoke):
    """The directory to write. Raises UserError if it holds other files or one of `paths`."""
    place = HERE / (f"{name}-smoke" if smoke else name)
    out = Path(out).resolve() if out else place
    settle(out, DATASET)
    if out.exists() and not (out / "meta.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out.name} is there already and is not a dataset; choose another --out or --name")
    refuse_foreign(out, DATASET)
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UserError(f"--input {path} lies in {out.name}, which would be replaced: choose another --out or "
                            "--name")
    return out


def choose_tokenizer(tokenizer):
    """The Tokenizer of --tokenizer bytes|gpt2|DIR (of a run best/); None stays None."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer in ("bytes", "gpt2") and not Path(tokenizer).is_dir():
        return Tokenizer.from_bytes() if tokenizer == "bytes" else Tokenizer.gpt2()
    if not Path(tokenizer).is_dir():
        raise UserError(f"--tokenizer {tokenizer}: no such directory; give bytes, gpt2 or one with tokenizer.json")
    best = Path(tokenizer, "best")
    return Tokenizer.load(best if best.is_dir() and not Path(tokenizer, "tokenizer.json").is_file() else tokenizer)


def check_numbers(vocab_size, tokenizer, val_fraction):
    """Raises UserError for --val-fraction or --vocab-size out of range, or a size without use."""
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"--val-fraction {val_fraction} must be above 0 and at most 0.5")
    if tokenizer is not None and vocab_size is not None:
        raise UserError("--vocab-size is for a tokenizer trained here; leave it out with --tokenizer")
    if vocab_size is not None and vocab_size < 256 + len(SPECIALS):
        raise UserError(f"--vocab-size {vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens need "
                        f"{256 + len(SPECIALS)} ids")


def bytes_of(size):
    """The number of bytes in "100MB" or "1.5GB". Raises UserError for other text."""
    number = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([MG])B", size, re.I)
    if not number or not float(number[1]):
        raise UserError(f"--size {size} is not a size such as 100MB or 1.5GB")
    return int(float(number[1]) * {"M": 1e6, "G": 1e9}[number[2].upper()])


def encode_example(tokenizer, prompt, response):
    """(ids, mask) of a response, which alone is learned, to a prompt: see encoding.encode_turns.

    prompt   a question (str), or the messages before the response
    """
    messages = [*asked(prompt), {"role": "assistant", "content": response}]
    return encoding.encode_conversations(tokenizer, [messages], last_only=True)[0]


def training_texts(source):
    """Yields about BPE_BYTES of training text, never validation text, in pieces taken evenly."""
    rate, debt = min(1.0, BPE_BYTES / max(1, source.total_bytes())), 0.0
    for _, parts, side, size in source.documents(TRAIN, BOTH):
        for which, text, _ in source.pieces(parts, side, size):
            text = "\n".join(parts.contents()) if text is None else text
            debt += rate * len(text)
            if which == TRAIN and (debt >= len(text) or rate == 1):
                debt -= len(text)
                yield text


class AlreadyMade(Exception):
    """The dataset exists and is the one to make."""


def find_files(name, inputs, val, skipped, names=Names()):
    """(files, validation files): lists of corpora.File, downloaded if need be. Raises UserError."""
    files = corpora.source(inputs, None if inputs else name, skipped=skipped)
    val_files = corpora.source(val, flag="--val", skipped=skipped)
    if not inputs and name in download.CORPORA:
        files, held_out = download.files(name)
        val_files = val_files or held_out
    return [[file._replace(names=names) for file in some] for some in (files, val_files)]


def file_names(paths):
    """Names of files and folders without the path, which would tell about this machine."""
    return [corpora.printable(Path(path).resolve().name) for path in paths]


def stamp(file):
    """A corpora.File with size and time of change: a change of the file shows."""
    return file, file.path.is_file() and (file.path.stat().st_size, file.path.stat().st_mtime_ns)


def check_scans(scan, val_scan, inputs, val, skipped, names):
    """Says what records were taken for. Raises UserError for no text to use, or text of two kinds."""
    for found, flag, paths in (scan, "--input", inputs), (val_scan, "--val", val):
        if found and found.shapes:
            print(f"{flag}: " + ", ".join(f"{number:,} {shape}" for shape, number in found.shapes.items()))
        if found and not found.usable.any():
            why = str(skipped) or "there are no files"
            raise UserError(f"{flag} {' '.join(map(str, paths))}: no text to use ({why}); "
                            "it must be UTF-8 text, or .jsonl, .json, .csv, .tsv or .parquet")
    if any(names) and not scan.shapes:
        raise UserError("--text-field, --prompt-field and --response-field name fields of records, and there are none: "
                        "leave them out, or give a file such as .jsonl or .csv")
    if val_scan and val_scan.kind != scan.kind:
        raise UserError(f"--input is {scan.kind} but --val is {val_scan.kind}; both must be of one kind")


def check_existing(existing, settings, name):
    """Raises AlreadyMade if a dataset's meta.json has the settings, UserError if it has others."""
    if any(existing.get(key) != value for key, value in settings.items()):
        raise UserError(f"the dataset {name} is there already, made of other text or in another way; "
                        "--overwrite makes it anew, --name NAME another one")
    print(f"the dataset {name} is there already, and is what this command makes")
    raise AlreadyMade


def make_sources(files, val_files, scan, val_scan, fraction, seed, smoke, skipped):
    """Splits scanned documents: a list of Source, training first. Raises UserError."""
    side = split(scan, val_scan.digests[val_scan.usable] if val_scan else None, fraction, seed, skipped)
    if not (side != DROP).any():
        raise UserError("every document of --input is also in --val, so there is nothing to train on")
    sources = [Source(files, side, scan.sizes, fraction, smoke)]
    if val_scan:
        sources.append(Source(val_files, np.where(val_scan.usable, VAL, DROP), val_scan.sizes, fraction, smoke))
    return sources


def train_tokenizer(source, vocab_size):
    """Trains a byte-level BPE on the training split of `source`."""
    print(f"training a byte-level BPE of {vocab_size:,} ids on the training split")
    start = time.perf_counter()
    tokenizer = Tokenizer.train(training_texts(source), vocab_size)
    print(f"... in {time.perf_counter() - start:.1f} s")
    if tokenizer.vocab_size < vocab_size:
        print(f"the text is too small for {vocab_size:,} ids: the tokenizer has {tokenizer.vocab_size:,}")
    return tokenizer


def print_report(splits, skipped):
    """Prints a line per split, and the documents that were skipped."""
    for which, counts in splits.items():
        if "examples" in counts:
            print(f"{which}: the chat template shows a turn in another way once it is in the past, so the "
                  f"conversations become {counts['examples']:,} examples, which repeat the past as the chat shows it")
        learned = f", {counts['response_tokens']:,} of them learned" if "response_tokens" in counts else ""
        print(f"{which:5} {counts['documents']:9,} documents {counts['bytes']:14,} bytes {counts['tokens']:13,} tokens"
              f"{learned} ({counts['bytes'] / max(1, counts['tokens']):.2f} bytes per token)")
    print("skipped: " + (str(skipped) or "nothing"))


def prepare(name=None, inputs=(), val=(), out=None, vocab_size=None, tokenizer=None, val_fraction=0.05, seed=0,
            overwrite=False, smoke=False, names=Names(), size=None):
    """Writes a dataset and returns the directory: `out`, or data/NAME, or data/NAME-smoke.

    name        a known corpus, or with `inputs` (paths) the dataset's name
    val         paths of a validation set; without it `seed` chooses `val_fraction` of the bytes
    vocab_size  ids of the BPE that is trained here
    tokenizer   "bytes", "gpt2", a directory or a Tokenizer; then none is trained
    names       the fields of records to read: see data/conversation.py
    size        bytes of text after which no further document is taken; None for a corpus's own size

    Raises UserError. Long, as all stages stand in a row; each is a function.
    """
    start, name = time.perf_counter(), choose_name(name, inputs, out)
    check_numbers(vocab_size, tokenizer, val_fraction)
    out = choose_directory(name, (*inputs, *val), out, smoke)
    existing = {} if overwrite or out.name.endswith("-smoke") else marker_of(out, DATASET)
    tokenizer, vocab_size, skipped = choose_tokenizer(tokenizer), vocab_size or VOCAB_SIZE, corpora.Skipped()
    files, val_files = find_files(name, inputs, val, skipped, names)
    size = size or download.SIZES.get(name)
    made_from = (*map(stamp, files), "--val", *map(stamp, val_files), val_fraction, seed, smoke, size, encoding.TASK,
                 (tokenizer.hash, tokenizer.chat_template) if tokenizer else vocab_size)
    with contextlib.suppress(AlreadyMade), resumable(out, DATASET, made_from) as (part, progress):
        # the first pass, and the settings that make a dataset another one
        scan = Scan(files, skipped, smoke, "--input", part, progress, size)
        val_scan = Scan(val_files, skipped, smoke, "--val", part, progress) if val_files else None
        check_scans(scan, val_scan, inputs, val, skipped, names)
        settings = {"kind": scan.kind, "sha256": scan.sha256, "val_sha256": val_scan and val_scan.sha256,
                    "split_seed": seed, "val_fraction": None if val_scan else val_fraction, "smoke": smoke,
                    "trained_ids": None if tokenizer else vocab_size}
        if tokenizer:
            settings["tokenizer_hash"] = tokenizer.hash
        if existing:
            check_existing(existing, settings, out.name)

        # the split, and a tokenizer of the training side
        sources = make_sources(files, val_files, scan, val_scan, val_fraction, seed, smoke, skipped)
        if "tokenizer" not in progress:
            tokenizer = tokenizer or train_tokenizer(sources[0], vocab_size)
            tokenizer.save(part)
            progress["tokenizer"] = tokenizer.hash
            write_json(part / "progress.json", progress)
        tokenizer = tokenizer or Tokenizer.load(part)

        # the second pass
        if scan.kind == "examples":
            encoding.write_held_out(part / "val.jsonl", sources)
        splits, dtype = encoding.write(part, progress, tokenizer, sources, scan.kind)
        repeats = encoding.repetition(part, splits, dtype, tokenizer) if inputs else {}
        write_json(part / "meta.json", {
            "format": 1, "name": name, "source": file_names(inputs) or [name],
            "val_source": file_names(val or [file.path for file in val_files]), "dtype": dtype,
            "vocab_size": tokenizer.vocab_size, **settings, "tokenizer_hash": tokenizer.hash,
            **({} if inputs else {"python": platform.python_version()}), **repeats, "splits": splits,
            "skipped": skipped.counts()})

    if not existing:
        print_report(splits, skipped)
        seconds, read = time.perf_counter() - start, sum(counts["bytes"] for counts in splits.values())
        print(f"wrote {out.name}: {scan.kind}, {tokenizer.vocab_size:,} ids, {dtype}, sha256 {scan.sha256[:12]}; "
              f"{seconds:.1f} s, {read / seconds / 1e6:.1f} MB/s")
        if sentence := road(repeats):
            print(sentence)
    return out


def main():
    """The command: flags, then prepare()."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("corpus", nargs="?", help=f"a corpus known here: {', '.join(KNOWN)} (all but stdlib are downloaded)")
    add("--input", nargs="+", metavar="PATH", default=[], help="files and folders of text, or of records: .jsonl, "
        ".json, .csv, .tsv, .parquet; also .gz and .zst")
    add("--name", help="name of the dataset (default: from the first input)")
    for part, usual in (("text", "text"), ("prompt", "prompt, question, instruction + input"),
                        ("response", "response, completion, answer, output")):
        add(f"--{part}-field", metavar="FIELD", help=f"the records' field with the {part} (default: {usual})")
    add("--val", nargs="+", metavar="PATH", default=[], help="take this text as the whole validation split")
    add("--vocab-size", type=int, metavar="N", help=f"ids of the tokenizer trained on the text (default {VOCAB_SIZE})")
    add("--tokenizer", metavar="bytes|gpt2|DIR", help="use this tokenizer and train none; gpt2 is downloaded once")
    add("--val-fraction", type=float, default=0.05, metavar="F", help="validation's share of the bytes (default 0.05)")
    add("--seed", type=int, default=0, help="of the split (default 0)")
    add("--size", metavar="N", help="take the first documents only, until they hold so much text, as 100MB or 2GB "
        "(default: all; of fineweb-edu 100MB)")
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
    out = prepare(args.corpus or args.name, args.input, args.val, args.out, args.vocab_size,
                  args.tokenizer, args.val_fraction, args.seed, args.overwrite, args.smoke,
                  Names(args.text_field, args.prompt_field, args.response_field), args.size and bytes_of(args.size))
    learned = args.tokenizer and any(Path(args.tokenizer, best, MODEL.marker).is_file() for best in ("", "best"))
    words = ["python", "train.py", "--data", out.name if out.parent == HERE else args.out, "--out", f"out-{out.name}"]
    print("Next:", shlex.join(words + (["--init-from", args.tokenizer] if learned else [])))


if __name__ == "__main__":
    run(main)
