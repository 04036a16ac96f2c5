"""A fork is heard: a changed line of attention, MLP or block is what runs, a switch of Config is what is saved."""
import dataclasses, json, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as model_module
import compress, sample, train
from data import UserError, native
from data.console import say_once
from data.machine import accelerate
from data.native import library
from data.tokenizer import Tokenizer
from model import MLP, Attention, Block, Config, KVCache, RMSNorm, Transformer, load, save

ROOT = Path(train.__file__).parent
SMALL = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=64)
OLD_ATTENTION, OLD_BLOCK, OLD_FORWARD = Attention.forward, Block.forward, Transformer.forward
OLD_HEADS, OLD_NORM, OLD_GRADIENT = Attention.to_heads, RMSNorm.forward, train.softmax_gradient


def build(**changes):
    model = Transformer(Config(**{**SMALL, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model


def decoded_as_read(model, ids=torch.arange(7, 27)[None], prompt=3):
    """Whether tokens read one at a time get the logits that they get when all are read at once."""
    cache = KVCache(model.config, 1, ids.shape[1])
    with torch.inference_mode():
        parts = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
        logits, whole = torch.cat([model(part, cache=cache) for part in parts], dim=1), model(ids)
    return bool((logits - whole).norm() < 1e-4 * whole.norm()), cache


def gated_attention(self, x, rotary, mask, cache):
    return OLD_ATTENTION(self, x, rotary, mask, cache) * x.mean(-1, keepdim=True).sigmoid()


def squared_relu(self, x):
    return self.down_proj(F.relu(self.gate_proj(x)).square() * self.up_proj(x))


def scaled_residual(self, x, rotary, mask, cache):
    return x + 0.5 * (OLD_BLOCK(self, x, rotary, mask, cache) - x)


def capped_logits(self, *args, **options):
    return 2 * (OLD_FORWARD(self, *args, **options) / 2).tanh()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part, change", [(Attention, gated_attention), (MLP, squared_relu), (Block, scaled_residual),
                                          (Transformer, capped_logits)])
@pytest.mark.parametrize("prompt", [3, 12])
def test_a_changed_forward_is_what_decodes(part, change, prompt, monkeypatch, capsys):
    assert decoded_as_read(accelerate(build()), prompt=prompt)[0]
    monkeypatch.setattr(part, "forward", change)
    say_once.cache_clear()
    same, cache = decoded_as_read(accelerate(build()), prompt=prompt)
    assert same and not vars(cache).get("decoder")
    said = capsys.readouterr().err
    assert library()[0] is None or said.count("\n") == 1 and "PyTorch generates, not the C kernels" in said


def turned_back(self, x, norm, rotary):
    return OLD_HEADS(self, x, norm, (rotary[0], -rotary[1]))


def shifted_norm(self, x):
    return OLD_NORM(self, x) + 0.5


def squared_relu_inside(self, x):
    return F.relu(self.gate_proj(x)).square() * self.up_proj(x)


@pytest.mark.parametrize("part, name, change", [(Attention, "to_heads", turned_back), (RMSNorm, "forward", shifted_norm),
                                                (MLP, "inner", squared_relu_inside)])
def test_a_changed_method_that_is_in_c_is_what_trains(part, name, change, monkeypatch, capsys):
    before, ids = build()(torch.arange(7, 27)[None]), torch.arange(7, 27)[None]
    monkeypatch.setattr(part, name, change)
    monkeypatch.setattr(native, "PROVEN", {})                                # it may have met this class before the change
    plain, model = build(), accelerate(build())
    say_once.cache_clear()
    (expected, wanted), (logits, found) = ((y, torch.autograd.grad(y.square().mean(), list(m.parameters())))
                                           for m in (plain, model) for y in (m(ids),))
    assert (logits - expected).norm() < 1e-4 * expected.norm() < 0.1 * (before - expected).norm()
    assert all((a - b).norm() <= 1e-3 * b.norm() + 1e-6 for a, b in zip(found, wanted))
    said = capsys.readouterr().err
    assert library()[0] is None or f"PyTorch computes {change.__qualname__}, not the C kernels" in said


def test_a_changed_loss_is_what_trains(capsys):
    def doubled(logits, targets):
        loss, grad = OLD_GRADIENT(logits, targets)
        return 2 * loss, 2 * grad

    functions, logits, targets = {"softmax_gradient": doubled}, torch.randn(5, 9), torch.tensor([3, -100, 0, 8, 8])
    accelerate(build(), functions=functions)
    loss, grad = functions["softmax_gradient"](logits.clone(), targets)
    want, its = doubled(logits.clone(), targets)
    assert torch.allclose(loss, want) and torch.allclose(grad, its)
    assert library()[0] is None or "PyTorch computes softmax_gradient" in capsys.readouterr().err


def test_a_subclass_of_a_layer_is_what_decodes():
    model = accelerate(build())
    for block in model.model.layers:
        layer = Doubled(64, 64, bias=False)
        layer.weight = block.self_attn.o_proj.weight
        block.self_attn.o_proj = layer
    assert decoded_as_read(model)[0]
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    assert decoded_as_read(model)[0]


def test_hooks_fire_at_each_pass(capsys):
    model, fired, ids = accelerate(build()), [], torch.arange(7, 16)[None]
    say_once.cache_clear()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: fired.append(1))
    assert len(list(sample.generate(model, ids, 13, temperature=0))) == len(fired) == 13
    handle.remove()
    assert library()[0] is None or "a hook is registered on it" in capsys.readouterr().err
    cache = KVCache(model.config, 1, 20)
    with torch.inference_mode():                                             # also one that comes in the middle of a text
        model(ids, cache=cache)
        assert library()[0] is None or cache.decoder
        handle = model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: fired.append(1))
        model(ids[:, :1], cache=cache)
        handle.remove()
        model(ids[:, :1], cache=cache)
    assert len(fired) == 14


