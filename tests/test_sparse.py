"""Zeros and low rank: magnitude, Wanda, SparseGPT, plain and whitened SVD, and the pass that they share with GPTQ."""
import contextlib, copy, io, json, subprocess, sys
from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from data import UserError
from data.loader import Batch
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import Config, LowRankLinear, Transformer, load, save
from shared import config_of, correlated, hessian_of
from data.structure import body_layers, dequantize

TINY = dict(vocab_size=259, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """text.txt, and dense/ and tied/, whose weights are random and their inputs correlated."""
    root = tmp_path_factory.mktemp("sparse")
    (root / "text.txt").write_text("".join(f"def f{i}(x, y={i % 7}):\n    return x * {i % 13}\n" for i in range(300)), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("sparse-test", [root / "text.txt"], out=root / "data", tokenizer="bytes")
    for name in ("dense", "tied"):
        save(random_model(Config(**TINY, tie_word_embeddings=name == "tied")), root / name, Tokenizer.load(root / "data"))
    return root


def random_model(config):
    model, g = Transformer(config).eval(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.2, generator=g)
        if p.ndim == 2:                                           # a few channels larger than the rest
            p.data *= torch.logspace(0, -1, len(p))[torch.randperm(len(p), generator=g), None]
    return model


def run(root, name, *argv):
    """The model that a chain makes of one: a calibrated step looks at 16 windows of text.txt."""
    text = ("--calibration", root / "text.txt", "--calibration-windows", "16")
    calibrates = argv[0].endswith(("wanda", "sparsegpt", "whitened"))
    compress.main(list(map(str, [root / name, *argv, *(text if calibrates else ())])))
    return load(argv[argv.index("--out") + 1])


def linears(model):
    return {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}


def kl(dense, model, ids=torch.arange(96).view(3, 32) * 7 % 255):
    with torch.no_grad():
        p, q = (dequantize(copy.deepcopy(m))(ids).double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def damped(hessian):
    return hessian + 0.01 * hessian.diagonal().log().mean().exp() * torch.eye(len(hessian)).double()


def output_error(weight, other, x):
    return float(((weight - other).double() @ x.double().T).square().sum())


# --- zeros ---

@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("keep", ["0.5", "0.3", "2of4"])
def test_each_row_keeps_exactly_its_share(root, tmp_path, keep, method):
    model, dense = run(root, "tied", f"sparse:{keep}:{method}", "--out", tmp_path / "m"), load(root / "tied")
    assert not model.compression and model.parameters_count() == dense.parameters_count()
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    for name, layer in linears(model).items():
        weight = layer.weight
        if keep == "2of4":
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all(), name
        else:
            assert ((weight != 0).sum(1) == round(float(keep) * weight.shape[1])).all(), name
        if method != "sparsegpt":                                 # what stays is as it was
            assert torch.equal(weight[weight != 0], linears(dense)[name].weight[weight != 0])
    entry = model.history[-1]
    assert (entry["step"], entry["keep"], entry["method"]) == ("sparse", keep, method)
    assert ("calibration" in entry) == (method != "magnitude")


def test_wanda_is_brute_force():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 8, generator=g), torch.randn(20, 8, generator=g) * torch.logspace(0, 1, 8)
    for keep, groups, count in ((0.5, [range(8)], 4), (0.25, [range(8)], 2), ("2of4", [range(4), range(4, 8)], 2)):
        want = torch.zeros(4, 8)
        for i in range(4):
            for group in groups:
                scores = sorted(((abs(float(weight[i, j])) * float(x[:, j].norm()), j) for j in group), reverse=True)
                for _, j in scores[:count]:
                    want[i, j] = weight[i, j]
        assert torch.equal(compress.wanda(weight, hessian_of(x), keep), want)


def brute_sparsegpt(weight, hessian, keep, block):
    """Where the same leaves weights, by its definition, in float64: the inverse Hessian of the columns that are left is
    made anew each time, and they take the change that makes up best for a zero (Optimal Brain Surgeon)."""
    weight, n = weight.double().clone(), weight.shape[1]
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(n)]
    stays = torch.ones(weight.shape, dtype=torch.bool)
    for i in range(n):
        ahead = range(i, i + 4) if keep == "2of4" and i % 4 == 0 else range(i, n) if keep != "2of4" and i % block == 0 else []
        for row in range(len(weight)) if len(ahead) else ():
            count = 2 if keep == "2of4" else round(float(keep) * n) - int(stays[row, :i].sum())
            cost = sorted(ahead, key=lambda j: -float(weight[row, j] ** 2 / inverses[j][0, 0]))
            stays[row, ahead] = False
            stays[row, cost[:count]] = True
        error = weight[:, i] * ~stays[:, i]
        weight[:, i:] -= error[:, None] * inverses[i][0] / inverses[i][0, 0]
    return stays


@pytest.mark.parametrize("keep", [0.5, 0.25, "2of4"])
@pytest.mark.parametrize("with_drift", [False, True])
def test_sparsegpt_is_the_brute_force_algorithm(keep, with_drift):
    weight, x = correlated(size=24, rows=6)
    h, drift, target = damped(hessian_of(x)), None, weight.double()
    if with_drift:
        drift = torch.randn(6, 24, generator=torch.Generator().manual_seed(3)).double() @ hessian_of(x) * 0.1
        target = target + torch.linalg.solve(h, drift.T).T
    found, stays = compress.sparsegpt(weight, hessian_of(x), keep, drift, block=8), brute_sparsegpt(target, h, keep, 8)
    assert torch.equal(found != 0, stays)
    best = torch.zeros_like(target)                               # of these zeros, by least squares row by row
    for row, kept in enumerate(stays):
        best[row, kept] = torch.linalg.solve(h[kept][:, kept], (target @ h)[row, kept])
    errors = [float((((w - target) @ h) * (w - target)).sum()) for w in (found.double(), best, target * stays)]
    assert errors[1] <= errors[0] < 1.02 * errors[1] < 0.4 * errors[2]
    exact = compress.least_squares(weight * stays, stays, weight, h, drift, steps=60)
    assert torch.allclose(exact.double(), best, atol=1e-3 * float(best.abs().max()))


@pytest.mark.parametrize("keep", [0.5, "2of4"])
def test_who_knows_more_loses_less(keep):
    for seed in range(3):
        weight, x = correlated(seed=seed)
        h = hessian_of(x)
        magnitude = weight * compress.highest(weight.abs(), keep)
        errors = [output_error(weight, w, x) for w in (compress.sparsegpt(weight, h, keep), compress.wanda(weight, h, keep), magnitude)]
        assert errors[0] < 0.5 * errors[1] and errors[1] < errors[2]


def test_sparsegpt_makes_up_for_what_its_inputs_lack():
    weight, dense_x = correlated()
    x = dense_x + 0.3 * torch.randn(dense_x.shape, generator=torch.Generator().manual_seed(1)) * dense_x.std(0)
    drift = weight.double() @ ((dense_x - x).T @ x).double()
    errors = [float((dense_x @ weight.T - x @ compress.sparsegpt(weight, hessian_of(x), 0.5, d).T).square().sum()) for d in (None, drift)]
    assert errors[1] < 0.9 * errors[0]


# --- low rank ---

def test_whitened_is_the_best_of_its_rank():
    weight, x = correlated()
    h = damped(hessian_of(x))
    factor = torch.linalg.cholesky(h)
    values = torch.linalg.svdvals(weight.double() @ factor)
    for rank in (1, 8, 20):
        up, down = compress.low_rank(weight, rank, factor)
        plain_up, plain_down = compress.low_rank(weight, rank)
        assert up.shape == (24, rank) and down.shape == (rank, 64)
        whitened, plain = ((((weight - a @ b).double() @ factor) ** 2).sum() for a, b in ((up, down), (plain_up, plain_down)))
        assert whitened == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-3) and whitened < 0.9 * plain
        assert output_error(weight, up @ down, x) < output_error(weight, plain_up @ plain_down, x)
        want = torch.linalg.svdvals(weight)[rank:].square().sum()
        assert (weight - plain_up @ plain_down).square().sum() == pytest.approx(float(want), rel=1e-3)


