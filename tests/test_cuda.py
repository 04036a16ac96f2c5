"""What a GPU must compute: skipped without one. CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py

The last tests need none. On a device that holds no numbers (PyTorch's fake tensors) a mixture of
devices raises, and so does each number that Python reads, for which a GPU would have to be waited for.
"""
import copy, os, subprocess, sys

import pytest
import torch

import compress, sample, train
from data.graphs import FixedCache, Replay, one_launch
from data.loader import Batch
from data.machine import accelerate, is_accelerated, is_fast_on_cpu
from data.log import read_log
from data.structure import body_layers
from model import LAYERS, Config, KVCache, Transformer, load

from shared import ROOT
from test_train import TINY, data  # noqa: F401 - a fixture

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden by conftest.py: CUDA_VISIBLE_DEVICES=0")
SHAPE = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
             max_position_embeddings=64)
KINDS = {"plain": {}, "grouped": dict(num_key_value_heads=2), "tied": dict(tie_word_embeddings=True),
         "sliding": dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
         "gpt2": dict(model_type="gpt2", qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, layer_norm=True,
                      learned_positions=True, hidden_act="gelu_new", tie_word_embeddings=True)}


def random_model(kind):
    model, g = Transformer(Config(**SHAPE, **KINDS[kind])), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1, generator=g) if p.ndim > 1 else p.fill_(0.9)
    return model.eval()


def ids_of(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance):
    return (a.cpu() - b.cpu()).norm() <= tolerance * b.cpu().norm()


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_those_of_the_cpu(kind):
    model, ids = random_model(kind), ids_of(3, 33)
    other, segments = copy.deepcopy(model).cuda(), torch.arange(32).expand(3, -1) // 11
    for packed in (None, segments):
        batch = Batch(ids[:, :-1], ids[:, 1:], packed)
        there = Batch(*(None if t is None else t.cuda() for t in batch))
        for m, b in ((model, batch), (other, there)):
            m.zero_grad()
            train.cross_entropy(m, b)[0].backward()
        assert close(other(there.ids, segments=there.segments), model(batch.ids, segments=packed), 1e-5)
        assert all(close(p.grad, q.grad, 1e-4) for p, q in zip(other.parameters(), model.parameters()))


@gpu
@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_quantized_layers_equal_those_of_the_cpu(kind):
    layer = LAYERS[kind].from_dense(random_model("plain").model.layers[0].mlp.gate_proj)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert close(copy.deepcopy(layer).cuda()(x.cuda()), layer(x), 1e-5)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_writes_the_text_of_the_model(kind, monkeypatch):
    model = random_model(kind).cuda()
    with torch.inference_mode():
        cache = KVCache(model.config, 2, 64, "cuda", torch.float32)
        model(ids_of(2, 5).cuda(), cache=cache)
        assert isinstance(one_launch(model, cache), Replay)
    text = lambda: torch.stack(list(sample.generate(model, ids_of(2, 5), 80, temperature=0))).tolist()     # a window and more
    replayed = text()
    monkeypatch.setattr(sample, "one_launch", lambda model, cache: lambda ids: model(ids, cache=cache))
    assert replayed == text()


@gpu
def test_hooks_are_called_for_each_token():
    model, seen = random_model("plain").cuda(), []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert len(list(sample.generate(model, ids_of(1, 5), 20, temperature=0))) == len(seen) == 20


@gpu
def test_training_follows_the_cpu(data, tmp_path):
    flags = ["--data", str(data), *TINY, "--steps", "20", "--optimizer", "adamw", "--dtype", "float32"]
    for device, more in (("cpu", []), ("cuda", []), ("cuda:0", ["--compile"])):
        train.main([*flags, "--device", device, *more, "--out", str(tmp_path / f"{device}{len(more)}")])
    losses = {run.name: [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line] for run in tmp_path.iterdir()}
    for name in ("cuda0", "cuda:01"):
        gaps = [abs(a - b) for a, b in zip(losses[name], losses["cpu0"])]
        assert max(gaps[:10]) < 1e-3 and max(gaps) < 2e-2, (name, gaps)


@gpu
@pytest.mark.parametrize("chain", ("int4:gptq", "ffn:0.5", "lowrank:0.5", "sparse:0.5"))
def test_compression_equals_that_of_the_cpu(data, tmp_path, chain):
    train.main(["--data", str(data), *TINY, "--width", "128", "--steps", "20", "--out", str(tmp_path / "run")])
    for device in ("cpu", "cuda"):
        compress.main([str(tmp_path / "run"), chain, "--device", device, "--no-native", "--out", str(tmp_path / device)])
    batch = Batch(ids_of(8, 32), ids_of(8, 32), None)
    losses = [float(train.cross_entropy(load(tmp_path / device), batch)[0]) / 256 for device in ("cpu", "cuda")]
    assert abs(losses[0] - losses[1]) < 1e-4, losses


