"""Adapters: LoRA merged at load, against the formula by brute force, and against peft where it is installed."""
import json, math

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from data import UserError
from data.checkpoints import checkpoint_hash
from data.tokenizer import Tokenizer
from model import Transformer, load, save
from shared import config_of
from test_model import randomize, same

TINY = dict(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64)
BASES = {
    "llama": dict(TINY, model_type="llama"),
    "phi3": dict(TINY, model_type="phi3"),
    "gpt2": dict(model_type="gpt2", vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": dict(TINY, model_type="gpt_neox"),
}
TARGETS = {"llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"],
           "phi3": ["model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"],
           "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_fc"],
           "gpt_neox": ["gpt_neox.layers.1.attention.query_key_value", "gpt_neox.layers.0.mlp.dense_4h_to_h"]}


def base(family, directory, **changes):
    model = randomize(Transformer(config_of({**BASES[family], **changes})).eval())
    save(model, directory, Tokenizer.from_bytes())
    return model


def adapter(directory, shapes, base="", r=3, **settings):
    """An adapter for modules of these shapes {name: (out, in)}: {name: (A, B)}."""
    g, pairs = torch.Generator().manual_seed(5), {}
    for name, (n_out, n_in) in shapes.items():
        pairs[name] = torch.randn(r, n_in, generator=g), torch.randn(n_out, r, generator=g) * 0.3
    tensors = {f"base_model.model.{name}.lora_{letter}.weight": t for name, pair in pairs.items() for letter, t in zip("AB", pair)}
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "base_model_name_or_path": str(base), "bias": "none", **settings}
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return pairs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("family", BASES)
def test_weights_become_those_of_the_formula(family, beside, rslora, tmp_path):
    model, ids = base(family, tmp_path / "base"), torch.randint(259, (1, 9), generator=torch.Generator().manual_seed(1))
    stored, transposed = load_file(tmp_path / "base" / "model.safetensors"), family == "gpt2"
    shapes = {n: tuple(stored[n + ".weight"].shape)[::-1 if transposed else 1] for n in TARGETS[family]}
    place = tmp_path / ("base" if beside else "lora")
    pairs = adapter(place, shapes, base="" if beside else tmp_path / "base", use_rslora=rslora, alpha_pattern={shapes.copy().popitem()[0]: 2})
    changed = {n: t.clone() for n, t in stored.items()}
    for i, (name, (a, b)) in enumerate(pairs.items()):
        alpha = 2 if i == len(pairs) - 1 else 8
        delta = alpha / (math.sqrt(3) if rslora else 3) * b @ a
        changed[name + ".weight"] += delta.T if transposed else delta
    expected_at = tmp_path / "expected"
    save(model, expected_at)
    save_file(changed, expected_at / "model.safetensors")
    merged = load(place)
    same(merged(ids), load(expected_at)(ids), 2e-5)
    assert (merged(ids) - model(ids)).abs().max() > 0.1
    save(merged, tmp_path / "merged", Tokenizer.load(place))
    assert load(tmp_path / "merged").history[-1] == merged.history[-1] and merged.history[-1]["step"] == "adapter"
    assert merged.history[-1]["name"] == place.name and merged.history[-1]["modules"] == len(pairs)
    same(load(tmp_path / "merged")(ids), merged(ids), 0)
    compress.main([str(place), "int8", "--out", str(tmp_path / "int8")])
    assert [e["step"] for e in load(tmp_path / "int8").history] == ["adapter", "int8"]
    if not beside:
        assert checkpoint_hash(place) != checkpoint_hash(tmp_path / "base")


def test_the_base_may_be_a_run(tmp_path):
    base("llama", tmp_path / "run" / "best")
    for name in ("../run", tmp_path / "run", "../run/best"):
        adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (32, 32)}, base=name)
        merged = load(tmp_path / "lora").state_dict()["model.layers.0.self_attn.q_proj.weight"]
        plain = load(tmp_path / "run").state_dict()["model.layers.0.self_attn.q_proj.weight"]
        assert (merged - plain).abs().max() > 0.1


