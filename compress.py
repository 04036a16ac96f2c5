"""Makes a trained model smaller by a chain of steps, read left to right, and writes the result.

    python compress.py out int4:32:gptq --out out-gptq               # a seventh of the bytes
    python compress.py out int8 gguf:q8_0 --out model.gguf           # for llama.cpp (package gguf)
    python compress.py out width:0.75 recover:95 int8 --out out-cut  # pruned, trained, rounded
    python compress.py --measure out out-gptq out-cut --out report   # the first is the baseline
    python compress.py out --sweep --out out-sweep                   # measures a set of chains
    python compress.py out --fit 600kB --out out-fit                 # finds the best chain for a limit

A step is written name[:value][:method]; KEEP is the share that stays, the first method the default.
Numbers are chapters of compress.py (1: the calibration text); the table STEPS is in chapter 7.

2 Slicing: smaller dense matrices. After methods that read calibration text, they are fitted to it.
    ffn:KEEP[:activation|magnitude]          neurons of each MLP
    heads:KEEP[:activation|magnitude]        key-value heads, with the query heads on them
    width:KEEP[:pca|activation|magnitude]    channels, heads and neurons; KEEP is of all parameters
        activation: the largest on calibration text stay; magnitude: the largest weights, no text;
        pca: channels become principal components of the stream (tied model: activation)
    depth:KEEP                               layers; those that change the stream most stay
    vocab:KEEP                               ids; those that the text uses most stay
3 Rounding: integers that share a scale (4 is the layer-by-layer walk of gptq)
    int8[:qat]                               8 bits, one scale for each row
    int4[:32|64|128][:rtn|gptq|qat]          4 bits, one scale for each 32, 64 or 128 of a row
        rtn: to nearest, as int8, no text; gptq: with error compensation, half the loss of rtn;
        qat: quantization-aware training for --qat-steps, the least loss
    mixed:BITS[:gptq|rtn|qat]                int8, or int4 in groups of 32, 64 or 128, for each matrix
        BITS: mean per weight of all matrices with their scales, 4.5 or 5.25; the loss decides where
    dequantize                               dense again; the rounding error stays
5 Sparsity: zeros in the matrices of the blocks. A study of quality: nothing runs faster.
    sparse:KEEP|2of4[:sparsegpt|wanda|magnitude]    KEEP of each row, or two of four neighbours
        sparsegpt: with error compensation; wanda: the largest |weight| x norm of the input stay;
        magnitude: the largest weights, no text
6 Low rank: a matrix becomes the product of two thin ones, of rank 32, 64, ...
    lowrank:KEEP[:allocated|whitened|svd]    KEEP is of the parameters
        svd: nearest to the weights, no text; whitened: to the layer's outputs, half the loss;
        allocated: whitened, with low ranks where the loss feels them least
7 The chain: training, and other formats
    recover:STEPS[:taught|text]              a short training; zeros of sparse stay
        taught: by the model that entered the chain, as in distill.py; text: by cross-entropy
    gguf:f32|f16|q8_0|q4_0                   a GGUF file, the last step (int8: q8_0, int4: q4_0)

Slicing comes before lowrank and sparse, rounding last. After Ctrl-C, --resume goes on.
"""
import collections, copy, math, shlex, shutil, sys
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import UserError
from data.chain import (Form, chain_name, check_chain_out, check_flags, check_order, is_made, needs_text,
                        parse_arguments, parse_chain, stages_of)
from data.checkpoints import checkpoint_hash, find_model, model_name
from data.console import run
from data.export import GGUF_TYPES, gguf_step, import_gguf
from data.files import MODEL, remove_tree, settle
from data.formats import chosen_formats, knapsack, layers_to_quantize, possible_formats, spec_of
from data.loader import IGNORE, Batch
from data.machine import accelerate, pick_device
from data.sources import calibration, calibration_data, id_counts
from data.structure import (AXES, axes_of, best_sizes, body_layers, candidate_sizes, dense_layers, dense_weight,
                            dequantize, even_ranks, head_channels, kept_count, layers_that_stay, possible_ranks,
                            print_sizes, prune_report, select, slice_model, split_name)
from data.tokenizer import Tokenizer
from data.vocabulary import cut_tokenizer
from distill import quantization_aware_training, recover_step
from model import LowRankLinear, QuantLinear, dequantized, group_scales, load, rounded, save
from sample import token_losses


# ---------------------------------------------------------------------------------------------------------------------
# 1. Calibration: the text that a step looks at, of the training data, never of the validation data

def rows_of(batch, start, stop):
    """Rows start to stop of a Batch."""
    return Batch(*(None if t is None else t[start:stop] for t in batch))


def unpadded(x, batch):
    """The tokens of x (B, T, C) without padding, (N, C)."""
    return x.flatten(0, 1) if batch.segments is None else x[batch.segments > 0]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Slicing (data/structure.py): channels, neurons, heads, layers or ids go, the rest is refitted

# A criterion (model, batches) gives {axis: scores (layers, n), or (1, n)}. The highest scores stay.

def scores_of(sums, config):
    """The sums as {"width": (1, C), "ffn": (layers, F), "keys": (layers, K)}."""
    scores = {axis: torch.stack([sums[axis, i] for i in range(1 if axis == "width" else config.num_hidden_layers)])
              for axis in ("width", "ffn", "queries")}
    heads = scores.pop("queries").unflatten(1, (config.num_key_value_heads, -1))         # (layers, K, H / K * D)
    return {**scores, "keys": heads.sum(-1)}


@torch.no_grad()
def magnitude_scores(model, batches):
    """Scores of channels, neurons and heads: the sum of the squares of the weights."""
    sums = collections.defaultdict(float)                        # {(axis, layer): (n,)}
    for name, p in model.named_parameters():
        for dim, axis in enumerate(axes_of(name) if p.ndim > 1 else ()):
            key = axis, 0 if axis == "width" else split_name(name)[0]
            sums[key] = sums[key] + p.square().sum(1 - dim).float()
    return scores_of(sums, model.config)


