"""Held-out prompts: what is scored, what is answered, what stood in the training text; against brute force."""
import json, math, random, re

import numpy as np
import pytest
import torch

import compress, sample
from data import UserError, heldout
from data.heldout import interval, token_f1
from data.loader import IGNORE, LEARNED, Windows, packed
from data.machine import Machine, Threads
from data.measure import evaluate, response_loss
from data.prepare import encode_example, prepare
from data.screen import show_example
from data.tokenizer import Tokenizer
from model import Config, Transformer, save
from data.chat import readable_pieces

WORDS = "fever cough rash pain ache sleep water sugar salt bone skin lung heart blood cell gene drug test dose risk".split()


def sentences(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n)) + "."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Prepared examples, some much longer than a window, and the file they came from; every line has a field."""
    folder, rng = tmp_path_factory.mktemp("heldout"), random.Random(0)
    lines = [{"prompt": f"what about {i}?", "response": sentences(rng, rng.choice((3, 12, 40, 120))), "site": f"s{i % 3}"}
             for i in range(240)]
    (folder / "faq.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines), encoding="utf-8")
    return prepare(inputs=[folder / "faq.jsonl"], vocab_size=400, val_fraction=0.2, out=folder / "faq")


def random_model(vocab_size, window, seed=0):
    model = Transformer(Config(vocab_size=vocab_size, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, head_dim=16,
                               num_key_value_heads=2, intermediate_size=64, max_position_embeddings=window))
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(seed * 1000 + i))
    return model.eval()


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    tokenizer, root = Tokenizer.load(corpus), tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        save(random_model(tokenizer.vocab_size, 64, seed), root / name, tokenizer)
    return root


# --- windows ---

@pytest.mark.parametrize("context", [16, 33, 64, 1000])
def test_every_response_token_is_scored_once_behind_half_a_window_at_least(corpus, context):
    w = Windows(corpus, "train", context)
    learned = np.zeros(len(w.tokens), int)
    firsts = np.flatnonzero(w.mask & 2)
    for window in w.windows:
        assert sum(w.pieces[p][2] - w.pieces[p][0] - 1 for p in window) <= context
        for start, fresh, end in w.pieces[window]:
            its = np.arange(max(fresh, start + 1), end)
            learned[its] += (w.mask[its] & LEARNED) > 0
            begin = firsts[firsts <= start].max()
            assert fresh - start >= min(context // 2, fresh - begin)
    assert (learned == ((w.mask & LEARNED) > 0)).all()
    assert sum(int((b.targets != IGNORE).sum()) for b in w.evaluation_batches(3)) == learned.sum()
    computed = sum(int((w.mask[start + 1:end] & LEARNED > 0).sum()) for start, _, end in w.pieces)      # learned in an epoch
    assert int((w.training_rows(0, 0, w.per_epoch).targets != IGNORE).sum()) == computed >= learned.sum()
    assert w.long == (np.diff(np.append(firsts, len(w.tokens))) > context + 1).sum()


def test_a_prompt_longer_than_the_window_is_counted_and_its_response_is_learned_whole():
    tokenizer = Tokenizer.from_bytes()
    w = Windows.of([encode_example(tokenizer, "x" * 200, "abc"), encode_example(tokenizer, "x", "defg")], 64)
    targets = torch.cat([b.targets[b.targets != IGNORE] for b in w.evaluation_batches(1)]).tolist()
    text = tokenizer.decode(targets)
    assert w.unread == 1 and w.long == 1 and "abc<|im_end|>" in text and "defg<|im_end|>" in text and len(targets) == 9


def test_packing_is_tight_and_loses_nothing():
    rng = random.Random(1)
    sizes = [rng.randint(1, 100) for _ in range(500)]
    windows = packed(sizes, 100)
    assert sorted(i for w in windows for i in w) == list(range(500)) and max(sum(sizes[i] for i in w) for w in windows) <= 100
    assert len(windows) <= 1.05 * math.ceil(sum(sizes) / 100)


def test_held_out_lines_keep_their_fields_and_share_no_response_with_training(corpus):
    lines = heldout.read(corpus / "val.jsonl")
    assert len(lines) == Windows(corpus, "val", 64).meta["splits"]["val"]["documents"] and {"site"} < lines[0].fields.keys()
    text = b"\0".join(heldout.training_text(corpus, Tokenizer.load(corpus))).decode("utf-8").split("\0")
    assert len(text) == 240 - len(lines) and not {line.response for line in lines} & set(text)


# --- what stood in the training text ---

def test_overlap_and_verbatim_equal_brute_force(corpus, monkeypatch):
    tokenizer = Tokenizer.load(corpus)
    text = lambda: heldout.training_text(corpus, tokenizer)
    documents = b"\0".join(text()).decode("utf-8").split("\0")
    rng = random.Random(2)
    answers = [documents[3][5:160], sentences(rng, 30), documents[7] + sentences(rng, 9), "short", ""]
    found = heldout.verbatim(answers, text())
    for answer, (same, count) in zip(answers, found):
        spans = [answer[i:i + 50] for i in range(len(answer) - 49)]
        assert count == len(spans) and same == sum(any(s in d for d in documents) for s in spans)
    assert found[0][0] == found[0][1] > 0 and found[3] == (0, 0)

    of = lambda t: {tuple(t.split()[i:i + 8]) for i in range(max(1, len(t.split()) - 7))}
    seen = set().union(*map(of, documents))
    lines = [heldout.Line("", "", a, [], {}) for a in (*answers[:3], documents[0], "two words")]
    expected = [len(of(line.response) & seen) / len(of(line.response)) for line in lines]
    assert heldout.overlap(lines, text()) == pytest.approx(expected) and expected[3] == 1 and 0 < expected[2] < 1
    assert [heldout.group(x) for x in (0.51, 0.5, 0.1, 0.09)] == ["over 50 %", "10-50 %", "10-50 %", "under 10 %"]


def test_text_of_several_blocks_is_the_same_but_at_their_borders(corpus, monkeypatch):
    tokenizer = Tokenizer.load(corpus)
    whole = b"".join(heldout.training_text(corpus, tokenizer)).replace(b"\0", b"")
    monkeypatch.setattr(heldout, "BLOCK", 100)
    parts = list(heldout.training_text(corpus, tokenizer))
    assert len(parts) > 10 and b"".join(parts).replace(b"\0", b"") == whole


# --- scores ---

@pytest.mark.parametrize("window", [16, 64, 1000])
def test_a_responses_loss_equals_full_forwards(corpus, window):
    tokenizer = Tokenizer.load(corpus)
    model, line = random_model(tokenizer.vocab_size, window), max(heldout.read(corpus / "val.jsonl"), key=lambda l: len(l.response))
    nats, tokens, size = response_loss(model, tokenizer, line.prompt, line.response, tokenizer.token_bytes())
    ids, mask = encode_example(tokenizer, line.prompt, line.response)
    ids, expected, T = torch.from_numpy(ids.astype(np.int64)), 0.0, window
    start, fresh = 0, 1
    while fresh < len(ids):                                   # as generation reads: the last half again when the window is full
        end = min(start + T + 1, len(ids))
        logp = model(ids[None, start:end - 1])[0].log_softmax(-1).detach()
        expected -= sum(float(logp[i - 1 - start, ids[i]]) for i in range(fresh, end) if mask[i] & LEARNED)
        start, fresh = end - T // 2, end
    assert nats == pytest.approx(expected, abs=2e-3) and tokens == (mask & LEARNED > 0).sum()
    assert size == len(line.response.encode("utf-8"))


def test_token_f1_by_hand():
    assert token_f1("The cat, the dog.", "a Cat dog") == 1.0
    assert token_f1("one two three", "two three four five") == pytest.approx(4 / 7)
    assert token_f1("x", "y") == 0.0 and token_f1("the", "a") == 1.0 and token_f1("", "y") == 0.0


def test_intervals_are_those_of_the_mean():
    values = torch.tensor([0.0, 1.0]).repeat(200)
    low, high = interval(lambda at: values[at].mean(), 400, 4000)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_choices_take_the_one_with_fewest_bits_per_byte(corpus, models):
    model, tokenizer = sample.open_model(models / "a", torch.device("cpu"))
    loss = lambda c: response_loss(model, tokenizer, "which?", c, tokenizer.token_bytes())
    choices = ["fever", "a rash", "no pain at all"]
    best = min(choices, key=lambda c: loss(c)[0] / loss(c)[2])
    lines = [heldout.Line("", "which?", c, choices, {}) for c in choices]
    assert [row["chosen"] for row in evaluate(model, tokenizer, lines, (), 5)] == [c == best for c in choices]


# --- the command ---

def test_the_table_and_the_lines(corpus, models, tmp_path, capsys):
    file, argv = tmp_path / "all.jsonl", [str(models / "a"), str(models / "b"), "--eval", str(corpus)]
    sample.main([*argv, "--by", "site", "--answers", "3", "--max-new-tokens", "8", "--out", str(file)])
    said = re.sub(" +", " ", capsys.readouterr().out)                # cells are padded to the width of a column
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = heldout.read(corpus / "val.jsonl")
    assert len(rows) == 2 * len(lines) and sum("answer" in row for row in rows) == 6
    for name in ("a", "b"):
        its = [row for row in rows if row["model"] == name]
        bits = sum(r["nats"] for r in its) / math.log(2) / sum(r["bytes"] for r in its)
        assert f"| all | {name} | {len(lines)} | {bits:.4f} |" in said
        groups = [int(line.split("|")[3]) for line in said.splitlines() if line.startswith("| site s") and f"| {name} |" in line]
        assert len(groups) == 3 and sum(groups) == len(lines)
    model, tokenizer = sample.open_model(models / "a", torch.device("cpu"))
    first = next(row for row in rows if "answer" in row)
    ids = sample.continuations(model, tokenizer, tokenizer.render([{"role": "user", "content": first["prompt"]}]), max_new_tokens=8, temperature=0)
    assert first["answer"] == "".join(readable_pieces(tokenizer, map(int, ids), tokenizer.eos_ids)).strip()
    with pytest.raises(UserError, match="is there already"):
        sample.main([*argv, "--out", str(file)])


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a"}', 'line 2: needs the text fields "prompt" and "response"'),
    ('{"prompt": "a", "response": " "}', "line 2: needs the text fields"),
    ('{"prompt": "a", "response": "b", "choices": ["b"]}', 'line 2: "choices" must be a list of two or more'),
    ('{"prompt": "a", "choices": ["b", "c"]}', 'line 2: it has "choices" without an answer'),
    ('{"prompt": "a", "response": "d", "choices": ["b", "c"]}', 'line 2: it has "choices" without an answer'),
    ('{"prompt": ', "line 2: not valid JSON"), ("[1]", "line 2: needs the text fields")])
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        heldout.read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("flags, message", [
    (["--by", "site"], "--by is for held-out prompts: it needs --eval NAME_OR_FILE"),
    (["--eval", "nowhere.jsonl"], "--eval nowhere.jsonl: there is no such file"),
    (["--eval", "VAL", "--by", "age"], "line 1: it has no field 'age', which --by names"),
    (["--eval", "VAL", "--data", "no-such-data"], "no such dataset"), (["--eval", "DATA", "--data", "DATA"], "its own training text"),
    (["--eval", "EMPTY"], "is empty: it needs lines of"),
    (["AGAIN", "--eval", "VAL"], "is named twice"),
    (["AGAIN"], "several models are compared with --eval NAME_OR_FILE")])
def test_wrong_flags(corpus, models, tmp_path, flags, message):
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    stand_for = {"DATA": str(corpus), "VAL": str(corpus / "val.jsonl"), "EMPTY": str(tmp_path / "empty.jsonl"), "AGAIN": str(models / "a")}
    with pytest.raises(UserError, match=message):
        sample.main([str(models / "a"), *(stand_for.get(f, f) for f in flags)])


def test_measure_scores_the_same_responses_for_each_tokenizer(corpus, models, tmp_path, capsys):
    tokenizer = Tokenizer.from_bytes()
    save(random_model(tokenizer.vocab_size, 64, 3), tmp_path / "bytes", tokenizer)
    compress.main(["--measure", str(models / "a"), str(tmp_path / "bytes"), "--data", str(corpus), "--out", str(tmp_path / "r"),
                   "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1"])
    lines = heldout.read(corpus / "val.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "r" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, directory in zip(rows, (models / "a", tmp_path / "bytes")):
        results = evaluate(*sample.open_model(directory, torch.device("cpu")), lines, (), 1)
        bits = sum(r["nats"] for r in results) / math.log(2) / sum(r["bytes"] for r in results)
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-4) and row["bytes"] == sum(len(l.response.encode()) for l in lines)


def test_training_shows_what_of_an_example_is_learned(corpus, capsys):
    windows, tokenizer = Windows(corpus, "train", 64), Tokenizer.load(corpus)
    machine = Machine(torch.device("cpu"), torch.float32, 0, 1, Threads([1]))
    show_example(machine, tokenizer, windows.training_rows(0, 0, 1))
    said = capsys.readouterr().out
    read, learned = said.split("What is learned:\n")
    text = b"\0".join(heldout.training_text(corpus, tokenizer)).decode("utf-8").split("\0")
    assert read.endswith("<|im_start|>assistant\n\n") and learned.strip().removesuffix("<|im_end|>") in text