def test_half_precision_is_merged_in_float32(tmp_path):
    base("llama", tmp_path / "base")
    half = load(tmp_path / "base", dtype=torch.bfloat16)
    save(half, tmp_path / "half", Tokenizer.from_bytes())
    name = "model.layers.0.self_attn.q_proj"
    (a, b), = adapter(tmp_path / "lora", {name: (32, 32)}, base=tmp_path / "half").values()
    weight = half.get_submodule(name).weight.detach()
    expected = (weight.float() + 8 / 3 * b @ a).bfloat16()
    assert torch.equal(load(tmp_path / "lora").get_submodule(name).weight, expected)


def test_modules_to_save_replace_those_of_the_base(tmp_path):
    base("llama", tmp_path / "base")
    adapter(tmp_path / "lora", {}, base=tmp_path / "base", modules_to_save=["lm_head"])
    head = torch.randn(259, 32)
    save_file({"base_model.model.lm_head.weight": head}, tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(load(tmp_path / "lora").lm_head.weight, head)


def test_what_is_refused_names_the_way_out(tmp_path):
    base("llama", tmp_path / "base")
    name, place = "model.layers.0.self_attn.q_proj", tmp_path / "lora"

    def refused(match, shapes=None, **settings):
        adapter(place, {name: (32, 32)} if shapes is None else shapes, **{"base": tmp_path / "base", **settings})
        with pytest.raises(UserError, match=match):
            load(place)

    refused("is an adapter of org/Base-1B, which is not a directory here: write the base", base="org/Base-1B")
    refused("peft_type 'IA3' is not supported", peft_type="IA3")
    refused("bias = 'all' is not supported", bias="all")
    refused("use_dora is not supported, only plain LoRA; merge it with peft", use_dora=True)
    refused("init_lora_weights = 'pissa'", init_lora_weights="pissa")
    refused("alpha_pattern", alpha_pattern={"(a+)+": 3})
    refused("lora_alpha is 'x'", lora_alpha="x")
    refused("which the base model does not have", {"model.layers.7.self_attn.q_proj": (32, 32)})
    refused(r"is \(16, 32\), the base model's weight \(32, 32\)", {name: (16, 32)})
    adapter(place, {name: (32, 32)}, base=tmp_path / "base")
    tensors = load_file(place / "adapter_model.safetensors")
    for key, t, match in ((f"base_model.model.{name}.lora_magnitude_vector", torch.ones(32), "no part of a plain LoRA"),
                          (f"base_model.model.{name}.lora_A.weight", torch.full((3, 32), math.nan), "of finite numbers"),
                          (f"base_model.model.{name}.lora_A.weight", torch.ones(2, 32), "no two fitting factors"),
                          ("base_model.model.lm_head.weight", torch.ones(300, 32), "in the base model")):
        save_file({**tensors, key: t}, place / "adapter_model.safetensors")
        with pytest.raises(UserError, match=match):
            load(place)
    (place / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load(place)
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="is a pickle, which may run code"):
        load(place)
    base("llama", tmp_path / "tied", tie_word_embeddings=True)
    refused("the head is the embedding", {"model.embed_tokens": (32, 259)}, base=tmp_path / "tied")
    compress.main([str(tmp_path / "base"), "int8", "--out", str(tmp_path / "int8")])
    refused("only dense layers can be adapted", base=tmp_path / "int8")
    adapter(tmp_path / "base", {name: (32, 32)})
    refused("which holds an adapter itself")


@pytest.mark.parametrize("family, targets, more", [
    ("llama", ["q_proj", "down_proj"], {}), ("llama", ["embed_tokens", "lm_head"], {}),
    ("llama", ["v_proj"], dict(modules_to_save=["lm_head"], rank_pattern={"layers.1.self_attn.v_proj": 2}, alpha_pattern={"v_proj": 5})),
    ("phi3", ["qkv_proj", "o_proj"], dict(use_rslora=True)), ("gpt2", ["c_attn", "c_proj"], {}),
    ("gpt_neox", ["query_key_value"], {})])
def test_peft_gives_the_same_logits(family, targets, more, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base(family, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", **more)).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    model.save_pretrained(tmp_path / "lora")
    ids = torch.randint(259, (1, 9), generator=g)
    same(load(tmp_path / "lora")(ids), model(ids).logits.detach(), 1e-4)
    assert Tokenizer.load(tmp_path / "lora").vocab_size == 259
