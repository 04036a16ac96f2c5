"""kernels.c against the same model in plain PyTorch: a token through all blocks (decode), and what training needs,
forward and backward. And drawing from probabilities."""
import contextlib, copy, ctypes, importlib.util, inspect, platform, re, shutil, subprocess, sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import model as model_module
import sample, train
from data import native
from data.loader import IGNORE, Batch
from data.compiled import declare
from data.native import library
from model import MLP, Config, KVCache, LowRankLinear, RMSNorm, Transformer

SHAPES = {
    "usual": {},
    "odd sizes": dict(hidden_size=52, intermediate_size=70, head_dim=6, vocab_size=91),
    "one key-value head": dict(num_key_value_heads=1),
    "no grouping, tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "window": dict(sliding_window=5),
    "biases, no q and k norm": dict(qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True),
    "partial rotary": dict(rope=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)),
}


def build(**changes):
    torch.manual_seed(0)
    config = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    model = Transformer(Config(**{**config, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1) * 0.5)
    return model


def quantized(model, kind, **spec):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            model.replace({"module": name, "kind": kind, **spec}, model_module.LAYERS[kind].from_dense(layer, **spec))
    return model


@torch.inference_mode()
def in_pieces(model, ids, sizes, c=True, layers=None):
    """Logits of ids (B, T), read in pieces of these sizes, and the cache. c: by decode; layers (default: c): each
    layer by kernels.c."""
    model = native.attach(copy.deepcopy(model)) if c or layers else model
    cache = KVCache(model.config, len(ids), sum(sizes))
    if not c:
        cache.decoder = False
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, dim=1)], dim=1)
    assert library()[0] is None or bool(cache.decoder) == c
    return logits, cache


def same(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_in_c_is_the_models_own(shape, rows):
    model, sizes = build(**SHAPES[shape]), [9, 1, 1, 2, 7, 1, 3, 1]
    ids = torch.randint(90, (rows, sum(sizes)), generator=torch.Generator().manual_seed(1))
    (ours, cache), (expected, theirs) = (in_pieces(model, ids, sizes, c) for c in (True, False))
    same(ours, expected)
    for mine, other in zip(cache.keys + cache.values, theirs.keys + theirs.values):
        same(mine, other)


@pytest.mark.parametrize("kind, spec", [("int8", {}), ("int4", {}), ("int4", {"group": 64})])
def test_quantized_layers_in_c_agree_as_well_as_prefill_and_cache_do(kind, spec):
    """An ulp flips a rounding here and there: the distance of two paths is bounded by that of prefill and cache."""
    model, ids = quantized(build(intermediate_size=128), kind, **spec), torch.randint(96, (1, 40))

    def distance(a, b):
        return (a.log_softmax(-1).exp() * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()

    with torch.inference_mode():
        whole = native.attach(copy.deepcopy(model))(ids)
    ours, expected = (in_pieces(model, ids, [8] + [1] * 32, c, layers=True)[0] for c in (True, False))
    assert distance(ours, expected) <= max(2 * distance(whole, expected), torch.tensor(1e-4))      # one flip: 1e-5
    assert distance(ours, expected) < 0.01 and distance(ours, model(ids).detach()) < 0.01


@pytest.mark.parametrize("inner", [None, "int8"])
def test_low_rank_layers(inner):
    model = build()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            entry = {"module": name, "kind": "lowrank", "rank": 32}
            model.replace(entry, LowRankLinear.from_factors((u * s)[:, :32].contiguous(), v[:32].contiguous(), layer.bias))
    if inner:
        model = quantized(model, inner)
    sizes = [9, 1, 1, 3, 1]
    ids = torch.randint(96, (2, sum(sizes)), generator=torch.Generator().manual_seed(1))
    ours, expected = (in_pieces(model, ids, sizes, c)[0] for c in (True, False))
    same(ours, expected) if inner is None else torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.5)


def test_threads_change_no_bit():
    model, ids, results = build(hidden_size=256, intermediate_size=512), torch.randint(96, (1, 12)), []
    before = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(in_pieces(model, ids, [1] * 12)[1])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0].keys + results[0].values, other.keys + other.values))


@pytest.mark.parametrize("flags", [[], ["-march=native"], ["-march=native", "-DLANES=16", "-DBYTES=1"]],
                         ids=["portable", "no openmp", "wide"])
