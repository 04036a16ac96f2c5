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
import array, codecs, collections, contextlib, copy, ctypes, dataclasses, functools, json, math, os, re, statistics
import string, subprocess, sys, time
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.nn.functional as F

from data import Parser, UserError, replacing_file, run
from data.tokenizer import Tokenizer
from model import KVCache, QuantLinear, kernels, load, model_name, set_threads, whole


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


def pieces(tokenizer, ids, stop=()):
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
    for text in pieces(tokenizer, noted(), tokenizer.eos_ids):
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


class Threads:
    """The number of threads of a CPU with which steps, of training or a token each, are fastest now: while another
    program holds a core, two threads that wait for each other are slower than one alone.

    options  numbers to choose from, the largest first; a single one is never changed
    A trial runs the next steps with each option in turn. There is one when steps take twice as long as before, and now
    and then where fewer threads than the most are used.
    """
    STEPS, SECONDS, SLOW, AGAIN, MOST = 6, 0.005, 2.0, 60.0, 240.0   # of a trial; slower by; seconds between two trials

    def __init__(self, options, count=0):
        self.options, self.count = options, count if count in options else options[0]
        self.usual, self.wait, self.recent = math.inf, self.AGAIN, collections.deque(maxlen=20)
        self.trial, self.why, self.ended = None, "", time.perf_counter()

    def use(self, count):
        self.count = count
        set_threads(count)

    def start_trial(self, why=""):
        """Begins one, unless there is nothing to choose. why: the beginning of the sentence at its end, or "": it ends
        silently."""
        if len(self.options) > 1:
            self.why, self.before, self.trial = why, self.count, {n: [] for n in self.options}
            self.use(self.options[0])

    def note(self, seconds):
        """Notes how long a step took, and says with how many threads the next is made. Returns a sentence, or ""."""
        if self.trial is not None:
            return self.tried(seconds)
        self.recent.append(seconds)
        if len(self.options) == 1 or len(self.recent) < self.recent.maxlen:
            return ""
        mean = statistics.fmean(self.recent)
        self.usual = min(self.usual, mean)
        if mean > self.SLOW * self.usual:
            self.start_trial(f"{mean / self.usual:.1f} x slower than before, as if another program were busy")
        elif self.count < self.options[0] and time.perf_counter() - self.ended > self.wait:
            self.start_trial()
        return ""

    def tried(self, seconds):
        """`note` during a trial; the first step with another number of threads is not counted."""
        times = self.trial[self.count]
        times.append(seconds)
        if len(times) < self.STEPS or sum(times[1:]) < self.SECONDS:
            return ""
        rest = self.options[self.options.index(self.count) + 1:]
        if rest:
            self.use(rest[0])
            return ""
        means = {n: statistics.fmean(times[1:]) for n, times in self.trial.items()}
        self.use(min(means, key=means.get))
        self.wait = self.AGAIN if self.count != self.before else min(2 * self.wait, self.MOST)
        self.usual, self.trial, self.ended = means[self.count], None, time.perf_counter()
        self.recent.clear()
        return f"{self.why}: {threads_of(self.count)} from now on" if self.why else ""

    def following(self, stream):
        """The items of an iterator, each a step. The first time there is a trial at once."""
        start = None
        if math.isinf(self.usual):
            self.start_trial()
        for item in stream:
            if start is not None:                                # the first item waits for the prompt to be read
                self.note(time.perf_counter() - start)
            yield item
            start = time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# Measure: the one ruler. What a smaller model costs and gains beside the one it was made from

