"""Makes a trained model smaller by a chain of steps, read left to right, and writes the result.

    python compress.py out int8 --out out-int8                      # about a quarter of the bytes
    python compress.py out int4:32 --head-bits 8 --out out-int4     # about a sixth; embedding and head at 8 bits
    python compress.py out int4:32:gptq --out out-gptq              # about a seventh; half of what rounding costs
    python compress.py out int8 gguf:q8_0 --out model.gguf          # for llama.cpp, Ollama, ...; needs pip install gguf
    python compress.py out gguf:f16 --out model.gguf --overwrite
    python compress.py --measure out out-int8 out-int4 --out report         # side by side; the first is the baseline

A step is written name[:value][:method]:

    int8[:qat]                 weights become 8-bit integers, one scale for each row
    int4[:32|64|128][:rtn|gptq|qat]        4-bit integers, one scale for each group of 32 (or 64, 128) in a row. With
                               --asymmetric an offset too: better, for half a bit a weight (groups of 32)
        rtn     each weight to the nearest of its integers, as is int8: needs no text
        gptq    one column after another, made up for by those to come: about half the loss of rtn. It looks at 128
                windows of what the model was trained on, or of --calibration NAME_OR_DIR_OR_FILE
        qat     the model learns on for --qat-steps while it is rounded, taught by its dense self: the least loss, at
                the cost of a fine-tuning. Its run is OUT.qat until it ends; --resume goes on with it
    dequantize                 quantized layers become dense again (what rounding took away stays away)
    gguf:f32|f16|q8_0|q4_0     the model and its tokenizer in one GGUF file. The last step: its --out is a file. Layers
                               that are int8 or int4 go in as they are: int8 with gguf:q8_0, int4 with gguf:q4_0

--measure compares finished models in one process: bytes, quality and distance from the first one on the validation
text it was trained beside (or --data, --text), memory, and speed with turns taken between them (see sample.measure).

Biases, norms and learned positions stay float. All other steps write a model directory that sample.py reads. On a CPU
quantized layers multiply in C, compiled once (model.py, KERNELS): generation is faster than dense. Without a compiler,
and on a GPU, each use dequantizes the weights, and it is slower; --measure and sample.py say which it was.
"""
import contextlib, copy, difflib, hashlib, json, math, platform, shlex, shutil, sys, tempfile, types, typing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import distill, sample, train
from data import Parser, UserError, replacing_file, run
from data.export import GGUF_STORED, GGUF_TYPES, import_gguf, write_gguf
from data.loader import IGNORE, Batch, Windows
from data.prepare import find
from data.tokenizer import Tokenizer
from model import (LAYERS, Int4Linear, QuantLinear, Transformer, absmax_scales, checkpoint_hash, dequantized, load,
                   minmax_grid, model_name, read_json, refuse_foreign, rounded, save, whole)


# ---------------------------------------------------------------------------------------------------------------------
# Chains of steps

METHODS = {"int8": ("", "qat"), "int4": ("rtn", "gptq", "qat")}        # the first: where none is written


class Step(typing.NamedTuple):
    name: str
    value: str                              # "" where none is written
    method: str


def nearest(word, known):
    """What a person who wrote `word` may have meant, as the end of an error message."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there is {', '.join(known)}"


def parse(text):
    """The Step written as name[:value][:method]. Raises UserError, also for a value the step does not have."""
    name, value, method, *more = *text.split(":"), "", ""
    if name not in STEPS:
        raise UserError(f"there is no step {name!r}{nearest(name, STEPS)}")
    if any(more):
        raise UserError(f"step {text!r} has too many parts: a step is written name[:value][:method]")
    if name == "gguf" and (value not in GGUF_TYPES or method):
        raise UserError(f"step {text!r}: gguf needs one of {', '.join(GGUF_TYPES)}, for example gguf:q8_0"
                        + (nearest(value, GGUF_TYPES) if difflib.get_close_matches(value, GGUF_TYPES) else ""))
    if name == "dequantize" and (value or method):
        raise UserError(f"step {text!r}: dequantize has no value and no method")
    if name in METHODS:
        if value and not value.isdigit() and not method:        # int4:gptq
            value, method = "", value
        known, groups = METHODS[name], "|".join(map(str, Int4Linear.GROUPS))
        if name == "int8" and value:
            raise UserError(f"step {text!r}: int8 has no value, as a row has one scale: it is written int8[:qat]")
        if name == "int4" and value not in ("", *groups.split("|")) or method not in ("", *known):
            meant = difflib.get_close_matches(method, known, 1)
            raise UserError(f"step {text!r}: {name} is written {name}{f'[:{groups}]' * (name == 'int4')}"
                            f"[:{'|'.join(filter(None, known))}]" + (f"; did you mean {meant[0]}?" if meant else ""))
        value, method = value or "32" * (name == "int4"), method or known[0]
    return Step(name, value, method)


def parse_chain(texts):
    """The steps of a chain, in order. Raises UserError before any of them has done work."""
    steps = [parse(text) for text in texts]
    if any(step.name == "gguf" for step in steps[:-1]):
        raise UserError("gguf must be the last step: it writes a file for other programs, not a model directory")
    if sum(step.method == "qat" for step in steps) > 1:
        raise UserError("a chain trains once: put qat in one of its steps, and give the result to another command")
    quantized = None
    for step in steps:
        if step.name in LAYERS and quantized:
            raise UserError(f"{step.name} comes after {quantized}, which has quantized the model already: put "
                            "dequantize between them, or leave one out")
        if step.name == "gguf" and quantized and step.value != GGUF_STORED[quantized]:
            raise UserError(f"gguf:{step.value} comes after {quantized}, whose layers go unchanged into "
                            f"gguf:{GGUF_STORED[quantized]} only: write that, or put dequantize before gguf")
        quantized = step.name if step.name in LAYERS else None if step.name == "dequantize" else quantized
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: the text that a step looks at, of what the model learned from and never of what it is judged by

def calibration_context(model):
    """Tokens in a window of calibration."""
    return min(256, model.config.max_position_embeddings)


def calibration_data(model, tokenizer, args):
    """The directory of prepared data, or the text file, that --calibration or else the model's history names.

    Raises UserError if there is none, or if it was prepared with another tokenizer.
    """
    if not args.calibration:
        return trained_on(model.history, args.smoke, "the model", "give --calibration, prepared data or a text file")
    if Path(args.calibration).is_file():
        return Path(args.calibration)
    with renamed_flag("--data", "--calibration"):
        directory = find(args.calibration, args.smoke)
    if directory is None:
        raise UserError(f"--calibration {args.calibration} is not prepared yet: python data/prepare.py "
                        f"{args.calibration}, or name a text file")
    if read_json(directory / "meta.json")["tokenizer_hash"] != tokenizer.hash:
        raise UserError(f"--calibration {args.calibration} was prepared with another tokenizer than the model's: "
                        f"prepare it with data/prepare.py --tokenizer {args.model}, or name a text file")
    return directory


@contextlib.contextmanager
def renamed_flag(theirs, ours):
    """Errors of a function that speaks of another command's flag name ours."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(theirs, ours)) from None


