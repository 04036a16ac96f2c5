"""The families that came later: logits, tokenizers, files and steps, against transformers on tiny random models."""
import json, random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import compress, distill, sample, train
from data import UserError, export
from data.hub import FAMILIES
from data.loader import Windows
from data.machine import accelerate
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import KVCache, Transformer, load, save
from shared import config_of
from test_gguf import TEXTS
from test_model import CASES as OLDER, randomize, same
from test_values import ODD

TINY = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)
NEOX = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
GEMMA = dict(TINY, head_dim=16, sliding_window=7, query_pre_attn_scalar=24,
             layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CASES = {
    "smollm3": ("SmolLM3", dict(TINY, pad_token_id=0, no_rope_layer_interval=2, tie_word_embeddings=True)),
    "smollm3-sliding": ("SmolLM3", dict(TINY, pad_token_id=0, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=7,
                                        attention_bias=True)),
    "granite": ("Granite", dict(TINY, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0781,
                                logits_scaling=6.0)),
    "granite-tied-biased": ("Granite", dict(TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, logits_scaling=8.0)),
    "olmo2": ("Olmo2", dict(TINY, rms_norm_eps=1e-5)),
    "olmo2-biased": ("Olmo2", dict(TINY, attention_bias=True, tie_word_embeddings=True)),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3-linear": ("Gemma3", dict(GEMMA, rope_scaling=dict(rope_type="linear", factor=8.0), layer_types=None)),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox-sequential": ("GPTNeoX", dict(NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5,
                                            rotary_emb_base=5000)),
    "phi": ("Phi", TINY),
    "phi-normed": ("Phi", dict(TINY, qk_layernorm=True, num_key_value_heads=4, partial_rotary_factor=1.0)),
    "llama-yarn": ("Llama", dict(TINY, rope_scaling=YARN)),
    "qwen3-yarn-mscale": ("Qwen3", dict(TINY, head_dim=16, rope_scaling=dict(
        YARN, mscale=0.7, mscale_all_dim=1.3, beta_fast=8, beta_slow=2, truncate=False))),
    "qwen2-yarn-attention": ("Qwen2", dict(TINY, rope_scaling=dict(YARN, attention_factor=0.8))),
    "llama-dynamic": ("Llama", dict(TINY, rope_scaling=dict(rope_type="dynamic", factor=2.0))),
}


def reference(case, directory, **changes):
    """A random model of transformers, saved in `directory`."""
    transformers = pytest.importorskip("transformers")
    name, settings = CASES[case]
    kind = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))
    model = getattr(transformers, name + "ForCausalLM")(kind(**{**settings, **changes}, attn_implementation="eager"))
    randomize(model).eval()
    model.save_pretrained(directory)
    return model


NEW_FIELDS = {"smollm3": ("no_rope_layers", "no_rope_layer_interval"), "granite": ("logits_scaling", "residual_multiplier"), "olmo2": (),
              "gemma3_text": ("rope_parameters", "rope_local_base_freq", "query_pre_attn_scalar", "sliding_window_pattern", "layer_types",
                              "final_logit_softcapping"), "phi": ("qk_layernorm", "partial_rotary_factor", "tie_word_embeddings"),
              "gpt_neox": ("rotary_pct", "rotary_emb_base", "use_parallel_residual")}


@pytest.mark.parametrize("family", NEW_FIELDS)
def test_no_value_of_config_ends_in_anything_but_a_model_or_one_sentence(family, tmp_path):
    model = Transformer(config_of({**TINY, "num_hidden_layers": 2, "model_type": family})).initialize()
    save(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    right = json.loads(file.read_text(encoding="utf-8"))
    for field in NEW_FIELDS[family]:
        for value in (*ODD, {"sliding_attention": 3}, {"full_attention": {"rope_type": "linear"}}, {"sliding_attention": {"rope_theta": "x"}}):
            file.write_text(json.dumps({**right, field: value}), encoding="utf-8")
            try:
                save(load(tmp_path / "m"), tmp_path / "again")
            except UserError as error:
                assert str(tmp_path / "m") in str(error) and "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("model_type, reason", [("qwen3_next", "recurrent"), ("mixtral", "mixture of experts"), ("lfm2", "convolutions"),
                                                ("deepseek_v3", "latent"), ("gemma3n", "caches"), ("gemma3", "reads images"), ("gemma2", "caps")])
