"""The data behind a model: the text it was trained on, calibrates on, and is measured on."""
import contextlib, hashlib
from pathlib import Path

import numpy as np
import torch

from data import UserError, heldout
from data.console import decoded
from data.conversation import answers
from data.encoding import encode_examples
from data.files import write_json
from data.loader import Batch, Windows, read_meta, stream_batches
from data.machine import to_device
from data.prepare import find
from data.records import holds_records
from data.tokenizer import Tokenizer
from data.vocabulary import reencoded


def last_training(history):
    """The entry of the last training in the history of a model; {} if there is none."""
    return next((entry for entry in reversed(history) if "data_sha256" in entry), {})


def trained_on(history, smoke, whose="the first model", instead="give --data NAME_OR_DIR (its validation split is "
               "scored) or --text FILE"):
    """The prepared data that a history names, found by hash. Raises UserError if it is gone."""
    entry = last_training(history)
    if not entry:
        raise UserError(f"the history of {whose} does not say what it was trained on: {instead}")
    for is_slice in (smoke, not smoke):
        with contextlib.suppress(UserError):
            directory = find(entry["data"], is_slice)
            if directory and read_meta(directory)["sha256"] == entry["data_sha256"]:
                return directory
    raise UserError(f"{whose} was trained on {entry['data']} of sha256 {entry['data_sha256'][:12]}, and that is "
                    f"not under data/: {instead}")


def calibration_context(model):
    """Tokens in a window of calibration."""
    return min(256, model.config.max_position_embeddings)


def calibration_data(model, tokenizer, args):
    """The prepared data (a directory) or text file for calibration: --calibration, or the history.

    Raises UserError if there is none, or if it was prepared with another tokenizer.
    """
    if not args.calibration:
        instead = "give --calibration, prepared data or a text file"
        directory = trained_on(model.history, args.smoke, "the model", instead)
        same = read_meta(directory)["tokenizer_hash"] == tokenizer.hash        # not after the step vocab
        return directory if same else in_ids_of(tokenizer, directory, Path(args.run) / "data")
    if Path(args.calibration).is_file():
        return Path(args.calibration)
    directory = find(args.calibration, args.smoke, "--calibration")
    if directory is None:
        raise UserError(f"--calibration {args.calibration} is not prepared yet: python data/prepare.py "
                        f"{args.calibration}, or name a text file")
    if read_meta(directory)["tokenizer_hash"] != tokenizer.hash:
        if any(entry["step"] == "vocab" for entry in model.history):
            return in_ids_of(tokenizer, directory, Path(args.run) / "data")
        raise UserError(f"--calibration {args.calibration} was prepared with another tokenizer than the model's: "
                        f"prepare it with data/prepare.py --tokenizer {args.model}, or name a text file")
    return directory


