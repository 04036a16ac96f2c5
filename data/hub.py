"""
config.json and tensor names of the Hub's model families: translated to model.py's, and back.

A row of FAMILIES is a family: the switches of Config, the names of fields, and how tensors are
fused or transposed.
"""
import dataclasses
from pathlib import Path

import torch

from data import UserError
from data.files import read_json
from data.rotary import ROPE, ROPE_FIELDS, SCALED, check_rope
from data.values import check_values

COMPRESSED = "slm-compressed"               # model_type of a directory that only this project opens
FORMAT = 1                                  # version of our additions to config.json; a newer one is refused by name
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
COPIED = (*SIZES, "rms_norm_eps", "tie_word_embeddings", "hidden_act")      # the same value in Config and config.json
WINDOWS = ("full_attention", "sliding_attention")
# Fields of Config and of Config.rope: a type, and for numbers the smallest and the largest value.
# They come from files: a size that no model has must not fill the memory or begin a long loop.
FIELDS = {**dict.fromkeys(SIZES, (int, 1, 2 ** 24)), "num_hidden_layers": (int, 1, 10_000),
          **dict.fromkeys(("tie_word_embeddings", "qk_norm", "qk_norm_whole", "qkv_bias", "o_bias", "mlp_bias", "gated",
                           "head_bias", "layer_norm", "unit_offset", "learned_positions"), (bool,)),
          **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (float, 1e-6, 1e6)),
          "attention_multiplier": (float, 0, 1e6), "parallel": (int, 0, 2), "norms": (str,),
          "rms_norm_eps": (float, 0, 1), "hidden_act": (str,), "sliding_window": (int, 0, 2 ** 40), "rope": (dict,)}
LARGEST = 2 ** 31                           # elements of a tensor: Llama 3.1 405B's embedding has 2.1 billion