def test_a_traced_model_is_the_model():
    """In a process of its own: it used to end in a segmentation fault."""
    code = ("import torch, sys; sys.path.insert(0, sys.argv[1]); from model import Config, Transformer\n"
            f"m = Transformer(Config(**{SMALL!r})).eval(); x = torch.arange(16)[None]\n"
            "with torch.no_grad():\n"
            "    for p in m.parameters(): torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None\n"
            "    assert (torch.jit.trace(m, (x,), check_trace=False)(x) - m(x)).abs().max() < 1e-4")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, ROOT], check=True)


# --- switches ---

SWITCHES = dict(sliding_window=8, qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, layer_norm=True,
                learned_positions=True, hidden_act="relu", rms_norm_eps=1e-3, tie_word_embeddings=True, layer_types=["sliding_attention"] * 3,
                rope=dict(rope_type="linear", rope_theta=500.0, partial_rotary_factor=0.5, factor=2.0))


@pytest.mark.parametrize("name", SWITCHES)
def test_load_of_save_is_the_model(name, tmp_path):
    changes = {name: SWITCHES[name]} | ({"sliding_window": 8} if name == "layer_types" else {})
    model, ids = build(**changes), torch.arange(7, 27)[None]
    save(model, tmp_path / "a", Tokenizer.from_bytes())
    again = load(tmp_path / "a")
    save(again, tmp_path / "b", Tokenizer.from_bytes())
    assert torch.equal(again(ids), model(ids)) and torch.equal(load(tmp_path / "b")(ids), model(ids))
    for field in dataclasses.fields(Config):
        assert field.name == "hub" or getattr(again.config, field.name) == getattr(model.config, field.name)
    hub = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert (hub["model_type"] == "slm-compressed") == ("switches" in hub) and set(hub.get("switches", {})) <= set(changes)
    transformers_says = "AutoModelForCausalLM" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert transformers_says == ("switches" not in hub)


def test_a_switch_of_a_fork_is_saved_and_one_that_is_not_known_is_refused(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Forked(Config):
        output_gate: float = 0.0

    monkeypatch.setattr(model_module, "Config", Forked)
    save(Transformer(Forked(**SMALL, output_gate=0.25)).initialize(), tmp_path / "m", Tokenizer.from_bytes())
    assert load(tmp_path / "m").config.output_gate == 0.25
    with pytest.raises(UserError, match="config.json cannot hold"):
        save(Transformer(Forked(**SMALL, output_gate={1, 2})).initialize(), tmp_path / "x", Tokenizer.from_bytes())
    monkeypatch.undo()
    with pytest.raises(UserError, match="output_gate, which Config in this model.py does not have"):
        load(tmp_path / "m")


def test_initialize_leaves_a_forks_parameters_alone():
    model = Transformer(Config(**SMALL))
    model.model.layers[0].gate, model.model.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.tensor(0.5))
    model.initialize()
    assert (model.model.layers[0].gate == 0).all() and model.model.scale == 0.5 and (model.model.norm.weight == 1).all()


