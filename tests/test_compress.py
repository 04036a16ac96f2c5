"""Quantized layers and the steps that make them: bounds, exact storage, strict loading, and the command."""
import ctypes, functools, json, math, os, re, shutil, subprocess, tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import compress
import sample
from data import UserError, native
from data.chain import parse_step
from data.native import c_struct, multiply
from data.compiled import declare
from data.tokenizer import Tokenizer
from model import LAYERS, Config, Int4Linear, Int8Linear, QuantEmbedding, RMSNorm, Transformer, load, save
from shared import config_of, fresh_logits
from data.structure import dequantize

ROOT = Path(__file__).resolve().parent.parent
SPECS = [("int8", {}), ("int4", {"group": 32}), ("int4", {"group": 64}), ("int4", {"group": 128})]
TINY = dict(vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=32)
IDS = torch.arange(40).view(2, 20) * 7 % 259


def tiny(**changes):
    model = Transformer(Config(**{**TINY, **changes})).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1) * 0.5)
    return model


def linear(rows=48, cols=256, bias=True, scale=1.0):
    layer = nn.Linear(cols, rows, bias=bias)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, cols, generator=g) * torch.logspace(-3, 1, rows)[:, None] * scale)
    return layer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories by name: dense, tied, and what the command makes of them."""
    root = tmp_path_factory.mktemp("models")
    save(tiny(), root / "dense", Tokenizer.from_bytes())
    save(tiny(tie_word_embeddings=True), root / "tied", Tokenizer.from_bytes())
    for name, *argv in (("int8", "dense", "int8"), ("int4", "dense", "int4"), ("tied8", "tied", "int8"),
                        ("tied4", "tied", "int4:64:rtn"), ("mixed", "tied", "int4", "--head-bits", "8")):
        run(root / argv[0], *argv[1:], "--out", root / name)
    return root


def run(*argv):
    compress.main(list(map(str, argv)))


def bound(weight, scales, bits):
    """Half a step, or the distance to the range of the integers for a weight beyond it."""
    steps = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    ends = torch.stack([steps * i for i in ((-127, 127) if bits == 8 else (-8, 7))])
    beyond = torch.maximum(ends.amin(0) - weight, weight - ends.amax(0))
    return torch.maximum(steps.abs() / 2, beyond) * (1 + 1e-6)


# --- one layer ---

@pytest.mark.parametrize("kind, spec", SPECS)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e3])
def test_rounding_is_at_most_half_a_step(kind, spec, scale):
    dense = linear(scale=scale)
    layer = LAYERS[kind].from_dense(dense, **spec)
    integers, scales = layer.integers()
    first, last = (-127, 127) if layer.bits == 8 else (-8, 7)
    assert integers.dtype == torch.int8 and scales.dtype == torch.float16 and first <= integers.min() and integers.max() <= last
    assert scales.shape == (48, 256 // spec.get("group", 256)) and integers.shape == dense.weight.shape
    assert ((dense.weight - layer.dense()).abs() <= bound(dense.weight, scales, layer.bits)).all()
    # the definition, in float64: scale rounded first, then integer * scale exactly
    wide = integers.double() * scales.double().repeat_interleave(256 // scales.shape[1], 1)
    assert torch.equal(layer.dense().double(), wide)
    if scale == 1.0 and layer.bits == 8:                         # where float16 has all its digits, nothing is cut
        assert ((dense.weight - layer.dense()).abs() <= scales.float().repeat_interleave(256 // scales.shape[1], 1) * 0.5001).all()
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("kind, spec", SPECS)
def test_zeros_and_the_smallest_and_a_single_weight(kind, spec):
    dense = linear(bias=False)
    with torch.no_grad():
        dense.weight[3] = 0
        dense.weight[4, :128] = 0
        dense.weight[5] = 1e-7                                   # a scale below float16's smallest number
        dense.weight[6] = 0
        dense.weight[6, 9] = -3.0
    layer = LAYERS[kind].from_dense(dense, **spec)
    integers, scales = layer.integers()
    assert (integers[3] == 0).all() and (scales[3] == 2 ** -24).all() and (layer.dense()[4, :128] == 0).all()
    assert (scales[5].abs() == 2 ** -24).all() and (scales != 0).all() and layer.dense().isfinite().all()
    assert integers[6, 9] in ((-127,) if layer.bits == 8 else (-7, -8)) and layer.dense()[6, 9] == pytest.approx(-3.0, rel=1e-3)
    assert ((dense.weight - layer.dense()).abs() <= bound(dense.weight, scales, layer.bits)).all()


def test_pack_and_unpack():
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)            # (256, 2): all bytes
    packed = Int4Linear.pack(every)
    assert packed.dtype == torch.uint8 and packed.shape == (256, 1) and packed.unique().numel() == 256
    assert torch.equal(Int4Linear.unpack(packed), every)
    assert Int4Linear.pack(torch.tensor([[-8, 7]], dtype=torch.int8)).tolist() == [[0xF0]]           # the first is the low nibble


def kernel_reference(layer, x):
    """What the C kernels compute, in float64: activations rounded to 8 bits in groups of 32, weights exact."""
    groups = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scales.clamp(min=1e-30)).round() * scales).flatten(-2)[..., :x.shape[-1]]
    return F.linear(rounded.double(), layer.dense().double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("flags", [("-march=native", "-fopenmp"), ()], ids=["native", "portable"])
@pytest.mark.parametrize("kind, spec", SPECS)
def test_kernels_against_float64(kind, spec, flags):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library = compiled(compiler, flags)
    g = torch.Generator().manual_seed(3)
    for n_in in (128, 256) if kind == "int4" else (128, 256, 100, 33):      # int8 rows may be odd
        for n_out in (1, 5, 16, 37):
            layer = LAYERS[kind].from_dense(linear(n_out, n_in, bias=n_out != 5), **spec)
            for tokens in (0, 1, 7, 8, 13):                                  # by row, by panel of six and a rest
                x = torch.randn(2, tokens, n_in, generator=g) * torch.logspace(-3, 2, n_in)     # outlier channels
                x[:, tokens // 2:, :64] = 0                                  # groups of zeros
                y, want = multiply(library, c_struct(layer), x), kernel_reference(layer, x)
                # one rounding may fall on the other side of a tie: a step of one activation
                assert y.shape == want.shape and (y - want).norm() <= 2e-3 * want.norm() + 1e-9


@functools.cache
def compiled(compiler, flags):
    library = Path(tempfile.mkdtemp()) / "kernels.so"
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", *flags, str(native.SOURCE), "-o", str(library), "-lm"],
                   check=True)
    return declare(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("flags", [("-march=native", "-fopenmp"), ()], ids=["native", "portable"])
def test_rms_norm_against_float64(flags):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library, g = compiled(compiler, flags), torch.Generator().manual_seed(5)
    for rows, size in ((1, 16), (3, 80), (7, 33), (300, 576)):
        x, weight = torch.randn(rows, size, generator=g) * 30, torch.randn(size, generator=g)
        y = torch.empty_like(x)
        library.rms_norm(x.data_ptr(), weight.data_ptr(), 1e-5, rows, size, y.data_ptr())
        assert torch.allclose(y.double(), F.rms_norm(x.double(), (size,), weight.double(), 1e-5), rtol=1e-5, atol=1e-6)


def test_the_norm_of_a_model_being_trained_has_gradients():
    norm, x = native.attach_layer(RMSNorm(16, 1e-6)), torch.randn(2, 16)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    with torch.no_grad():
        assert torch.allclose(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6), atol=1e-6)


def test_kernels_do_not_depend_on_threads_and_pass_on_nan():
    if native.library()[0] is None:
        pytest.skip(native.library()[1])
    layer, x = native.attach_layer(Int8Linear.from_dense(linear(300, 512))), torch.randn(9, 512, generator=torch.Generator().manual_seed(4))
    threads = torch.get_num_threads()
    with torch.no_grad():
        one = layer(x)
        torch.set_num_threads(2)
        two = layer(x)
        torch.set_num_threads(threads)
        assert torch.equal(one, two)
        x[3, 5] = math.nan
        y = layer(x)
    assert y[3].isnan().all() and torch.equal(y[4], one[4])


def test_without_a_compiler_weights_are_dequantized(monkeypatch):
    native.library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = native.attach(Transformer(Config(num_hidden_layers=1, hidden_size=32, intermediate_size=64)))
    assert not native.is_attached(model) and "no C compiler" in native.library()[1]
    layer, x = Int4Linear.from_dense(linear()), torch.randn(3, 256)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.dense(), layer.bias))
    native.library.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="owners and modes")
def test_machine_code_is_not_taken_from_a_directory_others_can_write(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "small-language-models"
    native.library.cache_clear()
    if native.library()[0] is None:
        pytest.skip(native.library()[1])
    built = list(cache.glob("kernels-*.so"))
    assert len(built) == 1 and cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    built[0].unlink()                                                        # not in place: this process has it mapped
    built[0].write_bytes(b"not trusted")
    native.library.cache_clear()
    assert native.library()[0] is not None and built[0].read_bytes() == b"not trusted"      # built anew, elsewhere
    cache.chmod(0o700)
    native.library.cache_clear()
    assert native.library()[0] is not None and len(list(cache.glob("kernels-*.so"))) == 1   # cut short: built anew, in its place
    assert built[0].read_bytes() != b"not trusted"
    native.library.cache_clear()


def test_kernels_read_only_float32_that_is_there():
    layer, x = native.attach_layer(Int8Linear.from_dense(linear(bias=True))), torch.randn(3, 256)
    with torch.no_grad():
        before = layer(x)
        layer.bias = nn.Parameter(layer.bias + 1)                            # another place in memory
        assert torch.allclose(layer(x), before + 1, atol=1e-4)
        layer.bfloat16().float()
        assert torch.allclose(layer(x), before + 1, atol=0.1)
        layer.bias.data = layer.bias.data.bfloat16()
        with pytest.raises(RuntimeError):                                    # torch's words: they are of two types
            layer(x)
        norm = native.attach_layer(RMSNorm(256, 1e-6)).bfloat16()
        assert torch.allclose(norm(x), F.rms_norm(x, (256,), norm.weight, 1e-6))


@pytest.mark.parametrize("kind, spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_of_the_dense_weight(kind, spec, dtype):
    layer = LAYERS[kind].from_dense(linear(), **spec).to(dtype)
    x = torch.randn(2, 3, 256, dtype=dtype, generator=torch.Generator().manual_seed(2))
    y = layer(x.clone().requires_grad_())                                 # gradients pass: not the C kernels' business
    assert y.dtype == dtype and torch.equal(y, F.linear(x, layer.dense().to(dtype), layer.bias))
    ids = torch.tensor([[4, 4, 0], [47, 1, 2]])
    assert torch.equal(QuantEmbedding(layer)(ids), F.embedding(ids, layer.dense()))


@pytest.mark.parametrize("kind, spec", SPECS)
def test_casts_leave_integers_and_scales_alone(kind, spec):
    layer = LAYERS[kind].from_dense(linear(), **spec)
    q, scales, dense = layer.q.clone(), layer.scales.clone(), layer.dense()
    for cast in (layer.bfloat16, layer.double, layer.half, lambda: layer.to("cpu", torch.bfloat16), layer.float):
        cast()
        assert torch.equal(layer.q, q) and torch.equal(layer.scales, scales) and layer.scales.dtype == torch.float16
    assert torch.equal(layer.dense(), dense) and layer.bias.dtype == torch.float32


def test_from_integers_keeps_what_another_algorithm_chose():
    integers = torch.randint(-8, 8, (6, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).half()
    layer = Int4Linear.from_integers(integers, scales)
    assert all(torch.equal(a, b) for a, b in zip(layer.integers(), (integers, scales))) and layer.bias is None
    assert (layer.in_features, layer.out_features) == (64, 6)
    empty = Int4Linear.empty(64, 6, bias=True, group=32)
    assert empty.q.shape == layer.q.shape and empty.scales.shape == scales.shape and empty.bias.shape == (6,)


def test_half_precision_weights_are_rounded_as_they_are():
    dense = linear().bfloat16()
    half = Int8Linear.from_dense(dense)
    assert torch.equal(half.dense(), Int8Linear.from_dense(dense.float()).dense()) and half.scales.dtype == torch.float16


# --- a whole model ---

def test_a_fresh_process_computes_the_same_bits(made, tmp_path):
    names = ["int8", "int4", "tied8", "tied4", "mixed"]
    models = {name: load(made / name) for name in names}
    for name, model in models.items():
        save(model, tmp_path / name)
    logits = fresh_logits(tmp_path, names, IDS)
    for name, model in models.items():
        assert torch.equal(logits[name], model(IDS)), name
        assert (made / name / "model.safetensors").read_bytes() == (tmp_path / name / "model.safetensors").read_bytes()
        assert load(tmp_path / name).compression == model.compression


def test_the_step_is_from_dense_of_every_layer_and_logits_stay_close(made):
    dense, model = load(made / "dense"), load(made / "int8")
    blocks = [n for n, m in dense.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert [e["module"] for e in model.compression] == blocks and len(blocks) == 2 * 7 + 2
    for name in blocks:
        old, new = dense.get_submodule(name), model.get_submodule(name)
        want = Int8Linear.from_dense(old)
        assert all(torch.equal(a, b) for a, b in zip(getattr(new, "table", new).integers(), want.integers())), name
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters())         # norms as they were
    a, b = dense(IDS).log_softmax(-1), model(IDS).log_softmax(-1)
    assert (a.exp() * (a - b)).sum(-1).mean() < 0.01 < (a - load(made / "int4")(IDS).log_softmax(-1)).abs().max()


def test_counts_and_bytes(made):
    for name in ("int8", "int4", "tied8", "tied4", "mixed"):
        model, dense = load(made / name), load(made / ("tied" if name in ("tied8", "tied4", "mixed") else "dense"))
        assert model.parameters_count() == dense.parameters_count() and model.matmul_parameters() == dense.matmul_parameters()
        assert model.flops_per_token(10) == dense.flops_per_token(10)
        body_bits, head_bits, group = {"int8": (8, 8, 0), "int4": (4, 4, 32), "tied8": (8, 8, 0), "tied4": (4, 4, 64),
                                       "mixed": (4, 8, 32)}[name]
        expected = 0
        for n, p in dense.named_parameters():                    # tied ones once
            bits = head_bits if "embed" in n or "lm_head" in n else body_bits
            scales = 0 if p.ndim == 1 else len(p) if bits == 8 else p.numel() // group
            expected += 4 * p.numel() if p.ndim == 1 else p.numel() * bits // 8 + 2 * scales
        assert model.resident_bytes() == expected
        file = made / name / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == expected + header
    wide = dict(vocab_size=1024, hidden_size=256, intermediate_size=512, head_dim=64)                # where the header is small
    model = tiny(**wide)
    dense_bytes = model.resident_bytes()
    save(compress.quantize_step(model, None, parse_step("int4", compress.STEPS), args())[0], made / "wide")
    assert (made / "wide" / "model.safetensors").stat().st_size <= 0.16 * dense_bytes


def args(head_bits=None):
    return type("Args", (), {"head_bits": head_bits})


@pytest.mark.parametrize("name", ["tied8", "tied4", "mixed"])
def test_a_tied_table_is_one(made, name):
    model, names = load(made / name), load_file(made / name / "model.safetensors").keys()
    assert model.lm_head is model.model.embed_tokens.table
    assert "model.embed_tokens.table.q" in names and not [n for n in names if "lm_head" in n]
    model.to(torch.bfloat16)
    assert model.lm_head is model.model.embed_tokens.table and model.lm_head.q is model.model.embed_tokens.table.q
    assert type(model.lm_head) is (Int4Linear if name == "tied4" else Int8Linear)
    assert model(IDS).dtype == model.dtype == torch.bfloat16


def test_untied_tables_are_two(made):
    model = load(made / "int8")
    assert model.lm_head is not model.model.embed_tokens.table
    ids = torch.tensor([[3, 5]])
    assert torch.equal(model.model.embed_tokens(ids), model.model.embed_tokens.table.dense()[ids])


def test_casts_at_load_and_generation(made):
    for name in ("int8", "tied4"):
        stored = load_file(made / name / "model.safetensors")
        for dtype in (torch.bfloat16, torch.float32):
            model = load(made / name, dtype=dtype)
            assert all(torch.equal(t, stored[n]) for n, t in model.named_buffers() if n in stored)
            assert {p.dtype for p in model.parameters()} == {dtype} and model.dtype == dtype
            ids = torch.stack(list(sample.generate(model, IDS[:, :6], 40, temperature=0)), dim=1)   # past the window
            assert ids.shape == (2, 40)
        full, cached = model(IDS)[:, -1].argmax(-1), next(sample.generate(model, IDS, 1, temperature=0))
        assert torch.equal(full, cached)


def test_dequantize_gives_the_same_model_dense(made, tmp_path):
    for name in ("int8", "tied4", "mixed"):
        run(made / name, "dequantize", "--out", tmp_path / name)
        model, dense = load(made / name), load(tmp_path / name)
        assert not dense.compression and torch.equal(dense(IDS), model(IDS))
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
        assert not config.keys() & {"compression", "base_model_type"}
        assert [h["step"] for h in dense.history][-2:] == [model.history[-1]["step"], "dequantize"]
    parts = {n.rpartition(".")[0] for n in load_file(tmp_path / "tied4" / "model.safetensors")}
    assert parts == {n.rpartition(".")[0] for n in load_file(made / "tied" / "model.safetensors")}


def test_biased_families_and_learned_positions(tmp_path):
    for hub in (dict(model_type="gpt2", vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=32),
                dict(model_type="phi3", vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                     num_attention_heads=4, max_position_embeddings=32)):
        model = Transformer(config_of(hub)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        model, *_ = compress.quantize_step(model, None, parse_step("int4", compress.STEPS), args(head_bits=8))
        assert not [e for e in model.compression if "embed_positions" in e["module"]]
        save(model, tmp_path / hub["model_type"])
        again = load(tmp_path / hub["model_type"])
        assert torch.equal(again(IDS), model(IDS)) and again.config.model_type == hub["model_type"]
        assert torch.equal(dequantize(again)(IDS), model(IDS))
        save(dequantize(again), tmp_path / "dense")
        assert torch.equal(load(tmp_path / "dense")(IDS), model(IDS))


# --- directories ---

def test_what_a_directory_says(made):
    config = json.loads((made / "mixed" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "slm-compressed" and config["base_model_type"] == "qwen3" and "architectures" not in config
    assert config["compression"][0] == {"module": "model.embed_tokens", "kind": "int8"}
    assert config["compression"][1] == {"module": "model.layers.0.self_attn.q_proj", "kind": "int4", "group": 32}
    assert len(config["compression"]) == 1 + 2 * 7
    entry = config["history"][-1]
    assert (entry["step"], entry["group"], entry["method"], entry["head_bits"]) == ("int4", 32, "rtn", 8)
    assert entry["parent"]["name"] == "tied" and re.fullmatch("[0-9a-f]{16}", entry["parent"]["sha256"])
    assert Tokenizer.load(made / "mixed").hash == Tokenizer.load(made / "tied").hash
    stored = load_file(made / "mixed" / "model.safetensors")
    assert {str(t.dtype) for n, t in stored.items() if n.endswith((".q", ".scales"))} == {"torch.int8", "torch.uint8", "torch.float16"}
    assert "library_name" not in (made / "mixed" / "README.md").read_text(encoding="utf-8")


def test_transformers_does_not_open_it(made):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="slm-compressed"):
        transformers.AutoModelForCausalLM.from_pretrained(made / "int8")


def test_strict_loading(made, tmp_path):
    import shutil
    shutil.copytree(made / "tied4", tmp_path / "m")
    path = tmp_path / "m"
    config, tensors = json.loads((path / "config.json").read_text(encoding="utf-8")), load_file(path / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items()}
    entries, q = config["compression"], "model.layers.1.mlp.up_proj.q"

    def refused(match, compression=entries, **changes):
        (path / "config.json").write_text(json.dumps({**config, "compression": compression, **changes}), encoding="utf-8")
        with pytest.raises(UserError, match=match):
            load(path)

    refused("embed_tokens is of kind 'int3', which is not supported; supported: int8, int4", [{**entries[0], "kind": "int3"}])
    refused("names no kind or no layer", [{"module": "model.layers.9.mlp.up_proj", "kind": "int8"}])
    refused("names no kind or no layer", [{"module": "model.embed_tokens"}])
    refused("names no kind or no layer", ["int8"])
    refused("names no kind or no layer", [{"module": 3, "kind": "int8"}])
    refused("not a dense layer", [*entries, entries[1]])
    refused("not a dense layer", [{"module": "lm_head", "kind": "int8"}])                            # tied
    refused("not a dense layer", [{"module": "model.norm", "kind": "int8"}])
    refused("groups that fit: 32, 64", [{**entries[0], "group": 48}])
    refused("config.json: .*offset for each group .asymmetric.*no longer read: take the dense model", [{**entries[0], "asymmetric": True}])
    refused("unexpected keyword argument", [{**entries[0], "speed": 2}])
    refused("unexpected keyword argument", [{**entries[0], "kind": "int8"}])
    refused("scales is \\(288, 1\\), config.json says \\(288, 2\\)", [{**entries[0], "group": 32}, *entries[1:]])
    refused("lacks tensor", [])
    refused("lacks tensor model.layers.1.mlp.down_proj.weight", entries[:-1])
    refused("model_type 'bloom' is not supported; supported: qwen3", base_model_type="bloom")
    refused("newer version", slm_format=99)
    for changed, match in (({q: tensors[q].to(torch.int8)}, "up_proj.q is torch.int8, config.json says torch.uint8"),
                           ({q.replace(".q", ".scales"): tensors[q.replace(".q", ".scales")].float()}, "config.json says torch.float16"),
                           ({q: tensors[q][:, :1].contiguous()}, r"config.json says \(128, 32\)"),
                           ({"evil.q": tensors[q]}, "unknown tensor evil.q"), ({"lm_head.q": tensors[q]}, "unknown tensor lm_head.q")):
        save_file({**tensors, **{n: t.clone() for n, t in changed.items()}}, path / "model.safetensors")
        refused(match)
    save_file({n: t for n, t in tensors.items() if n != q}, path / "model.safetensors")
    refused("lacks tensor " + q)


# --- steps and the command ---

@pytest.mark.parametrize("text, want", [("int8", ("int8", "", "")), ("int4", ("int4", "32", "rtn")), ("int4:64", ("int4", "64", "rtn")),
                                        ("int4:rtn", ("int4", "32", "rtn")), ("int4:128:rtn", ("int4", "128", "rtn"))])
def test_steps(text, want):
    assert tuple(parse_step(text, compress.STEPS)[:3]) == want


@pytest.mark.parametrize("steps, match", [
    (["int5"], "no step 'int5'; did you mean int"), (["int8:32"], "int8 has no value"), (["dequantize:8"], "dequantize has no value"),
    (["int4:48"], r"int4 is written int4\[:32\|64\|128\]"), (["int4:32:magic"], "int4 is written"), (["int4:32:rtn:x"], "too many parts"),
    (["int8", "int4"], "int4 comes after int8.*put dequantize between"), (["int8", "gguf:q4_0"], "gguf:q8_0 only"),
    (["gguf:q8_0", "int8"], "gguf must be the last"), (["dequantize"], "no quantized layer")])
def test_wrong_steps(steps, match, made, tmp_path):
    with pytest.raises(UserError, match=match):
        run(made / "dense", *steps, "--out", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_quantized(made, tmp_path):
    out = ("--out", tmp_path / "m")
    with pytest.raises(UserError, match="int4 comes after int8, which has quantized the model already: put dequantize between"):
        run(made / "int8", "int4", *out)
    run(made / "int8", "dequantize", "int4", *out)
    assert [h["step"] for h in load(tmp_path / "m").history] == ["int8", "dequantize", "int4"]
    save(tiny(intermediate_size=96), tmp_path / "odd", Tokenizer.from_bytes())
    with pytest.raises(UserError, match="model.layers.0.mlp.down_proj: int4 in groups of 64 does not fit rows of 96; groups that fit: 32"):
        run(tmp_path / "odd", "int4:64", "--out", tmp_path / "n")
    save(tiny(intermediate_size=80), tmp_path / "odder", Tokenizer.from_bytes())
    with pytest.raises(UserError, match="none of 32, 64, 128 does: use int8"):
        run(tmp_path / "odder", "int4", "--out", tmp_path / "n")
    run(tmp_path / "odder", "int8", "--out", tmp_path / "n")
    for bad in (float("nan"), float("inf"), 1e9):
        model = tiny()
        model.model.layers[1].mlp.up_proj.weight.data[3, 3] = bad
        with pytest.raises(UserError, match="layers.1.mlp.up_proj has weights that are"):
            compress.quantize_step(model, None, parse_step("int8", compress.STEPS), args())


@pytest.mark.parametrize("head_bits, kinds", [(16, (nn.Embedding, nn.Linear)), (8, (QuantEmbedding, Int8Linear)),
                                              (4, (QuantEmbedding, Int4Linear))])
def test_head_bits(head_bits, kinds, made, tmp_path):
    for source, step in (("dense", "int4"), ("tied", "int8")):
        run(made / source, step, "--head-bits", head_bits, "--out", tmp_path / source)
        model = load(tmp_path / source)
        assert (type(model.model.embed_tokens), type(model.lm_head)) == kinds
        assert type(model.model.layers[0].mlp.up_proj) is LAYERS[step]
        if head_bits == 16 and source == "tied":
            assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(UserError, match="--head-bits needs a step that rounds all alike"):
        run(made / "int8", "dequantize", "--head-bits", head_bits, "--out", tmp_path / "m")


def test_out(made, tmp_path, capsys):
    out = tmp_path / "new" / "m"
    run(made / "dense", "int8", "--out", out)
    model = load(out)
    assert re.fullmatch(rf"\S+m: {model.parameters_count():,} parameters; 0.1 MB on disk, 0.1 MB in memory: 8\.\d\d bits per weight, "
                        r"scales and all", capsys.readouterr().out.strip())
    with pytest.raises(UserError, match="is there already: give another name or --overwrite"):
        run(made / "dense", "int4", "--out", out)
    run(made / "dense", "int4", "--out", out, "--overwrite")
    assert load(out).compression[0]["kind"] == "int4" and [p.name for p in out.parent.iterdir()] == ["m"]
    with pytest.raises(UserError, match="is the model that is read"):
        run(out, "dequantize", "--out", out, "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="something else than a model"):
        run(made / "dense", "int8", "--out", tmp_path / "mine", "--overwrite")
    with pytest.raises(UserError, match="is a file; a model is a directory"):
        run(made / "dense", "int8", "--out", tmp_path / "mine" / "thesis.txt", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "years of work"
