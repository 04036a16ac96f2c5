"""Training beside nanoGPT: time to its loss; speed and memory of larger shapes; and which size suits how many minutes.

    python tests/bench_train.py race --nanogpt CHECKOUT --corpus FILE            # about 5 minutes a seed, on one core
    python tests/bench_train.py race --corpus FILE --ablation 450                # each ingredient left out, 450 steps
    python tests/bench_train.py throughput --nanogpt CHECKOUT --shapes 30M 124M --context 512 1024 --batch 1
    python tests/bench_train.py scale --minutes 1 5 --threads 2 --shapes 64x4 96x4 128x4 --out out-scale
    python tests/bench_train.py epochs --data NAME --readings 2 5 16 --recipes all none --out out-epochs

race: nanoGPT's CPU example (its README: 4 layers of width 128, context 64, 2,000 iterations) by its own command,
characters as ids, and train.py with RACE below, bytes as ids, in turns on the same cores, on the first 90 % of an ASCII
file. One function scores both on the rest. Times are of training alone: no evaluation, no saving, on either side.
throughput: forward, backward, clipping and optimizer at one shape, each side in its own process, in turns.
scale: train.py for fixed times on each shape. Runs are kept in --out and not run again; all that are there count, but
those longer than --fit-minutes are not fitted: there the fitted value is a prediction.
epochs: train.py on little text that it reads several times: with what train.py does then by itself (all), with nothing
of it (none), without one part of it, or with flags of your own in quotes. `bench_figures.py readings` draws the runs.
"""
import collections, contextlib, functools, importlib.util, io, itertools, json, math, os, pickle, re, shutil
import statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

import train
from data import UserError
from data.console import Parser, run
from data.files import read_json
from data.loader import IGNORE, Batch, Windows
from data.machine import Machine, in_dtype, matmul_rate, pick_device, synchronize
from data.speed import memory_peak
from data.prepare import find, prepare
from data.log import read_log
from data.runs import read_state
from model import Config, Transformer, load

CONTEXT = 64
# Our side of the race, as flags of train.py. With 259 ids (bytes and three special tokens) and a head of its own, this
# MLP makes as many parameters as nanoGPT has with the 65 characters of Shakespeare.
RACE = dict(layers=4, width=128, heads=4, ffn=304, context=CONTEXT, batch_size=12, evals=1, eval_tokens=0, device="cpu",
            dtype="float32", matrix_lr=0.045, newton_schulz=5, decay=0.9, warmup=5, beta2=0.95)
NANOGPT = dict(device="cpu", compile=False, eval_iters=1, log_interval=1, block_size=CONTEXT, batch_size=12, n_layer=4,
               n_head=4, n_embd=128, dropout=0.0, always_save_checkpoint=True, out_dir="out")
SHAPES = {"30M": (6, 384, 6), "124M": (12, 768, 12)}            # throughput's: layers, width, heads
VOCAB = 50304                                                   # its ids: GPT-2's, padded as nanoGPT does; tied

Run = collections.namedtuple("Run", "steps seconds loss tokens_per_second")


