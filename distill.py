"""Teaches a smaller model from a larger one, and says whether the teacher was worth its cost.

    python distill.py out --cache --control --out out-student            # the teacher runs once; with the proof
    python distill.py out --out out-student                              # the teacher answers in each step
    python distill.py out --student-layers 3 --init teacher-layers --loss jsd --beta 0.5 --out DIR
    python distill.py out --init random --student-width 96 --hidden cosine --attention-weight 1 --out DIR
    python distill.py out --student PRUNED_DIR --on-policy 0.3 --out DIR
    python distill.py out --exits 1 --out out-exits                      # its early exits, for sample.py --self-draft 1
    python distill.py TEACHER --from-samples 200000 --data NAME --out DIR    # where tokenizers differ
    python distill.py --out DIR --resume

OUT is the student's run as train.py keeps one, OUT/control that of the control: the same student trained by
cross-entropy alone for the same time, the teacher's included. report.md, .json and .png compare them with the teacher.
"""
import collections, copy, dataclasses, itertools, json, math, time, types
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import sample, train
from data import UserError
from data.checkpoints import checkpoint_hash, model_name, tokenizer_of, whole
from data.console import numbers, run
from data.files import LABELS, refuse_foreign, replacing, replacing_file, sync, write_json
from data.hub import read_config
from data.labels import Cache, Taught, read_header
from data.loader import IGNORE, Windows
from data.machine import accelerate, all_sum, in_dtype, one_voice, say, set_up, synchronize, to_device
from data.prepare import prepare
from data.runs import check_out, history_entry, is_saved, open_data, read_state, remove, resumed
from data.schedule import plan
from data.sources import calibration_context, calibration_data
from data.tokenizer import Tokenizer
from model import LAYERS, Transformer, load


# ---------------------------------------------------------------------------------------------------------------------
# Config: what train.py has, and

@dataclasses.dataclass
class DistillConfig(train.TrainConfig):
    teacher: str = ""               # the model to learn from: a model directory or a run's
    data: str = ""                  # prepared data: a name under data/, or a directory; "": what the teacher learned
    out: str = "out-student"        # the run's directory
    # the student
    student: str = ""               # start from this model directory, for example a pruned one
    init: str = "teacher-layers"    # teacher-layers (every k-th, as DistilBERT) or random
    layer_map: str = ""             # the teacher's layer for each of the student's, from 0: 0,2,5; "": spread evenly
    student_layers: int = 0         # transformer blocks; 0: the most with 60 % of the parameters, 1.6 x the speed
    student_width: int = 0          # with --init random: channels of the residual stream; 0: the teacher's
    student_heads: int = 0          # with --init random: query heads; 0: in proportion
    student_ffn: int = 0            # with --init random: neurons of an MLP; 0: in proportion
    # what it learns
    loss: str = "forward"           # forward (KL(teacher, student)), reverse, or jsd (generalized, by --beta)
    beta: float = 0.5               # jsd: near 0 like forward, near 1 like reverse
    temperature: float = 1.0        # divides the logits of both in the divergence
    hard_weight: float = 0.3        # weight of cross-entropy with the text; the teacher has the rest
    hidden: str = ""                # also pull mapped hidden states towards the teacher's: cosine or mse
    hidden_weight: float = 1.0      # of that
    attention_weight: float = 0.0   # also pull mapped attention maps (KL, as MobileBERT), with this weight
    on_policy: float = 0.0          # share of rows that the student writes itself and the teacher scores (GKD)
    cache: bool = False             # run the teacher once, keep sampled labels, learn from those
    cache_dir: str = ""             # where they are kept or found; "": OUT/cache
    passes: float = 2.0             # how often a run reads each cached token, unless --pool says how many there are
    pool: int = 0                   # learn from this many training tokens only; 0: all, with --cache by --passes
    from_samples: int = 0           # let the teacher write this many tokens, and train a fresh student on that text
    exits: str = ""                 # instead of a student: teach these early exits of the model, in layers: 1,2
    control: bool = False           # also train the control, for the same time
    control_steps: int = 0          # of the control, found when the run begins


OWN = {f.name for f in dataclasses.fields(DistillConfig)} - set(train.TrainConfig.__dataclass_fields__)
LIMITS = dict(hard_weight=(0, 1), on_policy=(0, 1), beta=(0.001, 0.999), temperature=(0.01, 100),
              passes=(0.01, 1e6), **dict.fromkeys(("hidden_weight", "attention_weight", "pool", "from_samples",
                                                   "student_layers", "student_width", "student_heads", "student_ffn"),
                                                  (0, 1e15)))
CHOICES = dict(loss=("forward", "reverse", "jsd"), init=("teacher-layers", "random"), hidden=("", "cosine", "mse"))


