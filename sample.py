"""Runs a model without changing it: generate text, score text, measure one model beside another.

    python sample.py out --prompt "def read_file(path):"
    python sample.py out --prompt "import os" --samples 3 --temperature 0.8 --top-p 0.95
    echo "class Stack:" | python sample.py out --max-new-tokens 300 --seed 7
    python sample.py out --file notes.txt --temperature 0
    python sample.py out-faq --chat                        # a model trained on prompts and responses
    python sample.py out --draft out-small                 # the small one guesses, the large one checks: the same text
    python sample.py out --lookup --file notes.txt         # the text so far guesses
    python sample.py out-small --escalate out              # the small one writes, but for what it is unsure of
    python sample.py out-faq OTHER --eval faq              # held-out prompts of prepared data: losses, answers, overlap

Text goes to standard output as it is made; what was chosen and how fast it went goes to standard error.
"""
import argparse, codecs, collections, contextlib, copy, dataclasses, functools, json, math
import statistics, sys, time
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.nn.functional as F

from data import UserError
from data.checkpoints import model_name, tokenizer_of, whole
from data.console import Parser, decoded, run
from data.machine import accelerate, how_quantized_layers_run, is_accelerated, pick_device, threads_for, threads_of
from model import KVCache, load


# ---------------------------------------------------------------------------------------------------------------------
# Score: how well a model predicts a text