@torch.no_grad()
def activation_scores(model, batches):
    """Scores of channels, neurons and heads: the mean |activation| over all tokens of the batches.

    Of channels behind each norm, of heads and neurons before o_proj and down_proj (Minitron:
    Muralidharan et al., 2024, https://arxiv.org/abs/2407.14679).
    """
    sums = collections.defaultdict(float)
    for batch in batches:
        (x,), (rotaries,), (masks,) = block_inputs(model, [batch])
        for i, block in enumerate(model.model.layers):
            *inputs, (x, _) = by_group(block, x, rotaries[i], masks[i])
            for key, (h, _) in zip((("width", 0), ("queries", i), ("width", 0), ("ffn", i)), inputs):
                sums[key] = sums[key] + unpadded(h, batch).abs().mean(0).float()
        sums["width", 0] = sums["width", 0] + unpadded(model.model.norm(x), batch).abs().mean(0).float()
    return scores_of(sums, model.config)


def pca_scores(model, batches):
    """activation_scores of a rotated model, whose channels are sorted by variance already."""
    scores = activation_scores(model, batches)
    return {**scores, "width": -torch.arange(model.config.hidden_size, device=scores["width"].device)[None]}


def influence_scores(model, batches):
    """Scores of layers: mean cosine distance of input and output (ShortGPT: Men et al., 2024)."""
    return {"layers": sum(torch.stack([1 - F.cosine_similarity(x, y, dim=1).mean() for x, y in zip(hidden, hidden[1:])])
                          for hidden in streams(model, batches))[None]}


@torch.no_grad()
def streams(model, batches):
    """For each batch the residual stream before each layer and after the last, (N, C) each."""
    for batch in batches:
        model(batch.ids, segments=batch.segments, head=False, hidden=(hidden := []))
        yield [unpadded(x, batch).float() for x in hidden]


@torch.no_grad()
def rotated(model, batches):
    """An equal model whose channels are the principal components of the stream, strongest first.

    The weight of each norm moves into the matrices that read it: RMSNorm without a weight commutes
    with a rotation (SliceGPT: Ashkboos et al., 2024, https://arxiv.org/abs/2401.15024; here one for
    all layers). A tied embedding cannot take the last norm's weight; LayerNorm does not commute.
    """
    moments = sum(x.T @ x for hidden in streams(model, batches) for x in (F.rms_norm(x, x.shape[1:]) for x in hidden))
    basis, model = torch.linalg.eigh(moments.double())[1].flip(1).float(), copy.deepcopy(model)       # (C, C)
    folds = [(model.model.norm, [model.lm_head])]
    for block in model.model.layers:
        attention, _, mlp, _ = same_input(block)
        folds += [(block.input_layernorm, attention.values()), (block.post_attention_layernorm, mlp.values())]
    for norm, readers in folds:
        for layer in readers:
            layer.weight *= norm.weight
        norm.weight.fill_(1.0)
    for name, p in model.named_parameters():
        axes = axes_of(name)
        if axes[-1] == "width" and p.ndim == 2:
            p.copy_(p @ basis)
        elif axes[0] == "width" and len(axes) == 2:              # biases of o_proj and down_proj too
            p.copy_(basis.T @ p)
    return model


@torch.no_grad()
def refit(small, dense, indices, batches):
    """Refits the matrices of a sliced model by least squares, in the order of the forward pass.

    Outputs approach the dense model's; o_proj and down_proj also compensate the error of the stream
    so far (ZipLM: Kurtic et al., 2023, https://arxiv.org/abs/2302.04089). The head, or in a tied
    model the last norm, compensates the scale of a norm over fewer channels.
    """
    layers = layers_that_stay(dense.config, indices)
    check_walk(dense, (), batches[0])
    dense_streams, rotaries, masks = block_inputs(dense, batches)
    small_streams = [select(x, indices, -1, "width", 0) for x in dense_streams]
    for i, dense_block in enumerate(dense.model.layers):
        if i not in layers:                                      # from here on the stream lacks what it adds
            dense_streams = [dense_block(x, rotary[i], mask[i])
                             for x, rotary, mask in zip(dense_streams, rotaries, masks)]
            continue
        block = small.model.layers[layers.index(i)]
        dense_flows = flows_of(dense_block, dense_streams, rotaries, masks, i)
        flows = flows_of(block, small_streams, rotaries, masks, i)
        refit_block(block, dense_block, indices, i, batches, flows, dense_flows)
        dense_streams = [next(flow)[0] for flow in dense_flows]
        small_streams = [next(flow)[0] for flow in flows]
    dense_x, x = (torch.cat([unpadded(model.model.norm(stream), batch) for stream, batch in zip(last, batches)])
                  for model, last in ((dense, dense_streams), (small, small_streams)))                 # (N, C)
    if dense.config.tie_word_embeddings:
        dense_x = select(dense_x, indices, 1, "width", 0)
        weight, offset = small.model.norm.weight, float(small.config.unit_offset)
        weight.copy_((weight + offset) * (dense_x * x).sum(0) / x.square().sum(0).clamp(min=1e-9) - offset)
    else:
        hessian = (x.T @ x).double()
        add_solution([small.lm_head], hessian, dense.lm_head.weight.double() @ (dense_x.T @ x).double()
                     - small.lm_head.weight.double() @ hessian)


