"""The structure of a model: axes of tensors, sizes, smaller models, and dense layers again."""
import dataclasses, itertools, math

import torch
from torch import nn

from data import UserError
from data.hub import FAMILIES, SIZES

# The axis of each dimension of a tensor: ids (vocab), channels of the residual stream (width), of
# query heads and of key-value heads, neurons. A vector has the first. "" is never sliced.
AXES = {"model.embed_tokens": ("vocab", "width"), "model.embed_positions": ("", "width"), "lm_head": ("vocab", "width"),
        "self_attn.q_proj": ("queries", "width"), "self_attn.k_proj": ("keys", "width"),
        "self_attn.v_proj": ("keys", "width"), "self_attn.o_proj": ("width", "queries"),
        "mlp.gate_proj": ("ffn", "width"), "mlp.up_proj": ("ffn", "width"), "mlp.down_proj": ("width", "ffn"),
        "self_attn.q_norm": ("",), "self_attn.k_norm": ("",), "input_layernorm": ("width",),
        "post_attention_layernorm": ("width",), "attention_out_norm": ("width",), "mlp_out_norm": ("width",),
        "model.norm": ("width",)}


def split_name(name):
    """(number of the block that a tensor or module is in, else 0; the name within the block)."""
    if not name.startswith("model.layers."):
        return 0, name
    layer, _, local = name.removeprefix("model.layers.").partition(".")
    return int(layer), local


def axes_of(name):
    """The axes of a tensor's dimensions. Raises UserError for a tensor that AXES lacks."""
    module = split_name(name)[1].removesuffix(".weight").removesuffix(".bias")
    if module not in AXES:
        raise UserError(f"compress.py does not know {module}: add it to AXES in data/structure.py")
    return AXES[module]


def is_quantized(layer):
    """Whether a layer is a QuantLinear of model.py; a tensor is none."""
    return hasattr(layer, "scales")


def has_quantized(module):
    """Whether a layer in the module is quantized."""
    return any(map(is_quantized, module.modules()))


def hooks_of(module):
    """The dicts in which PyTorch keeps hooks on the forward passes in a module: empty where there are none."""
    everywhere = nn.modules.module
    return [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks,
            *(hooks for m in module.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))]


