"""Generation and scoring against the plain definition: full forwards, brute force, whole strings."""
import io, json, math, subprocess, sys
from pathlib import Path

import pytest
import torch

import sample
from data import UserError, chat
from data.loader import IGNORE, Batch
from data.tokenizer import Tokenizer
from model import Config, Transformer, save
from data.chat import readable_pieces

V = 300


@pytest.fixture(scope="module")
def model():
    m = Transformer(Config(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=8, max_position_embeddings=16))
    g = torch.Generator().manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.4 if p.ndim > 1 else 1.0, generator=g)
    return m.eval()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    save(model, path, Tokenizer.from_bytes())
    return path


def greedy(model, ids, n, **options):
    return torch.stack(list(sample.generate(model, ids, n, temperature=0, **options)), dim=1)


def test_cached_generation_equals_full_forwards_also_past_the_window(model):
    ids = torch.randint(259, (3, 5), generator=torch.Generator().manual_seed(1))
    expected, read = ids, ids                   # what is read: all, until 16 tokens are full, then the last 8 and on
    for _ in range(40):
        if read.shape[1] > 16:
            read = expected[:, -8:]
        logits = model(read)[:, -1]
        logits[:, 259:] = -math.inf
        new = logits.argmax(-1, keepdim=True)
        expected, read = torch.cat((expected, new), 1), torch.cat((read, new), 1)
    assert torch.equal(greedy(model, ids, 40, vocab_size=259), expected[:, 5:])


def test_a_prompt_longer_than_the_window_is_read_from_its_end(model):
    ids = torch.randint(259, (1, 50), generator=torch.Generator().manual_seed(2))
    assert torch.equal(greedy(model, ids, 5), greedy(model, ids[:, -16:], 5))


def test_rows_stop_by_themselves_and_padding_ids_are_never_drawn(model):
    ids = torch.randint(259, (4, 3), generator=torch.Generator().manual_seed(3))
    free = greedy(model, ids, 12, vocab_size=259)
    stop = {int(free[0, 4])}
    out = greedy(model, ids, 12, vocab_size=259, stop=stop)
    for row in range(4):
        hits = [i for i, t in enumerate(free[row].tolist()) if t in stop]
        end = min(hits[0] + 1 if hits else 12, out.shape[1])
        assert torch.equal(out[row, :end], free[row, :end])
        assert all(t in stop for t in out[row, end:].tolist())
    drawn = torch.stack(list(sample.generate(model, ids, 200, vocab_size=5, temperature=5.0)))
    assert drawn.max() < 5


def test_seeded_samples_repeat(model):
    draw = lambda s: torch.stack(list(sample.generate(model, torch.tensor([[1, 2]]), 20, generator=torch.Generator().manual_seed(s))))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.6), dict(min_p=0.3),
                                     dict(temperature=2.0, top_k=5, top_p=0.8)])
def test_draws_follow_the_filtered_distribution(options):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.2, -0.5, -1.0, -3.0])
    n = 40_000
    drawn = sample.next_token(logits.expand(n, -1), torch.zeros(n, 1, dtype=torch.long), generator=torch.Generator().manual_seed(0), **options)
    p = (logits.double() / options.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)                                      # sorted already, by construction
    keep = [i for rank, i in enumerate(order.tolist())
            if rank < options.get("top_k", 99) and p[i] >= options.get("min_p", 0) * p.max()]
    q = p / p[keep].sum()
    keep = [i for rank, i in enumerate(keep) if q[keep[:rank]].sum() < options.get("top_p", 2.0)]
    expected = torch.zeros(7).double()
    expected[keep] = p[keep] / p[keep].sum()
    counts = torch.bincount(drawn.flatten(), minlength=7).double()
    assert counts[expected == 0].sum() == 0
    chi2 = ((counts - n * expected) ** 2 / (n * expected).clamp(min=1e-9))[expected > 0].sum()
    assert chi2 < 22.5                                                      # 0.1 % quantile of 6 degrees of freedom


def test_repetition_penalty_makes_seen_ids_less_likely():
    logits, seen = torch.tensor([[2.0, 1.9, -0.1, -0.05]]), torch.tensor([[0, 0, 3]])
    assert sample.next_token(logits, seen, temperature=0, repetition_penalty=1.2).item() == 1
    assert sample.next_token(logits, torch.tensor([[2]]), temperature=0, repetition_penalty=1.2).item() == 0