@torch.inference_mode()
def compare(models, batches, token_bytes):
    """How well each of `models` ({name: model}, the first is the baseline) predicts the same tokens, and how far it is
    from the baseline there: {name: `figures` and

    kl           mean over tokens of KL(baseline || model) in nats; kl_p999: what 99.9 % of the tokens do not exceed
    agreement    share of tokens where both find the same id the likeliest}

    The models share a tokenizer; rows of padding ids may differ, so distances are between the distributions over the
    len(token_bytes) real ids. Never holds more than 2^21 logits of a model.
    """
    device, ids = next(next(iter(models.values())).parameters()).device, len(token_bytes)
    token_bytes = torch.as_tensor(token_bytes, device=device)
    rows = max(1, 2 ** 21 // max(m.config.vocab_size for m in models.values()))
    # Numbers, not tensors: small tensors that are kept pin the memory of the logits that were freed beside them.
    nats, same = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    divergence = {name: array.array("f") for name in models}
    tokens = n_bytes = 0
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        learned = batch.targets >= 0
        targets = batch.targets[learned]                                                             # (N,)
        tokens, n_bytes = tokens + len(targets), n_bytes + int(token_bytes[targets].sum())
        hidden = {n: m(batch.ids, segments=batch.segments, head=False)[learned] for n, m in models.items()}  # (N, C)
        for i in range(0, len(targets), rows):
            base = None
            for name, model in models.items():
                logits = model.lm_head(hidden[name][i:i + rows]).float()                             # (rows, V)
                nats[name] += float(F.cross_entropy(logits, targets[i:i + rows], reduction="sum"))
                logp = logits[:, :ids].log_softmax(-1)
                base = logp if base is None else base
                divergence[name].extend((base.exp() * (base - logp)).sum(-1).tolist())
                same[name] += int((logp.argmax(-1) == base.argmax(-1)).sum())
    result = {}
    for name in models:
        kl = torch.frombuffer(divergence[name], dtype=torch.float32) if tokens else torch.zeros(1)
        result[name] = {**figures(nats[name], tokens, n_bytes), "kl": float(kl.double().mean()),
                        "kl_p999": float(kl.kthvalue(math.ceil(0.999 * len(kl))).values),
                        "agreement": same[name] / max(1, tokens)}
    return result


def speed(models, prompt_tokens=256, new_tokens=64, batch_size=1, rounds=5, clock=time.perf_counter, prompt=None,
          writers=None):
    """How fast each of `models` ({name: model}, the first is the baseline) goes through `generate`, or what `writers`
    ({name: function}) has instead, likeliest token first, as a user's text does: {name: {...}}. It continues `prompt`,
    ids (B, T), or random ones, as no kernel here is faster for one text than for another. The models take turns,
    `rounds` times after one turn to warm up, so that a slow moment of the machine meets all. Medians over the rounds;
    *_x are medians of each round's ratio to the baseline's.

    prefill_tokens_per_s    batch_size x prompt_tokens over the time to the first new token
    decode_tokens_per_s     batch_size x new_tokens over the time from there to the last; prefill has no part in it
    first_token_ms, token_p50_ms, token_p95_ms     the wait for the first token, and for each later one
    joules_per_token        of decoding, all the device drew in that time; None without a counter we may read
    prefill_rounds, decode_rounds                  tokens/s of each round, in order

    Raises UserError if prompt and new tokens exceed a window: what a full window costs is another question.
    """
    for name, model in models.items():
        window = model.config.max_position_embeddings
        if prompt_tokens + new_tokens > window:
            raise UserError(f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than {name}'s window of "
                            f"{window}: lower one of the two")
    taken = {name: [] for name in models}
    for i in range(1 + rounds):
        for name, model in models.items():
            ids = random_ids(model, batch_size, prompt_tokens) if prompt is None else prompt
            turn = one_turn((writers or {}).get(name, functools.partial(generate, model)), ids, new_tokens, clock)
            if i:
                taken[name].append(turn)
    result, median = {}, statistics.median
    for name, turns in taken.items():
        waits = sorted(wait for turn in turns for wait in turn.waits)
        rates = {"prefill": [batch_size * prompt_tokens / turn.first for turn in turns],
                 "decode": [batch_size * new_tokens / sum(turn.waits) for turn in turns]}
        joules = None if None in [turn.joules for turn in turns] else sum(turn.joules for turn in turns)
        row = {"first_token_ms": 1000 * median(turn.first for turn in turns), "token_p50_ms": 1000 * median(waits),
               "token_p95_ms": 1000 * waits[math.ceil(0.95 * len(waits)) - 1],
               "joules_per_token": None if joules is None else joules / (rounds * batch_size * new_tokens)}
        for phase, values in rates.items():
            row.update({f"{phase}_tokens_per_s": median(values), f"{phase}_rounds": values})
            base = next(iter(result.values()), row)[f"{phase}_rounds"]
            row[f"{phase}_x"] = median(mine / its for mine, its in zip(values, base))
        result[name] = row
    return result


Turn = collections.namedtuple("Turn", "first waits joules")      # seconds to the first token; to each later one, [...]


def random_ids(model, *shape):
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def one_turn(write, prompt, new_tokens, clock):
    """The Turn of one prompt, ids (B, T), continued by `write`."""
    counters = energy_counters(prompt.device)
    stamps, start = [clock()], None
    for new in write(prompt, new_tokens + 1, temperature=0):
        new.tolist()                                             # as a reader needs it: the device must have finished
        stamps.append(clock())
        if start is None:
            start = [read() for read, _, _ in counters]
    used = [(read() - before) % wraps for (read, wraps, _), before in zip(counters, start)]
    long_enough = stamps[-1] - stamps[1] >= max((seconds for _, _, seconds in counters), default=math.inf)
    return Turn(stamps[1] - stamps[0], [b - a for a, b in zip(stamps[1:], stamps[2:])],
                sum(used) if long_enough else None)


@functools.lru_cache
def energy_counters(device):
    """What counts the energy of a device, [(function that gives joules so far, joules at which it wraps, seconds below
    which it is too coarse), ...]; [] where there is none, or only root may read it. CPU: RAPL, whole packages (Linux).
    CUDA: NVML, the whole GPU; it moves every 0.1 s (https://docs.nvidia.com/deploy/nvml-api)."""
    try:
        if device.type == "cuda":
            nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
            handle, joules = ctypes.c_void_p(), ctypes.c_ulonglong()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

            def read():
                if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(joules)):
                    raise OSError("NVML has no energy counter for this GPU")
                return joules.value / 1000
            if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
                return []
            read()
            return [(read, math.inf, 1.0)]
        zones = [z for z in Path("/sys/class/powercap").glob("intel-rapl:*") if device.type == "cpu"
                 and (z / "name").read_text().startswith("package")]                     # AMD's are under that name too
        for zone in zones:
            (zone / "energy_uj").read_text()                                             # may we?
        return [(lambda z=z: int((z / "energy_uj").read_text()) / 1e6,
                 int((z / "max_energy_range_uj").read_text()) / 1e6, 0.1) for z in zones]
    except (OSError, AttributeError, ValueError):
        return []


