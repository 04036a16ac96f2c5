"""The families that came later: logits, tokenizers, files and steps, against transformers on tiny random models."""
import pytest
import torch

from data.hub import FAMILIES
from data.machine import accelerate
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


def reference(case, directory, seed=0):
    """A random model of transformers, saved in `directory`."""
    transformers = pytest.importorskip("transformers")
    name, settings = CASES[case]
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))(**settings, attn_implementation="eager")
    model = randomize(getattr(transformers, name + "ForCausalLM")(config), seed).eval()
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
