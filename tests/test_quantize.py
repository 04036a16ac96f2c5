"""Rounding that looks at data: calibration, GPTQ and quantization-aware training."""
import contextlib, copy, io, shutil, signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress, distill, sample, train
from data import UserError
from data.chain import parse_arguments, parse_step
from data.loader import Batch, Windows
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import LAYERS, Int4Linear, Transformer, dequantized, group_scales, load, rounded, save
from shared import config_of, correlated, hessian_of, trained
from data.structure import dequantize

TINY = dict(vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=32)
LINES = [f"def f{i}(x, y={i % 7}):\n    return x * {i % 13} + y - {i % 5}\n\n\n" for i in range(400)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """data/ (prepared bytes of repetitive text), other/ (another tokenizer), dense/ and tied/ (trained on data)."""
    root = tmp_path_factory.mktemp("quantize")
    (root / "text.txt").write_text("".join(LINES), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("quantize-test", [root / "text.txt"], out=root / "data", tokenizer="bytes")
        prepare("quantize-other", [root / "text.txt"], out=root / "other", vocab_size=300)
    windows, tokenizer = Windows(root / "data", "train", 32), Tokenizer.load(root / "data")
    for name in ("dense", "tied"):
        model = trained(windows, 60, **TINY, tie_word_embeddings=name == "tied")
        model.history = [{"step": "train", "data": str(root / "data"), "data_sha256": windows.meta["sha256"]}]
        save(model, root / name, tokenizer)
    return root


def run(*argv):
    compress.main(list(map(str, argv)))


def args(**changes):
    return parse_arguments(["m", "int4", "--out", "o", *(str(a) for k, v in changes.items()
                                                            for a in ("--" + k.replace("_", "-"), v))])


def loss_of(model, directory, windows=64):
    rows = Windows(directory, "val", 32).training_rows(5, 0, windows)
    if model.compression:
        model = dequantize(copy.deepcopy(model))
    with torch.no_grad():
        return float(train.cross_entropy(model.eval(), rows)[0] / (rows.targets >= 0).sum())


def output_error(weight, found, x):
    return float(((weight - dequantized(*found)).double() @ x.double().T).square().sum())


# --- rounding to nearest ---

def squared_error(weight, scales, importance=1.0):
    """Error of each group by the definition, in float64: every integer of -8..7 is tried."""
    w, steps = weight.double().unflatten(1, (scales.shape[1], -1))[..., None], torch.arange(-8, 8) * scales.double()[..., None, None]
    return (((w - steps) ** 2).amin(-1) * torch.as_tensor(importance).double().expand(weight.shape[1]).view(scales.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_full_range_scales_lose_a_quarter_less_than_seven_steps_to_each_side(group):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    largest = weight.unflatten(1, (-1, group)).abs().amax(-1)
    seven, eight, found = largest / 7, largest / 8, group_scales(weight, 4, group)
    assert found.dtype == torch.float16 and found.shape == (64, 512 // group) and (found < 0).any() and (found > 0).any()
    assert squared_error(weight, found).sum() < 0.75 * squared_error(weight, seven).sum()
    # nearly all that a fine grid of scales of both signs finds, for each group
    grid = torch.cat([sign * eight * share for sign in (1, -1) for share in torch.linspace(0.6, 1.2, 61)]).view(122, *eight.shape)
    best = torch.stack([squared_error(weight, scales) for scales in grid]).amin(0)
    assert squared_error(weight, found).sum() < 1.03 * best.sum()


def test_scales_heed_the_cost_of_an_error():
    weight, importance = correlated()[0], torch.logspace(-2, 2, 64)
    plain, heeding = group_scales(weight, 4, 32), group_scales(weight, 4, 32, importance)
    assert squared_error(weight, heeding, importance).sum() < 0.95 * squared_error(weight, plain, importance).sum()
    importance[:32] = 0                                            # inputs that are always zero
    assert group_scales(weight, 4, 32, importance).isfinite().all()


def test_rounding_what_was_rounded_changes_nothing():
    once = Int4Linear.from_dense(nn.Linear(256, 96, bias=False), group=32).dense()
    layer = nn.Linear(256, 96, bias=False)
    layer.weight.data = once
    assert (Int4Linear.from_dense(layer, group=32).dense() - once).abs().max() < 1e-6


# --- GPTQ of one layer ---

def brute_force(weight, hessian, importance, group, drift=None):
    """The same by its definition, in float64: after each column the inverse Hessian of those that are left is made
    anew, and they take the change that makes up best for its error (Optimal Brain Surgeon)."""
    weight, n = weight.double().clone(), weight.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=torch.double)
    if drift is not None:
        weight += torch.linalg.solve(hessian, drift.T).T
    integers = torch.empty(weight.shape, dtype=torch.int8)
    for i in range(n):
        if i % group == 0:
            scales = group_scales(weight[:, i:i + group].float(), 4, group, importance[i:i + group])
        integers[:, i] = rounded(weight[:, i, None].float(), scales, 4)[:, 0]
        error = weight[:, i] - dequantized(integers[:, i, None], scales)[:, 0].double()
        inverse = torch.linalg.inv(hessian[i:, i:])
        weight[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return integers


@pytest.mark.parametrize("with_drift", [False, True])
def test_gptq_is_the_brute_force_algorithm(with_drift):
    weight, x = correlated(size=192, rows=12)                     # more than one block of 128 columns
    hessian = hessian_of(x)
    drift = torch.randn(12, 192, generator=torch.Generator().manual_seed(3)).double() @ hessian * 0.1 if with_drift else None
    want = brute_force(weight, hessian, hessian.diagonal().float(), 32, drift)
    integers, scales = compress.gptq(weight, hessian, 4, 32, drift)
    assert integers.dtype == torch.int8 and integers.shape == weight.shape and scales.shape == (12, 6)
    assert scales.dtype == torch.float16
    assert (integers != want).float().mean() < 0.01               # a float32 weight within an ulp of a rounding's edge


@pytest.mark.parametrize("group", [32, 64])
def test_gptq_keeps_outputs_better_than_nearest(group):
    for seed in range(3):
        weight, x = correlated(seed=seed)
        scales = group_scales(weight, 4, group)
        nearest, found = (rounded(weight, scales, 4), scales), compress.gptq(weight, hessian_of(x), 4, group)
        assert found[0].min() >= -8 and found[0].max() <= 7
        assert output_error(weight, found, x) < 0.5 * output_error(weight, nearest, x)


def test_drift_makes_up_for_inputs_that_changed():
    weight, dense_x = correlated()
    x = dense_x + 0.3 * torch.randn(dense_x.shape, generator=torch.Generator().manual_seed(1)) * dense_x.std(0)
    drift = weight.double() @ ((dense_x - x).T @ x).double()
    errors = []
    for d in (None, drift):
        integers, scales = compress.gptq(weight, hessian_of(x), 4, 32, drift=d)
        errors.append(float((dense_x @ weight.T - x @ dequantized(integers, scales).T).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_dead_columns_and_singular_hessians(capsys):
    weight, x = correlated()
    x[:, 7] = x[:, 40] = 0
    integers, scales = compress.gptq(weight, hessian_of(x), 4, 32)
    found = dequantized(integers, scales)
    step = scales.float().repeat_interleave(32, 1)
    inside = (weight.abs() <= 7 * step)[:, [7, 40]]
    assert ((found - weight).abs() <= step / 2 * 1.0001)[:, [7, 40]][inside].all()                   # rounded to nearest
    few = x[:5]                                                   # rank 5 of 64
    assert output_error(weight, compress.gptq(weight, hessian_of(few), 4, 32), few) < 1e-2 * float((few @ weight.T).square().sum())
    nothing = compress.gptq(weight, torch.zeros(64, 64, dtype=torch.double), 4, 32)
    assert dequantized(*nothing).isfinite().all()
    assert capsys.readouterr().out == ""
    worse = hessian_of(x) - 0.05 * hessian_of(x).diagonal().mean() * torch.eye(64, dtype=torch.double)
    compress.gptq(weight, worse, 4, 32, name="that.layer")
    assert "that.layer: too few inputs tell its columns apart; damping is 10%" in capsys.readouterr().out
    with pytest.raises(UserError, match="inputs of that.layer are infinite or not numbers"):
        compress.gptq(weight, worse * float("nan"), 4, 32, name="that.layer")


# --- calibration ---

def test_calibration_is_training_text_and_says_what_it_is(root, capsys):
    model, tokenizer = load(root / "dense"), Tokenizer.load(root / "dense")
    batches, entry = compress.calibration(model, tokenizer, args(calibration_windows=12))
    made_of = entry["calibration"]
    assert [len(b.ids) for b in batches] == [8, 4] and made_of["windows"] == 12 and made_of["context"] == 32
    text = bytes(np.memmap(root / "data" / "train.bin", dtype=np.uint16, mode="r").astype(np.uint8))
    assert all(bytes(row.to(torch.uint8).numpy()) in text for b in batches for row in b.ids)
    assert f"calibration: 12 windows of 32 tokens from quantize-test, seed 0, sha256 {made_of['sha256']}" in capsys.readouterr().out
    again = compress.calibration(model, tokenizer, args(calibration_windows=12))[1]["calibration"]
    other = compress.calibration(model, tokenizer, args(calibration_windows=12, seed=1))[1]["calibration"]
    assert again == made_of and other["sha256"] != made_of["sha256"]
    batches, entry = compress.calibration(model, tokenizer, args(calibration=root / "text.txt"))
    assert entry["calibration"]["data"] == "text.txt" and sum(len(b.ids) for b in batches) == 128
    whole_text = (root / "text.txt").read_bytes()
    assert all(bytes(row.to(torch.uint8).numpy()) in whole_text for b in batches for row in b.ids)
    assert torch.equal(batches[0].ids[:, 1:], batches[0].targets[:, :-1])


def test_calibration_that_cannot_be(root, tmp_path):
    model, tokenizer = load(root / "dense"), Tokenizer.load(root / "dense")
    with pytest.raises(UserError, match="--calibration .*other was prepared with another tokenizer than the model's: .*--tokenizer m"):
        compress.calibration(model, tokenizer, args(calibration=root / "other"))
    with pytest.raises(UserError, match="--calibration nowhere: no such dataset"):
        compress.calibration(model, tokenizer, args(calibration="nowhere"))
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    with pytest.raises(UserError, match="short.txt has 5 tokens, less than one window of 32"):
        compress.calibration(model, tokenizer, args(calibration=tmp_path / "short.txt"))
    model.history = []
    with pytest.raises(UserError, match="the history of the model does not say what it was trained on: .*--calibration"):
        compress.calibration(model, tokenizer, args())
    model.history = [{"data": str(root / "data"), "data_sha256": "0" * 64}]
    with pytest.raises(UserError, match="the model was trained on .*--calibration"):
        compress.calibration(model, tokenizer, args())


# --- GPTQ of a model ---

@pytest.mark.parametrize("name, flags", [("dense", ()), ("tied", ()), ("tied", ("--head-bits", "8")), ("dense", ("--head-bits", "16"))])
def test_gptq_beats_nearest(root, tmp_path, name, flags):
    run(root / name, "int4:32:gptq", *flags, "--out", tmp_path / "gptq")
    run(root / name, "int4", *flags, "--out", tmp_path / "rtn")
    dense, gptq, rtn = (load(path) for path in (root / name, tmp_path / "gptq", tmp_path / "rtn"))
    assert gptq.compression and sorted(map(str, gptq.compression)) == sorted(map(str, rtn.compression))
    losses = [loss_of(model, root / "data") for model in (dense, gptq, rtn)]
    assert losses[1] < losses[2] and losses[1] - losses[0] < 0.75 * (losses[2] - losses[0])
    assert (tmp_path / "gptq" / "model.safetensors").stat().st_size == (tmp_path / "rtn" / "model.safetensors").stat().st_size
    if name == "tied":
        assert gptq.lm_head is gptq.model.embed_tokens.table
    entry = gptq.history[-1]
    assert entry["method"] == "gptq" and entry["calibration"]["windows"] == 128 and entry["seed"] == 0
    assert all(p.requires_grad for p in gptq.parameters())


def test_three_windows_and_16_bit_weights(root, tmp_path):
    run(root / "dense", "int4:gptq", "--calibration-windows", 3, "--out", tmp_path / "m")
    assert loss_of(load(tmp_path / "m"), root / "data") < loss_of(load(root / "dense"), root / "data") + 0.2
    model = load(root / "dense", dtype=torch.bfloat16)
    save(model, tmp_path / "half", Tokenizer.load(root / "dense"))
    run(tmp_path / "half", "int4:gptq", "--calibration-windows", 3, "--out", tmp_path / "n")
    assert load(tmp_path / "n").dtype == torch.bfloat16


def test_other_families_and_packed_examples():
    for hub in (dict(model_type="gpt2", vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=32),
                dict(model_type="mistral", vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=4, sliding_window=8, max_position_embeddings=32)):
        model = Transformer(config_of(hub)).eval()
        for p in model.parameters():
            nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
        ids = torch.arange(96).view(3, 32) * 7 % 259
        segments = torch.arange(32).expand(3, -1) // 10 * (torch.arange(32) < 30)           # the first ten, the end: padding
        dense = copy.deepcopy(model)
        compress.gptq_model(model, compress.layers_to_quantize(model, 4, 32, 4), [Batch(ids, ids, segments), Batch(ids, ids, None)])
        assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        rtn = copy.deepcopy(dense)
        compress.round_to_nearest(rtn, compress.layers_to_quantize(rtn, 4, 32, 4))
        with torch.no_grad():
            a = dense(ids).log_softmax(-1)
            kl = [float((a.exp() * (a - q(ids).log_softmax(-1))).sum(-1).mean()) for q in (model, rtn)]
        assert kl[0] < kl[1]


# --- quantization-aware training ---

def test_rounding_lets_the_gradient_through():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for entry in ({"kind": "int8"}, {"kind": "int4", "group": 32}, {"kind": "int4", "group": 64}):
        spec = {k: v for k, v in entry.items() if k != "kind"}
        dense = nn.Linear(64, 6)
        dense.weight.data = weight.detach()
        rounded_ = distill.Rounded.apply(weight, {"module": "m", **entry})
        assert torch.equal(rounded_, LAYERS[entry["kind"]].from_dense(dense, **spec).dense())
        g = torch.randn(6, 64)
        assert torch.equal(torch.autograd.grad(rounded_, weight, g)[0], g)


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_qat_loss_is_that_of_the_rounded_model_and_its_gradient_reaches_the_dense_one(root, name):
    teacher, model = load(root / name), load(root / name).train()
    entries = compress.layers_to_quantize(model, 4, 32, 4)
    rounded_, ids = copy.deepcopy(model).eval(), torch.arange(64).view(2, 32) * 7 % 250
    compress.round_to_nearest(rounded_, entries)
    rounded_ = dequantize(rounded_)
    batch = Batch(ids, torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1), None)
    cfg = distill.DistillConfig(hard_weight=0.5)
    loss, count, _ = distill.qat_loss(teacher, entries, cfg, 259)(model, batch)
    log_q, log_p = (m(ids)[:, :-1].flatten(0, 1).double().log_softmax(-1) for m in (rounded_, teacher))
    kl = F.kl_div(log_q[:, :259].log_softmax(-1), log_p[:, :259].log_softmax(-1), reduction="sum", log_target=True)
    want = 0.5 * kl + 0.5 * F.nll_loss(log_q, ids[:, 1:].flatten(), reduction="sum")
    assert count == 62 and loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    want.backward()
    assert len(entries) == sum(p.ndim > 1 for p in model.parameters())
    for (name, ours), (_, theirs) in zip(model.named_parameters(), rounded_.named_parameters()):
        assert ours.grad is not None and torch.allclose(ours.grad, theirs.grad, atol=1e-4), name


@pytest.mark.parametrize("name, step", [("dense", "int4:qat"), ("tied", "int4:qat"), ("dense", "int8:qat")])
def test_qat(root, tmp_path, name, step, monkeypatch, capsys):
    kept = {}

    def fit(student, *rest, **more):                              # keeps what the run saved before it is removed
        figures = train_fit(student, *rest, **more)
        kept["best"] = shutil.copytree(tmp_path / "q.stages" / (step.replace(":", "-") + ".run") / "best", tmp_path / "best")
        return figures

    monkeypatch.setenv("SLM_TEST_DTYPE", "float32")               # below the scores are compared to 1e-4
    train_fit = train.fit
    monkeypatch.setattr(train, "fit", fit)
    run(root / name, step, "--qat-steps", 30, "--lr", "1e-3", "--out", tmp_path / "q")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "q"]
    saved, model = load(kept["best"]), load(tmp_path / "q")
    assert not saved.compression and saved.parameters_count() == model.parameters_count()
    for entry in model.compression:                               # the saved dense weights, rounded: nothing else
        spec = {k: v for k, v in entry.items() if k not in ("module", "kind")}
        want = LAYERS[entry["kind"]].from_dense(saved.get_submodule(entry["module"]), **spec)
        found = model.get_submodule(entry["module"])
        assert all(torch.equal(a, b) for a, b in zip(getattr(found, "table", found).integers(), want.integers()))
    if name == "tied":
        assert model.lm_head is model.model.embed_tokens.table and saved.lm_head.weight is saved.model.embed_tokens.weight
    rtn = load(root / name)
    rtn, *_ = compress.quantize_step(rtn, None, parse_step(step[:4], compress.STEPS), args())
    if step == "int4:qat":
        assert loss_of(model, root / "data") < loss_of(rtn, root / "data")
    entry = model.history[-1]
    assert [h["step"] for h in model.history] == ["train", step[:4]] and entry["method"] == "qat" and entry["steps"] == 30
    assert "bits per byte of validation without training" in capsys.readouterr().out
    # what evaluation said is what the result is
    val = Windows(root / "data", "val", 32)
    scored = sample.figures(*sample.score(dequantize(model), val.evaluation_batches(256, 30 * 8 * 32),
                                                            Tokenizer.load(root / name).token_bytes()))
    assert entry["val_loss"] == pytest.approx(scored["loss"], abs=1e-4)


def test_qat_resumes(root, tmp_path, monkeypatch):
    flags = ("--qat-steps", 8, "--lr", "2e-3")
    run(root / "dense", "int4:qat", *flags, "--out", tmp_path / "whole")
    schedule = train.lr_at

    def interrupted(step, total, cfg, origin):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, total, cfg, origin)

    monkeypatch.setattr(train, "lr_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root / "dense", "int4:qat", *flags, "--out", tmp_path / "q")
    monkeypatch.setattr(train, "lr_at", schedule)
    assert not (tmp_path / "q").exists() and not load(tmp_path / "q.stages" / "int4-qat.run" / "last").compression
    with pytest.raises(UserError, match="q.stages holds stages of a chain: go on with --resume"):
        run(root / "dense", "int4:qat", *flags, "--out", tmp_path / "q")
    assert not [name for name in ("q", "whole.stages") if (tmp_path / name).exists()]
    with pytest.raises(UserError, match="was begun with lr 0.002, not 0.001"):
        run(root / "dense", "int4:qat", "--qat-steps", 8, "--resume", "--out", tmp_path / "q")
    run(root / "dense", "int4:qat", *flags, "--resume", "--out", tmp_path / "q")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "whole"]
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# --- the command ---

@pytest.mark.parametrize("text, want", [("int4:gptq", ("int4", "32", "gptq")), ("int4:64:qat", ("int4", "64", "qat")),
                                        ("int8:qat", ("int8", "", "qat"))])
def test_steps(text, want):
    assert tuple(parse_step(text, compress.STEPS)[:3]) == want


@pytest.mark.parametrize("argv, match", [
    (["int4:gptk"], r"int4 is written int4\[:32\|64\|128\]\[:rtn\|gptq\|qat\]; did you mean gptq\?"),
    (["int8:gptq"], r"int8 is written int8\[:qat\]"), (["int4:48:gptq"], "int4 is written"), (["int5:gptq"], "no step 'int5'; did you mean int"),
    (["int4", "--calibration", "stdlib"], "--calibration needs a step that looks at text"),
    (["int4:qat", "--calibration-windows", "3"], "--calibration-windows needs a step that calibrates"),
    (["int4:gptq", "--calibration-windows", "0"], "--calibration-windows is 0; it must be at least 1"),
    (["int4:gptq", "--qat-steps", "5"], "--qat-steps needs a step that trains"), (["int8", "--resume"], "--resume needs a step that trains"),
    (["int4:qat", "--lr", "nan"], "--lr is nan"),
    (["int4:64:gptq"], "down_proj: int4 in groups of 64 does not fit"),
    (["int8", "int4:gptq"], "int4 comes after int8")])
def test_wrong_commands(root, tmp_path, argv, match):
    with pytest.raises(UserError, match=match):
        run(root / "dense", *argv, "--out", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_quantized_models_are_refused_and_text_does_not_train(root, tmp_path):
    run(root / "dense", "int8", "--out", tmp_path / "int8")
    for method in ("gptq", "qat"):
        with pytest.raises(UserError, match="int4 comes after int8, which has quantized the model already"):
            run(tmp_path / "int8", f"int4:{method}", "--out", tmp_path / "m")
    with pytest.raises(UserError, match="text.txt is a text file, and qat learns from prepared data"):
        run(root / "dense", "int4:qat", "--calibration", root / "text.txt", "--out", tmp_path / "m")
    (tmp_path / "m.stages").mkdir()
    (tmp_path / "m.stages" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="m.stages, where the stages of a chain are kept, holds something else"):
        run(root / "dense", "int4:qat", "--overwrite", "--out", tmp_path / "m")
    assert (tmp_path / "m.stages" / "thesis.txt").exists() and not (tmp_path / "m").exists()


def test_a_stopped_gptq_leaves_nothing(root, tmp_path, monkeypatch):
    calls = []

    def stopped(*given, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return gptq(*given, **named)

    gptq = compress.gptq
    monkeypatch.setattr(compress, "gptq", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(root / "dense", "int4:gptq", "--out", tmp_path / "m")
    assert not list(tmp_path.iterdir())
