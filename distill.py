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
import collections, copy, dataclasses, itertools, json, math, time
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import sample, train
from data import LABELS, UserError, refuse_foreign, replacing, replacing_file, run, sync, write_json
from data.loader import IGNORE, Batch, Windows
from data.prepare import prepare
from data.tokenizer import Tokenizer
from data.values import check_values
from model import Transformer, checkpoint_hash, load, model_name, placed, read_config, read_json, whole


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
    cache_labels: str = "sampled"   # sampled (unbiased) or topk (biased, for comparison)
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
CHOICES = dict(loss=("forward", "reverse", "jsd"), init=("teacher-layers", "random"), hidden=("", "cosine", "mse"),
               cache_labels=("sampled", "topk"))


def check(cfg):
    """Raises UserError for settings that cannot be, or not together."""
    train.check(cfg)
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

def divergence(student, teacher, loss="forward", beta=0.5, temperature=1.0):
    """(D (N,), dD / d student (N, V)) between the distributions of float32 logits (N, V); D is never negative.

    forward  KL(p || q), p the teacher's (Hinton et al., 2015)        reverse  KL(q || p) (MiniLLM: Gu et al., 2023)
    jsd      beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD: Agarwal et al., 2023); near beta 0
             it is beta times forward, near 1 it is 1 - beta times reverse
    With a temperature T, logits are divided by T and D is multiplied by T^2, which keeps the size of the gradient.
    """
    log_q, log_p = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    q = log_q.exp()
    if loss == "forward":
        p = log_p.exp()
        d, grad = (p * (log_p - log_q)).sum(1), q - p
    else:
        m = log_p if loss == "reverse" else torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        beta = 0.0 if loss == "reverse" else beta
        ratio = (1 - beta) * (log_q - m)
        own = (q * ratio).sum(1)                      # the teacher's part has no gradient beyond what this one has
        d, grad = own + (beta * (log_p.exp() * (log_p - m)).sum(1) if beta else 0), q * (ratio - own[:, None])
    return temperature ** 2 * d.clamp(min=0), temperature * grad


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
    B, T, _ = x.shape
    q = placed(attention.q_proj(x).view(B, T, -1, attention.head_dim), attention.q_norm, rotary)       # (B, H, T, D)
    k = placed(attention.k_proj(x).view(B, T, -1, attention.head_dim), attention.k_norm, rotary)       # (B, K, T, D)
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
            train.synchronize(x.device)
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

Taught = collections.namedtuple("Taught", (*Batch._fields, "labels", "weights", "sampled"), defaults=(None,) * 3)
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


def top_k(probs, k):
    """The same for the k likeliest ids, in 255ths of their sum. It cuts the tail, so it is biased."""
    values, ids = probs.topk(k)
    counts = (255 * values / values.sum(1, keepdim=True)).round().clamp(min=1)
    return ids.flatten(), counts.flatten(), torch.full((len(probs),), k, device=probs.device)


def teacher_probs(teacher, batch, machine, vocab_size):
    """The teacher's distributions (R, vocab_size) at the learned positions of a batch, in pieces."""
    batch = train.to_device(batch, machine.device)
    with torch.no_grad(), train.in_dtype(machine):
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
        if cfg.cache_labels == "topk":
            return top_k(probs, int((BYTES_A_TOKEN - 2) / 3))
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


HEADER = {**dict.fromkeys(("teacher", "tokenizer", "data", "labels", "id_type"), (str,)), "format": (int,),
          "context": (int, 1, 2 ** 24), "windows": (int, 1, 2 ** 40), "seed": (int, 0, 2 ** 63), "draws": (int, 0, 255),
          "tokens": (int, 0, 2 ** 48), **dict.fromkeys(("bytes_per_token", "seconds"), (float, 0, 1e9))}


def read_header(directory):
    """header.json of a cache, a dict. Raises UserError if a field is missing or cannot be."""
    path = Path(directory) / "header.json"
    header = read_json(path)
    try:
        check_values(header, HEADER, path, needed=HEADER)
        if header["id_type"] not in ("uint16", "uint32"):
            raise UserError(f"{path}: id_type is {header['id_type']!r}; it must be uint16 or uint32")
    except UserError as error:
        raise UserError(f"{error}: delete the cache and it is made again") from None
    return header


