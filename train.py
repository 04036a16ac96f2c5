"""Trains a model on next-token prediction: from scratch, or further from a model directory.

    python train.py                                            # Python's own standard library; result in out/
    python train.py --data NAME_OR_DIR --out DIR               # data prepared by data/prepare.py
    python train.py --out DIR --resume                         # go on where it stopped, bit for bit
    python train.py --data NAME_OR_DIR --init-from DIR --out DIR2      # fine-tune
    torchrun --nproc_per_node 8 train.py --batch-size 64       # processes share each batch, and with --fsdp the model

A run's directory holds two models, best/ (lowest validation loss) and last/ (with what --resume needs), log.jsonl (one
line a step) and loss.png. fit() below is the only optimizer loop of this project; distill.py and compress.py call it.
"""
import argparse, collections, contextlib, copy, dataclasses, datetime, inspect, itertools, json, lzma, math, os, re
import shlex, signal, statistics, sys, time
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import sample
from data import MODEL, Parser, UserError, beside, is_ours, refuse_foreign, remove_tree, replacing_file, run, settle
from data.loader import IGNORE, LEARNED, Windows, read_meta
from data.prepare import find, prepare
from data.tokenizer import Tokenizer
from data.values import check_values
from model import (Config, QuantLinear, Transformer, call, checkpoint_hash, in_c, load, model_name, read_config,
                   save, whole)


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
    compile: bool = False           # torch.compile: faster on a GPU, needs a C++ compiler and a minute or two
    checkpoint_activations: bool = False    # keep a block's input only and compute the rest again: for long contexts
    fsdp: bool = False              # under torchrun: each process keeps a share of weights and optimizer state
    wandb: str = ""                 # log to this Weights & Biases project (WANDB_MODE=offline works)
    smoke: bool = False             # a tiny model on a slice of the data for a few steps: does it run?


SHAPE = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "tie")      # what only a new model leaves open
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
    """(config, names of the flags that were given) from the command line. Raises UserError for a wrong flag.

    Fields in `positional` are written without a flag; those in `hidden` cannot be given.
    """
    parser = Parser(description)
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", "".join(inspect.getsource(c) for c in
                                                                  reversed(config_class.__mro__[:-1])), re.M))
    for f in dataclasses.fields(config_class):
        if f.name in hidden:
            continue
        flag, help = "--" + f.name.replace("_", "-"), comments.get(f.name, "").replace("%", "%%")
        if f.name in positional:
            parser.add_argument(f.name, nargs="?", default=argparse.SUPPRESS, help=help)
            continue
        help += f" (default: {f.default!r})"
        if f.type in (bool, "bool"):                             # --no-compile switches off what --preset switches on
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            parser.add_argument(flag, type=type(f.default), default=argparse.SUPPRESS, help=help)
    given = vars(parser.parse_args(argv))
    if (name := given.get("preset", "")) and name not in PRESETS:
        raise UserError(f"--preset must be {' or '.join(PRESETS)}, not {name}")
    preset = {**PRESETS.get(name, {}),
              **(dict(matrix_lr=0.003, beta1=0.9) if given.get("optimizer") == "adamw" else {}),
              **(FINE_TUNE if given.get("init_from") else {}), **(SMOKE if given.get("smoke") else {})}
    return config_class(**{**preset, **given}), set(given)


