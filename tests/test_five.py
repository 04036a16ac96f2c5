"""The five changes that forks make, as data/README.md describes them: each is a few edits of a copy of the tree, and works."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

import breaking

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    breaking.make(folder)
    return folder


def fork(place, *edits):
    """A copy of the tree with edits (file, text, what takes its place)."""
    shutil.copytree(ROOT, place, ignore=lambda folder, names: [
        name for name in names if name in (".git", "tests", "__pycache__") or name.startswith("out")
        or Path(folder, name).is_dir() and Path(folder).name == "data"])
    for file, old, new in edits:
        text = (place / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, (file, old)
        (place / file).write_text(text.replace(old, new), encoding="utf-8")
    return place


def run(place, *argv, code=0):
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=place, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_output_gate(made, tmp_path):
    place = fork(
        tmp_path / "fork",
        ("model.py", "    qkv_bias: bool = False\n", "    qkv_bias: bool = False\n    output_gate: bool = False\n"),
        ("model.py", "        # Queries and keys of length", "        self.gate = nn.Linear(c.hidden_size, 1) if c.output_gate "
         "else None\n        # Queries and keys of length"),
        ("model.py", "        return self.o_proj(self.mix(x, rotary, mask, cache))\n",
         "        y = self.o_proj(self.mix(x, rotary, mask, cache))\n"
         "        return y if self.gate is None else y * self.gate(x).sigmoid()\n"),
        ("train.py", "    tie: bool = False ", "    output_gate: bool = False       # a gate on what attention adds\n    tie: bool = False "),
        ("train.py", "tie_word_embeddings=cfg.tie)", "tie_word_embeddings=cfg.tie, output_gate=cfg.output_gate)"))
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
    place = fork(
        tmp_path / "fork",
        ("compress.py", "def sparse_step(", "def alternate(weight, hessian, keep, drift=None, name=\"a layer\"):\n"
         "    \"\"\"Zeros in every second column.\"\"\"\n    weight = weight.clone()\n    weight[:, ::2] = 0\n    return weight\n\n\ndef sparse_step("),
        ("compress.py", "wanda=wanda, magnitude=magnitude)", "wanda=wanda, magnitude=magnitude, alternate=alternate)"))
    run(place, "compress.py", made / "model", "sparse:0.5:alternate", "--out", "sparse")
    run(place, "-c", "from model import load\nw = load('sparse').model.layers[0].mlp.up_proj.weight\n"
        "assert (w[:, ::2] == 0).all() and (w[:, 1::2] != 0).all()")


def test_a_distillation_loss(made, tmp_path):
    place = fork(
        tmp_path / "fork",
        ("distill.py", "DIVERGENCES = {", "def skew_kl(log_p, log_q, beta):\n"
         "    mixed = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))\n"
         "    return (log_p.exp() * (log_p - mixed)).sum(1)\n\n\nDIVERGENCES = {\"skew\": skew_kl, "))
    run(place, "distill.py", made / "model", "--data", made / "data", "--out", "student", "--student-layers", "1", "--loss", "skew",
        "--beta", "0.1", *breaking.TINY[6:])
    assert '"loss": "skew"' in (place / "student/best/config.json").read_text(encoding="utf-8")


def test_an_optimizer(made, tmp_path):
    place = fork(
        tmp_path / "fork",
        ("train.py", "def make_optimizers(", "class Lion(torch.optim.Optimizer):\n"
         "    def __init__(self, params, lr):\n        super().__init__(params, dict(lr=lr))\n\n"
         "    @torch.no_grad()\n    def step(self):\n        for group in self.param_groups:\n            for p in group['params']:\n"
         "                if p.grad is not None:\n                    m = self.state[p].setdefault('momentum', torch.zeros_like(p))\n"
         "                    p.add_(m.lerp(p.grad, 0.1).sign(), alpha=-group['lr'])\n                    m.lerp_(p.grad, 0.01)\n\n\n"
         "def make_optimizers("),
        ("train.py", '    if cfg.optimizer == "adamw":\n', '    if cfg.optimizer != "muon":\n'),
        ("train.py", '    if cfg.optimizer == "muon" and matrices:\n', '    if cfg.optimizer == "lion":\n'
         '        optimizers = [Lion([p for group in groups for p in group["params"]], cfg.lr)]\n'
         '    if cfg.optimizer == "muon" and matrices:\n'),
        ("train.py", 'optimizer=("muon", "adamw")', 'optimizer=("muon", "adamw", "lion")'))
    flags = ["--data", made / "data", "--out", "run", *breaking.TINY, "--optimizer", "lion", "--lr", "0.001"]
    run(place, "train.py", *flags)
    assert "step 5 of 5" in run(place, "train.py", "--out", "run", "--resume", "--steps", "5")


def test_a_step_of_a_chain(made, tmp_path):
    place = fork(
        tmp_path / "fork",
        ("compress.py", "STEPS = {\n", "def scale_step(model, tokenizer, step, args):\n    with torch.no_grad():\n"
         "        model.model.norm.weight *= float(step.value)\n    return model, tokenizer, {\"step\": step.name, \"keep\": step.value}\n\n\n"
         "STEPS = {\n    \"scale\": Form(scale_step, (\"KEEP\",)),\n"))
    run(place, "compress.py", made / "model", "scale:0.5", "int8", "--out", "scaled")
    assert '"step": "scale"' in (place / "scaled/config.json").read_text(encoding="utf-8")
    assert "scale is written scale:KEEP" in run(place, "compress.py", made / "model", "scale:2", "--out", "no", code=2)
