"""Trains a model on next-token prediction: from scratch, or further from a model directory.

    python train.py                                            # Python's own standard library; result in out/
    python train.py --data NAME_OR_DIR --out DIR               # data prepared by data/prepare.py
    python train.py --out DIR --resume                         # go on where it stopped, bit for bit
    python train.py --data NAME_OR_DIR --init-from DIR --out DIR2      # fine-tune
    torchrun --nproc_per_node 8 train.py --batch-size 64       # processes share each batch, and with --fsdp the model

A run's directory holds two models, best/ (lowest validation loss) and last/ (with what --resume needs), log.jsonl (one
line a step) and loss.png. fit() below is the only optimizer loop of this project; distill.py and compress.py call it.
"""
import collections, contextlib, copy, dataclasses, itertools, math, os, shlex, statistics, time
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.distributed as dist
from torch import nn

import sample
from data import UserError
from data.checkpoints import tokenizer_of, whole
from data.console import flags_of, run
from data.loader import IGNORE, LEARNED, Windows
from data.machine import (DTYPES, Threads, accelerate, agree, all_sum, from_first, halvings, in_dtype, is_sharded,
                          matmul_rate, memory_of_machine, on_whole_matrices, one_voice, part, say, set_up, shard,
                          synchronize, threads_of, to_device)
from data.report import picture
from data.runs import Run, check_out, history_entry, open_data, read_state, resumed, show_example, show_scale
from data.schedule import share_done
from data.tokenizer import Tokenizer
from model import Config, QuantLinear, Transformer, load, save


# ---------------------------------------------------------------------------------------------------------------------
# Config: each field is a flag, each comment its help

@dataclasses.dataclass
class TrainConfig:
    # what is read and written
    data: str = "stdlib"            # prepared data: a name under data/, or a directory
    out: str = "out"                # the run's directory: best/, last/, log.jsonl, loss.png
    resume: bool = False            # go on from OUT/last with its settings
    init_from: str = ""             # start from this model directory instead of random weights (fine-tuning)
    overwrite: bool = False         # replace the run that is in OUT
    # the model (with --init-from: that model's)
    layers: int = 4                 # transformer blocks
    width: int = 96                 # channels of the residual stream
    heads: int = 0                  # query heads; 0: one for each 32 channels of width
    kv_heads: int = 0               # key-value heads; 0: as many as heads
    head_dim: int = 0               # channels of a head; 0: width / heads
    ffn: int = 0                    # neurons of an MLP; 0: 3 x width
    tie: bool = False               # one table for embedding and output head
    vocab_size: int = 4096          # of the tokenizer, when `stdlib` is prepared on the way
    context: int = 256              # window in tokens
    # optimization
    preset: str = ""                # hour or gpu: settings for an hour on a laptop, or on one large GPU
    minutes: float = 5.0            # time budget, evaluation included: turned into steps before the rate begins to fall
    steps: int = 0                  # number of steps; 0: from the time budget
    batch_size: int = 4             # windows a step, over all processes
    micro_batch: int = 0            # windows a process holds at once; 0: its whole share, more are accumulated
    optimizer: str = "muon"         # muon (matrices by Muon, the rest by AdamW) or adamw (all)
    lr: float = 0.015               # peak learning rate of the output head and of vectors
    embed_lr: float = 0.15          # peak learning rate of the embedding (with --tie: --lr)
    matrix_lr: float = 0.02         # peak learning rate of the matrices (with --optimizer adamw: 0.003)
    weight_decay: float = 0.0       # of matrices, decoupled
    beta1: float = 0.5              # AdamW's first decay: low, as most rows of an embedding have no gradient in a step
    beta2: float = 0.99             # AdamW's second decay
    momentum: float = 0.9           # Muon's
    newton_schulz: int = 3          # Muon's iterations; short runs at high rates gain from 5
    schedule: str = "wsd"           # wsd: constant, then linear to zero; cosine: half a cosine to zero
    warmup: int = 20                # steps of linear warm-up
    decay: float = 0.7              # share of the run in which wsd falls
    clip: float = 1.0               # largest norm of all gradients; 0: off
    dropout: float = 0.0            # of what each block adds
    seed: int = 0                   # of weights, order and dropout
    # evaluation and saving
    evals: int = 3                  # evaluations a run, the last at its end
    eval_tokens: int = 262144       # at most so many validation tokens each, spread over the split; 0: all
    save_seconds: float = 60.0      # time between saves of last/
    # the machine
    device: str = "auto"            # auto, cuda, mps or cpu
    dtype: str = "auto"             # auto, float32, bfloat16 or float16 (of the products; weights stay float32)
    threads: int = 0                # of a CPU; 0: the number with which steps are fastest, at the start and later
    native: bool = True             # kernels in C on a CPU (data/native.py); --no-native: PyTorch alone
    compile: bool = False           # torch.compile: faster on a GPU, needs a C++ compiler and a minute or two
    checkpoint_activations: bool = False    # keep a block's input only and compute the rest again: for long contexts
    fsdp: bool = False              # under torchrun: each process keeps a share of weights and optimizer state
    wandb: str = ""                 # log to this Weights & Biases project (WANDB_MODE=offline works)
    smoke: bool = False             # a tiny model on a slice of the data for a few steps: does it run?