@torch.inference_mode()
def score(logits_of, ids, context=CONTEXT, rows=256):
    """Mean -log p, in nats, of each of ids (n,) but the first, once, in windows of `context` from 0 on.
    logits_of(ids (B, T)) gives logits (B, T, V), and looks at nothing that follows."""
    ids, n, nats = torch.as_tensor(ids, dtype=torch.long), len(ids) - 1, 0.0
    batches = lambda part, end: F.pad(part, (0, -n % context), value=end).view(-1, context).split(rows)
    for x, targets in zip(batches(ids[:-1], 0), batches(ids[1:], IGNORE)):         # (rows, context) each
        nats += F.cross_entropy(logits_of(x).flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
    return nats / n


def read_corpus(path):
    """{"train": bytes, "val": bytes} of an ASCII file. Raises UserError if it cannot be raced on."""
    if not path:
        raise UserError("race needs --corpus FILE, an ASCII text")
    text, least = Path(path).read_bytes(), 10 * 20 * CONTEXT
    if not text.isascii():
        raise UserError(f"--corpus {path} is not ASCII: nanoGPT reads characters and train.py bytes, and only in ASCII "
                        "are they the same")
    if len(text) < least:
        raise UserError(f"--corpus {path} has {len(text):,} bytes, but the race needs {least:,}: the tenth for "
                        f"validation must hold 20 windows of {CONTEXT}")
    return {"train": text[:int(0.9 * len(text))], "val": text[int(0.9 * len(text)):]}


def command(cwd, *line, **settings):
    """What a Python script prints; settings become our flags (None: left out). Raises UserError if it fails."""
    flags = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in settings.items() if v is not None]
    done = subprocess.run([sys.executable, *map(str, line), *flags], cwd=cwd, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{Path(line[0]).name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def nanogpt(checkout, **config):
    """(a model of nanoGPT's model.py, its multiplications and additions as Transformer.flops_per_token counts them)."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**config))
    L, C, T = config["n_layer"], config["n_embd"], config["block_size"]
    return model, 2 * (12 * L * C ** 2 + config["vocab_size"] * C) + 2 * L * C * (T + 1)


class NanoGPT:
    """The opponent, in a copy of its checkout."""
    def __init__(self, work, checkout, corpus):
        self.copy, chars = work / "nanogpt", sorted({*corpus["train"], *corpus["val"]})
        shutil.copytree(checkout, self.copy, ignore=shutil.ignore_patterns(".git"))
        data, ids = self.copy / "data/shakespeare_char", np.zeros(128, np.uint16)
        ids[chars] = range(len(chars))                                  # as its data/shakespeare_char/prepare.py does
        for split, text in corpus.items():
            ids[np.frombuffer(text, np.uint8)].tofile(data / f"{split}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars)}))
        self.val = ids[np.frombuffer(corpus["val"], np.uint8)].astype(int)

    def train(self, iterations, seed):
        script, source = self.copy / "train-seeded.py", (self.copy / "train.py").read_text(encoding="utf-8")
        script.write_text(source.replace("1337 + seed_offset", f"{1337 + seed} + seed_offset"), encoding="utf-8")
        lengths = dict.fromkeys(("max_iters", "lr_decay_iters", "eval_interval"), iterations)
        settings = {**NANOGPT, **lengths, "warmup_iters": iterations // 20}      # its config's 100 at 2,000
        printed = command(self.copy, script, "config/train_shakespeare_char.py",
                          *(f"--{k}={v}" for k, v in settings.items()))
        ms = [float(t) for t in re.findall(r"^iter \d+: .* time ([\d.]+)ms", printed, re.M)]
        # Iteration 0 holds an evaluation; the one after the last another, the save, and a step that is not saved.
        seconds = (sum(ms[1:iterations]) + statistics.median(ms)) / 1000
        saved = torch.load(self.copy / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
        model, self.flops = nanogpt(self.copy, **saved["model_args"])
        model.eval().load_state_dict(saved["model"])
        self.parameters = sum(p.numel() for p in model.parameters())
        loss = score(lambda x: model(x, x)[0], self.val)                # given targets, it has logits everywhere
        return Run(iterations, seconds, loss, iterations * NANOGPT["batch_size"] * CONTEXT / seconds)


class Ours:
    def __init__(self, work, corpus):
        self.work, self.val = work, np.frombuffer(corpus["val"], np.uint8).astype(int)            # an id is its byte
        for split, text in corpus.items():
            (work / f"{split}.txt").write_bytes(text)
        command(work, ROOT / "data/prepare.py", input="train.txt", val="val.txt", tokenizer="bytes", out="data")

    def train(self, steps, seed, without=None):
        """`without`: one of ABLATIONS; then the loss is train.py's own, of these windows and the end-of-text token."""
        script = [__file__, "child", without] if without else [ROOT / "train.py"]
        changes = ABLATIONS[without][0] if without else {}
        command(self.work, *script, **RACE | changes, steps=steps, seed=seed, data="data", out="out", overwrite=True)
        *lines, end = read_log(self.work / "out" / "log.jsonl")
        if without:
            return Run(steps, lines[-1]["seconds"], end["val_loss"],
                       statistics.median(line["tokens_per_second"] for line in lines))
        model = load(self.work / "out" / "last").eval()
        self.parameters, self.flops = model.parameters_count(), model.flops_per_token(CONTEXT)
        return Run(steps, lines[-1]["seconds"], score(model, self.val), lines[-1]["tokens"] / lines[-1]["seconds"])


def time_to_loss(train_for, target, steps, runs=5):
    """The Run of the fewest steps, to about 5 %, that ends at or below the target; None if none of `runs` does.
    train_for(steps) is a whole run: the rate falls to zero at its end, so each number of steps needs one of its own."""
    done = {}
    for _ in range(runs):
        done[steps] = train_for(steps)
        reached = min((n for n, r in done.items() if r.loss <= target), default=0)
        missed = max((n for n, r in done.items() if r.loss > target and n < (reached or math.inf)), default=0)
        if missed and reached:
            share = (done[missed].loss - target) / (done[missed].loss - done[reached].loss)
            steps = math.ceil(1.01 * missed * (reached / missed) ** share)        # loss: about linear in log(steps)
        else:
            steps = math.ceil(reached / 1.4 or 1.4 * missed)
        if steps in done or missed and 0 < reached <= max(steps, 1.05 * missed):
            break
    return done.get(reached)


def race(args):
    corpus = read_corpus(args.corpus)
    with tempfile.TemporaryDirectory() as work:
        ours, rows, rates, guess = Ours(Path(work), corpus), [], [], args.steps or args.iterations // 5
        if args.ablation:
            return ablate(ours, args.ablation, args.seeds or 1)
        theirs = NanoGPT(Path(work), args.nanogpt, corpus)

        def trained(side, steps):
            r = side.train(max(1, round(steps)), seed)
            print(f"{seed}: {type(side).__name__}, {r.steps:,} steps, {r.seconds:.1f} s, loss {r.loss:.4f}", flush=True)
            return r

        for seed in range(args.seeds or 3):
            rates.append(matmul_rate(torch.device("cpu"), torch.float32, 1024))
            full = trained(theirs, args.iterations)
            fast = time_to_loss(functools.partial(trained, ours), full.loss, guess)
            if fast is None:
                raise UserError(f"five runs from {guess} steps on miss {full.loss:.4f}: begin nearer with --steps")
            guess, ratio = fast.steps, full.seconds / fast.seconds
            rows.append((full, fast, trained(ours, fast.steps * ratio), trained(theirs, full.steps / ratio)))
    rate = statistics.median(rates)
    print(f"\n{args.threads} thread(s), products at {rate / 1e9:.0f} GFLOP/s\n\n| seed | nanoGPT, s | loss | ours to "
          "that, s | steps | loss | x faster | our loss in its time | its loss in our time |\n" + "|---:" * 9 + "|")
    for seed, (full, fast, longer, shorter) in enumerate(rows):
        print(f"| {seed} | {full.seconds:.1f} | {full.loss:.4f} | {fast.seconds:.1f} | {fast.steps:,} | {fast.loss:.4f}"
              f" | {full.seconds / fast.seconds:.2f} | {longer.loss:.4f} | {shorter.loss:.4f} |")
    print(f"\nx faster, median: {statistics.median(r[0].seconds / r[1].seconds for r in rows):.2f}")
    for column, side in enumerate((theirs, ours)):
        speed, more = statistics.median(r[column].tokens_per_second for r in rows), side.parameters / theirs.parameters
        print(f"{type(side).__name__}: {side.parameters:,} parameters ({more - 1:+.1%}), {speed:,.0f} tokens/s, "
              f"{3 * side.flops * speed / rate:.0%} of the matmul rate")


def starts_with(std):
    """An `initialize` where matrices and tables have the standard deviation std(name, fan in); 0: as they would."""
    def initialize(self, generator=None, usual=Transformer.initialize):
        for name, p in usual(self, generator).named_parameters():
            if p.ndim > 1 and std(name, p.shape[1]):
                p.data.normal_(0.0, std(name, p.shape[1]), generator=generator)
        return self
    return initialize


# What is left out (what is there instead): changed flags of train.py; object, name, value of what is patched.
ABLATIONS = {
    "nothing": ({},),
    "Muon (AdamW for all)": (dict(optimizer="adamw", matrix_lr=None, beta1=None),),             # at its preset rates
    "5 Newton-Schulz iterations (3)": (dict(newton_schulz=3),),
    "QK-norm": ({}, (train, "Config", functools.partial(Config, qk_norm=False))),
    "SwiGLU (GELU of as many parameters)": (dict(ffn=RACE["ffn"] * 3 // 2), (
        train, "Config", functools.partial(Config, gated=False, hidden_act="gelu"))),
    "a head of its own (tied)": (dict(tie=True),),
    "a head from zero": ({}, (Transformer, "initialize", starts_with(lambda name, n: ("head" in name) * n ** -0.5))),
    "initial scales (GPT-2's)": ({}, (Transformer, "initialize", starts_with(
        lambda name, _: 0.02 / (2 * RACE["layers"]) ** (("o_proj" in name or "down_proj" in name) / 2)))),
    "the embedding's rate (the vectors')": (dict(embed_lr=RACE.get("lr", train.TrainConfig.lr)),),
    "low betas (0.9, 0.95, momentum 0.95)": (dict(beta1=0.9, beta2=0.95, momentum=0.95),),
    "wsd (cosine)": (dict(schedule="cosine"),),
    "C kernels": (dict(no_native=True),),
}


def child(argv):
    """train.py in this process, without an ingredient. Nothing is saved: not every such model has a format."""
    for name in ("save", "show_sample", "picture"):
        setattr(train, name, lambda *_: None)
    for patch in ABLATIONS[argv[0]][1:]:
        setattr(*patch)
    train.main(argv[1:])


def ablate(ours, steps, seeds):
    """Prints the loss without each ingredient, after as many steps and after as many as take the same time."""
    base, mean = None, lambda runs: statistics.fmean(r.loss for r in runs)
    print(f"{torch.get_num_threads()} thread(s), {steps:,} steps, {seeds} seed(s), mean losses in nats\n\n| without | "
          "a step's time, x | loss, same steps | loss, same time |\n|---|---:|---:|---:|")
    for name in ABLATIONS:
        same = lambda steps: [ours.train(max(1, round(steps)), seed, name) for seed in range(seeds)]
        runs = same(steps)
        base = base or runs
        slower = statistics.median(b.tokens_per_second / r.tokens_per_second for b, r in zip(base, runs))
        losses = mean(runs), mean(runs if abs(slower - 1) < 0.02 else same(steps / slower))
        cells = [f"{loss:.4f} ({loss - mean(base):+.4f})" for loss in losses]
        print(f"| {name} | {slower:.2f} | {' | '.join(cells)} |", flush=True)


def stepper(argv):
    """A process of its own: answers each line of its input with the seconds of a step; at its end, (parameters,
    multiplications and additions of a token's forward pass, the most bytes of memory)."""
    side, layers, width, heads, context, batch, optimizer, checkout = json.loads(argv[0])
    device = pick_device("auto")
    cuda = device.type == "cuda"
    machine = Machine(device, torch.bfloat16 if cuda else torch.float32, 0, 1, None)
    if side == "ours":
        model = Transformer(Config(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads,
            max_position_embeddings=context, tie_word_embeddings=True)).initialize().to(device)
        optimizers = train.make_optimizers(model, None, train.TrainConfig(optimizer=optimizer))
        loss_of, flops = lambda b: train.cross_entropy(model, b)[0] / b.ids.numel(), model.flops_per_token(context)
    else:
        model, flops = nanogpt(checkout, block_size=context, vocab_size=VOCAB, n_layer=layers, n_head=heads,
                               n_embd=width, dropout=0.0, bias=False)
        with contextlib.redirect_stdout(io.StringIO()):
            optimizers = [model.to(device).configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)]
        loss_of = lambda b: model(b.ids, b.targets)[1]
    if cuda:
        torch.set_float32_matmul_precision("high")
        model.compile()
    ids = torch.randint(VOCAB, (batch, context + 1), device=device)
    data = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)
    for _ in sys.stdin:
        synchronize(device)
        start = time.perf_counter()
        with in_dtype(machine):
            loss_of(data).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        synchronize(device)
        print(time.perf_counter() - start, flush=True)
    peak = torch.cuda.max_memory_allocated() if cuda else memory_peak(device) or math.nan
    print(json.dumps([sum(p.numel() for p in model.parameters()), flops, peak]))


