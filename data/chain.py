"""Chains of steps, name[:value][:method]: grammar, which step may follow which, stages, flags."""
import argparse, contextlib, difflib, math, os, shutil, sys, typing

from data import UserError
from data.checkpoints import checkpoint_hash
from data.console import Parser
from data.export import GGUF_STORED
from data.files import MODEL, read_json, refuse_foreign, remove_tree, write_json
from data.hub import read_config
from data.sources import measuring_flags

# Flags that change stages; flags of steps, which --measure refuses; flags of --measure and --sweep.
SETTINGS = ("head_bits", "calibration", "calibration_windows", "qat_steps", "lr", "seed", "smoke")
OF_STEPS = ("calibration", "calibration_windows", "qat_steps", "lr", "resume", "seed")
MEASURING = ("data", "text", "eval_tokens", "prompt_tokens", "new_tokens", "rounds", "threads")
SLICING, QUANTIZING = ("ffn", "heads", "width", "depth", "vocab"), ("int8", "int4", "mixed")
# Values that are numbers: type, test, description.
NUMBERS = {"KEEP": (float, lambda n: 0 < n <= 1, "the share that stays, above 0 and at most 1"),
           "BITS": (float, lambda n: 4 < n < 10, "bits per weight, scales counted, above 4 and below 10"),
           "STEPS": (int, lambda n: n >= 1, "a whole number, at least 1")}


class Form(typing.NamedTuple):
    """A row of the table of steps: the function of a step, and how the step is written."""
    function: typing.Callable               # (model, tokenizer, step, args) -> (model, tokenizer, history entry)
    values: tuple = ()                      # words, or names in NUMBERS; one must be written if there is no default
    default: str = ""
    methods: typing.Collection = ("",)      # names, or {name: function}; the first is the default
    text: tuple = ()                        # the methods that look at calibration text
    trains: tuple = ()                      # the methods that train the model

    def grammar(self, name):
        """How a step of this name is written: int4[:32|64|128][:rtn|gptq|qat]."""
        value, methods = "|".join(self.values), "|".join(filter(None, self.methods))
        if value:
            value = f"[:{value}]" if self.default else f":{value}"
        return name + value + (f"[:{methods}]" if methods else "")

    def normal(self, text):
        """A value in its one spelling (0.5 for .5); None: the step has no such value."""
        if not text and not self.values:
            return ""
        for value in self.values:
            number, fits, _ = NUMBERS.get(value, (str, value.__eq__, ""))
            with contextlib.suppress(ValueError):
                if fits(number(text)):
                    return str(number(text))
        return None


class Step(typing.NamedTuple):
    """One step of a chain."""
    name: str
    value: str                              # in its one spelling; "" where a step has none
    method: str
    text: bool                              # whether the step looks at calibration text, or trains
    trains: bool
    label: str                              # a name that any file system takes: width-0.75

    @property
    def keep(self):
        """KEEP as a number; a word that stands in its place as it is."""
        try:
            return float(self.value)
        except ValueError:
            return self.value


def parse_step(text, forms):
    """The Step written as name[:value][:method]; forms: {name: Form}. Raises UserError."""
    name, *parts = text.split(":")
    if name not in forms:
        near = difflib.get_close_matches(name, forms, 1)
        raise UserError(f"there is no step {name!r}; " + (f"did you mean {near[0]}?" if near else
                                                         f"there is {', '.join(forms)}"))
    if len(parts) > 2:
        raise UserError(f"step {text!r} has too many parts: a step is written name[:value][:method]")
    form, (value, method) = forms[name], (*parts, "", "")[:2]
    if value in form.methods and not method:                     # int4:gptq
        value, method = "", value
    first, *_ = form.methods
    written, value, method = value, form.normal(value or form.default), method or first
    if value is None or method not in form.methods:
        raise UserError(f"step {text!r}: {refusal(name, form, written, value is None, method)}")
    parts = name, value if value != form.default else "", method if method != first else ""
    trains = method in form.trains
    return Step(name, value, method, trains or method in form.text, trains, "-".join(filter(None, parts)))


def refusal(name, form, value, wrong_value, method):
    """The reason why a step cannot be written so, with the nearest word that can be."""
    reason = name + (" has no value, and" if value.isdigit() and not form.values else "")
    reason += f" is written {form.grammar(name)}"
    if wrong_value:
        reason += "".join(f"; {number} is {NUMBERS[number][2]}" for number in form.values if number in NUMBERS)
    words = [*form.values, *filter(None, form.methods)]
    near = difflib.get_close_matches(value if wrong_value else method, words, 1)
    return reason + (f"; did you mean {near[0]}?" if near else "")


