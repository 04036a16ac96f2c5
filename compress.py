"""Makes a trained model smaller by a chain of steps, read left to right, and writes the result.

    python compress.py out int8 --out out-int8                      # about a quarter of the bytes
    python compress.py out int4:32 --head-bits 8 --out out-int4     # about a sixth; embedding and head at 8 bits
    python compress.py out int4:32:gptq --out out-gptq              # about a seventh; half of what rounding costs
    python compress.py out int8 gguf:q8_0 --out model.gguf          # for llama.cpp, Ollama, ...; needs pip install gguf
    python compress.py out gguf:f16 --out model.gguf --overwrite
    python compress.py out width:0.75 recover:95 int8 --out out-cut         # smaller, trained a little, rounded
    python compress.py out lowrank:0.8 recover:95 --out out-lowrank
    python compress.py --measure out out-int8 out-int4 --out report         # side by side; the first is the baseline
    python compress.py out --sweep --out out-sweep                  # a set of chains, made and measured

A step is written name[:value][:method]:

    ffn:KEEP, heads:KEEP[:activation|magnitude]    of each MLP's neurons, or of the key-value heads with their query
                               heads, the share KEEP stays. The rest is cut out, what stays is fitted to make up for it
        activation  those stay that are largest on calibration text
        magnitude   those with the largest weights: needs no text, and nothing is fitted
    width:KEEP[:pca|activation|magnitude]  of all parameters the share KEEP stays: of channels, heads and neurons
                               as many as lose least on calibration text
        pca         channels are the principal components of the residual stream (a tied model: activation)
    depth:KEEP                 of the layers those stay that change the residual stream most
    vocab:KEEP                 of the ids those stay that the text uses most; another tokenizer. Without recovery it is
                               for ids that are hardly used
    lowrank:KEEP[:allocated|whitened|svd]  a matrix becomes the product of two thin ones, with the share KEEP of its
                               parameters (in steps: ranks are multiples of 32)
        svd         nearest to the weights: needs no text
        whitened    nearest in what the layer makes of its inputs: half the loss of svd
        allocated   whitened, KEEP being a share of all blocks: ranks are low where the loss feels it least
    sparse:KEEP|2of4[:sparsegpt|wanda|magnitude]   zeros in the blocks' matrices: of each row the share KEEP stays, or
                               two of four neighbours. A study of quality: no kernel here is faster for them
        magnitude   the largest weights stay: needs no text
        wanda       the largest, times the size of their inputs, stay
        sparsegpt   one column after another, made up for by those to come
    recover:STEPS[:taught|text]            the model learns on for so many steps of four windows; zeros of sparse stay
        taught  by the model that entered the chain, as in distill.py
        text    by cross-entropy.
    int8[:qat]                 weights become 8-bit integers, one scale for each row
    int4[:32|64|128][:rtn|gptq|qat]        4-bit integers, one scale for each group of 32 (or 64, 128) in a row.
        rtn     each weight to the nearest of its integers, as is int8: needs no text
        gptq    one column after another, made up for by those to come: about half the loss of rtn. It looks at 128
                windows of what the model was trained on, or of --calibration NAME_OR_DIR_OR_FILE
        qat     the model learns on for --qat-steps while it is rounded, taught by its dense self: the least loss, at
                the cost of a fine-tuning
    dequantize                 quantized layers become dense again (what rounding took away stays away)
    gguf:f32|f16|q8_0|q4_0     the model and its tokenizer in one GGUF file. The last step: its --out is a file. Layers
                               that are int8 or int4 go in as they are: int8 with gguf:q8_0, int4 with gguf:q4_0

A step that changes float weights comes before the one that rounds them, one that cuts before lowrank and sparse. While
a chain runs, its finished stages and the runs of what trains are in OUT.stages: after Ctrl-C the same command with
--resume goes on from there.

--measure compares finished models in one process: bytes, quality and distance from the first one on the validation
text it was trained beside (or --data, --text), memory, and speed with turns taken between them (see sample.measure).
--sweep does so, each beside the model it was made from, with each stage of chains that you write in quotes
(--sweep "width:0.5 recover:300 int8" int4) or of a set of its own; models, report and picture are in --out.

Biases, norms and learned positions stay float. All other steps write a model directory that sample.py reads. On a CPU
quantized layers multiply in C, compiled once (model.py, KERNELS): generation is faster than dense. Without a compiler,
and on a GPU, each use dequantizes the weights, and it is slower; --measure and sample.py say which it was.
"""
import argparse, collections, copy, hashlib, itertools, math, shlex, shutil, sys
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import distill, train
from data import UserError
from data.chain import (MEASURING, Form, chain_name, check_chain_out, check_flags, check_order, is_made, needs_text,
                        open_stages, parse_chain, told_how_to_go_on)
from data.checkpoints import checkpoint_hash, model_name, whole
from data.console import Parser, decoded, run
from data.export import GGUF_TYPES, import_gguf, write_gguf
from data.files import MODEL, remove_tree, settle
from data.hub import FAMILIES, SIZES
from data.loader import IGNORE, Batch, Windows, read_meta
from data.machine import accelerate
from data.sources import calibration_context, calibration_data
from data.tokenizer import Tokenizer
from data.tokenizer_files import cut_tokenizer
from distill import fine_tune, quantization_aware_training, zeros_kept
from model import LAYERS, LowRankLinear, QuantLinear, Transformer, absmax_scales, dequantized, load, rounded, save


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: the text that a step looks at, of what the model learned from and never of what it is judged by


def calibration(model, tokenizer, args):
    """(batches, what the history says of them): --calibration-windows windows drawn by --seed, 8 in a Batch.

    Of prepared data they are from the training split. A text file is encoded with the model's own tokenizer.
    """
    source, context = calibration_data(model, tokenizer, args), calibration_context(model)
    count = args.calibration_windows
    if source.is_file():
        name, ids = source.name, tokenizer.encode_array(decoded(source.read_bytes(), f"--calibration {source}"))
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
# Structured pruning: channels, neurons, heads, layers or ids are cut out, and what is left is a smaller dense model

# What the rows and columns of a tensor belong to: the residual stream, the neurons of an MLP, the channels of query
# heads and of key-value heads, ids. A vector has rows only.
AXES = {"embed_tokens": ("vocab", "width"), "lm_head": ("vocab", "width"), "embed_positions": ("", "width"),
        "q_proj": ("queries", "width"), "k_proj": ("keys", "width"), "v_proj": ("keys", "width"),
        "o_proj": ("width", "queries"), "gate_proj": ("ffn", "width"), "up_proj": ("ffn", "width"),
        "down_proj": ("width", "ffn"), "input_layernorm": ("width",), "post_attention_layernorm": ("width",),
        "norm": ("width",), "q_norm": ("",), "k_norm": ("",)}
TRIED = 2                                   # batches by which width tells sizes apart


def layer_of(name):
    """The number of the block that a tensor or a module is in, or 0."""
    return int(name.split(".")[2]) if ".layers." in name else 0