def check_config(config, activations):
    """Raises UserError for fields of wrong types or sizes, or that contradict each other."""
    check_values(vars(config), FIELDS, "the model's shape")
    check_values(config.rope, ROPE_FIELDS, "rotary positions", needed=ROPE)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
                        f"num_key_value_heads ({config.num_key_value_heads})")
    for name, value, known in (("hidden_act", config.hidden_act, activations),
                               ("norms", config.norms, ("before", "after", "both")),
                               ("rope_type", config.rope["rope_type"], SCALED)):
        if value not in known:
            raise UserError(f"{name} {value!r} is not supported; supported: {', '.join(known)}")
    check_rope(config.rope, config.head_dim)
    if config.head_bias and (config.tie_word_embeddings or config.logits_scaling != 1):
        raise UserError("a head with a bias is neither tied to the embedding nor divided by logits_scaling here")
    check_layers(config)
    rows = {"vocab_size": config.vocab_size, "intermediate_size": config.intermediate_size,
            "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim}
    if config.learned_positions:
        rows["max_position_embeddings"] = config.max_position_embeddings
    for name, n in rows.items():
        if n * config.hidden_size > LARGEST:
            raise UserError(f"{name} ({n:,}) times hidden_size ({config.hidden_size:,}) is more than the {LARGEST:,} "
                            "numbers that a tensor may have: make one of them smaller")


def check_layers(config):
    """Raises UserError for a list of the layers that is too short, or holds something else."""
    if config.no_rope_layers is not None:
        check_values(vars(config), {"no_rope_layers": ([int], 0, 1)}, "the model's shape")
        if len(config.no_rope_layers) < config.num_hidden_layers:
            raise UserError(f"no_rope_layers must name 0 or 1 for each of {config.num_hidden_layers} layers")
    if config.layer_types is not None:
        check_values(vars(config), {"layer_types": ([str],)}, "the model's shape")
        if len(config.layer_types) < config.num_hidden_layers or set(config.layer_types) - set(WINDOWS):
            raise UserError(f"layer_types must name one of {', '.join(WINDOWS)} for each of "
                            f"{config.num_hidden_layers} layers")


@dataclasses.dataclass
class Family:
    """A model family of the Hub, as transformers implements it."""
    architecture: str
    switches: callable                       # config.json (under Config's names) -> fields of Config
    renamed: dict = dataclasses.field(default_factory=dict)         # Config's name of a field -> the family's
    unnamed: tuple = ()                      # fields of Config that the family derives from others
    defaults: dict = dataclasses.field(default_factory=dict)        # transformers' values of absent fields
    rope_types: tuple = tuple(SCALED)        # () for learned positions
    old_rope_types: dict = dataclasses.field(default_factory=dict)  # old names of kinds of rotary positions
    partial: bool = False                    # whether transformers rotates only a part of each head's channels
    tensors: tuple = ()                      # (the family's module, model.py's modules fused in it, layout)
    prefixes: tuple = ()                     # (model.py's, the family's) for the other tensors


def llama(h):
    """Switches of Llama. h: config.json."""
    bias = h.get("attention_bias", False)
    return dict(qk_norm=False, qkv_bias=bias, o_bias=bias, mlp_bias=h.get("mlp_bias", False))


def sliding(h):
    """Switches of Mistral and Phi-3: every layer has the window. h: config.json."""
    return dict(qk_norm=False, sliding_window=h.get("sliding_window", 0))


def qwen2(h):
    """Switches of Qwen2. h: config.json."""
    return dict(qk_norm=False, qkv_bias=True, **qwen_window(h))


def qwen3(h):
    """Switches of Qwen3. h: config.json."""
    bias = h.get("attention_bias", False)
    return dict(qkv_bias=bias, o_bias=bias, **qwen_window(h))


def qwen_window(h):
    """Switches of Qwen's sliding window, which only later layers have. h: config.json."""
    if not h.get("use_sliding_window"):               # a window may be written, and off
        return {}
    slides = [i >= h.get("max_window_layers", 28) for i in range(h["num_hidden_layers"])]
    return dict(sliding_window=h.get("sliding_window", 0),
                layer_types=h.get("layer_types") or [WINDOWS[slide] for slide in slides])


BIASED = dict(qk_norm=False, mlp_bias=True, gated=False, layer_norm=True)


def gpt2(h):
    """Switches of GPT-2. h: config.json. Raises UserError for an unknown scale of attention."""
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if h.get(name, usual) != usual:
            raise UserError(f"GPT-2 with {name} = {h[name]} is not supported")
    return dict(BIASED, qkv_bias=True, o_bias=True, learned_positions=True)


def smollm3(h):
    """Switches of SmolLM3, which has no rotary positions in every fourth layer. h: config.json."""
    layers, step = range(h["num_hidden_layers"]), h.get("no_rope_layer_interval", 4)
    turning = h.get("no_rope_layers") or [int((i + 1) % step != 0) for i in layers]
    window = {}
    if h.get("use_sliding_window"):
        window = dict(sliding_window=h.get("sliding_window", 0),
                      layer_types=h.get("layer_types") or [WINDOWS[not turning[i]] for i in layers])
    return dict(llama(h), no_rope_layers=turning[:len(layers)], **window)


def granite(h):
    """Switches of Granite: four multipliers. h: config.json."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return dict(llama(h), **{name: float(h.get(name, 1.0)) for name in names})


def olmo2(h):
    """Switches of OLMo 2: norms behind attention and MLP. h: config.json."""
    return dict(llama(h), mlp_bias=False, norms="after", qk_norm=True, qk_norm_whole=True)


def gemma3(h):
    """Switches of Gemma 3's text models. h: config.json. Raises UserError for caps on scores or logits."""
    refuse_set(h, "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    step, bias = h.get("sliding_window_pattern", 6), h.get("attention_bias", False)
    slides = [WINDOWS[(i + 1) % step != 0] for i in range(h["num_hidden_layers"])]
    return dict(qkv_bias=bias, o_bias=bias, norms="both", unit_offset=True, sliding_window=h.get("sliding_window", 0),
                layer_types=h.get("layer_types") or slides,
                embedding_multiplier=h["hidden_size"] ** 0.5, attention_multiplier=h["query_pre_attn_scalar"] ** -0.5)


def gpt_neox(h):
    """Switches of GPT-NeoX (Pythia). h: config.json."""
    bias = h.get("attention_bias", True)
    return dict(BIASED, qkv_bias=bias, o_bias=bias, parallel=2 if h.get("use_parallel_residual", True) else 0)


def phi(h):
    """Switches of Phi-1, 1.5 and 2. h: config.json."""
    return dict(BIASED, qkv_bias=True, o_bias=True, head_bias=True, parallel=1, qk_norm=h.get("qk_layernorm", False))


def refuse_set(h, *names):
    """Raises UserError for a field of config.json, h, that is set to something that model.py does not compute."""
    for name in names:
        if h.get(name):
            raise UserError(f"{name} = {h[name]} is not supported")


QWEN = dict(max_position_embeddings=32768, intermediate_size=22016, num_key_value_heads=32, sliding_window=4096)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
AFTER = (("attention_out_norm.", "post_attention_layernorm."), ("mlp_out_norm.", "post_feedforward_layernorm."))
FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qwen3, defaults=dict(QWEN, head_dim=128)),
    "qwen2": Family("Qwen2ForCausalLM", qwen2, defaults=QWEN),
    "llama": Family("LlamaForCausalLM", llama, defaults=dict(max_position_embeddings=2048, intermediate_size=11008)),
    "mistral": Family("MistralForCausalLM", sliding, defaults=dict(
        max_position_embeddings=131072, intermediate_size=14336, num_key_value_heads=8, sliding_window=4096)),
    "phi3": Family("Phi3ForCausalLM", sliding, rope_types=("default", "longrope"), partial=True,
                   old_rope_types={"su": "longrope", "yarn": "longrope"}, defaults=dict(
        max_position_embeddings=4096, original_max_position_embeddings=4096, intermediate_size=8192,
        rms_norm_eps=1e-5), tensors=(
        ("self_attn.qkv_proj", QKV, ""), ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), ""))),
    "smollm3": Family("SmolLM3ForCausalLM", smollm3, defaults=dict(
        max_position_embeddings=32768, intermediate_size=11008, num_key_value_heads=4, rope_theta=2e6,
        tie_word_embeddings=True)),
    "granite": Family("GraniteForCausalLM", granite, defaults=dict(
        max_position_embeddings=2048, intermediate_size=11008)),
    "olmo2": Family("Olmo2ForCausalLM", olmo2, defaults=dict(
        max_position_embeddings=2048, intermediate_size=11008, rms_norm_eps=1e-5), prefixes=AFTER),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", gemma3, rope_types=("default", "linear"), renamed=dict(hidden_act="hidden_activation"),
        defaults=dict(max_position_embeddings=131072, intermediate_size=9216, num_key_value_heads=4, head_dim=256,
                      tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh", rope_theta=1e6, sliding_window=4096,
                      query_pre_attn_scalar=256, rope_local_base_freq=10000.0),
        prefixes=(*AFTER, ("post_attention_layernorm.", "pre_feedforward_layernorm."))),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", gpt_neox, unnamed=("num_key_value_heads", "head_dim"), partial=True,
        defaults=dict(max_position_embeddings=2048, intermediate_size=24576, hidden_act="gelu", rms_norm_eps=1e-5,
                      partial_rotary_factor=0.25),
        renamed=dict(rms_norm_eps="layer_norm_eps", partial_rotary_factor="rotary_pct", rope_theta="rotary_emb_base"),
        tensors=(("attention.query_key_value", QKV, "by head"), ("attention.dense", ("self_attn.o_proj",), ""),
                 ("mlp.dense_h_to_4h", ("mlp.up_proj",), ""), ("mlp.dense_4h_to_h", ("mlp.down_proj",), "")),
        prefixes=(("model.layers.", "gpt_neox.layers."), ("model.embed_tokens.", "gpt_neox.embed_in."),
                  ("model.norm.", "gpt_neox.final_layer_norm."), ("lm_head.", "embed_out."))),
    "phi": Family(
        "PhiForCausalLM", phi, partial=True, renamed=dict(rms_norm_eps="layer_norm_eps"),
        defaults=dict(max_position_embeddings=2048, intermediate_size=8192, hidden_act="gelu_new", rms_norm_eps=1e-5,
                      partial_rotary_factor=0.5),
        prefixes=(("self_attn.o_proj.", "self_attn.dense."), ("mlp.up_proj.", "mlp.fc1."),
                  ("mlp.down_proj.", "mlp.fc2."), ("model.norm.", "model.final_layernorm."),
                  ("self_attn.q_norm.", "self_attn.q_layernorm."), ("self_attn.k_norm.", "self_attn.k_layernorm."))),
    "gpt2": Family(
        "GPT2LMHeadModel", gpt2, unnamed=("num_key_value_heads", "head_dim"), rope_types=(),
        defaults=dict(max_position_embeddings=1024, tie_word_embeddings=True, hidden_act="gelu_new", rms_norm_eps=1e-5),
        renamed=dict(hidden_size="n_embd", intermediate_size="n_inner", num_hidden_layers="n_layer",
                     num_attention_heads="n_head", max_position_embeddings="n_positions",
                     rms_norm_eps="layer_norm_epsilon", hidden_act="activation_function"),
        tensors=(("attn.c_attn", QKV, "transposed"), ("attn.c_proj", ("self_attn.o_proj",), "transposed"),
                 ("mlp.c_fc", ("mlp.up_proj",), "transposed"), ("mlp.c_proj", ("mlp.down_proj",), "transposed")),
        prefixes=(("model.layers.", "transformer.h."), ("input_layernorm.", "ln_1."),
                  ("post_attention_layernorm.", "ln_2."), ("model.embed_tokens.", "transformer.wte."),
                  ("model.embed_positions.", "transformer.wpe."), ("model.norm.", "transformer.ln_f."))),
}
EXPERTS = "it is a mixture of experts, and model.py has one MLP for all tokens"
RECURRENT = "some of its layers are recurrent, and model.py has attention alone"
REFUSED = {                                 # families that would need another block: why
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe",
                     "llama4"), EXPERTS),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "granitemoehybrid", "jamba", "qwen3_next", "qwen3_5",
                     "qwen3_5_text", "recurrent_gemma", "rwkv"), RECURRENT),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "its attention keeps latent vectors in place of keys and values"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "some of its layers are convolutions, and model.py has attention alone"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "its layers share caches and have embeddings of their own"),
    "gemma2": "it caps scores and logits, which no fast attention of PyTorch does",
    "gemma3": "it reads images, too; only text models (gemma3_text, such as the 270M and the 1B) are supported"}