def memory_peak(device):
    """The most memory of this process so far, in bytes: its resident set (CPU), or what torch allocated (CUDA). None
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):                           # not ru_maxrss: on Linux a child inherits its parent's
        status = Path("/proc/self/status").read_text() if device.type == "cpu" else ""
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def peak_alone(directory, model, prompt_tokens=256, new_tokens=64):
    """(peak bytes, of which were there before the model was loaded) of a fresh process that loads a directory as
    `model` was, device and dtype, and generates once: in one process the models would share one high-water mark.
    (None, None) if that failed or cannot be known."""
    settings = (str(Path(directory).resolve()), str(next(model.parameters()).device), str(model.dtype)[6:],
                torch.get_num_threads(), prompt_tokens, new_tokens)
    code = f"import sample; print(sample.generate_alone(*{settings!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent, capture_output=True,
                          text=True, encoding="utf-8")
    try:
        before, peak = json.loads(done.stdout.splitlines()[-1])
        return peak, before
    except (IndexError, ValueError):
        return None, None


def generate_alone(directory, device, dtype, threads, prompt_tokens, new_tokens):
    """In the process that peak_alone starts: JSON of [bytes before, bytes at the most]."""
    torch.set_num_threads(threads)
    device = torch.device(device)
    before = memory_peak(device)
    model = load(directory, device, getattr(torch, dtype), finite=False)       # to look would count as its memory
    one_turn(functools.partial(generate, model), random_ids(model, 1, prompt_tokens), new_tokens,
             time.perf_counter)
    return json.dumps([before, memory_peak(device)])


def how_quantized_layers_run(model):
    """Text: the arithmetic behind the figures of a model with quantized layers; None: it has none."""
    if not any(isinstance(m, QuantLinear) for m in model.modules()):
        return None
    on_cpu = next(model.parameters()).device.type == "cpu" and model.dtype == torch.float32
    return kernels()[1] if on_cpu else f"weights dequantized to {str(model.dtype)[6:]} at each use"


def measure(models, batches, token_bytes, directories=None, other_text=None, prompt_tokens=256, new_tokens=64,
            rounds=5):
    """The rows of every table of this project: one dict a model, size, quality and speed of the same loaded object.

    models        {name: model}, on their device; the first is the baseline the others are compared with
    batches, token_bytes     what is scored, see `score`
    directories   {name: where it was loaded from}, for the figures of files and of a process of its own
    other_text    {name: (batches, token_bytes)}: the same text for a model with another tokenizer than the baseline's,
                  of which only bits per byte can be compared. Its kl, kl_p999 and agreement are None

    A row holds name, `figures`, what `compare` and `speed` give, and
    parameters, resident_bytes, bits_per_weight     see Transformer; tied weights once, scales included
    file_bytes    of model.safetensors, or its shards; the tokenizer comes on top, the same for all
    peak_bytes, empty_bytes    most memory of a fresh process that loads this model and generates, and what of it Python
                  and torch have without any (see peak_alone)
    device, dtype, threads, quantized_layers (how they multiply), prompt_tokens, new_tokens, batch_size, rounds
    None stands for what could not be measured, never for an estimate.
    """
    directories, other_text = directories or {}, other_text or {}
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    speeds, rows = speed(models, prompt_tokens, new_tokens, rounds=rounds), []
    quality = compare({n: m for n, m in models.items() if n not in other_text}, batches, token_bytes)
    for name, (its_batches, its_bytes) in other_text.items():
        alone = compare({name: models[name]}, its_batches, its_bytes)[name]
        quality[name] = {**alone, "kl": None, "kl_p999": None, "agreement": None}
    for name, model in models.items():
        parameters, resident, where = model.parameters_count(), model.resident_bytes(), directories.get(name)
        files = whole(where).glob("*.safetensors") if where else ()
        peak, empty = peak_alone(where, model, prompt_tokens, new_tokens) if where else (None, None)
        device = next(model.parameters()).device
        rows.append({"name": name, "parameters": parameters,
                     "file_bytes": sum(f.stat().st_size for f in files) or None, "resident_bytes": resident,
                     "bits_per_weight": 8 * resident / parameters, "peak_bytes": peak, "empty_bytes": empty,
                     **quality[name], **speeds[name],
                     "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                     "dtype": str(model.dtype)[6:], "threads": torch.get_num_threads(),
                     "quantized_layers": how_quantized_layers_run(model), "prompt_tokens": prompt_tokens,
                     "new_tokens": new_tokens, "batch_size": 1, "rounds": rounds})
        model.train(training[name])
    return rows


def leads(model, batch):
    """`lead` at each position of a batch, (B, T); infinite where there is nothing to be predicted."""
    return at_positions(model, batch, lambda logits, targets: lead(logits).where(targets >= 0, math.inf))


def margin_for(share, sure):
    """The margin by which `cascade` hands over this share (0 to 1) of tokens, whose leads are `sure`."""
    found = sure[sure < math.inf].sort().values
    return float(found[min(int(share * len(found)), len(found) - 1)])


def cascade_curve(small, big, batches, token_bytes, shares):
    """What `cascade` makes of a text if it hands over a share of its tokens: for each of `shares` a dict, `figures` and

    share, margin     handed over, and the margin that does it
    big_reads         share of the tokens that the big model reads: in each window up to the last one handed over. A
                      cascade saves passes of the big model, and thus time, but hardly any multiplications
    multiplications   per token: matrices of the small model, and those of the big one for what it reads
    """
    device, token_bytes = next(small.parameters()).device, torch.as_tensor(token_bytes)
    kept = [array.array(code) for code in "fffq"]                # numbers, not tensors: see `compare`
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        for numbers, t in zip(kept, (leads(small, batch), token_losses(small, batch), token_losses(big, batch),
                                     batch.targets)):
            numbers.extend(t.flatten().tolist())
    sure, nats, its, targets = (                                 # (windows, T) each
        torch.frombuffer(numbers, dtype=kind).view(-1, batch.targets.shape[1])
        for numbers, kind in zip(kept, (*[torch.float32] * 3, torch.int64)))
    learned, result = targets >= 0, []
    n_bytes = token_bytes[targets[learned]].sum()
    for share in shares:
        over = sure < (margin := margin_for(share, sure))
        reads = float((over * torch.arange(1, over.shape[1] + 1)).amax(1).sum() / over.numel())
        result.append({"share": share, "margin": margin, "big_reads": reads,
                       "multiplications": small.matmul_parameters() + reads * big.matmul_parameters(),
                       **figures(torch.where(over, its, nats).double().sum(), learned.sum(), n_bytes)})
    return result


def cascade_rows(models, rows, batches, token_bytes, shares=(0.1, 0.25, 0.5)):
    """Rows for `table` of the first two of `models` in a cascade, beside those that `measure` gave. What is timed goes
    on from the beginning of the text that is scored, and hands over another share: see "note"."""
    base, its = list(models)[:2], dict(zip(models, rows))
    small, big = sorted(base, key=lambda name: models[name].matmul_parameters())
    curve = cascade_curve(models[small], models[big], batches, token_bytes, shares)
    names = [f"{small} + {big} {point['share']:.0%}" for point in curve]
    counts = {name: collections.Counter() for name in names}
    writers = {name: functools.partial(cascade, models[small], models[big], margin=point["margin"], counts=counts[name])
               for name, point in zip(names, curve)}
    first = its[base[0]]
    prompt = batches[0].ids[:1, :first["prompt_tokens"]].to(next(models[small].parameters()).device)
    speeds = speed({base[0]: models[base[0]], **dict.fromkeys(names, models[small])}, prompt.shape[1],
                   first["new_tokens"], 1, first["rounds"], prompt=prompt, writers=writers)
    both = {key: its[small][key] + its[big][key] for key in ("parameters", "file_bytes", "resident_bytes", "sha256")
            if its[small].get(key) and its[big].get(key)}
    unknown = dict.fromkeys(("peak_bytes", "empty_bytes", "kl", "kl_p999", "agreement", "quantized_layers"))
    return [{**first, **both, **unknown, "bits_per_weight": 8 * both["resident_bytes"] / both["parameters"], **point,
             **speeds[name], "name": name, "note": f"handed over while timed: "
             f"{counts[name]['escalated'] / counts[name]['tokens']:.0%}"}
            for name, point in zip(names, curve)]


def table(rows):
    """Rows of `measure` as three Markdown tables, size, quality, speed, and the conditions they hold under."""
    base, mb = rows[0], lambda n: None if n is None else n / 1e6

    def cell(form, value, more=""):
        return "n/a" if value is None else form.format(value) + more

    def rate(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    def times(row, key):
        return f" ({row[key] / base[key]:.2f} x)" if row[key] and base[key] and row is not base else ""

    def markdown(columns):                                       # {heading: function of a row that gives a cell}
        lines = [["model", *columns], *([row["name"], *(make(row) for make in columns.values())] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
        return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
                         for line in lines)

    size = {"parameters": lambda r: f"{r['parameters']:,}",
            "file, MB": lambda r: cell("{:,.2f}", mb(r["file_bytes"]), times(r, "file_bytes")),
            "in memory, MB": lambda r: cell("{:,.2f}", mb(r["resident_bytes"]), times(r, "resident_bytes")),
            "bits per weight": lambda r: f"{r['bits_per_weight']:.2f}",
            "process peak, MB": lambda r: cell("{:,.0f}", mb(r["peak_bytes"]),
                                                             f" ({mb(r['empty_bytes'] or 0):,.0f})")}
    quality = {"bits per byte": lambda r: f"{r['bits_per_byte']:.4f}" + ("" if r is base else
               f" ({r['bits_per_byte'] / base['bits_per_byte'] - 1:+.2%})" if base["bits_per_byte"] else ""),
               "loss": lambda r: f"{r['loss']:.4f}", "perplexity": lambda r: f"{r['perplexity']:,.2f}",
               "mean KL": lambda r: "" if r is base else cell("{:.5f}", r["kl"]),
               "99.9 % KL": lambda r: "" if r is base else cell("{:.4f}", r["kl_p999"]),
               "same first choice": lambda r: "" if r is base else cell("{:.2%}", r["agreement"])}
    fast = {f"{phase}, tokens/s": lambda r, p=phase: rate(r[f"{p}_tokens_per_s"]) +
            ("" if r is base else f" ({r[f'{p}_x']:.2f} x)") for phase in ("prefill", "decode")}
    fast |= {"first token, ms": lambda r: f"{r['first_token_ms']:.1f}",
             "later, p50 / p95, ms": lambda r: f"{r['token_p50_ms']:.2f} / {r['token_p95_ms']:.2f}",
             "joules per token": lambda r: cell("{:.3f}", r["joules_per_token"])}
    if any("note" in row for row in rows):
        fast["note"] = lambda r: r.get("note", "")
    threads = f" with {base['threads']} thread(s)" if base["device"] == "cpu" else ""
    conditions = (
        f"Scored: {base['tokens']:,} tokens, {base['bytes']:,} bytes of text. Speed: batch {base['batch_size']}, "
        f"a prompt of {base['prompt_tokens']} tokens, {base['new_tokens']} new ones, on {base['device']}{threads}, "
        f"{base['dtype']}; medians of {base['rounds']} rounds in which the models took turns; x is the median of the "
        "rounds' ratios. Process peak: of a fresh process that loads the model and generates; (of it before loading).")
    how = sorted({row["quantized_layers"] for row in rows} - {None})
    if how:
        conditions += f" Quantized layers: {'; '.join(how)}."
    return "\n\n".join([*map(markdown, (size, quality, fast)), conditions])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: held-out prompts. How well a model predicts their responses, and what it answers

def response_loss(model, tokenizer, prompt, response, token_bytes):
    """[nats, tokens, bytes] of a response and its end, given the prompt in the chat template; see `score`. What is
    longer than the window is read in pieces, each behind half a window."""
    from data.loader import Windows                              # here: to run a model needs no data
    from data.prepare import encode_example
    ids, mask = encode_example(tokenizer, prompt, response)
    windows = Windows.of([(ids, mask)], min(model.config.max_position_embeddings, len(ids) - 1))
    batches = (batch._replace(segments=None) for batch in windows.evaluation_batches(8))       # a piece a window
    return score(model, batches, token_bytes).tolist()


def words_of(text):
    """The words of a text as SQuAD compares them (Rajpurkar et al., 2016): lower case, no punctuation, no articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer, response):
    """The harmonic mean of what share of the answer's words are the response's, and of the response's the answer's."""
    answer, response = words_of(answer), words_of(response)
    same = sum((collections.Counter(answer) & collections.Counter(response)).values())
    return 2 * same / (len(answer) + len(response)) if same else float(answer == response)