def test_a_character_split_over_tokens_is_held_back():
    tokenizer = Tokenizer.from_bytes()
    text = "né 🙂 中文"
    parts = list(readable_pieces(tokenizer, text.encode("utf-8")))
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    cut = list(readable_pieces(tokenizer, "🙂".encode("utf-8")[:2]))
    assert "".join(cut) == "\ufffd"
    assert "".join(readable_pieces(tokenizer, [65, 66, tokenizer.eos_id, 67], tokenizer.eos_ids)) == "AB"


def test_score_is_the_mean_of_log_probabilities_whatever_the_batch(model):
    ids = torch.randint(256, (5, 9), generator=torch.Generator().manual_seed(4))
    targets = ids[:, 1:].clone()
    targets[0, 3:] = IGNORE
    batch = Batch(ids[:, :-1], targets, None)
    token_bytes = torch.arange(V)
    sums = sample.score(model, [batch], token_bytes)
    logp = model(batch.ids).double().log_softmax(-1)
    nats = -sum(logp[r, t, targets[r, t]] for r in range(5) for t in range(8) if targets[r, t] >= 0)
    assert abs(sums[0] - nats) < 1e-3 and sums[1] == 35 and sums[2] == targets[targets >= 0].sum()
    one_by_one = sample.score(model, [Batch(i[None], t[None], None) for i, t in zip(batch.ids, targets)], token_bytes)
    assert torch.allclose(sums, one_by_one, rtol=1e-6)
    f = sample.figures(*sums)
    assert abs(f["bits_per_byte"] - nats.item() / math.log(2) / sums[2].item()) < 1e-6
    assert abs(math.log(f["perplexity"]) - f["loss"]) < 1e-9


# --- the command ---

def talk(capsys, *argv):
    sample.main(list(map(str, argv)))
    return capsys.readouterr().out


def test_streamed_text_equals_the_parts_all_ids(directory, model, capsys):
    out = talk(capsys, directory, "--prompt", "ab", "--max-new-tokens", 30, "--seed", 5)
    tokenizer = Tokenizer.load(directory)
    ids = [int(i) for i in sample.continuations(model, tokenizer, "ab", seed=5, max_new_tokens=30, temperature=0.8, top_p=0.95)]
    ids = ids[:next((n for n, i in enumerate(ids) if i in tokenizer.eos_ids), len(ids))]
    assert out == "ab" + tokenizer.decode(ids) + "\n"


def test_sources_of_the_prompt(directory, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("naïve", encoding="utf-8")
    flags = ("--max-new-tokens", 8, "--temperature", 0)
    a = talk(capsys, directory, "--file", tmp_path / "p.txt", *flags)
    assert a.startswith("naïve") and a == talk(capsys, directory, "--prompt", "naïve", *flags)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode("utf-8"))))
    assert talk(capsys, directory, *flags) == a
    assert talk(capsys, directory, "--prompt", "", *flags, "--samples", 2).count("--- sample") == 2


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """(directory, model, tokenizer) of a model that answers something to anything, with a window of 200 bytes."""
    model = Transformer(Config(vocab_size=V, hidden_size=32, num_hidden_layers=1, max_position_embeddings=200)).initialize()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    path = tmp_path_factory.mktemp("talker") / "m"
    save(model, path, Tokenizer.from_bytes())
    return path, model.eval(), Tokenizer.from_bytes()


def answer(talker, *contents):
    """What the model says to a conversation, by the plain way."""
    roles = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    ids = sample.continuations(talker[1], talker[2], talker[2].render(roles), temperature=0, max_new_tokens=9)
    return "".join(readable_pieces(talker[2], (int(i) for i in ids), talker[2].eos_ids))


def conversation(talker, capsys, monkeypatch, text, *more):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    sample.main([str(talker[0]), "--chat", "--temperature", "0", "--max-new-tokens", "9", *map(str, more)])
    return capsys.readouterr()


