"""Finds, makes and measures the best chain of steps for a limit: compress.py --fit.

Cuts are made and measured; the best few learn again, are rounded for real, and meet the one ruler.
"""
import argparse, copy, dataclasses, json, math, re, shlex, shutil, time
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError
from data.chain import (MEASURING, chain_name, check_chain_out, check_flags, check_order, open_stages, parse_chain,
                        resume_hint)
from data.checkpoints import find_model, model_name
from data.files import MODEL, read_json, remove_tree, replacing, write_json
from data.formats import FORMATS, bits_and_losses, knapsack, layers_to_quantize, possible_formats
from data.loader import Batch, stream_batches
from data.report import check_report, markdown, table, write_report
from data.sources import calibration, calibration_context, calibration_data, calibration_rows, scored_text
from data.structure import dense_layers
from data.tokenizer import Tokenizer
from data.vocabulary import reencoded

UNITS, NUMBER = {"kb": 1e3, "mb": 1e6, "gb": 1e9}, r"(\d+\.?\d*|\.\d+)"
PATTERNS = {"bytes": NUMBER + "([kmg]b)", "speed": NUMBER + "tok/s()", "loss": r"\+" + NUMBER + "%()"}
LEAST_KEPT = 0.2                                                 # of the weights: a smaller share is no cut, but ruin
SHORT, DECAY = 8, 0.2            # a trial has an eighth of the training; what is lost falls as steps ^ -0.2
TRIALS, FINALISTS = 4, 3
WRONG = 1 / 3                    # how wrong an expected loss may be: a plan that should lose so much more is not made
CUTS = ("width", "depth", "vocab", "lowrank")                    # steps that are tried


@dataclasses.dataclass
class Limits:
    """The limits of --fit; None: there is no such limit."""
    bytes: float = None                                          # of the file, at most
    speed: float = None                                          # tokens/s of decoding, at least
    loss: float = None                                           # bits per byte more than the model, in percent

    @classmethod
    def parse(cls, text):
        """The limits written 1MB, 2000tok/s or +2%, several with commas. Raises UserError."""
        found = {}
        for part in text.replace(" ", "").split(","):
            for name, pattern in PATTERNS.items():
                match = re.fullmatch(pattern, part.lower())
                if match and float(match[1]) > 0 and name not in found:
                    found[name] = float(match[1]) * UNITS.get(match[2], 1)
                    break
            else:
                raise UserError(f"--fit {text}: a limit is written 1MB (or kB, GB), 2000tok/s or +2% (bits per byte), "
                                "each at most once, several with commas: --fit 1MB,+3%")
        return cls(**found)

    def met(self, size, loss, speed=None):
        """Whether a file of `size` bytes meets the limits, at `loss` percent more bits per byte, and at `speed`."""
        return not (self.bytes and size > self.bytes or self.loss and loss > self.loss
                    or self.speed and speed is not None and speed < self.speed)

    def order(self, size, loss):
        """What a choice is sorted by, least first: the loss; of a limit on the loss alone, the size."""
        return (loss, size) if self.bytes or self.speed else (size, loss)


@dataclasses.dataclass
class Cut:
    """A model before it is rounded, and what rounding it would give."""
    words: list                                                  # steps, as they are written
    loss: float = 0.0                                            # percent more bits per byte of calibration text
    expected: float = 0.0                                        # the same, after the whole training
    weights: int = 0                                             # in matrices
    other: int = 0                                               # bytes of the file that are not in matrices, at most
    least: float = 0.0                                           # bits per weight of the smallest formats
    most: float = 0.0                                            # of int8
    uniform: dict = None                                         # {step that rounds all alike to four bits: of that}
    dense: int = 0                                               # bytes of the file as it is
    speed: float = None                                          # tokens/s with int8

    def size(self, bits):
        """Bytes of the file, at most, with so many bits per weight."""
        return self.other + math.ceil(bits * self.weights / 8)


@dataclasses.dataclass
class Plan:
    """A whole chain, with what is expected of it."""
    cut: Cut
    words: list
    size: int
    loss: float                                                  # percent more bits per byte, expected
    row: dict = None                                             # of `measure`
    seconds: float = None                                        # to make it; stages that are there already take none

    @property
    def name(self):
        return " ".join(self.words)