def calibration(model, tokenizer, args):
    """(batches, what the history says of them): --calibration-windows windows drawn by --seed, 8 in a Batch.

    Of prepared data they are from the training split. A text file is encoded with the model's own tokenizer.
    """
    source, context = calibration_data(model, tokenizer, args), calibration_context(model)
    count = args.calibration_windows
    if source.is_file():
        name, ids = source.name, tokenizer.encode_array(sample.decoded(source.read_bytes(), f"--calibration {source}"))
        if len(ids) <= context:
            raise UserError(f"--calibration {source} has {len(ids)} tokens, less than one window of {context} and the "
                            "token after it: name a longer text")
        starts = np.random.default_rng(args.seed).permutation((len(ids) - 1) // context)[:count] * context
        rows = torch.from_numpy(np.stack([ids[i:i + context + 1] for i in starts]).astype(np.int64))
        drawn = Batch(rows[:, :-1], rows[:, 1:], None)
    else:
        windows = Windows(source, "train", context)
        name, drawn = windows.meta["name"], windows.training_rows(args.seed, 0, min(count, windows.per_epoch))
    count, digest = len(drawn.ids), hashlib.sha256(drawn.ids.numpy().tobytes()).hexdigest()[:12]
    print(f"calibration: {count} windows of {context} tokens from {name}, seed {args.seed}, sha256 {digest}",
          flush=True)
    batches = [Batch(*(None if t is None else t[i:i + 8] for t in drawn)) for i in range(0, count, 8)]
    return batches, {"data": name, "windows": count, "context": context, "sha256": digest}


# ---------------------------------------------------------------------------------------------------------------------
# Quantization

def plan(model, bits, group, head_bits, asymmetric=False):
    """The layers to quantize as entries of model.compression: [{"module", "kind", ...spec}, ...].

    bits       8 (one scale for each row) or 4 (one for each `group` of a row): of the layers in the blocks
    head_bits  8, 4 or 16 (stays float): of the embedding and the head, the most sensitive and in a small model the
               largest matrices. Tied, they are one table
    asymmetric of the layers with 4 bits: each group has an offset too
    Raises UserError if a layer is quantized already, if groups do not divide its rows, or if float16 cannot hold it.
    """
    entries = []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            kind = next(kind for kind, cls in LAYERS.items() if type(layer) is cls)
            raise UserError(f"int{bits}: {name.removesuffix('.table')} is {kind} already: start from the model before "
                            "that, or put the step dequantize first")
        head = name in ("model.embed_tokens", "lm_head")
        its_bits = head_bits if head else bits
        if (not isinstance(layer, (nn.Linear, nn.Embedding)) or name == "model.embed_positions" or its_bits == 16
                or name == "lm_head" and model.config.tie_word_embeddings):
            continue
        spec = {"group": group, **({"asymmetric": True} if asymmetric else {})} if its_bits == 4 else {}
        if not layer.weight.detach().abs().max() <= 65504:
            raise UserError(f"int{bits}: {name} has weights that are infinite, not numbers, or too large for float16")
        try:
            LAYERS[f"int{its_bits}"].group(layer.weight.shape[1], **spec)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        entries.append({"module": name, "kind": f"int{its_bits}", **spec})
    return entries


def round_to_nearest(model, entries):
    """Replaces the layers that `entries` name by ones whose weights are the nearest of their integers."""
    for entry in entries:
        spec = {k: v for k, v in entry.items() if k not in ("module", "kind")}
        model.replace(entry, LAYERS[entry["kind"]].from_dense(model.get_submodule(entry["module"]), **spec))


def searched_grid(weight, importance, bits, group, asymmetric=False):
    """[scales] or [scales, offsets], float16 (out, in / group): of grids that cut off more and more of the largest
    weights, for each group the one by which it loses least. An outlier need not make the steps wide for all.

    weight (out, in); importance (in,): what a squared error in a column costs
    """
    best = None
    for share in torch.linspace(1.0, 0.5, 11).tolist():
        grid = minmax_grid(weight * share, bits, group) if asymmetric else (absmax_scales(weight * share, bits, group),)
        error = dequantized(rounded(weight, grid[0], bits, *grid[1:]), *grid) - weight
        error = (error.square() * importance).unflatten(1, (-1, group)).sum(-1)                  # (out, in / group)
        if best is None:
            best, least = grid, error
        best = [torch.where(error < least, new, old) for new, old in zip(grid, best)]
        least = torch.minimum(least, error)
    return best


def damped_cholesky(hessian, name):
    """Lower Cholesky factor of a Hessian (n, n) float64 with 1 % of its mean diagonal added to the diagonal, or ten
    times as much until there is one, which is then said of layer `name`."""
    if not hessian.isfinite().all():
        raise UserError(f"gptq: the inputs of {name} are infinite or not numbers: the model cannot be calibrated")
    hessian, damping = hessian.clone(), 0.01
    mean, dead = hessian.diagonal().mean(), hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0              # an input that is always zero says nothing: it is rounded to nearest
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * torch.eye(len(hessian)).to(hessian))
        if not failed:
            return factor
        damping *= 10
        tqdm.write(f"{name}: too few inputs tell its columns apart; damping is {damping:.0%} of the mean diagonal")


