"""The ruler: quality against float64 brute force, turns against a clock of our own, and the command that reports both."""
import json, math, re, sys

import numpy as np
import pytest
import torch
from torch import nn

import compress
import sample
from data import UserError, measure as measuring, speed as speeds
from data.loader import IGNORE, Batch, Windows
from data.measure import compare, speed
from data.speed import energy_counters, memory_peak, peak_alone
from data.loader import stream_batches
from data.machine import accelerate
from data.prepare import prepare
from data.report import front, table
from data.tokenizer import Tokenizer
from data.vocabulary import reencoded
from model import Config, Transformer, load, save

SIZES = dict(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, max_position_embeddings=32)
TEXT = "".join(f"Line {i}: the quick brown fox, naïve as ever, jumps {i * i} times.\n" for i in range(60))
FLAGS = ("--new-tokens", 4, "--rounds", 2)


def tiny(seed=0, **changes):
    model = Transformer(Config(**{**SIZES, **changes})).eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1 if p.ndim == 1 else 0.3, generator=g)
    return model


def near(model, amount, seed=1):
    """A copy of a model, moved a little: what compression does."""
    other, g = tiny(**{k: getattr(model.config, k) for k in SIZES}), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters()):
            p.copy_(q + amount * torch.randn(q.shape, generator=g))
    return other


def some_batches(vocab=259, rows=7, T=20, count=3):
    g = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(vocab, (rows, T + 1), generator=g)
        targets = ids[:, 1:].clone()
        targets[0, 4:] = IGNORE
        yield Batch(ids[:, :-1], targets, None)


# --- quality ---

def test_quality_is_that_of_full_logits_in_float64():
    base, ids, token_bytes = tiny(), 259, np.arange(259) % 7
    models = {"base": base, "near": near(base, 0.001), "far": tiny(9)}
    result = compare(models, some_batches(), token_bytes)
    for name, model in models.items():
        nats, kl, same = [], [], []
        for batch in some_batches():
            keep = batch.targets >= 0
            p, q = (m.double()(batch.ids)[keep] for m in (base, model))
            nats.append(-q.log_softmax(-1).gather(1, batch.targets[keep][:, None])[:, 0])
            p, q = p[:, :ids].log_softmax(-1), q[:, :ids].log_softmax(-1)             # padding ids are never predicted
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            base.float(), model.float()
        nats, kl, same, r = torch.cat(nats), torch.cat(kl), torch.cat(same), result[name]
        assert r["tokens"] == len(nats) == 3 * (6 * 20 + 4)
        assert r["loss"] == pytest.approx(nats.mean().item(), rel=1e-6)
        assert r["kl"] == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-7)
        assert r["kl_p999"] == pytest.approx(kl.sort().values[math.ceil(0.999 * len(kl)) - 1].item(), rel=1e-4, abs=1e-6)
        assert r["agreement"] == same.double().mean().item()
    assert 0 < result["near"]["kl"] < result["near"]["kl_p999"] < result["far"]["kl"] and result["near"]["agreement"] > 0.8


def test_a_model_is_no_distance_from_itself():
    model = tiny()
    for r in compare({"a": model, "b": model}, some_batches(), np.ones(259)).values():
        assert (r["kl"], r["kl_p999"], r["agreement"]) == (0, 0, 1)


def test_one_token_in_a_thousand_is_beyond_the_999th_permille(monkeypatch):
    base, other = tiny(), tiny()
    base.lm_head, other.lm_head = (nn.Linear(32, 2, bias=False) for _ in range(2))
    # logits in place of hidden states: 1,000 tokens whose KL grows from one to the next
    base.forward = lambda ids, segments=None, head=True: torch.zeros(*ids.shape, 2)
    other.forward = lambda ids, segments=None, head=True: torch.stack((ids.float() / 100, torch.zeros(ids.shape)), -1)
    base.lm_head = other.lm_head = nn.Identity()
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[None]
    r = compare({"base": base, "other": other}, [Batch(ids, ids % 2, None)], np.ones(2))["other"]
    q = torch.tensor([9.98, 0.0]).double().log_softmax(-1)                             # the second largest of the 1,000
    assert r["kl_p999"] == pytest.approx(float(-math.log(2) - q.mean()), rel=1e-5)


