"""Runs a model without changing it: generate text, score text, measure one model beside another.

    python sample.py out --prompt "def read_file(path):"
    python sample.py out --prompt "import os" --samples 3 --temperature 0.8 --top-p 0.95
    echo "class Stack:" | python sample.py out --max-new-tokens 300 --seed 7
    python sample.py out --file notes.txt --temperature 0
    python sample.py out-faq --chat                        # a model trained on prompts and responses
    python sample.py out-exits --self-draft 1              # its first layer guesses, all layers check: the same text

Text goes to standard output as it is made; what was chosen and how fast it went goes to standard error.
"""
import codecs, collections, contextlib, copy, ctypes, dataclasses, functools, json, math, os, statistics, subprocess
import sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Parser, UserError, run
from data.tokenizer import Tokenizer
from model import KVCache, QuantLinear, kernels, load, whole


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

def next_token(logits, seen, generator=None, temperature=1.0, repetition_penalty=1.0, **sampling):
    """Draws one id per row, (B, 1), from logits (B, V); `seen` and `sampling` as in next_probs."""
    if temperature < 1e-5:
        return penalized(logits.float(), seen, repetition_penalty).argmax(-1, keepdim=True)
    probs = next_probs(logits, seen, temperature, repetition_penalty=repetition_penalty, **sampling)
    return torch.multinomial(probs, 1, generator=generator)