def evaluate(model, tokenizer, lines, answered, max_new_tokens, name=""):
    """What a model makes of heldout.Lines, a dict each: nats, tokens and bytes of the response; with choices `chosen`,
    whether it has the fewest bits per byte of them; for the line numbers in `answered` the greedy answer, its f1 and
    whether it is exact, both by words_of."""
    from tqdm import tqdm
    rows, token_bytes, unread = [], tokenizer.token_bytes(), 0
    for i, line in enumerate(tqdm(lines, desc=name, unit="line", disable=None, leave=False)):
        losses = {text: response_loss(model, tokenizer, line.prompt, text, token_bytes)
                  for text in dict.fromkeys((line.response, *line.choices))}
        refuse_not_a_number(list(losses.values()))
        nats, tokens, size = losses[line.response]
        row = {"nats": nats, "tokens": int(tokens), "bytes": int(size)}
        if line.choices:
            bits = {text: its_nats / max(1, its_bytes) for text, (its_nats, _, its_bytes) in losses.items()}
            row["chosen"] = min(line.choices, key=bits.get) == line.response
        prompt = tokenizer.render([{"role": "user", "content": line.prompt}])
        unread += len(tokenizer.encode(prompt, special=True)) > model.config.max_position_embeddings
        if i in answered:
            stream = map(int, continuations(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=0))
            answer = "".join(pieces(tokenizer, stream, tokenizer.eos_ids)).strip()
            row.update(answer=answer, f1=token_f1(answer, line.response),
                       exact=words_of(answer) == words_of(line.response))
        rows.append(row)
    if unread:
        print(f"{unread:,} prompts exceed {name}'s window of {model.config.max_position_embeddings} tokens: only their "
              "end is read", file=sys.stderr)
    return rows


