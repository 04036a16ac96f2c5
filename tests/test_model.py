"""The model against independent references: transformers on tiny random models of every family, and itself."""
import json

import pytest
import torch

from data import UserError
from data.machine import accelerate
from data.native import library
from model import Config, KVCache, Transformer, attention_by_formula, load, save
from shared import config_of

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
    model = accelerate(load(tmp_path / "theirs"))
    same(model(ids), expected)
    for grad in (True, False):                                                 # without gradients: in C, where it can be
        with torch.set_grad_enabled(grad):
            cache = KVCache(model.config, 2, 40)                               # prefill, a second piece, single tokens
            logits = [model(ids[:, :9], cache=cache), model(ids[:, 9:20], cache=cache)]
            logits += [model(ids[:, t:t + 1], cache=cache) for t in range(20, 40)]
            same(torch.cat(logits, dim=1), expected)
    assert name == "GPT2" or library()[0] is None or cache.decoder
    save(model, tmp_path / "ours")                                             # and back
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(reference)
    same(again(ids).logits.detach(), expected, 1e-6)
    same(accelerate(load(tmp_path / "ours"))(ids), model(ids), 0)


# --- the model by itself ---

def test_changing_a_token_leaves_earlier_logits_alone():
    model, ids = randomize(tiny()), torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 96
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.equal(a[:, 11:], b[:, 11:])


def test_last_positions_hidden_states_and_headless_agree():
    model, ids, hidden = randomize(tiny()), torch.randint(96, (2, 9)), []
    logits = model(ids, hidden=hidden)
    for last in (1, 3):
        same(model(ids, last=last), logits[:, -last:], 1e-6)
        with torch.no_grad():                                                  # few rows: in C
            same(model(ids[:1], last=last), logits[:1, -last:], 1e-5)
    same(model.lm_head(model(ids, head=False)), logits, 1e-6)
    assert len(hidden) == 4 and all(h.shape == (2, 9, 32) for h in hidden)
    same(model.model.norm(hidden[-1]), model(ids, head=False), 1e-6)


def test_counts():
    model = tiny(tie_word_embeddings=True)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert model.matmul_parameters() == 3 * block + 96 * 32
    assert model.parameters_count() == 3 * (block + 2 * 32 + 2 * 8) + 96 * 32 + 32
    assert model.resident_bytes() == 4 * model.parameters_count()
    attended = sum(range(1, 11)) / 10                                          # keys a position sees, on average
    assert model.flops_per_token(10) == 2 * model.matmul_parameters() + 3 * 4 * attended * 4 * 8


def test_fresh_model_is_uniform():
    logits = tiny()(torch.randint(96, (2, 9)))
    assert logits.abs().max() == 0


# --- directories ---

def written(tmp_path, **changes):
    model = randomize(tiny(**changes))
    save(model, tmp_path / "m")
    return model, tmp_path / "m"