def parse_chain(texts, forms):
    """The steps of a chain, in order. Raises UserError before any of them has done work."""
    if not texts:
        raise UserError("a chain has no step: write one such as int8, or width:0.5 recover:300")
    steps = [parse_step(word, forms) for text in texts for word in text.split()]     # also a chain in quotes
    if any(step.name == "gguf" for step in steps[:-1]):
        raise UserError("gguf must be the last step: it writes a file for other programs, not a model directory")
    check_order(steps)
    return steps


def check_order(steps, model=None):
    """Raises UserError for a step that undoes, or cannot follow, an earlier one or the history."""
    quantized, structure = None, set()
    if model is not None:
        entries = sorted(model.compression, key=lambda entry: ".layers." not in entry["module"])     # the head last
        quantized = next((entry["kind"] for entry in entries if entry["kind"] in QUANTIZING), None)
        steps_before = [entry["step"] for entry in model.history if entry["step"] in (*QUANTIZING, "dequantize")]
        quantized = "mixed" if quantized and steps_before[-1:] == ["mixed"] else quantized
        structure = {entry["kind"] for entry in entries} & {"lowrank"}
        structure |= {entry["step"] for entry in model.history} & {"sparse"}
    for step in steps:
        if reason := conflict(step, quantized, structure):
            raise UserError(reason)
        if step.name in (*QUANTIZING, "dequantize"):
            quantized = step.name if step.name in QUANTIZING else None
        structure = structure | {step.name} & {"lowrank", "sparse"}


def conflict(step, quantized, structure):
    """The reason why a step cannot come after others, as text; None: it can.

    quantized: kind of integers in the blocks, or None. structure: which of lowrank, sparse came.
    """
    if quantized and step.name in QUANTIZING:
        return (f"{step.name} comes after {quantized}, which has quantized the model already: put dequantize between "
                "them, or leave one out")
    if quantized and step.name not in ("dequantize", "gguf"):
        return (f"{step.name} comes after {quantized}, and it changes weights that are not rounded: put it before "
                f"{quantized}, or dequantize between them")
    if quantized and step.name == "gguf" and step.value != GGUF_STORED[quantized]:
        return (f"gguf:{step.value} comes after {quantized}, whose layers go unchanged into "
                f"gguf:{GGUF_STORED[quantized]} only: write that, or put dequantize before gguf")
    if step.name == "gguf" and "lowrank" in structure:
        return "gguf comes after lowrank, and other programs have no layers of two factors: leave one out"
    if structure and step.name in (*SLICING, "lowrank"):
        return (f"{step.name} comes after {' and '.join(sorted(structure))}, and it needs whole matrices: put "
                f"{step.name} first")
    if "sparse" in structure and step.method == "gptq":
        return "gptq comes after sparse, and it would fill the zeros: use rtn or qat, or leave out sparse"
    return None


def chain_name(steps):
    """A chain as a name that any file system takes: width-0.75+recover-95."""
    return "+".join(step.label for step in steps)


def needs_text(steps):
    """Whether a step of the chain looks at calibration text, or trains."""
    return any(step.text for step in steps)


def needs_training(steps):
    """Whether a step of the chain trains."""
    return any(step.trains for step in steps)


def open_stages(directory, args, more=()):
    """Makes the directory in which `make` keeps the stages of chains, or with --resume reuses it.

    Raises UserError if it holds something else, or stages of other flags (SETTINGS and `more`).
    """
    note = directory / "chain.json"
    settings = {"model": checkpoint_hash(args.model), **{name: getattr(args, name) for name in (*SETTINGS, *more)}}
    left_by_a_kill = {".chain.json.new", "chain.json.new"}
    if directory.exists() and not note.exists() and (directory.is_file() or {*os.listdir(directory)} - left_by_a_kill):
        raise UserError(f"{directory}, where the stages of a chain are kept, holds something else: give another --out")
    if note.exists() and args.resume:
        begun = read_json(note)
        for name, value in settings.items():
            if begun.get(name) != value:
                raise UserError(f"{directory} was begun with {name} {begun.get(name)}, not {value}: give the same "
                                "flags, or begin anew with --overwrite")
        return
    if note.exists() and not args.overwrite:
        raise UserError(f"{directory} holds stages of a chain: go on with --resume, or begin anew with --overwrite")
    remove_tree(directory)
    directory.mkdir(parents=True)
    write_json(note, settings)


