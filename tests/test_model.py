"""The model against independent references: transformers on tiny random models of every family, and itself."""
import json

import pytest
import torch

from data import UserError
from model import FAMILIES, Config, KVCache, Transformer, load, save, whole

TINY = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)


def tiny(**changes):
    return Transformer(Config(**{**TINY, "head_dim": 8, **changes})).initialize(torch.Generator().manual_seed(0)).eval()


def randomize(model, seed=0):
    """Weights large enough that a wrong layout, norm or bias shows in the logits."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1) * 0.5)
    return model


def same(a, b, tolerance=1e-4):
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item() / 10), (a - b).abs().max()


# --- transformers: every family, both directions ---

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[2.0, 3.0, 4.0])
CASES = {
    "llama": ("Llama", dict(TINY)),
    "llama-tied-biased": ("Llama", dict(TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama3-scaled": ("Llama", dict(TINY, head_dim=16, rope_parameters=dict(LLAMA3, rope_theta=500000.0))),
    "llama-linear": ("Llama", dict(TINY, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))),
    "mistral": ("Mistral", dict(TINY, sliding_window=None)),
    "mistral-nemo-sliding": ("Mistral", dict(TINY, head_dim=12, sliding_window=7)),
    "qwen2-tied": ("Qwen2", dict(TINY, tie_word_embeddings=True)),
    "qwen2-sliding": ("Qwen2", dict(TINY, use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(TINY, head_dim=16)),
    "qwen3-biased": ("Qwen3", dict(TINY, head_dim=8, attention_bias=True)),
    "phi3": ("Phi3", dict(TINY, pad_token_id=0, sliding_window=7)),
    "phi4-partial-longrope": ("Phi3", dict(TINY, pad_token_id=0, original_max_position_embeddings=48, max_position_embeddings=96,
                                           rope_parameters=dict(LONG, rope_theta=10000.0, partial_rotary_factor=0.75))),
    "gpt2": ("GPT2", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
}


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, settings = CASES[case]
    reference = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(
        getattr(transformers, name + "Config")(**settings, attn_implementation="eager"))
    randomize(reference).eval().save_pretrained(tmp_path / "theirs")
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits.detach()
    model = load(tmp_path / "theirs")
    same(model(ids), expected)
    cache = KVCache(model.config, 2, 40)                                       # prefill, a second piece, single tokens
    logits = [model(ids[:, :9], cache=cache), model(ids[:, 9:20], cache=cache)]
    logits += [model(ids[:, t:t + 1], cache=cache) for t in range(20, 40)]
    same(torch.cat(logits, dim=1), expected)
    save(model, tmp_path / "ours")                                             # and back
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(reference)
    same(again(ids).logits.detach(), expected, 1e-6)
    same(load(tmp_path / "ours")(ids), model(ids), 0)


def test_every_family_is_tested():
    assert set(FAMILIES) == {n.lower() for n, _ in CASES.values()}
