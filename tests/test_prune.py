"""Structured pruning: what is cut out, what stays equal, what other programs read, and what is refused."""
import contextlib, copy, io, json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import compress
from data import UserError
from data.chain import parse_arguments, parse_step
from data.loader import Batch, Windows
from data.prepare import prepare
from data.sources import in_ids_of
from data.structure import axes_of, best_sizes, granularity, head_channels, kept_count, slice_model, width_sizes
from data.tokenizer import Tokenizer
from data.vocabulary import cut_tokenizer
from model import Config, Transformer, load, save
from shared import config_of

TINY = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=32)
HUB = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
           num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False)
FAMILIES = {
    "qwen3": dict(HUB, head_dim=16), "tied": dict(HUB, model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "llama": dict(HUB, attention_bias=True, mlp_bias=True), "mistral": dict(HUB, sliding_window=8),
    "qwen2": dict(HUB, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "phi3": dict(HUB, pad_token_id=0, sliding_window=None),
    "gpt2": dict(vocab_size=320, n_embd=64, n_inner=96, n_layer=3, n_head=4, n_positions=32)}
WORDS = "alpha beta gamma delta epsilon zeta theta iota kappa lambda sigma omega".split()
LINES = [f"def {WORDS[i % 12]}_{WORDS[i % 11]}(x, y={i % 7}):\n    return {WORDS[i % 9]} * {i % 13} + y - {i % 5}  # "
         "caf\u00e9 \u4f60\n\n\n" for i in range(400)]
IDS = torch.arange(60).view(3, 20) * 7 % 300


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """data/, prepared with 320 ids."""
    root = tmp_path_factory.mktemp("prune")
    (root / "text.txt").write_text("".join(LINES), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("prune-test", [root / "text.txt"], out=root / "data", vocab_size=320)
    return root


def tiny(root=None, **changes):
    """A model with random weights of all kinds, and a history that names the data."""
    config = {**TINY, **changes}
    model = Transformer(config_of(config) if "model_type" in config else Config(**config)).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.2 if p.ndim > 1 else 0.1) + (p.ndim == 1) * 0.5)
    if root:
        meta = json.loads((root / "data" / "meta.json").read_text(encoding="utf-8"))
        model.history = [{"step": "train", "data": str(root / "data"), "data_sha256": meta["sha256"]}]
    return model


@torch.no_grad()
def family(name, root):
    config = {"model_type": name, **FAMILIES[name]}
    model = Transformer(config_of(config)).eval()
    for i, (k, t) in enumerate(model.state_dict().items()):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) * 0.2 + ("norm" in k))
    model.tie_weights()
    model.history = tiny(root).history
    return model


def step(model, root, text, windows=4, **changes):
    """(model, tokenizer, what the history says) of one step, without the command."""
    step = parse_step(text, compress.STEPS)
    args = parse_arguments(["m", text, "--out", "o", "--calibration-windows", str(windows)])
    args.run = str(root / "run")
    for name, value in changes.items():
        setattr(args, name, value)
    with contextlib.redirect_stdout(io.StringIO()):
        return compress.STEPS[step.name].function(model, Tokenizer.load(root / "data"), step, args)


def batches(root, count=8):
    rows = Windows(root / "data", "train", 32).training_rows(0, 0, count)
    return [Batch(rows.ids[i:i + 4], rows.targets[i:i + 4], None) for i in range(0, count, 4)]


# --- what is cut out does nothing: the model computes the same ---

