"""Writes a model and its tokenizer as one GGUF file, for llama.cpp and Ollama: the step gguf.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import dataclasses, errno, functools, json, re, shutil
from pathlib import Path

import numpy as np
import torch

from data import UserError
from data.files import replacing_file
from data.structure import is_quantized
from data.tiktoken_plan import GPT2, GPT2_DIGITS, QWEN2

GGUF_TYPES = ("f32", "f16", "q8_0", "q4_0")
GGUF_NAMES = {                              # the Hub's name: GGUF's; that of a layer begins with "blk.N."
    "model.embed_tokens": "token_embd", "model.embed_positions": "position_embd", "model.norm": "output_norm",
    "lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "attention_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm"}
# The type of quantized layers: same integers, same scales. mixed: each layer its own, in a file called q4_0.
GGUF_STORED = {"int8": "q8_0", "int4": "q4_0", "mixed": "q4_0"}
GGUF_FUSED = {"gpt2": {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv"}}
GGUF_FUSED["gptneox"] = GGUF_FUSED["gpt2"]
GGUF_FUSED["phi3"] = {**GGUF_FUSED["gpt2"], "ffn_gate": "ffn_up"}        # the rows of the gate come first
INTERLEAVED = ("llama", "granite", "smollm3")          # they turn neighbouring channels: see `interleaved`
# What llama.cpp's code for an architecture computes: values of Config's fields; () for any value.
TANH = ("gelu_new", "gelu_pytorch_tanh")
USUAL = dict(hidden_act=("silu",), norms=("before",), parallel=(0,), unit_offset=(False,), head_bias=(False,),
             qk_norm_whole=(False,), embedding_multiplier=(1.0,), residual_multiplier=(1.0,),
             attention_multiplier=(0.0,), logits_scaling=(1.0,))
COMPUTED = {
    "qwen3": dict(qkv_bias=(False,)), "gpt2": dict(hidden_act=TANH),
    "smollm3": dict(qkv_bias=(False,), o_bias=(False,), mlp_bias=(False,)),
    "granite": dict(embedding_multiplier=(), residual_multiplier=(), attention_multiplier=(), logits_scaling=()),
    "olmo2": dict(norms=("after",), qk_norm_whole=(True,), qkv_bias=(False,), o_bias=(False,),
                  tie_word_embeddings=(False,)),
    # GELU by its tanh approximation, off by up to 0.0005
    "gptneox": dict(hidden_act=("gelu", *TANH), parallel=(0, 2), qkv_bias=(True,), o_bias=(True,),
                    tie_word_embeddings=(False,)),
    "phi2": dict(hidden_act=TANH, parallel=(1,), head_bias=(True,), qk_norm=(False,))}

# llama.cpp reads no regex of a pre-tokenizer: it has code for each of these, by name.
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4O = (TEKKEN.replace(r"\p{M}]+|[", r"\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[")
         .replace(r"]*|\p{N}|", r"]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"))
PRE_TOKENIZERS = {GPT2: "gpt-2", GPT2_DIGITS: "smollm", QWEN2: "qwen2", LLAMA3: "llama-bpe", TEKKEN: "tekken",
                  GPT4O: "gpt-4o"}


def gguf_step(model, tokenizer, step, args):
    """Step gguf of a chain: writes --out."""
    write_gguf(model, tokenizer, step.value, Path(args.out), Path(args.model).resolve().name)
    return model, tokenizer, {"step": step.name}


def import_gguf():
    """The gguf package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("the step gguf needs a package that is not installed: pip install gguf") from None
    return gguf