@gpu
def test_too_little_memory_is_one_sentence(data, tmp_path):
    code = ("import sys, torch; sys.path.insert(0, '.'); torch.cuda.set_per_process_memory_fraction(0.002); import train; "
            "from data.console import run; run(train.main)")
    done = subprocess.run([sys.executable, "-c", code, "--data", data, "--out", tmp_path / "out", *TINY, "--device", "cuda", "--width",
                           "1024", "--layers", "8"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "lower --micro-batch" in done.stderr


# --- without a GPU ---

@pytest.mark.parametrize("kind", (*KINDS, "int8"))
def test_a_fixed_cache_gives_the_logits_of_a_growing_one(kind):
    model, ids = random_model("plain" if kind == "int8" else kind), ids_of(2, 24)
    if kind == "int8":
        for name, layer in body_layers(model).items():
            model.replace({"module": name, "kind": "int8"}, LAYERS["int8"].from_dense(layer))
    with torch.inference_mode():
        plain, twin = (KVCache(model.config, 2, 26, "cpu", torch.float32) for _ in range(2))
        for cache in (plain, twin):
            model(ids[:, :5], cache=cache)
        fixed = FixedCache(twin)
        for i in range(5, 24):                                   # beyond the window of the sliding layers
            expected, found = (model(ids[:, i:i + 1], cache=cache) for cache in (plain, fixed))
            assert close(found, expected, 1e-5) and int(fixed.length) == plain.length == i + 1
        assert all(close(a, b, 1e-5) for a, b in zip(fixed.keys + fixed.values, plain.keys + plain.values))


def test_a_small_model_generates_on_the_cpu_where_the_kernels_are():
    wide = Transformer(Config(**{**SHAPE, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 1}))
    small = random_model("plain")
    assert not is_fast_on_cpu(small) and not is_fast_on_cpu(wide)                   # PyTorch alone
    assert is_fast_on_cpu(accelerate(small)) == is_accelerated(small) and not is_fast_on_cpu(accelerate(wide))


PRETEND = """
import sys, traceback; sys.path.insert(0, sys.argv[1])
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import backend_registration as registration
import distill, train
from data.graphs import FixedCache
from data.loader import Batch
from data.machine import Machine
from model import Config, KVCache, Transformer

class Module(registration._DummyBackendModule):
    def get_amp_supported_dtype(self): return [torch.bfloat16]
    def manual_seed_all(self, seed): pass

registration._setup_privateuseone_for_python_backend("pretend", backend_module=Module())
device = torch.device("pretend", 0)
config = Config(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=8,
                layer_types=["sliding_attention", "full_attention"])

def model():
    with device:
        m = Transformer(config)
    m.model.frequencies = m.model.frequencies.to(device)
    return m

def step(packed=False, teacher=None, **settings):
    m, cfg = model(), distill.DistillConfig(batch_size=4, micro_batch=2, context=16, **settings)
    loss_fn = distill.Distillation(teacher, m, [0, 1], 128, cfg) if teacher else train.cross_entropy
    optimizers = train.make_optimizers(m, loss_fn, cfg)
    ones = lambda rows: torch.ones(rows, 16, dtype=torch.int64)
    batches = lambda first, rows: Batch(ones(rows), ones(rows), ones(rows) if packed else None)
    return train.train_step(1, train.ModelAndLoss(m, loss_fn), batches, optimizers, torch.amp.GradScaler(enabled=False), cfg,
                            Machine(device, torch.float32, 0, 1, None))

with FakeTensorMode():
    for kind in (dict(), dict(teacher=model(), loss="jsd", hidden="mse", packed=True)):
        try:
            step(**kind)
        except DataDependentOutputException as error:            # where in our own files a number is read
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(sys.argv[1])]
            print("reads", frames[-1].line)
    with torch.inference_mode():
        m, cache = model().eval(), KVCache(config, 2, 20, device, torch.float32)
        m(torch.ones(2, 5, dtype=torch.int64, device=device), cache=cache)
        m(torch.ones(2, 1, dtype=torch.int64, device=device), cache=FixedCache(cache))
        print("token")
"""


def test_a_step_waits_once_and_a_token_never(tmp_path):
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot pretend a device")
    (tmp_path / "pretend.py").write_text(PRETEND, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", tmp_path / "pretend.py", ROOT], capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    figures = "reads loss, count, *values, norm = torch.cat((sums, norm[None])).tolist()"      # the end of train_step
    assert done.stdout.splitlines() == [figures] * 2 + ["token"], done.stdout + done.stderr