def test_zeroed_neurons_heads_and_channels_are_found_and_nothing_else_changes(root):
    model, dead = tiny(root), {"ffn": [3, 50], "keys": [1], "width": [0, 17]}
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[dead["ffn"]] = 0
            block.self_attn.v_proj.weight[16:] = 0
        for name, p in model.named_parameters():
            axes = axes_of(name)
            if axes[0] == "width" and p.ndim == 2:               # nothing writes to these channels
                p[dead["width"]] = 0
            if name.endswith("embed_tokens.weight"):
                p[:, dead["width"]] = 0
    scores = compress.activation_scores(model, batches(root))
    for axis, indices in dead.items():
        for row in scores[axis]:
            assert sorted(row.topk(len(indices), largest=False).indices.tolist()) == indices, axis
    kept = {axis: scores[axis].topk(scores[axis].shape[1] - len(dead[axis])).indices.sort().values for axis in dead}
    heads = head_channels(model.config, kept["keys"])
    assert heads["queries"].tolist() == [list(range(32))] * 3 and heads["keys"].tolist() == [list(range(16))] * 3
    with torch.no_grad():
        for cuts in ({"ffn": kept["ffn"]}, heads):
            assert (slice_model(model, cuts)(IDS) - model(IDS)).abs().max() < 1e-5
        small = slice_model(model, {"width": kept["width"][0]})
        for module in small.modules():                           # fewer channels have a larger mean square
            if hasattr(module, "eps") and len(module.weight) == 62:
                module.weight *= (64 / 62) ** 0.5
                module.eps *= 64 / 62
        assert (small(IDS) - model(IDS)).abs().max() < 1e-5


def test_cut_keeps_the_channels_that_are_named():
    model = tiny()
    heads = head_channels(model.config, torch.tensor([[0], [1], [1]]))
    ffn, width = torch.stack([torch.arange(i, 64 + i) for i in (0, 5, 9)]), torch.arange(0, 64, 2)
    small = slice_model(model, {"ffn": ffn, "width": width, **heads, "vocab": torch.arange(10, 74)})
    c, old, new = small.config, model.model.layers[1], small.model.layers[1]
    assert (c.hidden_size, c.intermediate_size, c.vocab_size) == (32, 64, 64)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (2, 1, 16)
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[::2, 5:69])
    assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[5:69, ::2])
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[32:, ::2])
    assert torch.equal(new.self_attn.v_proj.weight, old.self_attn.v_proj.weight[16:, ::2])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[::2, 32:])
    assert torch.equal(new.self_attn.q_norm.weight, old.self_attn.q_norm.weight)
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[10:74, ::2])
    assert torch.equal(small.model.norm.weight, model.model.norm.weight[::2])
    block = 2 * 32 + 2 * 16 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert small.parameters_count() == 2 * 64 * 32 + 32 + 3 * block


def test_depth_cuts_the_block_that_changes_least(root):
    model = tiny(root)
    with torch.no_grad():
        for p in (model.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].mlp.down_proj.weight):
            p.zero_()                                            # the identity
    model.exits = [1, 2]
    before = model(IDS)
    small, _, said = step(model, root, "depth:0.7")
    assert small.config.num_hidden_layers == 2 and said["num_hidden_layers"] == [3, 2] and small.exits == [1]
    old, new = (m.model.layers[i].self_attn.q_proj.weight for m, i in ((model, 2), (small, 1)))
    assert torch.allclose(old, new, atol=1e-3)
    assert (small(IDS) - before).abs().max() < 1e-2 * before.abs().max()     # refitting to itself: only the damping


def test_rotation_changes_nothing_and_sorts_the_stream(root):
    model = tiny(root, qkv_bias=True, o_bias=True, mlp_bias=True)
    turned = compress.rotated(model, batches(root))
    assert (turned(IDS) - model(IDS)).abs().max() < 1e-4
    moments = sum(F.rms_norm(x, (64,)).T @ F.rms_norm(x, (64,)) for hidden in compress.streams(turned, batches(root))
                  for x in hidden)
    energy = moments.diagonal()
    assert (energy[:-1] >= energy[1:] - 1e-2).all() and (moments - energy.diag()).abs().max() < 1e-3 * energy[0]


# --- fitting what is left ---