# Other fields of config.json that are read; null means absent.
HUB_FIELDS = {"slm_format": (int, 0, 2 ** 31), **dict.fromkeys(("model_type", "base_model_type"), (str,)),
              **dict.fromkeys(("switches", "rope_scaling", "rope_parameters"), (dict,)),
              "compression": (list,), "history": ([dict],), "exits": ([int], 1, 10_000),
              **dict.fromkeys(("use_sliding_window", "attention_bias", "mlp_bias", "scale_attn_weights",
                               "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "qk_layernorm"), (bool,)),
              "no_rope_layers": ([int], 0, 1), "query_pre_attn_scalar": (float, 1e-6, 1e6),
              "rope_local_base_freq": (float, 1e-3, 1e30),
              **dict.fromkeys(("no_rope_layer_interval", "sliding_window_pattern"), (int, 1, 2 ** 31)),
              "layer_types": ([str],), "max_window_layers": (int, 0, 2 ** 31), **ROPE_FIELDS, **FIELDS}
ENTRY = {**dict.fromkeys(("step", "data", "data_sha256", "tokenizer"), (str,)), "seed": (int,), "batch_size": (int,),
         "context": (int, 1, 2 ** 24), "val_bits_per_byte": (float,), **dict.fromkeys(("parent", "teacher"), (dict,))}


def read_config(directory):
    """config.json as a dict, with fields of checked types and sizes. Raises UserError."""
    path = Path(directory) / "config.json"
    hub = read_json(path)
    family = FAMILIES.get(str(hub.get("base_model_type") or hub.get("model_type")))
    renamed = family.renamed if family else {}
    check_values({k: v for k, v in hub.items() if v is not None},
                 {renamed.get(k, k): rule for k, rule in HUB_FIELDS.items()}, path)
    for i, entry in enumerate(hub.get("history") or []):
        needed = ("step", "data") if "data_sha256" in entry else ("step",)
        check_values(entry, ENTRY, f"{path}: history, entry {i}", needed=needed)
    layers = hub.get(renamed.get("num_hidden_layers", "num_hidden_layers"))
    if hub.get("layer_types") and len(hub["layer_types"]) != layers:
        raise UserError(f"{path}: layer_types names {len(hub['layer_types'])} layers, but there are {layers}")
    method = hub.get("quantization_config") or hub.get("compression_config")
    if method:
        method = method.get("quant_method") if isinstance(method, dict) else None
        raise UserError(f"{path} has quantization_config{f' ({method})' if method else ''}: weights in that form are "
                        "not read here; take the model before it was quantized, or write it with transformers: "
                        "model.dequantize().save_pretrained(NEW_DIR)")
    return hub


def config_from_hub(hub, config_class):
    """The fields of config_class (Config) for a parsed config.json, as a dict.

    Raises UserError for a family or a setting that model.py does not have.
    """
    switches = hub.get("switches") or {}              # fields without a word in the family's format: see config_to_hub
    if hub.get("model_type") == COMPRESSED:
        hub = {**hub, "model_type": hub.get("base_model_type")}
    hub = {k: v for k, v in hub.items() if k not in ("base_model_type", "compression", "switches")}
    family = family_of(hub, switches, config_class)
    values = renamed_values(hub, family)
    fields = dict(num_key_value_heads=values["num_attention_heads"], intermediate_size=4 * values["hidden_size"],
                  head_dim=values["hidden_size"] // values["num_attention_heads"],
                  max_position_embeddings=family.defaults["max_position_embeddings"])
    fields.update({k: values[k] for k in COPIED if k in values and k not in family.unnamed})
    rope = dict(ROPE) if "rope" in switches else rope_from_hub(values, family, fields["max_position_embeddings"])
    if rope["rope_type"] == "longrope":               # the long factors begin behind the first window: we end there
        fields["max_position_embeddings"] = min(fields["max_position_embeddings"],
                                                rope["original_max_position_embeddings"])
    return {**fields, **family.switches(values), "model_type": hub["model_type"], "rope": rope, **switches, "hub": hub}


def family_of(hub, switches, config_class):
    """The Family of a parsed config.json. Raises UserError if this model.py cannot open it."""
    unknown = sorted(switches.keys() - ({f.name for f in dataclasses.fields(config_class)} - {"hub", "model_type"}))
    if unknown:
        raise UserError(f"config.json sets {', '.join(unknown)}, which Config in this model.py does not have: the "
                        "model was written by a changed model.py, and only that one opens it")
    if hub.get("slm_format", FORMAT) > FORMAT:
        raise UserError(f"this model was written by a newer version (format {hub['slm_format']}, known: {FORMAT}); "
                        "update this code")
    name, supported = hub.get("model_type"), f"supported: {', '.join(FAMILIES)}"
    if "auto_map" in hub and name != "phi3":          # Phi-3's directories carry a copy of the code in transformers
        raise UserError(f"the model brings its own code (auto_map in config.json), never run here; {supported}")
    if name in REFUSED:
        raise UserError(f"model_type {name!r} is not supported: {REFUSED[name]}")
    if name not in FAMILIES:
        raise UserError(f"model_type {name!r} is not supported; {supported}")
    return FAMILIES[name]


def renamed_values(hub, family):
    """The values of a parsed config.json under Config's names. Raises UserError for a missing size.

    An absent field has the family's default, a field that is null has none.
    """
    names = {hub_name: k for k, hub_name in family.renamed.items()}
    values = {**family.defaults, **{names.get(k, k): v for k, v in hub.items()}}
    values = {k: v for k, v in values.items() if v is not None}
    missing = [family.renamed.get(k, k) for k in SIZES[:4] if k not in values]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    return values


def rope_from_hub(values, family, window):
    """Config.rope for the values of a config.json, as transformers 5 reads them.

    window: positions. Raises UserError for a setting that transformers ignores for the family, or
    computes in another way.
    """
    if not family.rope_types:
        return dict(ROPE)
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}              # transformers 4 and 5
    rope = with_local_theta(rope, values) if "rope_local_base_freq" in family.defaults else rope
    rope = {k: v for k, v in rope.items() if v is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = family.old_rope_types.get(kind, kind)
    rope = {**ROPE, **{k: values[k] for k in ("rope_theta", "partial_rotary_factor") if k in values}, **rope,
            "rope_type": kind}
    refuse_rope(rope, family)
    if kind in ("llama3", "longrope", "yarn"):
        first = values if "original_max_position_embeddings" in family.defaults else rope
        rope["original_max_position_embeddings"] = first.get("original_max_position_embeddings", window)
    if kind in ("longrope", "yarn"):
        check_values(rope, ROPE_FIELDS, "config.json")
        rope.setdefault("factor", window / rope["original_max_position_embeddings"])
    return rope


def with_local_theta(rope, values):
    """Gemma 3's rotary positions, in both spellings: those of full layers, and the theta of sliding ones."""
    local = rope.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise UserError(f"sliding layers with rope_type {local['rope_type']!r} are not supported")
    theta = local.get("rope_theta") or values["rope_local_base_freq"]
    return {**rope.get("full_attention", rope), "local_theta": theta}


def refuse_rope(rope, family):
    """Raises UserError for rotary positions that the family does not have in transformers."""
    if rope["rope_type"] not in family.rope_types:
        raise UserError(f"rope_type {rope['rope_type']!r} is not supported in {family.architecture}; supported: "
                        f"{', '.join(family.rope_types)}")
    foreign = [k for k, v in rope.items() if isinstance(v, dict)]
    if rope["partial_rotary_factor"] != 1 and not family.partial:
        foreign.append("partial_rotary_factor")
    if foreign:
        raise UserError(f"{family.architecture} has no rotary positions with {foreign[0]}; take it out of config.json "
                        "if the model was trained without it")


def config_to_hub(config):
    """config.json as a dict: the one that was read, with the present shapes.

    Fields of Config that the family's format cannot express, and that would therefore come back
    with another value, stand unchanged under "switches".
    """
    hub = family_config(config)
    read = type(config)(**config_from_hub(hub, type(config)))
    switches = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
                if f.name != "hub" and getattr(config, f.name) != getattr(read, f.name)}
    return {**hub, "switches": switches} if switches else hub


def family_config(config):
    """config.json as a dict, under the family's names."""
    family, kind = FAMILIES[config.model_type], config.rope["rope_type"]
    skipped = {*family.unnamed, *(["max_position_embeddings"] if kind == "longrope" else [])}
    fields = {family.renamed.get(k, k): getattr(config, k) for k in COPIED if k not in skipped}
    expressible = kind in family.rope_types and (family.partial or config.rope["partial_rotary_factor"] == 1)
    rope = config.rope if expressible else ROPE
    new = dict(rope_parameters=rope, rope_theta=rope["rope_theta"], attention_bias=False, use_cache=True)
    if config.model_type == "mistral":                # absent, it would be 4,096
        new["sliding_window"] = config.sliding_window or None
    others = {k: v for k, v in config.hub.items() if k not in ("auto_map", "torch_dtype", "exits", "card", "sampling")}
    return {"architectures": [family.architecture], "model_type": config.model_type, **(others or new), **fields,
            "slm_format": FORMAT}


# Buffers in old checkpoints, not weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


def tensors_from_hub(tensors, config, model_tensors):
    """Tensors under model.py's names: fused ones are split, transposed ones turned back.

    tensors: {the family's name: tensor}; model_tensors: the model's own, for the shapes
    """
    family, shapes = FAMILIES[config.model_type], {name: t.shape for name, t in model_tensors.items()}
    result = {}
    for name, t in tensors.items():
        if name.endswith(BUFFERS):
            continue
        if config.model_type == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name              # the first GPT-2 checkpoints lack this prefix
        for model_prefix, hub_prefix in family.prefixes:
            name = name.replace(hub_prefix, model_prefix)
        names, layout = parts_of(name, family)
        if layout == "transposed" and t.ndim == 2:
            t = t.t().contiguous()                                                    # (in, out) -> (out, in)
        if layout == "by head" and len(t) % (3 * config.num_attention_heads) == 0:    # -> (3 * heads * D, ...)
            t = t.unflatten(0, (config.num_attention_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        rows = [shapes[n][0] if n in shapes else 0 for n in names]
        if len(names) == 1 or sum(rows) != len(t):    # a wrong sum is reported by name and shape later
            result[names[0]] = t
        else:
            result.update(zip(names, t.split(rows)))  # (sum of rows, in) -> (rows, in) each
    return result


def parts_of(name, family):
    """(model.py's names of the tensors fused in the family's `name`, their layout in it)."""
    module, _, kind = name.rpartition(".")            # kind: weight or bias
    for hub_module, parts, layout in family.tensors:
        if module.endswith("." + hub_module):
            return [module.removesuffix(hub_module) + part + "." + kind for part in parts], layout
    return [name], ""


def tensors_to_hub(tensors, config):
    """Tensors under the family's names: the inverse of tensors_from_hub."""
    family = FAMILIES[config.model_type]
    result = dict(tensors)
    for hub_module, parts, layout in family.tensors:
        for name in [n for n in result if n.rpartition(".")[0].endswith("." + parts[0])]:
            module, _, kind = name.rpartition(".")
            base = module.removesuffix(parts[0])
            t = torch.cat([result.pop(base + part + "." + kind) for part in parts])   # (rows, in) each -> (sum, in)
            if layout == "transposed" and t.ndim == 2:
                t = t.t().contiguous()                                                # (out, in) -> (in, out)
            if layout == "by head":                                # (3 * heads * D, ...) -> (heads * 3 * D, ...)
                t = t.unflatten(0, (3, config.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)
            result[base + hub_module + "." + kind] = t
    for model_prefix, hub_prefix in reversed(family.prefixes):
        result = {name.replace(model_prefix, hub_prefix): t for name, t in result.items()}
    return result