def heads_of(cfg):
    return cfg.heads or max(1, cfg.width // 32)


def check(cfg):
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

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Machine = collections.namedtuple("Machine", "device dtype rank size threads")       # threads: sample.Threads


def matmul_rate(device, dtype, size, seconds=0.2):
    """Multiplications and additions a second of a square product on this device: the median of what fits the time."""
    a, times = torch.randn(size, size, device=device).to(dtype), []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / statistics.median(times)


def products_rate(machine):
    """matmul_rate of a machine, by a product that is large enough not to time its launch alone."""
    emulated = machine.device.type == "cpu" and machine.dtype != torch.float32           # there 1024 takes seconds
    return matmul_rate(machine.device, machine.dtype, 4096 if machine.device.type == "cuda" else
                       256 if emulated else 1024)


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def set_up(cfg):
    """Joins the processes torchrun started and picks device and, of a GPU, number type; says so."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % size:
        fitting = ", ".join(str(n) for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0)
        raise UserError(f"--batch-size {cfg.batch_size} does not divide by the {size} processes: start {fitting} of "
                        f"them, or give a multiple of {size}")
    device = sample.pick_device(cfg.device)
    if size > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))     # torchrun's next try meets in it the dead of the last
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size,
                                timeout=datetime.timedelta(hours=2))         # the first prepares data, the others wait
    dtype, why = DTYPES[cfg.dtype] or torch.float32, "as asked"
    if cfg.dtype == "auto" and device.type == "cuda":
        # Not torch.cuda.is_bf16_supported(): it counts emulation, and Turing and Volta are slow at it.
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        why = f"this GPU has {'' if dtype == torch.bfloat16 else 'no '}bfloat16 units"
    elif cfg.dtype == "auto":
        why = "the safe choice on mps, which is experimental here"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    machine = Machine(device, from_first(dtype), rank, size, sample.Threads([torch.get_num_threads()]))
    if device.type != "cpu":                                     # of a CPU: see `tuned`
        say(machine, f"device {device}" + (f", {size} processes" if size > 1 else "") + f"; {str(dtype)[6:]} ({why})")
    return machine


def tuned(machine, cfg, model, batches, loss_fn):
    """The Machine with the number type and the number of threads with which a CPU makes steps of this model fastest:
    real steps are timed, a few seconds in all, and the result is printed. What the flags or the run that goes on say
    stays. Model and loss are afterwards what they were."""
    if machine.device.type != "cpu":
        return machine
    forced = {name: os.environ.get("SLM_TEST_" + name, "") for name in ("THREADS", "DTYPE")}           # tests set them
    most, kept = torch.get_num_threads(), read_state(cfg.out) if cfg.resume else {}
    count = cfg.threads or int(forced["THREADS"] or 0) or (most if machine.size > 1 else 0)            # 0: to be found
    threads = sample.Threads([count] if count else sample.halvings(most), count or kept.get("threads", 0))
    counts = [threads.count] if count or kept.get("threads") else threads.options
    dtypes = [DTYPES[cfg.dtype if cfg.dtype != "auto" else forced["DTYPE"] or kept.get("dtype") or "auto"]]
    if dtypes == [None]:
        slow, fast = (matmul_rate(machine.device, t, 256) for t in (torch.float32, torch.bfloat16))
        dtypes = [torch.float32] + [torch.bfloat16] * (fast > slow)                                    # else emulated
    best, text = (counts[0], dtypes[0]), " (as before)" if kept else ""
    if len(counts) * len(dtypes) > 1:
        options = {(n, t): machine._replace(dtype=t, rank=0, size=1, threads=sample.Threads([n]))
                   for n in counts for t in dtypes}
        quick = dataclasses.replace(cfg, batch_size=max(1, min(cfg.batch_size // machine.size, 8192 // cfg.context)))
        seconds = timed_steps(model, batches, loss_fn, quick, options, seconds=0.3 if cfg.smoke else 2.5)
        text = " (a step takes too long to try others)"
        if seconds:
            rates = {option: quick.batch_size * cfg.context / statistics.fmean(seconds[option]) for option in options}
            best, text = max(rates, key=rates.get), "; ".join(f"{sample.threads_of(n)}: " + ", ".join(
                f"{str(t)[6:]} {rates[n, t]:,.0f} tokens/s" for t in dtypes) for n in counts)
            text = f" (steps were timed: {text})"
    count, dtype = from_first(best)
    threads.use(count)
    say(machine, f"device cpu, {sample.threads_of(count)}" + f", {machine.size} processes" * (machine.size > 1) +
        f"; {str(dtype)[6:]}{text}")
    return machine._replace(dtype=dtype, threads=threads)


def say(machine, text):
    if machine.rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def in_dtype(machine):
    """A context whose products are made in the machine's number type; weights stay float32."""
    return torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)


def to_device(batch, device):
    return type(batch)(*(None if t is None else t.to(device, non_blocking=True) for t in batch))


def all_sum(machine, tensor):
    """The sum of a tensor over all processes."""
    if machine.size > 1:
        tensor = tensor.to(machine.device)
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
    """What the first process has for `value`."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def agree(machine, settings):
    """Raises UserError if the dict `settings` is not the same in all processes."""
    all_settings = [settings] * machine.size
    if machine.size > 1:
        dist.all_gather_object(all_settings, settings)
    values = {name: dict.fromkeys(str(s.get(name)) for s in all_settings) for name in settings}
    if differ := [f"{name} ({' and '.join(v)})" for name, v in values.items() if len(v) > 1]:
        raise UserError(f"the processes were started with different {', '.join(differ)}: give all the same command, "
                        "data and files")


@contextlib.contextmanager
def one_voice():
    """Several processes end with one message, exit code 2 and no traceback, be it that one of them is gone."""
    try:
        yield
    except (UserError, KeyboardInterrupt, RuntimeError) as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        if isinstance(error, RuntimeError):
            if not (isinstance(error, dist.DistError) or re.search("gloo|by peer", str(error))):
                raise
            error = UserError("another process of this run is gone: the same command with --resume goes on from the "
                              "last save")
        with contextlib.suppress(Exception):                                 # torchrun's store outlives the processes
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  timeout=datetime.timedelta(seconds=5))
            if store.add("said in try " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), 1) > 1:
                time.sleep(1)                            # torchrun ends all when the first ends: let the other speak
                sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
        raise error from None


def launch():
    """Names a start of torchrun, the same in all its tries (--max-restarts); "" without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"process {os.getppid()}" if run_id == "none" else run_id