@pytest.mark.parametrize("whitened", [False, True])
def test_full_rank_is_exact(root, whitened):
    dense, model, ids = load(root / "dense"), load(root / "dense"), torch.arange(64).view(2, 32)
    for name, layer in linears(dense).items():
        _, x = correlated(size=layer.in_features)
        factor = torch.linalg.cholesky(damped(hessian_of(x))) if whitened else None
        up, down = compress.low_rank(layer.weight.detach(), min(layer.weight.shape), factor)
        entry = {"module": f"model.layers.{name}", "kind": "lowrank", "rank": len(down)}
        model.replace(entry, LowRankLinear.from_factors(up, down))
    with torch.no_grad():
        assert (model(ids) - dense(ids)).abs().max() < 1e-4 * dense(ids).abs().max()


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_lowrank_counts_what_it_keeps(root, tmp_path, method):
    model, dense = run(root, "tied", f"lowrank:0.7:{method}", "--out", tmp_path / "m"), load(root / "tied")
    fewer, want = 0, []
    for name, layer in linears(dense).items():
        if "mlp" in name:                                         # the others: 32, the least, would not be fewer
            want.append({"module": f"model.layers.{name}", "kind": "lowrank", "rank": 32})
            fewer += 160 * 64 - 32 * (160 + 64)
    assert model.compression == want
    assert model.parameters_count() == dense.parameters_count() - fewer
    assert model.matmul_parameters() == dense.matmul_parameters() - fewer
    assert model.resident_bytes() == 4 * model.parameters_count()
    assert model.history[-1]["step"] == "lowrank" and kl(dense, model) > 0