def gptq(weight, hessian, bits, group, asymmetric=False, drift=None, name="a layer", block=128):
    """(integers, scales, offsets or None) of a weight (out, in), chosen so that the layer's output changes little,
    where rounding to nearest changes the weight little (GPTQ: Frantar et al., 2022, https://arxiv.org/abs/2210.17323).

    hessian  (in, in) float64, the sum of x x^T over the inputs x of the layer in the rounded model
    drift    (out, in) float64, the sum of e x^T over the same inputs, e being what the output lacks of the dense
             model's: that too is made up for, as far as the inputs tell it (GPTAQ: Li et al., 2025,
             https://arxiv.org/abs/2504.02692)
    One column is rounded after another, and what it loses is made up for by those to come: rows of the upper Cholesky
    factor of the inverse Hessian say by how much. A group's grid is searched when its first column's turn has come.
    """
    factor = damped_cholesky(hessian, name)
    weight = weight.detach().float()
    if drift is not None:                                        # the least-squares solution, before it is rounded
        weight = weight + torch.cholesky_solve(drift.T, factor).T.float()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    importance, grids = hessian.diagonal().float(), []
    columns = weight.T.contiguous()                              # (in, out): a column's weights lie side by side
    integers = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(columns), block):                  # columns beyond the block are changed once for it
        end = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            if i % group == 0:
                grid = searched_grid(columns[i:i + group].T, importance[i:i + group], bits, group, asymmetric)
                grids.append(grid)
            integers[i] = rounded(columns[i, :, None], grid[0], bits, *grid[1:])[:, 0]
            errors[i - start] = (columns[i] - dequantized(integers[i, :, None], *grid)[:, 0]) / factor[i, i]
            columns[i + 1:end] -= factor[i, i + 1:end, None] * errors[i - start]
        columns[end:] -= factor[start:end, end:].T @ errors
    scales, *offsets = (torch.cat(each, dim=1) for each in zip(*grids))
    return (integers.T.contiguous(), scales, *offsets, None)[:3]


def first_call(layer, run):
    """The arguments with which run() first calls `layer`; run() goes no further."""
    class Reached(Exception):
        pass

    def stop(_, args):
        raise Reached(args)

    hook = layer.register_forward_pre_hook(stop)
    try:
        run()
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()


# In the order of the forward pass. A model without gates has a shorter third group.
SAME_INPUT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def halts(block, x, rotary, mask):
    """A block's forward pass that halts before each group of layers in SAME_INPUT, so that they can be changed: yields
    (their input, the residual stream that o_proj or down_proj adds to, or None), at last (the block's output, None).
    """
    h = block.input_layernorm(x)
    yield h, None
    h = first_call(block.self_attn.o_proj, lambda: block.self_attn(h, rotary, mask, None))[0]
    yield h, x
    x = x + block.self_attn.o_proj(h)
    h = block.post_attention_layernorm(x)
    yield h, None
    h = first_call(block.mlp.down_proj, lambda: block.mlp(h))[0]
    yield h, x
    yield x + block.mlp.down_proj(h), None