def refit_block(small, dense, indices, layer, batches, flows, dense_flows):
    """Refits a sliced block to the dense block, number `layer`. flows: by_group of each batch."""
    for layers, originals in zip(same_input(small), same_input(dense)):
        hessian, cross, stream = 0.0, 0.0, 0.0                   # cross: sum of (dense input) x^T
        for batch, flow, dense_flow in zip(batches, flows, dense_flows):
            (x, residual), (dense_x, dense_residual) = next(flow), next(dense_flow)
            x, dense_x = unpadded(x, batch), unpadded(dense_x, batch)                    # (N, in), (N, dense in)
            hessian, cross = hessian + (x.T @ x).double(), cross + (dense_x.T @ x).double()
            if residual is not None:                             # the error of the residual stream counts too
                error = select(dense_residual, indices, -1, "width", layer) - residual
                stream = stream + (unpadded(error, batch).T @ x).double()                # (out, in)
        wanted = torch.cat([select(originals[n].weight, indices, 0, AXES[n][0], layer) for n in layers]).double()
        weight = torch.cat([part.weight for part in layers.values()]).double()
        add_solution([*layers.values()], hessian, wanted @ cross - weight @ hessian + stream)


def add_solution(layers, hessian, drift):
    """Adds drift times the inverse Hessian to the weights of layers that share an input."""
    delta = torch.cholesky_solve(drift.T, damped_cholesky(hessian, "a pruned layer")).T                # (out, in)
    for layer, change in zip(layers, delta.split([len(layer.weight) for layer in layers])):
        layer.weight += change


def pruned(dense, sizes, scores, batches):
    """The model of sizes {axis: how many stay}, highest scores first, refitted to the batches."""
    indices = {axis: scores[axis].topk(n).indices.sort().values for axis, n in sizes.items()}
    indices.update({axis: index[0] for axis, index in indices.items() if axis in ("width", "layers")})       # (n,)
    if "keys" in indices:
        indices.update(head_channels(dense.config, indices["keys"]))
    small = slice_model(dense, indices)
    if batches:
        refit(small, dense, indices, batches)
    return small


def slice_step(model, tokenizer, step, args):
    """Step ffn, heads, width or depth. All layers get equal sizes, multiples of 32.

    width looks for the sizes with the least loss on one batch, fitted to another; without text, it
    takes the most equal shares. Raises UserError as candidate_sizes does.
    """
    method, candidates = step.method, candidate_sizes(step, model)
    c = model.config
    if method == "pca" and (c.tie_word_embeddings or c.layer_norm or c.unit_offset or c.parallel
                            or c.norms != "before"):
        print("width: a tied embedding, a LayerNorm, or a norm that is not before one layer cannot be rotated: "
              "channels are chosen by their activation")
        method = "activation"
    batches, entry = calibration(model, tokenizer, args) if step.text else (None, {})
    dtype, dense = model.dtype, model.float().requires_grad_(False)

    def scored(batches):
        whole = rotated(dense, batches) if method == "pca" else dense
        return whole, STEPS[step.name].methods[method](whole, batches)

    if batches and len(candidates) > 1:
        whole, scores = scored(batches[:1])                      # the same for more windows: --fit tries with fewer
        def loss(sizes):
            bar.update()
            return token_losses(pruned(whole, sizes, scores, batches[:1]), batches[1 % len(batches)]).sum()
        with tqdm(desc=step.name, unit="shape", dynamic_ncols=True, disable=None) as bar:
            candidates = [best_sizes(candidates, loss)]
    whole, scores = scored(batches)
    small = pruned(whole, candidates[0], scores, batches)
    return small.to(dtype).requires_grad_(True), tokenizer, {**prune_report(step, model, small, method), **entry}


def vocab_step(model, tokenizer, step, args):
    """Step vocab: keeps the share of the ids that the calibration data uses most."""
    counts, name = id_counts(calibration_data(model, tokenizer, args), tokenizer, vars(args).get("scored", ()))
    index, smaller = cut_tokenizer(tokenizer, counts, kept_count(model.config.vocab_size, step.keep, 32))
    small = slice_model(model, {"vocab": index.to(next(model.parameters()).device)})
    text = {"data": name, "tokens": int(counts.sum())}
    return small, smaller, {**prune_report(step, model, small), "calibration": text, "tokenizer": smaller.hash[:16]}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Rounding: weight = integer * scale, to nearest, or with error compensation (GPTQ)

def rounding_losses(model, choices, batches):
    """{name: [nats per token, ...]}: how much the loss grows if one layer alone is rounded.

    choices: {name: [QuantLinear, ...]}. Half the mean square, over tokens, of (error of the output) .
    (gradient of the loss by the output), for targets drawn from the model: the KL divergence to
    second order, by the Fisher matrix (Singh and Alistarh, 2020, https://arxiv.org/abs/2004.14340).
    """
    layers, inputs, hooks, tokens = dense_layers(model), {}, [], 0
    losses = {name: torch.zeros(len(choices[name])) for name in layers}
    modules = {model.get_submodule(name): name for name in layers if name != "model.embed_tokens"}
    if model.config.tie_word_embeddings:
        modules[model.lm_head] = "model.embed_tokens"

    def add(name, gradient, error):
        """gradient (..., out); error: function (rounded layer, dense weight) -> (..., out)."""
        for i, layer in enumerate(choices[name]):
            product = (error(layer, layers[name].weight.detach()) * gradient).sum(-1)
            losses[name][i] += product.square().sum().cpu() / 2

    windows, random = [rows_of(batch, i, i + 1) for batch in batches for i in range(len(batch.ids))], torch.Generator()
    for i, window in enumerate(windows):
        with torch.no_grad():
            chances = model(window.ids, segments=window.segments)[0].softmax(-1).cpu()                   # (T, V)
        drawn = torch.multinomial(chances, 1, generator=random.manual_seed(i)).view(1, -1).to(window.targets)
        windows[i] = window._replace(targets=drawn.where(window.targets != IGNORE, IGNORE))
    for module in modules:                                       # now, as they shall see backward passes alone
        hooks += [module.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].detach()})),
                  module.register_full_backward_hook(lambda m, _, grads: add(
                      modules[m], grads[0], lambda layer, weight: F.linear(inputs[m], layer.dense() - weight)))]
    bar = tqdm(windows, desc="sensitivity", unit="window", dynamic_ncols=True, disable=None)
    for window, (gradient, _) in zip(bar, stream_gradients(model, windows)):
        add("model.embed_tokens", gradient, lambda layer, weight: layer.rows(window.ids[0]) - weight[window.ids[0]])
        tokens += int((window.targets != IGNORE).sum())
    for hook in hooks:
        hook.remove()
    return {name: (loss / tokens).tolist() for name, loss in losses.items()}


