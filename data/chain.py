"""Chains of steps, name[:value][:method] read left to right: their grammar, and which step may follow which."""
import contextlib, difflib, math, os, shutil, sys, typing

from data import UserError
from data.checkpoints import checkpoint_hash
from data.export import GGUF_STORED
from data.files import MODEL, read_json, refuse_foreign, remove_tree, write_json
from data.hub import read_config

SETTINGS = ("head_bits", "calibration", "calibration_windows", "qat_steps", "lr", "seed", "smoke")
SLICING, QUANTIZING = ("ffn", "heads", "width", "depth", "vocab"), ("int8", "int4")


class Form(typing.NamedTuple):
    """A row of the table of steps: the function of a step, and how the step is written, name[:value][:method]."""
    function: typing.Callable               # (model, tokenizer, step, args) -> (model, tokenizer, history entry)
    values: tuple = ()                      # words or names in NUMBERS; one must be written if there is no default
    default: str = ""
    methods: tuple = ("",)                  # the first: where none is written
    text: tuple = ()                        # the methods that look at calibration text
    trains: tuple = ()                      # the methods that train the model

    def written(self, name):
        value, methods = "|".join(self.values), "|".join(filter(None, self.methods))
        return (name + (f"[:{value}]" if self.default else f":{value}" if value else "")
                + (f"[:{methods}]" if methods else ""))


class Step(typing.NamedTuple):
    """One step of a chain."""
    name: str
    value: str                              # as it is written: float(value) of KEEP; "" where a step has none
    method: str
    text: bool                              # whether it looks at calibration text, or trains
    trains: bool
    label: str                              # a name that any file system takes: width-0.75


NUMBERS = {"KEEP": (float, lambda n: 0 < n <= 1, "the share that stays, above 0 and at most 1"),
           "STEPS": (int, lambda n: n >= 1, "a whole number, at least 1")}


def spelled(text, value):
    """A text that is what `value` stands for, a word or one of NUMBERS, in its one spelling; None: it is not."""
    number, right, _ = NUMBERS.get(value, (str, lambda word: word == value, ""))
    with contextlib.suppress(ValueError):
        return str(number(text)) if right(number(text)) else None


def parse_step(text, forms):
    """The Step written as name[:value][:method]; forms: {name: Form}. Raises UserError."""
    name, *parts = text.split(":")
    if name not in forms:
        near = difflib.get_close_matches(name, forms, 1)
        raise UserError(f"there is no step {name!r}" + (f"; did you mean {near[0]}?" if near else
                                                       f"; there is {', '.join(forms)}"))
    if len(parts) > 2:
        raise UserError(f"step {text!r} has too many parts: a step is written name[:value][:method]")
    form, (value, method) = forms[name], (*parts, "", "")[:2]
    if value in form.methods and not method:                     # int4:gptq
        value, method = "", value
    value, method = value or form.default, method or form.methods[0]
    right = next(filter(None, (spelled(value, v) for v in form.values)), "" if not value and not form.values else None)
    if right is not None and method in form.methods:
        label = "-".join(filter(None, (name, right if right != form.default else "",
                                       method if method != form.methods[0] else "")))
        trains = method in form.trains
        return Step(name, right, method, trains or method in form.text, trains, label)
    lacking = "has no value, and " if value.isdigit() and not form.values else ""
    numbers = "".join(f"; {v} is {NUMBERS[v][2]}" for v in form.values if v in NUMBERS and right is None)
    near = difflib.get_close_matches(value if right is None else method, [*form.values, *filter(None, form.methods)], 1)
    raise UserError(f"step {text!r}: {name} {lacking}is written {form.written(name)}{numbers}"
                    + (f"; did you mean {near[0]}?" if near else ""))


def parse_chain(texts, forms):
    """The steps of a chain, in order. Raises UserError before any of them has done work."""
    if not texts:
        raise UserError("a chain has no step: write one such as int8, or \"width:0.5 recover:300\" in quotes")
    steps = [parse_step(text, forms) for text in texts]
    if any(step.name == "gguf" for step in steps[:-1]):
        raise UserError("gguf must be the last step: it writes a file for other programs, not a model directory")
    check_order(steps)
    return steps


def check_order(steps, model=None):
    """Raises UserError for a step that undoes, or cannot follow, one before it, or what was done to the model."""
    quantized, masked = None, set()
    if model is not None:
        made = sorted(model.compression, key=lambda entry: ".layers." not in entry["module"])        # the head last
        quantized = next((entry["kind"] for entry in made if entry["kind"] in QUANTIZING), None)
        masked = {e["kind"] for e in made} & {"lowrank"} | {e["step"] for e in model.history} & {"sparse"}
    for step in steps:
        if quantized and step.name in QUANTIZING:
            raise UserError(f"{step.name} comes after {quantized}, which has quantized the model already: put "
                            "dequantize between them, or leave one out")
        if quantized and step.name not in ("dequantize", "gguf"):
            raise UserError(f"{step.name} comes after {quantized}, and it changes weights that are not rounded: put it "
                            f"before {quantized}, or dequantize between them")
        if step.name == "gguf" and quantized and step.value != GGUF_STORED[quantized]:
            raise UserError(f"gguf:{step.value} comes after {quantized}, whose layers go unchanged into "
                            f"gguf:{GGUF_STORED[quantized]} only: write that, or put dequantize before gguf")
        if step.name == "gguf" and "lowrank" in masked:
            raise UserError("gguf comes after lowrank, and other programs have no layers of two factors: leave one out")
        if masked and step.name in (*SLICING, "lowrank"):
            raise UserError(f"{step.name} comes after {' and '.join(sorted(masked))}, and it needs whole matrices: put "
                            f"{step.name} first")
        if "sparse" in masked and step.method == "gptq":
            raise UserError("gptq comes after sparse, and it would fill the zeros: use rtn or qat, or leave out sparse")
        quantized = step.name if step.name in QUANTIZING else None if step.name == "dequantize" else quantized
        masked = masked | {step.name} & {"lowrank", "sparse"}