def table_hessian(model, batches):
    """What errors in the rows of the embedding cost, (C, C) float64. Its inputs are one-hot and tell nothing of its
    channels, so it is the sum of g g^T over the gradients g of the loss by its output: the Fisher matrix. A table that
    is the head too also multiplies the final hidden states h, for which h h^T is added.
    """
    total = 0.0
    model.model.embed_tokens.weight.requires_grad_(True)
    one_by_one = (Batch(*(None if t is None else t[i:i + 1] for t in batch)) for batch in batches
                  for i in range(len(batch.ids)))                # the backward pass needs all blocks' activations
    for ids, targets, segments in one_by_one:
        hidden = []
        with torch.enable_grad():
            x = model.model(ids, segments=segments, hidden=hidden).flatten(0, 1)                         # (T, C)
            loss = F.cross_entropy(model.lm_head(x).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        g, h = torch.autograd.grad(loss, hidden[0])[0].flatten(0, 1), x.detach()
        total = total + (g.T @ g).double()
        if model.config.tie_word_embeddings:
            total = total + (h.T @ h).double()
    return total


@torch.no_grad()
def gptq_model(model, entries, batches):
    """Replaces the layers that `entries` name, each rounded by gptq() for the inputs that it gets from the layers
    already rounded. One block runs at a time: of all `batches` only the hidden states before it are kept, dense and
    rounded.
    """
    todo, body, config = {entry["module"]: entry for entry in entries}, model.model, model.config
    bar = tqdm(total=len(entries), desc="gptq", unit="layer", dynamic_ncols=True, disable=None)
    dtype, device = model.dtype, body.norm.weight.device
    batches = [Batch(*(None if t is None else t.to(device) for t in batch)) for batch in batches]
    model.float().requires_grad_(False)

    def quantize(parts, names, hessian, drift=None):
        """{name: layer} of dense `parts` with the same input, which are rounded as one matrix."""
        entries, rows = [todo[name] for name in names], [len(part.weight) for part in parts]
        bar.update(len(names))
        if entries[0]["kind"] == "int8":                          # of the head: nothing left to gain
            return {name: LAYERS["int8"].from_dense(part) for name, part in zip(names, parts)}
        spec = {k: v for k, v in entries[0].items() if k not in ("module", "kind")}
        found = gptq(torch.cat([part.weight for part in parts]), hessian, 4, **spec, drift=drift, name=names[0])
        found = zip(*([None] * len(rows) if t is None else t.split(rows) for t in found))
        return {name: LAYERS["int4"].from_integers(integers, scales, getattr(part, "bias", None), offsets)
                for name, part, (integers, scales, offsets) in zip(names, parts, found)}

    def start(batch):                                             # (x, rotary, mask of the first block, cache)
        return first_call(body.layers[0], lambda: body(batch.ids, segments=batch.segments))

    def tokens(x, batch):                                         # (B, T, C) to (N, C), without padding
        return x.flatten(0, 1) if batch.segments is None else x[batch.segments > 0]

    theirs = [start(batch)[0] for batch in batches]
    if "model.embed_tokens" in todo:
        found = quantize([body.embed_tokens], ["model.embed_tokens"], table_hessian(model, batches[:2]))
        model.replace(todo["model.embed_tokens"], found["model.embed_tokens"])
    ours, rotaries = zip(*(start(batch)[:2] for batch in batches))
    for i, dense in enumerate(body.layers):
        masks = [body.mask(batch.ids.shape[1], 0, config.window(i), batch.segments) for batch in batches]
        block, layers = copy.deepcopy(dense), {}
        dense_flows = [halts(dense, *state) for state in zip(theirs, rotaries, masks)]
        flows = [halts(block, *state) for state in zip(ours, rotaries, masks)]
        for names in SAME_INPUT:
            names = [f"model.layers.{i}.{name}" for name in names if f"model.layers.{i}.{name}" in todo]
            parts, hessian, drift = [block.get_submodule(name.split(".", 3)[3]) for name in names], 0.0, 0.0
            weight = torch.cat([part.weight for part in parts])                                          # (out, in)
            for batch, dense_flow, flow in zip(batches, dense_flows, flows):
                (d, d_residual), (x, residual) = next(dense_flow), next(flow)
                d, x = tokens(d, batch), tokens(x, batch)
                hessian = hessian + (x.T @ x).double()
                lacking = d - x                                                                          # (N, in)
                if residual is not None:                         # what the stream lacks already is made up for too
                    lacking = lacking @ weight.T + tokens(d_residual - residual, batch)                  # (N, out)
                drift = drift + (lacking.T @ x).double()
            if residual is None:
                drift = weight.double() @ drift
            found = quantize(parts, names, hessian, drift)
            for part, layer in zip(parts, found.values()):
                part.weight = nn.Parameter(layer.dense(), requires_grad=False)
            layers.update(found)
        theirs, ours = ([next(flow)[0] for flow in each] for each in (dense_flows, flows))
        for name, layer in layers.items():
            model.replace(todo[name], layer)
    if "lm_head" in todo:
        finals = [tokens(body.norm(x), batch) for x, batch in zip(ours, batches)]
        hessian = sum((x.T @ x).double() for x in finals)         # with what it lacks made up for it was no better
        model.replace(todo["lm_head"], quantize([model.lm_head], ["lm_head"], hessian)["lm_head"])
    bar.close()
    model.to(dtype).requires_grad_(True)


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
    """The loss for train.fit of a dense model that is to be rounded as `entries` say: distill.py's, of the rounded one.

    Half is how far its distributions are from the dense teacher's, half cross-entropy with the text. On a model of the
    standard library either alone was worse after equal steps: 1.2499 and 1.2487 bits per byte, and together 1.2461.
    """
    taught = distill.Distillation(teacher, teacher, (), vocab_size, cfg)

    def loss_fn(model, batch):
        weights = {f"model.{name}": weight for name, weight in rounded_weights(model, entries).items()}
        return torch.func.functional_call(train.ModelAndLoss(model, taught), weights, (batch,))
    return loss_fn


def qat_run(out):
    """The directory of a quantization-aware run: beside --out, removed when that is written."""
    return Path(out).with_name(Path(out).name + ".qat")


def quantization_aware_training(model, tokenizer, entries, said, args):
    """(dense model, what the history says of it): its weights are trained to lose little when they are rounded to
    nearest, with the model that came in as the teacher (Liu et al., 2023, LLM-QAT, but on the model's own data).

    Forward passes use the rounded weights, gradients change the dense ones, and those are what the run, OUT.qat, saves:
    it is train.fit's, with best/ and last/, and goes on with --resume.
    """
    source = calibration_data(model, tokenizer, args)
    if source.is_file():
        raise UserError(f"--calibration {source} is a text file, and qat learns from prepared data: make it so with "
                        f"python data/prepare.py --input {source} --tokenizer {args.model} --name NAME")
    run_dir, context = qat_run(args.out), calibration_context(model)
    if run_dir.exists() and not (run_dir / "log.jsonl").exists():
        raise UserError(f"{run_dir}, where qat keeps its run, holds something else: give another --out")
    if run_dir.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{run_dir} holds a run that was not finished: go on with --resume, or begin anew with "
                        "--overwrite")
    cfg = distill.DistillConfig(**{**train.FINE_TUNE, **dict.fromkeys(("lr", "embed_lr", "matrix_lr"), args.lr)},
                                out=str(run_dir), resume=args.resume and any(run_dir.glob("last*/config.json")),
                                steps=args.qat_steps, batch_size=8, context=context, seed=args.seed, evals=2,
                                eval_tokens=2048 if args.smoke else 131072, hard_weight=0.5)
    windows, val = (Windows(source, split, context) for split in ("train", "val"))
    said = {**said, "data": windows.meta["name"], "data_sha256": windows.meta["sha256"], "seed": args.seed,
            "context": context, "batch_size": cfg.batch_size, "lr": args.lr, "total": args.qat_steps}
    student = copy.deepcopy(model)
    if cfg.resume:
        student = load(run_dir / "last")
        begun = student.history[-1]
        for name, value in said.items():
            if begun.get(name) != value:
                raise UserError(f"{run_dir} was begun with {name} {begun.get(name)}, not {value}: give the same flags, "
                                "or begin anew with --overwrite")
    machine = train.set_up(cfg)
    for p in student.parameters():
        p.data = p.data.float().clone()                          # not the mapped file
    student, teacher = student.to(machine.device), copy.deepcopy(model).to(machine.device)
    score = train.evaluator(val, cfg, machine, tokenizer)

    def evaluate(student):
        """Of the rounded model, which is what will be saved in the end."""
        as_rounded = copy.deepcopy(student)
        with torch.no_grad():
            for name, weight in rounded_weights(student, entries).items():
                as_rounded.get_parameter(name).copy_(weight)
        return score(as_rounded)

    if not cfg.resume:
        shutil.rmtree(run_dir, ignore_errors=True)
        before = {name: score(m)["bits_per_byte"] if m is teacher else evaluate(m)["bits_per_byte"]
                  for name, m in (("dense", teacher), ("rounded", student))}
        print("validation, bits per byte: {dense:.4f} dense, {rounded:.4f} rounded without training".format(**before))
    train.fit(student, lambda first, count: windows.training_rows(cfg.seed, first, count),
              qat_loss(teacher, entries, cfg, tokenizer.vocab_size), cfg, machine, evaluate=evaluate,
              tokenizer=tokenizer, entry=said)
    trained = load(run_dir / "best")
    for p in trained.parameters():
        p.data = p.data.clone()                                  # the file is about to be removed
    *trained.history, said = trained.history
    return trained, said


