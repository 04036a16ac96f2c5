"""Values from files: types, sizes and lengths are checked, foreign models are equal to transformers or refused by name."""
import json, os, shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from data import UserError
from data.hub import FAMILIES
from data.labels import Cache
from data.loader import Windows, open_split
from data.native import SOURCE
from data.compiled import build_library, built_library
from data.prepare import prepare
from data.tokenizer import Tokenizer
from data.values import check_values
from model import Config, Transformer, load, save
from shared import config_of

TINY = dict(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=64)
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def random(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model.eval()


@pytest.fixture
def written(tmp_path):
    model = random(Transformer(Config(**TINY)))
    model.history = [{"step": "train", "data": "x", "data_sha256": "0" * 64, "seed": 0}]
    save(model, tmp_path / "m", Tokenizer.from_bytes())
    return tmp_path / "m"


def edit(file, **changes):
    """Sets fields of a JSON file; ... removes one."""
    values = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}), encoding="utf-8")


def edit_tensors(directory, change):
    tensors = {k: t.clone() for k, t in load_file(directory / "model.safetensors").items()}
    save_file(change(tensors), directory / "model.safetensors")


# --- config.json ---

ODD = (None, True, -1, 0, 1.5, 10 ** 8, 2 ** 36, 2 ** 64, 10 ** 400, float("nan"), float("inf"), "x", "", [], [[]], {}, {"x": {}}, ["x"], [1], [None])
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
          "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
          "partial_rotary_factor", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "slm_format",
          "model_type", "base_model_type", "switches", "compression", "history", "exits", "quantization_config", "original_max_position_embeddings")


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_config_ends_in_anything_but_a_model_or_one_sentence(written, field, tmp_path):
    """580 values: each opens and saves, or is refused. None takes memory or time."""
    for value in ODD:
        edit(written / "config.json", **{field: value})
        try:
            save(load(written), tmp_path / "again", Tokenizer.from_bytes())
        except UserError as error:
            assert "config.json" in str(error) or str(written) in str(error)
            assert "\n" not in str(error) and len(str(error)) < 600
        edit(written / "config.json", **{field: ...})
        edit(written / "config.json", **{k: v for k, v in {**TINY, "model_type": "qwen3"}.items() if k == field})


@pytest.mark.parametrize("changes, says", [
    (dict(num_hidden_layers=10 ** 8), "num_hidden_layers is 100000000; it must be a whole number from 1 to 10,000"),
    (dict(num_hidden_layers=9999), "9,999 layers, but the file of weights holds only"),
    (dict(hidden_size=2 ** 40), "hidden_size is 1099511627776"), (dict(hidden_size=True), "hidden_size is True"),
    (dict(hidden_size=2 ** 24), "more than the 2,147,483,648 numbers"), (dict(vocab_size="259"), "vocab_size is '259'"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"), (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'; it must be true or false"),
    (dict(rope_scaling=[1]), r"rope_scaling is \[1\]"), (dict(rope_parameters={"full_attention": {"rope_theta": 5.0}}), "full_attention"),
    (dict(rope_parameters={"rope_type": "linear"}), "rope_type 'linear' has no factor"),
    (dict(rope_parameters={"rope_type": "linear", "factor": float("inf")}), "factor is inf"),
    (dict(rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}), "short_factor has 1 numbers; 16 rotary channels need 8"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}), "must be below high_freq_factor"),
    (dict(layer_types=["full_attention"]), "names 1 layers, but there are 2"),
    (dict(use_sliding_window=True, layer_types=["full_attention", "odd"]), "layer_types must name one of full_attention, sliding_attention"),
    (dict(compression=[{"module": "lm_head"}]), "names no kind"), (dict(compression=[{"module": "lm_head", "kind": ["int8"]}]), "cannot be"),
    (dict(history=[[]]), r"history is \[\[\]\]; it must be a list, each item a JSON object"), (dict(history=5), "history is 5"),
    (dict(history=[{"step": 1}]), "history, entry 0: step is 1"), (dict(history=[{}]), "history, entry 0 has no step"),
    (dict(history=[{"step": "train", "data_sha256": "x"}]), "has no data"), (dict(history=[{"step": "train", "context": "5"}]), "context is '5'"),
    (dict(exits=[True]), r"exits is \[True\]"), (dict(switches={"hub": 5}), "sets hub"), (dict(note="\ud800"), "cannot be read as JSON"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantization_config \(gptq\): .* before it was quantized"),
])
def test_the_sentence_names_the_field(written, changes, says):
    edit(written / "config.json", **changes)
    with pytest.raises(UserError, match=says):
        load(written)