def test_quality_is_what_score_says_and_segments_are_kept():
    models, token_bytes = {"a": tiny(), "b": tiny(3)}, np.arange(288)
    segments = torch.arange(20).div(7, rounding_mode="floor").expand(7, -1)
    batches = [b._replace(segments=segments) for b in some_batches()]
    result = compare(models, batches, token_bytes)
    for name, model in models.items():
        expected = sample.figures(*sample.score(model, batches, token_bytes))
        assert all(result[name][k] == pytest.approx(v, rel=1e-6) for k, v in expected.items())
    assert result["a"]["loss"] != pytest.approx(compare({"a": models["a"]}, some_batches(), token_bytes)["a"]["loss"], rel=1e-4)


def test_padding_rows_may_differ_and_logits_are_never_held_whole():
    wide = tiny(vocab_size=200_000, hidden_size=8, num_hidden_layers=1)
    narrow = tiny(vocab_size=199_000, hidden_size=8, num_hidden_layers=1)
    narrow.load_state_dict({k: v[:199_000] if len(v) == 200_000 else v for k, v in wide.state_dict().items()})
    seen = []
    wide.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    result = compare({"wide": wide, "narrow": narrow}, [next(some_batches(rows=2))], np.ones(150_000))
    assert max(seen) <= 2 ** 21 and len(seen) == 3
    assert result["narrow"]["kl"] == pytest.approx(0, abs=1e-6) and result["narrow"]["agreement"] == 1
    assert result["narrow"]["loss"] < result["wide"]["loss"]


# --- speed ---

class Clock:
    """A time of our own: a `generate` that takes so long as a table says, and what was called."""
    def __init__(self, monkeypatch, first, later):
        self.now, self.calls, self.first, self.later = 0.0, [], first, later
        monkeypatch.setattr(measuring, "generate", self.generate)

    def generate(self, model, ids, n, temperature):
        assert temperature == 0
        round = self.calls.count(model)
        self.calls.append(model)
        for i in range(n):
            self.now += self.first[model][round] if i == 0 else self.later[model][round]
            yield torch.zeros(len(ids), dtype=torch.long)


def test_models_take_turns_and_figures_are_medians_of_rounds(monkeypatch):
    a, b = tiny(), tiny(1)
    slow = [99, 1, 2, 4, 8, 16]                             # the machine's moments; the first turn is warm-up
    clock = Clock(monkeypatch, {a: [0.5 * s for s in slow], b: [0.25 * s for s in slow]},
                  {a: [0.1 * s for s in slow], b: [0.1 * s / x for s, x in zip(slow, (7, 3, 1, 2, 5, 4))]})
    result = speed({"a": a, "b": b}, prompt_tokens=10, new_tokens=5, batch_size=3, rounds=5, clock=lambda: clock.now)
    assert clock.calls == [a, b] * 6
    assert result["a"]["first_token_ms"] == pytest.approx(2000) and result["a"]["token_p50_ms"] == pytest.approx(400)
    assert result["a"]["token_p95_ms"] == pytest.approx(1600)
    assert result["a"]["prefill_tokens_per_s"] == pytest.approx(3 * 10 / 2)
    assert result["a"]["decode_tokens_per_s"] == pytest.approx(3 / 0.4)
    assert result["a"]["decode_rounds"] == pytest.approx([3 / 0.1 / s for s in slow[1:]])
    assert result["a"]["prefill_x"] == result["a"]["decode_x"] == 1
    assert result["b"]["prefill_x"] == pytest.approx(2) and result["b"]["decode_x"] == pytest.approx(3)
    assert result["b"]["decode_tokens_per_s"] == pytest.approx(2 * result["a"]["decode_tokens_per_s"])   # medians say 2