def round_to_nearest(model, entries):
    """Replaces the layers of `entries` by quantized ones, rounded to the nearest integer."""
    for entry in entries:
        kind, spec = spec_of(entry)
        model.replace(entry, kind.from_dense(model.get_submodule(entry["module"]), **spec))


def damped_cholesky(hessian, name, geometric=False):
    """Lower Cholesky factor of a Hessian (n, n) float64 plus 1 % of the mean diagonal, or more.

    geometric: of the geometric mean. The huge channels of a first token can make the other mean a
    thousand times larger (SmolLM2-135M, layer 11), and 1 % of it would drown all other channels.
    Raises UserError, which names the layer, for a Hessian that is not finite.
    """
    if not hessian.isfinite().all():
        raise UserError(f"the inputs of {name} are infinite or not numbers: the model cannot be calibrated")
    hessian, damping = hessian.clone(), 0.01
    mean, dead = hessian.diagonal().mean(), hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0              # an input that is always zero: this column is rounded to nearest
    mean = hessian.diagonal().log().mean().exp() if geometric else mean
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * torch.eye(len(hessian)).to(hessian))
        if not failed:
            return factor
        damping *= 10
        tqdm.write(f"{name}: too few inputs tell its columns apart; damping is {damping:.0%} of the mean diagonal")


def column_by_column(weight, factor, finalize, drift=None, block=128):
    """Optimal Brain Surgeon (Hassibi and Stork, 1992): returns the final weight (out, in) float32.

    finalize() fixes one column (rounds or prunes it), and the error that this causes in the layer's
    output is compensated in the columns not yet fixed, as the inverse Hessian says.

    factor  damped Cholesky factor of the Hessian (in, in) float64: sum of x x^T over the inputs x
    drift   (out, in) float64: sum of (dense output - output) x^T, an error that is compensated too,
            as far as x explains it (GPTAQ: Li et al., 2025, https://arxiv.org/abs/2504.02692)
    finalize(i, columns, cost) -> final column i (out,). columns (in, out): the current weights,
            compensated from i to the end of the block, at the start of a block to the last;
            cost (in,): weight of a squared error, 1 / [H^-1]_ii of the columns not yet fixed
    """
    weight = weight.detach().float()
    if drift is not None:                                        # the least-squares solution, before it is rounded
        weight = weight + torch.cholesky_solve(drift.T, factor).T.float()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    columns = weight.T.contiguous()                              # (in, out): a column's weights lie side by side
    final, cost = torch.empty_like(columns), factor.diagonal() ** -2
    for start in range(0, len(columns), block):                  # columns beyond the block are changed once for it
        end = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            final[i] = finalize(i, columns, cost)
            errors[i - start] = (columns[i] - final[i]) / factor[i, i]
            columns[i + 1:end] -= factor[i, i + 1:end, None] * errors[i - start]
        columns[end:] -= factor[start:end, end:].T @ errors
    return final.T.contiguous()


def gptq(weight, hessian, bits, group, drift=None, name="a layer"):
    """Rounds a weight (out, in) to (integers int8, scales float16), so that outputs change little.

    Frantar et al., 2022, https://arxiv.org/abs/2210.17323. hessian, drift: see column_by_column.
    """
    importance, scales = hessian.diagonal().float(), []
    integers = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)                 # (in, out)

    def finalize(i, columns, cost):
        if i % group == 0:
            scales.append(group_scales(columns[i:i + group].T, bits, group, importance[i:i + group]))
        integers[i] = rounded(columns[i, :, None], scales[-1], bits)[:, 0]
        return dequantized(integers[i, :, None], scales[-1])[:, 0]

    column_by_column(weight, damped_cholesky(hessian, name), finalize, drift)
    return integers.T.contiguous(), torch.cat(scales, dim=1)                             # (out, in), (out, in / group)


def gptq_layers(layers, entry, hessian, drift, name):
    """[QuantLinear, ...] of dense layers that share an input, rounded by gptq() as an entry says."""
    kind, spec = spec_of(entry)
    if hessian is None or entry["kind"] == "int8" and drift is None:           # without a drift, 8 bits gain nothing
        return [kind.from_dense(layer, **spec) for layer in layers]
    weight, rows = torch.cat([layer.weight for layer in layers]), [len(layer.weight) for layer in layers]
    integers, scales = gptq(weight, hessian, kind.bits, kind.group(weight.shape[1], **spec), drift, name)
    return [kind.from_integers(q, s, getattr(layer, "bias", None))
            for layer, q, s in zip(layers, integers.split(rows), scales.split(rows))]


def gptq_model(model, entries, batches):
    """Replaces the layers of `entries` by ones that gptq() rounded, layer by layer (chapter 4)."""
    todo = {entry["module"]: entry for entry in entries}

    def quantize(layers, names, hessian, drift):
        replaced, drifts = {}, drift if drift is None else drift.split([len(layer.weight) for layer in layers])
        for form in {str(spec_of(todo[name])): todo[name] for name in names}.values():       # mixed: not all alike
            same = [i for i, name in enumerate(names) if spec_of(todo[name]) == spec_of(form)]
            part = None if drifts is None else torch.cat([drifts[i] for i in same])
            for i, layer in zip(same, gptq_layers([layers[i] for i in same], form, hessian, part, names[same[0]])):
                replaced[names[i]] = layer
                layers[i].weight = nn.Parameter(layer.dense(), requires_grad=False)
        return replaced

    layer_by_layer(model, todo, batches, quantize, "gptq")