@torch.no_grad()
def at_positions(model, batch, function):
    """function(logits (n, V) float32, targets (n,)) -> (n,) at all positions of a batch, a part at a time: (B, T)."""
    x = model(batch.ids, segments=batch.segments, head=False).flatten(0, 1)                  # (B * T, C)
    rows = max(1, 2 ** 21 // model.config.vocab_size)         # all logits at once would not fit the cache or the memory
    parts = zip(x.split(rows), batch.targets.flatten().split(rows))
    return torch.cat([function(model.lm_head(h).float(), t) for h, t in parts]).view(batch.targets.shape)


def token_losses(model, batch):
    """-log p of each target in nats, (B, T) float32; 0 where the target is ignored."""
    return at_positions(model, batch, functools.partial(F.cross_entropy, reduction="none"))


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

def next_token(logits, seen, generator=None, temperature=1.0, repetition_penalty=1.0, **sampling):
    """Draws one id per row, (B, 1), from logits (B, V); `seen` and `sampling` as in next_probs; temperature 0
    takes the likeliest."""
    if temperature < 1e-5:
        return penalized(logits.float(), seen, repetition_penalty).argmax(-1, keepdim=True)
    probs = next_probs(logits, seen, temperature, repetition_penalty=repetition_penalty, **sampling)
    return draw(probs, generator)


def refuse_not_a_number(values):
    """Raises UserError if a model's first results are infinite or not a number: so are weights of it then, and to look
    at all of those would take a fifth of the time to the first token."""
    if not torch.isfinite(torch.as_tensor(values)).all():
        raise UserError("the model computes infinite numbers, or none (NaN): its training diverged, or its "
                        "model.safetensors is damaged; take an earlier checkpoint")


def penalized(logits, seen, penalty):
    """Positive logits of ids seen before divided by the penalty, negative ones multiplied (Keskar et al., 2019)."""
    if penalty == 1.0:
        return logits
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def next_probs(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities (B, V) of the next id; `seen` (B, n) are the ids so far, for the repetition penalty.

    top_k keeps the k likeliest ids, top_p the likeliest that together reach p
    (Holtzman et al., 2019), min_p those at least min_p times as likely as the first (Nguyen et al., 2024).
    """
    logits = penalized(logits.float(), seen, repetition_penalty)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    if top_p < 1.0:
        probs, k, enough = logits.softmax(-1), 64, False
        while not enough:                                      # to sort all ids would take longer than a small model
            top, order = probs.topk(min(k, probs.shape[-1]))
            before = top.cumsum(-1) - top                      # probability of all likelier ids
            k, enough = 8 * k, k >= probs.shape[-1] or bool((before[:, -1] >= top_p).all())
        probs = torch.zeros_like(probs).scatter(1, order, top.masked_fill(before >= top_p, 0.0))
        return probs / probs.sum(-1, keepdim=True)
    return logits.softmax(-1)


def draw(probs, generator=None):
    """One id per row, (B, 1), by probabilities (B, V): where a random waiting time at the rate of the probability ends
    first. Like torch.multinomial, but much sooner; and from similar probabilities the same random numbers mostly draw
    the same id, which `speculate` lives on."""
    waiting = -torch.rand(probs.shape, generator=generator, device=probs.device).log_() / probs                # (B, V)
    return waiting.argmin(-1, keepdim=True)


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
    ids = ids.to(device)
    n, text = ids.shape[1], F.pad(ids, (0, max_new_tokens))                    # (B, n + max_new_tokens)
    stopped, cache, unread = [False] * len(ids), None, ids[:, -window:]
    for i in range(max_new_tokens):
        if cache is None or cache.length + unread.shape[1] > window:
            if cache is not None:
                unread = text[:, n - max(1, window // 2):n]
            cache = KVCache(config, len(ids), min(window, unread.shape[1] + max_new_tokens - i), device, model.dtype)
        logits = model(unread, cache=cache, last=1)[:, -1]                     # (B, V)
        if i == 0:
            refuse_not_a_number(logits)
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


def first_layers(model, k):
    """The model that the first k layers are, with the same norm and head: an early exit. It shares all weights."""
    exit, body = copy.copy(model), copy.copy(model.model)
    exit._modules, body._modules = dict(exit._modules), dict(body._modules)
    exit.config = body.config = dataclasses.replace(model.config, num_hidden_layers=k)
    body.layers, exit.model = body.layers[:k], body
    return exit


class Reader:
    """A model that follows a growing text: it reads in one pass what it has not read, and forgets what was taken back.

    When its window is full, the last half of that is read again, as in `generate`.
    """
    def __init__(self, model, longest, vocab_size=None):
        self.model, self.longest, self.vocab_size = model, longest, vocab_size or model.config.vocab_size
        self.window, self.start, self.cache, self.read = model.config.max_position_embeddings, 0, None, 0

    def logits(self, text, count=1):
        """float32 (count, V): what follows each of the last `count` tokens of text (1, n), n <= longest. They are read
        in any case; of those before, what was read stays read."""
        n, half, start = text.shape[1], max(1, self.window // 2), self.start
        if self.cache is None or n - count < start:
            start = max(0, n - self.window)
        while n - start > self.window:                           # where `generate` would have begun again
            start += self.window + 1 - half
        if self.cache is None or start != self.start:
            self.start, room = start, min(self.window, self.longest - start)
            self.cache = KVCache(self.model.config, 1, room, text.device, self.model.dtype)
        self.cache.length = min(self.cache.length, n - count - self.start)
        new = text[:, self.start + self.cache.length:]
        self.read += new.shape[1]
        logits = self.model(new, cache=self.cache, last=count)[0].float()
        if self.read == new.shape[1]:                            # the first pass
            refuse_not_a_number(logits)
        if self.vocab_size < logits.shape[1]:
            logits[:, self.vocab_size:] = -math.inf
        return logits


def guesses(reader, text, count, **sampling):
    """The next `count` ids (a list) as a smaller model would draw them."""
    n = text.shape[1]
    for _ in range(count):
        text = torch.cat((text, next_token(reader.logits(text), text, **sampling)), dim=1)
    return text[0, n:].tolist()


class Lookup:
    """Guesses that a text goes on as after the latest place where its last three tokens, or two, stood before (prompt
    lookup: Saxena, 2023; Yang et al., 2023). A repetition is guessed to go on."""
    def __init__(self):
        self.ids, self.ends = [], {}                             # ends: {two or three ids: where they ended last}

    def __call__(self, text, count):
        """The next ids, a list of `count`, or [] if its end stood nowhere before. Each call's text begins with the last
        one's."""
        for i in text[0, len(self.ids):].tolist():
            n = len(self.ids)
            self.ends.update({tuple(self.ids[n - k:]): n for k in (2, 3) if n >= k})
            self.ids.append(i)
        n = len(self.ids)
        end = next((e for k in (3, 2) if (e := self.ends.get(tuple(self.ids[-k:])))), n)
        return [self.ids[end + i % (n - end)] for i in range(count)] if end < n else []


class Pace:
    """How many tokens to guess: as many as give the most tokens per second by the refusals and times so far, and none
    where plain decoding is faster. Totals, without the pass that reads the prompt: guessed, taken, refused, tokens and
    seconds; alone: of passes without guesses, (how many, seconds)."""
    START, MOST, AGAIN = (4, 0, 0, 0, 4), 6, 16                  # the draft reads the prompt, then both ways are timed;
    #                                                              KERNELS read up to 7 tokens at once
    def __init__(self):
        self.guessed = self.taken = self.refused = self.tokens = self.seconds = self.passes = 0
        self.alone, self.g = (0, 0.0), self.START[0]
        self.right, self.wrong, self.wait = 4.0, 1.0, self.AGAIN         # taken and refused of late: text changes
        # seconds of a pass that reads one token; of making a guess; by which checking one makes a pass longer
        self.plain, self.guess, self.check = (collections.deque(maxlen=9) for _ in range(3))

    def best(self, right, wrong):
        """(g, x): with g guesses it is fastest, x times plain decoding. A pass that checks g guesses, each right with
        probability a if those before were, gives (1 - a^(g + 1)) / (1 - a) tokens (Leviathan et al., 2023)."""
        plain, guess, check = (statistics.median(times or [0]) for times in (self.plain, self.guess, self.check))
        tokens, best = 0.0, (0, 1.0)
        for g in range(self.MOST + 1):
            tokens += (right / (right + wrong)) ** g
            best = max(best, (g, tokens * plain / (plain + g * (guess + check))), key=lambda pair: pair[1])
        return best

    def __call__(self):
        """How many tokens to guess now."""
        self.passes += 1
        if self.passes <= len(self.START):
            return self.START[self.passes - 1]
        if self.g:
            self.wait = self.AGAIN
            return self.g if self.passes % self.AGAIN else 0     # is it still faster than plain?
        if self.passes % self.wait:
            return 0
        self.wait = min(2 * self.wait, 16 * self.AGAIN)          # to try again costs: ever more seldom
        return self.START[0]

    def note(self, asked, guessed, fresh, taken, guessing, reading):
        """What a pass gave: numbers of tokens, and seconds."""
        refused = int(taken < min(guessed, fresh))
        self.guessed, self.taken, self.refused = self.guessed + guessed, self.taken + taken, self.refused + refused
        self.tokens, self.seconds = self.tokens + fresh, self.seconds + guessing + reading
        if guessed:
            self.right, self.wrong = 0.9 * self.right + taken, 0.9 * self.wrong + refused
        if self.passes > 1 and not asked:
            self.plain.append(reading)
            self.alone = self.alone[0] + 1, self.alone[1] + reading
        elif self.plain and guessed:
            self.guess.append(guessing / guessed)
            self.check.append(max(0.0, reading - statistics.median(self.plain)) / guessed)
        if self.plain and (guessed or not self.passes % self.AGAIN):         # not each time: that is time, too
            self.g, _ = self.best(self.right, self.wrong)

    def __str__(self):
        if not self.guessed or not self.plain:
            return "too little was guessed to tell what it gains"
        passes, seconds = self.alone
        gain, bound = self.tokens / self.seconds * seconds / passes, self.best(self.taken, self.refused)[1]
        return (f"{self.taken / self.guessed:.0%} of {self.guessed} guessed tokens were taken; {gain:.2f} x plain "
                f"decoding, measured in between; so many taken at these costs allow {bound:.2f} x")


@torch.inference_mode()
def speculate(model, draft, ids, max_new_tokens, stop=(), vocab_size=None, generator=None, pace=None, **sampling):
    """`generate` for one prompt, ids (1, T), token for token: `draft` guesses some, and `model` reads them all at once
    (Leviathan et al., 2023; with the model's own first layers: LayerSkip, Elhoushi et al., 2024).

    draft   a smaller model with the same ids, or None: Lookup guesses
    pace    a Pace, for its counts

    Each token is drawn from the model's own distribution with the random numbers that `generate` would use, and a guess
    is taken if it is that token. The draft draws with the same numbers, so both mostly find the same one where their
    distributions agree (Daliri et al., 2025). Rejection sampling takes some guesses more, but there the text depends on
    the draft and on how many it guesses; here (in float32) it does not, so that the pace may follow the clock.
    """
    device, clock, pace = next(model.parameters()).device, time.perf_counter, pace or Pace()
    n, generator, ids = ids.shape[1], generator or torch.Generator(device), ids.to(device)
    end, text = n + max_new_tokens, F.pad(ids, (0, max_new_tokens))            # (1, end)
    target = Reader(model, end, vocab_size)
    guess = Lookup() if draft is None else functools.partial(
        guesses, Reader(draft, end, vocab_size), generator=generator, **sampling)
    likeliest = sampling.get("temperature", 1.0) < 1e-5 and sampling.get("repetition_penalty", 1.0) == 1.0
    while n < end:
        start, prompt, guessed, fresh = clock(), target.cache is None, [], []
        asked = 0 if prompt else max(0, min(pace(), end - n - 1, target.window - (n - target.start)))
        if asked:
            state = generator.get_state()
            guessed = guess(text[:, :n], asked)
            generator.set_state(state)
            text[0, n:n + len(guessed)] = torch.tensor(guessed, device=device)
        middle = clock()
        rows = target.logits(text[:, :n + len(guessed)], len(guessed) + 1)
        own = rows.argmax(-1).tolist() if likeliest else (
            int(next_token(row[None], text[:, :n + i], generator=generator, **sampling)) for i, row in enumerate(rows))
        for x, its in zip(own, [*guessed, None]):                # up to the first that is not as guessed
            fresh.append(x)
            if x != its or x in stop:
                break
        new = torch.tensor(fresh, device=device)
        text[0, n:n + len(fresh)] = new
        n += len(fresh)
        if not prompt:
            pace.note(asked, len(guessed), len(fresh), sum(map(int.__eq__, fresh, guessed)), middle - start,
                      clock() - middle)
        yield from new[:, None]
        if fresh[-1] in stop:
            return


def lead(logits):
    """By how much the likeliest id leads the second, in probability: logits (..., V) to (...)."""
    top = logits.softmax(-1).topk(2).values
    return top[..., 0] - top[..., 1]


@torch.inference_mode()
def cascade(small, big, ids, max_new_tokens, margin, stop=(), vocab_size=None, generator=None, counts=None, **sampling):
    """`generate` for one prompt, ids (1, T), by two models with the same ids: `small` writes, and each token whose lead
    is below `margin` is left to `big`, which first reads, in one pass, all that it has not read.

    big     None: small writes alone, and its leads are counted
    counts  a Counter: "tokens", their "lead" in sum, those "escalated", and what the big one "read", are added up in it
    """
    device, counts = next(small.parameters()).device, collections.Counter() if counts is None else counts
    text, end = ids.to(device), ids.shape[1] + max_new_tokens
    readers = [model and Reader(model, end, vocab_size) for model in (small, big)]
    while text.shape[1] < end:
        logits = readers[0].logits(text)
        sure = float(lead(logits))
        counts.update(tokens=1, lead=sure)
        if big is not None and sure < margin:
            before, logits = readers[1].read, readers[1].logits(text)
            counts.update(escalated=1, read=readers[1].read - before)
        new = next_token(logits, text, generator=generator, **sampling)         # (1, 1)
        text = torch.cat((text, new), dim=1)
        yield new[:, 0]
        if int(new) in stop:
            return


def readable_pieces(tokenizer, ids, stop=()):
    """Text of a stream of ids, piece by piece: a character split over tokens is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if i in stop:
            break
        yield decoder.decode(tokenizer.decode_bytes([i]))
    yield decoder.decode(b"", final=True)


def speak(tokenizer, ids, said=None):
    """Prints the text of a stream of ids as it comes, up to the end token. said: a list for the pieces. Returns whether
    it came to its end."""
    last = []

    def noted():
        for i in ids:
            last[:] = [i]
            yield i
    for text in readable_pieces(tokenizer, noted(), tokenizer.eos_ids):
        print(text, end="", flush=True)
        if said is not None:
            said.append(text)
    print()
    return bool(last) and last[0] in tokenizer.eos_ids


def continuations(model, tokenizer, prompt, samples=1, seed=None, write=generate, **options):
    """Lists of new ids, one per sample, for a text. `options` as in `write`, which does what generate does."""
    ids = tokenizer.encode(prompt, special=True, bos=True) or [tokenizer.eos_id]     # nothing: the start of a document
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    batch = torch.tensor([ids], device=device).expand(samples, -1)
    return write(model, ids=batch, stop=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, generator=generator,
                 **options)


# ---------------------------------------------------------------------------------------------------------------------
# Measure: the one ruler. What a smaller model costs and gains beside the one it was made from


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: held-out prompts. How well a model predicts their responses, and what it answers


# ---------------------------------------------------------------------------------------------------------------------
# The command

def sample_arguments(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("model", nargs="+", help="a model directory, or a training run's; with --eval one or more")
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
    parser.add_argument("--threads", type=int, default=0, help="of a CPU (default: the number that is fastest now)")
    group = parser.add_argument_group("two models, or parts of one", "tokens are guessed and checked several at once: "
                                      "the same text, sooner where guesses are good; or a larger model helps")
    together = group.add_mutually_exclusive_group()
    together.add_argument("--draft", metavar="DIR", help="a smaller model with the same tokenizer guesses")
    together.add_argument("--self-draft", type=int, default=0, metavar="K", help="the model's first K layers guess "
                          "(distill.py --exits teaches them)")
    together.add_argument("--lookup", action="store_true", help="the text guesses: it goes on as where it last said so")
    together.add_argument("--escalate", metavar="BIG_DIR", help="a larger model writes the tokens that the model is "
                          "unsure of, or with another tokenizer the whole answer")
    group.add_argument("--margin", type=float, metavar="M", default=0.2, help="unsure: the likeliest token leads the "
                       "second by less than this in probability; compress.py --measure SMALL BIG --escalate shows the "
                       "share and the gain of some margins (default: 0.2)")
    group = parser.add_argument_group("held-out prompts", "how well the models predict the responses, and what they "
                                      "answer; the first is what the others are compared with")
    group.add_argument("--eval", metavar="NAME_OR_FILE", help="prepared data, of which the held-out examples are "
                       "taken; or a .jsonl of prompt, response and, to choose from, choices")
    group.add_argument("--data", metavar="NAME_OR_DIR", help="with such a file: prepared training data. It tells what "
                       "is repetition: of the responses (groups by overlap), and in the answers")
    group.add_argument("--by", metavar="FIELD", help="groups by this field of the lines, too")
    group.add_argument("--answers", type=int, default=100, help="prompts to answer, spread over the file (100)")
    group.add_argument("--out", metavar="FILE", help="write all results and answers, a line each (.jsonl)")
    group.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--native", action=argparse.BooleanOptionalAction, default=True,
                        help="kernels in C on a CPU; --no-native: PyTorch alone")
    parser.add_argument("--smoke", action="store_true", help="20 tokens only")
    args = parser.parse_args(argv)
    for flag in ("data", "by", "out") if not args.eval else ():
        if getattr(args, flag):
            raise UserError(f"--{flag} is for held-out prompts: it needs --eval NAME_OR_FILE")
    if not args.eval and len(args.model) > 1:
        raise UserError(f"{' '.join(args.model)}: several models are compared with --eval NAME_OR_FILE; otherwise give "
                        "one")
    if args.seed is not None and not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed is {args.seed}; it must be at least 0 and below 2^63")
    one = next((flag for flag in ("draft", "self_draft", "lookup", "escalate", "chat") if getattr(args, flag)), None)
    if one and args.samples > 1:
        raise UserError(f"--{one.replace('_', '-')} is for one continuation: leave out --samples")
    if not args.escalate and args.margin != parser.get_default("margin"):
        raise UserError("--margin says when a larger model helps: it needs --escalate BIG_DIR")
    if not 0 < args.margin < 1:
        raise UserError(f"--margin is {args.margin}; it must be a probability between 0 and 1")
    if args.smoke:
        args.max_new_tokens = min(args.max_new_tokens, 20)
    for name, least, most in (("max_new_tokens", 1, None), ("samples", 1, None), ("temperature", 0, None),
                              ("answers", 0, None), ("self_draft", 0, None), ("threads", 0, 1024), ("top_k", 0, None),
                              ("top_p", 1e-6, 1), ("min_p", 0, 1), ("repetition_penalty", 1e-6, None)):
        value = getattr(args, name)
        if not least <= value <= (most or math.inf):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}" +
                            (f" and at most {most}" if most else ""))
    return args


def sampling(args):
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p",
                                                   "repetition_penalty")}


def lines():
    """Lines of standard input, until it ends. On a terminal arrow keys edit them and bring old ones back."""
    with contextlib.suppress(ImportError):                       # Windows has none
        import readline  # noqa: F401 - input() uses it once it is there
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "")


HELP = ("/reset forgets what was said, /save FILE writes it as data/prepare.py --input reads it, /quit ends, and so "
        "does Ctrl-C, which during an answer ends only that; put a space before a / that is meant")


def obey(line, messages):
    """Does what a line of a chat that begins with / asks for; returns what is to be said of it."""
    command, _, file = line.strip().partition(" ")
    if command == "/reset":
        messages.clear()
        return "what was said is forgotten"
    if command != "/save":
        return HELP if command == "/help" else f"there is no {command}: {HELP}"
    try:
        with open(file.strip(), "x", encoding="utf-8") as out:
            for question, answer in zip(messages[::2], messages[1::2]):
                turn = {"prompt": question["content"], "response": answer["content"]}
                out.write(json.dumps(turn, ensure_ascii=False) + "\n")
        return f"wrote {len(messages) // 2} turns to {file}"
    except OSError as error:
        return f"{line}: {error.strerror}"


def chat(model, tokenizer, prompt, args, write, follow):
    """Answers a prompt, or else each line of standard input, in the chat template; when the window is full, the oldest
    turns are not read any more."""
    messages, first, seed, window = [], 0, args.seed, model.config.max_position_embeddings
    if not prompt and sys.stdin is not None and sys.stdin.isatty():
        print(f"{model_name(args.model)}: a window of {window} tokens, answers of at most {args.max_new_tokens} "
              "(--max-new-tokens). /help lists what else there is, Ctrl-D ends.", file=sys.stderr)
    for line in [prompt] if prompt else lines():
        if line.startswith("/") and not prompt:
            if line.strip() == "/quit":
                return
            print(obey(line, messages), file=sys.stderr)
            first = min(first, len(messages))
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        forgotten, said, room = first, [], max(1, window - args.max_new_tokens)
        while (text := tokenizer.render(messages[first:])) and first < len(messages) - 1 and len(
                tokenizer.encode(text, special=True)) > room:
            first += 2
        if first and not forgotten:
            print(f"the window of {window} tokens is full: from now on the oldest turns are forgotten", file=sys.stderr)
        if first == len(messages) - 1 and (length := len(tokenizer.encode(text, special=True))) > window:
            print(f"this turn has {length} tokens, the window {window}: only its end is read", file=sys.stderr)
        stream = follow(continuations(model, tokenizer, text, 1, seed, write, **sampling(args)))
        try:
            if not speak(tokenizer, map(int, stream), said):
                print(f"[cut after {args.max_new_tokens} tokens: --max-new-tokens allows more]", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        messages.append({"role": "assistant", "content": "".join(said)})
        seed = None if seed is None else seed + 1


def open_model(path, device, native=True):
    """(model, tokenizer) of a directory; native: with kernels in C. Raises UserError if they do not belong together."""
    directory = whole(path)
    dtype = torch.float32 if device.type == "cpu" else None                    # a CPU is slow at 16 bits
    model = load(directory, device, dtype, finite=False)                       # see refuse_not_a_number
    return accelerate(model, native), tokenizer_of(model, directory)


def partner(flag, args, model):
    """(model, tokenizer) of the directory that --draft or --escalate names."""
    path = getattr(args, flag)
    if whole(path).resolve() == whole(args.model).resolve():
        raise UserError(f"--{flag} {path} is the model itself: give a {'smaller' if flag == 'draft' else 'larger'} one")
    return open_model(path, next(model.parameters()).device, is_accelerated(model))


def guesser(args, model, tokenizer):
    """The draft that --draft or --self-draft names; None for --lookup. Raises UserError if it does not fit."""
    last = model.config.num_hidden_layers
    if args.draft:
        draft, its = partner("draft", args, model)
        if its.hash != tokenizer.hash:
            raise UserError(f"--draft {args.draft} has another tokenizer than {args.model}, so its guesses mean "
                            "something else: give a model that was distilled or compressed from it")
        return draft
    if args.self_draft >= last:
        raise UserError(f"--self-draft {args.self_draft}: this model has {last} layers, and fewer must guess")
    if args.self_draft and args.self_draft not in model.exits:
        print(f"layer {args.self_draft} was not taught to guess (exits: {model.exits or 'none'}): python "
              f"distill.py {args.model} --exits {args.self_draft} --out DIR does that", file=sys.stderr)
    return first_layers(model, args.self_draft) if args.self_draft else None


def handover(args, model, tokenizer):
    """Sets up --escalate: (generate function, report function, takeover function).

    With a shared tokenizer the generate function switches models at a token, and the takeover function is None. With
    another one takeover() gives the large (model, tokenizer) if the answer should be written anew, else None.
    """
    counts, (big, big_tokenizer) = collections.Counter(), partner("escalate", args, model)
    same = big_tokenizer.hash == tokenizer.hash
    if not same and args.chat:
        raise UserError(f"--escalate {args.escalate} has another tokenizer, so it can only take over whole answers: "
                        "leave out --chat")
    write = functools.partial(cascade, big=big if same else None, margin=args.margin, counts=counts)

    def takeover():
        unsure = counts["lead"] < args.margin * counts["tokens"]
        return (big, big_tokenizer) if unsure else None

    def report():
        tokens = max(1, counts["tokens"])
        if same:
            return (f"{counts['escalated'] / tokens:.0%} of {tokens} tokens were handed over; for that the large model "
                    f"read {counts['read']}")
        return (f"the likeliest token leads by {counts['lead'] / tokens:.2f} in the mean: the answer is "
                f"{'handed over' if takeover() else 'kept'}")
    return write, report, None if same else takeover


def main(argv=None):
    args = sample_arguments(argv)
    if args.eval:
        from data.measure import evaluate_command                # here, as measure imports this script
        return evaluate_command(args)
    args.model = args.model[0]
    if args.file is not None:
        prompt = decoded(Path(args.file).read_bytes(), f"--file {args.file}")
    elif args.prompt is not None:
        prompt = args.prompt
    elif args.chat or sys.stdin is None or sys.stdin.isatty():
        prompt = ""
    else:
        prompt = decoded(sys.stdin.buffer.read(), "standard input").rstrip("\r\n")
    device = pick_device(args.device)
    model, tokenizer = open_model(args.model, device, args.native)
    threads = threads_for(model, args.threads, device)
    write, report, takeover = generate, str, None                # str() is nothing to say
    if args.escalate:
        write, report, takeover = handover(args, model, tokenizer)
    elif args.draft or args.self_draft or args.lookup:
        pace = Pace()
        write, report = functools.partial(speculate, draft=guesser(args, model, tokenizer), pace=pace), pace.__str__
    follow = threads.following if write is generate else iter    # speculation times its own steps
    if args.chat:
        chat(model, tokenizer, prompt, args, write, follow)
        return print(f"[{report()}]" if report() else "", file=sys.stderr)
    count, window = len(tokenizer.encode(prompt, special=True, bos=True)), model.config.max_position_embeddings
    if count > window:
        print(f"the prompt has {count} tokens, the window {window}: only the last {window} are read", file=sys.stderr)
    if not prompt:
        print("there is no prompt: a new document begins", file=sys.stderr)
    start, stamps, answer = time.perf_counter(), [], None
    if takeover:
        answer = list(continuations(model, tokenizer, prompt, 1, args.seed, write, **sampling(args)))
        if takeover():
            (model, tokenizer), answer, write = takeover(), None, generate

    def stream():
        for ids in answer or follow(continuations(model, tokenizer, prompt, args.samples, args.seed, write,
                                                  **sampling(args))):
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