def test_a_family_that_needs_another_block_is_refused_with_the_reason(model_type, reason):
    with pytest.raises(UserError, match=f"model_type '{model_type}' is not supported: .*{reason}"):
        config_of({**TINY, "model_type": model_type})


def test_every_family_is_tested():
    names = {"Gemma3": "gemma3_text", "GPTNeoX": "gpt_neox"}
    assert set(FAMILIES) == {names.get(n, n.lower()) for n, _ in [*CASES.values(), *OLDER.values()]}


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = reference(case, tmp_path / "theirs")
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits.detach()
    for model in (load(tmp_path / "theirs"), accelerate(load(tmp_path / "theirs"))):
        same(model(ids), expected)
        with torch.no_grad():                                                  # in C, where it can be
            cache = KVCache(model.config, 2, 40)                               # prefill, a second piece, single tokens
            logits = [model(ids[:, :9], cache=cache), model(ids[:, 9:32], cache=cache)]
            logits += [model(ids[:, t:t + 1], cache=cache) for t in range(32, 40)]
            same(torch.cat(logits, dim=1), expected)
    save(model, tmp_path / "ours")                                             # and back
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(theirs)
    same(again(ids).logits.detach(), expected, 1e-6)
    same(accelerate(load(tmp_path / "ours"))(ids), model(ids), 0)


# --- GGUF: names by the gguf package's own table, permutations as llama.cpp's convert_hf_to_gguf.py makes them ---