def test_joules_are_of_decoding_alone_and_survive_a_wrap(monkeypatch):
    model = tiny()
    clock = Clock(monkeypatch, {model: [1000] * 9}, {model: [0.5] * 9})
    monkeypatch.setattr(speeds, "energy_counters", lambda device: [(lambda: 10 * clock.now % 300, 300, 2.0),
                                                                   (lambda: clock.now, math.inf, 1.0)])
    assert speed({"m": model}, 4, 8, 2, 3, lambda: clock.now)["m"]["joules_per_token"] == pytest.approx(11 * 0.5 / 2)
    assert speed({"m": model}, 4, 2, 2, 3, lambda: clock.now)["m"]["joules_per_token"] is None   # 1 s: too short for the first


def test_energy_counters_are_those_we_may_read(monkeypatch, tmp_path):
    counters = lambda: energy_counters.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(speeds, "Path", lambda p: tmp_path)
    assert counters() == []
    for name, label, joules in (("intel-rapl:0", "package-0", 5), ("intel-rapl:0:0", "core", 9), ("intel-rapl:1", "psys", 7)):
        (tmp_path / name).mkdir()
        for file, text in (("name", label), ("energy_uj", joules * 1_000_000), ("max_energy_range_uj", 65_000_000)):
            (tmp_path / name / file).write_text(f"{text}\n", encoding="utf-8")
    (read, wraps, _), = counters()
    assert read() == 5 and wraps == 65
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()        # as unreadable as without root
    assert counters() == []


def test_decoding_is_that_of_generate(monkeypatch):
    model, lengths = tiny(), []
    model.model.register_forward_hook(lambda module, args, out: lengths.append((tuple(args[0].shape), args[1].length)))
    speed({"m": model}, 10, 5, 2, rounds=1)
    assert lengths == 2 * [((2, 10), 10), *(((2, 1), 10 + i) for i in range(1, 6))]
    with pytest.raises(UserError, match="30 prompt tokens and 3 new ones are more than m's window of 32"):
        speed({"m": model}, 30, 3)


# --- rows ---

def test_a_row_has_the_sizes_of_the_file_and_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "peak_alone", lambda *args: (2_000_000, 1_000_000))
    models = {"untied": tiny(), "tied": tiny(tie_word_embeddings=True)}
    for name, model in models.items():
        save(model, tmp_path / name, Tokenizer.from_bytes())
    compress.main([str(tmp_path / "tied"), "int8", "--out", str(tmp_path / "int8")])
    models = {name: load(tmp_path / name) for name in (*models, "int8")}
    models["tied"].train()
    directories = {"untied": tmp_path / "untied", "int8": tmp_path / "int8"}
    untied, tied, int8 = measuring.measure(models, some_batches(), np.ones(259), directories, prompt_tokens=8, new_tokens=3, rounds=1)
    rows = 288 * 32
    assert untied["parameters"] == tied["parameters"] + rows and untied["resident_bytes"] == tied["resident_bytes"] + 4 * rows
    assert untied["resident_bytes"] == 4 * untied["parameters"] and untied["bits_per_weight"] == 32
    assert int8["parameters"] == tied["parameters"] and 8 < int8["bits_per_weight"] < 10
    assert int8["bits_per_weight"] == 8 * int8["resident_bytes"] / int8["parameters"]
    for name, row in (("untied", untied), ("int8", int8)):
        assert row["file_bytes"] == (tmp_path / name / "model.safetensors").stat().st_size
    assert tied["file_bytes"] is tied["peak_bytes"] is None                             # no directory given
    assert (untied["peak_bytes"], untied["empty_bytes"]) == (2_000_000, 1_000_000)
    assert models["tied"].training and not models["untied"].training
    assert tied["dtype"] == "float32" and tied["device"] == "cpu" and tied["threads"] == torch.get_num_threads()
    shown = table([untied, tied, int8])
    assert "n/a" in shown and len(set(map(len, shown.splitlines()[:5]))) == 1 and f"({int8['decode_x']:.2f} x)" in shown