def test_low_rank_then_integers_then_a_fresh_process(root, tmp_path):
    text, ids, logits = ("--calibration", root / "text.txt", "--calibration-windows", "8"), torch.arange(32)[None], {}
    for name, step in (("dense", "int8"), ("dense", "int4:gptq"), ("tied", "int4")):
        path = tmp_path / f"{name}-{step.replace(':', '-')}"
        compress.main(list(map(str, [root / name, "lowrank:0.7:whitened", step, *text, "--out", path])))
        model = load(path)
        kinds = [(e["module"].split(".", 3)[-1], e["kind"]) for e in model.compression]
        assert kinds.index(("mlp.up_proj", "lowrank")) < kinds.index(("mlp.up_proj.down", step[:4]))
        assert not linears(model) and [m for m in model.modules() if isinstance(m, LowRankLinear)]
        dense = dequantize(model)
        assert dense.compression == [e for e in model.compression if e["kind"] == "lowrank"]
        with torch.no_grad():
            logits[str(path)] = model(ids).flatten().tolist()
    code = ("import sys, json, torch; from model import load\nwith torch.no_grad():\n"
            " print(json.dumps({p: load(p)(torch.arange(32)[None]).flatten().tolist() for p in sys.argv[1:]}))")
    found = subprocess.run([sys.executable, "-c", code, *logits], capture_output=True, text=True, check=True,
                           cwd=Path(compress.__file__).parent).stdout
    assert json.loads(found) == logits


def test_gptq_of_two_factors_beats_nearest():
    """On the output of one layer, the second factor knowing what the first has lost."""
    model, ids = random_model(Config(**TINY)), torch.arange(1024).view(32, 32) * 7 % 255
    up, down = compress.low_rank(model.model.layers[0].mlp.down_proj.weight.detach(), 32)
    model.replace({"module": "model.layers.0.mlp.down_proj", "kind": "lowrank", "rank": 32}, LowRankLinear.from_factors(up, down))
    x, errors = inputs_of(model, ids)["model.layers.0.mlp.down_proj.down"], []
    entries = [e for e in compress.layers_to_quantize(model, 4, 32, 16) if "0.mlp.down_proj" in e["module"]]
    for rounding in (compress.round_to_nearest, lambda m, e: compress.gptq_model(m, e, [Batch(ids, ids, None)])):
        rounded = copy.deepcopy(model)
        rounding(rounded, entries)
        errors.append(output_error(up @ down, rounded.model.layers[0].mlp.down_proj.dense(), x))
    assert errors[1] < 0.8 * errors[0]


def test_ranks_are_taken_where_the_loss_does_not_feel_it():
    model, ids = random_model(Config(**TINY)), torch.arange(128).view(4, 32) * 7 % 255
    layers = {name: layer for name, layer in body_layers(model).items() if "mlp" in name}
    layers["model.layers.0.mlp.down_proj"].weight.data[:] = 0     # so what gate and up write is of no use
    batches, count = [Batch(ids[:, :-1], ids[:, 1:], None)], len(layers) * 160 * 64
    unfelt = {name: 32 for name in layers if ".0." in name}       # 64 would be no fewer parameters
    assert compress.best_ranks(model, layers, 0.86, batches) == unfelt
    more = compress.best_ranks(model, layers, 0.84, batches)
    assert more.items() > unfelt.items() and set(more.values()) == {32}
    assert count - len(more) * (160 * 64 - 32 * (160 + 64)) <= 0.84 * count


