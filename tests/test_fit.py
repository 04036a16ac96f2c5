"""compress.py --fit and the step mixed: a knapsack against all plans, sizes against files, limits that cannot be met."""
import argparse, contextlib, io, itertools, json, random, re

import pytest
import torch

import compress
from data import UserError, fit, formats, measure
from data.chain import parse_step
from data.checkpoints import checkpoint_hash
from data.loader import IGNORE, Windows
from data.prepare import prepare
from data.sources import id_counts
from data.structure import dense_layers
from data.tokenizer import Tokenizer
from data.vocabulary import cut_tokenizer
from model import load, save
from shared import fresh_logits, trained
from test_chain import LINES, quick, run  # noqa: F401 - quick is a fixture of every test here

TINY = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=32)
QUICK = ("--new-tokens", 4, "--rounds", 1, "--eval-tokens", 1024, "--calibration-windows", 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """lines/ (prepared), dense/ and tied/ (trained on it), one/ (one layer), unknown/ (no history)."""
    root = tmp_path_factory.mktemp("fit")
    (root / "text.txt").write_text("".join(LINES), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("lines", [root / "text.txt"], out=root / "lines", vocab_size=320)
    windows, tokenizer = Windows(root / "lines", "train", 32), Tokenizer.load(root / "lines")
    for name, changes in (("dense", {}), ("tied", dict(tie_word_embeddings=True)), ("one", dict(num_hidden_layers=1))):
        model = trained(windows, 60, **{**TINY, **changes})
        if name == "dense":
            save(model, root / "unknown", tokenizer)
        model.history = [{"step": "train", "data": "lines", "data_sha256": windows.meta["sha256"], "context": 32}]
        save(model, root / name, tokenizer)
    return root


def kinds(model):
    return {e["module"]: (e["kind"], e.get("group")) for e in model.compression}


# --- the knapsack ---

def test_the_knapsack_is_the_best_of_all_plans():
    draw = random.Random(0)
    for trial in range(60):
        unit = draw.choice((1, 24, 96))
        choices = {str(n): [(unit * draw.randint(1, 30), draw.random()) for _ in range(draw.randint(1, 4))] for n in range(5)}
        budget = draw.randint(40, 100) * unit
        plans = [(sum(loss for _, loss in plan), sum(cost for cost, _ in plan)) for plan in itertools.product(*choices.values())]
        least = min((loss for loss, cost in plans if cost <= budget), default=None)
        chosen = formats.knapsack(choices, budget)
        if least is None:
            assert chosen is None
            continue
        assert sum(choices[n][i][0] for n, i in chosen.items()) <= budget
        assert sum(choices[n][i][1] for n, i in chosen.items()) == pytest.approx(least)
        coarse = formats.knapsack(choices, budget, cells=50)                 # rounded up: never too much
        assert sum(choices[n][i][0] for n, i in coarse.items()) <= budget


def test_spans():
    assert formats.spans([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8" and formats.spans([]) == ""


# --- the step mixed ---

def test_the_loss_of_rounding_is_predicted(root, monkeypatch):
    """Of each layer and format: the KL divergence of the model with that layer alone rounded, to a factor of two."""
    model = load(root / "dense").requires_grad_(False)
    rows = Windows(root / "lines", "train", 32).training_rows(3, 0, 128)
    batches = [type(rows)(rows.ids[i:i + 8], rows.targets[i:i + 8], None) for i in range(0, 128, 8)]
    entries, layers, _ = compress.ways_to_round(model, "rtn", batches[:2])
    losses = compress.rounding_losses(model, layers, batches)
    base, ratios = model(rows.ids).log_softmax(-1), []
    for name, layer in dense_layers(model).items():
        dense = layer.weight.detach().clone()
        for entry, rounded, loss in zip(entries[name], layers[name], losses[name]):
            if entry["kind"] == "int4":
                with torch.no_grad():
                    layer.weight.copy_(rounded.dense())
                    kl = float((base.exp() * (base - model(rows.ids).log_softmax(-1))).sum(-1).mean())
                    layer.weight.copy_(dense)
                ratios.append(loss / kl)
    assert len(ratios) > 20 and 0.4 < min(ratios) and max(ratios) < 2.5 and 0.7 < sorted(ratios)[len(ratios) // 2] < 1.4, sorted(ratios)


def test_no_plan_of_a_small_model_is_better(root, monkeypatch):
    """All 2^9 plans of int4 in groups of 32 and int8: none that is as small has less loss by the same measure."""
    monkeypatch.setattr(formats, "FORMATS", ({"kind": "int4", "group": 32}, {"kind": "int8"}))
    found = {}
    whole = compress.chosen_formats
    monkeypatch.setattr(compress, "chosen_formats", lambda bits, *ways: found.update(ways=ways) or whole(bits, *ways))
    run(root / "one", "mixed:5.5:rtn", "--calibration-windows", 8, "--out", root / "m-one")
    _, layers, losses = found["ways"]
    chosen = [int(kind == "int8") for kind, _ in kinds(load(root / "m-one")).values()]
    costs = [[8 * (q.q.nbytes + q.scales.nbytes) for q in layers[name]] for name in layers]
    budget = 5.5 * sum(layer.weight.numel() for layer in dense_layers(load(root / "one")).values())
    plans = {plan: sum(losses[n][i] for n, i in zip(layers, plan)) for plan in itertools.product((0, 1), repeat=len(layers))
             if sum(c[i] for c, i in zip(costs, plan)) <= budget}
    assert len(plans) > 50 and plans[tuple(chosen)] == pytest.approx(min(plans.values())) and 0 < sum(chosen) < len(chosen)


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_mixed(root, tmp_path, name, capsys):
    run(root / name, "mixed:5.25", "--calibration-windows", 8, "--out", tmp_path / "m")
    model, weights = load(tmp_path / "m"), sum(layer.weight.numel() for layer in dense_layers(load(root / name)).values())
    stored = sum(8 * (m.q.nbytes + m.scales.nbytes) for m in {id(m): m for m in model.modules() if hasattr(m, "scales")}.values())
    assert len({kind for kind, _ in kinds(model).values()}) == 2 and 5.0 < stored / weights <= 5.25
    entry = model.history[-1]
    assert entry["step"] == "mixed" and entry["bits"] == 5.25 and entry["method"] == "gptq" and "int8" in entry["plan"]
    assert f"mixed: {stored / weights:.3f} bits per weight" in capsys.readouterr().out
    ids = torch.arange(40).view(2, 20) * 7 % 250
    assert torch.equal(fresh_logits(tmp_path, ["m"], ids)["m"], model(ids).detach())
    run(root / name, "mixed:5.25", "--calibration-windows", 8, "--out", tmp_path / "again")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="int4 comes after mixed, which has quantized the model already"):
        run(tmp_path / "m", "int4", "--out", tmp_path / "x")
    with pytest.raises(UserError, match="gguf:q8_0 comes after mixed, .*gguf:q4_0 only"):
        run(tmp_path / "m", "gguf:q8_0", "--out", tmp_path / "x.gguf")


def test_mixed_goes_into_one_gguf_file(root, tmp_path):
    gguf = pytest.importorskip("gguf")
    run(root / "dense", "mixed:6", "gguf:q4_0", "--calibration-windows", 8, "--out", tmp_path / "m.gguf")
    run(root / "dense", "mixed:6", "--calibration-windows", 8, "--out", tmp_path / "m")
    types = [t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
    wanted = [kind for kind, _ in kinds(load(tmp_path / "m")).values()]
    assert types.count("Q8_0") == wanted.count("int8") > 0 and types.count("Q4_0") == wanted.count("int4") > 0


@pytest.mark.parametrize("argv, match", [
    (["mixed"], "mixed is written mixed:BITS"), (["mixed:3"], "bits per weight, scales counted, above 4 and below 10"),
    (["mixed:4.01"], r"take at least 4\.\d+ bits per weight"), (["mixed:5", "recover:3"], "recover comes after mixed"),
    (["mixed:5", "--head-bits", "8"], "--head-bits needs a step that rounds all alike")])
def test_mixed_refuses(root, tmp_path, argv, match):
    with pytest.raises(UserError, match=match):
        run(root / "dense", *argv, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- limits ---

@pytest.mark.parametrize("text, want", [("1MB", (1e6, None, None)), ("0.5mb, +2%", (5e5, None, 2.0)), ("2000tok/s", (None, 2000.0, None)),
                                        ("+.5%,800kB,3tok/s", (8e5, 3.0, 0.5))])
def test_limits(text, want):
    assert fit.dataclasses.astuple(fit.Limits.parse(text)) == want


@pytest.mark.parametrize("text", ["", "1", "1MB,2MB", "+-1%", "2%", "0kB", "1.2.3MB", "nanMB", "fast"])
def test_what_is_no_limit(root, tmp_path, text):
    with pytest.raises(UserError, match="--fit.*a limit is written 1MB" if text else "give a model and at least one step"):
        run(root / "dense", "--fit", text, "--out", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_sizes_are_exact(root, tmp_path):
    for name, chain in (("dense", ["int8"]), ("dense", ["int4"]), ("tied", ["int4"]), ("tied", ["lowrank:0.6:svd", "int8"])):
        run(root / name, *chain, "--out", tmp_path / "m", "--overwrite")
        made = load(tmp_path / "m")
        run(tmp_path / "m", "dequantize", "--out", tmp_path / "d", "--overwrite")
        dense = load(tmp_path / "d")
        entries = [entry for entry in made.compression if entry["kind"] != "lowrank"]
        assert fit.file_bytes(dense, entries) == (tmp_path / "m" / "model.safetensors").stat().st_size
        assert fit.file_bytes(dense, []) == (tmp_path / "d" / "model.safetensors").stat().st_size


def test_a_fitted_model_comes_back_bit_for_bit(root, tmp_path, capsys):
    whole = (root / "dense" / "model.safetensors").stat().st_size
    limit = f"{whole * 0.14 / 1e3:.0f}kB"
    run(root / "dense", "--fit", limit, "--out", tmp_path / "m", *QUICK)
    out = capsys.readouterr().out
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size <= float(limit[:-2]) * 1e3 and sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.fit"]
    words = next(line for line in out.splitlines() if "python compress.py" in line).split()[3:]
    steps = words[:words.index("--out")]
    run(root / "dense", *steps, "--calibration-windows", 8, "--out", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "m.fit" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert checkpoint_hash(tmp_path / "m") in {row["sha256"] for row in rows} and rows[0]["name"] == "dense"
    chosen = next(row for row in rows if row["sha256"] == checkpoint_hash(tmp_path / "m"))
    assert chosen["bits_per_byte"] == min(row["bits_per_byte"] for row in rows[1:] if row["file_bytes"] <= float(limit[:-2]) * 1e3)
    assert re.search(r"\d s +\| <- chosen", out) and re.search(r"The search took \d+ s\.", out) and out.count("<- chosen") == 1
    assert (tmp_path / "m.fit" / "tradeoff.png").is_file()
    plans = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.split("| chain ")[1].splitlines()[2:] if "%" in line]
    expected = [float(plan[2].rstrip(" %")) for plan in plans]
    assert [bool(plan[3]) for plan in plans] == [loss <= expected[0] + abs(expected[0]) / 3 for loss in expected[:3]] + [False] * len(plans[3:])


def test_cuts_are_tried_with_a_quarter_of_the_text(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "CUTS", ("width",))
    whole = (root / "dense" / "model.safetensors").stat().st_size
    run(root / "dense", "--fit", f"{whole * 0.12 / 1e3:.0f}kB", "--out", tmp_path / "m", *QUICK[:-1], 80)
    counts = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("calibration: ")]
    assert 1 <= counts.count(20) < len(counts) - 2                           # not of the rounding, nor of what is made
    assert counts == [80] + [20] * counts.count(20) + [80] * (len(counts) - 1 - counts.count(20))


def test_a_mix_of_cuts_is_tried_if_it_should_lose_less_than_its_parts():
    """Half of two cuts loses a quarter of what both lose: so much less than the lesser, if the other is not three times as much."""
    for lost, pays in ((0.0, False), (1.3, False), (1.4, True), (4.0, True), (11.9, True), (12.1, False), (-0.1, False)):
        cuts = [fit.Cut([]), fit.Cut(["width:0.900"], 4.0), fit.Cut(["vocab:0.600"], lost)]
        assert fit.mix_pays(["vocab:0.800", "width:0.950"], cuts) == pays, lost
        assert fit.mix_pays(["depth:0.5"], cuts) and fit.mix_pays(["vocab:0.800", "width:0.950"], cuts[:2])
    for lost, pays in ((2.3, False), (2.5, True), (27.9, True), (28.1, False)):          # a quarter of the ids, the rest of the width
        cuts = [fit.Cut(["width:0.900"], 4.0), fit.Cut(["vocab:0.600"], lost)]
        assert fit.mix_pays(["vocab:0.900", "width:0.925"], cuts) == pays, lost


def test_a_width_that_misses_the_limit_is_tried_once_more():
    """Too large: its rows take no groups of 128, so more bits. With room: widths come in steps."""
    def again(words, size):
        return fit.nearer_width(fit.Cut(words, weights=8 * size, least=1.0), fit.Limits(bytes=1000))
    assert again(["vocab:0.800", "width:0.600"], 1040) == [["vocab:0.800", "width:0.571"]]
    assert again(["width:0.600"], 900) == [["width:0.661"]]
    assert again(["width:0.600"], 990) == again(["depth:0.600"], 900) == again([], 900) == again(["width:0.950"], 900) == []


def test_one_format_for_all_is_made_beside_a_mix():
    """With the finest groups that need no more bytes, and only if it should meet the limits too."""
    cut = fit.Cut(["depth:0.5"], expected=1.0, weights=8000, other=100, uniform={"int4:64:gptq": 4.25, "int4:32:gptq": 4.5})
    for bits, limits, want in ((4.3, {}, ["int4:64:gptq"]), (4.5, {}, ["int4:32:gptq"]), (6.0, {}, ["int4:32:gptq"]), (4.2, {}, []),
                               (4.3, {"loss": 2.7}, ["int4:64:gptq"]), (4.3, {"loss": 1.5}, [])):
        plan = fit.Plan(cut, [*cut.words, f"mixed:{bits}"], cut.size(bits), 0.0)
        alike = fit.uniform_plan(plan, fit.Limits(**limits), lambda bits: 10 - 2 * bits + 0.1)
        assert [p.words[-1] for p in alike] == want, (bits, limits)
        assert all(p.size <= plan.size and p.loss == pytest.approx(11.1 - 2 * (4.25 if "64" in p.name else 4.5)) for p in alike)
    assert fit.uniform_plan(fit.Plan(cut, [*cut.words, "int8"], 9000, 0.0), fit.Limits(), None) == []


def test_a_cut_vocabulary_is_scored_on_the_same_text_that_it_did_not_count(root):
    """Row by row, against decoding and encoding each; and ids of windows that are scored do not count."""
    old, source = Tokenizer.load(root / "lines"), root / "lines"
    rows = Windows(source, "train", 32).training_rows(1, 0, 12)
    (counts, _), (fewer, _) = id_counts(source, old), id_counts(source, old, rows.ids.flatten().numpy())
    assert (counts - fewer).sum() == rows.ids.numel() and (fewer >= 0).all()
    new = cut_tokenizer(old, counts, 288)[1]
    batch = fit.rows_reencoded(rows, old, new, 48)
    for ids, targets, row, target in zip(batch.ids, batch.targets, rows.ids, rows.targets):
        want = new.encode(old.decode([*row[:1].tolist(), *target.tolist()]))[:49]
        assert ids[:len(want) - 1].tolist() == want[:-1] and targets[:len(want) - 1].tolist() == want[1:]
        assert (targets[len(want) - 1:] == IGNORE).all() and (ids[len(want) - 1:] == 0).all()
    assert max(len(ids) for ids in batch.ids) <= 48 and (batch.targets != IGNORE).sum() > rows.ids.numel()
    with pytest.raises(UserError, match="prompts and responses are in ids from before vocab"):
        fit.rows_reencoded(rows._replace(segments=rows.ids), old, new, 48)


def test_a_model_of_examples_is_fitted_without_cutting_ids(root, tmp_path, monkeypatch, capsys):
    records = [json.dumps({"prompt": f"Line {i}?", "response": line}) for i, line in enumerate(LINES[:400])]
    (tmp_path / "lines.jsonl").write_text("\n".join(records), encoding="utf-8")
    prepare("answers", [tmp_path / "lines.jsonl"], out=root / "answers", vocab_size=320)
    windows = Windows(root / "answers", "train", 32)
    model = trained(windows, 10, **TINY)
    model.history = [{"step": "train", "data": "answers", "data_sha256": windows.meta["sha256"], "context": 32}]
    save(model, tmp_path / "dense", Tokenizer.load(root / "answers"))
    whole = (tmp_path / "dense" / "model.safetensors").stat().st_size
    monkeypatch.setattr(fit, "cuts_to_try", lambda *_: [[], ["vocab:0.900"]])
    run(tmp_path / "dense", "--fit", f"{whole * 0.2 / 1e3:.0f}kB", "--out", tmp_path / "m", *QUICK)
    assert "vocab:0.900 is left out: prompts and responses are in ids from before vocab" in capsys.readouterr().out
    assert load(tmp_path / "m").config.vocab_size == 320


@pytest.mark.parametrize("method", ["pca", "activation"])
def test_width_takes_the_same_sizes_for_any_number_of_windows(root, tmp_path, method):
    """As the bytes are planned with few windows, and the file is made with all."""
    for keep in (0.8, 0.6):
        args = argparse.Namespace(calibration=None, seed=0, smoke=False, run=str(tmp_path))
        step, sizes = parse_step(f"width:{keep}:{method}", compress.STEPS), []
        for args.calibration_windows in (16, 96):
            sizes.append(compress.slice_step(load(root / "dense"), Tokenizer.load(root / "lines"), step, args)[0].config)
        assert sizes[0] == sizes[1], keep


def test_a_limit_of_the_loss_gives_the_smallest_file(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "CUTS", ("depth",))
    run(root / "dense", "--fit", "+3%", "--out", tmp_path / "m", *QUICK)
    rows = [json.loads(line) for line in (tmp_path / "m.fit" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    fits = [row for row in rows[1:] if row["bits_per_byte"] <= 1.03 * rows[0]["bits_per_byte"]]
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size == min(row["file_bytes"] for row in fits) < rows[0]["file_bytes"] / 3


@pytest.mark.parametrize("limits, match", [
    ("1kB", r"less than a fifth of the weights in four bits; the nearest that can be is \d+kB"), ("9MB", "has .* MB and meets that as it is"),
    ("65kB,+0.00001%", r"no chain should meet it; the nearest is .*MB, \+\d+\.\d\d % bits per byte"),
    ("9999999tok/s", r"no chain .*; the nearest is (depth:\S+ )?int8, with .*tokens/s")])
def test_limits_that_cannot_be_met(root, tmp_path, limits, match, monkeypatch):
    monkeypatch.setattr(fit, "CUTS", ("depth",))
    with pytest.raises(UserError, match=match):
        run(root / "dense", "--fit", limits, "--out", tmp_path / "m", *QUICK)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("argv, match", [
    (["--fit", "30kB"], "--fit is written compress.py MODEL --fit 1MB --out DIR"),
    (["int8", "--fit", "30kB", "--out", "m"], "--fit is written"), (["int8", "--minutes", "1", "--out", "m"], "--minutes belongs to --fit"),
    (["--fit", "30kB", "--minutes", "-1", "--out", "m"], "--minutes is -1.0; it must be at least 0")])
def test_wrong_commands(root, argv, match):
    with pytest.raises(UserError, match=match):
        run(root / "dense", *argv)
    assert not (root / "m").exists()


def test_without_text_for_calibration(root, tmp_path):
    with pytest.raises(UserError, match="give --data .* or --text"):
        run(root / "unknown", "--fit", "30kB", "--out", tmp_path / "m", *QUICK)
    with pytest.raises(UserError, match="give --calibration, prepared data or a text file"):
        run(root / "unknown", "--fit", "30kB", "--text", root / "text.txt", "--out", tmp_path / "m", *QUICK)
    assert not list(tmp_path.iterdir())


def test_a_search_that_was_stopped_goes_on(root, tmp_path, monkeypatch, capsys):
    whole = (root / "dense" / "model.safetensors").stat().st_size
    command = (root / "dense", "--fit", f"{whole * 0.12 / 1e3:.0f}kB", "--minutes", 0.01, "--out", tmp_path / "m", *QUICK)
    ruler = measure.ruler

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "ruler", stopped)
    monkeypatch.setattr(fit, "CUTS", ("width",))
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    assert "m.stages: the same command with --resume goes on from there" in capsys.readouterr().err
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "m.stages").iterdir()}
    assert any("recover" in name for name in made)
    monkeypatch.setattr(measure, "ruler", ruler)
    monkeypatch.setattr(compress, "slice_model", None)                         # it must not be called again
    run(*command, "--resume")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.fit"] and load(tmp_path / "m").history[-1]["step"] in ("mixed", "int4", "int8")