def ways_to_round(model, method, batches):
    """(entries, layers, losses): for each dense layer each format that fits it, as chosen_formats takes them.

    Layers are rounded one at a time, to nearest or by gptq, and the others stay dense. The losses are
    of the first windows; gptq looks at a quarter of the others, which is enough to compare formats.
    """
    dtype, entries, layers = model.dtype, possible_formats(model.float()), {}
    scored, seen = batches[:2], batches[2:2 + len(batches) // 4] or batches

    def look(same, names, hessian, drift):
        ways = zip(*(gptq_layers(same, entry, hessian, None, names[0]) for entry in entries[names[0]]))
        return layers.update(zip(names, map(list, ways))) or {}

    if method == "gptq":
        layer_by_layer(model, {name: ways[0] for name, ways in entries.items()}, seen, look, "formats", drifts=False)
    for name in entries if method != "gptq" else ():
        look([model.get_submodule(name)], [name], None, None)
    losses = rounding_losses(model, layers, scored)
    model.to(dtype)
    return entries, layers, losses


def quantize_step(model, tokenizer, step, args):
    """Step int8, int4 or mixed, by rtn, gptq or qat."""
    mixed, drawn = step.name == "mixed", {}
    history = {"step": step.name, "method": step.method or "rtn"}
    if mixed or step.method == "gptq":
        batches, drawn = calibration(model, tokenizer, args)
    if mixed:
        entries, plan = chosen_formats(float(step.value), *ways_to_round(model, step.method, batches))
        history.update(plan)
    else:
        bits, group = int(step.name[3:]), int(step.value or 32)
        history.update(**({"group": group} if bits == 4 else {}), head_bits=args.head_bits or bits)
        entries = layers_to_quantize(model, bits, group, history["head_bits"])
    if step.method == "gptq":
        gptq_model(model, entries, batches)
        return model, tokenizer, {**history, **drawn}
    if step.method == "qat":
        model, history = quantization_aware_training(model, tokenizer, step, entries, history, args)
    round_to_nearest(model, entries)
    return model, tokenizer, {**history, **drawn}


def dequantize_step(model, tokenizer, step, args):
    """Step dequantize."""
    if not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise UserError("dequantize: the model has no quantized layer")
    return dequantize(model), tokenizer, {"step": step.name}


# ---------------------------------------------------------------------------------------------------------------------
# 4. The layer-by-layer walk: each layer is compressed for the inputs that compressed layers give it

# The linear layers of a block, grouped by their input, in the order of the forward pass.
SAME_INPUT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def same_input(block):
    """The groups of SAME_INPUT in a block, {name: layer} each. gate_proj may be missing."""
    modules = dict(block.named_modules())
    return [{name: modules[name] for name in group if name in modules} for group in SAME_INPUT]


def by_group(block, x, rotary, mask):
    """Generator over one block's forward pass, for x (B, T, C).

    Before each group of SAME_INPUT it yields (input, residual stream that outputs are added to, or
    None); the caller may change weights before it resumes. At last it yields (block output, None).
    The stream is in units of the outputs: divided by the block's factor. Behind a norm it is None.
    """
    def added_to(x, norm):
        return x / block.factor if isinstance(norm, nn.Identity) else None

    first = block.input_layernorm(x)
    yield first, None
    h = block.self_attn.mix(first, rotary, mask)
    yield h, added_to(x, block.attention_out_norm)
    y = x.add(block.attention_out_norm(block.self_attn.o_proj(h)), alpha=block.factor)
    h = first if block.parallel == 1 else block.post_attention_layernorm(x if block.parallel else y)
    yield h, None
    h = block.mlp.inner(h)
    yield h, added_to(y, block.mlp_out_norm)
    yield y.add(block.mlp_out_norm(block.mlp.down_proj(h)), alpha=block.factor), None


def block_inputs(model, batches):
    """(streams (B, T, C) before the first block, rotaries and masks of all layers), for each batch."""
    return zip(*(model.model.prepare(batch.ids, segments=batch.segments) for batch in batches))


def flows_of(block, streams, rotaries, masks, layer):
    """by_group of a block, number `layer`, for each batch."""
    return [by_group(block, x, rotary[layer], mask[layer]) for x, rotary, mask in zip(streams, rotaries, masks)]


def check_walk(model, names, batch):
    """Raises UserError if the walk lacks a layer of `names`, or by_group is not Block.forward."""
    known = {"model.embed_tokens", "lm_head"}.union(*SAME_INPUT)
    for local in (split_name(name)[1].removesuffix(".down").removesuffix(".up") for name in names):
        if local not in known:
            raise UserError(f"compress.py does not know {local}: add it to SAME_INPUT and to by_group")
    (x,), (rotaries,), (masks,) = block_inputs(model, [rows_of(batch, 0, 1)])
    block = model.model.layers[0]
    expected, output = block(x, rotaries[0], masks[0]), list(by_group(block, x, rotaries[0], masks[0]))[-1][0]
    if not (output - expected).norm() <= 1e-3 * expected.norm():
        raise UserError("by_group in compress.py does not compute what Block.forward in model.py computes, so this "
                        "step would calibrate another model: bring the two in line")


def stream_gradients(model, batches):
    """Yields (gradient of the loss by rows of the embedding, final hidden states), (T, C) each."""
    model.model.embed_tokens.weight.requires_grad_(True)
    # One window at a time: a backward pass needs the activations of all blocks.
    for ids, targets, segments in (rows_of(batch, i, i + 1) for batch in batches for i in range(len(batch.ids))):
        hidden = []
        with torch.enable_grad():
            x = model.model(ids, segments=segments, hidden=hidden).flatten(0, 1)                         # (T, C)
            loss = F.cross_entropy(model.lm_head(x).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        gradient = torch.autograd.grad(loss, hidden[0])[0] * model.config.embedding_multiplier
        yield gradient.flatten(0, 1), x.detach()


def table_hessian(model, batches):
    """The Hessian of the embedding's rows, (C, C) float64: the Fisher matrix, sum of g g^T.

    g: gradients of the loss by the rows, as one-hot inputs say nothing of channels. A tied table
    also multiplies the final hidden states h: h h^T is added.
    """
    total = 0.0
    for g, h in stream_gradients(model, batches):
        total = total + (g.T @ g).double()
        if model.config.tie_word_embeddings:
            total = total + (h.T @ h).double()
    return total


def group_sums(weight, batches, flows, dense_flows):
    """(hessian, drift or None) of column_by_column for a group of stacked weight (out, in)."""
    hessian, drift = 0.0, 0.0
    for batch, flow, dense_flow in zip(batches, flows, dense_flows):
        x, residual = next(flow)
        x = unpadded(x, batch)
        hessian = hessian + (x.T @ x).double()
        if dense_flow:
            dense_x, dense_residual = next(dense_flow)
            error = unpadded(dense_x, batch) - x                                                         # (N, in)
            if residual is not None:                             # the error of the residual stream counts too
                error = error @ weight.T + unpadded(dense_residual - residual, batch)                    # (N, out)
            drift = drift + (error.T @ x).double()
    if residual is None and dense_flow:
        drift = weight.double() @ drift                                                                  # (out, in)
    return hessian, drift if dense_flow else None


def compress_block(block, prefix, todo, batches, flows, dense_flows, compress):
    """Calls compress() for the layers of a block that `todo` names. Returns {name: new module}."""
    replaced = {}
    for group in same_input(block):
        layers = {prefix + name: layer for name, layer in group.items()}
        weights = [dense_weight(layer) for layer in layers.values()]
        hessian, drift = group_sums(torch.cat(weights), batches, flows, dense_flows)
        drifts = {}
        if drift is not None:
            drifts = dict(zip(layers, drift.split([len(weight) for weight in weights])))
        if names := [name for name in layers if name in todo]:
            drift = torch.cat([drifts[name] for name in names]) if drifts else None
            replaced.update(compress([layers[name] for name in names], names, hessian, drift))
        for (name, layer), weight in zip(layers.items(), weights):
            if f"{name}.down" in todo:                           # two factors: `up` reads the output of the new `down`
                replaced.update(compress([layer.down], [f"{name}.down"], hessian, None))
                down, drift = layer.down.weight.double(), None                                           # (rank, in)
                if drifts:
                    error = weight.double() - layer.up.weight.double() @ down                            # (out, in)
                    drift = (drifts[name] + error @ hessian) @ down.T                                    # (out, rank)
                replaced.update(compress([layer.up], [f"{name}.up"], down @ hessian @ down.T, drift))
    return replaced


@torch.no_grad()
def layer_by_layer(model, todo, batches, compress, title, drifts=True):
    """Compresses layers in the order of the forward pass, with one block at a time in memory.

    todo    {name: entry of model.compression} of dense layers, or the two factors of low-rank ones
    compress(layers, names, hessian, drift) changes the weights of layers that share an input, given
            the sums of column_by_column, stacked; returns {name: new module} where a class changes
    drifts  False: no dense model runs beside, drift is None, and the time is half
    Raises UserError as check_walk does.
    """
    body, dtype = model.model, model.dtype

    def replace(layers):
        for name, layer in layers.items():
            model.replace(todo[name], layer)

    model.float().requires_grad_(False)
    check_walk(model, todo, batches[0])
    dense_streams, *_ = block_inputs(model, batches)
    if entry := todo.get("model.embed_tokens"):                  # at 8 bits it is rounded to nearest
        hessian = table_hessian(model, batches[:2]) if entry["kind"] == "int4" else None
        replace(compress([body.embed_tokens], ["model.embed_tokens"], hessian, None))
    streams, rotaries, masks = block_inputs(model, batches)
    for i, block in enumerate(tqdm(body.layers, desc=title, unit="block", dynamic_ncols=True, disable=None)):
        dense_flows = [None] * len(batches)
        if drifts:
            dense_flows = flows_of(copy.deepcopy(block), dense_streams, rotaries, masks, i)
        flows = flows_of(block, streams, rotaries, masks, i)
        replaced = compress_block(block, f"model.layers.{i}.", todo, batches, flows, dense_flows, compress)
        streams = [next(flow)[0] for flow in flows]
        if drifts:
            dense_streams = [next(flow)[0] for flow in dense_flows]
        replace(replaced)
    if "lm_head" in todo:
        finals = [unpadded(body.norm(x), batch) for x, batch in zip(streams, batches)]
        hessian = sum((x.T @ x).double() for x in finals)        # compensating the drift here was no better
        replace(compress([model.lm_head], ["lm_head"], hessian, None))
    model.to(dtype).requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Sparsity. A method is a function (weight, hessian, keep, drift, name) -> the weight with zeros

def highest(scores, keep):
    """A mask of the highest scores (out, in): the share `keep` of each row, or 2of4 neighbours."""
    if keep == "2of4":
        return highest(scores.unflatten(-1, (-1, 4)), 0.5).flatten(-2)             # (out, in / 4, 4) -> (out, in)
    count = max(1, round(keep * scores.shape[-1]))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)


def magnitude(weight, hessian, keep, drift=None, name=""):
    """Prunes a weight (out, in) to the largest |w|."""
    return weight * highest(weight.abs(), keep)


def wanda(weight, hessian, keep, drift=None, name=""):
    """Prunes a weight (out, in) to the largest |w| x norm of the input (Sun et al., 2023)."""
    return weight * highest(weight.abs() * hessian.diagonal().sqrt().to(weight), keep)


def sparsegpt(weight, hessian, keep, drift=None, name="a layer", block=128):
    """Prunes a weight (out, in) with error compensation (Frantar and Alistarh, 2023).

    At each block of columns the zeros of a row are chosen anew among all columns to come.
    """
    mask, factor = torch.ones_like(weight, dtype=torch.bool), damped_cholesky(hessian, name, geometric=True)

    def finalize(i, columns, cost):
        if keep == "2of4" and i % 4 == 0:
            mask[:, i:i + 4] = highest((columns[i:i + 4].square() * cost[i:i + 4, None]).T, keep)      # (out, 4)
        elif keep != "2of4" and i % block == 0:
            scores = (columns.square() * cost[:, None]).T                                              # (out, in)
            scores[:, :i] = torch.where(mask[:, :i], math.inf, -1.0)                     # columns that are fixed
            mask[:] = highest(scores, keep)
        return columns[i] * mask[:, i]

    sparse = column_by_column(weight, factor, finalize, drift, block)
    return least_squares(sparse, mask, weight.detach(), factor @ factor.T, drift)


def least_squares(weight, mask, dense, hessian, drift=None, steps=15):
    """Improves a weight (out, in) where `mask` allows it, towards the least error of the outputs.

    column_by_column gives no column a second look; this removes a fifth of the error that is left.
    Each row by conjugate gradients: few steps come near, as those of Boza (2024).
    """
    residual = ((dense - weight).double() @ hessian + (0 if drift is None else drift)).float() * mask
    hessian, size, direction = hessian.float(), torch.tensor(math.inf), 0.0
    for _ in range(steps):
        scaled = residual / hessian.diagonal()
        old, size = size, (residual * scaled).sum(1, keepdim=True)                                       # (out, 1)
        direction = scaled + size / old.clamp(min=1e-30) * direction
        curved = direction @ hessian * mask
        step = size / (direction * curved).sum(1, keepdim=True).clamp(min=1e-30)
        weight, residual = weight + step * direction, residual - step * curved
    return weight


def sparse_step(model, tokenizer, step, args):
    """Step sparse. Raises UserError for rows that groups of four do not divide."""
    layers, method = body_layers(model), STEPS["sparse"].methods[step.method]
    for name, layer in layers.items():
        if step.keep == "2of4" and layer.in_features % 4:
            raise UserError(f"sparse:2of4: rows of {layer.in_features} ({name}) do not divide into groups of four")

    def prune(layers, names, hessian, drift):
        weight = method(torch.cat([layer.weight for layer in layers]), hessian, step.keep, drift, names[0])
        for layer, rows in zip(layers, weight.split([layer.out_features for layer in layers])):
            layer.weight = nn.Parameter(rows.detach().clone())
        return {}

    entry = {}
    if step.text:
        batches, entry = calibration(model, tokenizer, args)
        layer_by_layer(model, layers, batches, prune, step.method, drifts=method is not wanda)
    else:
        for name, layer in layers.items():
            prune([layer], [name], None, None)
    return model, tokenizer, {"step": step.name, "keep": step.value, "method": step.method, **entry}


# ---------------------------------------------------------------------------------------------------------------------
# 6. Low rank: a weight (out, in) as the product of up (out, rank) and down (rank, in)

def low_rank(weight, rank, factor=None):
    """(up (out, rank), down (rank, in)) float32, whose product is nearest to a weight (out, in).

    By squared error of the weights; with the Cholesky factor (in, in) of a Hessian, of the outputs
    (SVD-LLM: Wang et al., 2024, https://arxiv.org/abs/2403.07378). The squares of the singular
    values left out add up to that error.
    """
    weight = weight.double()
    u, values, v = torch.linalg.svd((weight if factor is None else weight @ factor).float(), full_matrices=False)
    root = values[:rank].sqrt()                                  # both factors get the same scale
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    if factor is not None:
        down = torch.linalg.solve_triangular(factor, down.double(), upper=False, left=False).float()
    return up, down


def best_ranks(model, layers, keep, batches):
    """{name: rank} for which all layers together keep the share `keep` and the loss grows least."""
    ranks, errors = {n: possible_ranks(layer) for n, layer in layers.items()}, rank_errors(model, layers, batches)
    choices = {n: [(size, float(errors[n][rank]) if rank else 0.0) for size, rank in ranks[n]] for n in ranks}
    chosen = knapsack(choices, int(keep * sum(layer.weight.numel() for layer in layers.values())))
    chosen = chosen or dict.fromkeys(ranks, 0)                   # a share that is too small: the least ranks
    return {name: ranks[name][i][1] for name, i in chosen.items() if ranks[name][i][1]}


def rank_errors(model, layers, batches):
    """{name: (min(out, in),)}: how much the loss grows when a layer has rank 0, 1, ...

    The squared error of the outputs times the mean square of the loss's gradients by them (Fisher),
    which differs a hundredfold between layers.
    """
    gradients, errors = collections.Counter(), {}
    hooks = [layer.register_full_backward_hook(lambda _, __, grads, name=name: gradients.update(
        {name: float(grads[0].double().square().mean())})) for name, layer in layers.items()]     # Counter: a sum
    for _ in stream_gradients(model, batches):                   # the hooks see each backward pass
        pass
    for hook in hooks:
        hook.remove()

    def look(layers, names, hessian, drift):
        factor = damped_cholesky(hessian, names[0], geometric=True)
        for layer, name in zip(layers, names):
            values = torch.linalg.svdvals((layer.weight.double() @ factor).float()).double()
            errors[name] = (gradients[name] * values.square().flip(0).cumsum(0).flip(0)).cpu()   # [r]: of rank r
        return {}

    layer_by_layer(model, layers, batches, look, "ranks", drifts=False)
    return errors


def lowrank_step(model, tokenizer, step, args):
    """Step lowrank: svd, whitened, allocated. Raises UserError if no layer can have that share."""
    layers, entry = body_layers(model), {}
    total = sum(layer.weight.numel() for layer in layers.values())
    if step.text:
        batches, entry = calibration(model, tokenizer, args)
    allocated = step.method == "allocated"
    ranks = best_ranks(model, layers, step.keep, batches[:2]) if allocated else even_ranks(layers, step.keep)
    if not ranks:
        raise UserError(f"lowrank:{step.value}: two factors of rank 32, 64, ... have that share of no layer's "
                        "parameters in this model: give a lower one, or leave lowrank out")
    todo = {name: {"module": name, "kind": "lowrank", "rank": rank} for name, rank in ranks.items()}

    def factorize(layers, names, hessian, drift):
        factor, replaced = damped_cholesky(hessian, names[0], geometric=True), {}
        for layer, name, error in zip(layers, names, drift.split([layer.out_features for layer in layers])):
            weight = layer.weight + torch.cholesky_solve(error.T, factor).T.float()       # as in column_by_column
            up, down = low_rank(weight, ranks[name], factor)
            layer.weight, replaced[name] = nn.Parameter(up @ down), LowRankLinear.from_factors(up, down, layer.bias)
        return replaced

    if step.text:
        layer_by_layer(model, todo, batches, factorize, "lowrank")
    else:
        for name in todo:
            up, down = (t.to(model.dtype) for t in low_rank(layers[name].weight.detach(), ranks[name]))
            model.replace(todo[name], LowRankLinear.from_factors(up, down, layers[name].bias))
    share = sum(layer.weight.numel() for layer in body_layers(model).values()) / total
    print(f"lowrank: {len(ranks)} of {len(layers)} layers have ranks of {min(ranks.values())} to "
          f"{max(ranks.values())}, {share:.1%} of the blocks' weights stay")
    return model, tokenizer, {"step": step.name, "keep": step.keep, "method": step.method, "share": share, **entry}


# ---------------------------------------------------------------------------------------------------------------------
# 7. The chain and the command

# A step is a function (model, tokenizer, step, args) -> (model, tokenizer, history entry) and a row
# here: how it is written, which methods look at calibration text (text) or train (trains).
SCORES = dict(activation=activation_scores, magnitude=magnitude_scores)
STEPS = {
    "ffn": Form(slice_step, ("KEEP",), methods=SCORES, text=("activation",)),
    "heads": Form(slice_step, ("KEEP",), methods=SCORES, text=("activation",)),
    "width": Form(slice_step, ("KEEP",), methods=dict(pca=pca_scores, **SCORES), text=("pca", "activation")),
    "depth": Form(slice_step, ("KEEP",), methods=dict(influence=influence_scores), text=("influence",)),
    "vocab": Form(vocab_step, ("KEEP",), text=("",)),
    "lowrank": Form(lowrank_step, ("KEEP",), methods=("allocated", "whitened", "svd"), text=("allocated", "whitened")),
    "sparse": Form(sparse_step, ("KEEP", "2of4"), methods=dict(sparsegpt=sparsegpt, wanda=wanda, magnitude=magnitude),
                   text=("sparsegpt", "wanda")),
    "recover": Form(recover_step, ("STEPS",), methods=("taught", "text"), trains=("taught", "text")),
    "int8": Form(quantize_step, methods=("", "qat"), trains=("qat",)),
    "int4": Form(quantize_step, ("32", "64", "128"), "32", ("rtn", "gptq", "qat"), text=("gptq",), trains=("qat",)),
    "mixed": Form(quantize_step, ("BITS",), methods=("gptq", "rtn", "qat"), text=("gptq", "rtn"), trains=("qat",)),
    "dequantize": Form(dequantize_step),
    "gguf": Form(gguf_step, GGUF_TYPES),
}


def make(steps, args, stages, out=None):
    """Runs the chain on args.model, on args.device: (model, tokenizer).

    Each stage is saved as stages/<chain so far>, the last to `out` if given; old ones are reused.
    """
    places = [settle(stages / chain_name(steps[:n]), MODEL) for n in range(1, len(steps) + 1)]
    reusable = places[:-1] if out else places
    done = max((n for n, place in enumerate(reusable, 1) if (place / "config.json").is_file()), default=0)
    source = places[done - 1] if done else find_model(args.model)
    parent = {} if done else {"parent": {"name": model_name(source), "sha256": checkpoint_hash(source)}}
    device = pick_device(args.device)
    if device.type == "mps":
        device = torch.device("cpu")                             # mps has no float64, which Hessians need
    model, tokenizer = accelerate(load(source, device), args.native), Tokenizer.load(source)
    for n, step in enumerate(steps[done:], done + 1):
        torch.set_float32_matmul_precision("highest")            # training on a GPU lowers it
        args.run = str(places[n - 1]) + ".run"                   # of a step that trains, until the stage is saved
        model, tokenizer, entry = STEPS[step.name].function(model, tokenizer, step, args)
        model.history, parent = model.history + [{**entry, **parent}], {}
        if step.name != "gguf":
            place = out if out and n == len(steps) else places[n - 1]
            save(model, place, tokenizer)
            model = accelerate(load(place, device), args.native)         # the very model that a resumed chain loads
        shutil.rmtree(args.run, ignore_errors=True)
    return model, tokenizer


def main(argv=None):
    """Runs a chain; hands --measure and --sweep to data/measure.py, --fit to data/fit.py."""
    args = parse_arguments(argv, __doc__)
    command = "python compress.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    if args.measure or args.sweep is not None or args.fit:
        from data import fit, measure                            # here, as measure imports this script
        command_of = measure.measure_command if args.measure else fit.fit_command if args.fit else measure.sweep_command
        return command_of(args, command)
    steps = parse_chain(args.steps, STEPS)                       # all that can be refused is refused before any work
    out = Path(args.out) if Path(args.out).name else Path(args.out).resolve()      # "." has no name to write beside
    args.out, directory, to_file = str(out), find_model(args.model), steps[-1].name == "gguf"
    stages, staged = out.with_name(out.name + ".stages"), len(steps) > 1 or needs_text(steps)
    if args.resume and is_made(out, steps, directory):           # a kill left the stages beside it
        remove_tree(stages)
        return print(f"{out} is made already, by this chain from this model")
    check_chain_out(out, directory, to_file, args.overwrite)
    check_flags(args, steps)
    check_order(steps, load(directory))
    if to_file:
        import_gguf()
    with stages_of(stages, args, staged):
        model, _ = make(steps, args, stages, out)
        if not to_file:
            print_sizes(model, out)
        del model                                                # Windows removes no file that is mapped


if __name__ == "__main__":
    run(main)
