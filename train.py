"""Trains a model on next-token prediction: from scratch, or further from a model directory.

    python train.py                                        # on Python's standard library, into out/
    python train.py --data NAME_OR_DIR --out DIR           # on data prepared by data/prepare.py
    python train.py --out DIR --resume                     # continues a run, on a CPU bit for bit
    python train.py --data NAME_OR_DIR --init-from DIR --out DIR2                # fine-tuning
    python train.py --data faq --mix stdlib:0.3 --init-from out --out out-faq    # forgets less
    torchrun --nproc_per_node 8 train.py --batch-size 64   # data parallel; with --fsdp, sharded

A run's directory holds two models, best/ (lowest validation loss) and last/ (with the state that
--resume needs), log.jsonl (one line per step) and loss.png. fit() below is the only optimizer loop
of this project; distill.py and compress.py call it.
"""
import collections, contextlib, copy, dataclasses, itertools, math, os, shlex
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
from torch import nn

import sample
from data import UserError
from data.chat import speak
from data.checkpoints import find_model, tokenizer_of
from data.console import flags_of, run
from data.loader import IGNORE, Windows, read_meta
from data.machine import (DTYPES, accelerate, fastest, in_dtype, in_turns, logits_at_once, prepared, require_memory,
                          set_up, to_device)
from data.mixture import Mixture, open_mix
from data.prepare import find
from data.processes import (agree, all_sum, clip_gradients, local_part, on_whole_matrices, one_voice, say,
                            summed_gradients, unsharded)
from data.report import picture
from data.runs import SHAPE, Run, check_out, history_entry, open_data, read_state, resumed
from data.schedule import AUTO, share_done
from data.screen import opening, show_example, show_scale, show_sizes
from data.tokenizer import Tokenizer
from model import Config, QuantLinear, Transformer, load, save


# ---------------------------------------------------------------------------------------------------------------------
# Config

@dataclasses.dataclass
class TrainConfig:
    """Settings of a training run. Each field is a flag; the comment is the --help text."""
    # files
    data: str = "stdlib"            # prepared data: a name under data/, or a directory
    mix: str = ""                   # a share of the windows from other data: NAME_OR_DIR:SHARE, several with commas
    out: str = "out"                # the run's directory: best/, last/, log.jsonl, loss.png
    resume: bool = False            # continue from OUT/last with the settings of that run
    init_from: str = ""             # start from this model directory instead of random weights (fine-tuning)
    overwrite: bool = False         # replace the run in OUT
    # the model (with --init-from, the shape of that model)
    layers: int = 4                 # transformer blocks
    width: int = 96                 # channels of the residual stream
    heads: int = 0                  # query heads; 0: one per 32 channels of width
    kv_heads: int = 0               # key-value heads; 0: equal to heads
    head_dim: int = 0               # channels per head; 0: width / heads
    ffn: int = 0                    # neurons per MLP; 0: 3 x width
    tie: bool = False               # one matrix for the embedding and the output head
    vocab_size: int = 4096          # size of the vocabulary, if `stdlib` must be prepared first
    context: int = 256              # tokens per window
    # optimization
    preset: str = ""                # hour or gpu: settings for an hour on a laptop, or on one large GPU
    minutes: float = 5.0            # time budget, evaluation included; converted to steps before the rate decays
    steps: int = 0                  # number of steps; 0: from the time budget
    batch_size: int = 4             # windows per step, over all processes
    micro_batch: int = 0            # windows per forward pass of a process, for gradient accumulation; 0: all at once
    optimizer: str = "muon"         # muon (Muon for matrices, AdamW for the rest) or adamw (AdamW for all)
    lr: float = 0.015               # peak learning rate of the output head and of vectors
    embed_lr: float = 0.15          # peak learning rate of the embedding (with --tie: --lr)
    matrix_lr: float = 0.02         # peak learning rate of matrices (with --optimizer adamw: 0.003)
    weight_decay: float = -1.0      # of matrices; head, embedding: as much a step; -1: by how often the text is read
    beta1: float = 0.5              # AdamW: low, because most rows of an embedding have no gradient in a step
    beta2: float = 0.99             # AdamW: decay of the second moment
    momentum: float = 0.9           # Muon: momentum
    newton_schulz: int = 3          # Muon: Newton-Schulz iterations; short runs at high rates gain from 5
    schedule: str = "wsd"           # wsd: constant, then linear to zero; cosine: half a cosine to zero
    warmup: int = 20                # steps of linear warm-up
    decay: float = 0.7              # wsd: share of the run in which the rate decays
    clip: float = 1.0               # gradient clipping: largest norm of all gradients; 0: off
    average: int = -1               # steps over which weights are averaged, for evaluation and best/; -1: likewise
    dropout: float = -1.0           # dropout rate at the end of each attention and MLP layer; -1: likewise
    seed: int = 0                   # seed of initial weights, data order and dropout
    # evaluation and saving
    evals: int = 3                  # evaluations per run, the last one at the end
    eval_tokens: int = 262144       # most validation tokens per evaluation, spread over the split; 0: all
    save_seconds: float = 60.0      # seconds between two saves of last/
    # the machine
    device: str = "auto"            # auto, cuda, cuda:1, mps or cpu
    dtype: str = "auto"             # number type of products: auto, float32, bfloat16 or float16; weights stay float32
    threads: int = 0                # CPU threads; 0: the fastest number, measured at the start and during the run
    native: bool = True             # C kernels on a CPU (data/native.py); --no-native: PyTorch alone
    compile: bool = False           # torch.compile: faster on a GPU; needs a C++ compiler and a minute or two
    checkpoint_activations: bool = False    # recompute each block in the backward pass: less memory for long contexts
    fsdp: bool = False              # under torchrun: shard weights and optimizer state over the processes
    wandb: str = ""                 # log to this Weights & Biases project (WANDB_MODE=offline works)
    smoke: bool = False             # quick test: a tiny model, a slice of the data, a few steps