def test_nested_without_end_is_no_json(written):
    (written / "config.json").write_text('{"x": ' + "[" * 10 ** 5 + "]" * 10 ** 5 + "}", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load(written)


def test_null_and_whole_numbers_are_what_they_mean(written):
    edit(written / "config.json", history=None, exits=None, compression=None, rope_scaling=None, rms_norm_eps=0, rope_theta=10000)
    model = load(written)
    assert model.history == [] and model.exits == [] and model.config.rms_norm_eps == 0


def test_a_table_of_types():
    table = {"n": (int, 1, 5), "x": (float, 0, 1), "l": ([float], 0, 1), "t": (str,)}
    check_values({"n": 5, "x": 1, "l": [0, 0.5], "t": "", "more": object()}, table, "f")
    for wrong in ({"n": True}, {"n": 1.0}, {"n": 6}, {"x": float("nan")}, {"x": "1"}, {"l": 1.0}, {"l": [2]}, {"t": None}):
        with pytest.raises(UserError, match=f"^f: {next(iter(wrong))} is .*; it must be "):
            check_values(wrong, table, "f")


# --- the families of transformers ---

@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_field_has_the_familys_default(family):
    transformers = pytest.importorskip("transformers", "5")
    renamed = FAMILIES[family].renamed
    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 512 if FAMILIES[family].partial else 64}     # or no channel rotates
    sizes = {renamed.get(k, k): v for k, v in sizes.items()}
    for more in ({}, {"num_key_value_heads": None})[:1 if family in ("mistral", "gemma3_text") else 2]:      # transformers refuses null there
        theirs = transformers.CONFIG_MAPPING[family](**sizes, **more)
        ours = config_of({"model_type": family, **sizes, **more})
        for name in ("max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "hidden_act", "intermediate_size", "num_key_value_heads",
                     "head_dim", "sliding_window"):
            if (value := getattr(theirs, renamed.get(name, name), None)) is not None:
                assert getattr(ours, name) == value, name
        if family != "gpt2":
            rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
            assert ours.rope["rope_theta"] == rope["rope_theta"]
            assert ours.rope["partial_rotary_factor"] == rope.get("partial_rotary_factor", 1.0)
    if family == "mistral":
        assert config_of({"model_type": family, **sizes, "sliding_window": None}).sliding_window == 0


def long(n, **more):
    return dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.1] * n, long_factor=[2.0] * n, **more)