def throughput(args):
    device = pick_device("auto")
    kind, size = (torch.bfloat16, 4096) if device.type == "cuda" else (torch.float32, 1024)
    print(f"{device}, {str(kind)[6:]}, {args.threads} thread(s); {args.batch} windows a step, medians of {args.rounds} "
          f"rounds; our optimizer: {args.optimizer}\n\n| shape | context | | parameters | tokens/s | of the matmul "
          "rate | peak, MB | tokens/s, x nanoGPT | peak, x |\n" + "|---" * 3 + "|---:" * 6 + "|")
    for shape, context in itertools.product(args.shapes or SHAPES, args.context):
        children, facts, rates, seconds = {}, {}, [], {"nanoGPT": [], "ours": []}
        read = lambda side: json.loads(children[side].stdout.readline() or sys.exit(f"{side} failed at {shape}"))
        for side in seconds:
            line = json.dumps([side, *SHAPES[shape], context, args.batch, args.optimizer, args.nanogpt])
            children[side] = subprocess.Popen([sys.executable, __file__, "stepper", line], encoding="utf-8",
                                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for i in range(args.rounds + 1):                                        # the first warms up
            for side, process in children.items():
                print("step", file=process.stdin, flush=True)
                seconds[side] += [read(side)][:i]
            rates.append(matmul_rate(device, kind, size))
        for side, process in children.items():
            process.stdin.close()
            facts[side] = read(side)
        for side, (parameters, flops, peak) in facts.items():
            speed = args.batch * context / statistics.median(seconds[side])
            faster = statistics.median(theirs / its for theirs, its in zip(seconds["nanoGPT"], seconds[side]))
            print(f"| {shape} | {context} | {side} | {parameters:,} | {speed:,.0f} | "
                  f"{3 * flops * speed / statistics.median(rates):.0%} | {peak / 1e6:,.0f} | {faster:.2f} | "
                  f"{peak / facts['nanoGPT'][2]:.2f} |", flush=True)


def fit_curve(n, d, loss):
    """(E, A, a, B, b), none negative, of the loss E + A / n^a + B / d^b of n parameters after d bytes (Hoffmann et al.,
    2022), by least squares of relative errors; None if there are none. For given exponents the rest is linear: only
    they are searched, on a grid that closes in on the best."""
    n, d, loss = (np.asarray(x, np.float64) for x in (n, d, loss))
    best, low, high = (math.inf, None), np.full(2, 0.02), np.full(2, 2.0)
    for _ in range(8):
        for a, b in itertools.product(*np.linspace(low, high, 21).T):
            terms = np.stack([np.ones_like(n), (n / n[0]) ** -a, (d / d[0]) ** -b], 1) / loss[:, None]
            E, A, B = x = np.linalg.lstsq(terms, np.ones_like(n), rcond=None)[0]
            error = ((terms @ x - 1) ** 2).sum()
            if x.min() >= 0 and error < best[0]:
                best = error, (E, A * n[0] ** a, a, B * d[0] ** b, b)
        if best[1] is None:
            return None
        center, reach = np.array(best[1])[[2, 4]], (high - low) / 8
        low, high = np.maximum(center - reach, 0.001), center + reach
    return best[1]


def finished(out):
    """{name: (parameters, bytes of text learned, bits per byte, seconds)} of the runs in a directory that ended."""
    rows = {}
    for file in sorted(Path(out).glob("*/last/config.json")):
        folder, h = file.parent.parent, read_json(file)["history"][-1]
        state = read_state(folder)
        if state["step"] == state["total"]:
            bytes_per_token = h["val_loss"] / math.log(2) / h["val_bits_per_byte"]
            rows[folder.name] = (load(folder / "last").parameters_count(), h["tokens"] * bytes_per_token,
                                 h["val_bits_per_byte"], h["seconds"])
    return rows


def scale(args):
    out = Path(args.out).resolve()
    for vocab, minutes, shape in itertools.product(args.vocab, args.minutes, args.shapes):
        folder = out / f"{shape}-{vocab or Path(args.data).name}-{minutes:g}min"
        if folder.name in finished(out):
            continue
        data = out / f"data-{vocab}" if vocab else find(args.data, args.smoke) or prepare(args.data, smoke=args.smoke)
        if not (data / "meta.json").exists():
            prepare(args.data, vocab_size=vocab, out=data)
        width, layers = map(int, shape.split("x"))
        print(f"training {folder.name}", flush=True)
        command(ROOT, ROOT / "train.py", *args.flags.split(), smoke=args.smoke or None, data=data, out=folder,
                layers=layers, width=width, minutes=minutes, overwrite=True)
    rows = finished(out)
    if not any(row[3] <= 66 * args.fit_minutes for row in rows.values()):               # a budget is met to about 10 %
        raise UserError(f"--out {out} holds no run that has ended in --fit-minutes: --shapes 128x4 makes one")
    n, d, bits, seconds = np.array([row for row in rows.values() if row[3] <= 66 * args.fit_minutes]).T
    # In runs of one duration the text follows from the size, and the two terms cannot be told apart.
    enough = len(n) >= 6 and abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) < 0.98
    E, A, a, B, b = fitted = enough and fit_curve(n, d, bits) or [math.nan] * 5
    curve = lambda n, d: E + A / n ** a + B / d ** b
    print("\n| run | parameters | text learned, MB | seconds | bits per byte | fitted |\n|---|" + "---:|" * 5)
    for name, (parameters, text, value, taken) in sorted(rows.items(), key=lambda row: row[1][2]):
        print(f"| {name} | {parameters:,} | {text / 1e6:.1f} | {taken:.0f} | {value:.4f} | "
              f"{curve(parameters, text):.4f} |")
    if math.isnan(E):
        return print("\nno curve: it needs six runs, not all as long (--minutes 1 5), better with more size and text")
    slope, start = np.polyfit(np.log(n), np.log(d / seconds), 1)
    print("\nbits per byte = {:.4f} + {:.4g} / parameters^{:.3f} + {:.4g} / bytes^{:.3f}".format(*fitted) +
          f"; bytes/s = {math.exp(start):.4g} x parameters^{slope:.3f}\n\n| minutes | best size | bits per byte |\n" +
          "|---:" * 3 + "|")
    sizes = np.geomspace(n.min() / 4, 16 * n.max(), 400)
    for minutes in sorted({1.0, 5.0, 60.0, *args.minutes}):
        losses = curve(sizes, 60 * minutes * math.exp(start) * sizes ** slope)
        print(f"| {minutes:g} | {sizes[losses.argmin()]:,.0f} | {losses.min():.4f} |")