def quantize_step(model, tokenizer, step, args):
    """int8, int4:GROUP, by the method that is written."""
    bits, group = int(step.name[3:]), int(step.value or 32)
    head_bits = args.head_bits or bits
    entries = plan(model, bits, group, head_bits, args.asymmetric)
    said = {"step": step.name, **({"group": group} if bits == 4 else {}), "method": step.method or "rtn",
            **({"asymmetric": True} if args.asymmetric else {}), "head_bits": head_bits}
    if step.method == "gptq":
        batches, made_of = calibration(model, tokenizer, args)
        gptq_model(model, entries, batches)
        return model, {**said, "calibration": made_of, "seed": args.seed}
    if step.method == "qat":
        model, said = quantization_aware_training(model, tokenizer, entries, said, args)
    round_to_nearest(model, entries)
    return model, said


def dequantize(model):
    """The model with nn.Linear and nn.Embedding instead of quantized layers, in the same dtype as its norms."""
    with torch.device("meta"):
        dense = Transformer(model.config)
        for entry in model.compression:
            if not issubclass(LAYERS[entry["kind"]], QuantLinear):
                dense.replace(entry)
    dense.history, dense.exits, weights = model.history, model.exits, {}
    for name, t in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        layer = model.get_submodule(module)
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue
        if not isinstance(layer, QuantLinear) or suffix == "bias":
            weights[name] = t
        elif suffix == "q":
            weights[f"{module.removesuffix('.table')}.weight"] = layer.dense().to(model.dtype)
    dense.load_state_dict(weights, strict=False, assign=True)
    dense.tie_weights()
    return dense.train(model.training)


def dequantize_step(model, tokenizer, step, args):
    """dequantize."""
    if not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise UserError("dequantize: the model has no quantized layer")
    return dequantize(model), {"step": step.name}


def gguf_step(model, tokenizer, step, args):
    """gguf:TYPE: write_gguf to --out."""
    write_gguf(model, tokenizer, step.value, Path(args.out), Path(args.model).resolve().name)
    return model, {"step": step.name}


# ---------------------------------------------------------------------------------------------------------------------
# Measure: `--measure` compares finished models by sample.measure, on one text, and writes the report