@pytest.mark.parametrize("tie", [False, True])
def test_round_trip_also_in_16_bits_and_in_shards(tmp_path, tie):
    from safetensors.torch import load_file, save_file
    model, path = written(tmp_path, tie_word_embeddings=tie)
    ids = torch.randint(96, (1, 9))
    again = load(path)
    same(again(ids), model(ids), 0)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie and again.config == model.config or again.config.hub
    for dtype in (torch.bfloat16, torch.float16):
        save(load(path, dtype=dtype), tmp_path / "half")
        half = load(tmp_path / "half")
        assert half.lm_head.weight.dtype == dtype and half.model.frequencies.dtype == torch.float32
        same(half.float()(ids), model(ids), 0.2)
    tensors = {k: t.clone() for k, t in load_file(path / "model.safetensors").items()}
    names = sorted(tensors)
    (path / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, path / f"model-{i}.safetensors")
    index = {"weight_map": {n: f"model-{k % 2}.safetensors" for k, n in enumerate(names)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    same(load(path)(ids), model(ids), 0)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="no model-1.safetensors"):
        load(path)


def test_old_and_new_spelling_of_rotary_settings():
    base = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    old = config_of({**base, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = config_of({**base, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}})
    assert torch.equal(old.frequencies()[0], new.frequencies()[0])
    assert torch.equal(config_of({**base, "rope_scaling": None}).frequencies()[0], config_of(base).frequencies()[0])


def test_strict_loading_names_what_is_wrong(tmp_path):
    from safetensors.torch import load_file, save_file
    _, path = written(tmp_path)
    weights, config = path / "model.safetensors", json.loads((path / "config.json").read_text(encoding="utf-8"))
    good, tensors = weights.read_bytes(), {k: t.clone() for k, t in load_file(weights).items()}     # not mapped

    def refused(match, **changes):
        changed = {k: v for k, v in {**config, **changes}.items() if v is not ...}
        (path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(UserError, match=match):
            load(path)
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")

    refused("model_type 'bloom' is not supported; supported: qwen3", model_type="bloom")
    refused("brings its own code", auto_map={"AutoModel": "evil.Model"})
    refused("newer version", slm_format=99)
    refused("lacks hidden_size", hidden_size=...)
    refused("is not a multiple of", num_key_value_heads=3)
    refused("rope_type 'proportional' is not supported", rope_parameters={"rope_type": "proportional", "factor": 2.0})
    refused("lacks tensor model.layers.3", num_hidden_layers=4)
    refused("unknown tensor model.layers.2", num_hidden_layers=2)
    refused("config.json says", intermediate_size=32)
    weights.write_bytes(good[:len(good) // 2])
    refused("truncated")
    weights.write_bytes(b"PK\x03\x04 a zip, not tensors" * 99)
    refused("truncated or not a safetensors file")
    save_file({**tensors, "evil.weight": torch.zeros(3)}, weights)
    refused("unknown tensor evil.weight")
    save_file({k: v for k, v in tensors.items() if "q_norm" not in k}, weights)
    refused("lacks tensor model.layers.0.self_attn.q_norm.weight and 2 more")
    weights.unlink()
    refused("has no model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    refused("pytorch_model.bin: a pickle may run code")
    (path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load(path)


def test_a_window_that_cannot_grow_is_refused_beyond():
    model = Transformer(Config(**{**TINY, "num_key_value_heads": 4}, head_dim=8, learned_positions=True)).initialize()
    with pytest.raises(UserError, match="more than this model's window of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_a_save_cut_at_any_point_leaves_a_whole_model(tmp_path):
    """The states that a kill can leave: before, between and after the two renames."""
    import shutil
    first, path = written(tmp_path)
    second = randomize(tiny(), seed=1)
    save(second, tmp_path / "second")
    ids, new, old = torch.randint(96, (1, 9)), tmp_path / ".m.new", tmp_path / ".m.old"

    shutil.copytree(tmp_path / "second", new)
    (new / "config.json").unlink()                                # killed while writing: m.new is not whole
    same(load(path)(ids), first(ids), 0)
    shutil.rmtree(new)
    shutil.copytree(tmp_path / "second", new)
    path.rename(old)                                              # killed between the renames
    same(load(path)(ids), second(ids), 0)
    third = randomize(tiny(), seed=2)

    def cut(directory):
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError):                             # the next save fails: what was whole is whole
        save(third, path, extra=cut)
    same(load(path)(ids), second(ids), 0)
    save(third, path)
    same(load(path)(ids), third(ids), 0)
    assert not new.exists() and not old.exists()
    shutil.copytree(tmp_path / "second", old)                     # killed before the last removal
    same(load(path)(ids), third(ids), 0)


def test_saving_does_not_replace_what_is_not_a_model(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="something else than a model"):
        save(tiny(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_full_disk_while_saving_keeps_the_previous_model(tmp_path):
    """On a real file system that is too small."""
    import errno, os, subprocess
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        small, big = randomize(tiny()), randomize(tiny(intermediate_size=1024))
        save(small, disk / "m")
        ids = torch.randint(96, (1, 9))
        for extra in (None, lambda new: torch.save({"x": torch.zeros(10 ** 6)}, new / "training_state.pt")):
            with pytest.raises(OSError) as error:
                save(small if extra else big, disk / "m", extra=extra)
            assert error.value.errno == errno.ENOSPC
            same(load(disk / "m")(ids), small(ids), 0)
            assert [p.name for p in disk.iterdir()] == ["m"]
    finally:
        subprocess.run(["umount", "-l", disk])


@pytest.mark.parametrize("K, window, segments", [(4, 0, False), (2, 0, False), (1, 5, False), (2, 0, True)])
def test_attention_is_the_written_formula(K, window, segments):
    """Attention.mix, by PyTorch's fused operation, against softmax(q k^T / sqrt(D)) v."""
    config = Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=K, head_dim=8, sliding_window=window, vocab_size=50)
    model = Transformer(config).initialize(torch.Generator().manual_seed(0)).eval()
    ids, attention = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(1)), model.model.layers[0].self_attn
    examples = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2]) if segments else None
    x, rotaries, masks = model.model.prepare(ids, segments=examples)
    mask = torch.ones(11, 11, dtype=torch.bool).tril() if masks[0] is None else masks[0]
    v = attention.v_proj(x).view(2, 11, K, 8).transpose(1, 2)
    formula = attention_by_formula(*attention.queries_keys(x, rotaries[0]), v, mask)
    torch.testing.assert_close(attention.mix(x, rotaries[0], masks[0]), formula.transpose(1, 2).flatten(2))