SHAPE = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "tie")      # what only a new model leaves open
FIXED = (*SHAPE, "preset", "data", "init_from", "vocab_size", "context", "batch_size", "optimizer", "seed")   # of a run
ADAMW = dict(matrix_lr=0.003, beta1=0.9)
# Where --init-from starts, small steps of all weights keep what was learned.
FINE_TUNE = dict(optimizer="adamw", lr=3e-4, embed_lr=3e-4, matrix_lr=3e-4, beta1=0.9, decay=1.0)
# More time wants more parameters, but not many: tests/bench_train.py scale says how many. `gpu` was never run: it is
# what others use there, and it wants far more text than `stdlib` has.
PRESETS = {
    "hour": dict(minutes=60.0, width=128, context=512, evals=10),
    "gpu": dict(minutes=60.0, layers=12, width=768, heads=12, vocab_size=32768, context=1024, batch_size=64, evals=10,
                lr=0.004, warmup=100, compile=True)}
SMOKE = dict(steps=6, layers=2, width=32, heads=2, context=64, batch_size=4, evals=2, eval_tokens=2048, warmup=2)


def parse(config_class, description, argv=None, positional=(), hidden=()):
    """(config, names of the flags that were given) from the command line. Raises UserError for a wrong flag."""
    given = flags_of(config_class, description, argv, positional, hidden)
    if (name := given.get("preset", "")) and name not in PRESETS:
        raise UserError(f"--preset must be {' or '.join(PRESETS)}, not {name}")
    defaults = {**PRESETS.get(name, {}), **(ADAMW if given.get("optimizer") == "adamw" else {}),
                **(FINE_TUNE if given.get("init_from") else {}), **(SMOKE if given.get("smoke") else {})}
    return config_class(**{**defaults, **given}), set(given)


