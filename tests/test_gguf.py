"""GGUF export: read back with the gguf package, tensor by tensor; and, where llama-cpp-python is installed, its ids and logits."""
import json, shutil, types

import numpy as np
import pytest
import torch

import compress
import sample
from data import UserError, export
from data.chain import parse_step
from data.tiktoken_plan import GPT2, QWEN2
from data.tokenizer import Tokenizer
from data.vocabulary import tokenizer_json
from model import Int4Linear, Int8Linear, Transformer, save
from shared import config_of
from data.structure import dequantize

V, CONTEXT = 320, 256                                            # llama.cpp rounds contexts up to 256
TINY = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=CONTEXT)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
CASES = {
    "qwen3": dict(TINY, model_type="qwen3", head_dim=32),
    "qwen3-tied-linear": dict(TINY, model_type="qwen3", head_dim=16, tie_word_embeddings=True,
                              rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5000.0)),
    "qwen2": dict(TINY, model_type="qwen2", rope_theta=1e6),
    "llama": dict(TINY, model_type="llama"),
    "llama-biased-tied": dict(TINY, model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3-scaled": dict(TINY, model_type="llama", rope_scaling=LLAMA3, rope_theta=500000.0),
    "llama-linear": dict(TINY, model_type="llama", rope_scaling=dict(rope_type="linear", factor=2.0)),
    "mistral-nemo": dict(TINY, model_type="mistral", head_dim=24, sliding_window=40),
    "phi3": dict(TINY, model_type="phi3"),
    "phi4-longrope": dict(TINY, model_type="phi3", original_max_position_embeddings=CONTEXT, max_position_embeddings=4 * CONTEXT,
                          rope_scaling=LONG, partial_rotary_factor=0.75),
    "gpt2": dict(model_type="gpt2", vocab_size=V, n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=CONTEXT),
}
TEXTS = {
    "prose": "It's a truth universally acknowledged, that I'LL DON'T we'd; \u201cquoted\u201d \u2014 na\u00efve r\u00e9sum\u00e9.",
    "code": "def f(x, *args):\n    if x >= 10 ** 3:\n\t\treturn {'a': [x[1:-1]]}  # done\n\n\nclass A(B): pass\n",
    "digits": "1234567890 3.14159 1,000,000 0x7fff 20240229T12:34 \u00bd \u0663\u0664",
    "emoji": "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 ok \u2764\ufe0f\U0001f1e9\U0001f1ea!",
    "cjk": "\u4e2d\u6587\u5b57\u7b26\u3001\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "spaces": "a  b   c    d" + " " * 37 + "e \t  f   ", "newlines": "\n\na\n\n\n  b\r\n\r\n c\n", "special": "<|im_start|>user\nhi<|im_end|>",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*TEXTS.values()] * 3, 300)


def build(case, **changes):
    """A tiny model with weights large enough that a wrong layout, norm or bias shows in the logits."""
    model = Transformer(config_of({**CASES[case], **changes})).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.25 if p.ndim > 1 else 0.5) + (p.ndim == 1) * 0.5)
    return model