def taken(t, kept, dim, axis, layer):
    """What of a dimension of t stays: `kept` has indices (n,) of an axis, or (layers, n) if each layer has its own."""
    if axis not in kept:
        return t
    return t.index_select(dim, kept[axis] if kept[axis].ndim == 1 else kept[axis][layer])


@torch.no_grad()
def cut(model, kept):
    """The model of what stays. kept: indices of "layers", "width", "ffn", "queries" and "keys", "vocab", or of some of
    these (see `taken`); of the others all stay."""
    c = model.config
    layers = kept["layers"].tolist() if "layers" in kept else list(range(c.num_hidden_layers))
    now = {axis: indices.shape[-1] for axis, indices in kept.items()}
    with torch.device("meta"):
        small = Transformer(distill.shaped(
            c, layers, hidden_size=now.get("width", c.hidden_size), vocab_size=now.get("vocab", c.vocab_size),
            intermediate_size=now.get("ffn", c.intermediate_size),
            num_attention_heads=now["queries"] // c.head_dim if "queries" in now else c.num_attention_heads,
            num_key_value_heads=now["keys"] // c.head_dim if "keys" in now else c.num_key_value_heads))
    theirs, tensors = model.state_dict(), {}
    for name in small.state_dict():
        layer = layers[layer_of(name)]
        t = theirs[name.replace(f".layers.{layer_of(name)}.", f".layers.{layer}.")]
        for dim, axis in zip(range(t.ndim), AXES[name.split(".")[-2]]):
            t = taken(t, kept, dim, axis, layer)
        tensors[name] = t.clone()
    small.load_state_dict(tensors, assign=True)
    small.tie_weights()
    small.history = model.history
    small.exits = sorted({sum(i < e for i in layers) for e in model.exits} - {0, len(layers)})
    return small.train(model.training)


def head_channels(config, groups):
    """{"queries", "keys"}: the channels of key-value heads `groups` (layers, n) and of the query heads on them."""
    share, D = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    return {axis: (groups[..., None] * size + torch.arange(size)).flatten(1)
            for axis, size in (("queries", share * D), ("keys", D))}


def tokens(x, batch):
    """(B, T, C) to (N, C), without padding."""
    return x.flatten(0, 1) if batch.segments is None else x[batch.segments > 0]


@torch.no_grad()
def importance(model, batches):
    """{"width": (1, C), "ffn": (layers, F), "keys": (layers, K)}: how much the channels of the stream, neurons, and
    key-value heads with their query heads do. batches None: the squares of the weights that belong to them. Otherwise
    the mean size of the normalized channels and of the outputs of neurons and heads, over all tokens of the batches
    (Minitron: Muralidharan et al., 2024, https://arxiv.org/abs/2407.14679).
    """
    c, sums, hooks = model.config, collections.defaultdict(float), []

    def add(axis, name, scores):
        key = axis, 0 if axis == "width" else layer_of(name)
        sums[key] = sums[key] + scores.float()

    if batches is None:
        for name, p in model.named_parameters():
            for dim, axis in enumerate(AXES[name.split(".")[-2]] if p.ndim > 1 else ()):
                add(axis, name, p.square().sum(1 - dim))
    for name, module in model.named_modules() if batches else ():
        axes = AXES.get(name.split(".")[-1])
        if axes in (("width", "queries"), ("width", "ffn")):
            hooks.append(module.register_forward_pre_hook(
                lambda _, args, axis=axes[1], name=name: add(axis, name, tokens(args[0], batch).abs().mean(0))))
        elif axes == ("width",):
            hooks.append(module.register_forward_hook(
                lambda _, args, y, name=name: add("width", name, tokens(y, batch).abs().mean(0))))
    for batch in batches or ():
        model(batch.ids, segments=batch.segments, head=False)
    for hook in hooks:
        hook.remove()
    scores = {axis: torch.stack([sums[axis, i] for i in range(1 if axis == "width" else c.num_hidden_layers)])
              for axis in ("width", "ffn", "queries")}
    return {**scores, "keys": scores["queries"].unflatten(1, (c.num_key_value_heads, -1)).sum(-1)}


@torch.no_grad()
def streams(model, batches):
    """Of each batch the residual stream before each layer and after the last, (N, C) each."""
    for batch in batches:
        model(batch.ids, segments=batch.segments, head=False, hidden=(hidden := []))
        yield [tokens(x, batch).float() for x in hidden]


@torch.no_grad()
def rotated(model, batches):
    """An equal model whose channels are the principal components of its residual stream, the strongest first: each
    norm's weight goes into the matrices that read it, and what is left of RMSNorm does not see a rotation (SliceGPT:
    Ashkboos et al., 2024, https://arxiv.org/abs/2401.15024; here one rotation for all layers, so that none of them
    needs another matrix). The model must not be tied: the last norm's weight is not for the embedding."""
    moments = sum(x.T @ x for hidden in streams(model, batches) for x in (F.rms_norm(x, x.shape[1:]) for x in hidden))
    basis, model = torch.linalg.eigh(moments.double())[1].flip(1).float(), copy.deepcopy(model)
    folds = [(model.model.norm, [model.lm_head])]
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        folds += [(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                  (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])]
    for norm, readers in folds:
        for layer in readers:
            layer.weight *= norm.weight
        norm.weight.fill_(1.0)
    for name, p in model.named_parameters():
        axes = AXES[name.split(".")[-2]]
        if axes[-1] == "width" and p.ndim == 2:
            p.copy_(p @ basis)
        elif axes[0] == "width" and len(axes) == 2:
            p.copy_(basis.T @ p)
    return model


@torch.no_grad()
def refit(small, dense, kept, batches):
    """Fits the matrices of `small`, cut out of `dense`, one after another in the order of the forward pass: by least
    squares each gives for its inputs what it gave in the dense model, and those that add to the residual stream also
    what the stream lacks by then (ZipLM, Kurtic et al., 2023, https://arxiv.org/abs/2302.04089, does so for the matrix
    that columns are cut from). A norm over fewer channels has another scale; that is made up for too."""
    c = dense.config
    layers = kept["layers"].tolist() if "layers" in kept else list(range(c.num_hidden_layers))

    def add(parts, hessian, drift):
        delta = torch.cholesky_solve(drift.T, damped_cholesky(hessian, "a pruned layer")).T
        for part, change in zip(parts, delta.split([len(part.weight) for part in parts])):
            part.weight += change

    check_groups(dense, batches[0])
    theirs, rotaries, masks = zip(*(dense.model.prepare(batch.ids, segments=batch.segments) for batch in batches))
    ours = [taken(x, kept, -1, "width", 0) for x in theirs]
    for i, dense_block in enumerate(dense.model.layers):
        if i not in layers:                                       # cut out: from here on the stream lacks what it adds
            theirs = [dense_block(x, rotary, mask[i]) for x, rotary, mask in zip(theirs, rotaries, masks)]
            continue
        block = small.model.layers[layers.index(i)]
        flows = [(by_group(dense_block, d, rotary, mask[i]), by_group(block, x, rotary, mask[i]))
                 for d, x, rotary, mask in zip(theirs, ours, rotaries, masks)]
        for names in SAME_INPUT:
            names = [name for name in names if name != "mlp.gate_proj" or c.gated]
            parts, hessian, drift = [block.get_submodule(name) for name in names], 0.0, 0.0
            for batch, (dense_flow, flow) in zip(batches, flows):
                (d, stream), (x, residual) = next(dense_flow), next(flow)
                lacking = []
                for name, part in zip(names, parts):
                    wanted, now = dense_block.get_submodule(name)(d), part(x)
                    if residual is not None:
                        wanted, now = stream + wanted, residual + now
                    lacking.append(taken(wanted, kept, -1, AXES[name.split(".")[1]][0], i) - now)
                x = tokens(x, batch)
                hessian = hessian + (x.T @ x).double()
                drift = drift + (tokens(torch.cat(lacking, -1), batch).T @ x).double()
            add(parts, hessian, drift)
        theirs, ours = zip(*((next(dense_flow)[0], next(flow)[0]) for dense_flow, flow in flows))
    d, x = (torch.cat([tokens(model.model.norm(stream), batch) for stream, batch in zip(last, batches)])
            for model, last in ((dense, theirs), (small, ours)))                                         # (N, C)
    if c.tie_word_embeddings:                                     # the head is the embedding: the norm alone is fitted
        d = taken(d, kept, 1, "width", 0)
        small.model.norm.weight *= (d * x).sum(0) / x.square().sum(0).clamp(min=1e-9)
    else:
        hessian = (x.T @ x).double()
        add([small.lm_head], hessian, dense.lm_head.weight.double() @ (d.T @ x).double()
            - small.lm_head.weight.double() @ hessian)


def sizes_kept(model, keep):
    """[(width, key-value heads, neurons), ...]: sizes that leave at most the share `keep` of all parameters of a model,
    without those that are smaller than others in everything."""
    c, found = model.config, []
    share, budget = c.num_attention_heads // c.num_key_value_heads * c.head_dim, keep * model.parameters_count()
    axes = [(AXES[name.split(".")[-2]], p.shape) for name, p in model.named_parameters()]

    def multiples(size):
        return sorted({*range(multiple(size), size, multiple(size)), size}, reverse=True)

    def parameters(width, heads, ffn):
        now = {"width": width, "queries": heads * share, "keys": heads * c.head_dim, "ffn": ffn}
        return sum(math.prod(now.get(axis, n) for axis, n in zip(its_axes, shape)) for its_axes, shape in axes)

    for width, heads in itertools.product(multiples(c.hidden_size), range(c.num_key_value_heads, 0, -1)):
        ffn = next((f for f in multiples(c.intermediate_size) if parameters(width, heads, f) <= budget), 0)
        if ffn and not any(w >= width and h >= heads and f >= ffn for w, h, f in found):
            found.append((width, heads, ffn))
    return found


def multiple(size):
    """Of which widths and numbers of neurons stay: int4 and GGUF round groups of 32; a toy has fewer."""
    return 32 if size >= 64 else 8


def fewer(size, keep, unit=1):
    """The multiple of `unit` that is nearest to the share `keep` of a size; 0: none is left."""
    return min(size, unit * max(round(keep * size / unit), unit > 1))


def told(step, before, after, method):
    """Prints what a step has cut; what the history says of it."""
    shapes = [(name, [getattr(model.config, name) for model in (before, after)]) for name in SIZES]
    sizes = {name: pair for name, pair in shapes if pair[0] != pair[1]}
    counts = before.parameters_count(), after.parameters_count()
    print(f"{step.name}: {', '.join(f'{name} {a:,} -> {b:,}' for name, (a, b) in sizes.items()) or 'nothing is cut'}; "
          f"{counts[0]:,} -> {counts[1]:,} parameters ({counts[1] / counts[0]:.1%})", flush=True)
    return {"step": step.name, "keep": float(step.value), **({"method": method} if method else {}), **sizes,
            "parameters": list(counts)}


def structured_step(model, tokenizer, step, args):
    """ffn, heads, width or depth. KEEP is the share that stays of the neurons; of the key-value heads, with the query
    heads that share them; of all parameters of the model, embedding and head too; of the layers.

    width tries the sizes of stream, heads and neurons that fit (sizes_kept) and takes those with the least loss on
    calibration text. All layers get equal sizes, multiples of 32, and matrices are fitted to what is left (refit); by
    magnitude no text is looked at and nothing is fitted.
    """
    c, keep, method = model.config, float(step.value), step.method
    if step.name in ("heads", "width") and "head_dim" in FAMILIES[c.model_type].unnamed:
        raise UserError(f"{step.name}: the config.json of {c.model_type} has no head_dim: other programs divide the "
                        "width by the heads, which would be wrong with fewer: use ffn or depth")
    sizes = {"ffn": [{"ffn": fewer(c.intermediate_size, keep, multiple(c.intermediate_size))}],
             "heads": [{"keys": fewer(c.num_key_value_heads, keep)}],
             "depth": [{"layers": fewer(c.num_hidden_layers, keep)}],
             "width": [dict(zip(("width", "keys", "ffn"), found)) for found in sizes_kept(model, keep)]}[step.name]
    if not sizes or 0 in sizes[0].values():
        left = {"heads": "head", "depth": "layer", "width": "channel"}[step.name]
        raise UserError(f"{step.name}:{step.value} leaves no {left}: keep more")
    if method == "pca" and c.tie_word_embeddings:
        print("width: the embedding is the head too and cannot be rotated: channels are chosen by their activation")
        method = "activation"
    batches = made_of = None
    if method != "magnitude":
        batches, made_of = calibration(model, tokenizer, args)
    dtype, dense = model.dtype, model.float().requires_grad_(False)
    if step.name == "depth":
        changes = sum(torch.stack([1 - F.cosine_similarity(x, y, dim=1).mean() for x, y in zip(hidden, hidden[1:])])
                      for hidden in streams(dense, batches))
        scores = {"layers": changes[None]}
    else:
        dense = rotated(dense, batches) if method == "pca" else dense
        scores = importance(dense, batches)
        if method == "pca":                                      # its channels are sorted already
            scores["width"] = -torch.arange(c.hidden_size)[None]

    def pruned(sizes, batches):
        kept = {axis: scores[axis].topk(n).indices.sort().values for axis, n in sizes.items()}
        kept.update({axis: kept[axis][0] for axis in ("width", "layers") if axis in kept})       # one for all layers
        kept.update(head_channels(c, kept["keys"]) if "keys" in kept else {})
        small = cut(dense, kept)
        if batches:
            refit(small, dense, kept, batches)
        return small

    def loss(sizes):
        small = pruned(sizes, batches[:TRIED])
        return sum(train.cross_entropy(small, batch)[0] for batch in batches[:TRIED])

    def unequal(sizes):                                          # shares of width, heads and neurons that stay
        shares = [n / scores[axis].shape[1] for axis, n in sizes.items()]
        return max(shares) - min(shares)

    if batches and len(sizes) > 1:
        sizes = [min(tqdm(sizes, desc=step.name, unit="shape", dynamic_ncols=True, disable=None), key=loss)]
    small = pruned(min(sizes, key=unequal), batches)
    said = told(step, model, small, method)
    return small.to(dtype).requires_grad_(True), tokenizer, {
        **said, **({"calibration": made_of, "seed": args.seed} if batches else {})}


def vocab_step(model, tokenizer, step, args):
    """vocab. KEEP is the share of the ids that stays, those that the calibration data uses most."""
    source = calibration_data(model, tokenizer, args)
    if source.is_file():
        ids, name = tokenizer.encode_array(decoded(source.read_bytes(), f"--calibration {source}")), source.name
    else:
        meta = read_meta(source)
        ids, name = np.memmap(source / "train.bin", dtype=meta["dtype"], mode="r"), meta["name"]
    counts = sum(np.bincount(ids[i:i + 2 ** 24], minlength=tokenizer.vocab_size) for i in range(0, len(ids), 2 ** 24))
    kept, fewer_ids = cut_tokenizer(tokenizer, counts, fewer(model.config.vocab_size, float(step.value), 32))
    small = cut(model, {"vocab": kept})
    return small, fewer_ids, {**told(step, model, small, ""), "calibration": {"data": name, "tokens": len(ids)},
                              "tokenizer": fewer_ids.hash[:16]}


# ---------------------------------------------------------------------------------------------------------------------
# Quantization

def layers_to_quantize(model, bits, group, head_bits):
    """The layers to quantize as entries of model.compression: [{"module", "kind", ...spec}, ...].

    bits       8 (one scale for each row) or 4 (one for each `group` of a row): of the layers in the blocks
    head_bits  8, 4 or 16 (stays float): of the embedding and the head, the most sensitive and in a small model the
               largest matrices. Tied, they are one table
    Raises UserError if groups do not divide the rows of a layer, or if float16 cannot hold it.
    """
    entries = []
    for name, layer in model.named_modules():
        head = name in ("model.embed_tokens", "lm_head")
        its_bits = head_bits if head else bits
        if (not isinstance(layer, (nn.Linear, nn.Embedding)) or name == "model.embed_positions" or its_bits == 16
                or name == "lm_head" and model.config.tie_word_embeddings):
            continue
        spec = {"group": group} if its_bits == 4 else {}
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


def searched_scales(weight, importance, bits, group):
    """Scales, float16 (out, in / group), that cut off the largest weights of a group as far as that loses least.

    An outlier need not make the steps wide for all.

    weight (out, in); importance (in,): what a squared error in a column costs
    """
    best = None
    for share in torch.linspace(1.0, 0.5, 11).tolist():
        scales = absmax_scales(weight * share, bits, group)
        error = dequantized(rounded(weight, scales, bits), scales) - weight
        error = (error.square() * importance).unflatten(1, (-1, group)).sum(-1)                  # (out, in / group)
        if best is None:
            best, least = scales, error
        best, least = torch.where(error < least, scales, best), torch.minimum(least, error)
    return best


def damped_cholesky(hessian, name, typical=False):
    """Lower Cholesky factor of a Hessian (n, n) float64 with 1 % of its mean diagonal added to the diagonal, or ten
    times as much until there is one, which is then said of layer `name`.

    typical  of the geometric mean instead. A first token's few huge channels can make the mean a thousand times
             what is usual (SmolLM2-135M, layer 11), and its hundredth drowns the others
    """
    if not hessian.isfinite().all():
        raise UserError(f"the inputs of {name} are infinite or not numbers: the model cannot be calibrated")
    hessian, damping = hessian.clone(), 0.01
    mean, dead = hessian.diagonal().mean(), hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0              # an input that is always zero says nothing: it is rounded to nearest
    mean = hessian.diagonal().log().mean().exp() if typical else mean
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * torch.eye(len(hessian)).to(hessian))
        if not failed:
            return factor
        damping *= 10
        tqdm.write(f"{name}: too few inputs tell its columns apart; damping is {damping:.0%} of the mean diagonal")


def column_by_column(weight, factor, settle, drift=None, block=128):
    """The weight (out, in) float32 that settle() makes of one, chosen so that the layer's output changes little: one
    column after another gets its final values, and what it loses is made up for by those to come (Optimal Brain
    Surgeon: Hassibi and Stork, 1992). Rows of the upper Cholesky factor of the inverse Hessian say by how much.

    factor   the damped Cholesky factor of the Hessian (in, in) float64, the sum of x x^T over the inputs x of the layer
             in the compressed model
    drift    (out, in) float64, the sum of e x^T over the same inputs, e being what the output lacks of the dense
             model's: that too is made up for, as far as the inputs tell it (GPTAQ: Li et al., 2025,
             https://arxiv.org/abs/2504.02692)
    settle(i, columns, cost) gives the values of column i (out,). columns (in, out) are those of now, up to date from i
             to the end of its block, or at its beginning to the last; cost (in,): of a unit's error in each, squared
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
            final[i] = settle(i, columns, cost)
            errors[i - start] = (columns[i] - final[i]) / factor[i, i]
            columns[i + 1:end] -= factor[i, i + 1:end, None] * errors[i - start]
        columns[end:] -= factor[start:end, end:].T @ errors
    return final.T.contiguous()


def gptq(weight, hessian, bits, group, drift=None, name="a layer"):
    """(integers, scales) of a weight (out, in), chosen so that the layer's output changes little, where rounding to
    nearest changes the weight little (GPTQ: Frantar et al., 2022, https://arxiv.org/abs/2210.17323).
    The scales of a group are searched when its first column's turn has come. hessian and drift: see column_by_column.
    """
    importance, scales = hessian.diagonal().float(), []
    integers = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)

    def settle(i, columns, cost):
        if i % group == 0:
            scales.append(searched_scales(columns[i:i + group].T, importance[i:i + group], bits, group))
        integers[i] = rounded(columns[i, :, None], scales[-1], bits)[:, 0]
        return dequantized(integers[i, :, None], scales[-1])[:, 0]

    column_by_column(weight, damped_cholesky(hessian, name), settle, drift)
    return integers.T.contiguous(), torch.cat(scales, dim=1)


# In the order of the forward pass. A model without gates has a shorter third group.
SAME_INPUT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def by_group(block, x, rotary, mask):
    """Generator over one block's forward pass, for x (B, T, C).

    Before each group of linear layers in SAME_INPUT it yields (their input, the residual stream that their output is
    added to, or None); the caller may change their weights before it resumes. The last item is (block output, None).
    """
    h = block.input_layernorm(x)
    yield h, None
    h = block.self_attn.mix(h, rotary, mask)
    yield h, x
    x = x + block.self_attn.o_proj(h)
    h = block.post_attention_layernorm(x)
    yield h, None
    h = block.mlp.inner(h)
    yield h, x
    yield x + block.mlp.down_proj(h), None


def check_groups(model, batch):
    """Raises UserError if by_group does not compute what the blocks of this model compute."""
    x, rotary, masks = model.model.prepare(batch.ids[:1], segments=None if batch.segments is None else batch.segments[:1])
    block = model.model.layers[0]
    expected, found = block(x, rotary, masks[0]), list(by_group(block, x, rotary, masks[0]))[-1][0]
    if not (found - expected).norm() <= 1e-3 * expected.norm():
        raise UserError("by_group in compress.py does not compute what Block.forward in model.py computes, so this "
                        "step would calibrate another model: bring the two in line")


def table_hessian(model, batches):
    """What errors in the rows of the embedding cost, (C, C) float64. Its inputs are one-hot and tell nothing of its
    channels, so it is the sum of g g^T over the gradients g of the loss by its output: the Fisher matrix. A table that
    is the head too also multiplies the final hidden states h, for which h h^T is added.
    """
    total = 0.0
    for g, h in stream_gradients(model, batches):
        total = total + (g.T @ g).double()
        if model.config.tie_word_embeddings:
            total = total + (h.T @ h).double()
    return total


def stream_gradients(model, batches):
    """Goes backward through the model from the loss of one window of text after another. Yields (its gradient by the
    embedding's output, the final hidden states), (T, C) each."""
    model.model.embed_tokens.weight.requires_grad_(True)
    one_by_one = (Batch(*(None if t is None else t[i:i + 1] for t in batch)) for batch in batches
                  for i in range(len(batch.ids)))                # the backward pass needs all blocks' activations
    for ids, targets, segments in one_by_one:
        hidden = []
        with torch.enable_grad():
            x = model.model(ids, segments=segments, hidden=hidden).flatten(0, 1)                         # (T, C)
            loss = F.cross_entropy(model.lm_head(x).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        yield torch.autograd.grad(loss, hidden[0])[0].flatten(0, 1), x.detach()


def dense_weight(layer):
    return layer.dense() if isinstance(layer, LowRankLinear) else layer.weight


@torch.no_grad()
def in_order(model, todo, batches, treat, name, drifts=True):
    """Compresses layers in the order of the forward pass, each for the inputs that it gets from those already
    compressed. One block runs at a time: of all `batches` only the hidden states before it are kept, dense and
    compressed.

    todo   names of dense layers; of a low-rank layer, of the two in it
    treat(parts, names, hessian, drift) is given layers with the same input, the sums of column_by_column over all of
           them as one, and puts the weights that the pass goes on with into them. It returns {name: layer} of those
           that are another kind of layer from now on, with `todo` as their entries
    drifts False: no dense model runs beside, drift is None and the time is half
    """
    body, config, dtype, device = model.model, model.config, model.dtype, model.model.norm.weight.device
    bar = tqdm(total=len(todo), desc=name, unit="layer", dynamic_ncols=True, disable=None)
    batches = [Batch(*(None if t is None else t.to(device) for t in batch)) for batch in batches]
    model.float().requires_grad_(False)

    def treated(parts, names, hessian, drift=None):
        bar.update(len(names))
        return treat(parts, names, hessian, drift)

    check_groups(model, batches[0])
    theirs = [model.model.prepare(batch.ids, segments=batch.segments)[0] for batch in batches]
    if "model.embed_tokens" in todo:
        read = todo["model.embed_tokens"]["kind"] == "int4"                       # int8 is rounded to nearest
        hessian = table_hessian(model, batches[:2]) if read else None
        found = treated([body.embed_tokens], ["model.embed_tokens"], hessian)
        model.replace(todo["model.embed_tokens"], found["model.embed_tokens"])
    ours, rotaries, masks = zip(*(model.model.prepare(batch.ids, segments=batch.segments) for batch in batches))
    for i, block in enumerate(body.layers):
        dense, layers = copy.deepcopy(block) if drifts else block, {}
        dense_flows = [by_group(dense, x, rotary, mask[i]) for x, rotary, mask in zip(theirs, rotaries, masks)]
        flows = [by_group(block, x, rotary, mask[i]) for x, rotary, mask in zip(ours, rotaries, masks)]
        for group in SAME_INPUT:
            parts = {f"model.layers.{i}.{name}": block.get_submodule(name) for name in group
                     if name != "mlp.gate_proj" or config.gated}
            weights, hessian, drift = [dense_weight(part) for part in parts.values()], 0.0, 0.0
            weight = torch.cat(weights)                                                                  # (out, in)
            for batch, dense_flow, flow in zip(batches, dense_flows, flows):
                x, residual = next(flow)
                x = tokens(x, batch)
                hessian = hessian + (x.T @ x).double()
                if drifts:
                    d, d_residual = next(dense_flow)
                    lacking = tokens(d, batch) - x                                                       # (N, in)
                    if residual is not None:                     # what the stream lacks already is made up for too
                        lacking = lacking @ weight.T + tokens(d_residual - residual, batch)              # (N, out)
                    drift = drift + (lacking.T @ x).double()
            if drifts and residual is None:
                drift = weight.double() @ drift
            its_drift = dict(zip(parts, drift.split([len(w) for w in weights]))) if drifts else dict.fromkeys(parts)
            if names := [name for name in parts if name in todo]:
                drift = torch.cat([its_drift[name] for name in names]) if drifts else None
                layers.update(treated([parts[name] for name in names], names, hessian, drift))
            for name, weight in zip(parts, weights):
                if f"{name}.down" in todo:                       # its input is known, and so is that of `up`
                    down, up, drift = parts[name].down, parts[name].up, its_drift[name]
                    layers.update(treated([down], [f"{name}.down"], hessian))
                    inner = down.weight.double()
                    if drifts:
                        drift = (drift + (weight.double() - up.weight.double() @ inner) @ hessian) @ inner.T
                    layers.update(treated([up], [f"{name}.up"], inner @ hessian @ inner.T, drift))
        ours = [next(flow)[0] for flow in flows]
        theirs = [next(flow)[0] for flow in dense_flows] if drifts else theirs
        for name, layer in layers.items():
            model.replace(todo[name], layer)
    if "lm_head" in todo:
        finals = [tokens(body.norm(x), batch) for x, batch in zip(ours, batches)]
        hessian = sum((x.T @ x).double() for x in finals)         # with what it lacks made up for it was no better
        model.replace(todo["lm_head"], treated([model.lm_head], ["lm_head"], hessian)["lm_head"])
    bar.close()
    model.to(dtype).requires_grad_(True)


def gptq_model(model, entries, batches):
    """Replaces the layers that `entries` name by ones rounded by gptq(), in_order()."""
    todo = {entry["module"]: entry for entry in entries}

    def quantize(parts, names, hessian, drift):
        """{name: layer} of dense `parts` with the same input, which are rounded as one matrix."""
        entries, rows = [todo[name] for name in names], [len(part.weight) for part in parts]
        if entries[0]["kind"] == "int8":                          # of the head: nothing left to gain
            return {name: LAYERS["int8"].from_dense(part) for name, part in zip(names, parts)}
        spec = {k: v for k, v in entries[0].items() if k not in ("module", "kind")}
        found = gptq(torch.cat([part.weight for part in parts]), hessian, 4, **spec, drift=drift, name=names[0])
        layers = {name: LAYERS["int4"].from_integers(integers, scales, getattr(part, "bias", None))
                  for name, part, integers, scales in zip(names, parts, *(t.split(rows) for t in found))}
        for part, layer in zip(parts, layers.values()):
            part.weight = nn.Parameter(layer.dense(), requires_grad=False)
        return layers

    in_order(model, todo, batches, quantize, "gptq")


def quantize_step(model, tokenizer, step, args):
    """int8, int4:GROUP, by the method that is written."""
    bits, group = int(step.name[3:]), int(step.value or 32)
    head_bits = args.head_bits or bits
    entries = layers_to_quantize(model, bits, group, head_bits)
    said = {"step": step.name, **({"group": group} if bits == 4 else {}), "method": step.method or "rtn",
            "head_bits": head_bits}
    if step.method == "gptq":
        batches, made_of = calibration(model, tokenizer, args)
        gptq_model(model, entries, batches)
        return model, tokenizer, {**said, "calibration": made_of, "seed": args.seed}
    if step.method == "qat":
        model, said = quantization_aware_training(model, tokenizer, step, entries, said, args)
    round_to_nearest(model, entries)
    return model, tokenizer, said


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
    return dequantize(model), tokenizer, {"step": step.name}


def gguf_step(model, tokenizer, step, args):
    """gguf:TYPE: write_gguf to --out."""
    write_gguf(model, tokenizer, step.value, Path(args.out), Path(args.model).resolve().name)
    return model, tokenizer, {"step": step.name}


# ---------------------------------------------------------------------------------------------------------------------
# Unstructured pruning: zeros in dense weights, which no kernel here skips. The mask of a layer is where it is not zero

def body_layers(model):
    """{name: layer} of the dense layers in the blocks; of those of low rank, the two factors."""
    return {name: layer for name, layer in model.named_modules()
            if name.startswith("model.layers.") and isinstance(layer, nn.Linear)}


def highest(scores, keep):
    """Where scores (out, in) are among the highest of their row, of which the share `keep` stays, or "2of4": among the
    two highest of four neighbours."""
    if keep == "2of4":
        return highest(scores.unflatten(-1, (-1, 4)), 0.5).flatten(-2)
    count = max(1, round(float(keep) * scores.shape[-1]))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)


def wanda(weight, hessian, keep):
    """A weight (out, in) with only those left that are |w| x the norm of their input among the highest of their row
    (Sun et al., 2023, https://arxiv.org/abs/2306.11695)."""
    return weight * highest(weight.abs() * hessian.diagonal().sqrt().to(weight), keep)


def sparsegpt(weight, hessian, keep, drift=None, name="a layer", block=128):
    """A weight (out, in) with zeros in it, chosen and made up for by column_by_column (SparseGPT: Frantar and Alistarh,
    2023, https://arxiv.org/abs/2301.00774). A row's zeros are chosen anew for each block, among all columns to come."""
    mask, factor = torch.ones_like(weight, dtype=torch.bool), damped_cholesky(hessian, name, typical=True)

    def settle(i, columns, cost):
        if keep == "2of4" and i % 4 == 0:
            mask[:, i:i + 4] = highest((columns[i:i + 4].square() * cost[i:i + 4, None]).T, keep)
        elif keep != "2of4" and i % block == 0:
            scores = (columns.square() * cost[:, None]).T
            scores[:, :i] = torch.where(mask[:, :i], math.inf, -1.0)                     # these are settled
            mask[:] = highest(scores, keep)
        return columns[i] * mask[:, i]

    found = column_by_column(weight, factor, settle, drift, block)
    return least_squares(found, mask, weight.detach(), factor @ factor.T, drift)


def least_squares(weight, mask, dense, hessian, drift=None, steps=15):
    """A weight (out, in) changed where `mask` lets it towards the least error of its outputs: column_by_column gives no
    column a second look, and this takes a fifth off the loss that is left. By conjugate gradients, each row its own;
    they come near in a few steps, as Boza's do (2024, https://arxiv.org/abs/2401.02938)."""
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
    """sparse:KEEP, by the method that is written."""
    layers = body_layers(model)
    said = {"step": step.name, "keep": step.value, "method": step.method}
    wide = next((name for name, layer in layers.items() if step.value == "2of4" and layer.in_features % 4), None)
    if wide:
        raise UserError(f"sparse:2of4: rows of {layers[wide].in_features} ({wide}) do not divide into groups of four")

    def prune(parts, names, hessian, drift):
        weight = torch.cat([part.weight for part in parts])
        if step.method == "wanda":
            weight = wanda(weight, hessian, step.value)
        else:
            weight = sparsegpt(weight, hessian, step.value, drift, names[0])
        for part, rows in zip(parts, weight.split([part.out_features for part in parts])):
            part.weight = nn.Parameter(rows.clone())
        return {}

    if step.method == "magnitude":
        for layer in layers.values():
            weight = layer.weight.detach()
            layer.weight = nn.Parameter(weight * highest(weight.abs(), step.value))
        return model, tokenizer, said
    batches, made_of = calibration(model, tokenizer, args)
    in_order(model, layers, batches, prune, step.method, drifts=step.method == "sparsegpt")
    return model, tokenizer, {**said, "calibration": made_of, "seed": args.seed}


# ---------------------------------------------------------------------------------------------------------------------
# Recovery: a short training after what has cost quality


def recover_step(model, tokenizer, step, args):
    """recover:STEPS of four windows. The loss is that of distill.py, taught by the model that entered the chain; by the
    method text, and where the two have other ids, cross-entropy.

    A model of the standard library with 1.239 bits per byte, 1.276 when cut to 74 % of its parameters, had 1.260 after
    95 steps, 5 % of its training, with a quarter of the weight on the text; 1.261 by the teacher alone, 1.264 with
    half, 1.272 by the text alone. Muon at a tenth of train.py's rates was as good as AdamW at 0.001; more was worse.
    """
    taught = step.method == "taught"
    if taught and Tokenizer.load(whole(args.model)).hash != tokenizer.hash:
        print("recover: the model that entered the chain has another vocabulary and cannot teach: text alone does")
        taught = False

    def loss_of(cfg, device):
        if not taught:
            return train.cross_entropy
        teacher = accelerate(load(args.model, device, torch.float32), args.native)
        return distill.Distillation(teacher, model, (), tokenizer.vocab_size, cfg)

    steps, said = int(step.value), {"step": step.name, "method": "taught" if taught else "text"}
    model, said = fine_tune(model, tokenizer, step, said, args, loss_of, min(6, steps) if args.smoke else steps,
                            after_step=zeros_kept(model), batch_size=4, evals=1, warmup=5)
    return model, tokenizer, said


# ---------------------------------------------------------------------------------------------------------------------
# Low rank

def low_rank(weight, rank, factor=None):
    """(up (out, rank), down (rank, in)) float32, whose product is nearest to a weight (out, in) by the squares of its
    errors; or, with the lower Cholesky factor (in, in) of a Hessian, of its outputs' (SVD-LLM: Wang et al., 2024,
    https://arxiv.org/abs/2403.07378). Then the squares of the singular values left out add up to that error."""
    weight = weight.double()
    u, values, v = torch.linalg.svd((weight if factor is None else weight @ factor).float(), full_matrices=False)
    root = values[:rank].sqrt()                                  # both factors get the same scale
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    if factor is not None:
        down = torch.linalg.solve_triangular(factor, down.double(), upper=False, left=False).float()
    return up, down


def rank_choices(layer):
    """[(parameters, rank or None: dense), ...] of what may stand for a layer: two factors at each multiple of 32, which
    int4 needs, that has fewer parameters."""
    n_in, n_out = layer.in_features, layer.out_features
    return [(n_in * n_out, None)] + [(rank * (n_in + n_out), rank) for rank in range(32, min(n_in, n_out), 32)
                                     if rank * (n_in + n_out) < n_in * n_out]


def even_ranks(layers, keep):
    """{name: rank} at which each layer has nearest to the share `keep` of its parameters; what stays dense left out."""
    found = {name: min(rank_choices(layer), key=lambda choice: abs(choice[0] - keep * layer.weight.numel()))
             for name, layer in layers.items()}
    return {name: rank for name, (_, rank) in found.items() if rank}


def best_ranks(model, layers, keep, batches):
    """{name: rank} by which `layers` have the share `keep` of their parameters together and the loss grows least; what
    stays dense left out.

    What a rank costs is taken to be the squared error of the layer's outputs (low_rank) times the mean square of the
    loss's gradients by them: the Fisher information, as if it were the same in all directions. For the layers of one
    model that differs a hundredfold, which errors relative to the outputs do not tell.
    """
    gradients, errors = dict.fromkeys(layers, 0.0), {}

    def note(name, gradient):
        gradients[name] += float(gradient.double().square().mean())

    hooks = [layer.register_full_backward_hook(lambda _, __, grads, name=name: note(name, grads[0]))
             for name, layer in layers.items()]
    for _ in stream_gradients(model, batches):
        pass
    for hook in hooks:
        hook.remove()

    def look(parts, names, hessian, drift):
        factor = damped_cholesky(hessian, names[0], typical=True)
        for part, name in zip(parts, names):
            values = torch.linalg.svdvals((part.weight.double() @ factor).float()).double()
            errors[name] = gradients[name] * values.square().flip(0).cumsum(0).flip(0)           # [r]: of rank r
        return {}

    in_order(model, layers, batches, look, "ranks", drifts=False)
    choices = {name: [(size, float(errors[name][rank]) if rank else 0.0, rank) for size, rank in rank_choices(layer)]
               for name, layer in layers.items()}
    budget, low, high = keep * sum(layer.weight.numel() for layer in layers.values()), 1e-30, 1e30

    def bought(price):
        return {name: min(each, key=lambda choice: choice[1] + price * choice[0]) for name, each in choices.items()}

    for _ in range(100):                                         # the price of a parameter at which the budget is spent
        price = math.sqrt(low * high)
        over = sum(size for size, _, _ in bought(price).values()) > budget
        low, high = (price, high) if over else (low, price)
    return {name: rank for name, (_, _, rank) in bought(high).items() if rank}


def lowrank_step(model, tokenizer, step, args):
    """lowrank:KEEP, by the method that is written."""
    layers, keep, said = body_layers(model), float(step.value), {}
    total = sum(layer.weight.numel() for layer in layers.values())
    if step.method != "svd":
        batches, made_of = calibration(model, tokenizer, args)
        said = {"calibration": made_of, "seed": args.seed}
    ranks = best_ranks(model, layers, keep, batches[:2]) if step.method == "allocated" else even_ranks(layers, keep)
    if not ranks:
        raise UserError(f"lowrank:{step.value}: two factors of rank 32, 64, ... have that share of no layer's "
                        "parameters in this model: give a lower one, or leave lowrank out")
    entries = {name: {"module": name, "kind": "lowrank", "rank": rank} for name, rank in ranks.items()}

    def factorize(parts, names, hessian, drift):
        factor, found = damped_cholesky(hessian, names[0], typical=True), {}
        for part, name, lacking in zip(parts, names, drift.split([part.out_features for part in parts])):
            weight = part.weight + torch.cholesky_solve(lacking.T, factor).T.float()      # as in column_by_column
            up, down = low_rank(weight, ranks[name], factor)
            part.weight, found[name] = nn.Parameter(up @ down), LowRankLinear.from_factors(up, down, part.bias)
        return found

    if step.method == "svd":
        for name, entry in entries.items():
            up, down = (t.to(model.dtype) for t in low_rank(layers[name].weight.detach(), ranks[name]))
            model.replace(entry, LowRankLinear.from_factors(up, down, layers[name].bias))
    else:
        in_order(model, entries, batches, factorize, "lowrank")
    share = sum(layer.weight.numel() for layer in body_layers(model).values()) / total
    print(f"lowrank: {len(ranks)} of {len(layers)} layers have ranks of {min(ranks.values())} to "
          f"{max(ranks.values())}, {share:.1%} of the blocks' weights stay")
    return model, tokenizer, {"step": step.name, "keep": keep, "method": step.method, "share": share, **said}


# ---------------------------------------------------------------------------------------------------------------------
# Chains of steps


def make(steps, args, stages, out=None):
    """(model, tokenizer) that `steps` make of args.model. Each stage is saved in directory `stages` under the name of
    the chain so far (the last in `out` if there is one), and those that are there already are not made again."""
    places = [settle(stages / chain_name(steps[:n]), MODEL) for n in range(1, len(steps) + 1)]
    done = next((n for n in range(len(places) - bool(out), 0, -1) if (places[n - 1] / "config.json").is_file()), 0)
    source = places[done - 1] if done else whole(args.model)
    parent = {} if done else {"parent": {"name": model_name(source), "sha256": checkpoint_hash(source)}}
    model, tokenizer = accelerate(load(source), args.native), Tokenizer.load(source)
    for n, step in enumerate(steps[done:], done + 1):
        args.run = str(places[n - 1]) + ".run"                   # of a step that trains, until its stage is saved
        model, tokenizer, entry = STEPS[step.name].function(model, tokenizer, step, args)
        model.history, parent = model.history + [{**entry, **parent}], {}
        if step.name != "gguf":
            place = out if out and n == len(steps) else places[n - 1]
            save(model, place, tokenizer)
            model = accelerate(load(place), args.native)         # what a resumed chain goes on from
        shutil.rmtree(args.run, ignore_errors=True)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Measure: `--measure` compares finished models by sample.measure, on one text, and writes the report


# ---------------------------------------------------------------------------------------------------------------------
# The command

# Methods that look at windows of text
STEPS = {
    **dict.fromkeys(("ffn", "heads"), Form(structured_step, ("KEEP",), methods=("activation", "magnitude"),
                                           text=("activation",))),
    "width": Form(structured_step, ("KEEP",), methods=("pca", "activation", "magnitude"), text=("pca", "activation")),
    "depth": Form(structured_step, ("KEEP",), methods=("influence",), text=("influence",)),
    "vocab": Form(vocab_step, ("KEEP",), text=("",)),
    "lowrank": Form(lowrank_step, ("KEEP",), methods=("allocated", "whitened", "svd"), text=("allocated", "whitened")),
    "sparse": Form(sparse_step, ("KEEP", "2of4"), methods=("sparsegpt", "wanda", "magnitude"),
                   text=("sparsegpt", "wanda")),
    "recover": Form(recover_step, ("STEPS",), methods=("taught", "text"), trains=("taught", "text")),
    "int8": Form(quantize_step, methods=("", "qat"), trains=("qat",)),
    "int4": Form(quantize_step, ("32", "64", "128"), "32", ("rtn", "gptq", "qat"), text=("gptq",), trains=("qat",)),
    "dequantize": Form(dequantize_step),
    "gguf": Form(gguf_step, GGUF_TYPES),
}


def compress_arguments(argv):
    parser = Parser(description=__doc__)
    parser.usage = ("compress.py MODEL STEP [STEP ...] --out DIR [flags]\n"
                    "       compress.py --measure DIR [DIR ...] [--out DIR] [flags]\n"
                    "       compress.py MODEL --sweep [CHAIN ...] --out DIR [flags]")
    parser.add_argument("model", nargs="?", help="a model directory, or a training run's")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="name[:value][:method], see above")
    parser.add_argument("--out", help="what is written: a model directory, or the file of gguf; with --measure, where "
                        "it may be left out, a directory for results.jsonl, report.md and tradeoff.png")
    parser.add_argument("--head-bits", type=int, choices=(4, 8, 16), help="bits of the embedding and the output head; "
                        "16: they stay float (default: those of the step that quantizes)")
    parser.add_argument("--calibration", metavar="NAME_OR_DIR_OR_FILE", help="what steps look at: the training split "
                        "of prepared data or, for those that do not train, a text file (default: what the model was "
                        "trained on)")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of at most 256 tokens each, that "
                        "steps look at (default: 128)")
    parser.add_argument("--qat-steps", type=int, default=300, help="of training for qat, 8 windows each (default: 300)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of recover and qat, AdamW's "
                        "(default: 0.001, a third of train.py's for matrices)")
    parser.add_argument("--resume", action="store_true", help="go on with a chain or a sweep that was stopped, same "
                        "flags")
    parser.add_argument("--seed", type=int, default=0, help="by which windows are drawn (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--smoke", action="store_true", help="a short run: few tokens, windows, steps and rounds")
    group = parser.add_argument_group("measuring")
    group.add_argument("--measure", nargs="+", metavar="DIR", help="compare finished models in size, quality and "
                       "speed; the first is the baseline")
    group.add_argument("--sweep", nargs="*", metavar="CHAIN", help="make and measure a set of chains, each in quotes, "
                       "stage by stage; none: a set that shows what each kind of step costs and gains. --out: a "
                       "directory for all of it")
    group.add_argument("--escalate", action="store_true", help="with --measure SMALL BIG: also both together, the "
                       "large one for the 10, 25 and 50 %% of the tokens that the small one is least sure of")
    group.add_argument("--data", metavar="NAME_OR_DIR", help="score this prepared data's validation split (default: of "
                       "the data that the first model was trained on)")
    group.add_argument("--text", metavar="FILE", help="score this text instead, or the responses of this .jsonl")
    for flag, help in (
            ("eval", "score about so many: of data spread over the split, of a text the first (default: all)"),
            ("prompt", "length of the prompt whose prefill is timed (default: 256, or what the window leaves)"),
            ("new", "how many are timed when decoding (default: 64, or a quarter of the smallest window)")):
        group.add_argument(f"--{flag}-tokens", type=int, metavar="N", default=0, help=help)
    group.add_argument("--rounds", type=int, metavar="N", default=5, help="how often each model is timed (default: 5)")
    group.add_argument("--threads", type=int, metavar="N", default=0, help="of the CPU (default: torch's choice)")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="to measure on")
    parser.add_argument("--native", action=argparse.BooleanOptionalAction, default=True,
                        help="kernels in C on a CPU; --no-native: PyTorch alone")
    args = parser.parse_args(argv)
    if args.measure:
        if args.model or args.head_bits or args.sweep is not None:
            raise UserError("--measure compares finished models and takes no steps: first compress.py MODEL STEP ... "
                            "--out DIR, then compress.py --measure MODEL DIR")
        for name in ("calibration", "calibration_windows", "qat_steps", "lr", "resume", "seed"):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} belongs to a step, and --measure takes none")
    if args.escalate and not args.measure:
        raise UserError("--escalate belongs to --measure SMALL BIG")
    if args.measure or args.sweep is not None:
        if args.data and args.text:
            raise UserError("--data and --text are two things to score: give one of them")
        for name, least in (("eval_tokens", 0), ("prompt_tokens", 0), ("new_tokens", 0), ("rounds", 1), ("threads", 0)):
            if getattr(args, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
        if args.smoke:
            args.eval_tokens, args.prompt_tokens, args.new_tokens, args.rounds = 1024, 16, 8, 2
    if args.measure:
        return args
    if args.sweep is not None:
        if args.steps or not args.model or not args.out:
            raise UserError("--sweep is written compress.py MODEL --sweep --out DIR, or with chains of your own, each "
                            "in quotes: compress.py MODEL --sweep \"width:0.75 recover:95\" int8 --out DIR")
        return args
    if not args.steps:
        raise UserError("give a model and at least one step (compress.py MODEL int8 --out DIR), or models to compare "
                        "(compress.py --measure DIR DIR); see compress.py --help")
    if not args.out:
        raise UserError("--out is missing: the model directory, or the file of gguf, to write")
    for name in MEASURING:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --measure DIR [DIR ...] and --sweep")
    return args


def main(argv=None):
    args = compress_arguments(argv)
    command = "python compress.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    if args.measure or args.sweep is not None:
        from data import measure                                # here, as measure imports this script
        return (measure.measure_command if args.measure else measure.sweep_command)(args, command)
    steps = parse_chain(args.steps, STEPS)                             # all that can be refused is refused before any work
    out = Path(args.out) if Path(args.out).name else Path(args.out).resolve()      # "." has no name to write beside
    args.out, directory, to_file = str(out), whole(args.model), steps[-1].name == "gguf"
    stages, kept = out.with_name(out.name + ".stages"), len(steps) > 1 or needs_text(steps)
    if args.resume and is_made(out, steps, directory):           # a kill left the stages beside it
        remove_tree(stages)
        return print(f"{out} is made already, by this chain from this model")
    check_chain_out(out, directory, to_file, args.overwrite)
    check_flags(args, steps)
    check_order(steps, load(directory))
    if to_file:
        import_gguf()
    if kept:
        open_stages(stages, args)
    with told_how_to_go_on(stages):
        model, _ = make(steps, args, stages, out)
    if not to_file:
        parameters, resident = model.parameters_count(), model.resident_bytes()
        print(f"{out}: {parameters:,} parameters; {(out / 'model.safetensors').stat().st_size / 1e6:,.1f} MB on disk, "
              f"{resident / 1e6:,.1f} MB in memory: {8 * resident / parameters:.2f} bits per weight, scales and all")
    del model
    if kept:
        remove_tree(stages)


if __name__ == "__main__":
    run(main)