def is_next_try(out):
    """Whether torchrun has started this process again to go on with OUT/last."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and read_state(out)["launch"] == launch()


def shard(forward, machine):
    """Leaves each process 1/size of every tensor (FSDP: Zhao et al., 2023). A block is whole while it runs; what is in
    no block, as the head that losses read, from the beginning of forward() to the end of its backward pass."""
    from torch.distributed.fsdp import fully_shard                           # here, as it takes most of a second
    mesh = dist.init_device_mesh(machine.device.type, (machine.size,))
    for module in (*forward.model.model.layers, forward):
        fully_shard(module, mesh=mesh)


def is_sharded(tensor):
    return hasattr(tensor, "placements")                                     # a DTensor


def part(tensor):
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(p, tensor):
    """A tensor that every process holds, sharded as p is."""
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def gathered(x, machine):
    """x, a tensor or a dict that has some, with sharded ones whole: on the first process's CPU; for others None."""
    if isinstance(x, dict):
        return {k: gathered(v, machine) for k, v in x.items()}
    if not is_sharded(x):
        return x
    x = x.full_tensor()                                                      # all processes take part
    return x.cpu() if machine.rank == 0 else None


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


def linear_cross_entropy(x, weight, targets):
    """Sum of cross_entropy(x @ weight.T, targets): x (N, C), weight (V, C), targets (N,) with IGNORE where nothing is
    learned."""
    def chunk(logits, rows):
        if in_c(logits, None):
            losses = logits.new_empty(len(logits))
            if call("cross_entropy", logits, targets[rows].contiguous(), *logits.shape, losses):
                raise IndexError(f"targets are not all ids below {len(weight)}")
            return losses.sum(), logits
        t = targets[rows, None]
        keep, t = (t != IGNORE).float(), t.clamp(min=0)
        top, right = logits.amax(1, keepdim=True), logits.gather(1, t)
        probs = logits.softmax(1)
        log_sum = top - probs.amax(1, keepdim=True).log()                        # log(sum(exp(logits))), never log(0)
        probs.scatter_add_(1, t, torch.full_like(keep, -1.0))                        # d loss / d logits = p - one-hot
        return ((log_sum - right) * keep).sum(), probs if keep.all() else probs * keep
    return ThroughHead.apply(x, weight, chunk)


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
                    updates = orthogonalize_shards(updates, (len(params), rows, columns), params[0].device_mesh,
                                                   self.iterations)
                else:
                    updates = orthogonalize(updates, self.iterations)                            # (n, rows, columns)
                weights = [part(p) for p in params]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.to(params[0].dtype)),
                                    alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize_shards(rows, shape, mesh, iterations):
    """orthogonalize for matrices (n, rows, columns) = shape of which each process of a mesh holds some rows: they
    change hands, so that each has some matrices whole, and back. The work is shared, too."""
    from torch.distributed.tensor import DTensor, Shard

    def turned(parts, dim):
        stride = (shape[1] * shape[2], shape[2], 1)
        whole = DTensor.from_local(parts.contiguous(), mesh, [Shard(dim)], shape=torch.Size(shape), stride=stride)
        return whole.redistribute(placements=[Shard(1 - dim)]).to_local()
    return turned(orthogonalize(turned(rows, 1), iterations), 0)


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


def share_done(step, total, origin=(0, 0.0)):
    """The share of a run's schedule that is behind `step` steps of `total`. origin: (step, share) at which the total
    was last changed while the learning rate was falling: it falls on from there, faster or more slowly."""
    begun, share = origin
    return share + (1 - share) * (step - begun) / (total - begun)


def evaluations(step, total, origin, cfg):
    """How many of a run's evaluations are due by a step."""
    return int(share_done(step, total, origin) * cfg.evals + 1e-9) if total else 0


def new_origin(step, planned, total, origin, falling):
    """The origin of a run of `planned` steps that has `total` from now on. Where the rate falls, or would jump down, it
    goes on from where it is; where it has not fallen yet, a longer run is one of that length from the beginning."""
    return (step, share_done(step, planned, origin)) if planned and (falling or total < planned) else origin


# ---------------------------------------------------------------------------------------------------------------------
# The loop

PLANNED = 13                          # the step after which a time budget first becomes steps: the first are slower


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


