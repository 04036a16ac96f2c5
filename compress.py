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
        text    by cross-entropy. --recover-control also says what the same does to the model that entered the chain
    int8[:qat]                 weights become 8-bit integers, one scale for each row
    int4[:32|64|128][:rtn|gptq|qat]        4-bit integers, one scale for each group of 32 (or 64, 128) in a row. With
                               --asymmetric an offset too: better, for half a bit a weight (groups of 32)
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
import collections, contextlib, copy, difflib, hashlib, heapq, itertools, json, math, os, platform, re, shlex, shutil
import sys, time, types, typing
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import distill, sample, train
from data import (MODEL, REPORT, Parser, UserError, heldout, refuse_foreign, remove_tree, replacing_file, run, settle,
                  write_json)
from data.export import GGUF_STORED, GGUF_TYPES, import_gguf, write_gguf
from data.loader import IGNORE, Batch, Windows, read_meta
from data.prepare import encode_example, find
from data.tokenizer import Tokenizer
from data.tokenizer import pairs as merge_pairs
from model import (FAMILIES, LAYERS, SIZES, LowRankLinear, QuantLinear, Transformer, absmax_scales,
                   checkpoint_hash, dequantized, load, minmax_grid, model_name, read_config, read_json, rounded,
                   save, whole)


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
        known = trained_on(model.history, args.smoke, "the model", "give --calibration, prepared data or a text file")
        same = read_meta(known)["tokenizer_hash"] == tokenizer.hash            # not after the step vocab
        return known if same else in_ids_of(tokenizer, known, Path(args.run) / "data")
    if Path(args.calibration).is_file():
        return Path(args.calibration)
    directory = find(args.calibration, args.smoke, "--calibration")
    if directory is None:
        raise UserError(f"--calibration {args.calibration} is not prepared yet: python data/prepare.py "
                        f"{args.calibration}, or name a text file")
    if read_meta(directory)["tokenizer_hash"] != tokenizer.hash:
        if any(entry["step"] == "vocab" for entry in model.history):
            return in_ids_of(tokenizer, directory, Path(args.run) / "data")
        raise UserError(f"--calibration {args.calibration} was prepared with another tokenizer than the model's: "
                        f"prepare it with data/prepare.py --tokenizer {args.model}, or name a text file")
    return directory


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

    theirs, rotaries = zip(*(start(dense, batch)[:2] for batch in batches))
    ours = [taken(x, kept, -1, "width", 0) for x in theirs]
    for i, dense_block in enumerate(dense.model.layers):
        if i not in layers:                                       # cut out: from here on the stream lacks what it adds
            theirs = [dense_block(*state, None) for state in zip(theirs, rotaries, masks(dense, i, batches))]
            continue
        block = small.model.layers[layers.index(i)]
        flows = [(halts(dense_block, d, rotary, mask), halts(block, x, rotary, mask))
                 for d, x, rotary, mask in zip(theirs, ours, rotaries, masks(dense, i, batches))]
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