@dataclasses.dataclass
class Forked(train.TrainConfig):
    z_loss: float = 0.0
    noisy: bool = True              # on


def test_flags_of_a_fork(capsys):
    cfg, given = train.parse(Forked, "", ["--z-loss", "0.1", "--no-noisy", "--preset", "gpu", "--no-compile"])
    assert cfg.z_loss == 0.1 and not cfg.noisy and not cfg.compile and cfg.width == 768 and "compile" in given
    with pytest.raises(SystemExit):
        train.parse(Forked, "", ["--help"])
    assert "--z-loss" in capsys.readouterr().out


# --- what does not know a fork's tensors refuses them by name ---

class Gated(Attention):
    """Attention with a gate for each head, a parameter that no table knows."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.ones(config.num_attention_heads))

    def mix(self, x, rotary, mask, cache=None):
        y = super().mix(x, rotary, mask, cache)
        return (y.unflatten(-1, (len(self.gate), -1)) * self.gate[:, None]).flatten(-2)


class Projected(Attention):
    """Attention with a linear layer that no table knows; it is the identity."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def mix(self, x, rotary, mask, cache=None):
        return super().mix(self.gate(x), rotary, mask, cache)


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """A function of a subclass of Attention and the steps of a chain, which it runs on a tiny model of that class."""
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i % 7}\n" for i in range(300)), encoding="utf-8")

    def make(attention, *steps):
        monkeypatch.setattr(model_module, "Attention", attention)
        model = build()
        for block in model.model.layers if attention is Projected else ():
            block.self_attn.gate.weight.data = torch.eye(64)
        save(model, tmp_path / "model", Tokenizer.from_bytes())
        calibration = ["--calibration", str(tmp_path / "text.txt"), "--calibration-windows", "4"]
        with_text = any(step.endswith(("gptq", "sparsegpt", "activation", "pca", "influence")) for step in steps)
        compress.main([str(tmp_path / "model"), *steps, "--out", str(tmp_path / "out"), "--overwrite",
                       *(calibration if with_text else ())])
        return load(tmp_path / "out")
    return make


@pytest.mark.parametrize("attention", [Gated, Projected])
@pytest.mark.parametrize("step", ["width:0.75:pca", "width:0.75:magnitude", "ffn:0.5:activation", "heads:0.5:magnitude"])
def test_slicing_refuses_a_tensor_without_axes(attention, step, forked):
    with pytest.raises(UserError, match="compress.py does not know self_attn.gate: add it to AXES"):
        forked(attention, step)


def test_a_layer_called_as_a_known_one_is_not_taken_for_it(forked):
    class Renamed(Attention):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.gate_proj = nn.Linear(config.hidden_size, 96, bias=False)       # the name of a layer of the MLP

    with pytest.raises(UserError, match="compress.py does not know self_attn.gate_proj: add it to AXES"):
        forked(Renamed, "ffn:0.5:magnitude")


@pytest.mark.parametrize("step", ["int4:gptq", "sparse:0.5:sparsegpt"])
def test_the_walk_refuses_a_linear_layer_that_it_does_not_visit(step, forked):
    with pytest.raises(UserError, match="compress.py does not know self_attn.gate: add it to SAME_INPUT"):
        forked(Projected, step)


def test_steps_that_need_to_know_no_layer_take_a_fork(forked):
    model = forked(Projected, "depth:0.67:influence", "int4")
    assert len(model.model.layers) == 2 and {e["module"].split(".")[-1] for e in model.compression} >= {"gate", "q_proj"}
    assert not hasattr(forked(Gated, "int4:gptq").model.layers[0].self_attn.q_proj, "weight")         # the gate is in by_group's mix


@pytest.mark.parametrize("attention", [Gated, Projected])
def test_gguf_refuses_a_tensor_without_a_name(attention, forked):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="gguf: export.py does not know self_attn.gate, .*add it to GGUF_NAMES"):
        forked(attention, "gguf:f32")