def penalized(logits, seen, penalty):
    """Positive logits of ids seen before divided by the penalty, negative ones multiplied (Keskar et al., 2019)."""
    if penalty == 1.0:
        return logits
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def next_probs(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities (B, V) of the next id; `seen` (B, n) are the ids so far, for the repetition penalty.

    temperature 0 takes the likeliest. top_k keeps the k likeliest ids, top_p the likeliest that together reach p
    (Holtzman et al., 2019), min_p those at least min_p times as likely as the first (Nguyen et al., 2024).
    """
    logits = penalized(logits.float(), seen, repetition_penalty)
    if temperature < 1e-5:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
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
    return logits.softmax(-1)


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


def first_layers(model, k):
    """The model that the first k layers are, with the same norm and head: an early exit. It shares all weights."""
    exit, body = copy.copy(model), copy.copy(model.model)
    exit._modules, body._modules = dict(exit._modules), dict(body._modules)
    exit.config = body.config = dataclasses.replace(model.config, num_hidden_layers=k)
    body.layers, exit.model = body.layers[:k], body
    return exit


@torch.inference_mode()
def speculate(model, draft, ids, max_new_tokens, stop=(), vocab_size=None, generator=None, counts=None, gamma=4,
              **sampling):
    """`generate` for one prompt, ids (1, T): `draft` guesses up to gamma tokens, and `model` reads them all at once.

    A guess x is taken with probability min(1, p(x) / q(x)), p the model's and q the draft's; the first that is not is
    drawn from max(0, p - q) instead. So tokens are distributed as the model's own, and at temperature 0 are its own
    (Leviathan et al., 2023; with the model's own first layers: LayerSkip, Elhoushi et al., 2024).
    counts  a Counter: "guessed" and "taken" are added up in it
    """
    device, window, seen = next(model.parameters()).device, model.config.max_position_embeddings, ids
    seen, n, end, counts = ids.to(device), ids.shape[1], ids.shape[1] + max_new_tokens, {} if counts is None else counts
    counts.setdefault("guessed", 0), counts.setdefault("taken", 0)

    def read(m, cache, text, count):
        """Probabilities of the id after each of the last `count` positions of a text: (count, V)."""
        logits = m.lm_head(m(text[:, start + cache.length:], cache=cache, head=False)[0, -count:]).float()
        logits[:, vocab_size or m.config.vocab_size:] = -math.inf
        return torch.cat([next_probs(row[None], text[:, :text.shape[1] - count + 1 + i], **sampling)
                          for i, row in enumerate(logits)])

    start, caches = max(0, n - window), None
    while n < end:
        if caches is None or n - start > window:                # full: the last half is read again, as in generate
            start = start if caches is None else n - max(1, window // 2)
            room = min(window, end - start)
            caches = [KVCache(m.config, 1, room, device, m.dtype) for m in (draft, model)]
        text, q = seen, []
        for _ in range(min(gamma, end - n - 1, window - (n - start))):
            q.append(read(draft, caches[0], text, 1))
            text = torch.cat((text, torch.multinomial(q[-1], 1, generator=generator)), dim=1)
        p, fresh = read(model, caches[1], text, len(q) + 1), []
        for i in range(len(q) + 1):
            x = text[0, n + i] if i < len(q) else None
            taken = i < len(q) and torch.rand((), generator=generator, device=device) * q[i][0, x] < p[i, x]
            if not taken:
                rest = (p[i] - q[i][0]).clamp(min=0) if i < len(q) else p[i]
                x = torch.multinomial(rest if rest.sum() > 0 else p[i], 1, generator=generator)[0]
            fresh.append(x)
            yield x[None]
            if int(x) in stop:
                return
            if not taken:
                break
        counts["guessed"], counts["taken"] = counts["guessed"] + len(q), counts["taken"] + len(fresh) - 1
        seen = torch.cat((seen, torch.stack(fresh)[None]), dim=1)
        n = seen.shape[1]
        for cache in caches:                                    # what was not taken is forgotten
            cache.length = min(cache.length, n - 1 - start)


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


def continuations(model, tokenizer, prompt, samples=1, seed=None, draft=None, **options):
    """Lists of new ids, one per sample, for a text. `options` as in generate (with a draft: speculate), next_probs."""
    ids = tokenizer.encode(prompt, special=True, bos=True) or [tokenizer.eos_id]     # nothing: the start of a document
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    batch = torch.tensor([ids], device=device).expand(samples, -1)
    write = generate if draft is None else functools.partial(speculate, draft=draft)
    return write(model, ids=batch, stop=tokenizer.eos_ids, vocab_size=tokenizer.vocab_size, generator=generator,
                 **options)


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
    nats, divergence, same = dict.fromkeys(models, 0.0), {name: [] for name in models}, dict.fromkeys(models, 0)
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
                divergence[name].append((base.exp() * (base - logp)).sum(-1).cpu())
                same[name] += int((logp.argmax(-1) == base.argmax(-1)).sum())
    result = {}
    for name in models:
        kl = torch.cat(divergence[name]) if tokens else torch.zeros(1)
        result[name] = {**figures(nats[name], tokens, n_bytes), "kl": float(kl.double().mean()),
                        "kl_p999": float(kl.kthvalue(math.ceil(0.999 * len(kl))).values),
                        "agreement": same[name] / max(1, tokens)}
    return result


def speed(models, prompt_tokens=256, new_tokens=64, batch_size=1, rounds=5, clock=time.perf_counter):
    """How fast each of `models` ({name: model}, the first is the baseline) goes through `generate`, likeliest token
    first, as a user's text does: {name: {...}}. The models take turns, `rounds` times after one turn to warm up, so
    that a slow moment of the machine meets all. Medians over the rounds; *_x are medians of each round's ratio to the
    baseline's.

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
            turn = one_turn(model, prompt_tokens, new_tokens, batch_size, clock)
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


def one_turn(model, prompt_tokens, new_tokens, batch_size, clock):
    """The Turn of one prompt: random ids, as no kernel here is faster for one text than for another."""
    device, vocab = next(model.parameters()).device, model.config.vocab_size
    prompt = torch.randint(vocab, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    counters = energy_counters(device)
    stamps, start = [clock()], None
    for new in generate(model, prompt, new_tokens + 1, temperature=0):
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


def peak_alone(directory, model, prompt_tokens=256, new_tokens=64, batch_size=1):
    """(peak bytes, of which were there before the model was loaded) of a fresh process that loads a directory as
    `model` was, device and dtype, and generates once: in one process the models would share one high-water mark.
    (None, None) if that failed or cannot be known."""
    settings = (str(Path(directory).resolve()), str(next(model.parameters()).device), str(model.dtype)[6:],
                torch.get_num_threads(), prompt_tokens, new_tokens, batch_size)
    code = f"import sample; print(sample.generate_alone(*{settings!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent, capture_output=True,
                          text=True, encoding="utf-8")
    try:
        before, peak = json.loads(done.stdout.splitlines()[-1])
        return peak, before
    except (IndexError, ValueError):
        return None, None


def generate_alone(directory, device, dtype, threads, prompt_tokens, new_tokens, batch_size):
    """In the process that peak_alone starts: JSON of [bytes before, bytes at the most]."""
    torch.set_num_threads(threads)
    device = torch.device(device)
    before = memory_peak(device)
    one_turn(load(directory, device, getattr(torch, dtype)), prompt_tokens, new_tokens, batch_size, time.perf_counter)
    return json.dumps([before, memory_peak(device)])


def how_quantized_layers_run(model):
    """Text: the arithmetic behind the figures of a model with quantized layers; None: it has none."""
    if not any(isinstance(m, QuantLinear) for m in model.modules()):
        return None
    on_cpu = next(model.parameters()).device.type == "cpu" and model.dtype == torch.float32
    return kernels()[1] if on_cpu else f"weights dequantized to {str(model.dtype)[6:]} at each use"


def measure(models, batches, token_bytes, directories=None, other_text=None, prompt_tokens=256, new_tokens=64,
            batch_size=1, rounds=5):
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
    speeds, rows = speed(models, prompt_tokens, new_tokens, batch_size, rounds), []
    quality = compare({n: m for n, m in models.items() if n not in other_text}, batches, token_bytes)
    for name, (its_batches, its_bytes) in other_text.items():
        alone = compare({name: models[name]}, its_batches, its_bytes)[name]
        quality[name] = {**alone, "kl": None, "kl_p999": None, "agreement": None}
    for name, model in models.items():
        parameters, resident, where = model.parameters_count(), model.resident_bytes(), directories.get(name)
        files = whole(where).glob("*.safetensors") if where else ()
        peak, empty = peak_alone(where, model, prompt_tokens, new_tokens, batch_size) if where else (None, None)
        device = next(model.parameters()).device
        rows.append({"name": name, "parameters": parameters,
                     "file_bytes": sum(f.stat().st_size for f in files) or None, "resident_bytes": resident,
                     "bits_per_weight": 8 * resident / parameters, "peak_bytes": peak, "empty_bytes": empty,
                     **quality[name], **speeds[name],
                     "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                     "dtype": str(model.dtype)[6:], "threads": torch.get_num_threads(),
                     "quantized_layers": how_quantized_layers_run(model), "prompt_tokens": prompt_tokens,
                     "new_tokens": new_tokens, "batch_size": batch_size, "rounds": rounds})
        model.train(training[name])
    return rows


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
    parser.add_argument("--self-draft", type=int, default=0, metavar="K", help="the first K layers guess, all of them "
                        "check: the same text; sooner where they guess well (distill.py --exits teaches them; 0: off)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="20 tokens only")
    args = parser.parse_args(argv)
    if args.seed is not None and not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed is {args.seed}; it must be at least 0 and below 2^63")
    if args.self_draft and (args.samples > 1 or args.chat):
        raise UserError("--self-draft is for one continuation: leave out --samples or --chat")
    if args.smoke:
        args.max_new_tokens = min(args.max_new_tokens, 20)
    for name, least, most in (("max_new_tokens", 1, None), ("samples", 1, None), ("temperature", 0, None),
                              ("self_draft", 0, None), ("top_k", 0, None), ("top_p", 1e-6, 1), ("min_p", 0, 1),
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
    options, counts, last = sampling(args), collections.Counter(), model.config.num_hidden_layers
    if args.self_draft:
        if args.self_draft >= last:
            raise UserError(f"--self-draft {args.self_draft}: this model has {last} layers, and fewer must guess")
        if args.self_draft not in model.exits:
            print(f"layer {args.self_draft} was not taught to guess (exits: {model.exits or 'none'}): python "
                  f"distill.py {args.model} --exits {args.self_draft} --out DIR does that", file=sys.stderr)
        options.update(draft=first_layers(model, args.self_draft), counts=counts)
    start, stamps = time.perf_counter(), []

    def stream():
        for ids in continuations(model, tokenizer, prompt, args.samples, args.seed, **options):
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
    if counts["guessed"]:
        decode += f"; of {counts['guessed']} guessed tokens {counts['taken'] / counts['guessed']:.0%} were taken"
    how = how_quantized_layers_run(model)
    print(f"\n[{len(stamps)} tokens; the first after {1000 * (stamps[0] - start):.0f} ms{decode}]" +
          (f"\n[quantized layers: {how}]" if how else ""), file=sys.stderr)


if __name__ == "__main__":
    run(main)
