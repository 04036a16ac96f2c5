"""Runs a model without changing it: generate text, score text.

    python sample.py out --prompt "def read_file(path):"
    python sample.py out --prompt "import os" --samples 3 --temperature 0.8 --top-p 0.95
    echo "class Stack:" | python sample.py out --max-new-tokens 300 --seed 7
    python sample.py out --file notes.txt --temperature 0
    python sample.py out-faq --chat                        # a model trained on prompts and responses

Text goes to standard output as it is made; what was chosen and how fast it went goes to standard error.
"""
import codecs, contextlib, math, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Parser, UserError, run
from data.tokenizer import Tokenizer
from model import KVCache, load, whole


# ---------------------------------------------------------------------------------------------------------------------
# Score: how well a model predicts a text

@torch.no_grad()
def token_losses(model, batch):
    """-log p of each target in nats, (B, T) float32; 0 where the target is ignored."""
    x = model(batch.ids, segments=batch.segments, head=False).flatten(0, 1)                  # (B * T, C)
    rows = max(1, 2 ** 21 // model.config.vocab_size)         # all logits at once would not fit the cache or the memory
    losses = [F.cross_entropy(model.lm_head(h).float(), t, reduction="none")
              for h, t in zip(x.split(rows), batch.targets.flatten().split(rows))]
    return torch.cat(losses).view(batch.targets.shape)


def score(model, batches, token_bytes):
    """Sums over all targets of `batches`: (nats, tokens, bytes) as float64 (3,). token_bytes: (V,) bytes of each id."""
    device = next(model.parameters()).device
    token_bytes = torch.as_tensor(token_bytes, device=device)
    total = torch.zeros(3, dtype=torch.float64)
    training = model.training
    model.eval()
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        learned = batch.targets >= 0
        sums = (token_losses(model, batch).sum(), learned.sum(), token_bytes[batch.targets[learned]].sum())
        total += torch.stack([s.cpu().double() for s in sums])                 # not on the device: mps has no float64
    model.train(training)
    return total


def figures(nats, tokens, n_bytes):
    """Loss (nats per token), perplexity, and bits per byte of text, by which any two tokenizers can be compared."""
    loss = float(nats) / max(1, int(tokens))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": float(nats) / math.log(2) / max(1, int(n_bytes)),
            "tokens": int(tokens), "bytes": int(n_bytes)}


# ---------------------------------------------------------------------------------------------------------------------
# Generate

def next_token(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, generator=None):
    """Draws one id per row, (B, 1), from logits (B, V); `seen` (B, n) are the ids so far, for the repetition penalty.

    temperature 0 takes the likeliest. top_k keeps the k likeliest ids, top_p the likeliest that together reach p
    (Holtzman et al., 2019), min_p those at least min_p times as likely as the first (Nguyen et al., 2024);
    repetition_penalty divides the positive logits of ids seen before and multiplies the negative (Keskar et al., 2019).
    """
    logits = logits.float()
    if repetition_penalty != 1.0:
        old = logits.gather(1, seen)
        logits = logits.scatter(1, seen, torch.where(old > 0, old / repetition_penalty, old * repetition_penalty))
    if temperature < 1e-5:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)          # probability of all likelier ids
        logits = logits.scatter(1, order, ordered.masked_fill(before >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(model, ids, max_new_tokens, stop=(), vocab_size=None, generator=None, **sampling):
    """Yields one (B,) tensor of new ids at a time, for prompts ids (B, T), until every row has met an id of `stop`.

    A row that stopped goes on yielding its stop id. Ids from vocab_size on are padding and never drawn. When the window
    (max_position_embeddings) is full, the last half of it is read again and generation goes on from there.
    """
    config, device = model.config, next(model.parameters()).device
    window = config.max_position_embeddings
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    seen = ids.to(device)
    stop = torch.tensor(sorted(stop), device=device)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=device)
    cache, unread = None, seen[:, -window:]
    for i in range(max_new_tokens):
        if cache is None or cache.length + unread.shape[1] > window:
            if cache is not None:
                unread = seen[:, -max(1, window // 2):]
            cache = KVCache(config, len(ids), min(window, unread.shape[1] + max_new_tokens - i), device, model.dtype)
        logits = model(unread, cache=cache, last_only=True)[:, -1]             # (B, V)
        logits[:, vocab_size or config.vocab_size:] = -math.inf
        unread = next_token(logits, seen, generator=generator, **sampling)     # (B, 1)
        if len(stop):
            unread = torch.where(stopped[:, None], seen[:, -1:], unread)
            stopped |= torch.isin(unread[:, 0], stop)
        seen = torch.cat((seen, unread), dim=1)
        yield unread[:, 0]
        if len(stop) and stopped.all():
            return


def pieces(tokenizer, ids, stop=()):
    """Text of a stream of ids, piece by piece: a character split over tokens is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if i in stop:
            break
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)


def speak(tokenizer, ids):
    """Prints the text of a stream of ids as it comes, up to the end token; returns it."""
    said = []
    for text in pieces(tokenizer, ids, tokenizer.eos_ids):
        print(text, end="", flush=True)
        said.append(text)
    print()
    return "".join(said)


def continuations(model, tokenizer, prompt, samples=1, seed=None, **options):
    """Lists of new ids, one per sample, for a text. `options` as in generate and next_token."""
    ids = tokenizer.encode(prompt, special=True, bos=True) or [tokenizer.eos_id]     # nothing: the start of a document
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    batch = torch.tensor([ids], device=device).expand(samples, -1)
    return generate(model, batch, stop=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, generator=generator,
                    **options)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def arguments(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a model directory, or a training run's")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue (default: standard input; a new document on a terminal)")
    source.add_argument("--file", help="read the text to continue from this file")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question in the model's chat template; "
                        "without a prompt, a conversation: a line a turn")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1, help="how many continuations; they are made together")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only (0: all)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest tokens that reach this sum")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens less likely than this times the first")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: seen tokens become less likely")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="20 tokens only")
    args = parser.parse_args(argv)
    if args.seed is not None and not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed is {args.seed}; it must be at least 0 and below 2^63")
    if args.smoke:
        args.max_new_tokens = min(args.max_new_tokens, 20)
    for name, least, most in (("max_new_tokens", 1, None), ("samples", 1, None), ("temperature", 0, None),
                              ("top_k", 0, None), ("top_p", 1e-6, 1), ("min_p", 0, 1),
                              ("repetition_penalty", 1e-6, None)):
        value = getattr(args, name)
        if not least <= value <= (most or math.inf):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}" +
                            (f" and at most {most}" if most else ""))
    return args


def pick_device(name="auto"):
    """The torch device a person named, or the best there is. Raises UserError if it is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in have if have[d])
    if not have.get(name.split(":")[0], False):
        best = next(d for d in have if have[d])
        raise UserError(f"--device {name}: there is no such device here; use --device {best}")
    return torch.device(name)


def decoded(data, where):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text") from None


def sampling(args):
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p",
                                                   "repetition_penalty")}