def converted(theirs, architecture, gguf):
    """{name in the file: array} for the tensors of a model of transformers."""
    names = gguf.get_tensor_name_map(architecture, theirs.config.num_hidden_layers)
    heads, result = theirs.config.num_attention_heads, {}
    groups = {"q_proj": heads, "k_proj": getattr(theirs.config, "num_key_value_heads", heads)}
    for name, t in theirs.state_dict().items():
        if name == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        t, part = t.numpy(), module.rpartition(".")[2]
        if part in groups and theirs.config.model_type in ("granite", "smollm3"):
            t = t.reshape(groups[part], 2, len(t) // groups[part] // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)
        if part == "query_key_value":
            by_head = t.reshape(heads, 3, -1, *t.shape[1:])
            t = np.concatenate([by_head[:, i].reshape(-1, *t.shape[1:]) for i in range(3)])
        result[f"{names.get_name(module)}.{kind}"] = t
    return result


@pytest.mark.parametrize("case, keys", [
    ("smollm3", {}), ("olmo2", {}), ("phi", {"rope.dimension_count": 4, "attention.layer_norm_epsilon": 1e-5}),
    ("granite", {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.0781, "logit_scale": 6.0}),
    ("granite-tied-biased", {"embedding_scale": 1.0, "attention.scale": 1.0, "logit_scale": 8.0}),
    ("gpt_neox", {"use_parallel_residual": True, "rope.dimension_count": 2}),
    ("gpt_neox-sequential-biased", {"use_parallel_residual": False, "rope.dimension_count": 4, "rope.freq_base": 5000})])
def test_gguf_is_what_llama_cpp_converts(case, keys, tmp_path):
    gguf = pytest.importorskip("gguf")
    more = {"phi": dict(num_key_value_heads=4), "smollm3": dict(no_rope_layer_interval=4), "gpt_neox-sequential-biased": dict(attention_bias=True)}
    theirs = reference(case.removesuffix("-biased") if "neox" in case else case, tmp_path / "m", **{"vocab_size": 259, **more.get(case, {})})
    export.write_gguf(load(tmp_path / "m"), Tokenizer.from_bytes(), "f32", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: f.contents() for name, f in reader.fields.items()}
    name = fields["general.architecture"]
    expected = converted(theirs, {n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[name], gguf)
    found = {t.name: t.data.reshape(t.shape[::-1].tolist()) for t in reader.tensors}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    figures = {"attention.head_count": 4, "block_count": 4, "embedding_length": 32, "feed_forward_length": 64, **keys}
    for key, value in figures.items():
        assert fields[f"{name}.{key}"] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("case, more, match", [
    ("gemma3", {}, "Gemma 3 is not written here"), ("smollm3", {}, "smollm3 has no layers without rotary positions other than every fourth"),
    ("olmo2-biased", {}, "olmo2 has no qkv_bias True"), ("phi", {}, "phi2 has no num_key_value_heads 2"), ("llama-yarn", {}, "no rope_type 'yarn'"),
    ("gpt_neox-sequential", {}, "gptneox has no qkv_bias False"), ("phi-normed", {}, "phi2 has no qk_norm True")])
def test_gguf_that_llama_cpp_does_not_read_is_refused(case, more, match, tmp_path):
    pytest.importorskip("gguf")
    reference(case, tmp_path / "m", vocab_size=259, **more)
    with pytest.raises(UserError, match=match):
        export.write_gguf(load(tmp_path / "m"), Tokenizer.from_bytes(), "f32", tmp_path / "m.gguf")


# --- tokenizers of the families' kinds ---

def added(content, i, special=False, normalized=False):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}


def neox_tokenizer():
    """Byte-level BPE behind NFC, with a token for each run of 2 to 24 spaces."""
    data = json.loads(json.dumps(Tokenizer.train([*TEXTS.values()] * 3, 330).data))
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spaces = [added(" " * n, len(vocab) + 26 - n, normalized=True) for n in range(24, 1, -1)]
    first = len(vocab) + len(spaces) + 2
    return {**data, "normalizer": {"type": "NFC"}, "pre_tokenizer": level, "decoder": level, "post_processor": level,
            "model": {**data["model"], "vocab": vocab, "merges": merges},
            "added_tokens": sorted([*spaces, added("<|endoftext|>", first, special=True)], key=lambda t: t["id"])}, "<|endoftext|>"


def gemma_tokenizer():
    """SentencePiece's BPE with bytes for unknown characters; spaces are letters, runs of newlines are tokens."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    model.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *[f"<0x{b:02X}>" for b in range(256)]]
    model.train_from_iterator([TEXTS["prose"], TEXTS["code"], TEXTS["spaces"]] * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, show_progress=False))
    data = json.loads(model.to_str())
    n = len(data["model"]["vocab"])
    data["added_tokens"] = [added(t, i, special=True) for i, t in enumerate(specials[:6])] + [added("\n" * k, n + k - 2) for k in (2, 3, 4)]
    data["decoder"] = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                                        {"type": "ByteFallback"}, {"type": "Fuse"}]}
    one = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": one, "pair": one,
                              "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}}
    return data, "<eos>"


@pytest.mark.parametrize("make, family", [(neox_tokenizer, "gpt_neox"), (gemma_tokenizer, "gemma3_text")])
def test_tokenizers_give_the_ids_of_transformers(make, family, tmp_path):
    transformers = pytest.importorskip("transformers")
    data, end = make()
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}), encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "again")
    for theirs in map(transformers.AutoTokenizer.from_pretrained, (tmp_path, tmp_path / "again")):
        for name, text in TEXTS.items():
            ids = ours.encode(text, special=True)
            assert ids == theirs.encode(text, add_special_tokens=False), name
            decoded = ours.decode(ids)
            assert decoded == theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert decoded == text or name == "prose" and family == "gpt_neox"                # NFC
        assert ours.encode("a", bos=True) == theirs.encode("a")



# --- steps, students and training of a model of each family ---

SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64)
FAMILY = {"smollm3": dict(SMALL, no_rope_layer_interval=2), "olmo2": SMALL, "gpt_neox": SMALL, "phi": SMALL,
          "granite": dict(SMALL, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=2.5),
          "gemma3_text": dict(SMALL, head_dim=16, sliding_window=9, query_pre_attn_scalar=24, sliding_window_pattern=2)}
LINES = [f"w{i} = f({i * i % 7}, {i % 13})\n" for i in range(300)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with text.txt and text/, that prepared with 320 ids."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "text.txt").write_text("".join(random.Random(0).choices(LINES, k=1500)), encoding="utf-8")
    prepare(inputs=[folder / "text.txt"], vocab_size=320, out=folder / "text")
    return folder


@pytest.fixture(scope="module", params=FAMILY)
def family(request, text):
    """(name, directory of a model of that family, trained for some steps)."""
    model, windows = Transformer(config_of({"model_type": request.param, **FAMILY[request.param]})), Windows(text / "text", "train", 32)
    model.initialize(torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(40):
        loss, count, _ = train.cross_entropy(model, windows.training_rows(0, step * 8, 8))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss / count))
    assert losses[-1] < 0.6 * losses[0]
    save(model, text / request.param, Tokenizer.load(text / "text"))
    return request.param, text / request.param


def test_the_gradient_is_that_of_the_logits(family):
    """Also of a head with a bias, and of logits that are divided: train.py computes neither logits nor gradients by autograd."""
    model, batch = load(family[1]), Windows(family[1].parent / "text", "val", 32).training_rows(0, 0, 2)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(train.cross_entropy(model, batch)[0], parameters)
    expected = torch.autograd.grad(F.cross_entropy(model(batch.ids).flatten(0, 1), batch.targets.flatten(), reduction="sum"), parameters)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_native_text_is_the_same_text(family):
    ids = torch.tensor([Tokenizer.load(family[1]).encode("w1 = f(")])
    plain, fast = ([int(i) for i in sample.generate(accelerate(load(family[1]), native), ids, 30, temperature=0)] for native in (False, True))
    assert plain == fast


def same_in_transformers(directory):
    transformers = pytest.importorskip("transformers")
    model, ids = load(directory), torch.randint(200, (1, 30), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    same(theirs(ids).logits.detach(), model(ids).detach())


def loss_of(directory, text):
    batch = Windows(text / "text", "val", 32).training_rows(5, 0, 32)
    return float(F.cross_entropy(load(directory)(batch.ids).flatten(0, 1), batch.targets.flatten()))


def test_steps_of_compress(family, text):
    name, directory = family

    def run(*steps, flags=()):
        compress.main([str(directory), *steps, "--out", str(directory / "out"), "--overwrite", *map(str, flags)])
        return directory / "out"

    before, calibrated = loss_of(directory, text), ["--calibration", text / "text.txt", "--calibration-windows", "8"]
    for steps, flags, worse in ((["int8"], [], 0.05), (["int4:32:gptq"], calibrated, 0.2), (["lowrank:0.7:whitened"], calibrated, 0.3),
                                (["sparse:0.7"], calibrated, 0.2)):
        assert loss_of(run(*steps, flags=flags), text) < before + worse
    heads = ["heads:0.5"] if name not in ("olmo2", "gpt_neox") else []
    pruned = run("depth:0.75", *heads, "ffn:0.75", "vocab:0.95", flags=calibrated)
    config = load(pruned).config
    assert (config.num_hidden_layers, config.intermediate_size, config.num_attention_heads) == (3, 96, 2 if heads else 4)
    assert config.vocab_size < 320
    same_in_transformers(pruned)
    if not heads:
        for step in ("heads:0.5", "width:0.7"):
            with pytest.raises(UserError, match="use ffn or depth"):
                run(f"{step}:magnitude")
        return
    assert loss_of(run("width:0.7", flags=calibrated), text) < before + 0.5
    assert load(run("width:0.4:magnitude")).config.hidden_size == 32
    if name == "gemma3_text":                                     # its config.json has no word for the factor of another width
        assert json.loads((directory / "out" / "config.json").read_text())["switches"] == {"embedding_multiplier": 8.0}
    else:
        same_in_transformers(directory / "out")


def test_students(family, text):
    name, directory = family
    run = ["--data", str(text / "text"), *"--steps 3 --context 32 --batch-size 4 --warmup 1 --evals 1 --eval-tokens 256 --save-seconds 1e9 --threads 1 --dtype float32".split()]
    exits = ["--exits 2"] if name in ("granite", "phi") else []    # through a head with a divisor, or with a bias
    for flags in ("--student-layers 2 --hidden mse --attention-weight 1", "--student-layers 2 --init random --student-width 32", *exits):
        distill.main([str(directory), "--out", str(directory / "student"), "--overwrite", *run, *flags.split()])
        same_in_transformers(directory / "student" / "best")
    train.main(["--init-from", str(directory), "--out", str(directory / "more"), *run])
    same_in_transformers(directory / "more" / "best")