def test_other_ways_to_compile(flags, tmp_path, monkeypatch):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-O1", "-fPIC", "-shared", *flags, native.SOURCE, "-o", tmp_path / "k.so", "-lm"], check=True)
    built, ids = declare(ctypes.CDLL(str(tmp_path / "k.so"))), torch.randint(96, (1, 14))
    for model in (build(), quantized(build(intermediate_size=128), "int8"), quantized(build(intermediate_size=128), "int4")):
        expected = in_pieces(model, ids, [6, 1, 1, 6])[0]
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: (built, ""))
            torch.testing.assert_close(in_pieces(model, ids, [6, 1, 1, 6])[0], expected, rtol=1e-3, atol=0.3)


@pytest.mark.parametrize("flags", [
    ["-march=native"], ["-march=native", "-DLANES=8", "-DBYTES=0"], ["-march=native", "-DLANES=8", "-DBYTES=1"],
    ["-DLANES=16", "-DBYTES=0"], ["-DLANES=16", "-DBYTES=1"]], ids=" ".join)
def test_all_cpus_multiply_the_same_integers(flags, tmp_path):
    """Activations that rounding does not change: then the sums of integers are exact, and floats differ in order only."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-O0", "-fPIC", "-shared", *flags, native.SOURCE, "-o", tmp_path / "k.so", "-lm"], check=True)
    built, g = declare(ctypes.CDLL(str(tmp_path / "k.so"))), torch.Generator().manual_seed(2)
    assert native.checks_itself(built)
    for kind, spec, sizes in (("Int8Linear", {}, (1, 31, 32, 100, 416)), ("Int4Linear", {}, (32, 96, 288, 576)),
                              ("Int4Linear", {"group": 64}, (64, 448)), ("Int4Linear", {"group": 128}, (128, 640))):
        for k in sizes:
            for n, m in ((1, 1), (35, 1), (66, 3), (35, 8), (66, 15)):
                layer = getattr(model_module, kind).from_dense(torch.nn.Linear(k, n, bias=n == 35), **spec)
                x = torch.randint(-127, 128, (m, k), generator=g).float()
                x[:, ::32] = 127
                x *= torch.randint(-6, 4, (m, -(-k // 32)), generator=g).float().exp2().repeat_interleave(32, 1)[:, :k]
                x[m // 2:, 32:96] = 0
                weight, bias = layer.dense().double(), 0 if layer.bias is None else layer.bias.double()
                error = native.multiply(built, native.c_struct(layer), x) - (x.double() @ weight.T + bias)
                assert (error.abs() <= 1e-6 * (x.double().abs() @ weight.T.abs() + 1)).all()


def compilers_for(target):
    """Commands that compile C for x86-64 or aarch64, as far as they are here."""
    if platform.machine() in ({"x86_64": ("x86_64", "AMD64"), "aarch64": ("aarch64", "arm64")}[target]):
        yield from ([path] for path in map(shutil.which, ("cc", "gcc", "clang")) if path)
    if cross := shutil.which(f"{target}-linux-gnu-gcc"):
        yield [cross]
    if importlib.util.find_spec("ziglang"):                            # a compiler for all CPUs, from PyPI
        yield [sys.executable, "-m", "ziglang", "cc", "-target", f"{target}-linux-gnu"]


@pytest.mark.parametrize("target, flags, instruction", [
    ("x86_64", "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni", r"vpdpbusd.*zmm"),
    ("x86_64", "-mavx512f -mavx512bw -mavx512vl", r"vpmaddubsw.*zmm"),
    ("x86_64", "-mavx2 -mfma -mavxvnni", r"vpdpbusd.*ymm"),
    ("aarch64", "-march=armv8.2-a+dotprod", r"sdot"), ("aarch64", "-mcpu=neoverse_n1", r"sdot"),
    ("aarch64", "", r"smull|mul\s"), ])
def test_kernels_compile_for_other_cpus(target, flags, instruction, tmp_path):
    """Compiled, and the instruction is used; nothing runs."""
    for compiler in compilers_for(target):
        command = [*compiler, "-O0", "-S", *flags.split(), native.SOURCE, "-o", tmp_path / "k.s"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            assert re.search(instruction, (tmp_path / "k.s").read_text(encoding="utf-8"))
            return
        assert not re.search(r"kernels\.c:\d+.*error", done.stderr), done.stderr
    pytest.skip(f"no compiler for {target} {flags}")


@contextlib.contextmanager
def attached(modules, monkeypatch):
    """Inside, kernels.c is attached to `modules` and to the loss of train.py; afterwards nothing is."""
    classes = [type(module) for module in modules]
    with monkeypatch.context() as patch:
        if library()[0]:
            patch.setattr(train, "softmax_gradient", native.fast_softmax_gradient(train.softmax_gradient))
            for module in modules:
                native.attach_layer(module)
        yield patch
    for module, its in zip(modules, classes):
        module.__class__ = its


def both_ways(function, inputs, monkeypatch, *modules):
    """Compares function(*inputs) and the gradients of all inputs: by kernels.c, and by PyTorch's operators."""
    results, called, call = [], [], native.call
    for x in inputs:
        x.requires_grad_()
    for c in (True, False):
        with attached(modules, monkeypatch) if c else monkeypatch.context() as patch:
            if not c:                                            # an earlier test may have left the fast one there
                patch.setattr(train, "softmax_gradient", inspect.unwrap(train.softmax_gradient))
            patch.setattr(native, "call", lambda *args: called.append(c) or call(*args))
            y = function(*inputs)
            way = torch.randn(*y.shape, 2, generator=torch.Generator().manual_seed(3))[..., 0]       # not contiguous
            results.append((y.detach(), *torch.autograd.grad(y, inputs, way)))
    assert set(called) == ({True} if library()[0] else set())
    for ours, expected in zip(*results):
        same(ours, expected)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("n", [3, 8, 20, 96, 173])
