"""Chains of steps: how they are written, their order, stages and resuming, recovery, and the sweep over many of them."""
import contextlib, io, json, random, re, signal
from pathlib import Path

import pytest
import torch

import compress, train
from data import UserError, machine, measure
from data.chain import chain_name, check_order, parse_chain, parse_step
from data.checkpoints import checkpoint_hash
from data.loader import Windows
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import load, save
from shared import fresh_logits, trained

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            head_dim=16, max_position_embeddings=32)
WORDS = "the quick brown fox jumps over lazy dogs while seven wizards quietly mix fine black potions behind great oaks".split()
LINES = [f"def {WORDS[i % 18]}_{WORDS[i * i % 17]}(x, y={i % 7}):\n    return x * {i % 13} + y - {i % 5}\n\n\n" for i in range(300)]
IDS = torch.arange(40).view(2, 20) * 7 % 250


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """text.txt, lines/ (that, prepared), dense/ (trained on it), unknown/ (the same, with no history)."""
    root = tmp_path_factory.mktemp("chain")
    (root / "text.txt").write_text("".join(LINES), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("lines", [root / "text.txt"], out=root / "lines", vocab_size=320)
    windows, tokenizer = Windows(root / "lines", "train", 32), Tokenizer.load(root / "lines")
    assert tokenizer.vocab_size == 320
    model = trained(windows, 80, **TINY)
    save(model, root / "unknown", tokenizer)
    model.history = [{"step": "train", "data": "lines", "data_sha256": windows.meta["sha256"], "context": 32}]
    save(model, root / "dense", tokenizer)
    return root


@pytest.fixture(autouse=True)
def quick(root, monkeypatch):
    """Beside the data, where its name finds it; no time spent on what the machine can do, nor on each row's peak."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(machine, "matmul_rate", lambda *args: 1e9)
    monkeypatch.setattr(measure, "peak_alone", lambda *args: (2_000_000, 1_000_000))


def run(*argv):
    compress.main(list(map(str, argv)))


def loss_of(model, root):
    rows = Windows(root / "lines", "val", 32).training_rows(5, 0, 64)
    with torch.no_grad():
        return float(train.cross_entropy(model, rows)[0] / rows.targets.numel())


# --- how steps and chains are written ---

@pytest.mark.parametrize("text, want", [
    ("width:0.75", ("width", "0.75", "pca")), ("ffn:.5:magnitude", ("ffn", "0.5", "magnitude")),
    ("sparse:2of4:wanda", ("sparse", "2of4", "wanda")), ("recover:0300", ("recover", "300", "taught")),
    ("recover:5:text", ("recover", "5", "text")), ("int4:gptq", ("int4", "32", "gptq")), ("vocab:1", ("vocab", "1.0", ""))])
def test_steps(text, want):
    assert tuple(parse_step(text, compress.STEPS)[:3]) == want


@pytest.mark.parametrize("steps, match", [
    *((f"{name}:{keep}", f"{name} is written {name}:KEEP.*; KEEP is the share that stays, above 0 and at most 1")
      for name in ("ffn", "heads", "width", "depth", "vocab", "lowrank", "sparse") for keep in ("0", "1.01", "-0.5", "nan", "75%", "KEEP")),
    ("width", "width is written width:KEEP"), ("sparse:3of4", r"sparse:KEEP\|2of4.*did you mean 2of4"),
    ("sparse:wanda", "KEEP is the share"), ("sparse:0.5:vanda", "did you mean wanda"), ("recover:0", "STEPS is a whole number, at least 1"),
    ("recover:1.5", "STEPS is a whole number"), ("recover", "recover is written recover:STEPS"), ("recover:5:tought", "did you mean taught"),
    ("int8 width:0.5", "width comes after int8, .*: put it before int8, or dequantize between them"),
    ("int4 recover:5", "recover comes after int4"), ("int8 sparse:0.5", "sparse comes after int8"),
    ("lowrank:0.8 ffn:0.5", "ffn comes after lowrank, and it needs whole matrices: put ffn first"),
    ("sparse:0.5 recover:5 lowrank:0.5", "lowrank comes after sparse"), ("sparse:0.5 int4:gptq", "gptq comes after sparse, .*zeros"),
    ("lowrank:0.8 gguf:f16", "gguf comes after lowrank"), ("lowrank:0.8 sparse:0.5 gguf:f16", "gguf comes after lowrank"),
    ("recover:5:text:x", "too many parts"), ("witdh:0.5", "did you mean width")])
def test_what_is_refused(steps, match, root, tmp_path):
    with pytest.raises(UserError, match=match):
        run(root / "dense", *steps.split(), "--out", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_the_order_holds_for_what_was_done_before(root, tmp_path):
    for made, steps, match in (("int8", "recover:5", "recover comes after int8"), ("int8", "gguf:q4_0", "gguf:q8_0 only"),
                               ("sparse:0.5:magnitude", "width:0.5", "width comes after sparse"),
                               ("lowrank:0.5:svd", "vocab:0.5", "vocab comes after lowrank")):
        source = tmp_path / made.replace(":", "-")
        if not source.exists():
            run(root / "dense", made, "--out", source)
        with pytest.raises(UserError, match=match):
            run(source, steps, "--out", tmp_path / "m")
    run(root / "dense", "int4", "--head-bits", "8", "--out", tmp_path / "mixed")
    check_order([parse_step("gguf:q4_0", compress.STEPS)], load(tmp_path / "mixed"))               # the blocks decide
    run(tmp_path / "int8", "dequantize", "ffn:0.7:magnitude", "int4", "--out", tmp_path / "m")
    assert [e["step"] for e in load(tmp_path / "m").history] == ["train", "int8", "dequantize", "ffn", "int4"]


def test_names_of_chains_are_names_of_files():
    name = lambda *steps: chain_name(parse_chain(steps, compress.STEPS))
    assert name("width:0.75", "recover:95", "int4:32:rtn") == "width-0.75+recover-95+int4"
    assert name("sparse:2of4:magnitude", "recover:7:text", "int4:128:qat") == "sparse-2of4-magnitude+recover-7-text+int4-128-qat"
    assert name("width:.75") == name("width:0.750") and re.fullmatch(r"[a-z0-9.+-]+", name("lowrank:1e-3:svd", "int8"))


# --- recovery ---

def test_recovery_needs_data(root, tmp_path):
    with pytest.raises(UserError, match="does not say what it was trained on: give --calibration"):
        run(root / "unknown", "ffn:0.7:magnitude", "recover:5", "--out", tmp_path / "m")
    (tmp_path / "m.stages").rename(tmp_path / "kept")                                  # the stage before is there
    with pytest.raises(UserError, match="text.txt is a text file, and taught learns from prepared data"):
        run(root / "unknown", "recover:5", "--calibration", root / "text.txt", "--out", tmp_path / "m")
    run(root / "unknown", "recover:2", "--calibration", "lines", "--out", tmp_path / "m")
    assert load(tmp_path / "m").history[-1]["steps"] == 2


@pytest.mark.parametrize("method", ["taught", "text"])
def test_recovery_wins_back_most_of_what_was_lost(root, tmp_path, method):
    run(root / "dense", "ffn:0.67:magnitude", "heads:0.5:magnitude", "--out", tmp_path / "cut")
    run(root / "dense", "ffn:0.67:magnitude", "heads:0.5:magnitude", f"recover:60:{method}", "--lr", "3e-3", "--out", tmp_path / "m")
    dense, cut, model = (loss_of(load(d), root) for d in (root / "dense", tmp_path / "cut", tmp_path / "m"))
    assert dense + 0.03 < cut and model < cut - 0.5 * (cut - dense)
    assert load(tmp_path / "m").config.intermediate_size == load(tmp_path / "cut").config.intermediate_size == 64
    entry = load(tmp_path / "m").history[-1]
    assert entry["method"] == method and entry["steps"] == 60 and sorted(p.name for p in tmp_path.iterdir()) == ["cut", "m"]


@pytest.mark.parametrize("keep", ["0.5", "2of4"])
def test_zeros_stay_for_50_steps(root, tmp_path, keep):
    run(root / "dense", f"sparse:{keep}:magnitude", "--out", tmp_path / "zeros")
    run(root / "dense", f"sparse:{keep}:magnitude", "recover:50", "int8", "--head-bits", 16, "--out", tmp_path / "m")
    zeros, model = load(tmp_path / "zeros"), load(tmp_path / "m")
    for name, p in zeros.model.layers.named_parameters():
        if p.ndim > 1:
            after = model.model.layers.get_submodule(name.removesuffix(".weight")).dense()
            assert (p == 0).float().mean() == pytest.approx(0.5, abs=0.01) and (after[p == 0] == 0).all()
            assert (after[p != 0] != p[p != 0]).float().mean() > 0.9
    assert (model.model.embed_tokens.weight != zeros.model.embed_tokens.weight).any()


def test_another_vocabulary_learns_from_the_text_alone(root, tmp_path, capsys):
    run(root / "dense", "vocab:0.9", "recover:3", "int4:gptq", "--out", tmp_path / "m")
    model = load(tmp_path / "m")
    assert [e["step"] for e in model.history] == ["train", "vocab", "recover", "int4"] and model.config.vocab_size == 288
    assert model.history[2]["method"] == "text" and "another vocabulary and cannot teach" in capsys.readouterr().out


# --- chains on disk ---

def chains():
    """Every step, and ten chains that chance makes of them, seeded."""
    steps = {"cut": ["ffn:0.67", "ffn:0.67:magnitude", "heads:0.5", "width:0.8", "width:0.8:magnitude", "depth:0.5", "vocab:0.95"],
             "mask": ["lowrank:0.6", "lowrank:0.6:svd", "sparse:0.5", "sparse:0.5:magnitude", "sparse:2of4", "sparse:2of4:wanda"],
             "round": ["int8", "int4", "int4:gptq", "int8:qat", "int4:qat"], "recover": ["recover:2", "recover:2:text"]}
    draw, result = random.Random(7), [[step] for kind in steps.values() for step in kind] + [["int8", "dequantize"]]
    while len(result) < 21 + 10:
        mask = draw.sample(steps["mask"], draw.randint(0, 1))
        narrow = mask and "lowrank" in mask[0]                     # what is cut has no room for a rank of 32
        chain = draw.sample(steps["cut"], 0 if narrow else draw.randint(0, 2)) + draw.sample(steps["recover"], draw.randint(0, 1))
        chain += mask + draw.sample(steps["recover"], draw.randint(0, 1))
        chain += draw.sample(steps["round"], draw.randint(0, 1)) + ["dequantize"]
        chain = chain if chain[-2:-1] and chain[-2] in steps["round"] and draw.random() < 0.3 else chain[:-1]
        with contextlib.suppress(UserError):
            parse_chain(chain, compress.STEPS)
            result += [chain] if len(chain) > 1 else []
    return result


def test_every_step_and_ten_chains_come_back_in_a_fresh_process(root, tmp_path):
    made = {}
    for n, chain in enumerate(chains()):
        run(root / "dense", *chain, "--smoke", "--out", tmp_path / str(n))
        made[str(n)] = load(tmp_path / str(n))
        assert [e["step"] for e in made[str(n)].history[1:]] == [step.split(":")[0] for step in chain]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(made)                  # no stages are left
    logits = fresh_logits(tmp_path, made, IDS)
    for name, model in made.items():
        assert logits[name].isfinite().all() and torch.equal(logits[name], model(IDS)), chains()[int(name)]


def test_a_chain_that_was_stopped_goes_on(root, tmp_path, monkeypatch, capsys):
    chain = ("ffn:0.67:magnitude", "recover:6", "int4")
    run(root / "dense", *chain, "--out", tmp_path / "whole")
    schedule, cuts = train.lr_at, []

    def interrupted(step, total, cfg, origin):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, total, cfg, origin)

    monkeypatch.setattr(train, "lr_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root / "dense", *chain, "--out", tmp_path / "m")
    monkeypatch.setattr(train, "lr_at", schedule)
    stages = tmp_path / "m.stages"
    assert "m.stages: the same command with --resume goes on from there" in capsys.readouterr().err
    assert {p.name for p in stages.iterdir()} == {"chain.json", "ffn-0.67-magnitude", "ffn-0.67-magnitude+recover-6.run"}
    assert load(stages / "ffn-0.67-magnitude").config.intermediate_size == 64 and not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="m.stages holds stages of a chain: go on with --resume, or begin anew with --overwrite"):
        run(root / "dense", *chain, "--out", tmp_path / "m")
    with pytest.raises(UserError, match="m.stages was begun with lr 0.001, not 0.002"):
        run(root / "dense", *chain, "--lr", "2e-3", "--resume", "--out", tmp_path / "m")
    with pytest.raises(UserError, match="m.stages was begun with model .*: give the same flags"):
        run(tmp_path / "whole", "dequantize", "int8", "--resume", "--out", tmp_path / "m")
    monkeypatch.setattr(compress, "slice_model", lambda *args: cuts.append(args))              # it must not be called again
    run(root / "dense", *chain, "--resume", "--out", tmp_path / "m")
    assert not cuts and sorted(p.name for p in tmp_path.iterdir()) == ["m", "whole"]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert [e["step"] for e in load(tmp_path / "m").history] == ["train", "ffn", "recover", "int4"]
    assert "parent" in load(tmp_path / "m").history[1] and "parent" not in load(tmp_path / "m").history[2]


# --- the sweep ---

SPEED = ("--new-tokens", 4, "--rounds", 1)


def test_a_sweep_that_was_stopped_goes_on(root, tmp_path, monkeypatch, capsys):
    command = (root / "dense", "--sweep", "ffn:0.67 recover:4 int8", "sparse:0.5", "int4:128", "--out", tmp_path / "s", *SPEED)
    whole, measured = measure.measure, []

    def stopped(models, *args, **more):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(list(models)[1])
        return whole(models, *args, **more)

    monkeypatch.setattr(measure, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    lines = (tmp_path / "s" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["dense", "ffn-0.67", "ffn-0.67+recover-4"]
    with pytest.raises(UserError, match="s holds stages of a chain: go on with --resume"):
        run(*command)
    monkeypatch.setattr(measure, "measure", lambda models, *args, **more: measured.append(list(models)[1]) or whole(models, *args, **more))
    monkeypatch.setattr(train, "fit", None)                                            # nothing is trained again
    monkeypatch.setattr(compress, "slice_model", None)
    run(*command, "--resume")
    names = ["dense", "ffn-0.67", "ffn-0.67+recover-4", "ffn-0.67+recover-4+int8", "sparse-0.5"]
    text = (tmp_path / "s" / "results.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert measured == names[1:] and [row["name"] for row in rows] == names and text.splitlines()[:3] == lines
    assert all(row["sha256"] == checkpoint_hash(tmp_path / "s" / row["name"]) for row in rows[1:])
    assert len({row["protocol"] for row in rows}) == 1 and rows[0]["file_bytes"] and rows[1]["decode_x"] > 0
    report = (tmp_path / "s" / "report.md").read_text(encoding="utf-8")
    a, b, c, d = (row["bits_per_byte"] for row in rows[:4])
    assert f"- ffn-0.67 {b - a:+.4f}, recover-4 {c - b:+.4f}, int8 {d - c:+.4f}" in report
    assert "- int4-128, and what follows it, is left out: " in report and "groups that fit" in report         # rows of 64 have no groups of 128
    assert "no speed-up expected" in next(line for line in report.splitlines() if line.startswith("| sparse-0.5 ") and "speed-up" in line)
    assert (tmp_path / "s" / "tradeoff.png").stat().st_size > 10_000 and "tradeoff.png" in report
    assert " left" in capsys.readouterr().out


def test_another_vocabulary_is_a_row_of_bits_per_byte(root, tmp_path):
    run(root / "dense", "--sweep", "vocab:0.9 recover:2", "int8", "--out", tmp_path / "s", *SPEED)
    rows = [json.loads(line) for line in (tmp_path / "s" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Tokenizer.load(tmp_path / "s" / "vocab-0.9").vocab_size == 288
    assert [row["kl"] is None for row in rows] == [False, True, True, False]
    assert len({row["bytes"] for row in rows}) == 1 and rows[1]["tokens"] > rows[0]["tokens"]


def test_a_sweep_without_prepared_data_leaves_out_what_trains(root, tmp_path, capsys):
    text = root / "text.txt"
    flags = ("--out", tmp_path / "s", "--text", text, "--eval-tokens", 500, *SPEED)
    with pytest.raises(UserError, match="give --calibration"):
        run(root / "unknown", "--sweep", "ffn:0.67 recover:4", *flags)
    with pytest.raises(UserError, match="give --data .* or --text"):
        run(root / "unknown", "--sweep", "int8", "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    run(root / "unknown", "--sweep", "ffn:0.67 recover:4 int8", "recover:4", "int8", *flags, "--calibration", text)
    assert "recover and qat, and what comes after them, are left out" in capsys.readouterr().out
    rows = [json.loads(line)["name"] for line in (tmp_path / "s" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == ["unknown", "ffn-0.67", "int8"]
    with pytest.raises(UserError, match="nothing is there to measure: - int4-128, and what follows it, is left out"):
        run(root / "dense", "--sweep", "int4:128", "--out", tmp_path / "n", *SPEED)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("argv, match", [
    (["--sweep"], "--sweep is written"), (["dense", "int8", "--sweep", "--out", "s"], "--sweep is written"), (["dense", "--sweep"], "--sweep is written"),
    (["dense", "--sweep", "int8 gguf:q8_0", "--out", "s"], "leave it out"), (["dense", "--sweep", "int8 int4", "--out", "s"], "int4 comes after int8"),
    (["dense", "--sweep", "int9", "--out", "s"], "no step 'int9'"), (["dense", "--sweep", "", "--out", "s"], "a chain has no step"), (["dense", "--sweep", "int8", "--qat-steps", "3", "--out", "s"], "--qat-steps needs"),
    (["dense", "--sweep", "int8", "--out", "dense"], "dense, where the stages of a chain are kept, holds something else"),
    (["dense", "int8", "--out", "s", "--resume"], "--resume needs a step that trains: .*, or several steps"),
    (["--measure", "dense", "--sweep"], "--measure compares finished models")])
def test_wrong_commands(root, argv, match):
    with pytest.raises(UserError, match=match):
        compress.main(argv)
    assert not (root / "s").exists()


def test_a_chain_may_stand_in_quotes():
    words = ["ffn:0.5:magnitude", "int8"]
    assert parse_chain([" ".join(words)], compress.STEPS) == parse_chain(words, compress.STEPS)