def lines():
    """Lines of standard input, until it ends."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "")


def chat(model, tokenizer, turns, args):
    """Answers each of `turns` in the chat template; the oldest ones are forgotten when the window is full."""
    messages, seed = [], args.seed
    for line in turns:
        messages.append({"role": "user", "content": line})
        room = model.config.max_position_embeddings - args.max_new_tokens
        while len(messages) > 1 and len(tokenizer.encode(tokenizer.render(messages), special=True)) > room:
            del messages[:2]
        ids = continuations(model, tokenizer, tokenizer.render(messages), seed=seed, **sampling(args))
        messages.append({"role": "assistant", "content": speak(tokenizer, map(int, ids))})
        seed = None if seed is None else seed + 1


def main(argv=None):
    args = arguments(argv)
    if args.file is not None:
        prompt = decoded(Path(args.file).read_bytes(), f"--file {args.file}")
    elif args.prompt is not None:
        prompt = args.prompt
    elif args.chat or sys.stdin is None or sys.stdin.isatty():
        prompt = ""
    else:
        prompt = decoded(sys.stdin.buffer.read(), "standard input").rstrip("\r\n")
    directory = whole(args.model)
    device = pick_device(args.device)
    model = load(directory, device, torch.float32 if device.type == "cpu" else None)    # a CPU is slow at 16 bits
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model only "
                        f"{model.config.vocab_size}: they do not belong together")
    if args.chat:
        return chat(model, tokenizer, [prompt] if prompt else lines(), args)
    count, window = len(tokenizer.encode(prompt, special=True, bos=True)), model.config.max_position_embeddings
    if count > window:
        print(f"the prompt has {count} tokens, the window {window}: only the last {window} are read", file=sys.stderr)
    start, stamps = time.perf_counter(), []

    def stream():
        for ids in continuations(model, tokenizer, prompt, args.samples, args.seed, **sampling(args)):
            stamps.append(time.perf_counter())
            yield ids.tolist()

    if args.samples == 1:
        print(prompt, end="", flush=True)
        speak(tokenizer, (ids[0] for ids in stream()))
    else:
        for i, ids in enumerate(zip(*stream())):
            print(f"--- sample {i + 1}\n{prompt}{''.join(pieces(tokenizer, ids, tokenizer.eos_ids))}")
    decode = ""
    if len(stamps) > 1:
        decode = f", then {args.samples * (len(stamps) - 1) / (stamps[-1] - stamps[0]):.0f} tokens/s"
    print(f"\n[{len(stamps)} tokens; the first after {1000 * (stamps[0] - start):.0f} ms{decode}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