def memory_of_machine():
    """Bytes of memory; infinite where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


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
    out, device, fsdp = Path(cfg.out), machine.device, cfg.fsdp and machine.size > 1
    check_memory(model, cfg, machine)
    ddp = machine.size > 1 and not fsdp
    agree(machine, {**dataclasses.asdict(cfg), **entry})
    scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16)
    parents, entry = list(model.history), dict(entry)
    step, total, seconds, tokens_seen, best, origin, again = 0, cfg.steps, 0.0, 0, math.inf, (0, 0.0), {}
    if cfg.resume:
        state = read_state(out)
        if cfg.steps in (0, state["total"]):                                 # what the clock decided is decided again
            again = {line["step"]: line for line in read_log(out / "log.jsonl") if line["step"] > state["step"]}
        origin = tuple(state["origin"])
        step, total, seconds = state["step"], cfg.steps or state["total"], state["seconds"]
        tokens_seen, best = state["tokens"], state["best"]
        scaler.load_state_dict(state["scaler"])
        if isinstance(loss_fn, nn.Module):
            loss_fn.load_state_dict(state["loss"])
        parents, its = parents[:-1], parents[-1]                             # the last entry is this run's own
    forward = ModelAndLoss(model, loss_fn)
    if fsdp:
        shard(forward, machine)
    optimizers = make_optimizers(model, loss_fn, cfg)
    if cfg.resume:
        check_state(state, optimizers, out)
    for o, s in zip(optimizers, state["optimizers"] if cfg.resume else ()):
        params = [p for g in o.param_groups for p in g["params"]]
        for i, kept in s["state"].items() if fsdp else ():                   # files hold whole tensors
            kept.update({k: sharded_like(params[i], v) for k, v in kept.items() if v.shape == params[i].shape})
        o.load_state_dict({**s, "param_groups": o.state_dict()["param_groups"]})     # what --resume was given holds
    model.model.checkpoint = cfg.checkpoint_activations
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = cfg.dropout
    positions, products = cfg.batch_size * cfg.context, (products_rate(machine), machine.threads.count)    # a step's
    if cfg.compile:
        for module in model.model.layers if fsdp else (model,):
            module.compile()                                                 # in place: no prefix in the state dict
        try:                                                                 # errors come with the first real step
            with in_dtype(machine):
                forward(to_device(batches(0, rows_at_once(cfg, machine)), device))[0].backward()
            forward.zero_grad(set_to_none=True)
        except Exception as error:
            raise UserError(f"--compile does not work here ({type(error).__name__}): leave it out, or install a C++ "
                            "compiler that torch.compile finds") from None
    if ddp:
        forward = nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
    log = Log(out / "log.jsonl", step, machine, cfg)
    wanted = Interrupt()

    def state_of():
        return dict(step=step, total=total, seconds=seconds, tokens=tokens_seen, best=best, scaler=scaler.state_dict(),
                    optimizers=[gathered(o.state_dict(), machine) for o in optimizers], config=dataclasses.asdict(cfg),
                    loss=gathered(loss_fn.state_dict(), machine) if isinstance(loss_fn, nn.Module) else {},
                    launch=launch(), origin=list(origin), threads=machine.threads.count, dtype=str(machine.dtype)[6:])

    def keep(name, **figures):
        nonlocal saves
        finite = all(part(p).isfinite().all() for p in model.parameters())   # or the last update was one too large
        if all_sum(machine, torch.tensor(float(not finite))):
            diverged("model")
        saves += 1
        model.history = parents + [{**entry, "steps": step, "tokens": tokens_seen, "seconds": round(seconds, 1),
                                    **figures}]
        weights, state = gathered(model.state_dict(), machine), state_of() if name == "last" else None
        if machine.rank == 0:
            save(model, out / name, tokenizer,
                 state and (lambda new: torch.save(state, new / "training_state.pt")), weights)
            log.keep()
            if saves == 1 and name == "last" and not math.isfinite(best):    # what --overwrite replaces was kept so far
                remove(out, "best")

    def diverged(what):
        raise UserError(f"the {what} is not finite after step {step}" +
                        (f"; the last good checkpoint is {out / 'last'}" if saves else "") +
                        ": lower --lr, --embed-lr and --matrix-lr, or use --dtype float32")

    model.train()
    figures, durations, since, overflows, saves = {}, collections.deque(maxlen=100), (0, 0.0), 0, int(cfg.resume)
    passed = evaluations(step, total, origin, cfg)
    learned, before = [0.0, 0], (math.inf, math.inf)     # since the last evaluation: loss, tokens; its two losses
    saved = shown = time.perf_counter()
    if cfg.resume and its.get("val_loss") == best and best_loss(out) != best:            # a kill came between two saves
        keep("best", **{k: v for k, v in its.items() if k.startswith("val_")})
    if total and step >= total:
        say(machine, f"{out} is at step {step} of {total} already: --steps N goes on")
    elif cfg.resume and total != state["total"]:
        say(machine, f"from step {step} on, the learning rate is that of a run of {total} steps")
    bar = tqdm(total=total or None, initial=step, desc="training", unit="step", dynamic_ncols=True,
               disable=None if machine.rank == 0 else True)                  # None: off where there is no terminal
    if total and reading:
        say(machine, f"{total:,} steps{readings(total, positions, reading)}")
    while not total or step < total:
        start = time.perf_counter()
        factor = lr_at(step, total or 10 ** 9, cfg, origin)
        for o in optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak"] * factor
        threads = machine.threads.count
        if len(machine.threads.options) > 1 and again.get(step + 1, {}).get("threads", threads) != threads:
            machine.threads.use(threads := again[step + 1]["threads"])
        loss, count, norm, metrics = train_step(step, forward, batches, optimizers, scaler, cfg, machine)
        if not math.isfinite(loss):
            diverged("loss")
        # float16 overflows now and then: the scaler halves its scale, and no optimizer steps. Not for ever, though.
        overflows = 0 if math.isfinite(norm) else overflows + 1
        if overflows > (30 if scaler.is_enabled() else 0):
            diverged("gradient")
        if after_step is not None:
            after_step(model)
        synchronize(device)
        step, tokens_seen, taken = step + 1, tokens_seen + count, time.perf_counter() - start
        seconds += taken
        durations.append(taken)
        planned, fell = total, is_falling(step, total, origin, cfg)
        if step in again:
            total = again[step].get("total", total)
        elif not cfg.steps and is_due(step, total, fell, cfg):
            a_step = statistics.fmean(list(durations)[-40:]) if fell else statistics.median(durations)
            total = plan(step, total, seconds, a_step, eval_cost, cfg, machine, origin if fell else None)
        if total != planned:
            origin = new_origin(step, planned, total, origin, fell)
            bar.total = total
            bar.refresh()
            if reading and not planned:
                say(machine, f"{total:,} steps{readings(total, positions, reading)}")
        if step + 1 not in again and (sentence := machine.threads.note(taken)):
            say(machine, f"step {step}: {sentence}")
        loss /= max(count, 1)
        rate, since = positions / taken, (since[0] + 1, since[1] + taken)
        log.write(step=step, loss=loss, lr=factor, grad_norm=norm, tokens=tokens_seen, seconds=round(seconds, 3),
                  tokens_per_second=round(rate), total=total, threads=threads,
                  **{k: v / max(count, 1) for k, v in metrics.items()})
        learned = [learned[0] + loss * count, learned[1] + count]
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        bar.update()
        if bar.disable and time.perf_counter() - shown > 30:                 # a file or a pipe has lines instead
            shown = time.perf_counter()
            say(machine, f"step {step}" + f" of {total}" * bool(total) + f": loss {loss:.3f}, {rate:,.0f} tokens/s")
        due = machine.rank == 0 and time.perf_counter() - saved > cfg.save_seconds
        stop, due = map(bool, all_sum(machine, torch.tensor([float(wanted.stop), float(due)])))
        passed, before_it = evaluations(step, total, origin, cfg), passed
        if total and (step == total or passed > before_it):
            start = time.perf_counter()
            if fsdp:
                forward.unshard()                                            # what is in no block
            figures = evaluate(model)
            if fsdp:
                forward.reshard()
            val = {"val_" + k: v for k, v in figures.items()}
            seconds += time.perf_counter() - start
            if not math.isfinite(figures["loss"]):
                diverged("validation loss")
            log.write(step=step, tokens=tokens_seen, seconds=round(seconds, 3), **val)
            rate, since = since[0] * positions / since[1], (0, 0.0)
            busy = 3 * model.flops_per_token(cfg.context) * rate / products[0] / machine.size
            mean = learned[0] / max(1, learned[1])
            say(machine, f"step {step} of {total}, {seconds:.0f} s: loss {mean:.4f} in training, {figures['loss']:.4f} "
                f"in validation, perplexity {figures['perplexity']:.2f}, {figures['bits_per_byte']:.4f} bits per byte; "
                f"{rate:,.0f} tokens/s" + f", {busy:.0%} of the matmul rate" * (machine.threads.count == products[1]))
            if figures["loss"] > before[1] and mean < before[0]:
                say(machine, "the validation loss rises while the training loss falls: the model learns its text by "
                    f"heart. {out / 'best'} keeps the model with the lowest validation loss; more text, fewer steps or "
                    "--dropout 0.1 help")
            before, learned = (mean, figures["loss"]), [0.0, 0]
            improved, best = figures["loss"] < best, min(best, figures["loss"])
            keep("last", **val)                                              # first: a kill in between loses nothing
            if improved:
                keep("best", **val)
            saved = time.perf_counter()
        elif stop or due:
            keep("last")
            saved = time.perf_counter()
        if stop and step != total:
            bar.close()
            log.close()
            say(machine, f"stopped at step {step}; {out / 'last'} holds everything. Go on with "
                f"{Path(sys.argv[0]).name} --resume and the same --out")
            raise KeyboardInterrupt
    bar.close()
    log.close()
    wanted.restore()
    return figures


def check_state(state, optimizers, out):
    """Raises UserError if the optimizers' state of a run that goes on is not that of its model."""
    fits = len(state["optimizers"]) == len(optimizers)
    for o, s in zip(optimizers, state["optimizers"]):
        params = [p for g in o.param_groups for p in g["params"]]
        kept = s.get("state") if isinstance(s.get("state"), dict) else {None: None}
        fits = fits and all(i in range(len(params)) and isinstance(its, dict) and all(
            not torch.is_tensor(t) or t.ndim == 0 or t.shape == params[i].shape for t in its.values())
            for i, its in kept.items())
    if not fits:
        raise UserError(f"training_state.pt in {out / 'last'} belongs to another model: start a new run with "
                        f"--init-from {out / 'last'}")