ADAMW = dict(matrix_lr=0.003, beta1=0.9)
# Fine-tuning: small steps of all weights keep the knowledge of the model.
FINE_TUNE = dict(optimizer="adamw", lr=3e-4, embed_lr=3e-4, matrix_lr=3e-4, beta1=0.9, decay=1.0)
# --init-from: the best step may come early, and many small evaluations find it. set_rates gives the rates.
LEARN_ON = {**FINE_TUNE, "evals": 10, "eval_tokens": 65536}
# More time wants a few more parameters: see tests/bench_train.py scale.
# `gpu` is an hour on one H100 by arithmetic: it has never run. 12 layers of width 768 have 117 million
# parameters in the matrices of the blocks and the head, and cost 760 MFLOP a token of training (6 x 117,
# and attention). At 38 % of a product's rate (790 TFLOP/s in bfloat16) that is 400,000 tokens/s, 1.4
# billion in the hour, 12 for each of these parameters: nanochat measured that as the best at this size.
# (The fit to the six small runs in README.md would say 12 million parameters, but it has seen sizes from
# 0.7 to 2.6 million only: too far away.) The batch of 2^19 tokens and the learning rates are nanochat's
# for this size, too. 64 windows at once take about 30 GB.
PRESETS = {
    "hour": dict(minutes=60.0, width=128, context=512, evals=10),
    "gpu": dict(minutes=60.0, layers=12, width=768, heads=12, vocab_size=32768, context=1024, batch_size=512,
                micro_batch=64, lr=0.008, embed_lr=0.3, beta1=0.8, momentum=0.95, newton_schulz=5, warmup=40, evals=10,
                save_seconds=600.0, compile=True)}
LEAST_TEXT = 50_000_000                 # training tokens for `gpu`: it reads text of this size 29 times
SMOKE = dict(steps=6, layers=2, width=32, heads=2, context=64, batch_size=4, evals=2, eval_tokens=2048, warmup=2)

CHOICES = dict(optimizer=("muon", "adamw"), schedule=("wsd", "cosine"), dtype=tuple(DTYPES))
LIMITS = (                                              # (rule, test, names of the settings)
    ("be at least 1", lambda x: 1 <= x < math.inf, "layers width context batch_size evals newton_schulz"),
    ("be at least 0", lambda x: 0 <= x < math.inf, "heads kv_heads head_dim ffn steps micro_batch warmup lr embed_lr "
                                                   "matrix_lr clip seed eval_tokens save_seconds"),
    ("be at least 0, or -1: chosen", lambda x: 0 <= x < math.inf or x == AUTO, "weight_decay average"),
    ("be at least 0 and below 1", lambda x: 0 <= x < 1, "beta1 beta2 momentum"),
    ("be at least 0 and below 1, or -1: chosen", lambda x: 0 <= x < 1 or x == AUTO, "dropout"),
    ("be between 0 and 1", lambda x: 0 <= x <= 1, "decay"),
    ("be between 0 and 1024", lambda x: 0 <= x <= 1024, "threads"))