RECIPES = {"all": "", "no decay": "--weight-decay 0", "no dropout": "--dropout 0", "no average": "--average 0",
           "none": "--weight-decay 0 --dropout 0 --average 0"}


def epochs(args):
    out, data = Path(args.out).resolve(), find(args.data) or prepare(args.data)
    cfg, _ = train.parse(train.TrainConfig, "", args.flags.split())
    steps_per_reading = Windows(data, "train", cfg.context).per_epoch / cfg.batch_size
    losses = collections.defaultdict(list)                              # {(recipe, readings): [(best, end), ...]}
    for seed, times, recipe in itertools.product(range(args.seeds or 1), args.readings, args.recipes):
        folder = out / re.sub(r"[^\w.]+", "-", f"{data.name} {recipe} {times:g}x seed {seed}")
        if not (folder / "last/config.json").is_file() or (state := read_state(folder))["step"] < state["total"]:
            print(f"training {folder.name}", flush=True)
            command(ROOT, ROOT / "train.py", *args.flags.split(), *RECIPES.get(recipe, recipe).split(), data=data,
                    out=folder, steps=max(1, round(times * steps_per_reading)), seed=seed, overwrite=True)
        bits = [line["val_bits_per_byte"] for line in read_log(folder / "log.jsonl") if "val_bits_per_byte" in line]
        losses[recipe, times].append((min(bits), bits[-1]))
    print(f"\n{data.name}: bits per byte of held-out text\n\n| recipe | readings | best | at the end |")
    print("|---|---:|---:|---:|")
    for (recipe, times), seeds in losses.items():
        print(f"| {recipe} | {times:g} | {' | '.join(spread(column) for column in zip(*seeds))} |")


