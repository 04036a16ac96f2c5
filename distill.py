"""Teaches a smaller model from a larger one, and measures whether the teacher was worth its cost.

    python distill.py out --cache --control --out out-student     # the teacher runs once; a control
    python distill.py out --out out-student                       # the teacher runs in every step
    python distill.py out --student-layers 3 --init teacher-layers --loss jsd --beta 0.5 --out DIR
    python distill.py out --init random --student-width 96 --hidden cosine --out DIR
    python distill.py out --student PRUNED_DIR --attention-weight 1 --on-policy 0.3 --out DIR
    python distill.py out --exits 1 --out out-exits               # for sample.py --self-draft 1
    python distill.py TEACHER --from-samples 200000 --data NAME --out DIR    # other tokenizer
    python distill.py --out DIR --resume

OUT is the student's run, as train.py writes one. OUT/control is the run of the control: the same
student, trained by cross-entropy alone for the same time, the teacher's time included. report.md,
.json and .png compare both with the teacher.
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
from data.checkpoints import checkpoint_hash, find_model, model_name, tokenizer_of
from data.console import numbers, run
from data.files import replacing_file
from data.labels import LabelledBatch, open_cache
from data.loader import IGNORE, Windows
from data.machine import accelerate, in_dtype, logits_at_once, set_up, synchronize, to_device
from data.mixture import Mixture, open_mix
from data.prepare import prepare
from data.processes import all_sum, one_voice, say
from data.runs import SHAPE, check_out, history_entry, is_saved, open_data, read_state, remove, resumed
from data.schedule import plan
from data.sources import calibration_context, calibration_data, last_training
from data.structure import shaped, slice_model
from data.tokenizer import Tokenizer
from model import LAYERS, Transformer, load


# ---------------------------------------------------------------------------------------------------------------------
# Config: the settings of TrainConfig, and those of a teacher

@dataclasses.dataclass
class DistillConfig(train.TrainConfig):
    """Settings of a distillation: each field is a flag, each comment its help."""
    teacher: str = ""               # the model to learn from: a model directory or a run
    data: str = ""                  # prepared data: a name under data/, or a directory; "": what the teacher learned
    out: str = "out-student"        # the run's directory
    # the student
    student: str = ""               # start from this model directory, for example a pruned one
    init: str = "teacher-layers"    # teacher-layers (every k-th, as DistilBERT) or random
    layer_map: str = ""             # the teacher's layer for each of the student's, from 0: 0,2,5; "": spread evenly
    student_layers: int = 0         # transformer blocks; 0: the most with 60 % of the parameters, or half
    student_width: int = 0          # with --init random: channels of the residual stream; 0: the teacher's
    student_heads: int = 0          # with --init random: query heads; 0: in proportion
    student_ffn: int = 0            # with --init random: neurons of an MLP; 0: in proportion
    # against learning by heart: what a teacher says does that already
    weight_decay: float = 0.0       # as in train.py; -1: by how often the text is read
    average: int = 0                # as in train.py; -1: likewise
    dropout: float = 0.0            # as in train.py; -1: likewise
    # the loss
    loss: str = "forward"           # forward (KL(teacher, student)), reverse, or jsd (generalized, by --beta)
    beta: float = 0.5               # jsd: near 0 like forward, near 1 like reverse
    temperature: float = 1.0        # divides the logits of both models in the divergence
    hard_weight: float = 0.3        # weight of cross-entropy with the text; the teacher has the rest
    hidden: str = ""                # also pull mapped hidden states towards the teacher's: cosine or mse
    hidden_weight: float = 1.0      # weight of --hidden
    attention_weight: float = 0.0   # also pull mapped attention maps (KL, as MobileBERT), with this weight
    # the text
    on_policy: float = 0.0          # share of rows that the student writes itself and the teacher scores (GKD)
    cache: bool = False             # run the teacher once, keep sampled labels, learn from those
    cache_dir: str = ""             # directory of the labels, new or made before; "": OUT/cache
    passes: float = 2.0             # times a run reads each cached token, which sizes the cache unless --pool does
    pool: int = 0                   # learn from this many training tokens only; 0: all, with --cache by --passes
    from_samples: int = 0           # let the teacher write this many tokens, and train a fresh student on that text
    exits: str = ""                 # instead of a student: teach these early exits of the model, in layers: 1,2
    control: bool = False           # also train the control, for the same time
    control_steps: int = 0          # steps of the control, planned when the run begins


OWN = set(vars(DistillConfig())) - set(vars(train.TrainConfig()))
LIMITS = dict(hard_weight=(0, 1), on_policy=(0, 1), beta=(0.001, 0.999), temperature=(0.01, 100), passes=(0.01, 1e6))
ONLINE = ("hidden", "attention_weight", "on_policy")             # terms that need both models in every step
CONFLICTS = {"exits": (*ONLINE, "cache", "control", "student", "from_samples"),
             "from_samples": (*ONLINE, "cache", "control", "student"),
             "mix": ("cache", "pool", "from_samples"),           # these choose or write windows of one text
             "fsdp": ("attention_weight", "on_policy")}          # they use a block outside of its forward()


def check_distillation(cfg):
    """Raises UserError naming every impossible setting or combination: one list of rules."""
    train.check_training(cfg)
    flag = lambda name: "--" + name.replace("_", "-")
    choices = {"loss": DIVERGENCES, "init": ("teacher-layers", "random"), "hidden": ("", *HIDDEN_DISTANCES)}
    wrong = [] if cfg.teacher else ["which teacher? python distill.py TEACHER_DIR --out DIR"]
    wrong += [f"{flag(n)} must be one of {', '.join(o)}" for n, o in choices.items() if getattr(cfg, n) not in o]
    wrong += [f"{flag(n)} must be between {a} and {b}" for n, (a, b) in LIMITS.items() if not a <= getattr(cfg, n) <= b]
    wrong += [f"{flag(n)} must be at least 0" for n in sorted(OWN - LIMITS.keys())
              if isinstance(getattr(cfg, n), (int, float)) and not 0 <= getattr(cfg, n) < math.inf]
    wrong += [f"{flag(name)} goes without {flag(other)}" for name, others in CONFLICTS.items() for other in others
              if getattr(cfg, name) and getattr(cfg, other)]
    online = [flag(n) for n in ONLINE if getattr(cfg, n)]
    if cfg.cache and (online or cfg.loss != "forward" or cfg.temperature != 1):
        wrong.append(f"--cache keeps samples of the teacher at temperature 1, for --loss forward: leave it out, or "
                     f"{' '.join(online) or '--loss and --temperature'}")
    sizes = [flag(n) for n in ("student_width", "student_heads", "student_ffn") if getattr(cfg, n)]
    if sizes and (cfg.init != "random" or cfg.student):
        wrong.append(f"{sizes[0]} needs --init random: the teacher's layers, or --student, have their own")
    if wrong:
        raise UserError("; ".join(wrong))


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def kl(log_p, log_q):
    """KL(p || q), (N,), of log-probabilities (N, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def generalized_jsd(log_p, log_q, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al., 2023)."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


# A new loss is a function (log_p, log_q, beta) -> (N,) of log-probabilities (N, V), p the teacher's and
# q the student's, with a name here.
DIVERGENCES = {
    "forward": lambda log_p, log_q, beta: kl(log_p, log_q),      # the student covers the teacher (Hinton et al., 2015)
    "reverse": lambda log_p, log_q, beta: kl(log_q, log_p),      # the student stays within the teacher (MiniLLM, 2023)
    "jsd": generalized_jsd}


def divergence(student, teacher, loss="forward", beta=0.5, temperature=1.0):
    """Divergence D (N,) of float32 logits (N, V), and dD / d student (N, V) by autograd.

    D is never negative. A temperature T divides the logits; a factor T^2 keeps the gradient's size.
    """
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        log_q, log_p = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
        d = temperature ** 2 * DIVERGENCES[loss](log_p, log_q, beta)
        grad, = torch.autograd.grad(d.sum(), logits)
    return d.detach().clamp(min=0), grad


def sparse_targets(ids, weights, metrics):
    """Cross-entropy with a distribution over few ids, as a chunk function of train.ThroughHead.

    ids, weights: (N, M), the text's own id in column 0. The weights of a row sum to 1, or to 0 if
    nothing is learned. The cost is that of cross-entropy with one target.
    """
    def chunk(logits, rows):
        logits, t, w = logits.float(), ids[rows], weights[rows]
        total, z, probs = w.sum(1, keepdim=True), logits.gather(1, t), logits.softmax(1)
        log_sum = logits.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log()
        metrics["ce"] += ((log_sum - z[:, :1]) * total).sum()
        if logits.device.type != "cpu" or (total == 0).any():                  # to ask a GPU would be to wait for it
            probs *= total
        return (w * (log_sum - z)).sum(), probs.scatter_add_(1, t, -w)         # d loss / d logits = p - targets
    return chunk


def dense_targets(targets, hard, soft, teacher_logits, vocab_size, cfg, metrics):
    """hard * cross-entropy + soft * divergence, as a chunk function of train.ThroughHead.

    hard, soft: weights (N,); hard None: no cross-entropy. teacher_logits(rows) gives (rows, V). Ids
    from vocab_size on are padding in one model or both, and are no part of the divergence.
    """
    def chunk(logits, rows):
        logits = logits.float()
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


# hidden: the residual stream before each layer and after the last, (B, T, C) each.
States = collections.namedtuple("States", "layers hidden rotaries masks")
HIDDEN_DISTANCES = {"cosine": lambda a, b: 1 - F.cosine_similarity(a, b), "mse": lambda a, b: (a - b).square().mean(1)}


def attention_map(states, i):
    """Log of the attention weights of layer i, (B, H, T, T): the fused kernel never holds them."""
    block, x, mask = states.layers[i], states.hidden[i], states.masks[i]
    q, k = block.self_attn.queries_keys(block.input_layernorm(x), states.rotaries[i])  # (B, H, T, D), (B, K, T, D)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)                           # (B, H, T, D)
    scores = (q @ k.mT).float() * block.self_attn.head_dim ** -0.5                     # (B, H, T, T)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
    return scores.masked_fill(~mask, -1e9).log_softmax(-1)


class Distillation(nn.Module):
    """Loss of a student: cross-entropy with the text, divergence from the teacher, terms on states.

    layers: the teacher's layer for each layer of the student. A learned projection, no part of the
    student, joins hidden states of different widths (TinyBERT: Jiao et al., 2020).
    """
    def __init__(self, teacher, student, layers, vocab_size, cfg):
        super().__init__()
        self.teacher = [teacher]                      # in a list it is no submodule: not trained, not saved
        self.layers, self.vocab_size, self.cfg = layers, vocab_size, cfg
        self.register_buffer("teacher_seconds", torch.zeros(()))
        self.running = collections.deque()            # pairs of events on a GPU: see `timed`
        # A new term is a line here, (name in the log, weight, method), and the method: it gives the
        # distance (B * T,) of the student's States in layer i from the teacher's.
        self.terms = []
        if cfg.hidden:
            widths = student.config.hidden_size, teacher.config.hidden_size
            self.projections = nn.ModuleList(nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths, bias=False)
                                             for _ in layers)
            self.terms.append(("hidden", cfg.hidden_weight, self.hidden_distance))
        if cfg.attention_weight:
            self.terms.append(("attention", cfg.attention_weight, self.attention_distance))

    def hidden_distance(self, i, student, teacher):
        """Distance of the residual streams after two mapped layers."""
        a = self.projections[i](student.hidden[i + 1]).flatten(0, 1).float()           # (B * T, C of the teacher)
        return HIDDEN_DISTANCES[self.cfg.hidden](a, teacher.hidden[self.layers[i] + 1].flatten(0, 1).float())

    def attention_distance(self, i, student, teacher):
        """KL divergence of attention maps, mean over heads (MobileBERT: Sun et al., 2020)."""
        log_q, log_p = attention_map(student, i), attention_map(teacher, self.layers[i])
        if log_q.shape[1] != log_p.shape[1]:          # other numbers of heads: compare the mean maps, (B, 1, T, T)
            log_q, log_p = (a.exp().mean(1, keepdim=True).clamp(min=1e-30).log() for a in (log_q, log_p))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).flatten()

    @torch.no_grad()
    def timed(self, function, *args, **options):
        """The result of a function of the teacher, whose time is added to teacher_seconds.

        A GPU is not waited for: it notes the times itself, and what is finished is added.
        """
        if next(self.teacher[0].parameters()).is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = function(*args, **options)
            end.record()
            self.running.append((start, end))
            while self.running and self.running[0][1].query():
                start, end = self.running.popleft()
                self.teacher_seconds += start.elapsed_time(end) / 1000                 # milliseconds
            return result
        start, result = time.perf_counter(), function(*args, **options)
        synchronize(result.device)
        self.teacher_seconds += time.perf_counter() - start
        return result

    def forward(self, model, batch):
        cfg, metrics, batch = self.cfg, collections.defaultdict(float), LabelledBatch(*batch)
        if cfg.hard_weight == 1 and not (self.terms or cfg.on_policy):
            return train.cross_entropy(model, batch)
        teacher, hidden, teacher_hidden = self.teacher[0], [], []
        x = model(batch.ids, segments=batch.segments, head=False, hidden=hidden).flatten(0, 1)         # (B * T, C)
        keep, head = (batch.targets != IGNORE).flatten().float(), model.lm_head                        # (B * T,)
        if batch.labels is not None:
            chunk = sparse_targets(batch.labels.flatten(0, 1), batch.weights.flatten(0, 1), metrics)   # (B * T, M)
            return train.ThroughHead.apply(x, head.weight, chunk, head.bias), keep.sum(), metrics
        y = self.timed(teacher, batch.ids, segments=batch.segments, head=False, hidden=teacher_hidden).flatten(0, 1)
        hard = keep * cfg.hard_weight
        if batch.sampled is not None:
            hard[batch.sampled.flatten()] = 0         # text that the student wrote is no example
        chunk = dense_targets(batch.targets.flatten(), hard if cfg.hard_weight else None, keep - hard,
                              lambda rows: self.timed(teacher.lm_head, y[rows]), self.vocab_size, cfg, metrics)
        loss = train.ThroughHead.apply(x, head.weight, chunk, head.bias)
        if self.terms:
            states = [States(m.model.layers, h, *m.model.prepare(batch.ids, segments=batch.segments)[1:])
                      for m, h in ((model, hidden), (teacher, teacher_hidden))]
            for i, (name, weight, distance) in itertools.product(range(len(self.layers)), self.terms):
                d = (distance(i, *states) * keep).sum()
                loss = loss + weight * d / len(self.layers)
                metrics[name] += d.detach() / len(self.layers)
        return loss, keep.sum(), metrics