def best_loss(out):
    """The validation loss of OUT/best by its history; None if there is none."""
    file = out / "best" / "config.json"
    history = read_config(out / "best").get("history") if file.is_file() else None
    return history[-1].get("val_loss") if history else None


def remove(out, *names):
    """Deletes models of the run in OUT: best and last, or one of them, and what a kill left beside them."""
    for name in names or ("best", "last"):
        for place in (out / name, *(out / (form.format(name)) for form in (".{}.new", ".{}.old", "{}.new", "{}.old"))):
            remove_tree(place)


def readings(total, positions, reading):
    """How often `total` steps read the training text, as the end of a sentence."""
    times = total * positions / reading
    return f": the training text is read {times:.{1 if times >= 1 else 2}f} times"


def is_falling(step, total, origin, cfg):
    """Whether the learning rate of the step before this one was below that of the one before it (origin: see fit)."""
    return total > 0 and (cfg.schedule == "cosine" or origin[0] > 0 or step - 1 >= (1 - cfg.decay) * total)


def is_due(step, total, falling, cfg):
    """Whether a time budget becomes another number of steps after this step: when steps have settled; when the rate
    begins to fall, as until then runs of any length are the same; and every 40 steps while it falls."""
    if not total:
        return step >= PLANNED
    return step % 40 == 0 if falling else step >= (1 - cfg.decay) * total


