"""The five changes that forks make: each recipe of data/README.md is applied to a copy of the tree, and works."""
import os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

import breaking

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    breaking.make(folder)
    return folder


def fork(place, number):
    """A copy of the tree with the n-th ```diff of data/README.md applied: each part names a place that is there once."""
    shutil.copytree(ROOT, place, ignore=lambda folder, names: [
        name for name in names if name in (".git", "tests", "__pycache__") or name.startswith("out")
        or Path(folder, name).is_dir() and Path(folder).name == "data"])
    recipe = re.findall("```diff\n(.*?)```", (ROOT / "data/README.md").read_text(encoding="utf-8"), re.S)[number]
    for file, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", recipe, re.S | re.M):
        text = (place / file).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.M):
            old, new = ("".join(line[1:] or "\n" for line in hunk.splitlines(True) if line[0] not in other)
                        for other in ("+", "-"))
            assert text.count("\n" + old) == 1, (file, old)
            text = text.replace("\n" + old, "\n" + new)
        (place / file).write_text(text, encoding="utf-8")
    return place


def run(place, *argv, code=0):
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=place, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_output_gate(made, tmp_path):
    place = fork(tmp_path / "fork", 0)
    run(place, "train.py", "--data", made / "data", "--out", "run", *breaking.TINY, "--output-gate")
    assert '"output_gate": true' in (place / "run/best/config.json").read_text(encoding="utf-8")
    run(place, "-c", """
import torch
from data.machine import accelerate
from model import KVCache, load
model, ids = accelerate(load("run")), torch.arange(20)[None]
cache = KVCache(model.config, 1, 20)
with torch.inference_mode():
    model.model.layers[0].self_attn.gate.weight.normal_()
    model.model.layers[0].self_attn.o_proj.weight.normal_()
    parts = torch.cat([model(part, cache=cache) for part in ids.split(1, dim=1)], dim=1)
assert (parts - model(ids)).norm() < 1e-4 * parts.norm() and model.config.output_gate
""")
    assert "PyTorch generates, not the C kernels" in run(place, "sample.py", "run", "--prompt", "a", "--max-new-tokens", "3") or \
        run(place, "-c", "from data import native; print(native.library()[0])").strip() == "None"
    run(place, "compress.py", "run", "int8", "--out", "int8")
    assert "self_attn.gate" in run(place, "compress.py", "run", "heads:0.5:magnitude", "--out", "cut", code=2)
    assert "self_attn.gate" in run(place, "compress.py", "run", "int4:gptq", "--out", "gptq",
                                   "--calibration", made / "text" / "00.txt", code=2)


def test_a_pruning_criterion(made, tmp_path):
    place = fork(tmp_path / "fork", 2)
    run(place, "compress.py", made / "model", "sparse:0.5:alternate", "--out", "sparse")
    run(place, "-c", "from model import load\nw = load('sparse').model.layers[0].mlp.up_proj.weight\n"
        "assert (w[:, ::2] == 0).all() and (w[:, 1::2] != 0).all()")


def test_a_distillation_loss(made, tmp_path):
    place = fork(tmp_path / "fork", 3)
    run(place, "distill.py", made / "model", "--data", made / "data", "--out", "student", "--student-layers", "1", "--loss", "skew",
        "--beta", "0.1", *breaking.TINY[6:])
    assert '"loss": "skew"' in (place / "student/best/config.json").read_text(encoding="utf-8")


def test_an_optimizer(made, tmp_path):
    place = fork(tmp_path / "fork", 4)
    flags = ["--data", made / "data", "--out", "run", *breaking.TINY, "--optimizer", "lion", "--lr", "0.001"]
    run(place, "train.py", *flags)
    assert "step 5 of 5" in run(place, "train.py", "--out", "run", "--resume", "--steps", "5")


def test_a_step_of_a_chain(made, tmp_path):
    place = fork(tmp_path / "fork", 1)
    run(place, "compress.py", made / "model", "scale:0.5", "int8", "--out", "scaled")
    assert '"step": "scale"' in (place / "scaled/config.json").read_text(encoding="utf-8")
    assert "scale is written scale:KEEP" in run(place, "compress.py", made / "model", "scale:2", "--out", "no", code=2)


def test_a_source_of_text(tmp_path):
    place = fork(tmp_path / "fork", 5)
    folder = place / "data/downloads/poems"
    folder.mkdir(parents=True)
    for name, text in (("train.txt", "a rose is a rose\n" * 60), ("valid.txt", "is a rose a rose\n" * 20)):
        (folder / name).write_text(text, encoding="utf-8")
    said = run(place, "data/prepare.py", "poems", "--tokenizer", "bytes")
    assert "wrote poems" in said and (place / "data/poems/val.bin").read_bytes()[::2].startswith(b"is a rose a rose")


def test_a_family(tmp_path):
    place = fork(tmp_path / "fork", 6)
    run(place, "-c", """
import torch
from pathlib import Path
from data.tokenizer import Tokenizer
from model import Config, Transformer, load, save
shape = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, max_position_embeddings=64)
model, ids = Transformer(Config(model_type="llama", qk_norm=False, **shape)).initialize().eval(), torch.arange(20)[None]
save(model, "starling", Tokenizer.from_bytes())
file = Path("starling/config.json")
file.write_text(file.read_text(encoding="utf-8").replace('"llama"', '"starling"'), encoding="utf-8")
assert load("starling").config.model_type == "starling" and torch.equal(load("starling")(ids), model(ids))
save(load("starling"), "again", Tokenizer.from_bytes())
assert torch.equal(load("again")(ids), model(ids))
""")