class Exits(nn.Module):
    """Loss of early exits: cross-entropy at the end, and the KL divergence of each exit from there.

    Exits share norm and head (FastBERT: Liu et al., 2020; LayerSkip: Elhoushi et al., 2024).
    """
    def __init__(self, exits, vocab_size, cfg):
        super().__init__()
        self.exits, self.vocab_size, self.cfg = exits, vocab_size, dataclasses.replace(cfg, loss="forward")

    def forward(self, model, batch):
        metrics, hidden, targets = collections.defaultdict(float), [], batch.targets.flatten()
        x = model(batch.ids, segments=batch.segments, head=False, hidden=hidden).flatten(0, 1)         # (B * T, C)
        head = model.lm_head
        loss, y = train.linear_cross_entropy(x, head.weight, targets, head.bias), x.detach()
        chunk = dense_targets(targets, None, (targets != IGNORE).float() / len(self.exits),
                              lambda rows: head(y[rows]), self.vocab_size, self.cfg, metrics)
        for e in self.exits:
            h = model.model.finish(hidden[e]).flatten(0, 1)                                            # (B * T, C)
            loss = loss + train.ThroughHead.apply(h, head.weight, chunk, head.bias)
        return loss, (targets != IGNORE).sum(), metrics


# ---------------------------------------------------------------------------------------------------------------------
# The text: labels of a teacher that ran before, and rows that the student writes