def parse(config_class, description, argv=None, positional=(), hidden=()):
    """(config, names of the given flags) of a command line. Raises UserError for a wrong flag."""
    given = flags_of(config_class, description, argv, positional, hidden)
    preset = given.get("preset", "")
    if preset and preset not in PRESETS:
        raise UserError(f"--preset must be {' or '.join(PRESETS)}, not {preset}")
    defaults = {**PRESETS.get(preset, {}), **(ADAMW if given.get("optimizer") == "adamw" else {}),
                **(LEARN_ON if given.get("init_from") else {}), **(SMOKE if given.get("smoke") else {})}
    return config_class(**{**defaults, **given}), set(given)


def require_text(cfg):
    """Raises UserError if --preset gpu is to learn a toy corpus, before that is prepared."""
    if cfg.preset != "gpu" or cfg.smoke or cfg.resume:
        return
    directory = find(cfg.data)
    tokens = read_meta(directory)["splits"]["train"]["tokens"] if directory else 0             # None: it is stdlib
    if tokens < LEAST_TEXT:
        raise UserError(f"--preset gpu reads about 1.4 billion tokens in its hour, and {cfg.data} has far fewer: "
                        "python data/prepare.py fineweb-edu --size 2GB --vocab-size 32768 downloads and prepares more "
                        "(then --data fineweb-edu), or prepare more text of your own (--input DIR --name NAME)")