def q8_0_blocks(integers, scales):
    """Q8_0 rows of int8 weights: value = integer * scale, one scale for 32 integers of a row.

    integers (rows, cols) int8, scales (rows, cols / 32) float16 -> (rows, cols / 32 * 34) uint8.
    Where a whole row shares one scale, repeat it. Raises ValueError if the shapes do not fit.
    """
    rows, cols = integers.shape
    if cols % 32 or scales.shape != (rows, cols // 32):
        raise ValueError(f"integers {integers.shape} need scales {(rows, cols / 32)}, not {scales.shape}")
    d = np.ascontiguousarray(scales, "<f2").view(np.uint8).reshape(rows, -1, 2)
    q = np.ascontiguousarray(integers, np.int8).view(np.uint8).reshape(rows, -1, 32)
    return np.concatenate((d, q), axis=2).reshape(rows, -1)


def q4_0_blocks(integers, scales):
    """Q4_0 rows of 4-bit weights: value = integer * scale, one scale for 32 integers of a row.

    integers (rows, cols) int8 in -8..7, scales (rows, cols / 32) float16 -> (rows, cols / 32 * 18)
    uint8. A byte holds elements i (low nibble) and i + 16 (high nibble) of a block, as integer + 8.
    Raises ValueError if the shapes or the integers do not fit.
    """
    rows, cols = integers.shape
    if cols % 32 or scales.shape != (rows, cols // 32):
        raise ValueError(f"integers {integers.shape} need scales {(rows, cols / 32)}, not {scales.shape}")
    if integers.min(initial=0) < -8 or integers.max(initial=0) > 7:
        raise ValueError("4-bit integers lie in -8..7")
    d = np.ascontiguousarray(scales, "<f2").view(np.uint8).reshape(rows, -1, 2)
    q = (integers + 8).astype(np.uint8).reshape(rows, -1, 32)
    return np.concatenate((d, q[..., :16] | q[..., 16:] << 4), axis=2).reshape(rows, -1)


def stored_blocks(layer):
    """The rows of a quantized layer in blocks of 32; a larger group repeats the scale in each."""
    integers, scales = (t.cpu().numpy() for t in layer.integers())
    scales = np.repeat(scales, integers.shape[1] // 32 // scales.shape[1], axis=1)
    return (q8_0_blocks if layer.bits == 8 else q4_0_blocks)(integers, scales)


def gguf_mismatch(model, kind):
    """The reason why quantized layers do not fit a file of this type, as text; None: they fit."""
    blocks = {e["kind"] for e in model.compression if ".layers." in e["module"]}
    rounding = [e["step"] for e in model.history if e["step"] in (*GGUF_STORED, "dequantize")]
    blocks = {"mixed"} if blocks and rounding[-1:] == ["mixed"] else blocks
    fit = {GGUF_STORED[k] for k in blocks}
    if fit and kind not in fit:
        return (f"gguf:{kind}: the model's layers are {' and '.join(sorted(blocks))}, which goes unchanged into "
                f"gguf:{' or gguf:'.join(sorted(fit))} only; write that, or put the step dequantize before gguf:{kind}")
    for name, m in model.named_modules():
        if is_quantized(m) and m.in_features % 32:
            return (f"gguf:{kind}: rows of {m.in_features} ({name.removesuffix('.table')}) do not divide into blocks "
                    "of 32; put the step dequantize before gguf")
    return None


def unsupported_by_llama_cpp(c):
    """A feature of a Config that llama.cpp's architecture lacks, as text; None: it has all."""
    arch = gguf_architecture(c)
    for name, values in {**USUAL, **COMPUTED.get(arch, {})}.items():
        if values and getattr(c, name) not in values:
            return f"{name} {getattr(c, name)!r}"
    if c.no_rope_layers != ([int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)] if arch == "smollm3" else None):
        return "layers without rotary positions other than every fourth"
    if not c.learned_positions and (missing := unsupported_rope(c.rope, arch)):
        return missing
    if arch == "phi2" and c.num_key_value_heads != c.num_attention_heads:
        return f"num_key_value_heads {c.num_key_value_heads} other than num_attention_heads"
    if arch not in ("llama", "qwen3", "smollm3") and c.num_attention_heads * c.head_dim != c.hidden_size:
        return f"num_attention_heads x head_dim ({c.num_attention_heads} x {c.head_dim}) other than hidden_size"
    return None


def unsupported_rope(rope, arch):
    """A kind of rotary positions that llama.cpp's architecture lacks, as text; None: it has it."""
    if rope["rope_type"] not in ("default", "linear", "dynamic"):            # dynamic: plain within our window
        only = {"llama3": "llama", "longrope": "phi3"}.get(rope["rope_type"])
        if arch != only:
            return f"rope_type {rope['rope_type']!r}" + (f" (only {only} models have it)" if only else "")
    if arch not in ("phi3", "gptneox", "phi2") and rope["partial_rotary_factor"] != 1:
        return f"partial_rotary_factor {rope['partial_rotary_factor']} (only phi3, gptneox and phi2 models have it)"
    return None


def gguf_architecture(config):
    """llama.cpp's name of the architecture."""
    return {"mistral": "llama", "gpt_neox": "gptneox", "phi": "phi2"}.get(config.model_type, config.model_type)


def gguf_metadata(writer, gguf, config, kind):
    """Writes shapes and constants under GGUF's keys. Returns the context length in tokens."""
    c = config
    # llama.cpp attends to all tokens before: up to the length of a sliding window that is the same.
    context = min([c.max_position_embeddings, *filter(None, map(c.window, range(c.num_hidden_layers)))])
    writer.add_type("model")
    writer.add_file_type({"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
                          "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    if c.layer_norm:
        writer.add_layer_norm_eps(c.rms_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if not c.learned_positions:
        writer.add_rope_freq_base(c.rope["rope_theta"])
        writer.add_rope_dimension_count(2 * len(c.frequencies()[0]))
    if c.model_type == "gpt_neox":
        writer.add_parallel_residual(c.parallel == 2)
    if c.model_type == "granite":
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_attention_scale(c.attention_multiplier or c.head_dim ** -0.5)
        writer.add_logit_scale(c.logits_scaling)
    if c.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope["factor"])
    if c.rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(c.max_position_embeddings)
        writer.add_rope_scaling_attn_factors(c.frequencies()[1])
    return context


def word_regex(data):
    """The regex that cuts text into words; None: this is not byte-level BPE with one regex."""
    pre, model = data.get("pre_tokenizer") or {}, data["model"]
    *first, last = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or "merges" not in model:
        return None
    if last.get("use_regex", True):
        digits = [s.get("type") for s in first] == ["Digits"] and first[0].get("individual_digits")
        return GPT2 if not first else GPT2_DIGITS if digits else None
    # matches are words, and the rest is removed: the same, as these regexes leave no rest
    whole_text = [("Isolated", False), ("Removed", True)]
    if len(first) == 1 and (first[0].get("behavior"), first[0].get("invert", False)) in whole_text:
        return first[0]["pattern"].get("Regex")
    return None


def gguf_tokenizer(writer, gguf, tokenizer, size):
    """Writes the vocabulary of `size` ids, merges, special tokens and chat template.

    Raises UserError if llama.cpp has no such pre-tokenizer, or if the model has too few ids.
    """
    data, regex = tokenizer.data, word_regex(tokenizer.data)
    if regex not in PRE_TOKENIZERS:
        raise UserError(f"gguf: the tokenizer's pre-tokenizer ({regex or json.dumps(data.get('pre_tokenizer'))[:200]}) "
                        f"is none of those with a name in llama.cpp ({', '.join(PRE_TOKENIZERS.values())})")
    if tokenizer.vocab_size > size:
        raise UserError(f"gguf: the tokenizer has {tokenizer.vocab_size} ids, the model only {size}")
    if data.get("normalizer"):
        print("llama.cpp does not normalize text as this tokenizer does: text that is not in that form gets other ids")
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for token, i in data["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in data.get("added_tokens") or []:                # these are not spelled in the byte alphabet
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
    ids = {token: i for i, token in enumerate(tokens)}

    def id_of(key):
        name = tokenizer.config.get(key)
        return ids.get(name.get("content") if isinstance(name, dict) else name, tokenizer.eos_id)

    writer.add_tokenizer_model("gpt2")                          # byte-level BPE of any family
    writer.add_tokenizer_pre(PRE_TOKENIZERS[regex])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    adds_bos = tokenizer.bos_id is not None
    writer.add_add_bos_token(adds_bos)
    # Without a name the end of text also begins one. (llama.cpp's default is id 11.)
    writer.add_bos_token_id(tokenizer.bos_id if adds_bos else id_of("bos_token"))
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(id_of("pad_token"))
    # Programs with another Jinja may not know the tags that mark text for trainers.
    writer.add_chat_template(re.sub(r"{% (end)?generation %}", "", tokenizer.chat_template))


def gguf_pieces(model):
    """{name in the file: [(tensor or quantized layer, heads to interleave or None), ...]}.

    GGUF_FUSED puts several tensors in one.
    Raises UserError for a tensor that GGUF_NAMES lacks.
    """
    c, arch, pieces = model.config, gguf_architecture(model.config), {}
    heads_of = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    for name, t in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        if module == "lm_head" and c.tie_word_embeddings or suffix == "scales":
            continue                                            # llama.cpp takes token_embd where there is no output
        if suffix == "q":                                       # integers and scales are written together
            t, suffix, module = model.get_submodule(module), "weight", module.removesuffix(".table")
        layer, local = "", module
        if name.startswith("model.layers."):
            _, _, number, *local = module.split(".")
            layer, local = f"blk.{number}.", ".".join(local)
        if local not in GGUF_NAMES or suffix not in ("weight", "bias"):
            tensor = ".".join(filter(None, (local, suffix))).removesuffix(".weight")
            raise UserError(f"gguf: export.py does not know {tensor}, so llama.cpp would compute another model: add it "
                            f"to GGUF_NAMES if llama.cpp's {arch} has it")
        gguf_name = GGUF_FUSED.get(arch, {}).get(GGUF_NAMES[local], GGUF_NAMES[local])
        heads = heads_of.get(local) if arch in INTERLEAVED else None
        pieces.setdefault(f"{layer}{gguf_name}.{suffix}", []).append((t, heads))
    return pieces


def gguf_type(name, t, kind, types):
    """The GGML type of a tensor or quantized layer in a file of this kind."""
    if is_quantized(t):
        return types.Q8_0 if t.bits == 8 else types.Q4_0
    if t.ndim == 1 or name.startswith("position_embd"):         # added, not multiplied: llama.cpp keeps them too
        return types.F32
    return types.F16 if kind.startswith("q") and t.shape[1] % 32 else types[kind.upper()]


def encoded(name, pieces, ggml_type, gguf):
    """The numpy array of a tensor of the file. Raises UserError for values beyond float16."""
    arrays = []
    for t, heads in pieces:
        if is_quantized(t):
            rows = stored_blocks(t)
        elif ggml_type != gguf.GGMLQuantizationType.F32 and t.abs().max() > 65504:
            raise UserError(f"gguf: {name} has values too large for float16: write gguf:f32")
        else:
            rows = gguf.quants.quantize(t.detach().float().cpu().numpy(), ggml_type)
        arrays.append(interleaved(rows, heads) if heads else rows)
    return np.ascontiguousarray(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])


def rope_factors(c):
    """{name: factors (R/2,)} that llama.cpp divides the rotary frequencies of a Config by."""
    if c.rope["rope_type"] == "llama3":
        plain = dataclasses.replace(c, rope={**c.rope, "rope_type": "default"})
        return {"rope_freqs": plain.frequencies()[0] / c.frequencies()[0]}
    if c.rope["rope_type"] == "longrope":
        return {f"rope_factors_{k}": torch.tensor(c.rope[f"{k}_factor"]) for k in ("long", "short")
                if f"{k}_factor" in c.rope}
    return {}


def gguf_tensors(model, kind, gguf):
    """The tensors of a file: [(name, shape, GGML type, function that gives the numpy array), ...].

    Arrays are made one at a time, when written: a second model need not fit in memory.
    """
    tensors, types = [], gguf.GGMLQuantizationType
    for name, pieces in gguf_pieces(model).items():
        ggml_type, *others = {gguf_type(name, t, kind, types) for t, _ in pieces}
        if others:
            raise UserError(f"gguf: {name} joins layers of different types; put the step dequantize before gguf")
        shapes = [(t.out_features, t.in_features) if is_quantized(t) else tuple(t.shape) for t, _ in pieces]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        tensors.append((name, shape, ggml_type, functools.partial(encoded, name, pieces, ggml_type, gguf)))
    for name, factors in rope_factors(model.config).items():
        array = factors.numpy().astype(np.float32)
        tensors.append((f"{name}.weight", array.shape, types.F32, functools.partial(np.asarray, array)))
    return tensors


def interleaved(rows, heads):
    """Rows (heads * D, ...) of a query or key projection in the order of the architectures INTERLEAVED.

    The Hub's rotary positions turn channels (i, i + D/2) of a head, llama.cpp's (2i, 2i + 1).
    Encoded rows are reordered as plain ones are: a block never spans two rows.
    """
    # (heads * D, ...) -> (heads, 2, D/2, ...) -> (heads, D/2, 2, ...) -> (heads * D, ...)
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model, tokenizer, kind, path, name="model"):
    """Writes a model and its tokenizer as one GGUF file for llama.cpp, atomically.

    kind  f32, f16, q8_0 or q4_0: the type of matrices. Vectors (norms, biases) stay f32; a matrix
          whose rows do not divide into blocks of 32 stays f16 and is named on standard output.
          Quantized layers keep integers and scales, and must be of this kind in the blocks; those of
          the step mixed keep their own kinds in a file of kind q4_0
    Raises UserError for a model that llama.cpp cannot express, and without the gguf package.
    """
    gguf, config = import_gguf(), model.config
    if config.model_type == "gemma3_text":
        raise UserError("gguf: Gemma 3 is not written here, as llama.cpp takes its tokenizer from tokenizer.model: "
                        "convert the directory with llama.cpp's convert_hf_to_gguf.py")
    if missing := unsupported_by_llama_cpp(config):
        raise UserError(f"gguf: llama.cpp's {gguf_architecture(config)} has no {missing}")
    if mismatch := gguf_mismatch(model, kind):
        raise UserError(mismatch)
    writer = gguf.GGUFWriter(None, gguf_architecture(config))
    writer.add_name(name)
    context = gguf_metadata(writer, gguf, config, kind)
    gguf_tokenizer(writer, gguf, tokenizer, config.vocab_size)
    tensors, total = gguf_tensors(model, kind, gguf), 0
    for tensor_name, shape, ggml_type, _ in tensors:
        block, size = gguf.GGML_QUANT_SIZES[ggml_type]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), nbytes, raw_dtype=ggml_type)
        total += nbytes
    with replacing_file(path) as new:
        try:
            writer.write_header_to_file(new)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, _, _, array in tensors:
                writer.write_tensor_data(array())
        except OSError as error:                                # numpy's tofile does not say why it could not write
            if error.errno is None and shutil.disk_usage(path.parent).free < total:
                raise OSError(errno.ENOSPC, f"no space left while writing {path}") from None
            raise
        finally:
            writer.close()
    if context < config.max_position_embeddings:
        print(f"context length {context}: the sliding window's; llama.cpp has none for this architecture")
    plain = [n for n, shape, t, _ in tensors if kind.startswith("q") and t == gguf.GGMLQuantizationType.F16]
    if plain:
        print(f"f16 instead of {kind}, as their rows do not divide into blocks of 32: {', '.join(plain)}")
    print(f"{path}: {gguf_architecture(config)}, {kind}, {path.stat().st_size / 1e6:,.1f} MB")