def test_rms_norm_and_its_gradients(n, monkeypatch):
    norm = RMSNorm(n, 1e-5)
    norm.weight.data = random(n)
    for x in (random(2, 40, n), random(n, 41).T, 1e-3 * random(1, n)):
        both_ways(lambda x, _: norm(x), [x, norm.weight], monkeypatch, norm)
    native.attach_layer(norm)
    assert norm(torch.empty(0, n)).shape == (0, n) and not norm(torch.full((2, n), torch.nan)).isfinite().any()


@pytest.mark.parametrize("D, R, heads", [(8, 4, 3), (6, 3, 1), (20, 10, 2), (80, 40, 4), (64, 8, 1), (22, 5, 3)])
def test_heads_are_normalized_and_turned(D, R, heads, monkeypatch):
    norm, x = RMSNorm(D, 1e-6), random(5, 3, heads * D).transpose(0, 1)                   # (B, T, heads * D)
    attention = build(head_dim=D).model.layers[0].self_attn
    norm.weight.data = random(D)
    for rows in (1, 3):                                       # the same positions for all, or each row has its own
        angles = random(rows, 5, 1, R)
        rotary = angles.cos() * 1.1, angles.sin() * 1.1
        both_ways(lambda x: attention.to_heads(x, torch.nn.Identity(), rotary), [x], monkeypatch, attention)
        both_ways(lambda x, _: attention.to_heads(x, norm, rotary), [x, norm.weight], monkeypatch, attention)


def test_swiglu_and_its_gradients(monkeypatch):
    mlp = MLP(Config(hidden_size=13, intermediate_size=13))
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = torch.nn.Identity(), torch.nn.Linear(13, 13), torch.nn.Identity()
    for x in (random(3, 7, 13), 100 * random(1, 13), random(13, 5).T):
        both_ways(lambda x, *_: mlp(x), [x, *mlp.up_proj.parameters()], monkeypatch, mlp)


@pytest.mark.parametrize("V", [1, 5, 40, 65, 1001])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_cross_entropy_and_its_gradients(V, scale, monkeypatch):
    x, weight = random(30, 16), random(V, 16)
    targets = torch.randint(V, (30,), generator=torch.Generator().manual_seed(0))
    targets[[0, 7]] = IGNORE
    both_ways(lambda x, w: train.linear_cross_entropy(scale * x, w, targets), [x, weight], monkeypatch)
    monkeypatch.setattr(train, "softmax_gradient", native.fast_softmax_gradient(train.softmax_gradient))
    ours = train.linear_cross_entropy(scale * x, weight, targets)
    same(ours, F.cross_entropy((scale * x @ weight.T).double(), targets, reduction="sum", ignore_index=IGNORE))
    x.data[3, 2] = torch.nan
    assert train.linear_cross_entropy(x, weight, targets).isnan()
    for wrong in (V, -1):
        targets[5] = wrong
        if library()[0] is not None:
            with pytest.raises(IndexError, match=str(V)):
                train.linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_whole_model(shape, monkeypatch):
    """Packed examples, some targets ignored, and the blocks computed twice to save memory."""
    model = build(**SHAPES[shape]).train()
    ids, segments = torch.randint(90, (2, 23), generator=torch.Generator().manual_seed(1)), torch.zeros(2, 23).long()
    targets = ids.roll(-1, 1).index_fill(1, torch.tensor([4, 22]), IGNORE)
    segments[0, 9:], segments[1, 3:] = 1, 1
    parameters = list(model.parameters())
    for segments in (None, segments):
        batch = Batch(ids, targets, segments)
        both_ways(lambda *_: train.cross_entropy(model, batch)[0], parameters, monkeypatch, *model.modules())
    native.attach(model)
    wanted = torch.autograd.grad(model(ids).square().sum(), parameters)
    again = checkpoint(lambda ids: model(ids).square().sum(), ids, use_reentrant=False)
    assert all(map(torch.equal, wanted, torch.autograd.grad(again, parameters)))