def teacher_probs(teacher, batch, machine, vocab_size):
    """Yields the teacher's distributions (R, vocab_size) at a batch's learned positions."""
    batch = to_device(batch, machine.device)
    with torch.no_grad(), in_dtype(machine):
        x = teacher(batch.ids, segments=batch.segments, head=False)[batch.targets != IGNORE]           # (positions, C)
        for h in x.split(max(1, logits_at_once(machine.device) // vocab_size)):
            yield teacher.lm_head(h)[:, :vocab_size].float().softmax(1)


def on_policy_rows(batch, first, student, tokenizer, cfg, machine):
    """A LabelledBatch, a share cfg.on_policy written by the student (GKD: Agarwal et al., 2023).

    The student continues the first quarter of a row, or answers the first prompt. `first` is the
    number of the first row; row n is a function of (seed, n) and the student.
    """
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
    return LabelledBatch(ids, targets, segments, sampled=sampled)


def open_samples(cfg, teacher, teacher_tokenizer, windows, tokenizer, machine):
    """Sequence-level distillation (Kim and Rush, 2016): Windows of text that the teacher writes.

    Each text continues 16 tokens of the data. The first process writes OUT/samples, once for a run.
    """
    if windows.mask is not None:
        raise UserError("--from-samples continues plain text, and the data holds prompts and responses")
    file, length, texts = Path(cfg.out) / "samples.jsonl", teacher.config.max_position_embeddings - 16, []
    if machine.rank == 0 and not cfg.resume:
        for row in tqdm(range(0, math.ceil(cfg.from_samples / length), 16), desc="teacher writes", unit="batch",
                        disable=None, leave=False):
            prompts = [teacher_tokenizer.encode(tokenizer.decode(ids.tolist()))[:16]
                       for ids in windows.training_rows(cfg.seed, row, 16).ids]
            prompts = torch.tensor([p[:min(map(len, prompts))] for p in prompts])                      # (16, up to 16)
            random = torch.Generator(machine.device).manual_seed(cfg.seed * 10 ** 9 + row)
            new = torch.stack(list(sample.generate(teacher, prompts, length, vocab_size=teacher_tokenizer.vocab_size,
                                                   generator=random)), dim=1).cpu()                    # (16, length)
            texts += [json.dumps({"text": text}) + "\n" for ids in torch.cat((prompts, new), dim=1).tolist()
                      for text in teacher_tokenizer.decode(ids).split(teacher_tokenizer.eos_token)]    # documents
        with replacing_file(file) as new:
            new.write_text("".join(texts), encoding="utf-8")
        prepare(inputs=[file], out=file.with_suffix(""), tokenizer=tokenizer, overwrite=True)
    all_sum(machine, torch.zeros(()))                            # the other processes wait for the first
    return Windows(file.with_suffix(""), "train", cfg.context)


# ---------------------------------------------------------------------------------------------------------------------
# The student

def spread(n, total):
    """n of `total` layers: the first, the last and evenly between."""
    return [int(i * (total - 1) / max(1, n - 1) + 0.5) for i in range(n)]


def default_layers(teacher):
    """The most layers with 60 % of the parameters and 1.6 x the speed, or half of the layers."""
    total = teacher.config.num_hidden_layers
    for n in range(total - 1, 0, -1):
        with torch.device("meta"):
            student = Transformer(shaped(teacher.config, spread(n, total)))
        if (student.parameters_count() <= 0.6 * teacher.parameters_count()
                and 1.6 * student.matmul_parameters() <= teacher.matmul_parameters()):
            return n
    return max(1, total // 2)


def random_student(cfg, config, layers, tokenizer):
    """A student with random weights: the teacher's `config`, with the sizes of the flags."""
    width = cfg.student_width or config.hidden_size
    heads = cfg.student_heads or max(1, width * config.num_attention_heads // config.hidden_size)
    if width % heads or width // heads % 2:
        raise UserError(f"--student-width ({width}) must be an even multiple of --student-heads ({heads})")
    shared = config.num_attention_heads // config.num_key_value_heads        # query heads on one key-value head
    factor = config.embedding_multiplier                                     # Gemma's follows the width
    factor = width ** 0.5 if factor == config.hidden_size ** 0.5 else factor
    student = Transformer(shaped(
        config, layers, embedding_multiplier=factor, hidden_size=width, num_attention_heads=heads,
        head_dim=width // heads, num_key_value_heads=heads // shared if heads % shared == 0 else heads,
        intermediate_size=cfg.student_ffn or max(1, config.intermediate_size * width // config.hidden_size),
        vocab_size=tokenizer.vocab_size if cfg.from_samples else config.vocab_size))
    return student.initialize(torch.Generator().manual_seed(cfg.seed))


def student_of_layers(cfg, teacher, layers):
    """A copy of the teacher with the listed layers alone (DistilBERT: Sanh et al., 2019)."""
    total = teacher.config.num_hidden_layers
    if len(layers) > total:
        raise UserError(f"--student-layers {len(layers)} is more than the teacher's {total}: give --init random")
    if teacher.compression:
        raise UserError(f"{cfg.teacher} has layers that are not dense, and a student starts from dense ones: use "
                        "--init random, or distill from the model that it was made of")
    if teacher.dtype != torch.float32:                           # on a GPU the teacher runs in 16 bits
        teacher = load(cfg.teacher, dtype=torch.float32)
    return slice_model(teacher, {"layers": torch.tensor(layers)})


def make_student(cfg, given, teacher, tokenizer, machine):
    """(student, for each of its layers the teacher's). Raises UserError for impossible sizes."""
    total, n = teacher.config.num_hidden_layers, cfg.student_layers
    start = cfg.teacher if cfg.exits else cfg.student
    if start:
        cfg.init_from = start
        begun = dataclasses.replace(cfg, resume=False)
        student = train.model_to_train(begun, given, tokenizer, machine)
        cfg.context, n = begun.context, student.config.num_hidden_layers     # its window may be shorter
    layers = spread(n or default_layers(teacher), total)
    if cfg.layer_map:
        layers = numbers(cfg.layer_map, "--layer-map", 0, total - 1)
    if n and len(layers) != n:
        raise UserError(f"--layer-map names {len(layers)} layers, but the student has {n}")
    if not start and (cfg.init == "random" or cfg.from_samples):
        student = random_student(cfg, teacher.config, layers, tokenizer)
    elif not start:
        student = student_of_layers(cfg, teacher, layers)
    student.exits = numbers(cfg.exits, "--exits", 1, total - 1) if cfg.exits else []
    return student.to(machine.device).train(), layers


# ---------------------------------------------------------------------------------------------------------------------
# Training as a step of a chain (compress.py): recovery, and quantization-aware training

class Rounded(torch.autograd.Function):
    """Straight-through estimator (Bengio et al., 2013): rounds a weight, passes on the gradient."""
    @staticmethod
    def forward(ctx, weight, entry):                  # entry: of Transformer.compression
        spec = {k: v for k, v in entry.items() if k not in ("module", "kind")}
        return LAYERS[entry["kind"]].from_dense(types.SimpleNamespace(weight=weight), **spec).dense()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def rounded_weights(model, entries):
    """{name: rounded weight} of a dense model; gradients reach the dense weights."""
    return {f"{e['module']}.weight": Rounded.apply(model.get_parameter(f"{e['module']}.weight"), e) for e in entries}


def qat_loss(teacher, entries, cfg, vocab_size):
    """Loss of quantization-aware training: a Distillation of the model with rounded weights.

    Half divergence from the dense teacher, half cross-entropy: 1.2461 bits per byte of the standard
    library, where either alone had 1.2499 and 1.2487 after as many steps.
    """
    distillation = Distillation(teacher, teacher, (), vocab_size, cfg)

    def loss_fn(model, batch):
        weights = {f"model.{name}": weight for name, weight in rounded_weights(model, entries).items()}
        return torch.func.functional_call(train.ModelAndLoss(model, distillation), weights, (batch,))
    return loss_fn


def recover_step(model, tokenizer, step, args):
    """Step recover: a short training, taught by the model that entered the chain, or by the text.

    A model of the standard library, sliced to 74 %, went from 1.239 to 1.276 bits per byte, and in
    95 steps (5 % of its training) back to 1.260 with a quarter of the weight on the text; 1.261 by
    the teacher alone, 1.264 with half, 1.272 by the text alone. Muon was no better than AdamW.
    """
    method, steps = step.method, min(6, int(step.value)) if args.smoke else int(step.value)
    if method == "taught" and Tokenizer.load(find_model(args.model)).hash != tokenizer.hash:
        print("recover: the model that entered the chain has another vocabulary and cannot teach: text alone does")
        method = "text"

    def make_loss(cfg, device):
        if method == "text":
            return train.cross_entropy
        teacher = accelerate(load(args.model, device, torch.float32), args.native)
        return Distillation(teacher, model, (), tokenizer.vocab_size, cfg)

    model, entry = fine_tune(model, tokenizer, step, {"step": step.name, "method": method}, args, make_loss, steps,
                             batch_size=4, evals=1, warmup=5)
    return model, tokenizer, entry


def quantization_aware_training(model, tokenizer, step, entries, entry, args):
    """Trains a dense model so that rounding its weights costs little: (dense model, history entry).

    The model before training is the teacher (LLM-QAT: Liu et al., 2023, but on real data).
    """
    teacher = copy.deepcopy(model)
    make_loss = lambda cfg, device: qat_loss(teacher.to(device), entries, cfg, tokenizer.vocab_size)

    def with_rounded_weights(student):
        result = copy.deepcopy(student)
        with torch.no_grad():
            for name, weight in rounded_weights(student, entries).items():
                result.get_parameter(name).copy_(weight)
        return result

    return fine_tune(model, tokenizer, step, entry, args, make_loss, args.qat_steps, with_rounded_weights,
                     batch_size=8, evals=2, hard_weight=0.5)


def keep_zeros(model):
    """An after_step for train.fit that keeps zeros zero after a step `sparse`; otherwise None."""
    if not any(entry["step"] == "sparse" for entry in model.history):
        return None
    zeros = {name: p.detach() == 0 for name, p in model.model.layers.named_parameters() if p.ndim > 1}

    def after_step(model):
        for name, zero in zeros.items():
            weight = model.model.layers.get_parameter(name).data
            weight.masked_fill_(zero.to(weight.device), 0)
    return after_step


def fine_tune(model, tokenizer, step, entry, args, make_loss, steps, evaluated=lambda model: model, **settings):
    """Trains a copy of a model on the calibration data of a chain: (trained model, history entry).

    make_loss(cfg, device) gives the loss_fn, evaluated(model) the model to evaluate instead;
    settings are fields of DistillConfig. A run that is in args.run is continued.
    """
    source, run_dir, context = calibration_data(model, tokenizer, args), Path(args.run), calibration_context(model)
    if source.is_file():
        raise UserError(f"--calibration {source} is a text file, and {step.method or step.name} learns from prepared "
                        f"data: make it so with python data/prepare.py --input {source} --tokenizer {args.model} "
                        "--name NAME")
    rates = {**train.FINE_TUNE, **dict.fromkeys(("lr", "embed_lr", "matrix_lr"), args.lr)}
    cfg = DistillConfig(**rates, **settings, out=str(run_dir), resume=is_saved(run_dir / "last"), steps=steps,
                        context=context, seed=args.seed, native=args.native, device=args.device,
                        # not more than it learns from: a short training is not to be mostly evaluation
                        eval_tokens=2048 if args.smoke else min(131072, steps * settings["batch_size"] * context))
    windows, val = (Windows(source, split, context) for split in ("train", "val"))
    entry = {**entry, "data": windows.meta["name"], "data_sha256": windows.meta["sha256"], "seed": args.seed,
             "context": context, "batch_size": cfg.batch_size, "lr": args.lr, "total": steps}
    student = copy.deepcopy(load(run_dir / "last") if cfg.resume else model).float()    # not the memory-mapped file
    if cfg.resume and student.history[-1]["data_sha256"] != entry["data_sha256"]:
        raise UserError(f"{run_dir} was begun with other data: begin anew with --overwrite")
    machine = set_up(cfg)
    student, loss_fn = student.to(machine.device), make_loss(cfg, machine.device)
    batches = lambda first, count: windows.training_rows(cfg.seed, first, count)
    machine = train.tuned(machine, cfg, student, batches, loss_fn)
    score = train.evaluator(val, cfg, machine, tokenizer)
    if not cfg.resume:
        print(f"{step.name}: {score(evaluated(student))['bits_per_byte']:.4f} bits per byte of validation without "
              "training", flush=True)
    train.fit(student, batches, loss_fn, cfg, machine, evaluate=lambda student: score(evaluated(student)),
              tokenizer=tokenizer, entry=entry, reading=Mixture(windows).readings(), after_step=keep_zeros(model))
    trained = copy.deepcopy(load(run_dir / "best"))              # the memory-mapped file is about to be removed
    return trained.to(next(model.parameters()).device), trained.history.pop()


# ---------------------------------------------------------------------------------------------------------------------
# The command

def settings(argv):
    """(checked config, names of the given flags); with --resume the config of the run."""
    cfg, given = train.parse(DistillConfig, __doc__, argv, positional=("teacher",),
                             hidden=(*SHAPE, "preset", "init_from", "vocab_size", "control_steps"))
    if cfg.exits:                                     # a trained model goes on: small steps of all weights
        cfg = dataclasses.replace(cfg, **{k: v for k, v in train.FINE_TUNE.items() if k not in given})
    check_out(cfg)
    if cfg.resume:
        stored = read_state(cfg.out)["config"]
        for name in OWN & given - {"control", "teacher", "cache_dir"}:
            if getattr(cfg, name) != stored.get(name):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {cfg.out} has "
                                f"{stored.get(name)}: leave it out, or give another --out")
        cfg = resumed(cfg, given)
    check_distillation(cfg)
    for name in ("teacher", "student"):
        if getattr(cfg, name) and find_model(getattr(cfg, name)).resolve().parent == Path(cfg.out).resolve():
            raise UserError(f"the {name} is the run that --out {cfg.out} would replace: give another --out")
    return cfg, given


def open_teacher(cfg, given, machine):
    """(teacher, tokenizer, name and hash as a dict); sets cfg.data and cfg.context if not given."""
    directory = find_model(cfg.teacher)
    teacher = load(directory, machine.device, machine.dtype if machine.device.type == "cuda" else torch.float32)
    accelerate(teacher, cfg.native).requires_grad_(False)
    window = teacher.config.max_position_embeddings
    cfg.data = cfg.data or last_training(teacher.history).get("data", "")
    if not cfg.data:
        raise UserError(f"the teacher in {cfg.teacher} does not say what it learned: give --data")
    if cfg.context > window and "context" in given:
        raise UserError(f"--context {cfg.context} is more than the teacher's window of {window}")
    cfg.context = min(cfg.context, window)
    entry = {"name": model_name(directory), "sha256": checkpoint_hash(directory)}
    return teacher, tokenizer_of(teacher, directory), entry


def say_sizes(cfg, machine, teacher, student, layers):
    """Prints the sizes of teacher and student, and the speed to expect."""
    large, small = teacher.parameters_count(), student.parameters_count()
    shape = lambda model: f"{model.config.num_hidden_layers} layers of width {model.config.hidden_size}"
    decode = teacher.matmul_parameters() / student.matmul_parameters()
    prefill = teacher.flops_per_token(cfg.context) / student.flops_per_token(cfg.context)
    copied = not (cfg.init_from or cfg.init == "random" or cfg.from_samples)
    start = f", from {', '.join(map(str, layers))}" if copied else ""
    say(machine, f"teacher: {large:,} parameters, {shape(teacher)}; student: {small:,} ({small / large:.0%}), "
        f"{shape(student)}{start}; expect decode at {decode:.2f} x the speed, prefill at {prefill:.2f} x")
    if small > large:
        say(machine, f"warning: the student ({small:,} parameters) is larger than its teacher ({large:,})")


def step_seconds(model, batches, loss_fn, cfg, machine):
    """Median seconds of a training step of this process alone. Model and loss stay unchanged."""
    alone = dataclasses.replace(cfg, batch_size=cfg.batch_size // machine.size)
    machines = {"": machine._replace(rank=0, size=1)}
    return float(np.median(train.timed_steps(model, batches, loss_fn, alone, machines, seconds=0, rounds=4)[""]))


def plan_both(cfg, entry, machine, student, ways, eval_cost, cached):
    """Plans steps of student and control for the same time; ways: (batches, loss_fn) of each."""
    # Steps are timed in turns, so that a slow moment of the machine favours neither.
    turns = torch.tensor([[step_seconds(student, *way, cfg, machine) for way in ways] for _ in range(3)])
    slow, fast = (all_sum(machine, turns).mean(0) / machine.size).tolist()
    cfg.steps = (cfg.steps or (read_state(cfg.out)["total"] if cfg.resume else 0)
                 or plan(0, 0, 0.0, slow, eval_cost, cfg, machine))
    cfg.control_steps = max(1, round((cfg.steps * slow + cached) / fast))
    entry["step_ms"] = [round(1000 * slow, 1), round(1000 * fast, 1)]
    say(machine, f"{cfg.steps:,} steps of {1000 * slow:.0f} ms; the control trains for the same time, the cache "
        f"included: {cfg.control_steps:,} steps of {1000 * fast:.0f} ms")


def rows_to_learn(cfg, teacher, teacher_hash, student, windows, plain, tokenizer, machine):
    """(batches for train.fit, teacher's seconds before), by --cache, --pool and --on-policy."""
    if cfg.cache:
        distributions = lambda batch: teacher_probs(teacher, batch, machine, tokenizer.vocab_size)
        step_cost = lambda: step_seconds(student, plain, train.cross_entropy, cfg, machine)
        cache, pool = open_cache(cfg, distributions, teacher_hash, windows, tokenizer, machine, step_cost)
        labelled = lambda first, count: cache.rows(pool, cfg.seed, first, count, cfg.hard_weight, machine.device)
        return labelled, cache.header["seconds"]
    pool = windows.subset(cfg.pool // cfg.context, cfg.seed) if cfg.pool else None
    text = plain if pool is None else lambda first, count: pool.training_rows(cfg.seed, first, count)
    if cfg.on_policy:
        return lambda first, count: on_policy_rows(text(first, count), first, student, tokenizer, cfg, machine), 0.0
    return text, 0.0


@one_voice()
def main(argv=None):
    """Opens teacher, data and student, trains student and control, compares: stage after stage."""
    cfg, given = settings(argv)
    machine = set_up(cfg)
    torch.manual_seed(cfg.seed)                                  # of learned projections
    teacher, teacher_tokenizer, teacher_entry = open_teacher(cfg, given, machine)
    directory = open_data(cfg, given, machine)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.hash != teacher_tokenizer.hash and not cfg.from_samples:
        raise UserError(f"the teacher in {cfg.teacher} has another tokenizer than the data {cfg.data}: prepare that "
                        f"with data/prepare.py --tokenizer {cfg.teacher}, or let the teacher write text for a student "
                        "with the data's tokenizer: --from-samples TOKENS")
    student, layers = make_student(cfg, given, teacher, tokenizer, machine)
    control = copy.deepcopy(student) if cfg.control else None
    if cfg.resume:
        student = train.model_to_train(cfg, given, tokenizer, machine)
    windows, val = (Windows(directory, split, cfg.context) for split in ("train", "val"))
    mix = open_mix(cfg, directory, tokenizer)
    entry = history_entry(cfg, windows.meta, tokenizer, student, mix)
    if cfg.resume and entry.get("teacher", {}).get("sha256") != teacher_entry["sha256"]:
        raise UserError(f"the teacher in {cfg.teacher} is not the one that the run in {cfg.out} began with")
    if not cfg.resume:
        entry.update(step="exits" if student.exits else "distill", loss=cfg.loss, hard_weight=cfg.hard_weight,
                     cache=cfg.cache, teacher=teacher_entry)
    say_sizes(cfg, machine, teacher, student, layers)

    if cfg.from_samples:
        windows = open_samples(cfg, teacher, teacher_tokenizer, windows, tokenizer, machine)
        loss_fn = train.cross_entropy
    elif student.exits:
        loss_fn = Exits(student.exits, tokenizer.vocab_size, cfg)
    else:
        loss_fn = Distillation(teacher, student, layers, tokenizer.vocab_size, cfg).to(machine.device)
    stream = Mixture(windows, mix)
    plain = lambda first, count: stream.training_rows(cfg.seed, first, count)
    # With a cache the teacher has no part in a step.
    machine = train.tuned(machine, cfg, student, plain, train.cross_entropy if cfg.cache else loss_fn)
    batches, cached = rows_to_learn(cfg, teacher, teacher_entry["sha256"], student, windows, plain, tokenizer, machine)
    if not cfg.resume:                                           # making the cache is a part of the time budget
        cfg.minutes -= min(cached / 60, 0.9 * cfg.minutes)
    common = dict(evaluate=train.evaluator(val, cfg, machine, tokenizer, mix), tokenizer=tokenizer,
                  eval_cost=train.evaluation_size(val, cfg, mix)[1], reading=stream.readings())
    if cfg.control and not cfg.control_steps:
        plan_both(cfg, entry, machine, student, ((batches, loss_fn), (plain, train.cross_entropy)), common["eval_cost"],
                  cached)

    train.fit(student, batches, loss_fn, cfg, machine, entry=entry, **common)
    if cfg.control:
        train_control(cfg, given, tokenizer, machine, control, plain, entry, common)
    elif cfg.overwrite and not cfg.resume and machine.rank == 0:
        remove(Path(cfg.out) / "control")                        # of the run that this one has replaced
    if machine.rank == 0:
        compare_all(cfg, machine, teacher, val, tokenizer, cached)


def train_control(cfg, given, tokenizer, machine, control, plain, entry, common):
    """Trains the control, a copy of the untrained student, by cross-entropy alone."""
    out = Path(cfg.out) / "control"
    cfg = dataclasses.replace(cfg, out=str(out), steps=cfg.control_steps, resume=cfg.resume and is_saved(out / "last"))
    say(machine, "the control: the same student, by cross-entropy alone")
    if cfg.resume:
        control = train.model_to_train(cfg, given, tokenizer, machine)
    train.fit(control, plain, train.cross_entropy, cfg, machine, entry={**entry, "step": "control"}, **common)


def compare_all(cfg, machine, teacher, val, tokenizer, cached):
    """Measures teacher, student, control and exits on the same text, and writes the report."""
    from data.measure import report                              # here, as measure imports the scripts
    models = {} if cfg.from_samples else {"teacher": teacher.float()}          # one number type: their speeds compare
    models["student"] = student = accelerate(load(cfg.out, machine.device, torch.float32), cfg.native)
    if cfg.control:
        models["control"] = accelerate(load(Path(cfg.out) / "control", machine.device, torch.float32), cfg.native)
    models.update({f"exit after {e}": sample.first_layers(student, e) for e in student.exits})
    report(cfg, machine, models, val, tokenizer, cached)


if __name__ == "__main__":
    run(main)