def interval(statistic, n, resamples=1000):
    """The 95 % interval of statistic(line numbers (n,)) over n lines drawn with replacement (Efron, 1979). Models are
    compared on the same lines each time, so it is paired."""
    generator = torch.Generator().manual_seed(0)
    values = [float(statistic(torch.randint(n, (n,), generator=generator))) for _ in range(resamples)]
    return torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()


def evaluation_table(results, groups):
    """Markdown of what `evaluate` gave, {name: rows}; the first is what the others are compared with. groups: {name:
    line numbers}. In brackets 95 % intervals of the difference."""
    base = next(iter(results))

    def column(name, chosen, key):
        return torch.tensor([float(results[name][i][key]) for i in chosen], dtype=torch.float64)

    def difference(name, chosen, key, form, scale=100, relative=False):
        if name == base or not chosen:
            return ""
        ours, theirs = column(name, chosen, key), column(base, chosen, key)
        both = lambda at: ours[at].sum() / theirs[at].sum() - 1 if relative else (ours[at] - theirs[at]).mean()
        low, high = interval(both, len(chosen))
        middle = f"{scale * both(torch.arange(len(chosen))):{form}} % " if relative else ""
        return f"{middle}({scale * low:{form}} ... {scale * high:{form}})"

    def cells(name, group):
        rows, its = results[name], groups[group]
        with_choices, answered = ([i for i in its if key in rows[i]] for key in ("chosen", "f1"))
        spans = [rows[i]["spans"] for i in answered if "spans" in rows[i]]
        share = lambda chosen, key: f"{column(name, chosen, key).mean():.1%}" if chosen else "n/a"
        return [group, name, f"{len(its):,}",
                f"{column(name, its, 'nats').sum() / math.log(2) / max(1, column(name, its, 'bytes').sum()):.4f}",
                difference(name, its, "nats", "+.1f", relative=True),
                f"{column(name, answered, 'f1').mean():.3f} {difference(name, answered, 'f1', '+.3f', 1)}".rstrip()
                if answered else "n/a", share(answered, "exact"),
                f"{share(with_choices, 'chosen')} {difference(name, with_choices, 'chosen', '+.1f')}".rstrip(),
                f"{sum(s for s, _ in spans) / max(1, sum(n for _, n in spans)):.1%}" if spans else "n/a"]
    head = ["group", "model", "lines", "bits per byte", f"to {base}", "token-F1", "exact match", "right choice",
            "verbatim"]
    lines = [head, ["---", "---", *["---:"] * 7], *(cells(name, group) for group in groups for name in results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_answers(path):
    """Whether the first line of a file is one that --eval --out writes."""
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        return {"model", "nats", "bytes"} <= set(json.loads(file.readline(1 << 24)))
    return False


def evaluate_command(args):
    """--eval: prints the table; with --out writes a line for each model and prompt."""
    from data import heldout                                     # here: to run a model needs no data
    from data.prepare import find
    directories, text, is_file = named(args.model, "--eval"), None, args.eval.endswith(".jsonl")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a directory: give the name of a file")
    if args.out and Path(args.out).exists() and not args.overwrite:
        raise UserError(f"--out {args.out} is there already: give another name or --overwrite")
    if args.out and Path(args.out).exists() and not is_answers(args.out):
        raise UserError(f"--out {args.out} is not a file that --eval wrote, so --overwrite does not replace it: give "
                        "another name")
    if args.data and not is_file:
        raise UserError(f"--eval {args.eval} is prepared data, with its own training text: leave out --data")
    flag, wanted = ("--data", args.data) if args.data else ("--eval", args.eval)
    directory = find(wanted, args.smoke, flag) if args.data or not is_file else None
    if directory is None and (args.data or not is_file):
        raise UserError(f"{flag} {wanted} is not prepared yet: python data/prepare.py {wanted}")
    lines = heldout.read(args.eval if is_file else directory / "val.jsonl")
    lines = lines[:8 if args.smoke else None]
    groups = {"all": list(range(len(lines)))}
    if directory:
        text = functools.partial(heldout.training_text, directory, Tokenizer.load(directory))
        shares = heldout.overlap(lines, text())
        labels = list(map(heldout.group, shares))
        groups |= {f"overlap {group}": [i for i, its in enumerate(labels) if its == group] for group in heldout.GROUPS}
    if args.by:
        lacking = next((line for line in lines if args.by not in line.fields), None)
        if lacking:
            raise UserError(f"{lacking.place}: it has no field {args.by!r}, which --by names")
        values = [str(line.fields[args.by]) for line in lines]
        groups |= {f"{args.by} {v}": [i for i, its in enumerate(values) if its == v] for v in sorted(set(values))}
    count = min(args.answers, len(lines))
    answered = {i * len(lines) // count for i in range(count)}                    # spread over the file
    device, results = pick_device(args.device), {}
    threads_for(args.threads or torch.get_num_threads(), device)
    for name, directory in directories.items():
        start, (model, tokenizer) = time.perf_counter(), open_model(directory, device)
        results[name] = evaluate(model, tokenizer, lines, answered, args.max_new_tokens, name)
        print(f"[{name}: {len(lines):,} responses scored, {count} prompts answered in "
              f"{time.perf_counter() - start:.0f} s]", file=sys.stderr)
    for rows in results.values() if text else ():
        spans = heldout.verbatim([rows[i]["answer"] for i in sorted(answered)], text())
        for i, its in zip(sorted(answered), spans):
            rows[i]["spans"] = its
    print(evaluation_table(results, {name: its for name, its in groups.items() if its}))
    print(f"\nBits per byte of {len(lines):,} responses given their prompts, in each model's chat template; token-F1 "
          f"and exact match of {count} greedy answers of at most {args.max_new_tokens} tokens; in brackets 95 % "
          "intervals of the difference (paired bootstrap over lines)." + (
              " Overlap: the share of a response's 8-word spans that stand in the training text; verbatim: of an "
              "answer's 50-byte spans." if text else ""))
    if args.out:
        with replacing_file(Path(args.out)) as new, open(new, "w", encoding="utf-8", newline="\n") as file:
            for name, rows in results.items():
                for i, (line, row) in enumerate(zip(lines, rows)):
                    more = {"overlap": round(shares[i], 4)} if text else {}
                    file.write(json.dumps({**line.fields, "model": name, **more, **row}) + "\n")
        print(f"wrote {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# The command

def arguments(argv):
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
    group.add_argument("--margin", metavar="M", default="20%", help="unsure: the likeliest token leads the second by "
                       "less than this in probability; as SHARE%%: by what hands over this share of held-out text "
                       "(default: 20%%)")
    group.add_argument("--calibrate", metavar="FILE", help="that text (default: the validation split of what the model "
                       "was trained on)")
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
    if not args.escalate and (args.margin != "20%" or args.calibrate):
        raise UserError(f"--{'calibrate' if args.calibrate else 'margin'} says when a larger model helps: it needs "
                        "--escalate BIG_DIR")
    text, args.share, args.margin = args.margin, args.margin.endswith("%"), math.nan
    with contextlib.suppress(ValueError):
        args.margin = float(text.removesuffix("%")) / (100 if args.share else 1)
    if not 0 < args.margin < 1:
        raise UserError(f"--margin is {text}; it must be a probability between 0 and 1, or a share such as 20%")
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


def threads_of(n):
    return f"{n} thread{'s' * (n > 1)}"


def halvings(n):
    """n, n / 2, n / 4, ... 1."""
    return [n >> i for i in range(n.bit_length())]


def threads_for(count, device):
    """Threads for generation: `count`; 0: what is fastest, where the kernels compute the same bits with any number."""
    most = torch.get_num_threads()
    follow = not count and device.type == "cpu" and kernels()[0] is not None
    threads = Threads(halvings(most) if follow else [count or most])
    if device.type == "cpu":
        threads.use(threads.count)
    return threads


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


def named(paths, flag):
    """{name: model directory}: the directories' names, or the paths as typed if two share one."""
    names = [model_name(path) for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{flag} {twice}: it is named twice")
    return dict(zip(names, map(whole, paths)))


def tokenizer_of(model, directory):
    """The tokenizer in the model's directory. Raises UserError if they do not belong together."""
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model only "
                        f"{model.config.vocab_size}: they do not belong together")
    return tokenizer


def open_model(path, device):
    """(model, tokenizer) of a directory. Raises UserError if they do not belong together."""
    directory = whole(path)
    dtype = torch.float32 if device.type == "cpu" else None                    # a CPU is slow at 16 bits
    model = load(directory, device, dtype, finite=False)                       # see refuse_not_a_number
    return model, tokenizer_of(model, directory)


def partner(flag, args, model):
    """(model, tokenizer) of the directory that --draft or --escalate names."""
    path = getattr(args, flag)
    if whole(path).resolve() == whole(args.model).resolve():
        raise UserError(f"--{flag} {path} is the model itself: give a {'smaller' if flag == 'draft' else 'larger'} one")
    return open_model(path, next(model.parameters()).device)


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


def held_out(args, model, tokenizer):
    """Batches of about 16,384 tokens that the model was not trained on: of --calibrate FILE, or of the validation split
    that its history names. Raises UserError if there are none."""
    from data.loader import Batch, Windows                       # here: to run a model needs no prepared data
    from data.prepare import find
    device, context = next(model.parameters()).device, min(512, model.config.max_position_embeddings)
    if args.calibrate:
        text = decoded(Path(args.calibrate).read_bytes(), f"--calibrate {args.calibrate}")
        ids = torch.tensor(tokenizer.encode(text)[:2 ** 14])
        if len(ids) < 100:
            raise UserError(f"--calibrate {args.calibrate} has {len(ids)} tokens: a share of so few says nothing")
        context = min(context, len(ids))
        batches = [Batch(rows, rows, None) for rows in ids[:len(ids) // context * context].view(-1, context).split(8)]
    else:
        made, batches = next((e for e in reversed(model.history) if "data_sha256" in e), None), []
        for its_slice in (args.smoke, not args.smoke) if made else ():
            with contextlib.suppress(UserError):
                split = (place := find(made["data"], its_slice)) and Windows(place, "val", context)
                its = split and (split.meta["sha256"], split.meta["tokenizer_hash"])
                if its == (made["data_sha256"], tokenizer.hash):
                    batches = batches or split.evaluation_batches(8, 2 ** 14)
    batches = [Batch(*(None if t is None else t.to(device) for t in batch)) for batch in batches]
    if not batches:
        raise UserError(f"--margin {args.margin:.0%} is a share of held-out text, and the validation split of what the "
                        "model was trained on is not under data/: give --calibrate FILE, or a number below 1")
    return batches


def handover(args, model, tokenizer):
    """--escalate: what writes instead of `generate`, a function of what there is to say of it afterwards, and None, or
    for a large model with another tokenizer a function of who takes over the answer: (model, tokenizer) or None."""
    counts, (big, its) = collections.Counter(), partner("escalate", args, model)
    same = its.hash == tokenizer.hash
    if not same and (args.share or args.chat):
        way_out = "leave out --chat" if args.chat else "give --margin as a number below 1, for an answer's mean lead"
        raise UserError(f"--escalate {args.escalate} has another tokenizer, so it can only take over whole answers: "
                        + way_out)
    if args.share:
        sure = torch.cat([leads(model, batch) for batch in held_out(args, model, tokenizer)])
        share, args.margin = args.margin, margin_for(args.margin, sure)
        print(f"margin {args.margin:.3f}: it hands over {share:.0%} of held-out text", file=sys.stderr)
    write = functools.partial(cascade, big=big if same else None, margin=args.margin, counts=counts)

    def judge():
        return (big, its) if counts["lead"] < args.margin * counts["tokens"] else None

    def report():
        tokens = max(1, counts["tokens"])
        if same:
            return (f"{counts['escalated'] / tokens:.0%} of {tokens} tokens were handed over; for that the large model "
                    f"read {counts['read']}")
        return (f"the likeliest token leads by {counts['lead'] / tokens:.2f} in the mean: the answer is "
                f"{'handed over' if judge() else 'kept'}")
    return write, report, None if same else judge


def main(argv=None):
    args = arguments(argv)
    if args.eval:
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
    model, tokenizer = open_model(args.model, device)
    threads = threads_for(args.threads, device)
    write, report, judge = generate, str, None                   # str() is nothing to say
    if args.escalate:
        write, report, judge = handover(args, model, tokenizer)
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
    if judge:
        answer = list(continuations(model, tokenizer, prompt, 1, args.seed, write, **sampling(args)))
        if judge():
            (model, tokenizer), answer, write = judge(), None, generate

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
            print(f"--- sample {i + 1}\n{prompt}{''.join(pieces(tokenizer, ids, tokenizer.eos_ids))}")
    decode, how = "", how_quantized_layers_run(model)
    if len(stamps) > 1 and not answer:
        decode = f", then {args.samples * (len(stamps) - 1) / (stamps[-1] - stamps[0]):.0f} tokens/s" + (
            f" with {threads_of(threads.count)}" if device.type == "cpu" else "")
    print(f"\n[{len(stamps)} tokens; the first after {1000 * (stamps[0] - start):.0f} ms{decode}]", file=sys.stderr)
    for more in filter(None, (report(), how and f"quantized layers: {how}")):
        print(f"[{more}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