def calibration_rows(source, tokenizer, context, count, seed):
    """(name, Batch of at most `count` windows drawn by `seed`) of a text file or prepared data.

    Of prepared data the training split. Raises UserError for a text shorter than one window.
    """
    if not source.is_file():
        windows = Windows(source, "train", context)
        return windows.meta["name"], windows.training_rows(seed, 0, min(count, windows.per_epoch))
    ids = ids_of_text(source, tokenizer)
    if len(ids) <= context:
        raise UserError(f"--calibration {source} has {len(ids)} tokens, less than one window of {context} and the "
                        "token after it: name a longer text")
    starts = np.random.default_rng(seed).permutation((len(ids) - 1) // context)[:count] * context
    rows = torch.from_numpy(np.stack([ids[i:i + context + 1] for i in starts]).astype(np.int64))
    return source.name, Batch(rows[:, :-1], rows[:, 1:], None)


def calibration(model, tokenizer, args):
    """Draws --calibration-windows windows by --seed: ([Batch of 8, ...], entries for the history).

    Windows of prepared data come from the training split; a text file is encoded by the tokenizer.
    The batches are on the model's device.
    """
    source, context = calibration_data(model, tokenizer, args), calibration_context(model)
    name, drawn = calibration_rows(source, tokenizer, context, args.calibration_windows, args.seed)
    count, digest = len(drawn.ids), hashlib.sha256(drawn.ids.numpy().tobytes()).hexdigest()[:12]
    print(f"calibration: {count} windows of {context} tokens from {name}, seed {args.seed}, sha256 {digest}",
          flush=True)
    text = {"data": name, "windows": count, "context": context, "sha256": digest}
    drawn = to_device(drawn, next(model.parameters()).device)
    batches = [Batch(*(None if t is None else t[i:i + 8] for t in drawn)) for i in range(0, count, 8)]
    return batches, {"calibration": text, "seed": args.seed}


def ids_of_text(source, tokenizer):
    """The ids of a text file for calibration. Raises UserError if it is not UTF-8."""
    return tokenizer.encode_array(decoded(source.read_bytes(), f"--calibration {source}"))


def id_counts(source, tokenizer, scored=()):
    """(counts of ids (V,), name) of a text file, or of the training split of prepared data.

    scored: ids of windows of it that will be scored, and that do not count.
    """
    if source.is_file():
        ids, name = ids_of_text(source, tokenizer), source.name
    else:
        meta = read_meta(source)
        ids, name = np.memmap(source / "train.bin", dtype=meta["dtype"], mode="r"), meta["name"]
    counts = sum(np.bincount(ids[i:i + 2 ** 24], minlength=tokenizer.vocab_size) for i in range(0, len(ids), 2 ** 24))
    return np.maximum(counts - np.bincount(np.asarray(scored, int), minlength=len(counts)), 0), name


def in_ids_of(tokenizer, directory, place):
    """Prepared data of another tokenizer, decoded and encoded again in directory `place`."""
    meta = read_meta(directory)
    if meta["kind"] != "text":
        raise UserError(f"{meta['name']} holds prompts and responses in ids from before vocab: put vocab last, or give "
                        "--calibration FILE")
    if not (place / "meta.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            ids = np.memmap(directory / f"{split}.bin", dtype=meta["dtype"], mode="r")
            ids = np.array(reencoded(ids, Tokenizer.load(directory), tokenizer), meta["dtype"])
            ids.tofile(place / f"{split}.bin")
            meta["splits"][split] = {**meta["splits"][split], "tokens": len(ids)}
        write_json(place / "meta.json", {**meta, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size})
    return place


def measuring_flags(parser):
    """Adds the flags of measuring to a parser, or to a group of one."""
    add = parser.add_argument
    add("--escalate", action="store_true", help="of a small and a large model: also both together, the large one for "
        "the 10, 25 and 50 %% of the tokens that the small one is least sure of")
    add("--data", metavar="NAME_OR_DIR", help="score the validation split of this prepared data (default: of the data "
        "that the first model was trained on)")
    add("--text", metavar="FILE", help="score this text instead, or the responses of this .jsonl, .json, .csv ...")
    add("--eval-tokens", type=int, metavar="N", default=0, help="score about N: of data spread over the split, of a "
        "text the first (default: all)")
    add("--prompt-tokens", type=int, metavar="N", default=0, help="length of the prompt whose prefill is timed "
        "(default: 256, or the rest of the window)")
    add("--new-tokens", type=int, metavar="N", default=0, help="tokens decoded on the clock (default: 64, or a quarter "
        "of the smallest window)")
    add("--rounds", type=int, metavar="N", default=5, help="how often each model is timed (default: 5)")
    add("--threads", type=int, metavar="N", default=0, help="of the CPU (default: torch's choice)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")


def scored_text(args, tokenizers, history, context):
    """(protocol in words, {name: batches}): the text to score, for tokenizers {name: Tokenizer}.

    --text FILE is one stream of ids without a start token; --eval-tokens takes the beginning. Of a
    FILE of records the responses are scored, given the prompts, in the chat template of each model.
    Prepared data is scored as train.py does, with --eval-tokens spread over the split. Where the
    tokenizers differ, each encodes the beginning of the text, or all responses. Raises UserError.
    One decision between several sources of text, therefore many branches.
    """
    first, limit = next(iter(tokenizers.values())), args.eval_tokens
    windows = f"windows of {context} tokens and the one after each"
    if args.text and holds_records(args.text):
        return scored_responses(args.text, "--text", tokenizers, limit, context, windows)
    others = [name for name, tokenizer in tokenizers.items() if tokenizer.hash != first.hash]
    if args.text:
        data = Path(args.text).read_bytes()
        text = decoded(data, f"--text {args.text}")
        protocol = f"{Path(args.text).name} (sha256 {hashlib.sha256(data).hexdigest()[:12]})"
        ids = first.encode_array(text)
        streams = {name: tokenizers[name].encode_array(text) for name in others}
    else:
        directory = scored_directory(args, history)
        split = Windows(directory, "val", context)
        protocol = f"validation split of {split.meta['name']} (sha256 {split.meta['sha256'][:12]})"
        same = split.meta["tokenizer_hash"] == first.hash
        if split.mask is not None and (others or not same):
            return scored_responses(directory / "val.jsonl", "--data", tokenizers, limit, context, windows)
        if not same:
            raise UserError(f"--data {directory.name} was prepared with another tokenizer than the first model's: "
                            f"prepare it with data/prepare.py --tokenizer {args.measure[0]}, or give --text FILE")
        if not others:
            part = f", about {limit:,} tokens spread over it" if limit and limit < len(split.tokens) else ""
            batches = list(split.evaluation_batches(max(1, 8192 // context), limit))
            return f"{protocol}, {windows}{part}", dict.fromkeys(tokenizers, batches)
        ids, streams = split.tokens, {}
    if limit and limit + 1 < len(ids):
        ids, streams, windows = ids[:limit + 1], {}, f"{windows}, the first {limit:,} tokens"
    if len(ids) < 2:
        raise UserError(f"--text {args.text} has {len(ids)} tokens: nothing can be predicted in it")
    streams = {name: streams[name] if name in streams else reencoded(ids, first, tokenizers[name]) for name in others}
    batches = {name: list(stream_batches(streams.get(name, ids), context)) for name in tokenizers}
    return f"{protocol}, {windows}", batches


def scored_directory(args, history):
    """The prepared data of --data, or in the history of a model. Raises UserError."""
    directory = find(args.data, args.smoke) if args.data else trained_on(history, args.smoke)
    if directory is None:
        raise UserError(f"--data {args.data} is not prepared yet: python data/prepare.py {args.data}")
    return directory


def scored_responses(file, flag, tokenizers, limit, context, windows):
    """Like `scored_text`, for all responses in a file of records, of about `limit` tokens."""
    lines, first = heldout.read(file, flag), next(iter(tokenizers.values()))
    encoded = lambda tokenizer: encode_examples(tokenizer, lines)
    if limit:                                                    # the same lines for all, spread: a file's parts differ
        share = min(1.0, limit / sum(len(ids) for ids, _ in encoded(first)))
        count = max(1, int(share * len(lines)))
        lines = [lines[i * len(lines) // count] for i in range(count)]
    count = sum(len(answers(line.messages)) for line in lines)
    return (f"{count:,} responses of {Path(file).name} given their prompts, {windows}",
            {name: list(Windows.of(encoded(tokenizer), context).evaluation_batches(max(1, 8192 // context)))
             for name, tokenizer in tokenizers.items()})


def seed_of(history):
    """The seed of the last step that had one, as measuring has none; else None."""
    return next((entry["seed"] for entry in reversed(history) if "seed" in entry), None)