def plan(step, total, seconds, step_seconds, eval_cost, cfg, machine, origin=None):
    """Steps that fit the time budget, of which `seconds` have passed; the same number on every process. `total`, what
    was planned before, stays if it is right to 2 %, or while the rate falls (`origin`) to 8 % of the budget."""
    for evals in range(cfg.evals - (evaluations(step, total, origin, cfg) if origin else 0), 0, -1):
        steps = max(step + 1, int(step + (60 * cfg.minutes - seconds) / step_seconds - evals * eval_cost))
        if origin or evals == cfg.evals - evaluations(step, steps, (0, 0.0), cfg):
            break
    steps = from_first(steps)
    if total and abs(steps - total) <= max(1, 0.02 * total if origin is None else 5 * cfg.minutes / step_seconds):
        return total
    say(machine, f"step {step}: {cfg.minutes:g} minutes are {steps:,} steps of {1000 * step_seconds:.0f} ms")
    return steps


class Interrupt:
    """Turns the first Ctrl-C (or a cluster's SIGTERM) into a wish to stop after the step; the next stops at once."""
    def __init__(self):
        self.stop, self.before = False, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):                            # not in the main thread: leave it alone
                self.before[s] = signal.signal(s, self.on_signal)

    def on_signal(self, *_):
        self.stop = True
        self.restore()

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Log:
    """log.jsonl and, if asked for, Weights & Biases. On resume it is cut back to the step that goes on."""
    def __init__(self, path, step, machine, cfg):
        self.file = self.wandb = None
        if machine.rank:
            return
        if cfg.wandb:
            try:
                import wandb
                self.wandb = wandb.init(project=cfg.wandb, name=path.parent.name, config=dataclasses.asdict(cfg))
            except Exception as error:
                raise UserError(f"--wandb {cfg.wandb} failed ({error}): install wandb and run wandb login, set "
                                "WANDB_MODE=offline, or leave the flag out") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        before = [line for line in read_log(path) if line["step"] <= step] if step else []
        other = not step and path.exists()                                   # the log of a run that is to be replaced
        self.path = path.with_name(path.name + ".new") if other else path
        with replacing_file(self.path) as new:                               # a kill must not cost the curve so far
            new.write_text("".join(json.dumps(line) + "\n" for line in before), encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8")

    def keep(self):
        """With the first save of a new run its log takes the place of an old run's."""
        if self.file and self.path.name == "log.jsonl.new":
            self.file.close()
            self.path = self.path.replace(self.path.with_name("log.jsonl"))
            self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **line):
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_log(path):
    """The lines of log.jsonl; a last one that a kill cut short is left out."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


STATE = {"step": (int, 0, 2 ** 48), "total": (int, 0, 2 ** 48), "tokens": (int, 0, 2 ** 62),
         "seconds": (float, 0, 1e12), "best": (float,), "optimizers": ([dict],), "scaler": (dict,), "config": (dict,),
         "threads": (int, 0, 2 ** 20), "dtype": (str,), "launch": (str,)}


def read_state(out):
    """training_state.pt of OUT/last. Raises UserError if it is not there or not whole."""
    file = whole(Path(out) / "last") / "training_state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        check_values(state, STATE, file, needed=[name for name in STATE if name not in ("launch", "threads", "dtype")])
        kept = {"launch": "", "origin": (0, 0.0), "threads": 0, "dtype": ""}      # runs of before do not say
        return {k: state.get(k, v) for k, v in kept.items()} | {k: state[k] for k in (
            "step", "total", "seconds", "tokens", "best", "scaler", "optimizers", "config", "loss")}
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no training_state.pt, so it cannot be resumed: start a new run with "
                        f"--init-from {file.parent}") from None
    except Exception as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): start a new run with --init-from "
                        f"{file.parent}") from None


def picture(out):
    """Draws loss.png from log.jsonl."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("loss.png is skipped: matplotlib is not installed")
        return
    lines = read_log(out / "log.jsonl")
    train = [(l["tokens"], l["loss"]) for l in lines if "loss" in l]
    val = [(l["tokens"], l["val_loss"]) for l in lines if "val_loss" in l]
    if not val:
        return
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(*zip(*train), color="0.85", linewidth=0.8, label="training, a step")
    n = max(1, len(train) // 50)
    smooth = [(train[i + n - 1][0], statistics.fmean(l for _, l in train[i:i + n]))
              for i in range(0, len(train) - n + 1, n)]
    ax.plot(*zip(*smooth), color="0.4", label=f"training, mean of {n}")
    ax.plot(*zip(*val), "o-", color="tab:blue", label="validation")
    ax.set(xlabel="tokens learned", ylabel="loss (nats per token)",
           title=f"{out.name}: validation loss {val[-1][1]:.3f}")
    ax.set_ylim(min(min(l for _, l in train), min(l for _, l in val)) - 0.1, None)
    ax.legend(loc="upper right")
    ax.grid(alpha=0.3)
    with replacing_file(out / "loss.png") as new:
        fig.savefig(new, dpi=120, format="png")
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def open_model(cfg, given, tokenizer, machine):
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
        if sample.tokenizer_of(model, path).hash != tokenizer.hash:
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


def resumed(cfg, given):
    """The config of the run in cfg.out, with the flags that were given. Raises UserError if they change the model."""
    stored, given = read_state(cfg.out)["config"], () if is_next_try(cfg.out) else given
    for f in dataclasses.fields(cfg):
        if f.name in stored and type(stored[f.name]) is not type(f.default) and type(stored[f.name]) is not int:
            raise UserError(f"training_state.pt in {cfg.out} has {f.name} = {stored[f.name]!r}: start a new run")
    if stored.keys() - vars(cfg).keys():
        raise UserError(f"the run in {cfg.out} was begun by another script, such as distill.py: resume it with that")
    if "minutes" in given:
        raise UserError("--minutes plans a new run; to go on beyond this one's last step give --steps")
    for name in (*SHAPE, "preset", "data", "init_from", "vocab_size", "context", "batch_size", "optimizer", "seed"):
        if name in given and getattr(cfg, name) != stored[name]:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {cfg.out} has "
                            f"{stored[name]}: leave the flag out, or give another --out")
    return type(cfg)(**{**stored, **{name: getattr(cfg, name) for name in given}, "out": cfg.out, "resume": True,
                        "fsdp": cfg.fsdp})