@contextlib.contextmanager
def stages_of(directory, args, needed):
    """Makes the directory of stages before the run of a chain and removes it after, if `needed`."""
    if needed:
        open_stages(directory, args)
    with resume_hint(directory):
        yield
    if needed:
        remove_tree(directory)


@contextlib.contextmanager
def resume_hint(stages):
    """After Ctrl-C or an error, says where finished stages are, or removes an empty directory."""
    try:
        yield
    except BaseException:
        names = {file.name for file in stages.glob("*")}
        if names > {"chain.json"}:
            print(f"\nwhat is finished is in {stages}: the same command with --resume goes on from there",
                  file=sys.stderr)
        if names == {"chain.json"}:
            shutil.rmtree(stages)
        raise


def is_made(out, steps, source):
    """Whether the model in `out` is what `steps` made of the one in `source`."""
    history = read_config(out)["history"] if (out / "config.json").is_file() else []
    entries = history[-len(steps):]
    return ([entry.get("step") for entry in entries] == [step.name for step in steps]
            and entries[0].get("parent", {}).get("sha256") == checkpoint_hash(source))


def check_chain_out(out, source, is_file, overwrite):
    """Raises UserError if --out cannot be written, or must not be."""
    if is_file:
        check_file_out(out, overwrite)
    elif out.is_file():
        raise UserError(f"--out {out} is a file; a model is a directory (only gguf writes a file)")
    elif out.is_dir():
        if out.resolve() == source.resolve():
            raise UserError(f"--out {out} is the model that is read: give another directory")
        refuse_foreign(out, MODEL)
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is there already: give another name or --overwrite")
    check_writable(out)


def check_file_out(out, overwrite):
    """Raises UserError if the --out of gguf is a directory, or a file that is not GGUF."""
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; gguf writes a file, for example {out / 'model.gguf'}")
    if out.is_file() and overwrite and out.stat().st_size:
        with open(out, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"--out {out} is there and is no GGUF file: give another name")


def check_writable(out):
    """Raises UserError if nothing can be written beside `out`: before the work, not after it."""
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "nothing may be written there" if parent.is_dir() else "Not a directory"
        raise UserError(f"--out {out} cannot be written: {parent}: {why}")


# ---------------------------------------------------------------------------------------------------------------------
# Flags

def parse_arguments(argv, description=""):
    """The parsed and checked flags of compress.py."""
    parser = Parser(description)
    parser.usage = ("compress.py MODEL STEP [STEP ...] --out DIR [flags]\n"
                    "       compress.py --measure DIR [DIR ...] [--out DIR] [flags]\n"
                    "       compress.py MODEL --sweep [CHAIN ...] --out DIR [flags]\n"
                    "       compress.py MODEL --fit LIMITS --out DIR [--minutes M] [flags]")
    add = parser.add_argument
    add("model", nargs="?", help="a model directory, or a training run's")
    add("steps", nargs="*", metavar="STEP", help="name[:value][:method], see above")
    add("--out", help="the model directory, GGUF file or report (results.jsonl, report.md, tradeoff.png) to write")
    add("--head-bits", type=int, choices=(4, 8, 16), help="bits of the embedding and the head (default: the step's)")
    add("--calibration", metavar="NAME_OR_DIR_OR_FILE", help="the text that steps look at: the training split of "
        "prepared data or, for steps that do not train, a text file (default: the data that the model was trained on)")
    add("--calibration-windows", type=int, default=128, help="windows of at most 256 tokens each (default: 128)")
    add("--qat-steps", type=int, default=300, help="of training for qat, 8 windows each (default: 300)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW in recover and qat (default: 0.001)")
    add("--resume", action="store_true", help="go on with a chain or a sweep that was stopped, same flags")
    add("--seed", type=int, default=0, help="draws the windows (default: 0)")
    add("--overwrite", action="store_true", help="replace what is at --out")
    add("--smoke", action="store_true", help="a short run: few tokens, windows, steps and rounds")
    add("--native", action=argparse.BooleanOptionalAction, default=True, help="kernels in C on a CPU, or PyTorch alone")
    group = parser.add_argument_group("measuring")
    add = group.add_argument
    add("--measure", nargs="+", metavar="DIR", help="compare finished models in size, quality, memory and speed, in "
        "one process, with turns for the speed; the first is the baseline")
    add("--sweep", nargs="*", metavar="CHAIN", help="make and measure chains, each in quotes (\"width:0.5 recover:300 "
        "int8\"), stage by stage; none: a set that shows the cost and gain of each kind of step")
    add("--fit", metavar="LIMITS", help="find, make and measure the best chain for 1MB (the file), 2000tok/s "
        "(decoding), +2%% (bits per byte), or several with commas; the report is in DIR.fit")
    add("--minutes", type=float, default=0.0, help="of training in a chain of --fit (default: 0, none)")
    measuring_flags(group)
    args = parser.parse_args(argv)
    check_together(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    return args


def flag(name):
    """The flag of a field: --head-bits of head_bits."""
    return "--" + name.replace("_", "-")


def check_least(args, **smallest):
    """Raises UserError for a number that is smaller than it may be, or not a number."""
    for name, least in smallest.items():
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"{flag(name)} is {getattr(args, name)}; it must be at least {least}")