def heads_of(cfg):
    """Number of query heads."""
    return cfg.heads or max(1, cfg.width // 32)


def check_training(cfg):
    """Raises one UserError that names every setting out of range."""
    wrong = [f"--{name.replace('_', '-')} must be one of {', '.join(options)}"
             for name, options in CHOICES.items() if getattr(cfg, name) not in options]
    wrong += [f"--{name.replace('_', '-')} must {rule}"
              for rule, holds, names in LIMITS for name in names.split() if not holds(getattr(cfg, name))]
    if cfg.steps == 0 and not 0 < cfg.minutes < math.inf:
        wrong.append("--steps or --minutes must be above 0")
    if not cfg.init_from and cfg.head_dim == 0 and cfg.width % heads_of(cfg):
        wrong.append(f"--width ({cfg.width}) does not divide by --heads ({heads_of(cfg)})")
    if cfg.fsdp and "RANK" not in os.environ:
        wrong.append("--fsdp shards the model over processes: start them with torchrun --nproc_per_node N")
    if wrong:
        raise UserError("; ".join(wrong))


# ---------------------------------------------------------------------------------------------------------------------
# Loss

LEAST_ROWS = 160


class ThroughHead(torch.autograd.Function):
    """Sum of a loss over the logits x @ weight.T + bias, chunk by chunk: the full logits never exist.

    x (N, C), weight (V, C), bias (V,) or None. chunk(logits (rows, V), slice of these rows) returns
    the loss of the rows and the gradient by the logits at once, while the probabilities are still
    in the cache (Wijmans et al., 2024). Logits have the number type of products.

    A chunk has logits_at_once() logits, and at least LEAST_ROWS rows, as each chunk reads and
    writes all of the gradient of weight: with 50,304 ids on a CPU, 41 rows took 1.6 x the time of
    166.
    """
    @staticmethod
    def forward(ctx, x, weight, chunk, bias=None):
        kind = x.device.type                            # autocast does not apply to products with out=
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        loss, grad_x, grad_weight = torch.zeros((), device=x.device), torch.empty_like(x), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        x, weight_cast = x.to(dtype), weight.to(dtype)
        rows = max(LEAST_ROWS, logits_at_once(x.device) // len(weight))
        buffer = x.new_empty(min(rows, len(x)), len(weight))
        for i in range(0, len(x), rows):
            some = x[i:i + rows]                                                     # (rows, C)
            logits = torch.mm(some, weight_cast.T, out=buffer[:len(some)])           # (rows, V)
            logits = logits if bias is None else logits.add_(bias)
            value, grad = chunk(logits, slice(i, i + rows))
            loss, grad = loss + value, grad.to(dtype)
            grad_x[i:i + rows] = grad @ weight_cast
            if dtype == weight.dtype:
                grad_weight.addmm_(grad.T, some)
            else:
                grad_weight += grad.T @ some
            if bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad, None, None if grad_bias is None else grad_bias * grad


def softmax_gradient(logits, targets):
    """(sum of the rows' cross-entropy, gradient by the logits: probabilities minus one-hot).

    logits (N, V), which the gradient may overwrite; targets (N,), IGNORE if unsupervised.
    """
    logits, targets = logits.float(), targets[:, None]                               # targets (N, 1)
    learned, targets = (targets != IGNORE).float(), targets.clamp(min=0)
    top, right = logits.amax(1, keepdim=True), logits.gather(1, targets)
    probs = logits.softmax(1)
    log_sum = top - probs.amax(1, keepdim=True).log()            # log(sum(exp(logits))), never log(0)
    grad = probs.scatter_add_(1, targets, torch.full_like(learned, -1.0))
    whole = grad.device.type == "cpu" and learned.all()          # to ask a GPU would be to wait for it
    return ((log_sum - right) * learned).sum(), grad if whole else grad * learned


def linear_cross_entropy(x, weight, targets, bias=None):
    """Sum of the cross-entropy of x @ weight.T + bias: x (N, C), weight (V, C), targets (N,), bias (V,)."""
    return ThroughHead.apply(x, weight, lambda logits, rows: softmax_gradient(logits, targets[rows]), bias)


def cross_entropy(model, batch):
    """The training loss: (sum of -log p of the targets in nats, number of targets, no metrics)."""
    x = model(batch.ids, segments=batch.segments, head=False).flatten(0, 1)          # (B * T, C)
    head, targets = model.lm_head, batch.targets.flatten()                           # targets (B * T,)
    loss = linear_cross_entropy(x, head.weight, targets, head.bias)
    return loss, (batch.targets != IGNORE).sum(), {}


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Jordan et al., 2024): singular values of about 1.

    Matrices of equal shape are orthogonalized as one batch.
    """
    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, iterations=3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.iterations = iterations

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """Steps n parameters of shape (rows, columns); with FSDP, this process holds a part."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta, grads = [local_part(self.state[p]["momentum"]) for p in params], [local_part(p.grad) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))     # Nesterov, (n, rows, columns)
        updates = on_whole_matrices(lambda x: orthogonalize(x, self.iterations), updates, params[0])
        weights, (rows, columns) = [local_part(p) for p in params], params[0].shape
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.to(params[0].dtype)),
                            alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(x, iterations=3):
    """About U V^T of each x = U S V^T, x (n, rows, columns), by Newton-Schulz iterations.

    The coefficients are Jordan's. Three iterations instead of Jordan's five: after the first 800
    steps of the quick start the loss was the same, and each iteration costs time on a CPU. float32
    there, as bfloat16 is slower on a CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16() if x.is_cuda else x.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT                                                                     # (n, columns, rows)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)            # singular values at most 1
    for _ in range(iterations):                                  # x <- a x + (b A + c A^2) x, where A = x x^T
        A = x @ x.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)     # b A + c A^2
        x = torch.baddbmm(x, polynomial, x, beta=a)              # a x + (b A + c A^2) x
    return x.mT if tall else x


def make_optimizers(model, loss_fn, cfg):
    """[AdamW, Muon], with Muon for the matrices inside the blocks; or [AdamW] for all."""
    matrices, embeddings, vectors, heads = [], [], [], []
    extra = loss_fn.named_parameters() if isinstance(loss_fn, nn.Module) else ()
    for name, p in itertools.chain(model.named_parameters(), extra):
        if not p.requires_grad:
            continue
        if "embed" in name and not model.config.tie_word_embeddings:                 # a tied one is the head, too
            embeddings.append(p)
        elif p.ndim > 1 and ".layers." in name:
            matrices.append(p)
        else:
            (heads if p.ndim > 1 else vectors).append(p)
    groups = [dict(params=embeddings, lr=cfg.embed_lr), dict(params=vectors, lr=cfg.lr, decays=False),
              dict(params=heads, lr=cfg.lr)]
    if cfg.optimizer == "adamw":
        groups.append(dict(params=matrices, lr=cfg.matrix_lr))
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=1e-10, weight_decay=0.0, fused=True)]
    if cfg.optimizer == "muon" and matrices:
        optimizers.append(Muon(matrices, cfg.matrix_lr, cfg.momentum, iterations=cfg.newton_schulz))
    for group in groups_of(optimizers):
        group["peak"] = group["lr"]                              # lr_at gives a share of the peak
    return optimizers


def regularize(forward, optimizers, decay, dropout):
    """Sets the dropout rate, and the weight decay: what a step at the peak rate takes off each weight.

    decay    share of a matrix that it takes, and of the embedding and the head: their rates differ
    """
    for group in groups_of(optimizers):
        group["weight_decay"] = decay / group["peak"] if decay and group.get("decays", True) else 0.0
    for module in forward.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def groups_of(optimizers):
    """The parameter groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