BEGUN = {"best", "last", "cache", "control", "samples", "samples.jsonl", "log.jsonl.new"}


def is_saved(directory):
    """Whether best/ or last/ of a run is there, or was when a save was killed."""
    return any((place / "config.json").is_file() for place in (directory, beside(directory, "new"),
                                                               beside(directory, "old")))


def check_out(cfg):
    """Sets cfg.resume to whether the run in OUT goes on. Raises UserError if the run may not be written there.

    In torchrun's next try of the run that OUT/last holds (--max-restarts) it does, whatever the flags say.
    """
    out = Path(cfg.out)
    if out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} is a {'file' if out.is_file() else 'model'}, not a run's directory: give another "
                        "--out")
    for d in ("best", "last"):
        refuse_foreign(out / d, MODEL)
    last, held = is_saved(out / "last"), is_saved(out / "last") or is_saved(out / "best")
    for file in sorted(out.iterdir()) if out.is_dir() and not held else ():             # of a run before its first save
        log = file.name in ("log.jsonl", ".log.jsonl.new") and (not file.stat().st_size or read_log(file))
        if not log and not is_ours(file.name, BEGUN):
            raise UserError(f"--out {out} holds {file.name}, which is no part of a run: give another --out")
    if last and is_next_try(out):
        cfg.resume, cfg.overwrite = True, False
    if held and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{out} holds a model already: go on with --resume, replace it with --overwrite, or give "
                        "another --out")
    if cfg.init_from and not cfg.resume and whole(cfg.init_from).resolve().parent == out.resolve():
        raise UserError(f"--init-from {cfg.init_from} is the run that --out {out} would replace: give another --out")
    if cfg.resume and not held:
        cfg.resume = False
        if os.environ.get("RANK", "0") == "0":
            print(f"nothing is saved in {out} yet: starting from the beginning")
    if cfg.resume and os.environ.get("RANK", "0") == "0":
        settle(out / "best", MODEL), settle(out / "last", MODEL)
        for d in ("best.new", "best.old", "last.new", "last.old"):            # a kill of an older version left them
            if (out / d).is_dir() and (out / d.split(".")[0] / "config.json").exists():
                remove_tree(out / d)