def check_together(args, given):
    """Raises UserError for flags that do not go together: a table, a row for each refusal.

    given: the names of the flags that are not at their default.
    """
    sweeping, fitting = args.sweep is not None, getattr(args, "fit", None)
    measuring = args.measure or sweeping or fitting
    of_steps, of_measuring = (" and ".join(flag(name) for name in names if name in given)
                              for names in (OF_STEPS, MEASURING))
    for wrong, message in (
            (args.measure and (args.model or args.head_bits or sweeping),
             "--measure compares finished models and takes no steps: first compress.py MODEL STEP ... --out DIR, then "
             "compress.py --measure MODEL DIR"),
            (args.measure and of_steps, f"{of_steps} belongs to a step, and --measure takes none"),
            (args.escalate and not args.measure, "--escalate belongs to --measure SMALL BIG"),
            (measuring and args.data and args.text, "--data and --text are two things to score: give one of them"),
            (sweeping and (args.steps or not args.model or not args.out),
             "--sweep is written compress.py MODEL --sweep --out DIR, or with chains of your own, each in quotes: "
             "compress.py MODEL --sweep \"width:0.75 recover:95\" int8 --out DIR"),
            (fitting and (args.steps or not args.model or not args.out or args.measure or sweeping),
             "--fit is written compress.py MODEL --fit 1MB --out DIR: it finds the steps by itself"),
            ("minutes" in given and not fitting, "--minutes belongs to --fit; in a chain recover:STEPS trains"),
            (not measuring and not args.steps, "give a model and at least one step (compress.py MODEL int8 --out DIR), "
             "or models to compare (compress.py --measure DIR DIR); see compress.py --help"),
            (not measuring and not args.out, "--out is missing: the model directory, or the file of gguf, to write"),
            (not measuring and of_measuring, f"{of_measuring} belongs to --measure DIR [DIR ...], --sweep and --fit")):
        if wrong:
            raise UserError(message)
    check_least(args, eval_tokens=0, prompt_tokens=0, new_tokens=0, rounds=1, threads=0)
    if fitting:
        check_least(args, minutes=0)
    if measuring and args.smoke:
        args.eval_tokens, args.prompt_tokens, args.new_tokens, args.rounds = 1024, 16, 8, 2


def check_flags(args, steps):
    """Raises UserError for a flag that no step reads, or an impossible value; applies --smoke."""
    text, training = needs_text(steps), needs_training(steps)
    calibrates = any(step.text and not step.trains and step.name != "vocab" for step in steps)
    for name, given, needs, there in (
            ("head_bits", args.head_bits, "rounds all alike: int8 or int4 (mixed chooses for itself)",
             any(step.name in ("int8", "int4") for step in steps)),
            ("calibration", args.calibration, "looks at text: int4:gptq, sparse, lowrank, width, recover, ...", text),
            ("calibration_windows", args.calibration_windows != 128, "calibrates: int4:gptq, sparse, lowrank, width, "
             "...", calibrates),
            ("qat_steps", args.qat_steps != 300, "trains: int4:qat or int8:qat",
             any(step.method == "qat" for step in steps)),
            ("lr", args.lr != 1e-3, "trains: recover, int4:qat or int8:qat", training),
            ("resume", args.resume, "trains: recover, int4:qat or int8:qat, or several steps",
             text or len(steps) > 1 or args.sweep is not None)):
        if given and not there:
            raise UserError(f"{flag(name)} needs a step that {needs}")
    check_least(args, calibration_windows=1, qat_steps=1, lr=0, seed=0)
    if args.smoke:
        args.calibration_windows, args.qat_steps = min(8, args.calibration_windows), min(6, args.qat_steps)