@pytest.mark.parametrize("entry, match", [
    ({"module": "model.layers.0.mlp.up_proj", "kind": "lowrank"}, "has a rank from 1 to 64, not 0"),
    ({"module": "model.layers.0.mlp.up_proj", "kind": "lowrank", "rank": 65}, "a weight of 160 x 64 has a rank from 1 to 64, not 65"),
    ({"module": "model.embed_tokens", "kind": "lowrank", "rank": 8}, "an embedding can only be quantized")])
def test_entries_that_cannot_be(root, entry, match):
    with pytest.raises(UserError, match=match):
        load(root / "dense").replace(entry)


# --- the pass that goes through the blocks in order ---

def inputs_of(model, ids):
    """{name: (N, in)} of all linear layers in the blocks, by hooks."""
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: seen.update({f"model.layers.{n}": x[0].flatten(0, 1)})) for n, m in linears(model).items()]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize("family", ["gated", "gpt2", "low"])
def test_sums_are_those_of_the_inputs(root, drifts, family, tmp_path):
    model = random_model(config_of(dict(model_type="gpt2", vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=32))
                         if family == "gpt2" else Config(**TINY))
    if family == "low":
        for name in ("0.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj"):
            layer = model.model.layers.get_submodule(name)
            model.replace({"module": f"model.layers.{name}", "kind": "lowrank", "rank": 8},
                          LowRankLinear.from_factors(*compress.low_rank(layer.weight.detach(), 8)))
    ids, met = torch.arange(96).view(3, 32) * 7 % 255, {}
    seen, todo, logits = inputs_of(model, ids), dict.fromkeys(body_layers(model)), model(ids)

    def look(parts, names, hessian, drift):
        for name in names:
            assert torch.allclose(hessian, hessian_of(seen[name]), rtol=1e-3, atol=1e-2), name
            met[name] = drift
        assert drift is None or drift.abs().max() < 1e-3 * hessian.abs().max()      # nothing was changed: nothing lacks
        return {}

    compress.layer_by_layer(model, todo, [Batch(ids[:2], ids[:2], None), Batch(ids[2:], ids[2:], None)], look, "look", drifts)
    assert met.keys() == seen.keys() == todo.keys() and torch.equal(model(ids), logits)
    assert all((drift is None) == (not drifts or name.endswith(".down")) for name, drift in met.items())


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.down_proj", "mlp.up_proj.up"])
def test_drift_is_what_the_output_lacks(name):
    """The sum of (what the dense layer writes - what this weight makes of the input x of the model as damaged so far)
    x^T; where it is added to the stream, what that lacks too."""
    model, ids, met = random_model(Config(**TINY)), torch.arange(96).view(3, 32) * 7 % 255, {}
    if name.endswith(".up"):
        up, down = compress.low_rank(model.model.layers[1].mlp.up_proj.weight.detach(), 8)
        model.replace({"module": "model.layers.1.mlp.up_proj", "kind": "lowrank", "rank": 8}, LowRankLinear.from_factors(up, down))
    name = f"model.layers.1.{name}"
    weight, dense, stream = model.get_submodule(name).weight.detach().double(), inputs_of(model, ids)[name], stream_of(model, ids)

    def damage(parts, names, hessian, drift):
        for part, its, lacking in zip(parts, names, drift.split([len(p.weight) for p in parts]) if drift is not None else [None]):
            met[its] = lacking
            part.weight = nn.Parameter(part.weight * 0.9)
        return {}

    compress.layer_by_layer(model, dict.fromkeys(body_layers(model)), [Batch(ids, ids, None)], damage, "damage")
    x = inputs_of(model, ids)[name]
    lacking = (dense - x).double() @ weight.T
    if "down_proj" in name:
        lacking += stream - stream_of(model, ids)
    assert torch.allclose(met[name], lacking.T @ x.double(), rtol=1e-3, atol=1e-4 * float(met[name].abs().max()))


def stream_of(model, ids):
    """The residual stream before the last MLP, (N, C)."""
    norm, seen = model.model.layers[1].post_attention_layernorm, []
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    hook.remove()
    return seen[0].detach().flatten(0, 1)
