"""Runs a model without changing it: scores text, generates, lets two models work together, chats.

    python sample.py out --prompt "def read_file(path):"
    python sample.py out --prompt "import os" --samples 3 --temperature 0.8 --top-p 0.95
    echo "class Stack:" | python sample.py out --max-new-tokens 300 --seed 7
    python sample.py out --file notes.txt --temperature 0
    python sample.py out-faq --chat                 # a model trained on conversations
    python sample.py out --draft out-small          # speculative decoding: the same text, faster
    python sample.py out --lookup --file notes.txt  # prompt-lookup decoding: no second model
    python sample.py out-small --escalate out       # a cascade: a large model writes unsure tokens
    python sample.py out-faq OTHER --eval faq       # held-out prompts: losses, answers, overlap

Text goes to standard output while it is generated; settings and speed go to standard error.
"""
import argparse, collections, contextlib, copy, dataclasses, functools, math, sys, time
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.nn.functional as F

from data import UserError
from data.chat import converse, readable_pieces, speak
from data.checkpoints import find_model, model_name, tokenizer_of
from data.console import Parser, decoded, run
from data.graphs import decoding, one_launch
from data.machine import (accelerate, how_quantized_layers_run, is_accelerated, is_fast_on_cpu, logits_at_once,
                          pick_device, threads_for, threads_of)
from model import KVCache, load


# ---------------------------------------------------------------------------------------------------------------------
# Score: how well a model predicts a text

@torch.no_grad()
def at_positions(model, batch, function):
    """Applies function(logits (n, V) float32, targets (n,)) -> (n,) at all positions: (B, T)."""
    hidden = model(batch.ids, segments=batch.segments, head=False).flatten(0, 1)              # (B, T, C) -> (B * T, C)
    rows = max(1, logits_at_once(hidden.device) // model.config.vocab_size)    # all at once would not fit the memory
    parts = zip(hidden.split(rows), batch.targets.flatten().split(rows))
    return torch.cat([function(model.lm_head(h).float(), t) for h, t in parts]).view(batch.targets.shape)


def token_losses(model, batch):
    """Cross-entropy of each target in nats, (B, T) float32; 0 where the target is ignored."""
    return at_positions(model, batch, functools.partial(F.cross_entropy, reduction="none"))


def score(model, batches, token_bytes):
    """Sums over all targets: (nats, tokens, bytes), float64 (3,). token_bytes: (V,)."""
    device = next(model.parameters()).device
    token_bytes = torch.as_tensor(token_bytes, device=device)
    total = torch.zeros(3, dtype=torch.float64)
    training = model.training
    model.eval()
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        learned = batch.targets >= 0
        sums = (token_losses(model, batch).sum(), learned.sum(), token_bytes[batch.targets[learned]].sum())
        total += torch.stack([s.cpu().double() for s in sums])                 # on the CPU: mps has no float64
    model.train(training)
    return total


def figures(nats, tokens, n_bytes):
    """Loss (nats per token), perplexity, and bits per byte, which compares tokenizers, too."""
    loss = float(nats) / max(1, int(tokens))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": float(nats) / math.log(2) / max(1, int(n_bytes)),
            "tokens": int(tokens), "bytes": int(n_bytes)}


# ---------------------------------------------------------------------------------------------------------------------
# Generate

def next_token(logits, seen, generator=None, temperature=1.0, top_p=1.0, repetition_penalty=1.0, **sampling):
    """Samples one id per row, (B, 1), from logits (B, V); temperature 0 is greedy."""
    if temperature < 1e-5:
        return penalized(logits.float(), seen, repetition_penalty).argmax(-1, keepdim=True)
    probs = next_probs(logits, seen, temperature, repetition_penalty=repetition_penalty, **sampling)
    noise = torch.rand(probs.shape, generator=generator, device=probs.device)
    ids = draw(probs, noise)
    # Mostly the id drawn from all is one of the likeliest: then it is the draw from these, too.
    if top_p < 1.0 and not ((probs * (probs > probs.gather(1, ids))).sum(-1) < top_p).all():
        ids = draw(likeliest(probs, top_p), noise)
    return ids