def cut_tokenizer(tokenizer, counts, size):
    """(ids that stay (n,), the Tokenizer of n ids that they become), by how often each id is used.

    One id goes after another until `size` are left: of those that no merge builds on the least used one, and its uses
    become uses of the two that it is built from. Bytes and added tokens stay. Raises UserError if those are more.
    """
    data = copy.deepcopy(tokenizer.data)
    bpe, added, counts = data["model"], {t["content"] for t in data.get("added_tokens") or []}, counts.tolist()
    if "merges" not in bpe or (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise UserError("vocab: the tokenizer is not a byte-level BPE, and of others no id can be left out")
    vocab, made, builds, gone = bpe["vocab"], collections.defaultdict(list), collections.Counter(), set()
    for pair in map(tuple, merge_pairs(bpe)):
        made["".join(pair)].append(pair)
        builds.update(pair)
    leaves = [(counts[i], -i, t) for t, i in vocab.items() if not builds[t] and len(t) > 1 and t not in added]
    heapq.heapify(leaves)
    for _ in range(len(vocab.keys() | added) - size):
        if not leaves:
            raise UserError(f"vocab: {size} ids are fewer than the bytes and special tokens, which stay: keep more")
        count, _, token = heapq.heappop(leaves)
        gone.add(token)
        for pair in made[token]:
            for part in pair:
                builds[part] -= 1
                counts[vocab[part]] += count if pair is made[token][0] else 0
                if not builds[part] and len(part) > 1 and part not in added:
                    heapq.heappush(leaves, (counts[vocab[part]], -vocab[part], part))
    kept = sorted({i for t, i in vocab.items() if t not in gone} | {t["id"] for t in data.get("added_tokens") or []})
    new = {old: i for i, old in enumerate(kept)}
    bpe.update(vocab={t: new[i] for t, i in vocab.items() if t not in gone},
               merges=[pair for pair in merge_pairs(bpe) if "".join(pair) not in gone])
    for token in data.get("added_tokens") or []:
        token["id"] = new[token["id"]]
    post = data.get("post_processor") or {}
    for token in (t for p in post.get("processors", [post]) for t in (p.get("special_tokens") or {}).values()):
        token["ids"] = [new[i] for i in token["ids"]]
    return torch.tensor(kept), Tokenizer(data, tokenizer.config, [new[i] for i in tokenizer.eos_ids])


def vocab_step(model, tokenizer, step, args):
    """vocab. KEEP is the share of the ids that stays, those that the calibration data uses most."""
    source = calibration_data(model, tokenizer, args)
    if source.is_file():
        ids, name = tokenizer.encode_array(sample.decoded(source.read_bytes(), f"--calibration {source}")), source.name
    else:
        meta = read_meta(source)
        ids, name = np.memmap(source / "train.bin", dtype=meta["dtype"], mode="r"), meta["name"]
    counts = sum(np.bincount(ids[i:i + 2 ** 24], minlength=tokenizer.vocab_size) for i in range(0, len(ids), 2 ** 24))
    kept, fewer_ids = cut_tokenizer(tokenizer, counts, fewer(model.config.vocab_size, float(step.value), 32))
    small = cut(model, {"vocab": kept})
    return small, fewer_ids, {**told(step, model, small, ""), "calibration": {"data": name, "tokens": len(ids)},
                              "tokenizer": fewer_ids.hash[:16]}


def in_ids_of(tokenizer, directory, place):
    """Prepared data of another tokenizer, decoded and encoded again with this one, in directory `place`."""
    meta = read_meta(directory)
    if meta["kind"] != "text":
        raise UserError(f"{meta['name']} holds prompts and responses in ids from before vocab: put vocab last, or give "
                        "--calibration FILE")
    if not (place / "meta.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            ids = np.memmap(directory / f"{split}.bin", dtype=meta["dtype"], mode="r")
            ids = np.array(reencoded(ids, Tokenizer.load(directory), tokenizer), meta["dtype"])
            ids.tofile(place / f"{split}.bin")
            meta["splits"][split] = {**meta["splits"][split], "tokens": len(ids)}
        write_json(place / "meta.json", {**meta, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size})
    return place


# ---------------------------------------------------------------------------------------------------------------------
# Quantization

def plan(model, bits, group, head_bits, asymmetric=False):
    """The layers to quantize as entries of model.compression: [{"module", "kind", ...spec}, ...].

    bits       8 (one scale for each row) or 4 (one for each `group` of a row): of the layers in the blocks
    head_bits  8, 4 or 16 (stays float): of the embedding and the head, the most sensitive and in a small model the
               largest matrices. Tied, they are one table
    asymmetric of the layers with 4 bits: each group has an offset too
    Raises UserError if groups do not divide the rows of a layer, or if float16 cannot hold it.
    """
    entries = []
    for name, layer in model.named_modules():
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


def gptq(weight, hessian, bits, group, asymmetric=False, drift=None, name="a layer"):
    """(integers, scales, offsets or None) of a weight (out, in), chosen so that the layer's output changes little,
    where rounding to nearest changes the weight little (GPTQ: Frantar et al., 2022, https://arxiv.org/abs/2210.17323).
    A group's grid is searched when its first column's turn has come. hessian and drift: see column_by_column.
    """
    importance, grids = hessian.diagonal().float(), []
    integers = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)

    def settle(i, columns, cost):
        if i % group == 0:
            grids.append(searched_grid(columns[i:i + group].T, importance[i:i + group], bits, group, asymmetric))
        integers[i] = rounded(columns[i, :, None], grids[-1][0], bits, *grids[-1][1:])[:, 0]
        return dequantized(integers[i, :, None], *grids[-1])[:, 0]

    column_by_column(weight, damped_cholesky(hessian, name), settle, drift)
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


def start(model, batch):
    """What the first block is called with for a batch: (x, rotary, mask, cache)."""
    return first_call(model.model.layers[0], lambda: model.model(batch.ids, segments=batch.segments))


def masks(model, layer, batches):
    """The attention mask that a block is called with, for each batch."""
    window = model.config.window(layer)
    return [model.model.mask(batch.ids.shape[1], 0, window, batch.segments) for batch in batches]


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

    theirs = [start(model, batch)[0] for batch in batches]
    if "model.embed_tokens" in todo:
        read = todo["model.embed_tokens"]["kind"] == "int4"                       # int8 is rounded to nearest
        hessian = table_hessian(model, batches[:2]) if read else None
        found = treated([body.embed_tokens], ["model.embed_tokens"], hessian)
        model.replace(todo["model.embed_tokens"], found["model.embed_tokens"])
    ours, rotaries = zip(*(start(model, batch)[:2] for batch in batches))
    for i, block in enumerate(body.layers):
        its_masks = masks(model, i, batches)
        dense, layers = copy.deepcopy(block) if drifts else block, {}
        dense_flows = [halts(dense, *state) for state in zip(theirs, rotaries, its_masks)]
        flows = [halts(block, *state) for state in zip(ours, rotaries, its_masks)]
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
        found = zip(*([None] * len(rows) if t is None else t.split(rows) for t in found))
        layers = {name: LAYERS["int4"].from_integers(integers, scales, getattr(part, "bias", None), offsets)
                  for name, part, (integers, scales, offsets) in zip(names, parts, found)}
        for part, layer in zip(parts, layers.values()):
            part.weight = nn.Parameter(layer.dense(), requires_grad=False)
        return layers

    in_order(model, todo, batches, quantize, "gptq")


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


def fine_tune(model, tokenizer, step, said, args, loss_of, steps, finished=lambda model: model, after_step=None,
              **settings):
    """(model after `steps` of train.fit on its prepared training data, what the history says of it).

    loss_of(cfg, device)   the loss for train.fit
    finished(model)        the model that this one stands for, of which evaluation shall tell
    settings               of distill.DistillConfig

    The run is args.run, with best/ and last/, and goes on from there if it is there: see `make`.
    """
    source, run_dir, context = calibration_data(model, tokenizer, args), Path(args.run), calibration_context(model)
    if source.is_file():
        raise UserError(f"--calibration {source} is a text file, and {step.method or step.name} learns from prepared "
                        f"data: make it so with python data/prepare.py --input {source} --tokenizer {args.model} "
                        "--name NAME")
    rates = {**train.FINE_TUNE, **dict.fromkeys(("lr", "embed_lr", "matrix_lr"), args.lr)}
    cfg = distill.DistillConfig(**rates, **settings, out=str(run_dir), resume=train.is_saved(run_dir / "last"),
                                steps=steps, context=context, seed=args.seed,
                                eval_tokens=2048 if args.smoke else 131072)
    windows, val = (Windows(source, split, context) for split in ("train", "val"))
    said = {**said, "data": windows.meta["name"], "data_sha256": windows.meta["sha256"], "seed": args.seed,
            "context": context, "batch_size": cfg.batch_size, "lr": args.lr, "total": steps}
    student = load(run_dir / "last") if cfg.resume else copy.deepcopy(model)
    if cfg.resume and student.history[-1]["data_sha256"] != said["data_sha256"]:
        raise UserError(f"{run_dir} was begun with other data: begin anew with --overwrite")
    machine = train.set_up(cfg)
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
        return distill.Distillation(load(args.model, device, torch.float32), model, (), tokenizer.vocab_size, cfg) \
            if taught else train.cross_entropy

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

class Form(typing.NamedTuple):
    """How a step is written, name[:value][:method], and the function that does it."""
    function: typing.Callable               # (model, tokenizer, step, args) -> (model, tokenizer, what history says)
    values: tuple = ()                      # words or names in NUMBERS; one must be written if there is no default
    default: str = ""
    methods: tuple = ("",)                  # the first: where none is written

    def written(self, name):
        value, methods = "|".join(self.values), "|".join(filter(None, self.methods))
        return (name + (f"[:{value}]" if self.default else f":{value}" if value else "")
                + (f"[:{methods}]" if methods else ""))


class Step(typing.NamedTuple):
    name: str
    value: str                              # as it is written: float(value) of KEEP; "" where a step has none
    method: str


NUMBERS = {"KEEP": (float, lambda n: 0 < n <= 1, "the share that stays, above 0 and at most 1"),
           "STEPS": (int, lambda n: n >= 1, "a whole number, at least 1")}


def spelled(text, value):
    """A text that is what `value` stands for, a word or one of NUMBERS, in its one spelling; None: it is not."""
    number, right, _ = NUMBERS.get(value, (str, lambda word: word == value, ""))
    with contextlib.suppress(ValueError):
        return str(number(text)) if right(number(text)) else None


def parse(text):
    """The Step written as name[:value][:method]. Raises UserError, also for a value the step does not have."""
    name, *parts = text.split(":")
    if name not in STEPS:
        near = difflib.get_close_matches(name, STEPS, 1)
        raise UserError(f"there is no step {name!r}" + (f"; did you mean {near[0]}?" if near else
                                                       f"; there is {', '.join(STEPS)}"))
    if len(parts) > 2:
        raise UserError(f"step {text!r} has too many parts: a step is written name[:value][:method]")
    form, (value, method) = STEPS[name], (*parts, "", "")[:2]
    if value in form.methods and not method:                     # int4:gptq
        value, method = "", value
    value, method = value or form.default, method or form.methods[0]
    right = next(filter(None, (spelled(value, v) for v in form.values)), "" if not value and not form.values else None)
    if right is not None and method in form.methods:
        return Step(name, right, method)
    lacking = "has no value, and " if value.isdigit() and not form.values else ""
    numbers = "".join(f"; {v} is {NUMBERS[v][2]}" for v in form.values if v in NUMBERS and right is None)
    near = difflib.get_close_matches(value if right is None else method, [*form.values, *filter(None, form.methods)], 1)
    raise UserError(f"step {text!r}: {name} {lacking}is written {form.written(name)}{numbers}"
                    + (f"; did you mean {near[0]}?" if near else ""))


def parse_chain(texts):
    """The steps of a chain, in order. Raises UserError before any of them has done work."""
    if not texts:
        raise UserError("a chain has no step: write one such as int8, or \"width:0.5 recover:300\" in quotes")
    steps = [parse(text) for text in texts]
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


def written(steps):
    """A chain as a name that any file system takes: width-0.75+recover-95."""
    parts = ((step.name, step.value if step.value != STEPS[step.name].default else "",
              step.method if step.method != STEPS[step.name].methods[0] else "") for step in steps)
    return "+".join("-".join(filter(None, each)) for each in parts)


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


def make(steps, args, stages, out=None):
    """(model, tokenizer) that `steps` make of args.model. Each stage is saved in directory `stages` under the name of
    the chain so far (the last in `out` if there is one), and those that are there already are not made again."""
    places = [settle(stages / written(steps[:n]), MODEL) for n in range(1, len(steps) + 1)]
    done = next((n for n in range(len(places) - bool(out), 0, -1) if (places[n - 1] / "config.json").is_file()), 0)
    source = places[done - 1] if done else whole(args.model)
    parent = {} if done else {"parent": {"name": model_name(source), "sha256": checkpoint_hash(source)}}
    model, tokenizer = load(source), Tokenizer.load(source)
    for n, step in enumerate(steps[done:], done + 1):
        args.run = str(places[n - 1]) + ".run"                   # of a step that trains, until its stage is saved
        model, tokenizer, entry = STEPS[step.name].function(model, tokenizer, step, args)
        model.history, parent = model.history + [{**entry, **parent}], {}
        if step.name != "gguf":
            place = out if out and n == len(steps) else places[n - 1]
            save(model, place, tokenizer)
            model = load(place)                                  # what a resumed chain goes on from
        shutil.rmtree(args.run, ignore_errors=True)
    return model, tokenizer


def looks(steps):
    """Whether a step looks at text."""
    return trains(steps) or any(step.method in CALIBRATED or step.name == "vocab" for step in steps)


def trains(steps):
    return any(step.name == "recover" or step.method == "qat" for step in steps)


# ---------------------------------------------------------------------------------------------------------------------
# Measure: `--measure` compares finished models by sample.measure, on one text, and writes the report

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
            if directory and read_meta(directory)["sha256"] == made["data_sha256"]:
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

    --text FILE is one stream of ids, without a token that begins it; --eval-tokens takes its beginning. Of a .jsonl
    FILE the responses are scored, given their prompts, in each model's chat template. Prepared data is scored as
    train.py does, --eval-tokens spread over the split; but where tokenizers differ the beginning of its text, or all
    its responses, encoded by each. Raises UserError where that cannot be.
    """
    first, limit = next(iter(tokenizers.values())), args.eval_tokens
    windows = f"windows of {context} tokens and the one after each"

    def responses(file, flag):
        lines = heldout.read(file, flag)
        encoded = lambda tokenizer: [encode_example(tokenizer, line.prompt, line.response) for line in lines]
        if limit:                                            # the same lines for all, spread: a file's parts differ
            share = min(1.0, limit / sum(len(ids) for ids, _ in encoded(first)))
            count = max(1, int(share * len(lines)))
            lines = [lines[i * len(lines) // count] for i in range(count)]
        return (f"{len(lines):,} responses of {Path(file).name} given their prompts, {windows}",
                {name: list(Windows.of(encoded(tokenizer), context).evaluation_batches(max(1, 8192 // context)))
                 for name, tokenizer in tokenizers.items()})
    if args.text and args.text.endswith(".jsonl"):
        return responses(args.text, "--text")
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
        if split.mask is not None and (others or split.meta["tokenizer_hash"] != first.hash):
            return responses(directory / "val.jsonl", "--data")
        if split.meta["tokenizer_hash"] != first.hash:
            raise UserError(f"--data {directory.name} was prepared with another tokenizer than the first model's: "
                            f"prepare it with data/prepare.py --tokenizer {args.measure[0]}, or give --text FILE")
        if not others:
            part = f", about {limit:,} tokens spread over it" if limit and limit < len(split.tokens) else ""
            batches = list(split.evaluation_batches(max(1, 8192 // context), limit))
            return f"{protocol}, {windows}{part}", dict.fromkeys(tokenizers, batches)
        ids, streams = split.tokens, {}
    if limit and limit + 1 < len(ids):
        ids, streams, windows = ids[:limit + 1], {}, f"{windows}, the first {limit:,} tokens"
    if len(ids) < 2:
        raise UserError(f"--text {args.text} has {len(ids)} tokens: nothing can be predicted in it")
    streams = {name: streams[name] if name in streams else reencoded(ids, first, tokenizers[name]) for name in others}
    batches = {name: list(stream_batches(streams.get(name, ids), context)) for name in tokenizers}
    return f"{protocol}, {windows}", batches


def is_report(file):
    """Whether results.jsonl is one that write_lines wrote."""
    try:
        with open(file, encoding="utf-8") as lines:
            row = json.loads(lines.readline())
        return isinstance(row, dict) and {"protocol", "sha256"} <= row.keys()
    except (OSError, ValueError):
        return False


def check_report(args):
    """Raises UserError if the report cannot be written to --out, or must not be."""
    out = Path(args.out)
    if out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} is a {'file' if out.is_file() else 'model'}; the report is three files in a "
                        "directory: give another name")
    foreign = next((name for name in sorted(REPORT) if (out / name).exists()), None)
    if foreign and not is_report(out / "results.jsonl"):
        raise UserError(f"--out {out} holds {foreign}, which is not of a report that compress.py wrote: give another "
                        "name")
    if foreign and not args.overwrite:
        raise UserError(f"--out {out} holds a report already: give another name or --overwrite")
    check_writable(out)


def ruler(directories, args, command):
    """(protocol, rows_of): what is scored, in words, and a function of names in `directories` ({name: model directory})
    that gives the rows of the first one there and of these, measured together."""
    device = sample.pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = {name: load(directory) for name, directory in directories.items()}          # mapped: nothing is read yet
    tokenizers = {name: sample.tokenizer_of(model, directories[name]) for name, model in models.items()}
    if args.escalate and (len(models) != 2 or len({tokenizer.hash for tokenizer in tokenizers.values()}) > 1):
        raise UserError("--escalate measures two models at work together, a small and a large one with the same "
                        "tokenizer: compress.py --measure SMALL BIG --escalate")
    base, files = next(iter(models)), dict(directories)
    window = min(model.config.max_position_embeddings for model in models.values())
    context = last_training(models[base].history).get("context", 512)
    new_tokens = args.new_tokens or max(1, min(64, window // 4))
    prompt = args.prompt_tokens or max(1, min(256, window - new_tokens))
    if prompt + new_tokens > window:
        raise UserError(f"a prompt of {prompt} tokens and {new_tokens} new ones are more than the smallest window, "
                        f"{window}: lower --prompt-tokens or --new-tokens")
    protocol, batches = scored_text(args, tokenizers, models[base].history, min(window, context))
    print(f"measuring {', '.join(models)} on {device}: {protocol}", flush=True)

    def rows_of(names):
        dtype = torch.float32 if device.type == "cpu" else None                   # a CPU is slow at 16 bits
        models = {name: load(directories[name], device, dtype) for name in (base, *names)}
        others = {name: (batches[name], tokenizers[name].token_bytes()) for name in names
                  if tokenizers[name].hash != tokenizers[base].hash}
        bar = tqdm(batches[base], desc="score", disable=None, leave=False)        # silent unless on a terminal
        rows = sample.measure(models, bar, tokenizers[base].token_bytes(), files, others, prompt, new_tokens,
                              rounds=args.rounds)
        files.pop(base, None)                                    # its memory is measured once
        for row in rows:
            history = models[row["name"]].history
            row.update(protocol=protocol, command=command, tokenizer=tokenizers[row["name"]].hash[:16],
                       sha256=checkpoint_hash(directories[row["name"]]), seed=seed_of(history),
                       history=hashlib.sha256(json.dumps(history, sort_keys=True).encode()).hexdigest()[:16],
                       python=platform.python_version(), torch=torch.__version__)
            if any(entry["step"] == "sparse" for entry in history):
                row["note"] = "no speed-up expected: zeros are multiplied too"
        if args.escalate:
            rows += sample.cascade_rows(models, rows, batches[base], tokenizers[base].token_bytes())
        return rows
    return protocol, rows_of


def measure_command(args, command):
    """--measure: prints the table and, with --out, writes results.jsonl, report.md and tradeoff.png."""
    directories = sample.named(args.measure, "--measure")
    if args.out:
        check_report(args)
    protocol, rows_of = ruler(directories, args, command)
    rows = rows_of(list(directories)[1:])
    text = f"{sample.table(rows)}\n\nText: {protocol}."
    print(f"\n{text}")
    if args.out:
        write_report(rows, text, Path(args.out))


def sweep_command(args, command):
    """--sweep: makes and measures what each stage of the chains makes of the model, and writes the report. Stages and
    rows that are there, with --resume, are neither made nor measured again."""
    out, directory = Path(args.out), whole(args.model)
    model, tokenizer, base = load(directory), Tokenizer.load(directory), model_name(directory)
    chains = [parse_chain(text.split()) for text in args.sweep or (SWEEP[:1] if args.smoke else SWEEP)]
    if args.recover_control:
        chains += filter(None, [[step for step in chain if step.name == "recover"] for chain in chains])
    for chain in chains:
        if chain[-1].name == "gguf":
            raise UserError("--sweep measures models, and gguf writes a file for other programs: leave it out")
        check_order(chain, model)
    check_flags(args, [step for chain in chains for step in chain])
    args.measure = [args.model]                                  # where a text for the models is looked for
    scored_text(args, {base: tokenizer}, model.history, calibration_context(model))      # is there one?
    open_stages(out, args, MEASURING)
    with told_how_to_go_on(out):
        args.run = str(out / "model.run")
        if any(map(looks, chains)) and calibration_data(model, tokenizer, args).is_file():
            if any(map(trains, chains)):
                print(f"recover and qat, and what comes after them, are left out: they learn from prepared data, and "
                      f"--calibration {args.calibration} is a text file")
            chains = [list(itertools.takewhile(lambda step: not trains([step]), chain)) for chain in chains]
    shutil.rmtree(out / "model.run", ignore_errors=True)
    stages = {written(chain[:n]): chain[:n] for chain in chains for n in range(1, len(chain) + 1)}
    base += " before" * (base in stages)
    before = out / "results.jsonl"
    rows = [json.loads(line) for line in before.read_text(encoding="utf-8").splitlines()] if before.exists() else []
    costs = {name: 100 + cost(steps[-1], args) for name, steps in stages.items()}
    there = {row["name"] for row in rows}
    progress = Progress(sum(c for name, c in costs.items() if name not in there))
    directories, left_out = {base: directory}, {}
    with told_how_to_go_on(out):
        for name, steps in stages.items():
            if any(name.startswith(f"{other}+") for other in left_out):
                continue
            if name not in there:
                progress.next(name, costs[name] - 100)
            try:
                make(steps, args, out)
                directories[name] = out / name
            except UserError as error:                           # a family without such heads, rows without such groups
                left_out[name] = f"- {name}, and what follows it, is left out: {error}"
                tqdm.write(left_out[name])
        if len(directories) == 1:
            raise UserError(f"nothing is there to measure: {'; '.join(left_out.values()) or 'each chain trains first'}")
        protocol, rows_of = ruler(directories, args, command)
        rows = [row for row in rows if row["protocol"] == protocol and row["name"] in directories
                and row["sha256"] == checkpoint_hash(directories[row["name"]])]
        for name in [name for name in directories if name not in {row["name"] for row in rows}]:
            if name != base:
                progress.next(f"measuring {name}", 100)
                first, row = rows_of([name])
                rows = [*(rows or [first]), row]
                write_lines(rows, out)
    progress.bar.close()
    order = list(directories)
    rows.sort(key=lambda row: order.index(row["name"]))
    text = "\n\n".join(filter(None, (sample.table(rows), f"Text: {protocol}.", step_by_step(rows),
                                     "\n".join(left_out.values()))))
    print(f"\n{text}")
    write_report(rows, text, out, [written(chain) for chain in chains])


class Progress:
    """How far a list of jobs is, by what each of them costs: a bar on a terminal, and a line before each job."""
    def __init__(self, total):
        self.bar = tqdm(total=total, desc="sweep", disable=None, bar_format="{l_bar}{bar}| {elapsed}")
        self.total, self.done, self.now, self.start = total, 0, 0, time.monotonic()

    def next(self, name, cost):
        self.done, self.now = self.done + self.now, cost
        self.bar.update(self.done - self.bar.n)
        left = (time.monotonic() - self.start) * (self.total / self.done - 1) / 60 if self.done else None
        tqdm.write(f"--- {name}" + ("" if left is None else f"; about {left:.0f} minutes left"))


def cost(step, args):
    """About how long a step takes, in steps of training; measuring what it made takes about 100."""
    if step.name == "recover":
        return int(step.value)
    return 2 * args.qat_steps if step.method == "qat" else args.calibration_windows // 2 if looks([step]) else 5


def step_by_step(rows):
    """What each step of the chains of several did to bits per byte, as Markdown lines."""
    bits, lines = {row["name"]: row["bits_per_byte"] for row in rows}, []
    for name in list(bits)[1:]:                                  # the first is what they were made of
        if "+" in name and not any(other.startswith(name + "+") for other in bits):
            parts = name.split("+")
            values = [rows[0]["bits_per_byte"], *(bits["+".join(parts[:n + 1])] for n in range(len(parts)))]
            lines.append("- " + ", ".join(f"{part} {b - a:+.4f}" for part, a, b in zip(parts, values, values[1:])))
    return "Bits per byte, step by step:\n\n" + "\n".join(lines) if lines else ""


def write_lines(rows, out):
    """results.jsonl, a line a row."""
    with replacing_file(out / "results.jsonl") as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8",
                       newline="\n")


def seed_of(history):
    """The seed of the last step that drew anything: measuring itself draws nothing."""
    return next((entry["seed"] for entry in reversed(history) if "seed" in entry), None)


def write_report(rows, text, out, shown=()):
    """results.jsonl (a line a row), report.md and, where matplotlib is installed, tradeoff.png in directory `out`: of
    all rows, or if they are too many to be told apart of those named in `shown`."""
    drawn = [row for row in rows if len(rows) <= 15 or row is rows[0] or row["name"] in shown]
    far = [row for row in drawn if row["bits_per_byte"] > 2 * rows[0]["bits_per_byte"]]      # they would hide the rest
    picture = tradeoff([row for row in drawn if row not in far], out) if len(rows) > 1 else False
    link = "\n\n![bits per byte against file size and against decoding speed](tradeoff.png)" if picture else ""
    if picture and far:
        link += f"\n\nNot drawn, at more than twice the baseline's bits per byte: {', '.join(r['name'] for r in far)}."
    report = f"# {rows[0]['name']} and what was made of it\n\n{text}{link}\n\n    {rows[0]['command']}\n"
    write_lines(rows, out)
    with replacing_file(out / "report.md") as new:
        new.write_text(report, encoding="utf-8", newline="\n")
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
    """Writes the names of `points` [(name, x, y), ...], each at the place nearest to its point that is free; a line
    leads to one that is far."""
    from matplotlib.transforms import Bbox
    ax.figure.canvas.draw()
    taken = [Bbox.from_bounds(*(ax.transData.transform((x, y)) - 7), 14, 14) for _, x, y in points]
    taken += [ax.get_legend().get_window_extent()] if ax.get_legend() else []
    places = [(dx, dy, "left" if dx > 0 else "right" if dx else "center") for dx, dy in
              itertools.product(range(-78, 79, 6), range(-90, 91, 6)) if dx or abs(dy) >= 12]
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        for dx, dy, side in sorted(places, key=lambda place: math.hypot(place[0], 1.5 * place[1] - 9)):
            text = ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=8, ha=side, va="center")
            box = text.get_window_extent()
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        taken.append(box)
        if math.hypot(dx, dy) > 15:
            ax.annotate("", (x, y), (dx, dy), textcoords="offset points", zorder=1,
                        arrowprops=dict(arrowstyle="-", color="0.6", lw=0.6, shrinkA=0, shrinkB=0))


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
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True, layout="constrained")
    low, high = (f(r["bits_per_byte"] for r in rows) for f in (min, max))
    pad = max(0.1 * (high - low), 0.005 * high)                  # differences of less than that should look small
    recovered = any("+recover" in row["name"] for row in rows)
    for ax, label, cost, sign in ((axes[0], "file, MB", lambda r: r["file_bytes"] / 1e6, 1),
                                  (axes[1], f"decode, x {rows[0]['name']}", lambda r: r["decode_x"], -1)):
        line = front([(sign * cost(r), r["bits_per_byte"]) for r in rows])
        ax.step([sign * x for x, _ in line], [y for _, y in line], where="post", color="0.7", zorder=1,
                label="best for its cost")
        ax.axhline(rows[0]["bits_per_byte"], color="tab:orange", linestyle=":", linewidth=1, zorder=0)   # to get under
        for r in rows:
            dense = r is rows[0]
            ax.scatter(cost(r), r["bits_per_byte"], color="tab:orange" if dense else "tab:blue", zorder=2,
                       marker="*" if dense else "o", s=120 if dense else 30, label="baseline" if dense else None)
        ax.set(xlabel=label)
        ax.set_xlim(0, 1.12 * max(map(cost, rows)))
        ax.set_ylim(low - pad, high + pad)
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte (lower is better)", title="smaller is to the left")
    axes[1].set(title="faster is to the right")
    axes[1].legend(fontsize=8, title="+r: and a recovery" if recovered else None, title_fontsize=8)
    for ax, cost in ((axes[0], lambda r: r["file_bytes"] / 1e6), (axes[1], lambda r: r["decode_x"])):
        label_points(ax, [(re.sub(r"\+recover-\d+", "+r", r["name"]), cost(r), r["bits_per_byte"]) for r in rows])
    with replacing_file(out / "tradeoff.png") as new:
        fig.savefig(new, dpi=120, format="png")
    plt.close(fig)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The command

# Methods that look at windows of text
CALIBRATED = ("activation", "pca", "influence", "allocated", "whitened", "wanda", "sparsegpt", "gptq")
SETTINGS = ("head_bits", "asymmetric", "calibration", "calibration_windows", "qat_steps", "lr", "seed", "smoke")
MEASURING = ("data", "text", "eval_tokens", "prompt_tokens", "new_tokens", "rounds", "threads", "device")
SLICING, QUANTIZING = ("ffn", "heads", "width", "depth", "vocab"), ("int8", "int4")
STEPS = {
    **dict.fromkeys(("ffn", "heads"), Form(structured_step, ("KEEP",), methods=("activation", "magnitude"))),
    "width": Form(structured_step, ("KEEP",), methods=("pca", "activation", "magnitude")),
    "depth": Form(structured_step, ("KEEP",), methods=("influence",)),
    "vocab": Form(vocab_step, ("KEEP",)),
    "lowrank": Form(lowrank_step, ("KEEP",), methods=("allocated", "whitened", "svd")),
    "sparse": Form(sparse_step, ("KEEP", "2of4"), methods=("sparsegpt", "wanda", "magnitude")),
    "recover": Form(recover_step, ("STEPS",), methods=("taught", "text")),
    "int8": Form(quantize_step, methods=("", "qat")),
    "int4": Form(quantize_step, ("32", "64", "128"), "32", ("rtn", "gptq", "qat")),
    "dequantize": Form(dequantize_step),
    "gguf": Form(gguf_step, GGUF_TYPES),
}


# What --sweep makes, with the control: the same recovery of the model itself. With --smoke the first one
SWEEP = ("width:0.75 recover:95", "width:0.75 recover:95 int8", "width:0.75 recover:95 int4:gptq",
         "width:0.5 recover:95", "depth:0.75 recover:95", "vocab:0.75 recover:95", "lowrank:0.8 recover:95",
         "sparse:0.5 recover:95", "int8", "int4", "int4:gptq", "recover:95")


def arguments(argv):
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
    parser.add_argument("--asymmetric", action="store_true", help="int4: an offset for each group too, half a bit a "
                        "weight more (default: scales alone)")
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
    parser.add_argument("--recover-control", action="store_true", help="say too what the recovery of the chain does to "
                        "the model that enters it")
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
    args = parser.parse_args(argv)
    if args.measure:
        if args.model or args.head_bits or args.sweep is not None:
            raise UserError("--measure compares finished models and takes no steps: first compress.py MODEL STEP ... "
                            "--out DIR, then compress.py --measure MODEL DIR")
        for name in ("asymmetric", "calibration", "calibration_windows", "qat_steps", "lr", "resume", "seed",
                     "recover_control"):
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


def check_out(out, source, is_file, overwrite):
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
    methods, names = {step.method for step in steps}, {step.name for step in steps}
    for flag, value, needs, there in (
            ("head-bits", args.head_bits, "that quantizes: int8 or int4", names & {*QUANTIZING}),
            ("asymmetric", args.asymmetric, "of 4 bits: int4", "int4" in names or args.head_bits == 4),
            ("calibration", args.calibration, "that looks at text: int4:gptq, sparse, lowrank, width, recover, ...",
             looks(steps)),
            ("calibration-windows", args.calibration_windows != 128, "that calibrates: int4:gptq, sparse, lowrank, "
             "width, ...", methods & {*CALIBRATED}),
            ("qat-steps", args.qat_steps != 300, "that trains: int4:qat or int8:qat", "qat" in methods),
            ("lr", args.lr != 1e-3, training, trains(steps)),
            ("resume", args.resume, f"{training}, or several steps",
             looks(steps) or len(steps) > 1 or args.sweep is not None),
            ("recover-control", args.recover_control, "of recovery: recover", "recover" in names)):
        if value and not there:
            raise UserError(f"--{flag} needs a step {needs}")
    for name, least in (("calibration_windows", 1), ("qat_steps", 1), ("lr", 0), ("seed", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if args.asymmetric and "sparse" in names:
        raise UserError("--asymmetric fills the zeros of sparse with its offsets: leave one of them out")
    kept = steps[-1].name == "gguf" and "dequantize" not in names
    if args.asymmetric and kept and steps[-1].value in GGUF_STORED.values():
        raise UserError(f"gguf:{steps[-1].value} has no offsets: leave out --asymmetric, or put dequantize before gguf "
                        "and write gguf:f16")
    if args.smoke:
        args.calibration_windows, args.qat_steps = min(8, args.calibration_windows), min(6, args.qat_steps)


def main(argv=None):
    args = arguments(argv)
    command = "python compress.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    if args.measure:
        return measure_command(args, command)
    if args.sweep is not None:
        return sweep_command(args, command)
    steps = parse_chain(args.steps)                             # all that can be refused is refused before any work
    out = Path(args.out) if Path(args.out).name else Path(args.out).resolve()      # "." has no name to write beside
    args.out, directory, to_file = str(out), whole(args.model), steps[-1].name == "gguf"
    stages, kept = out.with_name(out.name + ".stages"), len(steps) > 1 or looks(steps)
    if args.resume and is_made(out, steps, directory):           # a kill left the stages beside it
        remove_tree(stages)
        return print(f"{out} is made already, by this chain from this model")
    check_out(out, directory, to_file, args.overwrite)
    check_flags(args, steps)
    check_order(steps, load(directory))
    if to_file:
        import_gguf()
    if kept:
        open_stages(stages, args)
    with told_how_to_go_on(stages):
        if args.recover_control:                                # more training and no compression
            control, _ = make([step for step in steps if step.name == "recover"], args, stages)
        model, _ = make(steps, args, stages, out)
    if args.recover_control:
        its, ours = ([entry["val_bits_per_byte"] for entry in m.history if entry["step"] == "recover"][-1]
                     for m in (control, model))
        print(f"control: the same training takes the model that entered the chain to {its:.4f} bits per byte of "
              f"validation, and what was made of it to {ours:.4f}")
        del control                                             # its tensors may be mapped from the stages
    if not to_file:
        parameters, resident = model.parameters_count(), model.resident_bytes()
        print(f"{out}: {parameters:,} parameters; {(out / 'model.safetensors').stat().st_size / 1e6:,.1f} MB on disk, "
              f"{resident / 1e6:,.1f} MB in memory: {8 * resident / parameters:.2f} bits per weight, scales and all")
    del model
    if kept:
        remove_tree(stages)


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


if __name__ == "__main__":
    run(main)