def test_the_peak_is_of_a_process_of_its_own(tmp_path):
    if sys.platform not in ("linux", "darwin"):
        pytest.skip("this system does not tell")
    model = tiny(vocab_size=1_000_000)                                                  # twice 128 MB
    save(model, tmp_path / "m", Tokenizer.from_bytes())
    peak, empty = peak_alone(tmp_path / "m", model, 8, 2)
    assert 50e6 < empty < peak - 100e6 and memory_peak(torch.device("cpu")) > peak - empty
    assert peak_alone(tmp_path / "none", model) == (None, None)


# --- the text that is scored ---

@pytest.mark.parametrize("length", [2, 5, 9, 8192 + 1, 20_000])
def test_a_stream_predicts_every_id_but_the_first_once(length):
    ids = np.arange(length)
    batches = list(stream_batches(ids, 4))
    assert torch.cat([b.targets[b.targets >= 0] for b in batches]).tolist() == list(range(1, length))
    for b in batches:
        assert b.ids.shape == b.targets.shape and b.ids.shape[1] == 4 and len(b.ids) <= 2048
        assert (b.targets == b.ids + 1)[b.targets >= 0].all()


def test_another_tokenizer_reads_the_same_text():
    bytes_, bpe = Tokenizer.from_bytes(), Tokenizer.train([TEXT], 300)
    documents = ["naïve\n", "", TEXT, "the end"]
    stream = [i for d in documents for i in [*bytes_.encode(d), bytes_.eos_id]]
    assert reencoded(stream, bytes_, bpe) == [i for d in documents for i in [*bpe.encode(d), bpe.eos_id]]
    assert reencoded(stream[:-1], bytes_, bpe) == [i for d in documents for i in [*bpe.encode(d), bpe.eos_id]][:-1]
    assert len(bpe.encode(TEXT)) < len(TEXT.encode("utf-8"))


# --- the command ---

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prepared data, a model trained on it (says its history), what was made of it, and a model of another tokenizer."""
    root = tmp_path_factory.mktemp("world")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, tokenizer in (("lines", "bytes"), ("bpe", Tokenizer.train([TEXT], 280))):
        prepare(name, [root / "text.txt"], out=root / name, tokenizer=tokenizer, val_fraction=0.3)
    sha = json.loads((root / "lines" / "meta.json").read_text(encoding="utf-8"))["sha256"]
    dense = tiny()
    dense.history = [{"step": "train", "data": "lines", "data_sha256": sha, "context": 24, "seed": 3}]
    save(dense, root / "dense", Tokenizer.from_bytes())
    save(tiny(4), root / "bytes", Tokenizer.from_bytes())                               # no history
    save(tiny(5), root / "bpe-model", Tokenizer.load(root / "bpe"))
    for step in ("int8", "int4"):
        compress.main([str(root / "dense"), step, "--out", str(root / step)])
    return root


@pytest.fixture
def here(world, monkeypatch):
    """Standing beside the data, where --data NAME finds it; and no process for each row's peak."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(measuring, "peak_alone", lambda *args: (2_000_000, 1_000_000))
    return world


def measure(*argv):
    compress.main(["--measure", *map(str, argv)])