class Average:
    """Moving average of the weights over the last steps (Polyak and Juditsky, 1992).

    weights    [tensor, ...], as model.parameters(); [] while nothing is averaged
    steps      number of steps in it so far
    """
    def __init__(self, model):
        self.model, self.weights, self.steps = model, [], 0

    @torch.no_grad()
    def update(self, horizon):
        """Takes in the present weights. A step counts less the older it is: e times after `horizon`."""
        self.steps = self.steps + 1 if horizon else 0
        if self.steps < 2:
            self.weights = [p.detach().clone() for p in self.model.parameters()] if horizon else []
        else:
            averages, weights = ([local_part(t) for t in ts] for ts in (self.weights, self.model.parameters()))
            torch._foreach_lerp_(averages, weights, 1 / min(horizon, self.steps))

    @contextlib.contextmanager
    def in_place(self):
        """A context in which the model has the averaged weights, if there are any."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for p, average in zip(self.model.parameters(), self.weights):
            p, average = local_part(p), local_part(average)
            now = p.clone()
            p.copy_(average)
            average.copy_(now)


def lr_at(step, total, cfg, origin=(0, 0.0)):
    """Learning rate of a step of `total`, as a share of the peak; origin: see share_done."""
    warm = min(1.0, (step + 1) / (cfg.warmup + 1))
    left = 1.0 - share_done(step, total, origin)
    if cfg.schedule == "cosine":
        return min(warm, 0.5 * (1 + math.cos(math.pi * (1 - left))))
    return min(warm, left / cfg.decay if cfg.decay > 0 else 1.0)                     # wsd


# ---------------------------------------------------------------------------------------------------------------------
# The loop

class ModelAndLoss(nn.Module):
    """Model and loss as one module, so that DDP sees the parameters of the loss, too."""
    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch):
        return self.loss_fn(self.model, batch)


def rows_at_once(cfg, machine):
    """Windows per forward pass of a process: --micro-batch, or the whole share of a step."""
    share = cfg.batch_size // machine.size
    return min(cfg.micro_batch or share, share)


def train_step(step, forward, batches, optimizers, scaler, cfg, machine):
    """One step: accumulates the gradients of a batch, clips them, updates the weights.

    forward: a ModelAndLoss, as `prepared` returns it. Returns (loss summed over supervised tokens,
    number of these tokens, norm of the gradient, sums of the loss's metrics).

    These figures are read after the optimizers are launched, as one tensor: that is the only time a
    step waits for a GPU. If loss or norm is not finite, the weights are spoiled by then: the caller
    ends the run and saves nothing. In float16 the scaler leaves out such updates.
    """
    share = cfg.batch_size // machine.size                                   # windows of this process
    micro, positions = rows_at_once(cfg, machine), cfg.batch_size * cfg.context
    torch.manual_seed(((cfg.seed * 10 ** 9 + step) * 10 ** 4 + machine.rank) % 2 ** 63)         # dropout
    sums = 0.0                                                               # of loss, tokens and metrics
    first = step * cfg.batch_size + machine.rank * share
    for row in range(first, first + share, micro):
        batch = to_device(batches(row, min(micro, first + share - row)), machine.device)
        last = row + micro >= first + share
        with in_dtype(machine), summed_gradients(forward, last):
            loss, count, extra = forward(batch)
            scaler.scale(loss * machine.size / positions).backward()         # DDP takes the mean over processes
        values = (torch.as_tensor(v, device=machine.device) for v in (loss, count, *extra.values()))
        sums = sums + torch.stack([v.detach().float() for v in values])
    sums = all_sum(machine, sums)
    params = [p for group in groups_of(optimizers) for p in group["params"] if p.grad is not None]
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if machine.device.type != "cpu" or sums[1] != positions:                 # masked prompts, padding
        torch._foreach_mul_([local_part(p.grad) for p in params], positions / sums[1].clamp(min=1))
    norm = clip_gradients(params, cfg.clip or math.inf)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    loss, count, *values, norm = torch.cat((sums, norm[None])).tolist()
    return loss, int(count), norm, dict(zip(extra, values))


def fit(model, batches, loss_fn, cfg, machine, *, evaluate, tokenizer, entry, eval_cost=0.0, reading=None,
        bytes_per_token=0.0, after_step=None):
    """Trains `model` in place and saves the run in cfg.out. Returns the last evaluation's figures.

    batches(first, count)    rows first ... first + count - 1 of the training stream, as a Batch
    loss_fn(model, batch)    (loss summed over supervised tokens, number of them, dict of metrics to
                             log). If loss_fn is an nn.Module, its parameters are trained, too, and
                             saved in training_state.pt
    evaluate(model)          dict of figures; best/ has the lowest "loss"
    entry                    history entry of this run, a dict: saved with the model and the figures
    eval_cost                cost of one evaluation in training steps, to plan the time budget
    reading                  {name of a text: tokens of training in which it is read once}, to print
                             how often it is read; the main text first
    bytes_per_token          mean bytes of a learned token, to log the training loss in bits per byte
    after_step(model)        called after each optimizer step, for example to re-apply pruning masks

    Random numbers depend on (seed, step) only: a resumed run is the uninterrupted run, on a CPU bit
    for bit. (On a GPU the backward pass of attention adds in any order.)
    Raises UserError if the loss or the gradient is not finite; last/ is then the last good state.
    """
    check_activations(model, cfg, machine)
    agree(machine, {**dataclasses.asdict(cfg), **entry})
    run = Run(model, loss_fn, cfg, machine, save, tokenizer, entry, eval_cost, reading or {}, bytes_per_token)
    accelerate(model, cfg.native, globals())                     # globals(): softmax_gradient of this file, too
    forward = ModelAndLoss(model, loss_fn)
    forward = prepared(forward, lambda: batches(0, rows_at_once(cfg, machine)), cfg, machine, globals())
    optimizers, average = make_optimizers(model, loss_fn, cfg), Average(model)
    run.open(optimizers, average)
    model.train()
    while not run.is_finished():
        rate = lr_at(run.step, run.total or 10 ** 9, cfg, run.origin)
        for group in groups_of(optimizers):
            group["lr"] = group["peak"] * rate
        decay, dropout, horizon = run.regularization()
        regularize(forward, optimizers, decay, dropout)
        with run.timed_step():
            loss, count, norm, metrics = train_step(run.step, forward, batches, optimizers, run.scaler, cfg, machine)
            run.check_finite(loss, norm)
            if after_step is not None:
                after_step(model)
            average.update(horizon)
        run.log_step(loss, count, norm, metrics, rate)
        if run.is_time_to_evaluate():
            with average.in_place(), unsharded(forward):
                figures = evaluate(model)
            run.log_evaluation(figures)                          # saves last/, and best/ if this is the best
        elif run.is_time_to_save():
            run.save("last")
        run.stop_if_asked()
    run.close()
    return run.figures


def check_activations(model, cfg, machine):
    """Raises UserError if the activations of a micro-batch, estimated low, exceed the memory."""
    c, tokens = model.config, rows_at_once(cfg, machine) * cfg.context
    channels = c.hidden_size if cfg.checkpoint_activations else 4 * c.hidden_size + 2 * c.intermediate_size
    require_memory(machine, 4 * tokens * c.num_hidden_layers * channels, f"training on {tokens:,} tokens at once",
                   "--micro-batch, --batch-size or --context")


def timed_steps(model, batches, loss_fn, cfg, machines, seconds=2.5, rounds=1):
    """{name: seconds of each real step} on `machines`, {name: Machine} of this process, in turns.

    Turns last `seconds`, and at least `rounds` rounds; the first step of a turn is not counted.
    None if `seconds` is given and the first step takes 5 s. Model and loss keep their weights.
    """
    states = [(m, copy.deepcopy(m.state_dict())) for m in (model, loss_fn) if isinstance(m, nn.Module)]
    forward, optimizers, training = ModelAndLoss(model, loss_fn), make_optimizers(model, loss_fn, cfg), model.training
    scaler, numbers = torch.amp.GradScaler(enabled=False), itertools.count(1)
    model.train()
    try:
        return in_turns(lambda machine: train_step(next(numbers), forward, batches, optimizers, scaler, cfg, machine),
                        machines, seconds, rounds)
    finally:
        for m, state in states:
            m.load_state_dict(state)
        model.train(training)


def tuned(machine, cfg, model, batches, loss_fn):
    """The Machine with the threads and number type that make steps of this model fastest on a CPU.

    Prints the choice. Real steps are timed for a few seconds, unless flags or the run decide.
    """
    accelerate(model, cfg.native, globals())
    quick = dataclasses.replace(cfg, batch_size=max(1, min(cfg.batch_size // machine.size, 8192 // cfg.context)))
    return fastest(machine, cfg, read_state(cfg.out) if cfg.resume else {}, quick.batch_size * cfg.context,
                   lambda machines: timed_steps(model, batches, loss_fn, quick, machines, 0.3 if cfg.smoke else 2.5))


# ---------------------------------------------------------------------------------------------------------------------
# The command

def set_rates(cfg, given, width, machine):
    """Sets and prints the peak learning rates, as far as not given, of a model that learns on.

    A wider model needs a lower rate (Yang et al., 2022): it is 3e-4, the usual one, at a width of
    600. tests/FIGURES.md has the figures at 96.
    """
    rate = 0.18 / width
    chosen = [name for name in ("lr", "embed_lr", "matrix_lr") if name not in given]
    vars(cfg).update(dict.fromkeys(chosen, rate))
    if chosen:
        say(machine, f"--init-from: a peak learning rate of {rate:.2g}, for width {width}")


def model_to_train(cfg, given, tokenizer, machine):
    """The model to train: that in last/ of a resumed run, that in --init-from, or a new one.

    Lowers cfg.context to the window of an existing model, unless --context was given. Raises
    UserError for another tokenizer, quantized layers, or flags that are for a new model.
    """
    if not (cfg.resume or cfg.init_from):
        return new_model(cfg, tokenizer, machine).to(machine.device)
    fixed = [name for name in SHAPE if name in given]
    if fixed and not cfg.resume:
        raise UserError(f"--{fixed[0].replace('_', '-')} is for a new model; --init-from keeps the shape of that one")
    path = find_model(Path(cfg.out) / "last" if cfg.resume else cfg.init_from)
    model = load(path)
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise UserError(f"the model in {path} has quantized layers, and only float ones are trained: "
                        f"python compress.py {path} dequantize --out DIR gives a dense model")
    if tokenizer_of(model, path).hash != tokenizer.hash:
        raise UserError(f"the model in {path} has another tokenizer than the data: prepare the data with "
                        f"data/prepare.py --tokenizer {path}")
    for p in model.parameters():
        p.data = p.data.float().clone()                          # in memory, as the mapped file will be replaced
    window = model.config.max_position_embeddings
    if cfg.context > window and "context" in given:
        raise UserError(f"--context {cfg.context} is more than this model's window of {window}")
    cfg.context = min(cfg.context, window)
    return model.to(machine.device)


def new_model(cfg, tokenizer, machine):
    """A model with random weights. Raises UserError if the machine has too little memory for it."""
    heads = heads_of(cfg)
    config = Config(
        vocab_size=tokenizer.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.ffn or 3 * cfg.width,
        num_hidden_layers=cfg.layers, num_attention_heads=heads, num_key_value_heads=cfg.kv_heads or heads,
        head_dim=cfg.head_dim or cfg.width // heads, max_position_embeddings=cfg.context,
        tie_word_embeddings=cfg.tie)
    with torch.device("meta"):
        parameters = Transformer(config).parameters_count()
    require_memory(machine, 12 * parameters,                     # weight, gradient and momentum in float32
                   f"training a model of {parameters / 1e9:,.1f} billion parameters", "--width, --layers or --ffn")
    return Transformer(config).initialize(torch.Generator().manual_seed(cfg.seed))


def evaluation_size(val, cfg, mix=()):
    """(tokens of `val` in one evaluation, cost of one in training steps, with the Parts `mix`)."""
    most = max(cfg.eval_tokens, cfg.context) if cfg.eval_tokens else math.inf
    tokens = [min(most, len(windows.tokens)) for windows in (val, *(part.val for part in mix))]
    return tokens[0], sum(tokens) / (cfg.batch_size * cfg.context) / 3   # without a backward pass: a third


def evaluator(val, cfg, machine, tokenizer, mix=()):
    """evaluate(model) for fit: figures on the Windows `val`; each process scores a share.

    The figures of the Parts in `mix` stand beside them, with NAME_ before the key.
    """
    def own_batches(windows):
        batches = windows.evaluation_batches(max(1, 8192 // cfg.context), cfg.eval_tokens)
        while turn := list(itertools.islice(batches, machine.size)):     # sharded blocks need all processes, so some
            empty = turn[0]._replace(targets=torch.full_like(turn[0].targets, IGNORE))       # may score an empty batch
            yield (turn + [empty] * machine.size)[machine.rank]

    def evaluate(model):
        result = {}
        for prefix, windows in (("", val), *((part.name + "_", part.val) for part in mix)):
            with in_dtype(machine):
                sums = sample.score(model, own_batches(windows), tokenizer.token_bytes())
            result.update({prefix + name: x for name, x in sample.figures(*all_sum(machine, sums)).items()})
        return result
    return evaluate


def show_sample(cfg, machine, tokenizer, val):
    """Prints how the best model continues the validation text, or answers the first prompt."""
    model = accelerate(load(Path(cfg.out) / "best", machine.device), cfg.native)
    prompt = opening(tokenizer, val)
    print(f"\n--- how the validation text begins:\n{prompt.rstrip()}\n--- and how the model goes on:", flush=True)
    stream = sample.continuations(model, tokenizer, prompt, seed=cfg.seed, max_new_tokens=20 if cfg.smoke else 200,
                                  temperature=0.8, top_p=0.95)
    speak(tokenizer, map(int, stream))
    more = "--prompt TEXT" if val.mask is None else "--chat"
    print(f"---\nMore: python sample.py {shlex.quote(cfg.out)} {more}")


@one_voice()
def main(argv=None):
    """Runs the command line: data, model, fit, and a first look at the result."""
    cfg, given = parse(TrainConfig, __doc__, argv)
    check_out(cfg)
    if cfg.resume:
        cfg = resumed(cfg, given)
    check_training(cfg)
    require_text(cfg)
    machine = set_up(cfg)
    directory = open_data(cfg, given, machine)
    tokenizer = Tokenizer.load(directory)
    model = model_to_train(cfg, given, tokenizer, machine)
    if cfg.init_from and not cfg.resume:
        set_rates(cfg, given, model.config.hidden_size, machine)
    train, val = (Windows(directory, split, cfg.context) for split in ("train", "val"))
    mix = open_mix(cfg, directory, tokenizer)
    stream = Mixture(train, mix)
    entry = history_entry(cfg, train.meta, tokenizer, model, mix)
    batches = lambda first, count: stream.training_rows(cfg.seed, first, count)
    eval_tokens, eval_cost = evaluation_size(val, cfg, mix)
    show_sizes(cfg, machine, model, train, eval_tokens, mix)
    if train.mask is not None:
        show_example(machine, tokenizer, batches(0, 1))
    machine = tuned(machine, cfg, model, batches, cross_entropy)
    fit(model, batches, cross_entropy, cfg, machine, evaluate=evaluator(val, cfg, machine, tokenizer, mix),
        tokenizer=tokenizer, entry=entry, eval_cost=eval_cost, reading=stream.readings(),
        bytes_per_token=stream.bytes_per_token(tokenizer.token_bytes(), cfg.seed))
    if machine.rank == 0:
        picture(Path(cfg.out))
        show_scale(cfg, tokenizer, val)
        show_sample(cfg, machine, tokenizer, val)


if __name__ == "__main__":
    run(main)