def read(path):
    """(fields, tensors as float32 in torch's order of dimensions, GGML type names) of a GGUF file."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def expected(model):
    """The same tensors from the model, by the definition of each GGUF architecture."""
    family, c, result = model.config.model_type, model.config, {}
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output", "q_proj": "attn_q",
             "k_proj": "attn_k", "v_proj": "attn_v", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, p in model.named_parameters():                     # tied parameters come once
        module, kind = name.split(".")[-2:]
        p, blk = p.detach().numpy(), name.split(".")[2:3]
        if family in ("llama", "mistral") and module in ("q_proj", "k_proj"):
            D = c.head_dim                                       # Hub row h D + i is llama.cpp's h D + 2i, i + D/2 its 2i + 1
            order = [h * D + i + half for h in range(len(p) // D) for i in range(D // 2) for half in (0, D // 2)]
            p = p[order]
        if module in names:
            result[f"blk.{blk[0]}.{names[module]}.{kind}"] = p
        else:
            top = {"embed_tokens": "token_embd", "embed_positions": "position_embd", "norm": "output_norm", "lm_head": "output"}
            result[f"{top[module]}.{kind}"] = p
    fuse = {"phi3": [("attn_qkv", "attn_q", "attn_k", "attn_v"), ("ffn_up", "ffn_gate", "ffn_up")],
            "gpt2": [("attn_qkv", "attn_q", "attn_k", "attn_v")]}.get(family, [])
    for fused, *parts in fuse:
        for name in [n for n in result if f".{parts[0]}." in n]:
            result[name.replace(parts[0], fused)] = np.concatenate([result.pop(name.replace(parts[0], p)) for p in parts])
    return result


# --- blocks from integers we already have ---

@pytest.mark.parametrize("kind, low, high", [("q8_0", -127, 127), ("q8_0", -128, 127), ("q4_0", -7, 7), ("q4_0", -8, 7)])
def test_blocks_keep_integers_and_scales(kind, low, high):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    integers = rng.integers(low, high + 1, (5, 96)).astype(np.int8)
    integers[0, :2] = low, high
    scales = rng.uniform(-2, 2, (5, 3)).astype(np.float16)
    scales[1] = 2.0 ** -24                                       # the smallest float16
    blocks = getattr(export, f"{kind}_blocks")(integers, scales)
    assert blocks.dtype == np.uint8 and blocks.shape == (5, 3 * {"q8_0": 34, "q4_0": 18}[kind])
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(values, integers * np.repeat(scales.astype(np.float32), 32, axis=1))
    again = gguf.quants.dequantize(export.interleaved(blocks[:4], 2), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(again, export.interleaved(values[:4], 2))           # encoded rows can be put in another order


def test_blocks_say_what_does_not_fit():
    ones = np.ones((2, 64), np.int8)
    for blocks in (export.q8_0_blocks, export.q4_0_blocks):
        with pytest.raises(ValueError, match="need scales"):
            blocks(ones, np.ones((2, 3), np.float16))
        with pytest.raises(ValueError, match="need scales"):
            blocks(ones[:, :40], np.ones((2, 1), np.float16))
    with pytest.raises(ValueError, match="-8..7"):
        export.q4_0_blocks(ones * 8, np.ones((2, 2), np.float16))


# --- a file, read back ---

@pytest.mark.parametrize("case", CASES)
def test_tensors_of_every_family(case, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    model = build(case)
    export.write_gguf(model, tokenizer, "f32", tmp_path / "m.gguf")
    fields, tensors, kinds = read(tmp_path / "m.gguf")
    c, arch = model.config, fields["general.architecture"]
    assert arch == {"mistral": "llama"}.get(c.model_type, c.model_type)
    want = expected(model)
    extra = {n: t for n, t in tensors.items() if n.startswith("rope_f")}
    assert tensors.keys() - extra.keys() == want.keys() and set(kinds.values()) == {"F32"}
    for name, p in want.items():
        assert np.array_equal(tensors[name], p), name
    figures = {n.removeprefix(arch + "."): v for n, v in fields.items() if n.startswith(arch + ".")}
    assert figures["context_length"] == (40 if "mistral" in case else CONTEXT)
    assert (figures["block_count"], figures["embedding_length"], figures["feed_forward_length"]) == (2, 64, 96)
    assert (figures["attention.head_count"], figures["attention.head_count_kv"]) == (4, 4 if arch == "gpt2" else 2)
    assert figures["attention.key_length"] == figures["attention.value_length"] == c.head_dim
    assert figures["vocab_size"] == V
    assert figures["attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"] == pytest.approx(c.rms_norm_eps)
    if arch != "gpt2":
        assert figures["rope.freq_base"] == c.rope["rope_theta"]
        assert figures["rope.dimension_count"] == (12 if "longrope" in case else c.head_dim)
        # what llama.cpp makes of it: theta^(-2i/R) / factors, / the linear factor
        R = figures["rope.dimension_count"]
        f = c.rope["rope_theta"] ** (-np.arange(0, R, 2) / R) / figures.get("rope.scaling.factor", 1.0)
        f = f / extra.get("rope_freqs.weight", extra.get("rope_factors_short.weight", 1.0))
        assert np.allclose(f, c.frequencies()[0].numpy(), rtol=1e-5)
        assert figures.get("rope.scaling.attn_factor", 1.0) == pytest.approx(c.frequencies()[1])


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("case", ["qwen3-tied-linear", "llama", "phi3", "gpt2"])
def test_rounding_stays_within_the_type(case, kind, tokenizer, tmp_path, capsys):
    pytest.importorskip("gguf")
    model = build(case, **({"intermediate_size": 80} if case == "llama" else {}))               # 80 = 2.5 blocks
    export.write_gguf(model, tokenizer, kind, tmp_path / "m.gguf")
    fields, tensors, kinds = read(tmp_path / "m.gguf")
    assert fields["general.file_type"] == {"f16": 1, "q8_0": 7, "q4_0": 2}[kind] and fields["general.quantization_version"] == 2
    plain = [n for n in kinds if case == "llama" and "ffn_down" in n and kind != "f16"]
    assert ("ffn_down" in capsys.readouterr().out) == bool(plain)
    for name, p in expected(model).items():
        if p.ndim == 1 or "position" in name:
            assert kinds[name] == "F32" and np.array_equal(tensors[name], p)
        elif kind == "f16" or name in plain:
            assert kinds[name] == "F16" and np.array_equal(tensors[name], p.astype(np.float16).astype(np.float32))
        else:                                                    # half a step, or a whole one at q4_0's short end; float16 scales
            assert kinds[name] == kind.upper()
            blocks = np.abs(p).reshape(len(p), -1, 32).max(axis=2, keepdims=True)
            step = blocks / {"q8_0": 127, "q4_0": 8}[kind]
            bound = step * {"q8_0": 0.5, "q4_0": 1.0}[kind] + blocks * 2.0 ** -11
            assert (np.abs(tensors[name] - p).reshape(len(p), -1, 32) <= bound * 1.0001).all(), name


def quantized(model, step, head_bits=None):
    return compress.quantize_step(model, None, parse_step(step, compress.STEPS), types.SimpleNamespace(head_bits=head_bits))[0]


@pytest.mark.parametrize("case", ["qwen3", "qwen3-tied-linear", "llama", "llama-biased-tied", "mistral-nemo", "phi3", "gpt2"])
@pytest.mark.parametrize("step, kind, head_bits, head", [
    ("int8", "q8_0", None, "Q8_0"), ("int4", "q4_0", None, "Q4_0"), ("int4", "q4_0", 8, "Q8_0"), ("int8", "q8_0", 4, "Q4_0"),
    ("int4:64", "q4_0", None, "Q4_0"), ("int8", "q8_0", 16, "Q8_0")])
def test_quantized_layers_go_in_unchanged(case, step, kind, head_bits, head, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    wider = {} if step != "int4:64" else {"n_inner" if case == "gpt2" else "intermediate_size": 128}
    wider.update({"head_dim": 32} if step == "int4:64" and case == "mistral-nemo" else {})       # 4 x 24 is no multiple of 64
    model = quantized(build(case, **wider), step, head_bits)
    export.write_gguf(model, tokenizer, kind, tmp_path / "m.gguf")
    _, tensors, kinds = read(tmp_path / "m.gguf")
    want = expected(dequantize(model))
    assert tensors.keys() == want.keys() and ("output.weight" in kinds) == (not model.config.tie_word_embeddings)
    for name, p in want.items():
        outer = name.startswith(("token_embd", "output.weight"))
        assert kinds[name] == ("F32" if p.ndim == 1 or "position" in name else head if outer else kind.upper()), name
        if not (outer and head_bits == 16):                      # a float one is rounded by gguf, as it is in a dense model
            assert np.array_equal(tensors[name], p), name


def test_integers_and_scales_byte_for_byte(tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    for step, kind in (("int8", "q8_0"), ("int4", "q4_0")):
        model = quantized(build("qwen3"), step)
        export.write_gguf(model, tokenizer, kind, tmp_path / kind)
        data = {t.name: t.data for t in gguf.GGUFReader(tmp_path / kind).tensors}["blk.1.ffn_down.weight"]
        integers, scales = model.model.layers[1].mlp.down_proj.integers()                            # (64, 96); (64, 1 or 3)
        blocks = torch.from_numpy(np.array(data)).view(64, 3, -1)
        assert torch.equal(blocks[..., :2].contiguous().view(torch.float16)[..., 0], scales.expand(64, 3))
        q = blocks[..., 2:]
        theirs = q.contiguous().view(torch.int8) if kind == "q8_0" else (torch.cat((q & 15, q >> 4), -1)).to(torch.int8) - 8
        assert torch.equal(theirs.reshape(64, 96), integers)


@pytest.mark.parametrize("case, step, kind, match", [
    ("qwen3", "int8", "q4_0", "layers are int8, which goes unchanged into gguf:q8_0 only.*dequantize before gguf:q4_0"),
    ("qwen3", "int4", "q8_0", "layers are int4, which goes unchanged into gguf:q4_0 only"), ("qwen3", "int8", "f32", "gguf:q8_0 only"),
    ("qwen3", "int4", "f16", "gguf:q4_0 only"), ("odd", "int8", "q8_0", r"rows of 80 \(model.layers.0.mlp.down_proj\) do not divide")])
def test_quantized_layers_that_do_not_fit(case, step, kind, match, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    model = quantized(build("llama", intermediate_size=80) if case == "odd" else build(case), step)
    with pytest.raises(UserError, match=match):
        export.write_gguf(model, tokenizer, kind, tmp_path / "m.gguf")
    export.write_gguf(dequantize(model), tokenizer, kind, tmp_path / "m.gguf")


def test_a_fused_tensor_of_two_types(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    model = build("phi3")
    name = "model.layers.0.self_attn.k_proj"
    model.replace({"module": name, "kind": "int4", "group": 32}, Int4Linear.from_dense(model.get_submodule(name), group=32))
    export.write_gguf(model, tokenizer, "q4_0", tmp_path / "m.gguf")                            # q and v are rounded to its type
    with pytest.raises(UserError, match="blk.0.attn_qkv.weight joins layers of different types"):
        other = "model.layers.0.self_attn.q_proj"
        model.replace({"module": other, "kind": "int8"}, Int8Linear.from_dense(model.get_submodule(other)))
        export.write_gguf(model, tokenizer, "q4_0", tmp_path / "m.gguf")


def test_the_vocabulary(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    export.write_gguf(build("qwen3"), tokenizer, "f32", tmp_path / "m.gguf", name="a model")
    fields, _, _ = read(tmp_path / "m.gguf")
    get = lambda name: fields["tokenizer.ggml." + name]
    tokens, kinds, n = get("tokens"), get("token_type"), tokenizer.vocab_size
    assert fields["general.name"] == "a model" and get("model") == "gpt2" and get("pre") == "qwen2"
    assert len(tokens) == len(kinds) == V
    assert {t: i for i, t in enumerate(tokens[:n - 3])} == tokenizer.data["model"]["vocab"]
    assert tokens[n - 3:n] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and tokens[-1] == f"[PAD{V - 1}]"
    assert kinds == [1] * (n - 3) + [3] * 3 + [5] * (V - n)      # normal, control, unused
    assert get("merges") == [" ".join(m) for m in tokenizer.data["model"]["merges"]] and len(get("merges")) == n - 259
    assert get("eos_token_id") == get("bos_token_id") == get("padding_token_id") == tokenizer.eos_id
    assert get("add_bos_token") is False and fields["tokenizer.chat_template"] == (
        tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def changed(tokenizer, pre_tokenizer=None, added=(), config=(), **changes):
    data = {**json.loads(json.dumps(tokenizer.data)), **changes}
    data["pre_tokenizer"] = pre_tokenizer or data["pre_tokenizer"]
    data["added_tokens"] += [{**data["added_tokens"][0], **token} for token in added]
    return Tokenizer(data, {**tokenizer.config, **dict(config)})


def split(pattern):
    return tokenizer_json({}, [], {}, pattern)["pre_tokenizer"]


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, split(None)]}
KEPT = split(export.GPT4O)                                     # what Phi-4-mini has: keep the matches, drop the rest
KEPT["pretokenizers"][0].update(behavior="Removed", invert=True)


PRE_TOKENIZERS = [(split(QWEN2), "qwen2"), (split(None), "gpt-2"), (split(GPT2), "gpt-2"), (DIGITS, "smollm"),
                  (split(export.LLAMA3), "llama-bpe"), (split(export.TEKKEN), "tekken"), (split(export.GPT4O), "gpt-4o"),
                  (KEPT, "gpt-4o")]


@pytest.mark.parametrize("pre_tokenizer, name", PRE_TOKENIZERS)
def test_pre_tokenizers_have_a_name(pre_tokenizer, name, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    export.write_gguf(build("llama"), changed(tokenizer, pre_tokenizer), "q4_0", tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == name


def test_added_tokens_and_bos(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    n = tokenizer.vocab_size
    added = [{"id": n, "content": "<s>", "special": True}, {"id": n + 2, "content": "    ", "special": False}]      # n + 1: unused
    one = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    bos = {"type": "Sequence", "processors": [{**split(None), "trim_offsets": False}, {
        "type": "TemplateProcessing", "single": one, "pair": one + [{"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [n], "tokens": ["<s>"]}}}]}
    other = changed(tokenizer, added=added, config={"bos_token": {"content": "<s>"}, "pad_token": "<|im_end|>"}, post_processor=bos)
    export.write_gguf(build("llama"), other, "q4_0", tmp_path / "m.gguf")
    fields, _, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"][n:n + 3] == ["<s>", f"[PAD{n + 1}]", "    "]
    assert fields["tokenizer.ggml.token_type"][n:n + 3] == [3, 5, 4]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.padding_token_id"]) == (n, n - 1)
    assert fields["tokenizer.ggml.add_bos_token"] is True


# --- what cannot be written ---

@pytest.mark.parametrize("case, changes, match", [
    ("qwen3", dict(rope_scaling=LLAMA3), "qwen3 has no rope_type 'llama3'"),
    ("llama", dict(rope_scaling=dict(LONG, short_factor=[1.0] * 8, long_factor=[2.0] * 8)), "llama has no rope_type 'longrope'"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"), ("qwen2", dict(head_dim=32), "num_attention_heads x head_dim"),
    ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'"), ("gpt2", dict(activation_function="relu"), "hidden_act 'relu'"),
    ("qwen3", dict(attention_bias=True), "qkv_bias"), ("llama", dict(vocab_size=280), "the model only 280")])
def test_what_llama_cpp_does_not_have(case, changes, match, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=match):
        export.write_gguf(build(case, **changes), tokenizer, "f32", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_an_unknown_pre_tokenizer_and_values_beyond_float16(tokenizer, tmp_path):
    pytest.importorskip("gguf")
    model = build("llama")
    prefix, metaspace = {**split(None), "add_prefix_space": True}, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
    for pre, match in ((split(r"\w+|\W+"), r"\(\\w\+\|\\W\+\) is none"), (prefix, "add_prefix"), (metaspace, "Metaspace")):
        with pytest.raises(UserError, match=match):
            export.write_gguf(model, changed(tokenizer, pre), "f32", tmp_path / "m.gguf")
    model.model.embed_tokens.weight.data[3, 3] = 70000.0
    with pytest.raises(UserError, match="token_embd.weight has values too large"):
        export.write_gguf(model, tokenizer, "f16", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# --- the command ---

@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(build("qwen3"), path, tokenizer)
    return path


def run(*argv):
    compress.main(list(map(str, argv)))


def test_the_command_writes_and_overwrites_only_when_told(directory, tmp_path, capsys):
    pytest.importorskip("gguf")
    out = tmp_path / "new" / "m.gguf"
    run(directory, "gguf:q8_0", "--out", out)
    assert "qwen3, q8_0" in capsys.readouterr().out
    fields, _, kinds = read(out)
    assert fields["general.name"] == "tiny" and kinds["output.weight"] == "Q8_0"
    run(directory, "int8", "gguf:q8_0", "--out", out, "--overwrite")
    assert read(out)[2] == kinds
    before = out.read_bytes()
    with pytest.raises(UserError, match="is there already: give another name or --overwrite"):
        run(directory, "gguf:f32", "--out", out)
    assert out.read_bytes() == before
    run(directory, "gguf:f32", "--out", out, "--overwrite")
    assert out.stat().st_size > len(before) and [p.name for p in out.parent.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("steps, match", [
    (["ggfu:q8_0"], "no step 'ggfu'; did you mean gguf"), (["zzz"], "no step 'zzz'; there is .*int8, int4, mixed, dequantize, gguf"), (["gguf"], r"gguf is written gguf:f32\|f16\|q8_0\|q4_0"),
    (["gguf:q8"], "gguf is written gguf:f32.*did you mean q8_0"), (["gguf:q8_0:fast"], "gguf is written gguf:f32"),
    (["gguf:f32", "gguf:f16"], "gguf must be the last step"), (["gguf:f32:a:b"], "too many parts")])
def test_wrong_steps(steps, match, directory, tmp_path):
    with pytest.raises(UserError, match=match):
        run(directory, *steps, "--out", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_wrong_out_and_model(directory, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="is a directory; gguf writes a file"):
        run(directory, "gguf:f32", "--out", tmp_path)
    with pytest.raises(UserError, match="there is no directory"):
        run(tmp_path / "none", "gguf:f32", "--out", tmp_path / "m.gguf")
    with pytest.raises(UserError, match="--out"):
        run(directory, "gguf:f32")


def test_without_the_gguf_package(directory, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        run(directory, "gguf:f32", "--out", tmp_path / "m.gguf")


@pytest.mark.parametrize("error", [OSError("8 requested and 0 written"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_loses_nothing(error, directory, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF, an old one")
    calls = []

    def failing(self, tensor, original=gguf.GGUFWriter.write_tensor_data):
        calls.append(tensor)
        if len(calls) == 5:
            raise error
        original(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(type(error)) as raised:
        run(directory, "gguf:f32", "--out", tmp_path / "m.gguf", "--overwrite")
    assert not isinstance(error, OSError) or "no space left" in str(raised.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.gguf": b"GGUF, an old one"}


# --- llama.cpp itself ---

def llama(path, **options):
    """llama.cpp on one file, all in float32: keys and values too, which are float16 by default."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=1, type_k=0, type_v=0, verbose=False,
                           **{"logits_all": True, **options})


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    model = build(case)
    export.write_gguf(model, tokenizer, "f32", tmp_path / "m.gguf")
    llm = llama(tmp_path / "m.gguf")
    n = 20
    ids = torch.randint(V, (1, n), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids)[0].numpy()
    llm.eval(ids[0].tolist())
    assert np.abs(llm.scores[:n] - logits).max() <= (1e-2 if case == "gpt2" else 1e-4)         # its GELU is a float16 table
    if "mistral" in case:
        ids = ids[:, :8]                                         # 8 + 32 tokens are the window
    ours = [int(i) for i in sample.generate(model, ids, 32, temperature=0)]
    theirs = []
    for token in llm.generate(ids[0].tolist(), temp=0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 32:
            break
    assert theirs == ours


@pytest.mark.parametrize("pre_tokenizer, name", PRE_TOKENIZERS)
def test_llama_cpp_reads_the_same_ids(pre_tokenizer, name, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    added = [{"id": tokenizer.vocab_size, "content": "      ", "special": False}]               # found in any text
    other = changed(tokenizer, pre_tokenizer, added)
    export.write_gguf(build("llama"), other, "q8_0", tmp_path / "m.gguf")
    llm = llama(tmp_path / "m.gguf", vocab_only=True, logits_all=False)
    for text in TEXTS.values():
        for special in (False, True):
            assert llm.tokenize(text.encode("utf-8"), add_bos=True, special=special) == other.encode(text, special), text