def file_bytes(model, entries):
    """Bytes of model.safetensors of a dense model whose layers become `entries`, exactly."""
    from model import empty                                      # here, as the scripts import this file
    tied, header, position = model.config.tie_word_embeddings, {"__metadata__": {"format": "pt"}}, 0
    tensors = {name: t for name, t in empty(model.config, model.compression + entries).state_dict().items()
               if not (tied and name.startswith("lm_head."))}
    kinds = {torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16"}
    typed = {name: (t, t.dtype if t.dtype in kinds else model.dtype) for name, t in tensors.items()}
    for name in sorted(typed, key=lambda name: (-typed[name][1].itemsize, name)):        # the order of safetensors
        t, dtype = typed[name]
        code = kinds.get(dtype) or {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        start, position = position, position + t.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(t.shape), "data_offsets": [start, position]}
    return position + 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def sizes_of(cut, model):
    """Fills in the sizes of a Cut from its model."""
    layers, entries = dense_layers(model), possible_formats(model)
    cut.weights = sum(layer.weight.numel() for layer in layers.values())

    def bits(form, layer):
        rows, columns = layer.weight.shape
        return rows * (4 * columns + 16 * columns // form["group"] if "group" in form else 8 * columns + 16)

    cut.least, cut.most = (sum(bits(forms[i], layers[name]) for name, forms in entries.items()) / cut.weights
                           for i in (0, -1))
    cut.uniform = {f"int4:{form['group']}:gptq": 4 + 16 / form["group"] for form in FORMATS if "group" in form
                   and all({"module": name, **form} in forms for name, forms in entries.items())}
    cut.dense, rounded = file_bytes(model, []), file_bytes(model, [forms[-1] for forms in entries.values()])
    cut.other = rounded - round(cut.most * cut.weights / 8) + 4 * len(entries)           # shapes of scales get longer


def plans_of(cut, limits, growth):
    """The Plans of a Cut that should meet the limits. growth(bits): percent that rounding costs."""
    plans = []
    if limits.bytes:
        bits = [min(cut.most, math.floor(8000 * (limits.bytes - cut.other) / cut.weights) / 1000)]
    else:
        bits = [cut.least + share * (cut.most - cut.least) for share in (0, 0.05, 0.1, 0.2, 0.4, 1)]
    for b in (math.ceil(1000 * b - 1e-6) / 1000 for b in bits if b >= cut.least):
        word = "int8" if b >= cut.most else f"mixed:{b:g}"
        plans.append(Plan(cut, [*cut.words, word], cut.size(b), cut.expected + growth(b)))
    if cut.words and cut.speed is None:                          # a speed was measured with int8: dense is slower
        plans.append(Plan(cut, cut.words, cut.dense, cut.expected))
    plans = [plan for plan in plans if limits.met(plan.size, plan.loss, cut.speed)]
    return sorted(plans, key=lambda plan: limits.order(plan.size, plan.loss))


def uniform_plan(plan, limits, growth):
    """[Plan of the same cut with one format for all matrices], if it needs no more bytes than a mix.

    It is made too: later layers repair what rounding does, which no estimate for each matrix knows.
    """
    steps = {word: bits for word, bits in plan.cut.uniform.items() if plan.cut.size(bits) <= plan.size}
    if not steps or not plan.words[-1].startswith("mixed"):
        return []
    word, bits = max(steps.items(), key=lambda step: step[1])
    alike = Plan(plan.cut, [*plan.cut.words, word], plan.cut.size(bits), plan.cut.expected + growth(bits))
    return [alike] if limits.met(alike.size, alike.loss, plan.cut.speed) else []


def cuts_to_try(base, limits, model):
    """[words, ...]: no cut, and cuts of each kind, to the share of the weights at which int4 fits the limit."""
    c, layers = model.config, model.config.num_hidden_layers
    table = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) / base.weights    # their share
    shares = {0.9, 0.75, 0.5}
    if limits.bytes:
        shares = {(limits.bytes - base.other) * 8 / (base.least * base.weights) - 0.01}
    cuts = [[]]
    for share in sorted(share for share in shares if LEAST_KEPT <= share < 0.999):
        narrow = share * base.least / 4.5                        # most other widths take groups of 32 only
        cuts.append([f"width:{narrow:.3f}"])
        if (body := 1 - (1 - share) / (1 - table)) > 0.3:        # all is cut from the blocks
            cuts.append([f"lowrank:{body:.3f}"])
            if (stay := math.floor(body * layers)) >= 1:
                cuts.append([f"depth:{stay / layers:.3f}"])
        # part: of what goes, from embedding and head
        for part, kept in ((1, share), (0.5, narrow), (0.25, narrow)) if limits.bytes else ():
            ids, rest = 1 - part * (1 - kept) / table, kept / (1 - part * (1 - kept))
            if ids > 0.3:
                cuts.append([f"vocab:{ids:.3f}", *([f"width:{rest:.3f}"] if part < 1 else [])])
    return [words for words in cuts if all(word.split(":")[0] in CUTS for word in words)]


def trained(words, steps):
    """A cut with a training: low rank comes after it, as it repairs itself on calibration text."""
    low_rank = [word for word in words if word.startswith("lowrank")]
    return [*(word for word in words if word not in low_rank), f"recover:{steps}", *low_rank]


def only_cut(words):
    """(name, KEEP) of a cut of one step; ("", 1.0) of any other."""
    name, keep = words[0].split(":") if len(words) == 1 else ("", 1.0)
    return name, float(keep)


def nearer_width(cut, limits):
    """[words of another width], if a cut leaves room in the file, or is too large: widths come in steps."""
    name, keep = only_cut(cut.words[-1:])
    room = limits.bytes / cut.size(cut.least) if limits.bytes else 1.0
    if name != "width" or 1 <= room < 1.02:
        return []
    keep *= room - 0.01
    return [[*cut.words[:-1], f"width:{keep:.3f}"]] if keep < 0.999 else []


def mix_pays(words, cuts):
    """Whether a cut of two kinds should lose less than either alone: a loss grows about as the square of a cut."""
    tried = {only_cut(cut.words)[0]: cut for cut in cuts}
    parts = dict(map(only_cut, zip(words)))
    if len(parts) < 2 or not parts.keys() <= tried.keys():
        return True
    share = {name: (1 - keep) / (1 - only_cut(tried[name].words)[1]) for name, keep in parts.items()}
    return sum(share[name] ** 2 * tried[name].loss for name in parts) < min(tried[name].loss for name in parts)


def rows_reencoded(rows, old, new, most):
    """A Batch (B, T) of text in the ids of another tokenizer, row by row, as joined rows would be no text.

    Rows end where `most` tokens end them, and are padded with targets that are ignored. Raises UserError for examples.
    """
    if rows.segments is not None:
        raise UserError("prompts and responses are in ids from before vocab")
    texts = torch.cat([rows.ids[:, :1], rows.targets], dim=1).numpy()                    # (B, T + 1)
    parts = [next(stream_batches(reencoded(text, old, new)[:most + 1], most)) for text in texts]    # (1, most) each
    return Batch(torch.cat([part.ids for part in parts]), torch.cat([part.targets for part in parts]), None)


class Search:
    """The search of one --fit: models of the chains, and what they lose on calibration text."""
    def __init__(self, args, directory, stages):
        from model import load
        self.args, self.stages, self.model, self.tokenizer = args, stages, load(directory), Tokenizer.load(directory)
        self.few = copy.copy(args)
        self.few.calibration_windows = max(min(16, args.calibration_windows), args.calibration_windows // 4)
        args.run = str(stages / "model.run")
        self.source = calibration_data(self.model, self.tokenizer, args)
        self.context = calibration_context(self.model)
        _, drawn = calibration_rows(self.source, self.tokenizer, self.context, min(64, args.calibration_windows),
                                    args.seed + 1)               # other windows than those that the steps see
        self.rows, self.few.scored = drawn, drawn.ids.flatten().numpy()                  # vocab counts the rest
        self.steps = self.affordable_steps()
        self.base = self.figures(self.model, self.tokenizer)

    def once(self, name, measure):
        """The result of measure(), which is kept beside the stages for --resume."""
        file = self.stages / "fit.json"
        notes = read_json(file) if file.is_file() else {}
        if name not in notes:
            write_json(file, {**notes, name: measure()})
        return read_json(file)[name]

    def affordable_steps(self):
        """Steps of `recover` in --minutes; 0: none."""
        if not self.args.minutes or self.source.is_file():
            if self.args.minutes:
                print(f"no training: recover learns from prepared data, and {self.source} is a text file")
            return 0
        steps = self.once("steps", self.timed_steps)
        print(f"recover:{steps} takes about --minutes {self.args.minutes:g}", flush=True)
        return steps

    def timed_steps(self):
        """Steps of `recover` in --minutes, by the time of a few."""
        from train import cross_entropy
        batch, seconds = type(self.rows)(*(None if t is None else t[:4] for t in self.rows)), []
        for _ in range(4):                                       # the first warms up
            start = time.perf_counter()
            with torch.no_grad():
                self.model(batch.ids, segments=batch.segments)                           # the teacher
            cross_entropy(self.model, batch)[0].backward()
            seconds.append(time.perf_counter() - start)
        self.model.zero_grad()
        return max(1, int(float(f"{60 * self.args.minutes / sorted(seconds[1:])[1]:.1e}")))

    def figures(self, model, tokenizer):
        """Figures of the same calibration text in the ids of any tokenizer, as of sample.figures."""
        from compress import rows_of
        from sample import figures, score
        rows = self.rows
        if rows.segments is None:                                # three quarters of a window: other ids are more
            rows = Batch(*(t[:, :3 * self.context // 4] for t in rows[:2]), None)
        if tokenizer.hash != self.tokenizer.hash:
            rows = rows_reencoded(rows, self.tokenizer, tokenizer, self.context)
        batches = [rows_of(rows, i, i + 8) for i in range(0, len(rows.ids), 8)]
        return figures(*score(model, batches, tokenizer.token_bytes()))

    def run(self, words, args, stages):
        """(model, tokenizer) of a chain, which `make` runs."""
        from compress import STEPS, make
        tqdm.write(f"--- {' '.join(words)}")
        return make(parse_chain(words, STEPS), args, stages)

    def tried(self, words):
        """(model, percent more bits per byte) of a chain, calibrated on a quarter of the windows."""
        if not words:
            return self.model, 0.0
        model, tokenizer = self.run(words, self.few, self.stages / "tried")
        loss = percent(self.figures(model, tokenizer), self.base)
        tqdm.write(f"{' '.join(words)}: {loss:+.2f} % bits per byte of calibration text")
        return model, loss

    def made(self, plan):
        """The directory of a Plan, made with all windows."""
        start = time.perf_counter()
        self.run(plan.words, self.args, self.stages)
        plan.seconds = time.perf_counter() - start
        return self.place(plan.words)

    def place(self, words):
        """The directory of a chain that was made."""
        return self.stages / chain_name_of(words)

    def growth_of_rounding(self):
        """A function bits -> percent more bits per byte, if the model itself is rounded by gptq."""
        choices, weights = self.once("rounding", self.rounding)
        least = sum(min(pairs)[0] for pairs in choices.values())

        def growth(bits):
            chosen = knapsack(choices, max(least, math.ceil(bits * weights)))
            return 100 * sum(choices[name][i][1] for name, i in chosen.items()) / self.base["loss"]
        return growth

    def rounding(self):
        """(choices for `knapsack`, number of weights) of the model itself."""
        from compress import ways_to_round
        batches, _ = calibration(self.model, self.tokenizer, self.args)
        _, layers, losses = ways_to_round(copy.deepcopy(self.model), "gptq", batches)
        return bits_and_losses(layers, losses)

    def decoding_speed(self, model):
        """Tokens/s of decoding with a model rounded to int8, by 2 short rounds."""
        from compress import round_to_nearest
        from data.machine import accelerate
        from data.measure import speed
        model = copy.deepcopy(model)
        round_to_nearest(model, layers_to_quantize(model, 8, 0, 8))
        new = max(1, min(32, self.context // 4))
        return speed({"": accelerate(model, self.args.native)}, new, new, rounds=2)[""]["decode_tokens_per_s"]

    def cuts(self, limits):
        """The Cuts, made and measured; the best few learned for an eighth of the steps."""
        base = Cut([])
        sizes_of(base, self.model)
        cuts, first = [], cuts_to_try(base, limits, self.model)
        for words in (waiting := list(first)):
            if not mix_pays(words, cuts):
                continue
            try:
                model, loss = self.tried(words)
            except UserError as error:                           # a family without such heads, one key-value head
                tqdm.write(f"{' '.join(words)} is left out: {error}")
                continue
            cut = Cut(words, loss, loss)
            sizes_of(cut, model)
            if (cut.weights, loss) in [(other.weights, other.loss) for other in cuts]:
                continue                                         # another width, which came to the same sizes
            if limits.speed:
                cut.speed = self.decoding_speed(model)
            cuts.append(cut)
            waiting += nearer_width(cut, limits) if words in first else []
        least = min(cut.size(cut.least) for cut in cuts)
        if limits.bytes and least > limits.bytes:
            raise UserError(f"--fit {self.args.fit}: no cut that was made is small enough; the nearest that can be is "
                            f"{math.ceil(least / 1e3)}kB")
        cuts = [cut for cut in cuts if not limits.bytes or cut.size(cut.least) <= limits.bytes]
        cuts.sort(key=lambda cut: cut.loss)
        for cut in cuts[:TRIALS] if self.steps >= 2 * SHORT else ():
            _, loss = self.tried(trained(cut.words, self.steps // SHORT))
            cut.expected = min(loss, loss * SHORT ** -DECAY)
        if self.steps >= 2 * SHORT:
            cuts = cuts[:TRIALS]
        for cut in cuts if self.steps else ():
            cut.words = trained(cut.words, self.steps)
        return cuts


def made_plans(search, plans, limits, directories, args, command):
    """Makes the best Plans and measures them beside the model, until one meets the limits: all rows."""
    from data.measure import ruler
    rows, waiting = [], list(plans)
    for _ in range(2):
        if not waiting or any(is_met(plan, limits, rows) for plan in plans):
            break
        most = waiting[0].loss + WRONG * abs(waiting[0].loss)
        now = [waiting[0], *(plan for plan in waiting[1:FINALISTS] if plan.loss <= most)]
        waiting = [plan for plan in waiting if plan not in now]
        places = {chain_name_of(plan.words): search.made(plan) for plan in now}
        _, rows_of = ruler({**directories, **places}, args, command)
        first, *others = rows_of(list(places))
        rows = [*(rows or [first]), *others]
        for plan, row in zip(now, others):
            plan.row = row
    return rows


def chain_name_of(words):
    """A chain, as it is written, as a name of a file."""
    from compress import STEPS
    return chain_name(parse_chain(words, STEPS))


def percent(row, base):
    """How many percent more bits per byte figures have than those of the model."""
    return 100 * (row["bits_per_byte"] / base["bits_per_byte"] - 1)


def is_met(plan, limits, rows):
    """Whether a Plan that was measured meets the limits."""
    row = plan.row
    return bool(row) and limits.met(row["file_bytes"], percent(row, rows[0]), row["decode_tokens_per_s"])


def best_plan(plans, limits, rows, text):
    """The best of the Plans that were measured. Raises UserError, with the nearest, if none fits."""
    order = lambda plan: limits.order(plan.row["file_bytes"], percent(plan.row, rows[0]))
    measured = [plan for plan in plans if plan.row]
    if met := [plan for plan in measured if is_met(plan, limits, rows)]:
        return min(met, key=order)
    near = min(measured, key=order)
    raise UserError(f"--fit {text}: no chain that was made meets it; the nearest is {near.name}, with "
                    f"{near.row['file_bytes'] / 1e6:,.3f} MB, {percent(near.row, rows[0]):+.2f} % bits per byte and "
                    f"{near.row['decode_tokens_per_s']:,.0f} tokens/s: give limits that allow it")


def expected_plans(cuts, limits, growth, text):
    """The best Plan of each Cut, best first. Raises UserError, with the nearest, if none should fit."""
    order = lambda plan: limits.order(plan.size, plan.loss)
    if plans := [plan for cut in cuts for plan in plans_of(cut, limits, growth)[:1]]:
        return sorted(plans + uniform_plan(min(plans, key=order), limits, growth), key=order)
    near = min((plan for cut in cuts for plan in plans_of(cut, Limits(limits.bytes), growth)),
               key=lambda plan: (-(plan.cut.speed or 0), plan.loss))
    speed = f" and {near.cut.speed:,.0f} tokens/s" if near.cut.speed else ""
    raise UserError(f"--fit {text}: no chain should meet it; the nearest is {near.name}, with about "
                    f"{near.size / 1e6:,.3f} MB, {near.loss:+.2f} % bits per byte{speed}: give limits that allow it")


def frontier(plans, best, rows, seconds):
    """The Plans beside what was measured of them, as a Markdown table; seconds: of the search."""
    def measured(plan, text):
        return text(plan.row) if plan.row else ""

    columns = {"chain": lambda p: p.name, "file, MB": lambda p: f"{p.size / 1e6:.3f}",
               "expected loss": lambda p: f"{p.loss:+.2f} %",
               "measured file": lambda p: measured(p, lambda row: f"{row['file_bytes'] / 1e6:.3f}"),
               "bits per byte": lambda p: measured(p, lambda row: f"{row['bits_per_byte']:.4f}"),
               "measured loss": lambda p: measured(p, lambda row: f"{percent(row, rows[0]):+.2f} %"),
               "tokens/s": lambda p: measured(p, lambda row: f"{row['decode_tokens_per_s']:,.0f}"),
               "made in": lambda p: measured(p, lambda row: f"{p.seconds:,.0f} s"),
               "": lambda p: "<- chosen" if p is best else ""}
    return markdown(columns, plans) + (
        f"\n\nThe search took {seconds:,.0f} s. Loss: bits per byte more than the model's; expected, on text of its "
        "training, and measured, on held-out text.")


def copy_model(source, out):
    """Copies a model directory, atomically."""
    with replacing(out, MODEL) as new:
        for file in sorted(source.iterdir(), key=lambda file: file.name == MODEL.marker):        # the marker last
            shutil.copyfile(file, new / file.name)


def check_fit(args, limits, directory, out, report):
    """Raises UserError for what can be refused before any work."""
    from compress import STEPS
    from model import load
    check_chain_out(out, directory, False, args.overwrite)
    check_flags(args, parse_chain(["recover:1", "mixed:5"], STEPS))
    check_report(argparse.Namespace(**{**vars(args), "out": str(report)}))
    model = load(directory)
    check_order(parse_chain(["width:1", "mixed:5"], STEPS), model)
    base = Cut([])
    sizes_of(base, model)
    if limits.bytes and not limits.speed and base.dense <= limits.bytes:
        raise UserError(f"--fit {args.fit}: {args.model} has {base.dense / 1e6:,.3f} MB and meets that as it is: give "
                        "less")
    least = base.size(LEAST_KEPT * base.least)
    if limits.bytes and limits.bytes < least:
        raise UserError(f"--fit {args.fit}: that is less than a fifth of the weights in four bits; the nearest that "
                        f"can be is {math.ceil(least / 1e3)}kB")
    scored_text(args, {model_name(directory): Tokenizer.load(directory)}, model.history, calibration_context(model))


def fit_command(args, command):
    """--fit: finds, makes and measures the best chain for the limits, and copies the model to --out."""
    limits, directory = Limits.parse(args.fit), find_model(args.model)
    out = Path(args.out) if Path(args.out).name else Path(args.out).resolve()
    stages, report = (out.with_name(f"{out.name}.{ending}") for ending in ("stages", "fit"))
    args.measure, base = [args.model], model_name(directory)
    check_fit(args, limits, directory, out, report)
    open_stages(stages, args, (*MEASURING, "fit", "minutes", "device"))
    with resume_hint(stages):
        start = time.perf_counter()
        search = Search(args, directory, stages)
        growth = search.growth_of_rounding()
        plans = expected_plans(search.cuts(limits), limits, growth, args.fit)
        seconds = time.perf_counter() - start
        rows = made_plans(search, plans, limits, {base: directory}, args, command)
        best = best_plan(plans, limits, rows, args.fit)
        copy_model(search.place(best.words), out)
    given = [[f"--{name.replace('_', '-')}", str(getattr(args, name))] for name, usual in (
        ("calibration", None), ("calibration_windows", 128), ("lr", 1e-3), ("seed", 0)) if getattr(args, name) != usual]
    again = shlex.join(["python", "compress.py", args.model, *best.words, "--out", args.out, *sum(given, [])])
    text = f"{frontier(plans, best, rows, seconds)}\n\nThe choice again:\n\n    {again}"
    print(f"\n{text}")
    report.mkdir(exist_ok=True)
    write_report(rows, f"{text}\n\n{table(rows)}", report, [chain_name_of(best.words)])
    remove_tree(stages)