class Cache:
    """Labels that make_cache wrote, memory-mapped. Raises UserError if they are not what `wanted` says, or not whole,
    or if one is not below `vocab_size` (None: not looked at)."""
    def __init__(self, directory, wanted, vocab_size=None):
        self.header = read_header(directory)
        if stale := [n for n, value in wanted.items() if self.header.get(n) != value]:
            raise UserError(f"the cache in {directory} is stale: its {stale[0]} is {self.header.get(stale[0])!r}, this "
                            f"run's {wanted[stale[0]]!r}; delete it, or give another --cache-dir")
        n, T, labels = self.header["windows"], self.header["context"], lambda: int(self.offsets[-1])
        for name, dtype, size in (("offsets", "int64", lambda: n + 1), ("counts", "uint8", labels),
                                  ("ids", self.header["id_type"], labels), ("lengths", "uint8", lambda: n * T)):
            file = Path(directory) / f"{name}.bin"
            if not file.is_file() or not file.stat().st_size == size() * np.dtype(dtype).itemsize > 0:
                raise UserError(f"the cache in {directory} is cut short ({file.name}): delete it and it is made again")
            setattr(self, name, np.memmap(file, dtype, "r"))
        blocks = range(0, n, max(1, 2 ** 24 // T))                           # of windows: the files may not fit memory
        sums = [self.lengths[i * T:(i + blocks.step) * T].reshape(-1, T).sum(1, dtype=np.int64) for i in blocks]
        most = max(int(self.ids[i:i + 2 ** 24].max()) for i in range(0, len(self.ids), 2 ** 24))
        if (self.offsets[0] or (np.diff(self.offsets) != np.concatenate(sums)).any()
                or vocab_size is not None and most >= vocab_size):
            raise UserError(f"the cache in {directory} holds labels that cannot be: delete it and it is made again")

    def rows(self, windows, seed, first, count, hard_weight):
        """Rows first ... first + count - 1 of the training stream with labels and their weights (count, T, M)."""
        batches, T = [], windows.context
        ids, weights, most = np.zeros((count, T, 256), np.int64), np.zeros((count, T, 256), np.float32), 0
        for i, n in enumerate(range(first, first + count)):
            batches.append(windows.training_rows(seed, n, 1))
            w = windows._epoch[1][n % windows.per_epoch]                     # which window row n is
            lengths, (a, b) = self.lengths[w * T:(w + 1) * T].astype(np.int64), self.offsets[w:w + 2]
            column = 1 + np.arange(b - a) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            where = i, np.repeat(np.arange(T), lengths), column
            ids[where], weights[where], most = self.ids[a:b], self.counts[a:b], max(most, lengths.max())
        batch = Batch(*(None if t[0] is None else torch.cat(t) for t in zip(*batches)))
        weights *= (1 - hard_weight) / np.maximum(weights.sum(2, keepdims=True), 1)
        ids[:, :, 0], weights[:, :, 0] = batch.targets.clamp(min=0), hard_weight * (batch.targets != IGNORE)
        return Taught(*batch, *(torch.from_numpy(a[:, :, :most + 1].copy()) for a in (ids, weights)))


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
        cfg.pool = int(train.all_sum(machine, torch.tensor(float(reads))) / machine.size / cfg.passes)
    pool = narrowed(windows, there.get("windows") or cfg.pool // cfg.context, there.get("seed", cfg.seed))
    wanted = dict(format=2, teacher=its_hash, tokenizer=tokenizer.hash[:16], data=windows.meta["sha256"],
                  context=cfg.context, windows=pool.per_epoch, labels=cfg.cache_labels)
    if not there and machine.rank == 0:
        make_cache(directory, teacher, pool, {**wanted, "seed": cfg.seed}, cfg, machine, tokenizer.vocab_size)
    train.all_sum(machine, torch.zeros(()))                                  # the other processes wait for it
    cache = Cache(directory, wanted, tokenizer.vocab_size)
    train.say(machine, "cache: {tokens:,} tokens, on average {draws} draws and {bytes_per_token} bytes each; the "
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
        with train.in_dtype(machine):
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
        student = train.open_model(begun, given, tokenizer, machine)
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


def numbers(text, flag, first, last):
    """The whole numbers of "0,2,5". Raises UserError if one is not in first ... last."""
    if not all(n.strip().isdigit() and first <= int(n) <= last for n in text.split(",")):
        raise UserError(f"{flag} {text} must be whole numbers from {first} to {last}, written like 0,2,5")
    return [int(n) for n in text.split(",")]


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

def step_seconds(model, batches, loss_fn, cfg, machine):
    """Median seconds of a step of train.fit. Model and loss are then what they were before."""
    alone = dataclasses.replace(cfg, batch_size=cfg.batch_size // machine.size)
    machines = {"": machine._replace(rank=0, size=1)}
    return float(np.median(train.timed_steps(model, batches, loss_fn, alone, machines, seconds=0, rounds=4)[""]))


COLUMNS = (("parameters", "parameters", "{:,}"), ("bits per byte", "bits_per_byte", "{:.4f}"),
           ("perplexity", "perplexity", "{:.2f}"), ("quality kept", "quality_kept", "{:.1%}"),
           ("gap closed", "gap_closed", "{:.0%}"), ("same top token", "agreement", "{:.1%}"),
           ("decode", "decode_x", "{:.2f} x"), ("prefill", "prefill_x", "{:.2f} x"), ("time", "seconds", "{:.0f} s"),
           ("of it teacher", "teacher_seconds", "{:.0f} s"))


def report(cfg, machine, models, val, tokenizer, cached):
    """Measures `models` ({name: model}; "teacher" first, if it can be compared) on the same text, and writes
    report.json, report.md and report.png. `cached`: seconds that making the cache took."""
    out, window = Path(cfg.out), min(m.config.max_position_embeddings for m in models.values())
    with train.in_dtype(machine):
        rows = sample.compare(models, val.evaluation_batches(max(1, 8192 // cfg.context), cfg.eval_tokens),
                              tokenizer.token_bytes())
        speeds = sample.speed({n: m for n, m in models.items() if n != "control"}, window // 2, max(1, window // 4))
    base, states = next(iter(rows.values()))["bits_per_byte"], {"student": train.read_state(out)}
    if "control" in models:
        states["control"] = train.read_state(out / "control")
    for name, row in rows.items():
        its = speeds["student" if name == "control" else name]               # they have one shape
        row.update({k: v for k, v in its.items() if not k.endswith("_rounds")},
                   parameters=models[name].parameters_count(), quality_kept=base / row["bits_per_byte"])
    for name, state in states.items():
        rows[name]["seconds"] = state["seconds"] + cached * (name == "student")
        rows[name]["teacher_seconds"] = float(state["loss"].get("teacher_seconds", 0)) + cached * (name == "student")
    ours, lines = rows["student"], ["| model | " + " | ".join(head for head, _, _ in COLUMNS) + " |",
                                    "|---" * (len(COLUMNS) + 1) + "|"]
    if "control" in rows:
        control = rows["control"]["bits_per_byte"]
        if control > 1.01 * base:                     # of less there is nothing to close
            ours["gap_closed"] = (control - ours["bits_per_byte"]) / (control - base)
    lines += ["| " + " | ".join([name, *(form.format(row[key]) if key in row else "" for _, key, form in COLUMNS)])
              + " |" for name, row in rows.items()]
    if ours["bits_per_byte"] < base and not cfg.exits:
        lines += ["", f"Warning: at {base:.4f} bits per byte the teacher is worse than the student, at "
                      f"{ours['bits_per_byte']:.4f}: train the teacher longer."]
    if "control" in rows:
        won = control - ours["bits_per_byte"]
        lines += ["", f"The teacher was worth its cost: {won:.4f} bits per byte below the control." if won > 0 else
                      f"The teacher was not worth its cost: {-won:.4f} bits per byte above the control."]
    with replacing_file(out / "report.md") as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(out / "report.json", {"models": rows, "config": dataclasses.asdict(cfg)})
    print("\n" + "\n".join(lines))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("report.png is skipped: matplotlib is not installed")
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, where, later, color in (("teacher", whole(cfg.teacher).parent, 0, "0.6"),
                                      ("student", out, cached, "tab:blue"),
                                      ("control", out / "control", 0, "tab:orange")):
        points = [(later + line["seconds"], line["val_bits_per_byte"]) for line in train.read_log(where / "log.jsonl")
                  if "val_bits_per_byte" in line] if name in rows else []
        if points:
            ax.plot(*zip(*points), "o-", color=color, label=f"{name}: {rows[name]['bits_per_byte']:.3f}")
        elif name in rows:
            ax.axhline(rows[name]["bits_per_byte"], color=color, label=f"{name}: {rows[name]['bits_per_byte']:.3f}")
    ax.set(xlabel="seconds of training, evaluation and teacher", ylabel="validation, bits per byte", title=out.name)
    ax.legend()
    ax.grid(alpha=0.3)
    with replacing_file(out / "report.png") as new:
        fig.savefig(new, dpi=120, format="png")
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def settings(argv):
    """(config, names of the flags that were given): checked, and of a run that is resumed its own."""
    cfg, given = train.parse(DistillConfig, __doc__, argv, positional=("teacher",),
                             hidden=(*train.SHAPE, "preset", "init_from", "vocab_size", "control_steps"))
    if cfg.exits:                                     # all its weights go on from where they are: small steps
        cfg = dataclasses.replace(cfg, **{k: v for k, v in train.FINE_TUNE.items() if k not in given})
    out = Path(cfg.out)
    train.check_out(cfg)
    if cfg.resume:
        stored = train.read_state(out)["config"]
        for name in OWN & given - {"control", "teacher", "cache_dir"}:
            if getattr(cfg, name) != stored.get(name):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {out} has "
                                f"{stored.get(name)}: leave it out, or give another --out")
        cfg = train.resumed(cfg, given)
    check(cfg)
    for name in ("teacher", "student"):
        if getattr(cfg, name) and whole(getattr(cfg, name)).resolve().parent == out.resolve():
            raise UserError(f"the {name} is the run that --out {out} would replace: give another --out")
    history = read_config(whole(cfg.teacher)).get("history") or []
    cfg.data = cfg.data or next((e["data"] for e in reversed(history) if "data" in e), "")
    if not cfg.data:
        raise UserError(f"the teacher in {cfg.teacher} does not say what it learned: give --data")
    return cfg, given


@train.one_voice()
def main(argv=None):
    cfg, given = settings(argv)
    out, teacher_dir, machine = Path(cfg.out), whole(cfg.teacher), train.set_up(cfg)
    its_hash = checkpoint_hash(teacher_dir)
    torch.manual_seed(cfg.seed)                                              # of learned projections
    teacher = load(teacher_dir, machine.device, machine.dtype if machine.device.type == "cuda" else torch.float32)
    teacher.requires_grad_(False)
    total, window = teacher.config.num_hidden_layers, teacher.config.max_position_embeddings
    exits = numbers(cfg.exits, "--exits", 1, total - 1) if cfg.exits else []
    if cfg.context > window and "context" in given:
        raise UserError(f"--context {cfg.context} is more than the teacher's window of {window}")
    cfg.context = min(cfg.context, window)
    its_tokenizer, directory = sample.tokenizer_of(teacher, teacher_dir), train.open_data(cfg, given, machine)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.hash != its_tokenizer.hash and not cfg.from_samples:
        raise UserError(f"the teacher in {teacher_dir} has another tokenizer than the data {cfg.data}: prepare that "
                        f"with data/prepare.py --tokenizer {teacher_dir}, or let the teacher write text for a student "
                        "with the data's tokenizer: --from-samples TOKENS")
    if exits:
        layers, cfg.init_from = [], cfg.teacher
        student = train.open_model(cfg, given, tokenizer, machine)
    else:
        student, layers = make_student(cfg, given, teacher, tokenizer, machine)
    fresh = copy.deepcopy(student) if cfg.control else None                  # where the control starts too
    if cfg.resume:
        student = train.open_model(cfg, given, tokenizer, machine)
    student.exits = exits
    windows, val = (Windows(directory, split, cfg.context) for split in ("train", "val"))
    entry = train.history_entry(cfg, windows.meta, tokenizer, student)
    if cfg.resume and entry.get("teacher", {}).get("sha256") != its_hash:
        raise UserError(f"the teacher in {teacher_dir} is not the one that the run in {out} began with")
    if not cfg.resume:
        entry.update(step="exits" if exits else "distill", loss=cfg.loss, hard_weight=cfg.hard_weight, cache=cfg.cache,
                     teacher={"name": model_name(teacher_dir), "sha256": its_hash})
    ours, its, c = student.parameters_count(), teacher.parameters_count(), student.config
    taken = layers and cfg.init != "random" and not (cfg.student or cfg.from_samples)
    start = f", from {', '.join(map(str, layers))}" if taken else ""
    train.say(machine, f"teacher: {its:,} parameters, {total} layers of width {teacher.config.hidden_size}; student: "
              f"{ours:,} ({ours / its:.0%}), {c.num_hidden_layers} layers of width {c.hidden_size}{start}; expect "
              f"decode at {teacher.matmul_parameters() / student.matmul_parameters():.2f} x the speed, prefill at "
              f"{teacher.flops_per_token(cfg.context) / student.flops_per_token(cfg.context):.2f} x")
    if ours > its:
        train.say(machine, f"warning: the student ({ours:,} parameters) is larger than its teacher ({its:,})")
    eval_tokens = min(max(cfg.eval_tokens, cfg.context) if cfg.eval_tokens else math.inf, len(val.tokens))
    plain = batches = lambda first, count: windows.training_rows(cfg.seed, first, count)
    seconds = lambda *what: step_seconds(student, *what, cfg, machine)
    cached = 0.0
    if cfg.from_samples:
        if machine.rank == 0 and not cfg.resume:
            write_samples(cfg, teacher, its_tokenizer, windows, tokenizer)
        train.all_sum(machine, torch.zeros(()))                              # the others wait for it
        windows, loss_fn = Windows(out / "samples", "train", cfg.context), train.cross_entropy
    else:
        loss_fn = Exits(exits, tokenizer.vocab_size, cfg) if exits else \
            Distillation(teacher, student, layers, tokenizer.vocab_size, cfg).to(machine.device)
    # With a cache the teacher has no part in a step.
    machine = train.tuned(machine, cfg, student, plain, train.cross_entropy if cfg.cache else loss_fn)
    common = dict(evaluate=train.evaluator(val, cfg, machine, tokenizer), tokenizer=tokenizer,
                  eval_cost=eval_tokens / cfg.batch_size / cfg.context / 3, reading=windows.per_epoch * cfg.context)
    if cfg.cache:
        cache, pool = open_cache(cfg, teacher, its_hash, windows, tokenizer, machine,
                                 lambda: seconds(plain, train.cross_entropy))
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
        # Both numbers of steps are set now, from step times measured in turns: both schedules end decayed, and a slow
        # moment of the machine favours none.
        turns = torch.tensor([(seconds(batches, loss_fn), seconds(plain, train.cross_entropy)) for _ in range(3)])
        slow, fast = (train.all_sum(machine, turns).mean(0) / machine.size).tolist()
        cfg.steps = cfg.steps or (train.read_state(out)["total"] if cfg.resume else 0) or \
            train.plan(0, 0, 0.0, slow, common["eval_cost"], cfg, machine)
        cfg.control_steps = max(1, round((cfg.steps * slow + cached) / fast))
        entry["step_ms"] = [round(1000 * slow, 1), round(1000 * fast, 1)]
        train.say(machine, f"{cfg.steps:,} steps of {1000 * slow:.0f} ms; as long, the cache included, takes the "
                  f"control: {cfg.control_steps:,} of {1000 * fast:.0f} ms")
    train.fit(student, batches, loss_fn, cfg, machine, entry=entry, **common)
    if cfg.overwrite and not (cfg.resume or cfg.control) and machine.rank == 0:
        train.remove(out / "control")                                        # of the run that this one has replaced
    if cfg.control:
        begun = train.is_saved(out / "control" / "last")
        other = dataclasses.replace(cfg, out=str(out / "control"), steps=cfg.control_steps, resume=cfg.resume and begun)
        train.say(machine, "the control: the same student, by cross-entropy alone")
        control = train.open_model(other, given, tokenizer, machine) if other.resume else fresh
        train.fit(control, plain, train.cross_entropy, other, machine, entry={**entry, "step": "control"}, **common)
    if machine.rank == 0:
        models = {} if cfg.from_samples else {"teacher": teacher}
        models["student"] = student = load(out, machine.device)
        models.update({"control": load(out / "control", machine.device)} if cfg.control else {})
        models.update({f"exit after {e}": sample.first_layers(student, e) for e in exits})
        report(cfg, machine, models, val, tokenizer, cached)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