def check_distillation(cfg):
    """Raises UserError for settings that cannot be, or not together."""
    train.check_training(cfg)
    flag = lambda name: "--" + name.replace("_", "-")
    wrong = [] if cfg.teacher else ["which teacher? python distill.py TEACHER_DIR --out DIR"]
    wrong += [f"{flag(n)} must be one of {', '.join(o)}" for n, o in CHOICES.items() if getattr(cfg, n) not in o]
    wrong += [f"{flag(n)} must be between {a} and {b}" for n, (a, b) in LIMITS.items() if not a <= getattr(cfg, n) <= b]
    online = [flag(n) for n in ("hidden", "attention_weight", "on_policy") if getattr(cfg, n)]
    if cfg.cache and (online or cfg.loss != "forward" or cfg.temperature != 1):
        wrong.append(f"--cache keeps samples of the teacher at temperature 1, for --loss forward: leave it out, or "
                     f"{' '.join(online) or '--loss and --temperature'}")
    if (cfg.exits or cfg.from_samples) and (cfg.cache or online or cfg.control or cfg.student):
        wrong.append(f"{'--exits' if cfg.exits else '--from-samples'} goes without --cache, --control, --student, "
                     "--hidden, --attention-weight and --on-policy")
    if cfg.exits and cfg.from_samples:
        wrong.append("--exits teaches the model on its own data: leave out --from-samples")
    sizes = [flag(n) for n in ("student_width", "student_heads", "student_ffn") if getattr(cfg, n)]
    if sizes and (cfg.init != "random" or cfg.student):
        wrong.append(f"{sizes[0]} needs --init random: the teacher's layers, or --student, have their own")
    if cfg.fsdp and (cfg.attention_weight or cfg.on_policy):                 # they use a block outside of its forward()
        wrong.append("--fsdp goes without --attention-weight and --on-policy")
    if wrong:
        raise UserError("; ".join(wrong))


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def forward_kl(log_p, log_q, beta):
    """KL(p || q), p the teacher's: the student covers all that the teacher does (Hinton et al., 2015)."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def reverse_kl(log_p, log_q, beta):
    """KL(q || p): the student avoids what the teacher does not do (MiniLLM: Gu et al., 2023)."""
    return (log_q.exp() * (log_q - log_p)).sum(1)


def generalized_jsd(log_p, log_q, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD: Agarwal et al., 2023).

    Near beta 0 it is beta times the forward KL, near 1 it is 1 - beta times the reverse KL.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m, beta) + (1 - beta) * forward_kl(log_q, log_m, beta)


# A new loss is a function of log-probabilities (N, V) that gives (N,), and its name here.
DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": generalized_jsd}


def divergence(student, teacher, loss="forward", beta=0.5, temperature=1.0):
    """(D (N,), dD / d student (N, V)) between the distributions of float32 logits (N, V); D is never negative.

    With a temperature T, logits are divided by T and D is multiplied by T^2, which keeps the size of the gradient.
    """
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        log_q, log_p = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
        d = temperature ** 2 * DIVERGENCES[loss](log_p, log_q, beta)
        grad, = torch.autograd.grad(d.sum(), logits)
    return d.detach().clamp(min=0), grad


def sparse_targets(ids, weights, metrics):
    """chunk() of cross-entropy with a distribution over few ids, (N, M) each, the text's own first. Weights of a row
    sum to 1, or to 0 where nothing is learned. It costs what cross-entropy with one target costs."""
    def chunk(logits, rows):
        t, w = ids[rows], weights[rows]
        total, z, probs = w.sum(1, keepdim=True), logits.gather(1, t), logits.softmax(1)
        log_sum = logits.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log()
        metrics["ce"] += ((log_sum - z[:, :1]) * total).sum()
        if (total == 0).any():
            probs *= total
        return (w * (log_sum - z)).sum(), probs.scatter_add_(1, t, -w)         # d loss / d logits = p - targets
    return chunk


def dense_targets(targets, hard, soft, teacher_logits, vocab_size, cfg, metrics):
    """chunk() of hard * cross-entropy + soft * divergence, weights (N,) of each row. Ids from vocab_size on are padding
    of one model or both: the divergence is between the distributions over the real ones."""
    def chunk(logits, rows):
        d, grad = divergence(logits[:, :vocab_size], teacher_logits(rows)[:, :vocab_size].float(), cfg.loss, cfg.beta,
                             cfg.temperature)
        loss, grad = (d * soft[rows]).sum(), F.pad(grad * soft[rows, None], (0, logits.shape[1] - vocab_size))
        metrics["divergence"] += (d * (soft[rows] > 0)).sum()
        if hard is not None:
            h, log_q, t = hard[rows, None], logits.log_softmax(1), targets[rows, None].clamp(min=0)
            ce = (-log_q.gather(1, t) * h).sum()
            loss, grad = loss + ce, (grad + log_q.exp() * h).scatter_add_(1, t, -h)
            metrics["ce"] += ce / cfg.hard_weight
        return loss, grad
    return chunk


def attention_map(attention, x, rotary, mask):
    """The log of a layer's attention weights (B, H, T, T) for the input x (B, T, C) it had: the fused kernel of the
    forward pass keeps none."""
    T, (q, k) = x.shape[1], attention.queries_keys(x, rotary)            # (B, H, T, D), (B, K, T, D)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).float() * attention.head_dim ** -0.5                                           # (B, H, T, T)
    seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() if mask is None else mask
    return scores.masked_fill(~seen, -1e9).log_softmax(-1)


class Distillation(nn.Module):
    """The loss of a student, for train.fit. layers: the teacher's layer for each of the student's. A learned projection
    joins hidden states of different widths (TinyBERT: Jiao et al., 2020); it is no part of the student."""
    def __init__(self, teacher, student, layers, vocab_size, cfg):
        super().__init__()
        self.teacher = [teacher]                      # in a list it is no submodule: not trained, not saved
        self.layers, self.vocab_size, self.cfg, self.inputs = layers, vocab_size, cfg, {}
        self.register_buffer("teacher_seconds", torch.zeros(()))
        if cfg.hidden:
            widths = student.config.hidden_size, teacher.config.hidden_size
            self.projections = nn.ModuleList(nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths, bias=False)
                                             for _ in layers)
        if cfg.attention_weight:                      # each mapped layer's attention notes what it is called with
            for block in (*student.model.layers, *(teacher.model.layers[i] for i in set(layers))):
                block.self_attn.register_forward_pre_hook(lambda module, args: self.inputs.update({module: args[:3]}))

    def forward(self, model, batch):
        cfg, metrics, hidden, theirs = self.cfg, collections.defaultdict(float), [], []
        if cfg.hard_weight == 1 and not (cfg.hidden or cfg.attention_weight or cfg.on_policy):
            return train.cross_entropy(model, batch)
        x = model(batch.ids, segments=batch.segments, head=False, hidden=hidden).flatten(0, 1)         # (B * T, C)
        keep, weight = (batch.targets != IGNORE).flatten().float(), model.lm_head.weight
        if getattr(batch, "labels", None) is not None:
            chunk = sparse_targets(batch.labels.flatten(0, 1), batch.weights.flatten(0, 1), metrics)
            return train.ThroughHead.apply(x, weight, chunk), keep.sum(), metrics
        teacher = self.teacher[0]

        @torch.no_grad()
        def timed(answer):
            start, result = time.perf_counter(), answer()
            synchronize(x.device)
            self.teacher_seconds += time.perf_counter() - start
            return result
        y = timed(lambda: teacher(batch.ids, segments=batch.segments, head=False, hidden=theirs).flatten(0, 1))
        hard = keep * cfg.hard_weight
        if getattr(batch, "sampled", None) is not None:
            hard[batch.sampled.flatten()] = 0         # what the student wrote itself is no example
        chunk = dense_targets(batch.targets.flatten(), hard if cfg.hard_weight else None, keep - hard,
                              lambda rows: timed(lambda: teacher.lm_head(y[rows])), self.vocab_size, cfg, metrics)
        loss = train.ThroughHead.apply(x, weight, chunk)
        for i, t in enumerate(self.layers):
            if cfg.hidden:
                a, b = self.projections[i](hidden[i + 1]).flatten(0, 1).float(), theirs[t + 1].flatten(0, 1).float()
                d = 1 - F.cosine_similarity(a, b) if cfg.hidden == "cosine" else (a - b).square().mean(1)
                loss = loss + cfg.hidden_weight * (d * keep).sum() / len(self.layers)
                metrics["hidden"] += (d.detach() * keep).sum() / len(self.layers)
            if cfg.attention_weight:
                blocks = model.model.layers[i], teacher.model.layers[t]
                q, p = (attention_map(b.self_attn, *self.inputs[b.self_attn]) for b in blocks)
                if p.shape[1] != q.shape[1]:          # other heads: their means are compared
                    q, p = (a.exp().mean(1, keepdim=True).clamp(min=1e-30).log() for a in (q, p))
                d = (p.exp() * (p - q)).sum(-1).mean(1).flatten()                                      # (B * T,)
                loss = loss + cfg.attention_weight * (d * keep).sum() / len(self.layers)
                metrics["attention"] += (d.detach() * keep).sum() / len(self.layers)
        return loss, keep.sum(), metrics


class Exits(nn.Module):
    """Cross-entropy of the whole model, and for each exit the KL divergence from the model's own last layer, through
    the shared norm and head (FastBERT: Liu et al., 2020; LayerSkip: Elhoushi et al., 2024)."""
    def __init__(self, exits, vocab_size, cfg):
        super().__init__()
        self.exits, self.vocab_size, self.cfg = exits, vocab_size, dataclasses.replace(cfg, loss="forward")

    def forward(self, model, batch):
        metrics, hidden, targets = collections.defaultdict(float), [], batch.targets.flatten()
        x = model(batch.ids, segments=batch.segments, head=False, hidden=hidden).flatten(0, 1)         # (B * T, C)
        loss, y = train.linear_cross_entropy(x, model.lm_head.weight, targets), x.detach()
        chunk = dense_targets(targets, None, (targets != IGNORE).float() / len(self.exits),
                              lambda rows: model.lm_head(y[rows]), self.vocab_size, self.cfg, metrics)
        for e in self.exits:
            h = model.model.norm(hidden[e]).flatten(0, 1)                                              # (B * T, C)
            loss = loss + train.ThroughHead.apply(h, model.lm_head.weight, chunk)
        return loss, (targets != IGNORE).sum(), metrics


# ---------------------------------------------------------------------------------------------------------------------
# A cached teacher, and rows that the student writes

BYTES_A_TOKEN = 40


def narrowed(windows, count, seed):
    """`count` of the Windows (at most all), drawn by `seed`, without the shift: each epoch reads the very same ones."""
    windows, n = copy.copy(windows), windows.per_epoch
    keep = np.sort(np.random.default_rng(seed).permutation(n)[:max(1, min(count, n))])
    windows.windows = [windows.windows[w] for w in keep]
    windows.per_epoch, windows.max_shift, windows._epoch = len(keep), 0, None
    return windows


def systematic(probs, draws, generator=None):
    """(ids, counts, how many): of each row of probs (R, V) the distinct ids among `draws` equally spaced points of its
    cumulative distribution, behind one random offset, and how often each.

    The expected count of id i is draws * p_i, as for independent draws (random-sampling KD: Anshumann et al., 2025), at
    less variance: a count is draws * p_i rounded down or up.
    """
    cdf, (R, V) = probs.cumsum(1), probs.shape
    points = (torch.arange(draws) + torch.rand(R, 1, generator=generator)).to(cdf) / draws * cdf[:, -1:]
    ids = torch.searchsorted(cdf, points, right=True).clamp(max=V - 1)                                 # (R, draws)
    keys, counts = torch.unique_consecutive(ids + V * torch.arange(R, device=ids.device)[:, None], return_counts=True)
    return keys % V, counts, torch.bincount(keys // V, minlength=R)


def teacher_probs(teacher, batch, machine, vocab_size):
    """The teacher's distributions (R, vocab_size) at the learned positions of a batch, in pieces."""
    batch = to_device(batch, machine.device)
    with torch.no_grad(), in_dtype(machine):
        x = teacher(batch.ids, segments=batch.segments, head=False)[batch.targets != IGNORE]
        for h in x.split(max(1, 2 ** 21 // vocab_size)):
            yield teacher.lm_head(h)[:, :vocab_size].float().softmax(1)


def draws_that_fit(probs):
    """The most draws whose expected number of distinct ids, the sum of min(1, draws * p), fits BYTES_A_TOKEN: 3 bytes
    for each at 16 bits, 1 for how many, 1 for offsets and as a reserve. It depends on probs only: no bias."""
    some, low, high = probs[::max(1, len(probs) // 64)], 1, 255
    while low < high:
        n = (low + high + 1) // 2
        fits = 3 * (n * some).clamp(max=1).sum(1).mean() + 2 <= BYTES_A_TOKEN
        low, high = (n, high) if fits else (low, n - 1)
    return low


def make_cache(directory, teacher, windows, header, cfg, machine, vocab_size):
    """Runs the teacher once over all windows and writes its labels: T lengths a window (uint8; 0: nothing is learned),
    an id (uint16, from 65,537 ids on uint32) and a count (uint8) a label, and where a window's labels begin (int64)."""
    start, random, T = time.perf_counter(), torch.Generator().manual_seed(cfg.seed), windows.context
    rows, id_type, offsets, tokens = max(1, 2048 // T), "uint16" if vocab_size <= 2 ** 16 else "uint32", [0], 0
    draws = []

    def label(probs):
        draws.append(draws_that_fit(probs))
        return systematic(probs, draws[-1], random)
    with replacing(directory, LABELS) as new:
        files = [open(new / f"{name}.bin", "wb") for name in ("lengths", "ids", "counts", "offsets")]
        for batch in tqdm(windows.evaluation_batches(rows, once=False), total=-(-len(windows.windows) // rows),
                          desc="teacher", unit="batch", disable=None, leave=False):
            learned = (batch.targets != IGNORE).numpy()                                                # (rows, T)
            labels = zip(*map(label, teacher_probs(teacher, batch, machine, vocab_size)))
            ids, counts, found = (torch.cat(t).cpu().numpy() for t in labels)
            lengths = np.zeros(learned.shape, np.uint8)
            lengths[learned], tokens = found, tokens + int(learned.sum())
            offsets += (offsets[-1] + lengths.sum(1, dtype=np.int64).cumsum()).tolist()
            for f, array, dtype in zip(files, (lengths, ids, counts), ("uint8", id_type, "uint8")):
                f.write(array.astype(dtype).tobytes())
        files[3].write(np.array(offsets, np.int64).tobytes())
        size = sum(f.tell() for f in files)
        for f in files:
            f.close()
            sync(f.name)
        write_json(new / "header.json", {
            **header, "draws": round(sum(draws) / max(1, len(draws))), "id_type": id_type, "tokens": tokens,
            "bytes_per_token": round(size / tokens, 2), "seconds": round(time.perf_counter() - start, 2)})
        sync(new / "header.json")


def label_seconds(teacher, windows, machine, vocab_size):
    """What a position costs to be labelled, measured on 16 windows."""
    probe, start = next(narrowed(windows, 16, 2).evaluation_batches(16)), time.perf_counter()
    for probs in teacher_probs(teacher, probe, machine, vocab_size):
        systematic(probs, draws_that_fit(probs))
    return (time.perf_counter() - start) / probe.ids.numel()


def open_cache(cfg, teacher, its_hash, windows, tokenizer, machine, timed):
    """(the Cache of this run, the windows it is for): the one that is there, if it is of this teacher and text, or a
    new one. Without --pool it is as large as lets the run read it --passes times in its time."""
    directory, size = Path(cfg.cache_dir or Path(cfg.out) / "cache"), cfg.batch_size * cfg.context
    if machine.rank == 0:
        refuse_foreign(directory, LABELS, "--cache-dir")
    there = read_header(directory) if (directory / "header.json").is_file() else {}
    if not cfg.pool and not there:
        a_token = label_seconds(teacher, windows, machine, tokenizer.vocab_size)
        reads = cfg.steps * size or 60 * cfg.minutes / (timed() / size + a_token / cfg.passes)
        cfg.pool = int(all_sum(machine, torch.tensor(float(reads))) / machine.size / cfg.passes)
    pool = narrowed(windows, there.get("windows") or cfg.pool // cfg.context, there.get("seed", cfg.seed))
    wanted = dict(format=2, teacher=its_hash, tokenizer=tokenizer.hash[:16], data=windows.meta["sha256"],
                  context=cfg.context, windows=pool.per_epoch, labels="sampled")
    if not there and machine.rank == 0:
        make_cache(directory, teacher, pool, {**wanted, "seed": cfg.seed}, cfg, machine, tokenizer.vocab_size)
    all_sum(machine, torch.zeros(()))                                  # the other processes wait for it
    cache = Cache(directory, wanted, tokenizer.vocab_size)
    say(machine, "cache: {tokens:,} tokens, on average {draws} draws and {bytes_per_token} bytes each; the "
              "teacher took {seconds:.0f} s".format(**cache.header))
    return cache, pool


def on_policy_rows(batch, first, student, tokenizer, cfg, machine):
    """The batch as Taught, a share cfg.on_policy of its rows written by the student: from their first quarter on, or as
    an answer to the first prompt (GKD). Row n's draws are a function of (seed, n) and the student."""
    ids, targets, sampled = batch.ids.clone(), batch.targets.clone(), torch.zeros_like(batch.ids, dtype=torch.bool)
    segments, T, training = copy.deepcopy(batch.segments), ids.shape[1], student.training
    stop = () if segments is None else tokenizer.eos_ids
    student.eval()
    for row in range(len(ids)):
        random = torch.Generator(machine.device).manual_seed((cfg.seed * 10 ** 9 + first + row) % 2 ** 63)
        if torch.rand((), generator=random, device=machine.device) >= cfg.on_policy:
            continue
        inside = segments is None or targets[row, 0] != IGNORE               # of a text, or of a long answer
        n = T // 4 if inside else int((targets[row] != IGNORE).float().argmax()) + 1
        with in_dtype(machine):
            new = sample.generate(student, ids[row:row + 1, :n], T + 1 - n, stop, tokenizer.vocab_size, random)
            text = torch.tensor(ids[row, :n].tolist() + [int(i) for i in new])
        end = len(text) - 1                                                  # the last token is a target only
        ids[row], targets[row], sampled[row] = 0, IGNORE, True
        ids[row, :end], targets[row, n - 1:end] = text[:-1], text[n:]
        if segments is not None:
            segments[row] = torch.arange(T) < end
    student.train(training)
    return Taught(ids, targets, segments, sampled=sampled)


# ---------------------------------------------------------------------------------------------------------------------
# The student

def shaped(config, layers, **sizes):
    """A teacher's config with some of its layers, and other sizes."""
    types = config.layer_types or config.hub.get("layer_types")     # transformers names them where none slides, too
    types = types and [types[i] for i in layers]
    return dataclasses.replace(config, num_hidden_layers=len(layers), layer_types=config.layer_types and types, **sizes,
                               hub={**config.hub, **({"layer_types": types} if types else {})})


def spread(n, total):
    """n of `total` layers, the first, the last and evenly between."""
    return [int(i * (total - 1) / max(1, n - 1) + 0.5) for i in range(n)]


def default_layers(teacher):
    """The most layers with which a student has at most 60 % of the parameters and multiplies each token by at most
    1 / 1.6 of the weights; half of them where embeddings alone are more."""
    total = teacher.config.num_hidden_layers
    for n in range(total - 1, 0, -1):
        with torch.device("meta"):
            student = Transformer(shaped(teacher.config, spread(n, total)))
        if (student.parameters_count() <= 0.6 * teacher.parameters_count()
                and 1.6 * student.matmul_parameters() <= teacher.matmul_parameters()):
            return n
    return max(1, total // 2)


def make_student(cfg, given, teacher, tokenizer, machine):
    """(the student, for each of its layers the teacher's). Raises UserError for sizes or a map that do not fit."""
    c, total, student = teacher.config, teacher.config.num_hidden_layers, None
    if cfg.student:
        cfg.init_from = cfg.student
        begun = dataclasses.replace(cfg, resume=False)
        student = train.model_to_train(begun, given, tokenizer, machine)
        cfg.context = begun.context                                          # its window may be shorter
    n = student.config.num_hidden_layers if student else cfg.student_layers or cfg.layer_map.count(",") + 1 \
        if cfg.student_layers or cfg.layer_map else default_layers(teacher)
    layers = numbers(cfg.layer_map, "--layer-map", 0, total - 1) if cfg.layer_map else spread(n, total)
    if len(layers) != n:
        raise UserError(f"--layer-map names {len(layers)} layers, but the student has {n}")
    if student is None and (cfg.init == "random" or cfg.from_samples):
        width = cfg.student_width or c.hidden_size
        heads = cfg.student_heads or max(1, width * c.num_attention_heads // c.hidden_size)
        if width % heads or width // heads % 2:
            raise UserError(f"--student-width ({width}) must be an even multiple of --student-heads ({heads})")
        shared = c.num_attention_heads // c.num_key_value_heads              # query heads on one key-value head
        student = Transformer(shaped(
            c, layers, hidden_size=width, num_attention_heads=heads, head_dim=width // heads,
            num_key_value_heads=heads // shared if heads % shared == 0 else heads,
            intermediate_size=cfg.student_ffn or max(1, c.intermediate_size * width // c.hidden_size),
            vocab_size=tokenizer.vocab_size if cfg.from_samples else c.vocab_size))
        student.initialize(torch.Generator().manual_seed(cfg.seed))
    elif student is None:
        if n > total:
            raise UserError(f"--student-layers {n} is more than the teacher's {total}: give --init random")
        if teacher.compression:
            raise UserError(f"{cfg.teacher} has layers that are not dense, and a student starts from dense ones: use "
                            "--init random, or distill from the model that it was made of")
        student, theirs = Transformer(shaped(c, layers)), teacher.state_dict()
        student.history = list(teacher.history)
        for name, t in student.state_dict().items():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(layers[int(parts[2])])
            t.copy_(theirs[".".join(parts)])
    return student.to(machine.device).train(), layers


def write_samples(cfg, teacher, its_tokenizer, windows, tokenizer):
    """Lets the teacher write cfg.from_samples tokens, each text from 16 of the data on, and prepares them as
    OUT/samples with the data's tokenizer: the way from one tokenizer to another (Kim and Rush, 2016)."""
    if windows.mask is not None:
        raise UserError("--from-samples continues plain text, and the data holds prompts and responses")
    out, texts, written, length = Path(cfg.out), [], 0, teacher.config.max_position_embeddings - 16
    bar = tqdm(total=cfg.from_samples, unit="token", desc="teacher writes", disable=None, leave=False)
    for i in itertools.count(0, 16):
        batch = windows.training_rows(cfg.seed, i, 16)
        prompts = [its_tokenizer.encode(tokenizer.decode(row.tolist()))[:16] for row in batch.ids]
        prompts = torch.tensor([p[:min(map(len, prompts))] for p in prompts])                          # (B, up to 16)
        random = torch.Generator(next(teacher.parameters()).device).manual_seed(cfg.seed * 10 ** 9 + i)
        new = torch.stack(list(sample.generate(teacher, prompts, length, vocab_size=its_tokenizer.vocab_size,
                                               generator=random)), dim=1).cpu()                        # (B, length)
        texts += [json.dumps({"text": text}) + "\n" for ids in torch.cat((prompts, new), dim=1).tolist()
                  for text in its_tokenizer.decode(ids).split(its_tokenizer.eos_token)]          # a document each
        bar.update(new.numel())
        written += new.numel()
        if written >= cfg.from_samples:
            break
    bar.close()
    out.mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "samples.jsonl") as new:
        new.write_text("".join(texts), encoding="utf-8")
    prepare(inputs=[out / "samples.jsonl"], out=out / "samples", tokenizer=tokenizer, overwrite=True)


# ---------------------------------------------------------------------------------------------------------------------
# The proof

def open_samples(cfg, teacher, its_tokenizer, windows, tokenizer, machine):
    """The Windows of --from-samples, which the first process lets the teacher write, unless the run goes on."""
    if machine.rank == 0 and not cfg.resume:
        write_samples(cfg, teacher, its_tokenizer, windows, tokenizer)
    all_sum(machine, torch.zeros(()))                            # the others wait for it
    return Windows(Path(cfg.out) / "samples", "train", cfg.context)


def step_seconds(model, batches, loss_fn, cfg, machine):
    """Median seconds of a step of train.fit. Model and loss are then what they were before."""
    alone = dataclasses.replace(cfg, batch_size=cfg.batch_size // machine.size)
    machines = {"": machine._replace(rank=0, size=1)}
    return float(np.median(train.timed_steps(model, batches, loss_fn, alone, machines, seconds=0, rounds=4)[""]))


# ---------------------------------------------------------------------------------------------------------------------
# Training a compressed model: recovery, and quantization-aware

class Rounded(torch.autograd.Function):
    """The values that the weight (out, in) of a dense layer will have once it is rounded as `entry` says. The gradient
    goes through as if nothing were rounded (straight-through estimator: Bengio et al., 2013)."""
    @staticmethod
    def forward(ctx, weight, entry):
        spec = {k: v for k, v in entry.items() if k not in ("module", "kind")}
        return LAYERS[entry["kind"]].from_dense(types.SimpleNamespace(weight=weight), **spec).dense()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def rounded_weights(model, entries):
    """{name: weight as it will be rounded}, for torch.func.functional_call; gradients reach the dense weights."""
    return {f"{e['module']}.weight": Rounded.apply(model.get_parameter(f"{e['module']}.weight"), e) for e in entries}


def qat_loss(teacher, entries, cfg, vocab_size):
    """The loss for train.fit of a dense model that is to be rounded as `entries` say: py's, of the rounded one.

    Half is how far its distributions are from the dense teacher's, half cross-entropy with the text. On a model of the
    standard library either alone was worse after equal steps: 1.2499 and 1.2487 bits per byte, and together 1.2461.
    """
    taught = Distillation(teacher, teacher, (), vocab_size, cfg)

    def loss_fn(model, batch):
        weights = {f"model.{name}": weight for name, weight in rounded_weights(model, entries).items()}
        return torch.func.functional_call(train.ModelAndLoss(model, taught), weights, (batch,))
    return loss_fn


def fine_tune(model, tokenizer, step, said, args, loss_of, steps, finished=lambda model: model, after_step=None,
              **settings):
    """(model after `steps` of train.fit on its prepared training data, what the history says of it).

    loss_of(cfg, device)   the loss for train.fit
    finished(model)        the model that this one stands for, of which evaluation shall tell
    settings               of DistillConfig

    The run is args.run, with best/ and last/, and goes on from there if it is there: see `make`.
    """
    source, run_dir, context = calibration_data(model, tokenizer, args), Path(args.run), calibration_context(model)
    if source.is_file():
        raise UserError(f"--calibration {source} is a text file, and {step.method or step.name} learns from prepared "
                        f"data: make it so with python data/prepare.py --input {source} --tokenizer {args.model} "
                        "--name NAME")
    rates = {**train.FINE_TUNE, **dict.fromkeys(("lr", "embed_lr", "matrix_lr"), args.lr)}
    cfg = DistillConfig(**rates, **settings, out=str(run_dir), resume=is_saved(run_dir / "last"),
                        steps=steps, context=context, seed=args.seed, native=args.native,
                        eval_tokens=2048 if args.smoke else 131072)
    windows, val = (Windows(source, split, context) for split in ("train", "val"))
    said = {**said, "data": windows.meta["name"], "data_sha256": windows.meta["sha256"], "seed": args.seed,
            "context": context, "batch_size": cfg.batch_size, "lr": args.lr, "total": steps}
    student = load(run_dir / "last") if cfg.resume else copy.deepcopy(model)
    if cfg.resume and student.history[-1]["data_sha256"] != said["data_sha256"]:
        raise UserError(f"{run_dir} was begun with other data: begin anew with --overwrite")
    machine = set_up(cfg)
    for p in student.parameters():
        p.data = p.data.float().clone()                          # not the mapped file
    student, loss_fn = student.to(machine.device), loss_of(cfg, machine.device)
    batches = lambda first, count: windows.training_rows(cfg.seed, first, count)
    machine = train.tuned(machine, cfg, student, batches, loss_fn)
    score = train.evaluator(val, cfg, machine, tokenizer)
    if not cfg.resume:
        print(f"{step.name}: {score(finished(student))['bits_per_byte']:.4f} bits per byte of validation without "
              "training", flush=True)
    train.fit(student, batches, loss_fn, cfg, machine, evaluate=lambda student: score(finished(student)),
              tokenizer=tokenizer, entry=said, reading=windows.per_epoch * context, after_step=after_step)
    trained = load(run_dir / "best")
    for p in trained.parameters():
        p.data = p.data.clone()                                  # the file is about to be removed
    *trained.history, said = trained.history
    return trained, said


def quantization_aware_training(model, tokenizer, step, entries, said, args):
    """(dense model, what the history says of it): its weights are trained to lose little when they are rounded to
    nearest, with the model that came in as the teacher (Liu et al., 2023, LLM-QAT, but on the model's own data).

    Forward passes use the rounded weights, gradients change the dense ones, and those are what the run saves.
    """
    teacher = copy.deepcopy(model)

    def as_rounded(student):
        result = copy.deepcopy(student)
        with torch.no_grad():
            for name, weight in rounded_weights(student, entries).items():
                result.get_parameter(name).copy_(weight)
        return result

    def loss_of(cfg, device):
        return qat_loss(teacher.to(device), entries, cfg, tokenizer.vocab_size)

    return fine_tune(model, tokenizer, step, said, args, loss_of, args.qat_steps, as_rounded, zeros_kept(model),
                     batch_size=8, evals=2, hard_weight=0.5)


def zeros_kept(model):
    """after_step for train.fit that keeps the zeros of sparse layers zero; None if no step made any."""
    if not any(entry["step"] == "sparse" for entry in model.history):
        return None
    zeros = {name: p.detach() == 0 for name, p in model.model.layers.named_parameters() if p.ndim > 1}

    @torch.no_grad()
    def after_step(model):
        for name, zero in zeros.items():
            p = model.model.layers.get_parameter(name)
            p.masked_fill_(zero.to(p.device), 0)
    return after_step



# ---------------------------------------------------------------------------------------------------------------------
# The command

def settings(argv):
    """(config, names of the flags that were given): checked, and of a run that is resumed its own."""
    cfg, given = train.parse(DistillConfig, __doc__, argv, positional=("teacher",),
                             hidden=(*train.SHAPE, "preset", "init_from", "vocab_size", "control_steps"))
    if cfg.exits:                                     # all its weights go on from where they are: small steps
        cfg = dataclasses.replace(cfg, **{k: v for k, v in train.FINE_TUNE.items() if k not in given})
    out = Path(cfg.out)
    check_out(cfg)
    if cfg.resume:
        stored = read_state(out)["config"]
        for name in OWN & given - {"control", "teacher", "cache_dir"}:
            if getattr(cfg, name) != stored.get(name):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {out} has "
                                f"{stored.get(name)}: leave it out, or give another --out")
        cfg = resumed(cfg, given)
    check_distillation(cfg)
    for name in ("teacher", "student"):
        if getattr(cfg, name) and whole(getattr(cfg, name)).resolve().parent == out.resolve():
            raise UserError(f"the {name} is the run that --out {out} would replace: give another --out")
    history = read_config(whole(cfg.teacher)).get("history") or []
    cfg.data = cfg.data or next((e["data"] for e in reversed(history) if "data" in e), "")
    if not cfg.data:
        raise UserError(f"the teacher in {cfg.teacher} does not say what it learned: give --data")
    return cfg, given


def open_teacher(cfg, given, machine):
    """(teacher, its tokenizer, {"name", "sha256"} of it). Raises UserError if --context is more than its window."""
    directory = whole(cfg.teacher)
    teacher = load(directory, machine.device, machine.dtype if machine.device.type == "cuda" else torch.float32)
    accelerate(teacher, cfg.native).requires_grad_(False)
    window = teacher.config.max_position_embeddings
    if cfg.context > window and "context" in given:
        raise UserError(f"--context {cfg.context} is more than the teacher's window of {window}")
    cfg.context = min(cfg.context, window)
    return teacher, tokenizer_of(teacher, directory), {"name": model_name(directory), "sha256": checkpoint_hash(directory)}


def open_student(cfg, given, teacher, tokenizer, machine, exits):
    """(student, the teacher's layer for each of the student's, a copy to train as control, or None)."""
    if exits:                                                    # the teacher itself learns to speak after some layers
        layers, cfg.init_from = [], cfg.teacher
        student = train.model_to_train(cfg, given, tokenizer, machine)
    else:
        student, layers = make_student(cfg, given, teacher, tokenizer, machine)
    fresh = copy.deepcopy(student) if cfg.control else None
    if cfg.resume:
        student = train.model_to_train(cfg, given, tokenizer, machine)
    student.exits = exits
    return student, layers, fresh


def say_sizes(cfg, machine, teacher, student, layers):
    """Prints the sizes of teacher and student, and the speed to expect."""
    ours, theirs, c = student.parameters_count(), teacher.parameters_count(), student.config
    taken = layers and cfg.init != "random" and not (cfg.student or cfg.from_samples)
    start = f", from {', '.join(map(str, layers))}" if taken else ""
    say(machine, f"teacher: {theirs:,} parameters, {teacher.config.num_hidden_layers} layers of width "
        f"{teacher.config.hidden_size}; student: {ours:,} ({ours / theirs:.0%}), {c.num_hidden_layers} layers of width "
        f"{c.hidden_size}{start}; expect decode at "
        f"{teacher.matmul_parameters() / student.matmul_parameters():.2f} x the speed, prefill at "
        f"{teacher.flops_per_token(cfg.context) / student.flops_per_token(cfg.context):.2f} x")
    if ours > theirs:
        say(machine, f"warning: the student ({ours:,} parameters) is larger than its teacher ({theirs:,})")


def plan_both(cfg, entry, machine, student, ways, eval_cost, cached):
    """Sets the steps of student and control, so that both take the same time, the teacher's included.

    ways: (batches, loss) of the student, and of the control. Step times are measured in turns: both schedules end
    decayed, and a slow moment of the machine favours none.
    """
    turns = torch.tensor([[step_seconds(student, *way, cfg, machine) for way in ways] for _ in range(3)])
    slow, fast = (all_sum(machine, turns).mean(0) / machine.size).tolist()
    cfg.steps = (cfg.steps or (read_state(cfg.out)["total"] if cfg.resume else 0)
                 or plan(0, 0, 0.0, slow, eval_cost, cfg, machine))
    cfg.control_steps = max(1, round((cfg.steps * slow + cached) / fast))
    entry["step_ms"] = [round(1000 * slow, 1), round(1000 * fast, 1)]
    say(machine, f"{cfg.steps:,} steps of {1000 * slow:.0f} ms; as long, the cache included, takes the control: "
        f"{cfg.control_steps:,} of {1000 * fast:.0f} ms")


@one_voice()
def main(argv=None):
    cfg, given = settings(argv)
    out, machine = Path(cfg.out), set_up(cfg)
    torch.manual_seed(cfg.seed)                                  # of learned projections
    teacher, teacher_tokenizer, teacher_entry = open_teacher(cfg, given, machine)
    exits = numbers(cfg.exits, "--exits", 1, teacher.config.num_hidden_layers - 1) if cfg.exits else []
    directory = open_data(cfg, given, machine)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.hash != teacher_tokenizer.hash and not cfg.from_samples:
        raise UserError(f"the teacher in {cfg.teacher} has another tokenizer than the data {cfg.data}: prepare that "
                        f"with data/prepare.py --tokenizer {cfg.teacher}, or let the teacher write text for a student "
                        "with the data's tokenizer: --from-samples TOKENS")
    student, layers, fresh = open_student(cfg, given, teacher, tokenizer, machine, exits)
    windows, val = (Windows(directory, split, cfg.context) for split in ("train", "val"))
    entry = history_entry(cfg, windows.meta, tokenizer, student)
    if cfg.resume and entry.get("teacher", {}).get("sha256") != teacher_entry["sha256"]:
        raise UserError(f"the teacher in {cfg.teacher} is not the one that the run in {out} began with")
    if not cfg.resume:
        entry.update(step="exits" if exits else "distill", loss=cfg.loss, hard_weight=cfg.hard_weight, cache=cfg.cache,
                     teacher=teacher_entry)
    say_sizes(cfg, machine, teacher, student, layers)

    plain = batches = lambda first, count: windows.training_rows(cfg.seed, first, count)
    if cfg.from_samples:
        windows, loss_fn = open_samples(cfg, teacher, teacher_tokenizer, windows, tokenizer, machine), train.cross_entropy
    elif exits:
        loss_fn = Exits(exits, tokenizer.vocab_size, cfg)
    else:
        loss_fn = Distillation(teacher, student, layers, tokenizer.vocab_size, cfg).to(machine.device)
    # With a cache the teacher has no part in a step.
    machine = train.tuned(machine, cfg, student, plain, train.cross_entropy if cfg.cache else loss_fn)
    eval_tokens = min(max(cfg.eval_tokens, cfg.context) if cfg.eval_tokens else math.inf, len(val.tokens))
    common = dict(evaluate=train.evaluator(val, cfg, machine, tokenizer), tokenizer=tokenizer,
                  eval_cost=eval_tokens / cfg.batch_size / cfg.context / 3, reading=windows.per_epoch * cfg.context)
    cached = 0.0                                                 # seconds that the teacher took beforehand
    if cfg.cache:
        cache, pool = open_cache(cfg, teacher, teacher_entry["sha256"], windows, tokenizer, machine,
                                 lambda: step_seconds(student, plain, train.cross_entropy, cfg, machine))
        batches, cached = lambda first, count: cache.rows(pool, cfg.seed, first, count, cfg.hard_weight), \
            cache.header["seconds"]
        cfg.minutes -= 0 if cfg.resume else min(cached / 60, 0.9 * cfg.minutes)
    elif cfg.pool:
        pool = narrowed(windows, cfg.pool // cfg.context, cfg.seed)
        batches = lambda first, count: pool.training_rows(cfg.seed, first, count)
    text = batches
    if cfg.on_policy:
        batches = lambda first, count: on_policy_rows(text(first, count), first, student, tokenizer, cfg, machine)
    if cfg.control and not cfg.control_steps:
        plan_both(cfg, entry, machine, student, ((batches, loss_fn), (plain, train.cross_entropy)), common["eval_cost"],
                  cached)

    train.fit(student, batches, loss_fn, cfg, machine, entry=entry, **common)
    if cfg.overwrite and not (cfg.resume or cfg.control) and machine.rank == 0:
        remove(out / "control")                                  # of the run that this one has replaced
    if cfg.control:
        begun = is_saved(out / "control" / "last")
        other = dataclasses.replace(cfg, out=str(out / "control"), steps=cfg.control_steps, resume=cfg.resume and begun)
        say(machine, "the control: the same student, by cross-entropy alone")
        control = train.model_to_train(other, given, tokenizer, machine) if other.resume else fresh
        train.fit(control, plain, train.cross_entropy, other, machine, entry={**entry, "step": "control"}, **common)
    if machine.rank == 0:
        compare_all(cfg, machine, teacher, exits, val, tokenizer, cached)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compare_all(cfg, machine, teacher, exits, val, tokenizer, cached):
    """Measures teacher, student, control and exits on the same text, and writes the report."""
    from data.measure import report                              # here, as measure imports the scripts
    out = Path(cfg.out)
    models = {} if cfg.from_samples else {"teacher": teacher}
    models["student"] = student = accelerate(load(out, machine.device), cfg.native)
    if cfg.control:
        models["control"] = accelerate(load(out / "control", machine.device), cfg.native)
    models.update({f"exit after {e}": sample.first_layers(student, e) for e in exits})
    report(cfg, machine, models, val, tokenizer, cached)


if __name__ == "__main__":
    run(main)