def dense_layers(model):
    """{name: layer} of all dense matrices, without a tied head and learned positions."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))
            and name != "model.embed_positions" and not (name == "lm_head" and model.config.tie_word_embeddings)}


def body_layers(model):
    """{name: layer} of the dense layers in the blocks; of low-rank layers, of the two factors."""
    return {name: layer for name, layer in dense_layers(model).items()
            if name.startswith("model.layers.") and isinstance(layer, nn.Linear)}


def dense_weight(layer):
    """The weight (out, in) of a dense layer, or the product of two factors."""
    return layer.dense() if hasattr(layer, "dense") else layer.weight


def select(t, indices, dim, axis, layer):
    """Selects along `dim` of t the indices that stay of `axis`.

    indices[axis] is (n,), or (layers, n) if each layer keeps other ones. Without it all stay.
    """
    if axis not in indices:
        return t
    index = indices[axis]
    return t.index_select(dim, index if index.ndim == 1 else index[layer])


def layers_that_stay(config, indices):
    """The numbers of the layers that stay, in order."""
    return indices["layers"].tolist() if "layers" in indices else list(range(config.num_hidden_layers))


def shaped(config, layers, **sizes):
    """The config with only these layers, and with other sizes."""
    lists = {}
    for name in ("layer_types", "no_rope_layers"):
        values = getattr(config, name) or config.hub.get(name)      # transformers names types where none slides, too
        if values:
            lists[name] = [values[i] for i in layers]
    ours = {name: values for name, values in lists.items() if getattr(config, name)}
    return dataclasses.replace(config, num_hidden_layers=len(layers), **ours, **sizes, hub={**config.hub, **lists})


@torch.no_grad()
def slice_model(model, indices):
    """Copies what stays of a dense model into a smaller one.

    indices: see `select`; axes are layers, width, ffn, queries together with keys, and vocab.
    Raises UserError for a tensor that AXES lacks, unless whole layers are all that goes.
    """
    c, layers = model.config, layers_that_stay(model.config, indices)
    count = {axis: index.shape[-1] for axis, index in indices.items()}
    with torch.device("meta"):
        small = type(model)(shaped(
            c, layers, hidden_size=count.get("width", c.hidden_size), vocab_size=count.get("vocab", c.vocab_size),
            intermediate_size=count.get("ffn", c.intermediate_size),
            num_attention_heads=count.get("queries", c.num_attention_heads * c.head_dim) // c.head_dim,
            num_key_value_heads=count.get("keys", c.num_key_value_heads * c.head_dim) // c.head_dim))
    dense, tensors = model.state_dict(), {}
    for name in small.state_dict():
        layer = layers[split_name(name)[0]]
        t = dense[name.replace(f".layers.{split_name(name)[0]}.", f".layers.{layer}.")]
        for dim, axis in zip(range(t.ndim), axes_of(name) if indices.keys() - {"layers"} else ()):
            t = select(t, indices, dim, axis, layer)
        tensors[name] = t.clone()
    small.load_state_dict(tensors, assign=True)
    small.tie_weights()
    small.history = model.history
    small.exits = sorted({sum(i < e for i in layers) for e in model.exits} - {0, len(layers)})
    return small.to(next(model.parameters()).device).train(model.training)       # frequencies, too


def head_channels(config, groups):
    """{"queries", "keys"}: channels of key-value heads `groups` (layers, n), and of query heads."""
    share, D = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    channels = lambda size: groups[..., None] * size + torch.arange(size, device=groups.device)      # (layers, k, size)
    return {axis: channels(size).flatten(1) for axis, size in (("queries", share * D), ("keys", D))}   # (layers, n)


def granularity(size):
    """The unit of widths and numbers of neurons: 32, the group of int4 and GGUF, or 8 in a toy."""
    return 32 if size >= 64 else 8


def kept_count(size, keep, unit=1):
    """The multiple of `unit` nearest to the share `keep` of a size. 0, for unit 1: none is left."""
    return min(size, unit * max(round(keep * size / unit), unit > 1))


def width_sizes(model, keep):
    """[{"width", "keys", "ffn"}, ...]: sizes that leave at most the share `keep` of all parameters.

    "keys" counts key-value heads. The most equal shares come first; sizes that are smaller than
    others in everything are left out.
    """
    c, sizes, budget = model.config, [], keep * model.parameters_count()
    share = c.num_attention_heads // c.num_key_value_heads * c.head_dim
    tensors = [(axes_of(name), p.shape) for name, p in model.named_parameters()]

    def multiples(size):
        return sorted({*range(granularity(size), size, granularity(size)), size}, reverse=True)

    def parameters(width, heads, ffn):
        size = {"width": width, "queries": heads * share, "keys": heads * c.head_dim, "ffn": ffn}
        return sum(math.prod(size.get(axis, n) for axis, n in zip(axes, shape)) for axes, shape in tensors)

    for width, heads in itertools.product(multiples(c.hidden_size), range(c.num_key_value_heads, 0, -1)):
        ffn = next((f for f in multiples(c.intermediate_size) if parameters(width, heads, f) <= budget), 0)
        if ffn and not any(w >= width and h >= heads and f >= ffn for w, h, f in map(dict.values, sizes)):
            sizes.append({"width": width, "keys": heads, "ffn": ffn})

    def inequality(size):
        width, heads, ffn = size.values()
        shares = width / c.hidden_size, heads / c.num_key_value_heads, ffn / c.intermediate_size
        return max(shares) - min(shares)

    return sorted(sizes, key=inequality)


def candidate_sizes(step, model):
    """[{axis: how many stay}, ...] from which a slicing step chooses; only width has more than one.

    Raises UserError for a tensor that AXES lacks, if nothing would be left, and for a family whose
    config.json cannot express the result.
    """
    c, keep = model.config, step.keep
    if step.name in ("heads", "width") and "head_dim" in FAMILIES[c.model_type].unnamed:
        raise UserError(f"{step.name}: the config.json of {c.model_type} has no head_dim: other programs divide the "
                        "width by the heads, which would be wrong with fewer: use ffn or depth")
    if step.name in ("heads", "width") and c.qk_norm and c.qk_norm_whole:
        raise UserError(f"{step.name}: the queries of all heads share one norm in {c.model_type}, so fewer heads would "
                        "change those that stay: use ffn or depth")
    for name in model.state_dict() if step.name != "depth" else ():
        axes_of(name)
    if step.name == "width":
        sizes = width_sizes(model, keep)
    elif step.name == "ffn":
        sizes = [{"ffn": kept_count(c.intermediate_size, keep, granularity(c.intermediate_size))}]
    elif step.name == "heads":
        sizes = [{"keys": kept_count(c.num_key_value_heads, keep)}]
    else:
        sizes = [{"layers": kept_count(c.num_hidden_layers, keep)}]
    if not sizes or 0 in sizes[0].values():
        noun = {"heads": "head", "depth": "layer", "width": "channel"}[step.name]
        raise UserError(f"{step.name}:{step.value} leaves no {noun}: keep more")
    return sizes


def best_sizes(candidates, loss):
    """The sizes of which no neighbour has less loss, from the first candidate on (hill climbing).

    A neighbour has the next width or number of heads, or more of one and less of the other; the
    neurons follow from both.
    """
    grid = [sorted({sizes[axis] for sizes in candidates}) for axis in ("width", "keys")]
    places = [tuple(map(list.index, grid, (sizes["width"], sizes["keys"]))) for sizes in candidates]
    losses, best = {0: loss(candidates[0])}, 0
    while True:
        for i, place in enumerate(places):
            wider, more = (a - b for a, b in zip(place, places[best]))
            if abs(wider) + abs(more) + abs(wider + more) == 2 and i not in losses:
                losses[i] = loss(candidates[i])
                if losses[i] < losses[best]:
                    best = i
                    break
        else:
            return candidates[best]


def possible_ranks(layer):
    """[(parameters, rank), ...]: ranks are multiples of 32, the group of int4; the last: dense, None."""
    (n_out, n_in), dense = layer.weight.shape, layer.weight.numel()
    sizes = [(rank * (n_in + n_out), rank) for rank in range(32, min(n_in, n_out), 32)]
    return [size for size in sizes if size[0] < dense] + [(dense, None)]


def even_ranks(layers, keep):
    """{name: rank} at which each layer is nearest to the share `keep`; dense ones are left out."""
    ranks = {name: min(possible_ranks(layer)[::-1], key=lambda size: abs(size[0] - keep * layer.weight.numel()))[1]
             for name, layer in layers.items()}
    return {name: rank for name, rank in ranks.items() if rank}


def check_storable(step, name, layer):
    """Raises UserError for weights whose scales float16 cannot hold."""
    if not layer.weight.detach().abs().max() <= 65504:
        raise UserError(f"{step}: {name} has weights that are infinite, not numbers, or too large for float16")


def prune_report(step, before, after, method=""):
    """Prints the change of sizes and returns the history entry."""
    pairs = {name: [getattr(model.config, name) for model in (before, after)] for name in SIZES}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    counts = before.parameters_count(), after.parameters_count()
    print(f"{step.name}: {', '.join(f'{name} {a:,} -> {b:,}' for name, (a, b) in pairs.items()) or 'nothing is cut'}; "
          f"{counts[0]:,} -> {counts[1]:,} parameters ({counts[1] / counts[0]:.1%})", flush=True)
    return {"step": step.name, "keep": step.keep, **({"method": method} if method else {}), **pairs,
            "parameters": list(counts)}


def print_sizes(model, directory):
    """Prints the size of a model on disk and in memory."""
    parameters, resident = model.parameters_count(), model.resident_bytes()
    stored = (directory / "model.safetensors").stat().st_size
    print(f"{directory}: {parameters:,} parameters; {stored / 1e6:,.1f} MB on disk, {resident / 1e6:,.1f} MB in "
          f"memory: {8 * resident / parameters:.2f} bits per weight, scales and all")


def dequantize(model):
    """The model with dense layers in place of quantized ones, in the dtype of the norms."""
    with torch.device("meta"):
        dense = type(model)(model.config)
        for entry in model.compression:
            if entry["kind"] == "lowrank":
                dense.replace(entry)
    dense.history, dense.exits, weights = model.history, model.exits, {}
    for name, t in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        layer = model.get_submodule(module)
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue
        if not hasattr(layer, "scales") or suffix == "bias":
            weights[name] = t
        elif suffix == "q":
            weights[f"{module.removesuffix('.table')}.weight"] = layer.dense().to(model.dtype)
    dense.load_state_dict(weights, strict=False, assign=True)
    dense.tie_weights()
    return dense.to(next(model.parameters()).device).train(model.training)       # frequencies, too