def spread(values):
    """The mean of several seeds' values, with the lowest and the highest."""
    text = f"{statistics.fmean(values):.4f}"
    return text + f" ({min(values):.4f} ... {max(values):.4f})" * (len(values) > 1)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["child"], ["stepper"]):                                    # the processes that the others start
        return {"child": child, "stepper": stepper}[argv[0]](argv[1:])
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=("race", "throughput", "scale", "epochs"))
    add("--threads", type=int, default=1)
    add("--nanogpt", metavar="CHECKOUT", help="the opponent's directory; it is not written to")
    add("--corpus", metavar="FILE", help="race: the text, in ASCII")
    add("--seeds", type=int, help="race: default 3, of --ablation 1; epochs: default 1")
    add("--iterations", type=int, default=2000, help="race: nanoGPT's (default: its example's 2000)")
    add("--steps", type=int, help="race: where the search for ours begins (default: a fifth of its)")
    add("--ablation", type=int, metavar="STEPS", help="race: instead, leave out each ingredient for so many steps")
    add("--shapes", nargs="+", default=[], help="throughput: 30M 124M; scale: WIDTHxLAYERS, none: what is there")
    add("--context", nargs="+", type=int, default=[512, 1024], help="throughput: in tokens")
    add("--batch", type=int, default=4, help="throughput: windows a step (for 124M on one core take 1)")
    add("--rounds", type=int, default=5, help="throughput")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="throughput: ours (nanoGPT's is adamw)")
    add("--data", default="stdlib", help="scale, epochs: prepared data, or a known corpus")
    add("--readings", nargs="+", type=float, default=[2.0, 5.0, 16.0], help="epochs: of the training text, in a run")
    add("--recipes", nargs="+", default=["all", "none"], help=f"epochs: {', '.join(RECIPES)}, or flags in quotes")
    add("--minutes", nargs="+", type=float, default=[5.0], help="scale: of a run; several for the curve")
    add("--fit-minutes", type=float, default=math.inf, help="scale: fit shorter runs only, and predict the longer ones")
    add("--vocab", nargs="+", type=int, default=[0], help="scale: prepare the corpus with each size (0: as it is)")
    add("--out", default="out-scale", help="scale, epochs: where the runs are kept")
    add("--smoke", action="store_true", help="scale: one run of a few steps: does it work?")
    add("--flags", default="", help="scale, epochs: more flags for train.py, in one string")
    args = parser.parse_args(argv)
    if args.smoke:
        args.shapes, args.minutes = args.shapes[:1], args.minutes[:1]
    for shape in args.shapes:
        if shape not in SHAPES and (args.what == "throughput" or not re.fullmatch(r"\d+x\d+", shape)):
            parser.error(f"--shapes {shape}: throughput has {', '.join(SHAPES)}, scale WIDTHxLAYERS, such as 128x4")
    for name in ("train.py", "model.py", "config/train_shakespeare_char.py", "data/shakespeare_char"):
        beside = args.what in ("race", "throughput") and not args.ablation
        if beside and not Path(args.nanogpt or os.devnull, name).exists():
            parser.error(f"--nanogpt {args.nanogpt or 'CHECKOUT'} has no {name}: git clone "
                         "https://github.com/karpathy/nanoGPT and give that directory")
    os.environ.update(OMP_NUM_THREADS=str(args.threads), PYTHONIOENCODING="utf-8")                # for the processes
    torch.set_num_threads(args.threads)
    dict(race=race, throughput=throughput, scale=scale, epochs=epochs)[args.what](args)


if __name__ == "__main__":
    run(main)