def open_data(cfg, given, machine):
    """The directory of prepared data; a known corpus that is missing is prepared, by one process for all."""
    if machine.rank == 0 and find(cfg.data, cfg.smoke) is None:
        prepare(cfg.data, vocab_size=cfg.vocab_size, smoke=cfg.smoke)
    if machine.size > 1:
        dist.barrier()
    if (directory := find(cfg.data, cfg.smoke)) is None:
        raise UserError(f"the data {cfg.data} is on the first machine only: prepare or copy it on this one too")
    meta = read_meta(directory)
    ids = meta["vocab_size"]
    if Tokenizer.load(directory).hash != meta["tokenizer_hash"]:
        raise UserError(f"{directory}: tokenizer.json is not the one that the data was prepared with: prepare it anew")
    if "vocab_size" in given and cfg.vocab_size != ids:
        raise UserError(f"--vocab-size is {cfg.vocab_size}, but {cfg.data} was prepared with {ids} ids: prepare it "
                        "anew with data/prepare.py --vocab-size, or leave the flag out")
    return directory


def history_entry(cfg, meta, tokenizer, model):
    """What config.json will say of this run. Raises UserError if a resumed run's data is not what it was."""
    if cfg.resume:
        entry = model.history[-1] if model.history else {}
        if "data_sha256" not in entry:
            raise UserError(f"the model in {cfg.out} does not say what it learned: start a new run with --init-from "
                            f"{cfg.out}")
        if entry["data_sha256"] != meta["sha256"]:
            raise UserError(f"the data {cfg.data} is not what this run began with: prepare that again, or start a new "
                            f"run with --init-from {cfg.out}")
        return {k: v for k, v in entry.items() if not k.startswith("val_")}
    entry = {"step": "train", "data": meta["name"], "data_sha256": meta["sha256"], "tokenizer": tokenizer.hash[:16],
             "seed": cfg.seed, "batch_size": cfg.batch_size, "context": cfg.context}
    if cfg.init_from:
        entry["parent"] = {"name": model_name(cfg.init_from), "sha256": checkpoint_hash(cfg.init_from)}
    return entry


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


def show_example(machine, tokenizer, batch):
    """Prints the last example of a window, so that a wrong mask or template is seen before it costs an hour."""
    its = batch.segments[0] == batch.segments[0].max()
    ids, targets = batch.ids[0][its], batch.targets[0][its]
    first = int((targets != IGNORE).int().argmax())
    short = lambda text: text if len(text) < 500 else f"{text[:300]} [...] {text[-100:]}"
    text = lambda ids: short(tokenizer.decode_bytes(ids.tolist()).decode("utf-8", errors="replace"))
    say(machine, f"An example. What is read only:\n{text(ids[:first + 1])}\nWhat is learned:\n"
        f"{text(targets[targets != IGNORE])}\n")


def show_sample(cfg, machine, tokenizer, val):
    """Prints how the best model goes on from the beginning of the validation text (or the first example's prompt)."""
    model, opening = load(Path(cfg.out) / "best", machine.device), 64
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


def show_scale(cfg, tokenizer, val):
    """Prints what bits per byte mean, by a general compressor on the beginning of the same validation text."""
    text = tokenizer.decode_bytes(val.tokens[:2 ** 18].tolist())
    squeezed = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(text))
    made = read_config(whole(cfg.out))["history"][-1]
    print(f"bits per byte: 8 where nothing is known, {squeezed:.2f} by xz -9e on {len(text) / 1e6:.1f} MB of this "
          f"validation text, {made['val_bits_per_byte']:.2f} by this model; {Path(cfg.out) / 'loss.png'} has the curve")


@one_voice()
def main(argv=None):
    cfg, given = parse(TrainConfig, __doc__, argv)
    out = Path(cfg.out)
    check_out(cfg)
    if cfg.resume:
        cfg = resumed(cfg, given)
    check(cfg)
    machine = set_up(cfg)
    directory = open_data(cfg, given, machine)
    tokenizer = Tokenizer.load(directory)
    model = open_model(cfg, given, tokenizer, machine)
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