def test_threads_change_no_bit_of_a_gradient():
    threads, results = torch.get_num_threads(), []
    x, norm, rotary = random(8, 64, 256), native.attach_layer(RMSNorm(64, 1e-6)), random(2, 1, 64, 1, 32).sin()
    attention = native.attach_layer(build(head_dim=64).model.layers[0].self_attn)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y = norm(attention.to_heads(x.requires_grad_(), norm, rotary))
        results.append(torch.autograd.grad(y, [x, norm.weight], random(8, 4, 64, 64)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_what_stays_in_python():
    """Gradients, training, several examples in a row, GPT-2's blocks, many tokens at once."""
    if library()[0] is None:
        pytest.skip(library()[1])
    model, ids = native.attach(build()), torch.randint(96, (1, 3))
    cache = KVCache(model.config, 1, 20)
    assert model(ids, cache=cache).requires_grad and "decoder" not in vars(cache)
    with torch.inference_mode():
        model(torch.randint(96, (1, 8)), cache=cache)
        steps, step = [], cache.decoder.step
        cache.decoder.step = lambda *args: steps.append(1) or step(*args)
        model(ids[:, :1], cache=cache)
        assert len(steps) == 1
        model.train()(ids[:, :1], cache=cache)
        assert len(steps) == 1 and not cache.decoder.takes(model, torch.zeros(1, 8))
        gpt2 = native.attach(build(layer_norm=True, gated=False, hidden_act="gelu_new", learned_positions=True, qk_norm=False))
        cache = KVCache(gpt2.config, 1, 20)
        assert gpt2(ids, cache=cache).isfinite().all() and cache.decoder is False
        with pytest.raises(RuntimeError):                                      # no room: the error that PyTorch gives
            build()(ids, cache=KVCache(model.config, 1, 2))


def test_an_embedding_has_no_other_rows():
    if library()[0] is None:
        pytest.skip(library()[1])
    for model in (build(), quantized(build(tie_word_embeddings=True), "int8")):
        native.attach(model)
        cache = KVCache(model.config, 1, 20)
        with torch.inference_mode():
            model(torch.randint(96, (1, 9)), cache=cache)
            for id in (96, -1):
                with pytest.raises(IndexError, match="96"):
                    model(torch.tensor([[3, id]]), cache=cache)
            assert cache.length == 9 and model(torch.tensor([[3, 95]]), cache=cache, last=1).shape == (1, 1, 96)


def test_draw_follows_the_probabilities():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 7.0]])
    ids = torch.stack([sample.draw(probs, torch.rand(2, 6, generator=torch.Generator().manual_seed(i)))[:, 0] for i in range(4000)])
    counts = torch.bincount(ids[:, 0], minlength=6)
    expected = probs[0] * 4000
    assert (ids[:, 1] == 5).all() and counts[[0, 2, 5]].sum() == 0
    assert ((counts - expected)[[1, 3, 4]] ** 2 / expected[[1, 3, 4]]).sum() < 13.8              # chi-square, p = 0.001


def test_top_p_equals_sorting_everything():
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 2, 4, 8])[:, None]
    for p in (0.1, 0.9, 0.999):
        probs, order = logits.softmax(-1).sort(descending=True)
        kept = probs * (probs.cumsum(-1) - probs < p)
        expected = torch.zeros_like(probs).scatter(1, order, kept / kept.sum(-1, keepdim=True))
        torch.testing.assert_close(sample.next_probs(logits, None, top_p=p), expected, rtol=1e-4, atol=1e-7)
        for seed in range(20):                        # drawn from all, and only if that is none of them, from these
            noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
            drawn = sample.next_token(logits, None, torch.Generator().manual_seed(seed), top_p=p)
            assert torch.equal(drawn, sample.draw(sample.next_probs(logits, None, top_p=p), noise))
