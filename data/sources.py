"""Prepared data behind a model: which its history names, and which a step of a chain looks at."""
import contextlib, hashlib
from pathlib import Path

import numpy as np

from data import UserError, heldout
from data.console import decoded
from data.files import write_json
from data.loader import Windows, read_meta, stream_batches
from data.prepare import encode_example, find
from data.tokenizer import Tokenizer
from data.tokenizer_files import reencoded


def last_training(history):
    """The entry of the last training in a model's history; {} if it tells of none."""
    return next((entry for entry in reversed(history) if "data_sha256" in entry), {})


def trained_on(history, smoke, whose="the first model", instead="give --data NAME_OR_DIR (its validation split is "
               "scored) or --text FILE"):
    """The prepared data that a model's history names, by its hash. Raises UserError if it is not here."""
    made = last_training(history)
    if not made:
        raise UserError(f"the history of {whose} does not say what it was trained on: {instead}")
    for its_slice in (smoke, not smoke):
        with contextlib.suppress(UserError):
            directory = find(made["data"], its_slice)
            if directory and read_meta(directory)["sha256"] == made["data_sha256"]:
                return directory
    raise UserError(f"{whose} was trained on {made['data']} of sha256 {made['data_sha256'][:12]}, and that is "
                    f"not under data/: {instead}")


def calibration_context(model):
    """Tokens in a window of calibration."""
    return min(256, model.config.max_position_embeddings)


def calibration_data(model, tokenizer, args):
    """The directory of prepared data, or the text file, that --calibration or else the model's history names.

    Raises UserError if there is none, or if it was prepared with another tokenizer.
    """
    if not args.calibration:
        known = trained_on(model.history, args.smoke, "the model", "give --calibration, prepared data or a text file")
        same = read_meta(known)["tokenizer_hash"] == tokenizer.hash            # not after the step vocab
        return known if same else in_ids_of(tokenizer, known, Path(args.run) / "data")
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


def in_ids_of(tokenizer, directory, place):
    """Prepared data of another tokenizer, decoded and encoded again with this one, in directory `place`."""
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


def scored_text(args, tokenizers, history, context):
    """(protocol in words, {name: batches}): what is scored, for each of `tokenizers` ({name: Tokenizer}).

    --text FILE is one stream of ids, without a token that begins it; --eval-tokens takes its beginning. Of a .jsonl
    FILE the responses are scored, given their prompts, in each model's chat template. Prepared data is scored as
    train.py does, --eval-tokens spread over the split; but where tokenizers differ the beginning of its text, or all
    its responses, encoded by each. Raises UserError where that cannot be.
    """
    first, limit = next(iter(tokenizers.values())), args.eval_tokens
    windows = f"windows of {context} tokens and the one after each"

    def responses(file, flag):
        lines = heldout.read(file, flag)
        encoded = lambda tokenizer: [encode_example(tokenizer, line.prompt, line.response) for line in lines]
        if limit:                                            # the same lines for all, spread: a file's parts differ
            share = min(1.0, limit / sum(len(ids) for ids, _ in encoded(first)))
            count = max(1, int(share * len(lines)))
            lines = [lines[i * len(lines) // count] for i in range(count)]
        return (f"{len(lines):,} responses of {Path(file).name} given their prompts, {windows}",
                {name: list(Windows.of(encoded(tokenizer), context).evaluation_batches(max(1, 8192 // context)))
                 for name, tokenizer in tokenizers.items()})
    if args.text and args.text.endswith(".jsonl"):
        return responses(args.text, "--text")
    others = [name for name, tokenizer in tokenizers.items() if tokenizer.hash != first.hash]
    if args.text:
        data = Path(args.text).read_bytes()
        text = decoded(data, f"--text {args.text}")
        protocol = f"{Path(args.text).name} (sha256 {hashlib.sha256(data).hexdigest()[:12]})"
        ids = first.encode_array(text)
        streams = {name: tokenizers[name].encode_array(text) for name in others}
    else:
        directory = find(args.data, args.smoke) if args.data else trained_on(history, args.smoke)
        if directory is None:
            raise UserError(f"--data {args.data} is not prepared yet: python data/prepare.py {args.data}")
        split = Windows(directory, "val", context)
        protocol = f"validation split of {split.meta['name']} (sha256 {split.meta['sha256'][:12]})"
        if split.mask is not None and (others or split.meta["tokenizer_hash"] != first.hash):
            return responses(directory / "val.jsonl", "--data")
        if split.meta["tokenizer_hash"] != first.hash:
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


def seed_of(history):
    """The seed of the last step that drew anything: measuring itself draws nothing."""
    return next((entry["seed"] for entry in reversed(history) if "seed" in entry), None)