def chain_name(steps):
    """A chain as a name that any file system takes: width-0.75+recover-95."""
    return "+".join(step.label for step in steps)


def needs_text(steps):
    return any(step.text for step in steps)


def needs_training(steps):
    return any(step.trains for step in steps)


def open_stages(directory, args, more=()):
    """Makes the directory in which `make` keeps the stages of chains, or with --resume takes what is in it.

    Raises UserError if it holds something else, or stages made with other flags: those of SETTINGS and `more`.
    """
    note = directory / "chain.json"
    wanted = {"model": checkpoint_hash(args.model), **{name: getattr(args, name) for name in (*SETTINGS, *more)}}
    left = {".chain.json.new", "chain.json.new"}                 # by a kill
    if directory.exists() and not note.exists() and (directory.is_file() or {*os.listdir(directory)} - left):
        raise UserError(f"{directory}, where the stages of a chain are kept, holds something else: give another --out")
    if note.exists() and args.resume:
        begun = read_json(note)
        for name, value in wanted.items():
            if begun.get(name) != value:
                raise UserError(f"{directory} was begun with {name} {begun.get(name)}, not {value}: give the same "
                                "flags, or begin anew with --overwrite")
        return
    if note.exists() and not args.overwrite:
        raise UserError(f"{directory} holds stages of a chain: go on with --resume, or begin anew with --overwrite")
    remove_tree(directory)
    directory.mkdir(parents=True)
    write_json(note, wanted)


def check_chain_out(out, source, is_file, overwrite):
    """Raises UserError if --out cannot be written, or must not be."""
    if is_file and out.is_dir():
        raise UserError(f"--out {out} is a directory; gguf writes a file, for example {out / 'model.gguf'}")
    if not is_file and out.is_file():
        raise UserError(f"--out {out} is a file; a model is a directory (only gguf writes a file)")
    if not is_file and out.is_dir():
        if out.resolve() == source.resolve():
            raise UserError(f"--out {out} is the model that is read: give another directory")
        refuse_foreign(out, MODEL)
    if is_file and out.is_file() and overwrite and out.stat().st_size:
        with open(out, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"--out {out} is there and is no GGUF file: give another name")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is there already: give another name or --overwrite")
    check_writable(out)


def is_made(out, steps, source):
    """Whether the model in `out` is what `steps` made of the one in `source`."""
    history = read_config(out)["history"] if (out / "config.json").is_file() else []
    made = history[-len(steps):]
    return ([entry.get("step") for entry in made] == [step.name for step in steps]
            and made[0].get("parent", {}).get("sha256") == checkpoint_hash(source))


def check_writable(out):
    """Raises UserError if nothing can be written beside `out`: before the work, not after it."""
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "nothing may be written there" if parent.is_dir() else "Not a directory"
        raise UserError(f"--out {out} cannot be written: {parent}: {why}")


def check_flags(args, steps):
    """Raises UserError for a flag that no step of the chain reads, or whose value cannot be. --smoke lowers them."""
    training = "that trains: recover, int4:qat or int8:qat"
    names, methods = {step.name for step in steps}, {step.method for step in steps}
    calibrates = any(step.text and not step.trains and step.name != "vocab" for step in steps)
    for flag, value, needs, there in (
            ("head-bits", args.head_bits, "that quantizes: int8 or int4", names & {*QUANTIZING}),
            ("calibration", args.calibration, "that looks at text: int4:gptq, sparse, lowrank, width, recover, ...",
             needs_text(steps)),
            ("calibration-windows", args.calibration_windows != 128, "that calibrates: int4:gptq, sparse, lowrank, "
             "width, ...", calibrates),
            ("qat-steps", args.qat_steps != 300, "that trains: int4:qat or int8:qat", "qat" in methods),
            ("lr", args.lr != 1e-3, training, needs_training(steps)),
            ("resume", args.resume, f"{training}, or several steps",
             needs_text(steps) or len(steps) > 1 or args.sweep is not None)):
        if value and not there:
            raise UserError(f"--{flag} needs a step {needs}")
    for name, least in (("calibration_windows", 1), ("qat_steps", 1), ("lr", 0), ("seed", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if args.smoke:
        args.calibration_windows, args.qat_steps = min(8, args.calibration_windows), min(6, args.qat_steps)


@contextlib.contextmanager
def told_how_to_go_on(stages):
    """Ctrl-C and a step that fails say where the finished stages are; before the first one they leave nothing."""
    try:
        yield
    except BaseException:
        inside = {file.name for file in stages.glob("*")}
        if inside > {"chain.json"}:
            print(f"\nwhat is finished is in {stages}: the same command with --resume goes on from there",
                  file=sys.stderr)
        if inside == {"chain.json"}:
            shutil.rmtree(stages)
        raise


MEASURING = ("data", "text", "eval_tokens", "prompt_tokens", "new_tokens", "rounds", "threads", "device")