def test_refitting_is_the_least_squares_solution(root):
    """One block, half of its neurons gone: down_proj is the ridge regression of the dense output on what is left."""
    model = tiny(num_hidden_layers=1)
    kept = {"ffn": torch.arange(0, 96, 2)[None]}
    small, data = slice_model(model, kept), batches(root)
    small.requires_grad_(False), model.requires_grad_(False)
    before = small.model.layers[0].mlp.down_proj.weight.clone()
    compress.refit(small, model, kept, data)
    x, wanted = [], []
    for batch in data:
        with torch.no_grad():
            for m, to in ((small, x), (model, wanted)):
                hook = m.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, y: to.append((args[0], y)))
                m(batch.ids)
                hook.remove()
    x = torch.cat([a.flatten(0, 1) for a, _ in x]).double()
    wanted = torch.cat([y.flatten(0, 1) for _, y in wanted]).double()
    hessian = x.T @ x
    ridge = 0.01 * hessian.diagonal().mean() * torch.eye(48).double()
    right = before.double() + torch.linalg.solve(hessian + ridge, x.T @ (wanted - x @ before.double().T)).T
    assert torch.allclose(small.model.layers[0].mlp.down_proj.weight, right.float(), atol=2e-3)
    errors = [(x @ w.double().T - wanted).square().sum() for w in (before, small.model.layers[0].mlp.down_proj.weight)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("text", ["ffn:0.35", "heads:0.5", "depth:0.7", "width:0.75", "width:0.75:activation"])
def test_refitting_lowers_the_distance_to_the_dense_model(root, monkeypatch, text):
    """Also where the first layer is cut out, which depth does here."""
    ids = Windows(root / "data", "val", 32).training_rows(0, 0, 16).ids

    def distance(model):
        with torch.no_grad():
            return float(F.kl_div(model(ids).log_softmax(-1), dense(ids).log_softmax(-1), log_target=True,
                                  reduction="sum"))
    dense = tiny(root)
    if text.startswith("depth"):
        with torch.no_grad():                                    # it changes the stream least
            dense.model.layers[0].mlp.down_proj.weight.mul_(0.1)
            dense.model.layers[0].self_attn.o_proj.weight.mul_(0.1)
        first = step(copy.deepcopy(dense), root, text, windows=4)[0].model.layers[0].self_attn.q_norm.weight
        assert torch.equal(first, dense.model.layers[1].self_attn.q_norm.weight)
    fitted = distance(step(copy.deepcopy(dense), root, text, windows=32)[0])
    monkeypatch.setattr(compress, "refit", lambda *args: None)
    assert fitted < distance(step(copy.deepcopy(dense), root, text, windows=32)[0])


# --- other programs ---

STEPS = ["ffn:0.7", "heads:0.5", "width:0.75", "width:0.6:activation", "width:0.75:magnitude", "depth:0.7", "vocab:0.9"]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same(root, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    for text in STEPS:
        model = family(name, root)
        if name == "gpt2" and text[:5] in ("heads", "width"):
            with pytest.raises(UserError, match="gpt2 has no head_dim"):
                step(model, root, text)
            continue
        small, tokenizer, said = step(model, root, text)
        save(small, tmp_path / "small", tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
        ids = IDS % small.config.vocab_size
        with torch.no_grad():
            assert (theirs(ids).logits - small(ids)).abs().max() < 1e-4, text
            assert (load(tmp_path / "small")(ids) - small(ids)).abs().max() < 1e-5, text
        assert sum(p.numel() for p in theirs.parameters()) == small.parameters_count() == said["parameters"][1], text
        assert said["parameters"][0] == family(name, root).parameters_count() > said["parameters"][1]
        assert small.history == model.history and all(p.requires_grad for p in small.parameters())


# --- the budget of width ---

@pytest.mark.parametrize("keep", [0.4, 0.6, 0.75, 0.9])
def test_sizes_of_width_are_counted_exactly(keep):
    model = tiny(hidden_size=128, intermediate_size=200, tie_word_embeddings=True, qkv_bias=True)
    total, found = model.parameters_count(), width_sizes(model, keep)
    assert found
    for width, heads, ffn in map(dict.values, found):
        assert (width % 32 == 0 or width == 128) and (ffn % 32 == 0 or ffn == 200)
        sizes = dict(hidden_size=width, num_attention_heads=2 * heads, num_key_value_heads=heads)
        config = {**TINY, **sizes, "tie_word_embeddings": True, "qkv_bias": True}
        assert Transformer(Config(**{**config, "intermediate_size": ffn})).parameters_count() <= keep * total
        if ffn < 200:                                            # the next multiple would be too many
            larger = Transformer(Config(**{**config, "intermediate_size": min(200, ffn + 32)}))
            assert larger.parameters_count() > keep * total


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_the_sizes_with_the_least_loss_are_found_without_trying_all(keep):
    """Of losses with one valley, at each place in turn."""
    with torch.device("meta"):
        found = width_sizes(Transformer(Config(**{**TINY, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
                                                  "head_dim": 64, "intermediate_size": 1536})), keep)
    counts = []
    for wanted in found:
        tried = []

        def loss(sizes):
            tried.append(sizes)
            return (sizes["width"] / 32 - wanted["width"] / 32) ** 2 + (sizes["keys"] - wanted["keys"]) ** 2
        assert best_sizes(found, loss) == wanted
        assert len(tried) == len({tuple(sizes.values()) for sizes in tried})
        counts.append(len(tried))
    assert sum(counts) / len(counts) < 0.6 * len(found)


def test_a_size_is_a_multiple_of_32_and_never_none():
    assert [kept_count(480, k, granularity(480)) for k in (1.0, 0.75, 0.5, 0.01)] == [480, 352, 256, 32]
    assert [kept_count(20, k, granularity(20)) for k in (0.9, 0.5, 0.01)] == [16, 8, 8]       # a toy's
    assert [kept_count(5, k) for k in (1.0, 0.5, 0.01)] == [5, 2, 0]                                # of heads, layers


# --- vocabulary ---

TEXTS = ["def f(x):\n    return x - 5\n", "caf\u00e9 \u4f60\u597d \U0001f600 \x00\t\r\n", "", "<|endoftext|> is text",
         " \n\n  ", "".join(LINES[:50])]


def test_a_cut_vocabulary_encodes_every_text_and_is_closed_under_its_merges(root, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, old = tiny(root), Tokenizer.load(root / "data")
    small, tokenizer, said = step(model, root, "vocab:0.9")
    assert small.config.vocab_size == tokenizer.vocab_size == 288 and said["vocab_size"] == [320, 288]
    vocab = tokenizer.data["model"]["vocab"]
    assert sorted([*vocab.values(), *tokenizer.special_tokens.values()]) == list(range(288))
    assert sum(len(t) == 1 for t in vocab) == 256 and tokenizer.special_tokens.keys() == old.special_tokens.keys()
    for a, b in tokenizer.data["model"]["merges"]:
        assert {a, b, a + b} <= vocab.keys()
    assert {a + b for a, b in tokenizer.data["model"]["merges"]} == {t for t in vocab if len(t) > 1}
    assert tokenizer.pattern and tokenizer.eos_token == old.eos_token and len(tokenizer.eos_ids) == len(old.eos_ids)
    save(small, tmp_path / "small", tokenizer)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path / "small"), Tokenizer.load(tmp_path / "small")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and again.encode(text) == ids and again.hash == tokenizer.hash
        if "<|" not in text:
            assert theirs.encode(text) == ids
    # each id that stays is the same token with the same row
    kept = [old._bytes.index(tokenizer._bytes[i]) for i in range(288)]
    assert torch.equal(small.model.embed_tokens.weight, model.model.embed_tokens.weight[kept])
    ids = torch.arange(40).view(2, 20) * 7 % 288
    with torch.no_grad():
        assert (small(ids) - model(torch.tensor(kept)[ids])[..., kept]).abs().max() < 1e-6


def test_the_least_used_ids_go_first_and_their_uses_go_to_their_parts(root):
    tokenizer = Tokenizer._build([*(bytes([b]) for b in range(256)), b"ab", b"cd", b"abc", b"ef", b"abcd"])
    counts = np.zeros(264, np.int64)
    counts[[256, 257, 258, 259, 260]] = 1, 5, 2, 4, 0            # ab, cd, abc, ef, abcd = ab + cd
    def left(size):
        kept, smaller = cut_tokenizer(tokenizer, counts, size)
        assert kept.tolist() == sorted(kept.tolist()) and smaller.vocab_size == size
        return sorted(t for t in smaller.data["model"]["vocab"] if len(t) > 1)
    assert left(263) == ["ab", "abc", "cd", "ef"]
    assert left(262) == ["ab", "cd", "ef"]                       # abc: 2 uses, now ab's, that has 3
    assert left(261) == ["cd", "ef"] and left(260) == ["cd"] and left(259) == []
    with pytest.raises(UserError, match="bytes and special tokens"):
        cut_tokenizer(tokenizer, counts, 258)


def test_template_ids_follow(root):
    tokenizer = Tokenizer.load(root / "data")
    tokenizer.data["post_processor"] = {"type": "TemplateProcessing", "pair": [], "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [318], "tokens": ["<|im_start|>"]}}}
    assert tokenizer.special_tokens["<|im_start|>"] == 318
    _, smaller = cut_tokenizer(tokenizer, np.ones(320, np.int64), 300)
    assert smaller._library(False).encode("a").ids == [298, smaller.encode("a")[0]] and smaller.bos_id == 298


def test_a_text_file_says_which_ids_are_used(root, tmp_path):
    (tmp_path / "text.txt").write_text("return return return", encoding="utf-8")
    _, tokenizer, said = step(tiny(), root, "vocab:0.88", calibration=str(tmp_path / "text.txt"))
    old = Tokenizer.load(root / "data")
    ids = old.encode("return return")
    assert tokenizer.encode("return return") == [tokenizer._bytes.index(old._bytes[i]) for i in ids]
    assert said["calibration"]["data"] == "text.txt"


def test_after_vocab_other_steps_read_the_same_text_in_the_new_ids(root, tmp_path):
    model = tiny(root)
    save(model, tmp_path / "model", Tokenizer.load(root / "data"))
    with contextlib.redirect_stdout(io.StringIO()):
        compress.main([str(tmp_path / "model"), "vocab:0.9", "ffn:0.7", "recover:2", "int8",
                       "--out", str(tmp_path / "out"), "--calibration-windows", "4"])
    small, tokenizer = load(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    assert [entry["step"] for entry in small.history] == ["train", "vocab", "ffn", "recover", "int8"]
    assert small.config.vocab_size == 288 == tokenizer.vocab_size and small.config.intermediate_size == 64
    assert not list(tmp_path.glob("out.*"))
    place = in_ids_of(tokenizer, root / "data", tmp_path / "again")
    for split in ("train", "val"):
        texts = [t.decode([int(i) for i in np.fromfile(d / f"{split}.bin", np.uint16)])
                 for t, d in ((Tokenizer.load(root / "data"), root / "data"), (tokenizer, place))]
        assert texts[0] == texts[1] and len(texts[0]) > 500


# --- what is refused ---

@pytest.mark.parametrize("text, says", [
    ("heads:0.2", "heads:0.2 leaves no head: keep more"), ("depth:0.1", "depth:0.1 leaves no layer"),
    ("width:0.05", "width:0.05 leaves no channel"), ("vocab:0.5", "160 ids are fewer than the bytes")])
def test_a_share_that_leaves_nothing(root, text, says):
    with pytest.raises(UserError, match=says):
        step(tiny(root), root, text)


def test_no_text_and_quantized_layers_are_refused(root, tmp_path):
    for text in ("ffn:0.5", "vocab:0.9"):
        with pytest.raises(UserError, match="--calibration"):
            step(tiny(), root, text)
    assert step(tiny(), root, "ffn:0.5:magnitude")[0].config.intermediate_size == 64
    save(tiny(root), tmp_path / "model", Tokenizer.load(root / "data"))
    for chain in (["int8", "ffn:0.5"], ["int8", "vocab:0.9"]):
        with pytest.raises(UserError, match="after int8"):
            compress.main([str(tmp_path / "model"), *chain, "--out", str(tmp_path / "out")])
    compress.main([str(tmp_path / "model"), "int8", "--out", str(tmp_path / "int8")])
    for name in ("ffn", "heads", "width", "depth", "vocab"):
        with pytest.raises(UserError, match="after int8"):
            compress.main([str(tmp_path / "int8"), f"{name}:0.9", "--out", str(tmp_path / "out")])