def refuse_not_a_number(values):
    """Raises UserError if first results are infinite or NaN: checking all weights is slow."""
    if not torch.isfinite(torch.as_tensor(values)).all():
        raise UserError("the model computes infinite numbers, or none (NaN): its training diverged, or its "
                        "model.safetensors is damaged; take an earlier checkpoint")


def penalized(logits, seen, penalty):
    """Penalizes ids (B, n) that were seen, in logits (B, V) (Keskar et al., 2019)."""
    if penalty == 1.0:
        return logits
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def next_probs(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities (B, V) of the next id; seen (B, n): the ids so far, for the repetition penalty.

    top_k keeps the k likeliest ids, top_p the likeliest with a sum of p (Holtzman et al., 2019),
    min_p those at least min_p times as likely as the first (Nguyen et al., 2024).
    """
    logits = penalized(logits.float(), seen, repetition_penalty)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    probs = logits.softmax(-1)
    return likeliest(probs, top_p) if top_p < 1.0 else probs


def likeliest(probs, top_p):
    """Probabilities (B, V) of the likeliest ids with a sum of top_p; of all others, 0."""
    k, enough = 64, False
    while not enough:                                          # sorting all ids takes longer than a small model
        top, order = probs.topk(min(k, probs.shape[-1]))
        before = top.cumsum(-1) - top                          # probability of all likelier ids
        k, enough = 8 * k, k >= probs.shape[-1] or bool((before[:, -1] >= top_p).all())
    probs = torch.zeros_like(probs).scatter(1, order, top.masked_fill(before >= top_p, 0.0))
    return probs / probs.sum(-1, keepdim=True)


def draw(probs, noise):
    """Samples one id per row, (B, 1), from probabilities (B, V), by the Gumbel-max trick.

    In exponential form: argmin_i E_i / p_i, where E_i = -log(noise_i) ~ Exp(1) for uniform noise
    (B, V). It is faster than torch.multinomial, and similar distributions mostly give the same id
    for the same noise (see `speculate`).
    """
    return (noise.log() / probs).argmax(-1, keepdim=True)


@torch.inference_mode()
def generate(model, ids, max_new_tokens, stop=(), vocab_size=None, generator=None, **sampling):
    """Yields a tensor (B,) of new ids per step for prompts (B, T), until each row met a stop id.

    A row that stopped repeats the stop id. Ids from vocab_size on are padding, never sampled. When
    the window (max_position_embeddings) is full, the last half of the window is the new context.
    Raises ValueError for a prompt without tokens.
    """
    config, device = model.config, next(model.parameters()).device
    window = config.max_position_embeddings
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    ids = ids.to(device)
    n, text = ids.shape[1], F.pad(ids, (0, max_new_tokens))                    # (B, n + max_new_tokens)
    stopped, cache, unread = [False] * len(ids), None, ids[:, -window:]
    for i in range(max_new_tokens):
        with decoding(device):
            if cache is None or cache.length + unread.shape[1] > window:
                if cache is not None:
                    unread = text[:, n - max(1, window // 2):n]
                room = min(window, unread.shape[1] + max_new_tokens - i)
                cache = KVCache(config, len(ids), room, device, model.dtype)
                logits = model(unread, cache=cache, last=1)[:, -1]             # (B, V)
                if i == 0:
                    refuse_not_a_number(logits)
                step = one_launch(model, cache)
            else:
                logits = step(unread)[:, -1]                                   # (B, V)
        if (vocab_size or config.vocab_size) < config.vocab_size:
            logits[:, vocab_size:] = -math.inf
        unread = next_token(logits, text[:, :n], generator=generator, **sampling)                  # (B, 1)
        if stop:
            if any(stopped):
                unread = torch.where(torch.tensor(stopped, device=device)[:, None], text[:, n - 1:n], unread)
            stopped = [row in stop for row in unread[:, 0].tolist()]
        text[:, n] = unread[:, 0]
        n += 1
        yield unread[:, 0]
        if all(stopped):
            return


def continuations(model, tokenizer, prompt, samples=1, seed=None, write=generate, **options):
    """Yields tensors (samples,) of ids that continue a text. write: `generate` or the like."""
    ids = tokenizer.encode(prompt, special=True, bos=True) or [tokenizer.eos_id]     # "": the start of a document
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    batch = torch.tensor([ids], device=device).expand(samples, -1)                   # (samples, T)
    return write(model, ids=batch, stop=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, generator=generator,
                 **options)


# ---------------------------------------------------------------------------------------------------------------------
# Two models, or two parts of one: speculative decoding and cascades

def first_layers(model, k):
    """An early exit: the first k layers with the norm and head of the model, weights shared."""
    exit, body = copy.copy(model), copy.copy(model.model)
    exit._modules, body._modules = dict(exit._modules), dict(body._modules)
    exit.config = body.config = dataclasses.replace(model.config, num_hidden_layers=k)
    body.layers, exit.model = body.layers[:k], body
    return exit


class Reader:
    """A model and a KV cache that follow a growing text; the cache drops rejected tokens.

    When the window is full, the last half of the window is the new context, as in `generate`.
    """
    def __init__(self, model, longest, vocab_size=None):
        self.model, self.longest, self.vocab_size = model, longest, vocab_size or model.config.vocab_size
        self.window, self.start, self.cache, self.read = model.config.max_position_embeddings, 0, None, 0

    def logits(self, text, count=1):
        """Logits (count, V), float32, after each of the last `count` tokens of text (1, n).

        The last `count` tokens are always computed; earlier tokens come from the cache.
        """
        n, half, start = text.shape[1], max(1, self.window // 2), self.start
        if self.cache is None or n - count < start:
            start = max(0, n - self.window)
        while n - start > self.window:                           # where `generate` would take a new context
            start += self.window + 1 - half
        if self.cache is None or start != self.start:
            self.start, room = start, min(self.window, self.longest - start)
            self.cache = KVCache(self.model.config, 1, room, text.device, self.model.dtype)
        self.cache.length = min(self.cache.length, n - count - self.start)
        new = text[:, self.start + self.cache.length:]
        self.read += new.shape[1]
        with decoding(text.device):
            logits = self.model(new, cache=self.cache, last=count)[0].float()
        if self.read == new.shape[1]:                            # the first pass
            refuse_not_a_number(logits)
        if self.vocab_size < logits.shape[1]:
            logits[:, self.vocab_size:] = -math.inf
        return logits


def guesses(reader, text, count, **sampling):
    """Draft tokens: the next `count` ids, a list, sampled by the smaller model of a Reader."""
    n = text.shape[1]
    for _ in range(count):
        text = torch.cat((text, next_token(reader.logits(text), text, **sampling)), dim=1)
    return text[0, n:].tolist()


class Lookup:
    """Prompt-lookup decoding: the text itself is the draft (Saxena, 2023; Yang et al., 2023).

    Finds the latest earlier occurrence of the last three tokens, or two, and proposes the tokens
    that followed, repeated cyclically where they reach the end of the text.
    """
    def __init__(self):
        self.ids, self.ends = [], {}                             # ends: {last two or three ids: end of the occurrence}

    def __call__(self, text, count):
        """A list of `count` draft tokens; [] if there is no earlier occurrence."""
        for i in text[0, len(self.ids):].tolist():
            n = len(self.ids)
            self.ends.update({tuple(self.ids[n - k:]): n for k in (2, 3) if n >= k})
            self.ids.append(i)
        n = len(self.ids)
        end = next((e for k in (3, 2) if (e := self.ends.get(tuple(self.ids[-k:])))), n)
        return [self.ids[end + i % (n - end)] for i in range(count)] if end < n else []


class DraftLength:
    """Chooses how many tokens to guess: two more after full acceptance, one less after a refusal.

    It is 0 while plain decoding takes less time per token. Every RETRY steps the slower way is
    tried for one step; each time plain decoding wins again, the wait doubles.
    """
    START, MOST, RETRY = 4, 6, 16                                # the C kernels read at most 7 tokens at once

    def __init__(self):
        self.length, self.wait, self.trial, self.steps = self.START, self.RETRY, self.RETRY, 0
        self.guessed = self.accepted = self.tokens = self.seconds = 0
        self.plain, self.drafted = [0.0, 0.0], [0.0, 0.0]        # tokens and seconds; recent steps weigh more

    def __call__(self):
        """The number of tokens to guess in the next step."""
        self.steps += 1
        plain, drafted = (seconds / max(1, tokens) for tokens, seconds in (self.plain, self.drafted))
        pays = drafted <= plain                                  # 0 seconds: not tried yet
        if self.steps >= self.trial:
            self.wait = self.RETRY if pays else min(2 * self.wait, 256)
            self.trial, pays = self.steps + self.wait, not pays
        return self.length if pays else 0

    def note(self, guessed, accepted, tokens, seconds):
        """Records a step: how many tokens were guessed, accepted and written, and the seconds."""
        if self.steps == 1:                                      # in this step the draft reads the prompt, too
            return
        self.guessed, self.accepted = self.guessed + guessed, self.accepted + accepted
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        recent = self.drafted if guessed else self.plain
        recent[:] = 0.9 * recent[0] + tokens, 0.9 * recent[1] + seconds
        if guessed:                                              # halving after a refusal was measured to be slower
            self.length = min(self.length + 2, self.MOST) if accepted == guessed else max(1, self.length - 1)

    def __str__(self):
        if not self.guessed or not self.plain[1]:
            return "too little was guessed to tell what it gains"
        gain = self.tokens / self.seconds * self.plain[1] / self.plain[0]
        return (f"{self.accepted / self.guessed:.0%} of {self.guessed} guessed tokens were taken; {gain:.2f} x plain "
                "decoding, measured in between")


@torch.inference_mode()
def speculate(model, draft, ids, max_new_tokens, stop=(), vocab_size=None, generator=None, length=None, **sampling):
    """Speculative decoding of one prompt, ids (1, T): the tokens of `generate` in fewer passes.

    A draft guesses some tokens, and `model` reads all of them in one pass (Leviathan et al., 2023;
    with an early exit as the draft: LayerSkip, Elhoushi et al., 2024).

    draft    a smaller model with the same ids, or None: prompt lookup
    length   a DraftLength, where the counts are wanted

    The model samples every token with the random numbers that `generate` would use, and a guess is
    accepted if it equals that sample. The draft samples with the same numbers (a shared-noise
    coupling: Daliri et al., 2025), so the two agree often. Rejection sampling accepts slightly
    more, but then the text depends on the draft. Here, in float32, it does not.
    """
    device, clock, length = next(model.parameters()).device, time.perf_counter, length or DraftLength()
    n, generator, ids = ids.shape[1], generator or torch.Generator(device), ids.to(device)
    end, text = n + max_new_tokens, F.pad(ids, (0, max_new_tokens))            # (1, end)
    target, guess = Reader(model, end, vocab_size), Lookup()
    if draft is not None:
        guess = functools.partial(guesses, Reader(draft, end, vocab_size), generator=generator, **sampling)
    greedy = sampling.get("temperature", 1.0) < 1e-5 and sampling.get("repetition_penalty", 1.0) == 1.0
    while n < end:
        start, reads_prompt, guessed, fresh = clock(), target.cache is None, [], []
        count = 0 if reads_prompt else min(length(), end - n - 1, target.window - (n - target.start))
        if count > 0:
            state = generator.get_state()
            guessed = guess(text[:, :n], count)
            generator.set_state(state)
            text[0, n:n + len(guessed)] = torch.tensor(guessed, device=device)
        rows = target.logits(text[:, :n + len(guessed)], len(guessed) + 1)     # (guesses + 1, V)
        own = rows.argmax(-1).tolist() if greedy else (
            int(next_token(row[None], text[:, :n + i], generator=generator, **sampling)) for i, row in enumerate(rows))
        for token, guessed_token in zip(own, [*guessed, None]):                # up to the first that was not guessed
            fresh.append(token)
            if token != guessed_token or token in stop:
                break
        new = torch.tensor(fresh, device=device)                               # (accepted + 1,)
        text[0, n:n + len(fresh)] = new
        n += len(fresh)
        if not reads_prompt:
            length.note(len(guessed), sum(map(int.__eq__, fresh, guessed)), len(fresh), clock() - start)
        yield from new[:, None]
        if fresh[-1] in stop:
            return


def lead(logits):
    """Lead of the likeliest id over the second, in probability: logits (..., V) -> (...)."""
    top = logits.softmax(-1).topk(2).values
    return top[..., 0] - top[..., 1]


@torch.inference_mode()
def cascade(small, big, ids, max_new_tokens, margin, stop=(), vocab_size=None, generator=None, counts=None, **sampling):
    """Generates from one prompt, ids (1, T), with two models that share a vocabulary.

    `small` writes. Each token whose lead is below `margin` is sampled from `big`, which first reads
    all unread tokens in one pass.

    big      None: small writes alone, and the leads are counted
    counts   a Counter to add to: "tokens", their summed "lead", "escalated" ones, tokens big "read"
    """
    device, counts = next(small.parameters()).device, collections.Counter() if counts is None else counts
    text, end = ids.to(device), ids.shape[1] + max_new_tokens
    readers = [model and Reader(model, end, vocab_size) for model in (small, big)]
    while text.shape[1] < end:
        logits = readers[0].logits(text)                                       # (1, V)
        sure = float(lead(logits))
        counts.update(tokens=1, lead=sure)
        if big is not None and sure < margin:
            before, logits = readers[1].read, readers[1].logits(text)
            counts.update(escalated=1, read=readers[1].read - before)
        new = next_token(logits, text, generator=generator, **sampling)        # (1, 1)
        text = torch.cat((text, new), dim=1)
        yield new[:, 0]
        if int(new) in stop:
            return


# ---------------------------------------------------------------------------------------------------------------------
# The command

def sample_arguments(argv):
    """The flags of the command, parsed and checked. Raises UserError."""
    from data import heldout                                     # here: to import this script needs no data
    parser = Parser(description=__doc__)
    parser.add_argument("model", nargs="+", help="a model directory, or a training run's; with --eval one or more")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue (default: standard input; a new document on a terminal)")
    source.add_argument("--file", help="read the text to continue from this file")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question in the model's chat template; "
                        "without a prompt, a conversation: a line a turn")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1, help="number of continuations, generated as one batch")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy, always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens only (0: all)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from the likeliest that reach this sum")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens less likely than this times the first")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: seen tokens become less likely")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU (default: the number that is fastest now)")
    group = parser.add_argument_group("two models, or parts of one", "speculative decoding, same text; or a cascade")
    together = group.add_mutually_exclusive_group()
    together.add_argument("--draft", metavar="DIR", help="the draft is a smaller model with the same tokenizer")
    together.add_argument("--self-draft", type=int, default=0, metavar="K", help="the draft is the model's first K "
                          "layers (distill.py --exits teaches them)")
    together.add_argument("--lookup", action="store_true", help="prompt lookup: the text so far is the draft")
    together.add_argument("--escalate", metavar="BIG_DIR", help="a cascade: a larger model writes the tokens that the "
                          "model is unsure of, or with another tokenizer the whole answer")
    group.add_argument("--margin", type=float, metavar="M", default=0.2, help="unsure: the likeliest token leads the "
                       "second by less in probability (default: 0.2); see data/measure.py SMALL BIG --escalate")
    heldout.evaluation_flags(parser)
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    parser.add_argument("--native", action=argparse.BooleanOptionalAction, default=True,
                        help="kernels in C on a CPU; --no-native: PyTorch alone")
    parser.add_argument("--smoke", action="store_true", help="20 tokens only")
    args = parser.parse_args(argv)
    if args.smoke:
        args.max_new_tokens = min(args.max_new_tokens, 20)
    heldout.check_evaluation_flags(args)
    check_arguments(args, parser.get_default("margin"))
    return args


def check_arguments(args, default_margin):
    """Raises UserError for flags that do not fit together, and for values out of range."""
    for flag in ("draft", "self_draft", "lookup", "escalate", "chat") if args.samples > 1 else ():
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} is for one continuation: leave out --samples")
    if args.system is not None and (not args.chat or not args.system.strip()):
        raise UserError("--system is the text of a system message, and goes with --chat")
    if not args.escalate and args.margin != default_margin:
        raise UserError("--margin says when a larger model helps: it needs --escalate BIG_DIR")
    if not 0 < args.margin < 1:
        raise UserError(f"--margin is {args.margin}; it must be a probability between 0 and 1")
    for name, least, most in (("max_new_tokens", 1, None), ("samples", 1, None), ("temperature", 0, None),
                              ("answers", 0, None), ("self_draft", 0, None), ("threads", 0, 1024), ("top_k", 0, None),
                              ("top_p", 1e-6, 1), ("min_p", 0, 1), ("repetition_penalty", 1e-6, None),
                              ("seed", 0, 2 ** 63 - 1)):
        value = getattr(args, name)
        if value is not None and not least <= value <= (most or math.inf):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}" +
                            (f" and at most {most}" if most else ""))


def open_model(path, device, native=True, dtype=None):
    """(model, tokenizer) of a directory; native: with kernels in C. Raises UserError.

    dtype: on a GPU; None: the stored one. A CPU is slow at 16 bits and gets float32.
    """
    directory = find_model(path)
    dtype = torch.float32 if device.type == "cpu" else dtype
    model = load(directory, device, dtype, finite=False)                       # see refuse_not_a_number
    return accelerate(model, native), tokenizer_of(model, directory)


def device_of(args):
    """The device of --device for generation: `auto` may be the CPU beside a GPU, and then says so."""
    device = pick_device(args.device)
    if args.device == "auto" and device.type == "cuda" and not (args.draft or args.escalate):
        model = accelerate(load(args.model, finite=False), args.native)        # mapped: nothing is read yet
        if is_fast_on_cpu(model):
            print(f"so small a model is faster in C on the CPU than on this GPU; --device {device} takes the GPU",
                  file=sys.stderr)
            return torch.device("cpu")
    return device


def partner(flag, args, model):
    """(model, tokenizer) of the directory that --draft or --escalate names. Raises UserError."""
    path = getattr(args, flag)
    if find_model(path).resolve() == find_model(args.model).resolve():
        raise UserError(f"--{flag} {path} is the model itself: give a {'smaller' if flag == 'draft' else 'larger'} one")
    return open_model(path, next(model.parameters()).device, is_accelerated(model))


def draft_model(args, model, tokenizer):
    """The draft that --draft or --self-draft names; None for --lookup. Raises UserError."""
    layers = model.config.num_hidden_layers
    if args.draft:
        draft, draft_tokenizer = partner("draft", args, model)
        if draft_tokenizer.hash != tokenizer.hash:
            raise UserError(f"--draft {args.draft} has another tokenizer than {args.model}, so its guesses mean "
                            "something else: give a model that was distilled or compressed from it")
        return draft
    if args.self_draft >= layers:
        raise UserError(f"--self-draft {args.self_draft}: this model has {layers} layers, and fewer must guess")
    if args.self_draft and args.self_draft not in model.exits:
        print(f"layer {args.self_draft} was not taught to guess (exits: {model.exits or 'none'}): python "
              f"distill.py {args.model} --exits {args.self_draft} --out DIR does that", file=sys.stderr)
    return first_layers(model, args.self_draft) if args.self_draft else None


def handover(args, model, tokenizer):
    """Sets up --escalate: returns the functions (write, report, takeover).

    With a shared tokenizer write() switches models at a token, and takeover is None. With another
    one takeover() is the large (model, tokenizer) if the answer should be rewritten, else None.
    """
    counts, (big, big_tokenizer) = collections.Counter(), partner("escalate", args, model)
    same = big_tokenizer.hash == tokenizer.hash
    if not same and args.chat:
        raise UserError(f"--escalate {args.escalate} has another tokenizer, so it can only take over whole answers: "
                        "leave out --chat")
    write = functools.partial(cascade, big=big if same else None, margin=args.margin, counts=counts)

    def takeover():
        return (big, big_tokenizer) if counts["lead"] < args.margin * counts["tokens"] else None

    def report():
        tokens = max(1, counts["tokens"])
        if same:
            return (f"{counts['escalated'] / tokens:.0%} of {tokens} tokens were handed over; for that the large model "
                    f"read {counts['read']}")
        return (f"the likeliest token leads by {counts['lead'] / tokens:.2f} in the mean: the answer is "
                f"{'handed over' if takeover() else 'kept'}")
    return write, report, None if same else takeover


def read_prompt(args):
    """The text of --file, --prompt or standard input; "" for a chat and on a terminal."""
    if args.file is not None:
        return decoded(Path(args.file).read_bytes(), f"--file {args.file}")
    if args.prompt is not None:
        return args.prompt
    if args.chat or sys.stdin is None or sys.stdin.isatty():
        return ""
    return decoded(sys.stdin.buffer.read(), "standard input").rstrip("\r\n")


def writer(args, model, tokenizer):
    """(write, report, takeover) for the flags: generates, speculates or cascades."""
    if args.escalate:
        return handover(args, model, tokenizer)
    if args.draft or args.self_draft or args.lookup:
        length = DraftLength()
        draft = draft_model(args, model, tokenizer)
        return functools.partial(speculate, draft=draft, length=length), length.__str__, None
    return generate, lambda: "", None


def main(argv=None):
    """The command: one path from the flags to the text, therefore many branches."""
    args = sample_arguments(argv)
    if args.eval:
        from data.measure import evaluate_command                # here, as measure imports this script
        return evaluate_command(args)
    args.model = args.model[0]
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p",
                                                       "repetition_penalty")}
    prompt, device = read_prompt(args), device_of(args)
    model, tokenizer = open_model(args.model, device, args.native)
    window, threads = model.config.max_position_embeddings, threads_for(model, args.threads, device)
    write, report, takeover = writer(args, model, tokenizer)
    follow = threads.following if write is generate else iter    # speculation times its own steps
    if args.chat:
        with contextlib.suppress(ImportError):                   # Windows has none
            import readline  # noqa: F401 - once it is there, input() edits lines by the arrow keys
        def answer(text, turn):
            seed = None if args.seed is None else args.seed + turn
            return follow(continuations(model, tokenizer, text, 1, seed, write, **sampling))
        converse(prompt, tokenizer, window, args.max_new_tokens, answer, model_name(args.model), args.system)
        return print(f"[{report()}]" if report() else "", file=sys.stderr)
    if (count := len(tokenizer.encode(prompt, special=True, bos=True))) > window:
        print(f"the prompt has {count} tokens, the window {window}: only the last {window} are read", file=sys.stderr)
    if not prompt:
        print("there is no prompt: a new document begins", file=sys.stderr)
    start, stamps, answer = time.perf_counter(), [], None
    if takeover:                                                 # the small model answers first, silently
        answer = list(continuations(model, tokenizer, prompt, 1, args.seed, write, **sampling))
        if takeover():
            (model, tokenizer), answer, write = takeover(), None, generate
    steps = answer or follow(continuations(model, tokenizer, prompt, args.samples, args.seed, write, **sampling))

    def stream():
        for ids in steps:
            stamps.append(time.perf_counter())
            yield ids.tolist()

    if args.samples == 1:
        print(prompt, end="", flush=True)
        speak(tokenizer, (ids[0] for ids in stream()))
    else:
        for i, ids in enumerate(zip(*stream())):
            print(f"--- sample {i + 1}\n{prompt}{''.join(readable_pieces(tokenizer, ids, tokenizer.eos_ids))}")
    decode, how = "", how_quantized_layers_run(model)
    if len(stamps) > 1 and not answer:
        decode = f", then {args.samples * (len(stamps) - 1) / (stamps[-1] - stamps[0]):.0f} tokens/s" + (
            f" with {threads_of(threads.count)}" if device.type == "cpu" else "")
    print(f"\n[{len(stamps)} tokens; the first after {1000 * (stamps[0] - start):.0f} ms{decode}]", file=sys.stderr)
    for more in filter(None, (report(), how and f"quantized layers: {how}")):
        print(f"[{more}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