def test_the_command_writes_a_report(here, tmp_path, capsys):
    measure("dense", "int8", "int4", *FLAGS, "--out", tmp_path / "r")
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "r" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["name"] for r in rows] == ["dense", "int8", "int4"]
    base, int8, _ = rows
    keys = {"parameters", "file_bytes", "resident_bytes", "bits_per_weight", "loss", "perplexity", "bits_per_byte", "tokens", "bytes",
            "kl", "kl_p999", "agreement", "prefill_tokens_per_s", "decode_tokens_per_s", "prefill_x", "decode_x", "first_token_ms",
            "token_p50_ms", "token_p95_ms", "peak_bytes", "joules_per_token", "device", "dtype", "threads", "prompt_tokens",
            "new_tokens", "batch_size", "rounds", "protocol", "command", "tokenizer", "sha256", "history", "seed", "python", "torch"}
    assert all(keys <= r.keys() for r in rows) and len(int8["decode_rounds"]) == 2
    assert base["seed"] == 3 and base["prompt_tokens"] == 28 and base["command"].startswith("python compress.py --measure dense int8")
    assert re.fullmatch(r"validation split of lines \(sha256 [0-9a-f]{12}\), windows of 24 tokens and the one after each", base["protocol"])
    windows = Windows(here / "lines", "val", 24)                                        # what train.py evaluates
    for row in rows:
        expected = sample.figures(*sample.score(accelerate(load(here / row["name"])), windows.evaluation_batches(4), Tokenizer.from_bytes().token_bytes()))
        assert row["tokens"] == len(windows.tokens) - 1 and row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["file_bytes"] == (here / row["name"] / "model.safetensors").stat().st_size
    report = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert table(rows) in report and table(rows) in said and "tradeoff.png" in report and base["command"] in report
    for header in ("process peak", "same first choice", "joules per token"):
        assert len([line for line in report.splitlines() if header in line and line.startswith("|")]) == 1
    png = (tmp_path / "r" / "tradeoff.png").read_bytes()
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") == 1200 and len(png) > 10_000
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"results.jsonl", "report.md", "tradeoff.png"}
    with pytest.raises(UserError, match="holds a report already: give another name or --overwrite"):
        measure("dense", "--out", tmp_path / "r")
    measure("dense", *FLAGS, "--out", tmp_path / "r", "--overwrite")
    assert len((tmp_path / "r" / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_the_command_of_its_own_gives_the_same_table(here, tmp_path, capsys):
    measuring.main(["dense", "int8", *map(str, FLAGS), "--text", "text.txt", "--out", str(tmp_path / "a")])
    measure("dense", "int8", *FLAGS, "--text", "text.txt", "--out", tmp_path / "b")
    rows = [[json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text(encoding="utf-8").splitlines()] for name in "ab"]
    for own, other in zip(*rows):
        assert own.keys() == other.keys() and all(own[k] == other[k] for k in ("name", "loss", "kl", "file_bytes", "sha256", "protocol"))
        assert own["command"].startswith("python data/measure.py dense int8")
    for flags, match in ((("--data", "a", "--text", "b"), "give one of them"), (("--rounds", "0"), "--rounds is 0"), (("--out", "text.txt"), "is a file")):
        with pytest.raises(UserError, match=match):
            measuring.main(["dense", *flags])


def test_text_is_one_stream_in_windows(here, tmp_path, capsys):
    measure("bytes", "--text", "text.txt", *FLAGS)
    ids, model, nats = torch.tensor(Tokenizer.from_bytes().encode(TEXT)), load(here / "bytes"), 0
    for i in range(0, len(ids) - 1, 32):                                                # no history: 512, or the window
        logp = model(ids[None, i:i + 32])[0].double().log_softmax(-1)
        nats -= sum(logp[j, t] for j, t in enumerate(ids[i + 1:i + 33]))
    said = capsys.readouterr().out
    assert f"| {nats / (len(ids) - 1):.4f} | " in said and f"{nats / math.log(2) / (len(ids) - 1):.4f}" in said
    assert f"Scored: {len(ids) - 1:,} tokens" in said and "text.txt (sha256" in said and "windows of 32 tokens" in said
    measure("bytes", "--text", "text.txt", *FLAGS, "--eval-tokens", 100)
    assert "Scored: 100 tokens, 100 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("source", [("--text", "text.txt"), ("--data", "lines"), ("--text", "text.txt", "--eval-tokens", 300)])
def test_another_tokenizer_is_compared_by_bits_per_byte_only(here, tmp_path, source):
    measure("dense", "bpe-model", "int8", *source, *FLAGS, "--out", tmp_path / "r")
    dense, bpe, int8 = (json.loads(line) for line in (tmp_path / "r" / "results.jsonl").read_text(encoding="utf-8").splitlines())
    assert bpe["kl"] is bpe["kl_p999"] is bpe["agreement"] is None and int8["kl"] > 0
    assert bpe["tokenizer"] != dense["tokenizer"] == int8["tokenizer"] and bpe["tokens"] < dense["tokens"] == int8["tokens"]
    assert abs(bpe["bytes"] - dense["bytes"]) < 8                                       # the first token is not predicted
    assert bpe["bits_per_byte"] == pytest.approx(bpe["loss"] * bpe["tokens"] / math.log(2) / bpe["bytes"])
    line = [line for line in (tmp_path / "r" / "report.md").read_text(encoding="utf-8").splitlines() if line.startswith("| bpe-model")][1]
    assert line.count("n/a") == 3


def test_the_data_is_found_by_its_hash(here, tmp_path, monkeypatch, capsys):
    measure("dense", "--smoke")
    assert "validation split of lines" in capsys.readouterr().out
    (tmp_path / "lines").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="was trained on lines of sha256 [0-9a-f]{12}, and that is not under data/: give --data"):
        measure(here / "dense")
    prepare("lines", [here / "text.txt"], out=tmp_path / "lines", tokenizer="bytes")     # same text, same hash
    measure(here / "dense", "--smoke")


@pytest.mark.parametrize("argv, match", [
    (("--measure", "nowhere"), "there is no directory nowhere"),
    (("--measure", "dense", "dense"), "--measure dense: it is named twice"),
    (("--measure", "bytes"), "does not say what it was trained on: give --data NAME_OR_DIR .* or --text FILE"),
    (("--measure", "dense", "--data", "bpe"), "--data bpe was prepared with another tokenizer than the first model's: .*--tokenizer dense"),
    (("--measure", "dense", "--data", "linse"), "--data linse: no such dataset"),
    (("--measure", "dense", "--text", "a", "--data", "b"), "give one of them"),
    (("--measure", "dense", "--rounds", "0"), "--rounds is 0; it must be at least 1"),
    (("--measure", "dense", "--new-tokens", "-1"), "--new-tokens is -1; it must be at least 0"),
    (("--measure", "dense", "--threads", "-1"), "--threads is -1"),
    (("--measure", "dense", "--new-tokens", "32"), "a prompt of 1 tokens and 32 new ones are more than the smallest window, 32"),
    (("--measure", "dense", "--prompt-tokens", "30", "--new-tokens", "3"), "a prompt of 30 tokens and 3 new ones are more than"),
    (("--measure", "dense", "--head-bits", "8"), "takes no steps"),
    (("dense", "int8", "--measure", "dense"), "--measure compares finished models and takes no steps"),
    (("--measure",), "--measure: expected at least one argument"),
    (("--measure", "dense", "--out", "dense"), "--out dense is a model; the report is three files"),
    (("--measure", "dense", "--out", "text.txt"), "--out text.txt is a file"),
    (("dense", "int8"), "--out is missing"), (("dense", "--out", "m"), "give a model and at least one step"),
    ((), "give a model and at least one step .* or models to compare"),
    (("dense", "int8", "--out", "m", "--rounds", "3"), "--rounds belongs to --measure")])
def test_wrong_flags(here, argv, match):
    with pytest.raises(UserError, match=match):
        compress.main(list(argv))
    assert not (here / "m").exists()


def test_text_that_cannot_be_scored(here, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "one").write_text("a", encoding="utf-8")
    for name, match in (("latin", "latin is not UTF-8 text"), ("one", "one has 1 tokens: nothing can be predicted")):
        with pytest.raises(UserError, match=match):
            measure("dense", "--text", tmp_path / name)
    with pytest.raises(FileNotFoundError):
        measure("dense", "--text", tmp_path / "none")


def test_front():
    assert front([(3, 1.0), (1, 3.0), (2, 3.0), (2, 2.0), (4, 1.0)]) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert front([]) == []