def heads_of(cfg):
    return cfg.heads or max(1, cfg.width // 32)


def check_training(cfg):
    """Raises UserError naming every setting that cannot be."""
    wrong = [f"--{name.replace('_', '-')} must be one of {', '.join(options)}" for name, options in (
        ("optimizer", ("muon", "adamw")), ("schedule", ("wsd", "cosine")), ("dtype", tuple(DTYPES)))
        if getattr(cfg, name) not in options]
    wrong += [f"--{name.replace('_', '-')} must be at least {least}" for least, names in (
        (1, ("layers", "width", "context", "batch_size", "evals", "newton_schulz")),
        (0, ("heads", "kv_heads", "head_dim", "ffn", "steps", "micro_batch", "warmup", "lr", "embed_lr", "matrix_lr",
             "clip", "weight_decay", "seed", "eval_tokens", "save_seconds", "threads")))
        for name in names if not least <= getattr(cfg, name) < math.inf]
    wrong += [f"--{name} must be at least 0 and below 1" for name in ("dropout", "beta1", "beta2", "momentum")
              if not 0 <= getattr(cfg, name) < 1]
    if cfg.threads > 1024:
        wrong.append("--threads must be at most 1024")
    if not 0 <= cfg.decay <= 1:
        wrong.append("--decay must be between 0 and 1")
    if cfg.steps == 0 and not 0 < cfg.minutes < math.inf:
        wrong.append("--steps or --minutes must be above 0")
    if not cfg.init_from and cfg.head_dim == 0 and cfg.width % heads_of(cfg):
        wrong.append(f"--width ({cfg.width}) does not divide by --heads ({heads_of(cfg)})")
    if cfg.fsdp and "RANK" not in os.environ:
        wrong.append("--fsdp spreads the model over processes: start them with torchrun --nproc_per_node N")
    if wrong:
        raise UserError("; ".join(wrong))


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def tuned(machine, cfg, model, batches, loss_fn):
    """The Machine with the number type and the number of threads with which a CPU makes steps of this model fastest:
    real steps are timed, a few seconds in all, and the result is printed. What the flags or the run that goes on say
    stays. Model and loss are afterwards what they were."""
    if machine.device.type != "cpu":
        return machine
    accelerate(model, cfg.native, globals())
    forced = {name: os.environ.get("SLM_TEST_" + name, "") for name in ("THREADS", "DTYPE")}           # tests set them
    most, kept = torch.get_num_threads(), read_state(cfg.out) if cfg.resume else {}
    count = cfg.threads or int(forced["THREADS"] or 0) or (most if machine.size > 1 else 0)            # 0: to be found
    threads = Threads([count] if count else halvings(most), count or kept.get("threads", 0))
    counts = [threads.count] if count or kept.get("threads") else threads.options
    dtypes = [DTYPES[cfg.dtype if cfg.dtype != "auto" else forced["DTYPE"] or kept.get("dtype") or "auto"]]
    if dtypes == [None]:
        slow, fast = (matmul_rate(machine.device, t, 256) for t in (torch.float32, torch.bfloat16))
        dtypes = [torch.float32] + [torch.bfloat16] * (fast > slow)                                    # else emulated
    best, text = (counts[0], dtypes[0]), " (as before)" if kept else ""
    if len(counts) * len(dtypes) > 1:
        options = {(n, t): machine._replace(dtype=t, rank=0, size=1, threads=Threads([n]))
                   for n in counts for t in dtypes}
        quick = dataclasses.replace(cfg, batch_size=max(1, min(cfg.batch_size // machine.size, 8192 // cfg.context)))
        seconds = timed_steps(model, batches, loss_fn, quick, options, seconds=0.3 if cfg.smoke else 2.5)
        text = " (a step takes too long to try others)"
        if seconds:
            rates = {option: quick.batch_size * cfg.context / statistics.fmean(seconds[option]) for option in options}
            best, text = max(rates, key=rates.get), "; ".join(f"{threads_of(n)}: " + ", ".join(
                f"{str(t)[6:]} {rates[n, t]:,.0f} tokens/s" for t in dtypes) for n in counts)
            text = f" (steps were timed: {text})"
    count, dtype = from_first(best)
    threads.use(count)
    say(machine, f"device cpu, {threads_of(count)}" + f", {machine.size} processes" * (machine.size > 1) +
        f"; {str(dtype)[6:]}{text}")
    return machine._replace(dtype=dtype, threads=threads)


# ---------------------------------------------------------------------------------------------------------------------
# Loss

LEAST_ROWS = 160


class ThroughHead(torch.autograd.Function):
    """Sum of a loss of the logits x @ weight.T that never holds them all: rows of x (N, C) are taken in chunks, and
    chunk(logits (rows, V) float32, which rows) gives a chunk's loss and its gradient at once, while the probabilities
    are still in the cache (Wijmans et al., 2024).

    A chunk is 2^21 logits on a CPU, 2^26 on a GPU, and a divergence makes about ten float32 copies: 80 MB or 2.6 GB,
    where one copy of all the logits of 8 x 512 tokens and 49,152 ids has 0.8 GB. But LEAST_ROWS at least, as each chunk
    reads and writes the gradient of all of weight: with 50,304 ids, 41 rows took 1.6 x the time of the plain loss on a
    CPU, and 166 as long as that.
    """
    @staticmethod
    def forward(ctx, x, weight, chunk):
        kind = x.device.type                          # autocast does not see products that are written to a tensor
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        loss, grad_x, grad_weight = torch.zeros((), device=x.device), torch.empty_like(x), torch.zeros_like(weight)
        x, weight_t = x.to(dtype), weight.to(dtype)
        rows = max(LEAST_ROWS, (2 ** 21 if kind == "cpu" else 2 ** 26) // len(weight))
        buffer = x.new_empty(min(rows, len(x)), len(weight))
        for i in range(0, len(x), rows):
            part = x[i:i + rows]
            logits = torch.mm(part, weight_t.T, out=buffer[:len(part)])
            value, grad = chunk(logits.float(), slice(i, i + rows))
            loss, grad = loss + value, grad.to(dtype)
            grad_x[i:i + rows] = grad @ weight_t
            if dtype == weight.dtype:
                grad_weight.addmm_(grad.T, part)
            else:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad, None


def softmax_gradient(logits, targets):
    """(sum of -log softmax(logits) at the targets, the gradient of it by the logits: probabilities minus one-hot).

    logits (N, V) float32, which the gradient may overwrite; targets (N,) with IGNORE where nothing is learned.
    """
    targets = targets[:, None]
    learned, targets = (targets != IGNORE).float(), targets.clamp(min=0)             # (N, 1)
    top, right = logits.amax(1, keepdim=True), logits.gather(1, targets)
    probs = logits.softmax(1)
    log_sum = top - probs.amax(1, keepdim=True).log()            # log(sum(exp(logits))), never log(0)
    grad = probs.scatter_add_(1, targets, torch.full_like(learned, -1.0))
    return ((log_sum - right) * learned).sum(), grad if learned.all() else grad * learned


def linear_cross_entropy(x, weight, targets):
    """Sum of cross_entropy(x @ weight.T, targets): x (N, C), weight (V, C), targets (N,), see softmax_gradient."""
    return ThroughHead.apply(x, weight, lambda logits, rows: softmax_gradient(logits, targets[rows]))


def cross_entropy(model, batch):
    """The loss of training: (sum of -log p over the targets in nats, number of targets, nothing more to log)."""
    x = model(batch.ids, segments=batch.segments, head=False).flatten(0, 1)          # (B * T, C)
    loss = linear_cross_entropy(x, model.lm_head.weight, batch.targets.flatten())
    return loss, (batch.targets != IGNORE).sum(), {}


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized: all its singular values become about 1 (Jordan et al., 2024).

    Matrices of one shape are orthogonalized as one batch, and in float32 on a CPU, where bfloat16 is slower.
    """
    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, iterations=3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.iterations = iterations

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = collections.defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta, grads = [part(self.state[p]["momentum"]) for p in params], [part(p.grad) for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))    # Nesterov
                if is_sharded(params[0]):
                    updates = on_whole_matrices(lambda whole: orthogonalize(whole, self.iterations), updates,
                                                (len(params), rows, columns), params[0].device_mesh)
                else:
                    updates = orthogonalize(updates, self.iterations)                            # (n, rows, columns)
                weights = [part(p) for p in params]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.to(params[0].dtype)),
                                    alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(x, iterations=3):
    """About U V^T of each x = U S V^T, x (n, rows, columns), by Newton-Schulz iterations with Jordan's coefficients.

    Three, not his five: after the quick start's first 800 steps the loss was the same, and each costs time on a CPU.
    """
    x = x.bfloat16() if x.is_cuda else x.float()
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if transposed else x


def make_optimizers(model, loss_fn, cfg):
    """Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for all."""
    matrices, embeddings, rest = [], [], []
    extra = loss_fn.named_parameters() if isinstance(loss_fn, nn.Module) else ()
    for name, p in itertools.chain(model.named_parameters(), extra):
        if p.requires_grad:
            embedding = "embed" in name and not model.config.tie_word_embeddings         # a tied one is the head too
            (embeddings if embedding else matrices if p.ndim > 1 and ".layers." in name else rest).append(p)
    groups = [dict(params=embeddings, lr=cfg.embed_lr, weight_decay=0.0),
              dict(params=rest, lr=cfg.lr, weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        groups.append(dict(params=matrices, lr=cfg.matrix_lr, weight_decay=cfg.weight_decay))
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=1e-10, fused=True)]
    if cfg.optimizer == "muon" and matrices:
        optimizers.append(Muon(matrices, cfg.matrix_lr, cfg.momentum, cfg.weight_decay, cfg.newton_schulz))
    for o in optimizers:
        for g in o.param_groups:
            g["peak"] = g["lr"]
    return optimizers


def lr_at(step, total, cfg, origin=(0, 0.0)):
    """The share of the peak learning rate at a step of a run of `total` steps; origin as in share_done."""
    warm = min(1.0, (step + 1) / (cfg.warmup + 1))
    left = 1.0 - share_done(step, total, origin)
    if cfg.schedule == "cosine":
        return min(warm, 0.5 * (1 + math.cos(math.pi * (1 - left))))
    return min(warm, left / cfg.decay if cfg.decay > 0 else 1.0)                # wsd


# ---------------------------------------------------------------------------------------------------------------------
# The loop

class ModelAndLoss(nn.Module):
    """One forward pass as a module, so that DistributedDataParallel sees the loss's own parameters too."""
    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch):
        return self.loss_fn(self.model, batch)


def rows_at_once(cfg, machine):
    """Windows that a process holds at once: its share of a step's, or --micro-batch."""
    share = cfg.batch_size // machine.size
    return min(cfg.micro_batch or share, share)


def check_memory(model, cfg, machine):
    """Raises UserError if what the blocks keep of one micro-batch for the backward pass, counted low, is more than all
    the memory of this machine: Linux would end the process without a word."""
    if machine.device.type != "cpu":
        return
    c, tokens = model.config, rows_at_once(cfg, machine) * cfg.context
    least = 4 * tokens * (c.num_hidden_layers * (4 * c.hidden_size + 2 * c.intermediate_size) if not
                          cfg.checkpoint_activations else c.num_hidden_layers * c.hidden_size)
    if least > memory_of_machine():
        raise UserError(f"{tokens:,} tokens at once need more than {least / 1e9:,.0f} GB, and this machine has "
                        f"{memory_of_machine() / 1e9:,.0f}: lower --micro-batch, --batch-size or --context")


def train_step(step, forward, batches, optimizers, scaler, cfg, machine):
    """One step: (loss summed over supervised tokens, their number, norm of the gradient, sums of the loss's metrics).

    forward: a ModelAndLoss, or one that DistributedDataParallel wraps. Where loss or norm are not finite, the weights
    stay what they were.
    """
    share = cfg.batch_size // machine.size
    micro, positions = rows_at_once(cfg, machine), cfg.batch_size * cfg.context
    ddp = isinstance(forward, nn.parallel.DistributedDataParallel)
    torch.manual_seed(((cfg.seed * 10 ** 9 + step) * 10 ** 4 + machine.rank) % 2 ** 63)         # dropout
    sums, metrics = torch.zeros(2, device=machine.device), collections.defaultdict(float)
    first = step * cfg.batch_size + machine.rank * share
    for row in range(first, first + share, micro):
        batch = to_device(batches(row, min(micro, first + share - row)), machine.device)
        last = row + micro >= first + share
        # Sharded gradients are summed over processes each time: to wait, each would have to hold all of them.
        with in_dtype(machine), forward.no_sync() if ddp and not last else contextlib.nullcontext():
            loss, count, extra = forward(batch)
            scaler.scale(loss * machine.size / positions).backward()         # DDP takes the mean over processes
        sums += torch.stack((loss.detach().float(), count.float()))
        for k, v in extra.items():
            metrics[k] += float(v)
    loss, count = all_sum(machine, sums).tolist()
    params = [p for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
    for o in optimizers:
        scaler.unscale_(o)
    if count != positions:                                                   # masked prompts, padding
        torch._foreach_mul_([p.grad for p in params], positions / max(count, 1))
    norm = nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)                # over all shards
    norm = (norm.full_tensor() if is_sharded(norm) else norm).item()
    for o in optimizers:
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    return loss, int(count), norm, metrics


def timed_steps(model, batches, loss_fn, cfg, machines, seconds=2.5, rounds=1):
    """{name: seconds of each step}: real steps on `machines` ({name: Machine} of this process alone), which take turns
    for `seconds`, and for `rounds` at least; the first step of a turn is not counted. None if `seconds` are given and
    the very first step takes five. Model and loss are afterwards what they were."""
    kept = [(m, copy.deepcopy(m.state_dict())) for m in (model, loss_fn) if isinstance(m, nn.Module)]
    forward, optimizers, training = ModelAndLoss(model, loss_fn), make_optimizers(model, loss_fn, cfg), model.training
    scaler = torch.amp.GradScaler(enabled=False)
    taken, step, started = {name: [] for name in machines}, 0, time.perf_counter()
    model.train()
    try:
        while rounds > 0 or time.perf_counter() - started < seconds:
            for name, machine in machines.items():
                if machine.device.type == "cpu":
                    machine.threads.use(machine.threads.count)
                for counted in (False, True, True, True):
                    start, step = time.perf_counter(), step + 1
                    train_step(step, forward, batches, optimizers, scaler, cfg, machine)
                    synchronize(machine.device)
                    if step == 1 and seconds and time.perf_counter() - start > 5:
                        return None
                    taken[name] += [time.perf_counter() - start] * counted
            rounds -= 1
        return taken
    finally:
        for m, state in kept:
            m.load_state_dict(state)
        model.train(training)


def fit(model, batches, loss_fn, cfg, machine, *, evaluate, tokenizer, entry, eval_cost=0.0, reading=0,
        after_step=None):
    """Trains `model` in place and keeps cfg.out; returns the figures of the last evaluation.

    batches(first, count)    rows first ... first + count - 1 of the training stream, as a Batch
    loss_fn(model, batch)    (loss summed over supervised tokens, their number, dict of metrics to log). It may be an
                             nn.Module: its parameters are trained too, and kept in training_state.pt
    evaluate(model)          dict with "loss", by which best/ is chosen
    entry                    dict, the history entry of this run: figures are added, and it is saved with the model
    eval_cost                cost of one evaluation in training steps, to plan a time budget
    reading                  tokens of the training text, to say how often it is read
    after_step(model)        called after each optimizer step (pruning masks are applied again there)

    Random state is a function of (seed, step) alone, so a resumed run is the uninterrupted one, bit for bit.
    Raises UserError when the loss or the gradient stops being finite; last/ is then the last good state.
    """
    check_memory(model, cfg, machine)
    agree(machine, {**dataclasses.asdict(cfg), **entry})
    run = Run(model, loss_fn, cfg, machine, save, tokenizer, entry, eval_cost, reading)
    forward = ModelAndLoss(accelerate(model, cfg.native, globals()), loss_fn)
    if run.fsdp:
        shard(forward, machine)
    optimizers, scaler = make_optimizers(model, loss_fn, cfg), run.scaler
    run.open(optimizers)                                         # with --resume they get their state back
    forward = prepared(forward, batches, cfg, machine)
    model.train()
    while not run.total or run.step < run.total:
        factor = lr_at(run.step, run.total or 10 ** 9, cfg, run.origin)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        with run.timed_step():
            loss, count, norm, metrics = train_step(run.step, forward, batches, optimizers, scaler, cfg, machine)
            run.check(loss, norm)
            if after_step is not None:
                after_step(model)
        run.note(loss, count, norm, metrics, factor)
        if run.is_time_to_evaluate():
            with unsharded(forward, run.fsdp):
                figures = evaluate(model)
            run.note_evaluation(figures)
        elif run.is_time_to_save():
            run.keep("last")
        run.stop_if_asked()
    run.close()
    return run.figures


def prepared(forward, batches, cfg, machine):
    """A ModelAndLoss with dropout, activation checkpointing, torch.compile and DDP as the flags say."""
    body, fsdp = forward.model.model, cfg.fsdp and machine.size > 1
    body.checkpoint = cfg.checkpoint_activations
    for module in forward.modules():
        if isinstance(module, nn.Dropout):
            module.p = cfg.dropout
    if cfg.compile:
        for module in body.layers if fsdp else (forward.model,):
            module.compile()                                     # in place: no prefix in the state dict
        try:                                                     # errors come with the first real step
            with in_dtype(machine):
                forward(to_device(batches(0, rows_at_once(cfg, machine)), machine.device))[0].backward()
            forward.zero_grad(set_to_none=True)
        except Exception as error:
            raise UserError(f"--compile does not work here ({type(error).__name__}): leave it out, or install a C++ "
                            "compiler that torch.compile finds") from None
    if machine.size > 1 and not fsdp:
        return nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
    return forward


@contextlib.contextmanager
def unsharded(forward, fsdp):
    """Inside, the parameters that are in no block are whole on every process: FSDP gathers only blocks by itself."""
    if fsdp:
        forward.unshard()
    yield
    if fsdp:
        forward.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# The command

def model_to_train(cfg, given, tokenizer, machine):
    """The model to train: a run's last, a directory to start from, or a new one with random weights.

    A window shorter than --context lowers that, unless it was given. Raises UserError for another tokenizer, or for
    flags that the model does not leave open.
    """
    fixed = [n for n in SHAPE if n in given]
    if cfg.init_from and not cfg.resume and fixed:
        raise UserError(f"--{fixed[0].replace('_', '-')} is for a new model; --init-from keeps the shape of that one")
    if cfg.resume or cfg.init_from:
        path = whole(Path(cfg.out) / "last") if cfg.resume else whole(cfg.init_from)
        model = load(path)
        if any(isinstance(m, QuantLinear) for m in model.modules()):
            raise UserError(f"the model in {path} has quantized layers, and only float ones are trained: "
                            f"python compress.py {path} dequantize --out DIR gives a dense model")
        if tokenizer_of(model, path).hash != tokenizer.hash:
            raise UserError(f"the model in {path} has another tokenizer than the data: prepare the data with "
                            f"data/prepare.py --tokenizer {path}")
        for p in model.parameters():
            p.data = p.data.float().clone()              # not the mapped file: it is about to be replaced
        window = model.config.max_position_embeddings
        if cfg.context > window and "context" in given:
            raise UserError(f"--context {cfg.context} is more than this model's window of {window}")
        cfg.context = min(cfg.context, window)
    else:
        heads = heads_of(cfg)
        config = Config(
            vocab_size=tokenizer.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.ffn or 3 * cfg.width,
            num_hidden_layers=cfg.layers, num_attention_heads=heads, num_key_value_heads=cfg.kv_heads or heads,
            head_dim=cfg.head_dim or cfg.width // heads, max_position_embeddings=cfg.context,
            tie_word_embeddings=cfg.tie)
        with torch.device("meta"):
            least = 12 * Transformer(config).parameters_count()      # weight, gradient and momentum in float32
        if least > memory_of_machine() and machine.device.type == "cpu":
            raise UserError(f"a model of {least / 12e9:,.1f} billion parameters is trained in no less than "
                            f"{least / 1e9:,.0f} GB, and this machine has {memory_of_machine() / 1e9:,.0f}: lower "
                            "--width, --layers or --ffn")
        model = Transformer(config)
        model.initialize(torch.Generator().manual_seed(cfg.seed))
    return model.to(machine.device)


def evaluator(val, cfg, machine, tokenizer):
    """What fit calls to evaluate a model: each process scores its share of the validation windows."""
    def mine():
        batches = val.evaluation_batches(max(1, 8192 // cfg.context), cfg.eval_tokens)
        while turn := list(itertools.islice(batches, machine.size)):     # all take part in each: blocks may be sharded
            turn += [turn[0]._replace(targets=torch.full_like(turn[0].targets, IGNORE))] * (machine.size - len(turn))
            yield turn[machine.rank]

    def evaluate(model):
        with in_dtype(machine):
            sums = sample.score(model, mine(), tokenizer.token_bytes())
        return sample.figures(*all_sum(machine, sums))
    return evaluate


def show_sample(cfg, machine, tokenizer, val):
    """Prints how the best model goes on from the beginning of the validation text (or the first example's prompt)."""
    model, opening = accelerate(load(Path(cfg.out) / "best", machine.device), cfg.native), 64
    if val.mask is not None:
        opening = (val.mask[:] & LEARNED).argmax()
    prompt = tokenizer.decode_bytes(val.tokens[:opening].tolist()).decode("utf-8", errors="ignore")
    if val.mask is None:
        prompt = prompt[:prompt.rfind("\n") + 1] or prompt                   # whole lines
    print(f"\n--- how the validation text begins:\n{prompt.rstrip()}\n--- and how the model goes on:", flush=True)
    stream = sample.continuations(model, tokenizer, prompt, seed=cfg.seed, max_new_tokens=20 if cfg.smoke else 200,
                                  temperature=0.8, top_p=0.95)
    sample.speak(tokenizer, map(int, stream))
    more = "--prompt TEXT" if val.mask is None else "--chat"
    print(f"---\nMore: python sample.py {shlex.quote(cfg.out)} {more}")


@one_voice()
def main(argv=None):
    cfg, given = parse(TrainConfig, __doc__, argv)
    out = Path(cfg.out)
    check_out(cfg)
    if cfg.resume:
        cfg = resumed(cfg, given, FIXED)
    check_training(cfg)
    machine = set_up(cfg)
    directory = open_data(cfg, given, machine)
    tokenizer = Tokenizer.load(directory)
    model = model_to_train(cfg, given, tokenizer, machine)
    train, val = (Windows(directory, split, cfg.context) for split in ("train", "val"))
    meta, c = train.meta, model.config
    entry = history_entry(cfg, meta, tokenizer, model)
    positions, sizes = cfg.batch_size * cfg.context, meta["splits"]
    eval_tokens = min(max(cfg.eval_tokens, cfg.context) if cfg.eval_tokens else math.inf, sizes["val"]["tokens"])
    say(machine, f"data {meta['name']}: {sizes['train']['tokens']:,} training tokens of "
        f"{sizes['train']['bytes'] / max(1, sizes['train']['tokens']):.2f} bytes, vocabulary {meta['vocab_size']:,}")
    say(machine, f"model: {model.parameters_count():,} parameters; {c.num_hidden_layers} layers of width "
        f"{c.hidden_size}, {c.num_attention_heads} heads, MLP of {c.intermediate_size}, window of "
        f"{c.max_position_embeddings}")
    say(machine, f"{positions:,} tokens a step; each of {cfg.evals} evaluations reads {eval_tokens:,} of "
        f"{sizes['val']['tokens']:,} validation tokens")
    if train.long:
        say(machine, f"{train.long:,} examples exceed the window of {cfg.context} tokens: they are learned in pieces, "
            "each read behind half a window" + f"; {train.unread:,} prompts exceed it alone" * bool(train.unread))
    if train.mask is not None:
        show_example(machine, tokenizer, train.training_rows(cfg.seed, 0, 1))

    batches = lambda first, count: train.training_rows(cfg.seed, first, count)
    machine = tuned(machine, cfg, model, batches, cross_entropy)
    fit(model, batches, cross_entropy, cfg, machine, evaluate=evaluator(val, cfg, machine, tokenizer),
        tokenizer=tokenizer, entry=entry, eval_cost=eval_tokens / positions / 3, reading=train.per_epoch * cfg.context)
    if machine.rank == 0:
        picture(out)
        show_scale(cfg, tokenizer, val)
        show_sample(cfg, machine, tokenizer, val)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