ROPES = {"longrope": long(8, factor=4.0, original_max_position_embeddings=32), "longrope-by-window": long(8, original_max_position_embeddings=32),
         "attention_factor": long(8, original_max_position_embeddings=32, attention_factor=0.7),
         "linear": dict(rope_type="linear", factor=3.0, rope_theta=500.0), "partial": dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
         "partial-linear": dict(rope_type="linear", factor=2.0, rope_theta=1e4, partial_rotary_factor=0.5), "theta": dict(rope_type="default", rope_theta=77.0),
         "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, rope_theta=1e4),
         "dynamic": dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
         "yarn": dict(rope_type="yarn", factor=2.0, rope_theta=1e4, original_max_position_embeddings=32)}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_rotary_positions_equal_transformers_or_are_refused(family, rope, tmp_path):
    transformers = pytest.importorskip("transformers", "5")
    more = dict(head_dim=16) if family == "qwen3" else dict(pad_token_id=0, original_max_position_embeddings=32) if family == "phi3" else {}
    ids, refused = torch.randint(96, (1, 30), generator=torch.Generator().manual_seed(1)), None
    try:
        config = transformers.CONFIG_MAPPING[family](**SIZES, intermediate_size=128, num_key_value_heads=2, max_position_embeddings=128,
                                                     rope_parameters=dict(ROPES[rope]), **more)
        theirs = random(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
        expected = theirs(ids).logits.detach()
    except Exception as error:
        return pytest.skip(f"transformers does not run it: {type(error).__name__}")
    theirs.save_pretrained(tmp_path / "m")
    try:
        model = load(tmp_path / "m")
    except UserError as error:
        refused = str(error)
    if refused is None:
        assert (model(ids) - expected).abs().max() < 1e-3 * expected.abs().max()
        save(model, tmp_path / "again")
        assert load(tmp_path / "again").config == model.config or load(tmp_path / "again").config.rope == model.config.rope
    known = {"longrope", "longrope-by-window", "attention_factor", "linear", "llama3", "theta", "dynamic", "yarn"} if family != "phi3" else {
        "longrope", "longrope-by-window", "attention_factor", "partial", "theta"}
    assert (refused is None) == (rope in known), refused
    assert refused is None or "config.json" in refused and ("rope_type" in refused or "partial_rotary_factor" in refused)


# --- what lies in and beside the weights ---

def test_a_head_that_differs_from_the_tied_embedding_is_kept(written, capsys):
    ids = torch.arange(30)[None]
    right = load(written)(ids)
    edit(written / "config.json", tie_word_embeddings=True)
    model = load(written)
    assert torch.equal(model(ids), right) and not model.config.tie_word_embeddings and "holds another head" in capsys.readouterr().err
    edit_tensors(written, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    model = load(written)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("wrap", [lambda n: "module." + n, lambda n: "_orig_mod." + n, lambda n: "module._orig_mod." + n,
                                  lambda n: n.replace("self_attn.", "_orig_mod.self_attn."), lambda n: n.replace("mlp.", "_fsdp_wrapped_module.mlp.")])
def test_names_of_wrapped_models(written, wrap):
    ids = torch.arange(30)[None]
    right = load(written)(ids).clone()
    edit_tensors(written, lambda tensors: {wrap(n): t for n, t in tensors.items()})
    assert torch.equal(load(written)(ids), right)
    edit_tensors(written, lambda tensors: {**tensors, "lm_head.weight": tensors[wrap("lm_head.weight")].clone(),
                                           "module.lm_head.weight": torch.zeros(259, 32)})
    with pytest.raises(UserError, match="holds a tensor twice"):
        load(written)


@pytest.mark.parametrize("name, says", [("adapter_config.json", "merge it"), ("adapter_model.safetensors", "without its"),
                                        ("quantize_config.json", "settings of quantized weights")])
def test_adapters_and_quantization_settings_are_refused_by_name(written, name, says):
    (written / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}.*") as error:
        load(written)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_of_no_numbers_is_refused(written, name, value):
    def change(tensors):
        tensors[name].view(-1)[:] = value
        return tensors
    edit_tensors(written, change)
    with pytest.raises(UserError, match=f"{name} holds values that are infinite or not a number"):
        load(written)
    model = load(written, finite=False)
    with pytest.raises(UserError, match="its training diverged"):
        list(sample.generate(model, torch.tensor([[65, 66]]), 2))
    with pytest.raises(UserError, match="its training diverged"):
        list(sample.speculate(model, None, torch.tensor([[65, 66]]), 2))


def test_the_largest_finite_values_are_numbers(written):
    edit_tensors(written, lambda tensors: {**tensors, "lm_head.weight": torch.full((259, 32), 3e38)})
    load(written)


# --- prepared data ---

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    (root / "t.txt").write_text("\n".join(f"line {i} of a text" for i in range(400)), encoding="utf-8")
    (root / "q.jsonl").write_text("".join(json.dumps({"prompt": f"what is {i}?", "response": f"a number {i}"}) + "\n" for i in range(60)), encoding="utf-8")
    for name, file in (("text", "t.txt"), ("examples", "q.jsonl")):
        prepare(inputs=[root / file], name=name, out=root / name, tokenizer="bytes", val_fraction=0.2)
    return root


@pytest.mark.parametrize("field", ["name", "kind", "dtype", "vocab_size", "tokenizer_hash", "sha256", "splits"])
def test_no_value_of_meta_ends_in_anything_but_one_sentence(prepared, tmp_path, field):
    data = shutil.copytree(prepared / "text", tmp_path / "d")
    for value in (..., *ODD, "float64", {"train": {"tokens": 5}}, {"train": {"tokens": -1}, "val": {"tokens": 0}}, {"train": [], "val": {}}):
        shutil.copy(prepared / "text" / "meta.json", data)
        edit(data / "meta.json", **{field: value})
        try:
            open_split(data, "train")
        except UserError as error:
            assert "prepare the data anew" in str(error) and "\n" not in str(error)
        else:
            assert isinstance(value, str) and field in ("name", "tokenizer_hash", "sha256") or field == "vocab_size" and value is not ... and value >= 259


@pytest.mark.parametrize("kind, name", [("text", "train.bin"), ("text", "val.bin"), ("examples", "train.mask.bin"), ("examples", "val.mask.bin")])
def test_files_are_as_long_as_meta_says(prepared, tmp_path, kind, name):
    data = shutil.copytree(prepared / kind, tmp_path / "d")
    split = name.split(".")[0]
    size = (data / name).stat().st_size
    Windows(data, split, 32)
    for wrong in (size // 2, size - 1, 0, size + 2):
        os.truncate(data / name, wrong)
        with pytest.raises(UserError, match=rf"{name} has {wrong:,} bytes, and meta.json says {size:,}.*prepare the data anew"):
            Windows(data, split, 32)
    (data / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Windows(data, split, 32)


def test_an_id_beyond_the_vocabulary_is_found(prepared, tmp_path):
    data = shutil.copytree(prepared / "text", tmp_path / "d")
    ids = np.fromfile(data / "train.bin", np.uint16)
    ids[-1] = 259
    ids.tofile(data / "train.bin")
    with pytest.raises(UserError, match="train.bin holds the id 259, and meta.json says that there are only 259"):
        open_split(data, "train")
    assert len(open_split(data, "val")[1])


# --- a cache of labels ---

def test_a_caches_header_and_files_are_checked(tmp_path):
    header = dict(format=2, teacher="t", tokenizer="k", data="d", labels="sampled", id_type="uint16", context=4, windows=2, seed=0, draws=9,
                  tokens=8, bytes_per_token=9.0, seconds=0.5)
    files = dict(offsets=np.array([0, 4, 9], np.int64), lengths=np.array([1, 1, 1, 1, 2, 1, 1, 1], np.uint8), ids=np.arange(9, dtype=np.uint16),
                 counts=np.ones(9, np.uint8))

    def opened(changed=None, **arrays):
        values = {k: v for k, v in {**header, **(changed or {})}.items() if v is not ...}
        (tmp_path / "header.json").write_text(json.dumps(values), encoding="utf-8")
        for name, array in {**files, **arrays}.items():
            array.tofile(tmp_path / f"{name}.bin")
        return Cache(tmp_path, {"windows": values.get("windows")}, 9)
    assert opened().header == header
    for name in header:
        for value in (..., None, True, [], {}, "x", -1, float("nan"), 2 ** 70):
            try:
                opened({name: value})
            except UserError as error:
                assert "delete" in str(error) and str(tmp_path) in str(error)
            else:
                assert value == "x" or name == "format"
    for arrays in (dict(offsets=np.array([0, 5, 9], np.int64)), dict(offsets=np.array([1, 4, 9], np.int64)), dict(offsets=np.array([0, 4, -1], np.int64)),
                   dict(lengths=np.zeros(8, np.uint8)), dict(lengths=np.ones(7, np.uint8)), dict(ids=np.arange(1, 10, dtype=np.uint16)),
                   dict(counts=np.ones(5, np.uint8)), dict(ids=np.arange(0, dtype=np.uint16))):
        with pytest.raises(UserError, match="delete it and it is made again"):
            opened(**arrays)


# --- compiled kernels ---

@pytest.mark.skipif(os.name != "posix" or not shutil.which("cc"), reason="kernels are compiled on POSIX")
def test_a_library_that_others_can_write_is_not_loaded(tmp_path):
    old = os.umask(0o002)
    try:
        assert build_library(tmp_path, "key", SOURCE.read_text(encoding="utf-8"), ["cc"]) is not None
    finally:
        os.umask(old)
    file, = tmp_path.glob("kernels-key-*.so")
    assert built_library(tmp_path, "key") is not None
    for mode in (0o775, 0o757):
        file.chmod(mode)
        assert built_library(tmp_path, "key") is None
    file.chmod(0o755)
    if os.getuid() == 0:
        os.chown(file, 12345, -1)
        assert built_library(tmp_path, "key") is None
        os.chown(file, 0, -1)
    (tmp_path / "real").mkdir()
    shutil.move(file, tmp_path / "real" / file.name)
    file.symlink_to(tmp_path / "real" / file.name)
    assert built_library(tmp_path, "key") is None
