"""The first and the last screen of a training run."""
import itertools, lzma
from pathlib import Path

from data.checkpoints import find_model
from data.hub import read_config
from data.loader import IGNORE, LEARNED
from data.processes import say


def show_sizes(cfg, machine, model, train, eval_tokens, mix=()):
    """Prints the sizes of data, model, steps and evaluations.

    train: Windows of the split; mix: Parts of data/mixture.py
    """
    c, meta = model.config, train.meta
    sizes = meta["splits"]
    say(machine, f"data {meta['name']}: {sizes['train']['tokens']:,} training tokens of "
        f"{sizes['train']['bytes'] / max(1, sizes['train']['tokens']):.2f} bytes, vocabulary {meta['vocab_size']:,}")
    for part in mix:
        say(machine, f"mixed in: {part.name} in {float(part.share):.0%} of the windows, with "
            f"{len(part.train.tokens):,} training and {len(part.val.tokens):,} validation tokens")
    say(machine, f"model: {model.parameters_count():,} parameters; {c.num_hidden_layers} layers of width "
        f"{c.hidden_size}, {c.num_attention_heads} heads, MLP of {c.intermediate_size}, window of "
        f"{c.max_position_embeddings}")
    say(machine, f"{cfg.batch_size * cfg.context:,} tokens a step; each of {cfg.evals} evaluations reads "
        f"{eval_tokens:,} of {sizes['val']['tokens']:,} validation tokens")
    if not cfg.init_from and meta.get("repetition", 0.0) >= REPEATS:
        say(machine, road(meta))
    if train.long:
        say(machine, f"{train.long:,} examples exceed the window of {cfg.context} tokens: they are split into pieces, "
            "each read behind half a window of context" +
            f"; {train.unread:,} prompts alone exceed it" * bool(train.unread))


def readings_line(readings):
    """How often the texts are read, in words. readings: {name: times}, the main text first."""
    names = readings if len(readings) > 1 else ["the training text"]
    return ", ".join(f"{name} is read {times:.{1 if times >= 1 else 2}f} times"
                     for name, times in zip(names, readings.values()))


def evaluation_line(training, figures):
    """Training beside validation, in words.

    training   "train_loss", the mean over the steps since the last evaluation, and perhaps
               "train_bits_per_byte"
    figures    of the validation: see train.evaluator
    """
    bits = [f"{training['train_bits_per_byte']:.4f} in training"] if "train_bits_per_byte" in training else []
    bits.append(f"{figures['bits_per_byte']:.4f} in validation")
    mixed = [name for name in figures if name.endswith("_bits_per_byte")]
    bits += [f"{figures[name]:.4f} in validation of {name.removesuffix('_bits_per_byte')}" for name in mixed]
    return (f"loss {training['train_loss']:.4f} in training (mean since the last evaluation"
            f"{', of all data' * bool(mixed)}), {figures['loss']:.4f} in validation; perplexity "
            f"{figures['perplexity']:.2f}; bits per byte {', '.join(bits)}")


def show_example(machine, tokenizer, batch):
    """Prints a window's last example: a wrong mask or template is seen before it costs an hour."""
    row = batch.segments[0] == batch.segments[0].max()
    ids, targets = batch.ids[0][row].tolist(), batch.targets[0][row]                 # (T,)
    learned = [False, *(targets != IGNORE).tolist()]                                 # (T + 1,), with the last target
    tokens = list(zip(learned, [*ids, *targets[-1:].tolist()]))
    shorten = lambda text: text if len(text) < 500 else f"{text[:300]} [...] {text[-100:]}"
    text = lambda ids: shorten(tokenizer.decode_bytes(ids).decode("utf-8", errors="replace"))
    parts = [f"What is {'learned' if is_learned else 'read only'}:\n{text([i for _, i in part if i != IGNORE])}\n"
             for is_learned, part in itertools.groupby(tokens, lambda token: token[0])]
    say(machine, f"An example. {''.join(parts)}")


def show_scale(cfg, tokenizer, val):
    """Prints a scale for bits per byte: xz, a general compressor, on the same validation text."""
    text = tokenizer.decode_bytes(val.tokens[:2 ** 18].tolist())
    compressed = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(text))
    entry = read_config(find_model(cfg.out))["history"][-1]
    print(f"bits per byte: 8 where nothing is known, {compressed:.2f} by xz -9e on {len(text) / 1e3:,.0f} KB of this "
          f"validation text, {entry['val_bits_per_byte']:.2f} by this model; {Path(cfg.out, 'loss.png')} has the curve")


REPEATS = 0.5            # bits per byte, see road: at 0.1 a model from nothing won, at 1.3 it lost (tests/FIGURES.md)


def road(meta):
    """A sentence on which road suits little text, from nothing or from a general model; "" if not known.

    meta: meta.json of prepared data, with `repetition` of data/encoding.py
    """
    if "repetition" not in meta:
        return ""
    known = (f"held-out text costs {meta['repetition']:.2f} bits per byte with xz that has read the end of the "
             "training text: ")
    if meta["repetition"] < REPEATS:
        return known + "such text repeats itself, and a small model from nothing learns it well"
    return known + ("little of it is a repetition, so a general model that learns on is likely to be better than one "
                    "from nothing: data/prepare.py --tokenizer MODEL_DIR, then train.py --init-from MODEL_DIR")


def opening(tokenizer, val):
    """The first lines of the validation text; for examples, the first prompt."""
    length = 64 if val.mask is None else (val.mask[:] & LEARNED).argmax()            # tokens
    text = tokenizer.decode_bytes(val.tokens[:length].tolist()).decode("utf-8", errors="ignore")
    return text if val.mask is not None else text[:text.rfind("\n") + 1] or text