def test_chat_answers_each_line_with_what_was_said_before(talker, capsys, monkeypatch):
    first = answer(talker, "hello")
    second = answer(talker, "hello", first, "and then?")
    for flags in ((), ("--lookup",)):
        assert conversation(talker, capsys, monkeypatch, "hello\n\n  \nand then?", *flags).out == f"{first}\n{second}\n"
    assert conversation(talker, capsys, monkeypatch, "", "--prompt", "hello").out == f"{first}\n"
    assert conversation(talker, capsys, monkeypatch, "", "--prompt", "/quit").out == answer(talker, "/quit") + "\n"


def test_chat_commands(talker, capsys, monkeypatch, tmp_path):
    first, meant = answer(talker, "hello"), answer(talker, " /etc")
    text = f"hello\n/save {tmp_path / 'said.jsonl'}\n/save {tmp_path / 'said.jsonl'}\n/save\n/rest\n/help\n/reset\n /etc\n/quit\nhello\n"
    said = conversation(talker, capsys, monkeypatch, text)
    assert said.out == f"{first}\n{meant}\n"
    notes = [line for line in said.err.splitlines() if not line.startswith("[cut after ")]
    assert len(said.err.splitlines()) == len(notes) + 2                     # both answers are longer than --max-new-tokens
    assert notes[0] == f"wrote 2 messages to {tmp_path / 'said.jsonl'}" and "File exists" in notes[1] and "give a name" in notes[2]
    assert notes[3].startswith("there is no /rest: /reset forgets") and notes[4].startswith("/reset forgets") and "forgotten" in notes[5]
    assert json.loads((tmp_path / "said.jsonl").read_text(encoding="utf-8")) == {
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]}
    from data import corpora                                                # it can be trained on
    rows = [parts for _, parts in corpora.documents(corpora.source([tmp_path / "said.jsonl"]), corpora.Skipped())]
    assert [parts.contents() for parts in rows] == [["hello", first]]


def test_chat_forgets_the_oldest_turns_when_the_window_is_full(talker, capsys, monkeypatch):
    lines = [c * 40 for c in "abcd"]
    said, turns = [], []                                        # two turns of 40 and about 60 bytes of template each fit
    for line in lines:
        while turns and len(talker[2].encode(talker[2].render([{"role": "user", "content": t} for t in [*turns, line]]), special=True)) > 191:
            del turns[:2]
        said.append(answer(talker, *turns, line))
        turns += [line, said[-1]]
        full = len(turns) < 2 * len(said)
    assert full
    done = conversation(talker, capsys, monkeypatch, "\n".join(lines))
    assert done.out == "\n".join(said) + "\n" and done.err.count("oldest turns are forgotten") == 1
    done = conversation(talker, capsys, monkeypatch, "x" * 300)
    assert done.out == answer(talker, "x" * 300) + "\n" and "only its end is read" in done.err


def test_ctrl_c_ends_only_the_answer(talker, capsys, monkeypatch):
    whole, first = chat.readable_pieces, answer(talker, "hello")

    def interrupted(tokenizer, ids, stop=()):
        text = whole(tokenizer, ids, stop)
        yield "".join(next(text) for _ in range(3))
        raise KeyboardInterrupt
    monkeypatch.setattr(chat, "readable_pieces", interrupted)
    said = conversation(talker, capsys, monkeypatch, "hello\n").out
    assert said == first[:len(said) - 1] + "\n"


def test_what_is_said_of_the_prompt(directory, capsys):
    for prompt, said in (("", "a new document begins"), ("x" * 40, "the prompt has 40 tokens, the window 16: only the last 16")):
        sample.main([str(directory), "--prompt", prompt, "--max-new-tokens", "3"])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags, match", [
    (["--temperature", "-1"], "--temperature is -1"), (["--top-p", "1.5"], "--top-p is 1.5"), (["--samples", "0"], "--samples is 0"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0"), (["--tmperature", "1"], "did you mean --temperature"),
    (["--file", "no.txt"], "no.txt"), (["--prompt", "a", "--file", "b"], "not allowed with")])
def test_wrong_flags(directory, flags, match):
    with pytest.raises((UserError, FileNotFoundError), match=match):
        sample.main([str(directory), *flags])


def test_deployment_needs_no_training_code():
    code = ("import sys, sample; bad = {'train', 'wandb', 'matplotlib', 'transformers', 'data.prepare', 'data.loader'} "
            "& set(sys.modules); assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sample.__file__).parent)
