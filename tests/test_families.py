"""The families that came later: logits, tokenizers, files and steps, against transformers on tiny random models."""
import numpy as np
import pytest
import torch

from data import UserError, export
from data.hub import FAMILIES
from data.machine import accelerate
from data.tokenizer import Tokenizer
from model import KVCache, load, save
from test_model import CASES as OLDER, randomize, same

TINY = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)
NEOX = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
GEMMA = dict(TINY, head_dim=16, sliding_window=7, query_pre_attn_scalar=24,
             layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CASES = {
    "smollm3": ("SmolLM3", dict(TINY, pad_token_id=0, no_rope_layer_interval=2, tie_word_embeddings=True)),
    "smollm3-sliding": ("SmolLM3", dict(TINY, pad_token_id=0, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=7,
                                        attention_bias=True)),
    "granite": ("Granite", dict(TINY, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0781,
                                logits_scaling=6.0)),
    "granite-tied-biased": ("Granite", dict(TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, logits_scaling=8.0)),
    "olmo2": ("Olmo2", dict(TINY, rms_norm_eps=1e-5)),
    "olmo2-biased": ("Olmo2", dict(TINY, attention_bias=True, tie_word_embeddings=True)),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3-linear": ("Gemma3", dict(GEMMA, rope_scaling=dict(rope_type="linear", factor=8.0), layer_types=None)),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox-sequential": ("GPTNeoX", dict(NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5,
                                            rotary_emb_base=5000)),
    "phi": ("Phi", TINY),
    "phi-normed": ("Phi", dict(TINY, qk_layernorm=True, num_key_value_heads=4, partial_rotary_factor=1.0)),
    "llama-yarn": ("Llama", dict(TINY, rope_scaling=YARN)),
    "qwen3-yarn-mscale": ("Qwen3", dict(TINY, head_dim=16, rope_scaling=dict(
        YARN, mscale=0.7, mscale_all_dim=1.3, beta_fast=8, beta_slow=2, truncate=False))),
    "qwen2-yarn-attention": ("Qwen2", dict(TINY, rope_scaling=dict(YARN, attention_factor=0.8))),
    "llama-dynamic": ("Llama", dict(TINY, rope_scaling=dict(rope_type="dynamic", factor=2.0))),
}


def reference(case, directory, **changes):
    """A random model of transformers, saved in `directory`."""
    transformers = pytest.importorskip("transformers")
    name, settings = CASES[case]
    kind = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))
    model = getattr(transformers, name + "ForCausalLM")(kind(**{**settings, **changes}, attn_implementation="eager"))
    randomize(model).eval()
    model.save_pretrained(directory)
    return model


def test_every_family_is_tested():
    names = {"Gemma3": "gemma3_text", "GPTNeoX": "gpt_neox"}
    assert set(FAMILIES) == {names.get(n, n.lower()) for n, _ in [*CASES.values(), *OLDER.values()]}


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = reference(case, tmp_path / "theirs")
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits.detach()
    for model in (load(tmp_path / "theirs"), accelerate(load(tmp_path / "theirs"))):
        same(model(ids), expected)
        for grad in (True, False):                                             # without gradients: in C, where it can be
            with torch.set_grad_enabled(grad):
                cache = KVCache(model.config, 2, 40)                           # prefill, a second piece, single tokens
                logits = [model(ids[:, :9], cache=cache), model(ids[:, 9:20], cache=cache)]
                logits += [model(ids[:, t:t + 1], cache=cache) for t in range(20, 40)]
                same(torch.cat(logits, dim=1), expected)
    save(model, tmp_path / "ours")                                             # and back
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(theirs)
    same(again(ids).logits.detach(), expected, 1e-6)
    same(accelerate(load(tmp_path / "ours"))(ids), model(ids), 0)


# --- GGUF: names by the gguf package's own table, permutations as llama.cpp's convert_hf_to_gguf.py makes them ---

def converted(theirs, architecture, gguf):
    """{name in the file: array} for the tensors of a model of transformers."""
    names = gguf.get_tensor_name_map(architecture, theirs.config.num_hidden_layers)
    heads, result = theirs.config.num_attention_heads, {}
    groups = {"q_proj": heads, "k_proj": getattr(theirs.config, "num_key_value_heads", heads)}
    for name, t in theirs.state_dict().items():
        if name == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        t, part = t.numpy(), module.rpartition(".")[2]
        if part in groups and theirs.config.model_type in ("granite", "smollm3"):
            t = t.reshape(groups[part], 2, len(t) // groups[part] // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)
        if part == "query_key_value":
            by_head = t.reshape(heads, 3, -1, *t.shape[1:])
            t = np.concatenate([by_head[:, i].reshape(-1, *t.shape[1:]) for i in range(3)])
        result[f"{names.get_name(module)}.{kind}"] = t
    return result


@pytest.mark.parametrize("case, keys", [
    ("smollm3", {}), ("olmo2", {}), ("phi", {"rope.dimension_count": 4, "attention.layer_norm_epsilon": 1e-5}),
    ("granite", {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.0781, "logit_scale": 6.0}),
    ("granite-tied-biased", {"embedding_scale": 1.0, "attention.scale": 1.0, "logit_scale": 8.0}),
    ("gpt_neox", {"use_parallel_residual": True, "rope.dimension_count": 2}),
    ("gpt_neox-sequential-biased", {"use_parallel_residual": False, "rope.dimension_count": 4, "rope.freq_base": 5000})])
def test_gguf_is_what_llama_cpp_converts(case, keys, tmp_path):
    gguf = pytest.importorskip("gguf")
    more = {"phi": dict(num_key_value_heads=4), "smollm3": dict(no_rope_layer_interval=4), "gpt_neox-sequential-biased": dict(attention_bias=True)}
    theirs = reference(case.removesuffix("-biased") if "neox" in case else case, tmp_path / "m", **{"vocab_size": 259, **more.get(case, {})})
    export.write_gguf(load(tmp_path / "m"), Tokenizer.from_bytes(), "f32", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: f.contents() for name, f in reader.fields.items()}
    name = fields["general.architecture"]
    expected = converted(theirs, {n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[name], gguf)
    found = {t.name: t.data.reshape(t.shape[::-1].tolist()) for t in reader.tensors}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    figures = {"attention.head_count": 4, "block_count": 4, "embedding_length": 32, "feed_forward_length": 64, **keys}
    for key, value in figures.items():
        assert fields[f"{name}.{key}"] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("case, more, match", [
    ("gemma3", {}, "Gemma 3 is not written here"), ("smollm3", {}, "smollm3 has no layers without rotary positions other than every fourth"),
    ("olmo2-biased", {}, "olmo2 has no qkv_bias True"), ("phi", {}, "phi2 has no num_key_value_heads 2"), ("llama-yarn", {}, "no rope_type 'yarn'"),
    ("gpt_neox-sequential", {}, "gptneox has no qkv_bias False"), ("phi-normed", {}, "phi2 has no qk_norm True")])
def test_gguf_that_llama_cpp_does_not_read_is_refused(case, more, match, tmp_path):
    pytest.importorskip("gguf")
    reference(case, tmp_path / "m", vocab_size=259, **more)
    with pytest.raises(UserError, match=match):
        export.write_gguf(load(tmp_path / "m"), Tokenizer.from_bytes(), "f32", tmp_path / "m.gguf")