def named(paths):
    """{name: model directory} of the models to measure: their directories' names, or the paths as typed if two share
    one."""
    names = [model_name(path) for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--measure {twice}: it is named twice")
    return dict(zip(names, map(whole, paths)))


def last_training(history):
    """The entry of the last training in a model's history; {} if it tells of none."""
    return next((entry for entry in reversed(history) if "data_sha256" in entry), {})


def trained_on(history, smoke, whose="the first model", instead="give --data NAME_OR_DIR (its validation split is "
               "scored) or --text FILE"):
    """The prepared data that a model's history names, by its hash. Raises UserError if it is not here."""
    made = last_training(history)
    if not made:
        raise UserError(f"the history of {whose} does not say what it was trained on: {instead}")
    for its_slice in (smoke, not smoke):
        with contextlib.suppress(UserError):
            directory = find(made["data"], its_slice)
            if directory and read_json(directory / "meta.json")["sha256"] == made["data_sha256"]:
                return directory
    raise UserError(f"{whose} was trained on {made['data']} of sha256 {made['data_sha256'][:12]}, and that is "
                    f"not under data/: {instead}")


def stream_batches(ids, context):
    """A stream of ids (N,) in windows of `context` and the one after each, which begins the next: each id but the first
    is predicted once. The last window is filled up with targets that are ignored."""
    ids, rows = torch.as_tensor(np.asarray(ids, np.int64)), max(1, 8192 // context)
    for piece in (ids[i:i + rows * context + 1] for i in range(0, len(ids) - 1, rows * context)):
        fill = (0, -(len(piece) - 1) % context)
        targets = F.pad(piece[1:], fill, value=IGNORE).view(-1, context)
        yield Batch(F.pad(piece[:-1], fill).view(-1, context), targets, None)


def reencoded(ids, theirs, ours):
    """A stream of one tokenizer's ids, documents with an end-of-text id after each, in another's."""
    ids, result = np.asarray(ids), []
    for document in map(np.ndarray.tolist, np.split(ids, np.flatnonzero(ids == theirs.eos_id) + 1)):
        ended = document[-1:] == [theirs.eos_id]
        result += ours.encode(theirs.decode(document[:-1] if ended else document)) + [ours.eos_id] * ended
    return result


def scored_text(args, tokenizers, history, context):
    """(protocol in words, {name: batches}): what is scored, for each of `tokenizers` ({name: Tokenizer}).

    --text FILE is one stream of ids, without a token that begins it; --eval-tokens takes its beginning. Prepared data
    is scored as train.py does, --eval-tokens spread over the split; but where tokenizers differ its beginning, and the
    other tokenizers encode the same text. Raises UserError where that cannot be.
    """
    first, limit = next(iter(tokenizers.values())), args.eval_tokens
    windows = f"windows of {context} tokens and the one after each"
    others = [name for name, tokenizer in tokenizers.items() if tokenizer.hash != first.hash]
    if args.text:
        data = Path(args.text).read_bytes()
        text = sample.decoded(data, f"--text {args.text}")
        protocol = f"{Path(args.text).name} (sha256 {hashlib.sha256(data).hexdigest()[:12]})"
        ids = first.encode_array(text)
        streams = {name: tokenizers[name].encode_array(text) for name in others}
    else:
        directory = find(args.data, args.smoke) if args.data else trained_on(history, args.smoke)
        if directory is None:
            raise UserError(f"--data {args.data} is not prepared yet: python data/prepare.py {args.data}")
        split = Windows(directory, "val", context)
        protocol = f"validation split of {split.meta['name']} (sha256 {split.meta['sha256'][:12]})"
        if split.meta["tokenizer_hash"] != first.hash:
            raise UserError(f"--data {directory.name} was prepared with another tokenizer than the first model's: "
                            f"prepare it with data/prepare.py --tokenizer {args.measure[0]}, or give --text FILE")
        if not others:
            part = f", about {limit:,} tokens spread over it" if limit and limit < len(split.tokens) else ""
            batches = list(split.evaluation_batches(max(1, 8192 // context), limit))
            return f"{protocol}, {windows}{part}", dict.fromkeys(tokenizers, batches)
        if split.mask is not None:
            raise UserError(f"{others[0]} has another tokenizer than the first model, and {split.meta['name']} holds "
                            "prompts and responses in that one's template: give --text FILE")
        ids, streams = split.tokens, {}
    if limit and limit + 1 < len(ids):
        ids, streams, windows = ids[:limit + 1], {}, f"{windows}, the first {limit:,} tokens"
    if len(ids) < 2:
        raise UserError(f"--text {args.text} has {len(ids)} tokens: nothing can be predicted in it")
    streams = {name: streams[name] if name in streams else reencoded(ids, first, tokenizers[name]) for name in others}
    batches = {name: list(stream_batches(streams.get(name, ids), context)) for name in tokenizers}
    return f"{protocol}, {windows}", batches


def check_report(args):
    """Raises UserError if the report cannot be written to --out, or must not be."""
    out = Path(args.out)
    if out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} is a {'file' if out.is_file() else 'model'}; the report is three files in a "
                        "directory: give another name")
    if (out / "results.jsonl").exists() and not args.overwrite:
        raise UserError(f"--out {out} holds a report already: give another name or --overwrite")
    check_writable(out)


def measure_command(args, command):
    """--measure: prints the table and, with --out, writes results.jsonl, report.md and tradeoff.png."""
    directories, device = named(args.measure), sample.pick_device(args.device)
    if args.out:
        check_report(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizers = {name: Tokenizer.load(directory) for name, directory in directories.items()}
    dtype = torch.float32 if device.type == "cpu" else None                       # a CPU is slow at 16 bits
    models = {name: load(directory, device, dtype) for name, directory in directories.items()}
    for name, model in models.items():
        if tokenizers[name].vocab_size > model.config.vocab_size:
            raise UserError(f"the tokenizer in {directories[name]} has more ids than the model: they do not belong "
                            "together")
    base = next(iter(models))
    window = min(model.config.max_position_embeddings for model in models.values())
    context = last_training(models[base].history).get("context", 512)
    new_tokens = args.new_tokens or max(1, min(64, window // 4))
    prompt = args.prompt_tokens or max(1, min(256, window - new_tokens))
    if prompt + new_tokens > window:
        raise UserError(f"a prompt of {prompt} tokens and {new_tokens} new ones are more than the smallest window, "
                        f"{window}: lower --prompt-tokens or --new-tokens")
    protocol, batches = scored_text(args, tokenizers, models[base].history, min(window, context))
    others = {name: (batches[name], tokenizers[name].token_bytes()) for name in models
              if tokenizers[name].hash != tokenizers[base].hash}
    print(f"measuring {', '.join(models)} on {device}: {protocol}", flush=True)
    bar = tqdm(batches[base], desc="score", disable=None, leave=False)            # silent unless on a terminal
    rows = sample.measure(models, bar, tokenizers[base].token_bytes(), directories, others, prompt,
                          new_tokens, rounds=args.rounds)
    for row in rows:
        history = models[row["name"]].history
        row.update(protocol=protocol, command=command, tokenizer=tokenizers[row["name"]].hash[:16],
                   sha256=checkpoint_hash(directories[row["name"]]), seed=seed_of(history),
                   history=hashlib.sha256(json.dumps(history, sort_keys=True).encode()).hexdigest()[:16],
                   python=platform.python_version(), torch=torch.__version__)
    text = f"{sample.table(rows)}\n\nText: {protocol}."
    print(f"\n{text}")
    if args.out:
        write_report(rows, text, Path(args.out))


def seed_of(history):
    """The seed of the last step that drew anything: measuring itself draws nothing."""
    return next((entry["seed"] for entry in reversed(history) if "seed" in entry), None)


def write_report(rows, text, out):
    """results.jsonl (a line a row), report.md and, where matplotlib is installed, tradeoff.png in directory `out`."""
    picture = tradeoff(rows, out) if len(rows) > 1 else False
    shown = "\n\n![bits per byte against file size and against decoding speed](tradeoff.png)" if picture else ""
    report = f"# {rows[0]['name']} and what was made of it\n\n{text}{shown}\n\n    {rows[0]['command']}\n"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, content in (("report.md", report), ("results.jsonl", lines)):
        with replacing_file(out / name) as new:
            new.write_text(content, encoding="utf-8", newline="\n")
    print(f"\nwrote results.jsonl, report.md{' and tradeoff.png' if picture else ''} to {out}")


def front(points):
    """Of points (cost, loss), those that no other beats in both, in the order of their cost."""
    best, result = math.inf, []
    for cost, loss in sorted(points):
        if loss < best:
            best = loss
            result.append((cost, loss))
    return result


def label_points(ax, points):
    """Writes the names of `points` [(name, x, y), ...] beside them, each at the first of eight places that is free."""
    from matplotlib.transforms import Bbox
    ax.figure.canvas.draw()
    taken = [Bbox.from_bounds(*(ax.transData.transform((x, y)) - 5), 10, 10) for _, x, y in points]
    for name, x, y in points:
        for dx, dy in ((7, 5), (7, -13), (-7, 5), (-7, -13), (7, 18), (7, -26), (-7, 18), (-7, -26)):
            text = ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=9,
                               ha="left" if dx > 0 else "right")
            box = text.get_window_extent()
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = ax.annotate(name, (x, y), (7, 5), textcoords="offset points", fontsize=9)
        taken.append(text.get_window_extent())


def tradeoff(rows, out):
    """Draws tradeoff.png; False if it could not. Left: bits per byte against the file's bytes, right: against decoding
    speed. The line joins the Pareto front, the models that none beats in both."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("tradeoff.png is skipped: matplotlib is not installed")
        return False
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    low, high = (f(r["bits_per_byte"] for r in rows) for f in (min, max))
    pad = max(0.2 * (high - low), 0.005 * high)                  # differences of less than that should look small
    for ax, label, cost, sign in ((axes[0], "file, MB", lambda r: r["file_bytes"] / 1e6, 1),
                                  (axes[1], "decode, tokens/s", lambda r: r["decode_tokens_per_s"], -1)):
        line = front([(sign * cost(r), r["bits_per_byte"]) for r in rows])
        ax.step([sign * x for x, _ in line], [y for _, y in line], where="post", color="0.7", zorder=1,
                label="best for its cost")
        for r in rows:
            dense = r is rows[0]
            ax.scatter(cost(r), r["bits_per_byte"], color="tab:orange" if dense else "tab:blue", zorder=2,
                       marker="*" if dense else "o", s=120 if dense else 36, label="baseline" if dense else None)
        ax.set(xlabel=label)
        ax.set_xlim(0, 1.15 * max(map(cost, rows)))
        ax.set_ylim(low - pad, high + pad)
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(alpha=0.3)
        label_points(ax, [(r["name"], cost(r), r["bits_per_byte"]) for r in rows])
    axes[0].set(ylabel="bits per byte (lower is better)", title="smaller is to the left")
    axes[1].set(title="faster is to the right")
    axes[0].legend(fontsize=8)
    with replacing_file(out / "tradeoff.png") as new:
        fig.savefig(new, dpi=150, format="png")
    plt.close(fig)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The command

# name -> function of (model, tokenizer, step, args) that gives (model, what the history says of it)
STEPS = {"int8": quantize_step, "int4": quantize_step, "dequantize": dequantize_step, "gguf": gguf_step}


def arguments(argv):
    parser = Parser(description=__doc__)
    parser.usage = ("compress.py MODEL STEP [STEP ...] --out DIR [flags]\n"
                    "       compress.py --measure DIR [DIR ...] [--out DIR] [flags]")
    parser.add_argument("model", nargs="?", help="a model directory, or a training run's")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="name[:value][:method], see above")
    parser.add_argument("--out", help="what is written: a model directory, or the file of gguf; with --measure, where "
                        "it may be left out, a directory for results.jsonl, report.md and tradeoff.png")
    parser.add_argument("--head-bits", type=int, choices=(4, 8, 16), help="bits of the embedding and the output head; "
                        "16: they stay float (default: those of the step that quantizes)")
    parser.add_argument("--asymmetric", action="store_true", help="int4: an offset for each group too, half a bit a "
                        "weight more (default: scales alone)")
    parser.add_argument("--calibration", metavar="NAME_OR_DIR_OR_FILE", help="what gptq and qat look at: the training "
                        "split of prepared data or, for gptq, a text file (default: what the model was trained on)")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of at most 256 tokens each, for gptq "
                        "(default: 128)")
    parser.add_argument("--qat-steps", type=int, default=300, help="of training for qat, 8 windows each (default: 300)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of qat, AdamW's (default: 0.001, a "
                        "third of train.py's for matrices)")
    parser.add_argument("--resume", action="store_true", help="go on with a qat run that was stopped, same flags")
    parser.add_argument("--seed", type=int, default=0, help="by which gptq and qat draw windows (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--smoke", action="store_true", help="a short run: few tokens, windows, steps and rounds")
    group = parser.add_argument_group("measuring")
    group.add_argument("--measure", nargs="+", metavar="DIR", help="compare finished models in size, quality and "
                       "speed; the first is the baseline")
    group.add_argument("--data", metavar="NAME_OR_DIR", help="score this prepared data's validation split (default: of "
                       "the data that the first model was trained on)")
    group.add_argument("--text", metavar="FILE", help="score this text instead")
    for flag, help in (
            ("eval", "score about so many: of data spread over the split, of a text the first (default: all)"),
            ("prompt", "length of the prompt whose prefill is timed (default: 256, or what the window leaves)"),
            ("new", "how many are timed when decoding (default: 64, or a quarter of the smallest window)")):
        group.add_argument(f"--{flag}-tokens", type=int, metavar="N", default=0, help=help)
    group.add_argument("--rounds", type=int, metavar="N", default=5, help="how often each model is timed (default: 5)")
    group.add_argument("--threads", type=int, metavar="N", default=0, help="of the CPU (default: torch's choice)")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="to measure on")
    args = parser.parse_args(argv)
    if args.measure:
        if args.model or args.head_bits:
            raise UserError("--measure compares finished models and takes no steps: first compress.py MODEL STEP ... "
                            "--out DIR, then compress.py --measure MODEL DIR")
        for name in ("asymmetric", "calibration", "calibration_windows", "qat_steps", "lr", "resume", "seed"):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} belongs to a step, and --measure takes none")
        if args.data and args.text:
            raise UserError("--data and --text are two things to score: give one of them")
        for name, least in (("eval_tokens", 0), ("prompt_tokens", 0), ("new_tokens", 0), ("rounds", 1), ("threads", 0)):
            if getattr(args, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
        if args.smoke:
            args.eval_tokens, args.prompt_tokens, args.new_tokens, args.rounds = 1024, 16, 8, 2
        return args
    if not args.steps:
        raise UserError("give a model and at least one step (compress.py MODEL int8 --out DIR), or models to compare "
                        "(compress.py --measure DIR DIR); see compress.py --help")
    if not args.out:
        raise UserError("--out is missing: the model directory, or the file of gguf, to write")
    for name in ("data", "text", "eval_tokens", "prompt_tokens", "new_tokens", "rounds", "threads", "device"):
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --measure DIR [DIR ...]")
    return args


def check_out(out, source, is_file, overwrite):
    """Raises UserError if --out cannot be written, or must not be."""
    if is_file and out.is_dir():
        raise UserError(f"--out {out} is a directory; gguf writes a file, for example {out / 'model.gguf'}")
    if not is_file and out.is_file():
        raise UserError(f"--out {out} is a file; a model is a directory (only gguf writes a file)")
    if not is_file and out.is_dir():
        if out.resolve() == source.resolve():
            raise UserError(f"--out {out} is the model that is read: give another directory")
        refuse_foreign(out)
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is there already: give another name or --overwrite")
    check_writable(out)


def check_writable(out):
    """Raises UserError if nothing can be written beside `out`: before the work, not after it."""
    parent = next(p for p in out.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {parent}: {error.strerror}") from None


def check_flags(args, steps):
    """Raises UserError for a flag that no step of the chain reads, or whose value cannot be."""
    trains = "that trains: int4:qat or int8:qat"
    methods, names = {step.method for step in steps}, {step.name for step in steps}
    for flag, value, needs, there in (
            ("head-bits", args.head_bits, "that quantizes: int8 or int4", names & LAYERS.keys()),
            ("asymmetric", args.asymmetric, "of 4 bits: int4", "int4" in names or args.head_bits == 4),
            ("calibration", args.calibration, "that looks at text: int4:gptq, int4:qat or int8:qat",
             methods & {"gptq", "qat"}),
            ("calibration-windows", args.calibration_windows != 128, "that calibrates: int4:gptq", "gptq" in methods),
            ("qat-steps", args.qat_steps != 300, trains, "qat" in methods), ("lr", args.lr != 1e-3, trains, "qat" in
            methods), ("resume", args.resume, trains, "qat" in methods)):
        if value and not there:
            raise UserError(f"--{flag} needs a step {needs}")
    for name, least in (("calibration_windows", 1), ("qat_steps", 1), ("lr", 0), ("seed", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    kept = steps[-1].name == "gguf" and "dequantize" not in names
    if args.asymmetric and kept and steps[-1].value in GGUF_STORED.values():
        raise UserError(f"gguf:{steps[-1].value} has no offsets: leave out --asymmetric, or put dequantize before gguf "
                        "and write gguf:f16")


def main(argv=None):
    args = arguments(argv)
    if args.measure:
        return measure_command(args, "python compress.py " + shlex.join(sys.argv[1:] if argv is None else argv))
    steps = parse_chain(args.steps)                             # all that can be refused is refused before any work
    out = Path(args.out) if Path(args.out).name else Path(args.out).resolve()      # "." has no name to write beside
    args.out, directory, to_file = str(out), whole(args.model), steps[-1].name == "gguf"
    if to_file:
        import_gguf()
    check_out(out, directory, to_file, args.overwrite)
    check_flags(args, steps)
    if args.smoke:
        args.calibration_windows, args.qat_steps = min(8, args.calibration_windows), min(6, args.qat_steps)
    model, tokenizer = load(directory), Tokenizer.load(directory)
    parent = {"parent": {"name": model_name(directory), "sha256": checkpoint_hash(directory)}}
    for step in steps:
        model, entry = STEPS[step.name](model, tokenizer, step, args)
        model.history, parent = model.history + [{**entry, **parent}], {}
    if not to_file:
        save(model, out, tokenizer)
    if any(step.method == "qat" for step in steps):
        shutil.rmtree(qat_run(out))
    if not to_file:
        parameters, resident = model.parameters_count(), model.resident_bytes()
        print(f"{out}: {parameters:,} parameters; {(out / 'model.safetensors').stat().st_size / 1e6:,.1f} MB on disk, "
              f"{resident / 1e6:,.1f} MB in memory: {8 * resident / parameters:.2f} bits per weight, scales and all")


if __name__ == "__main__":
    run(main)
