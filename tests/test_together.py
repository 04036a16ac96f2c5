"""Two models at work on one text: guesses that are checked, and tokens that are handed over, against plain definitions."""
import json, math

import pytest
import torch

import compress
import sample
from data import UserError
from data.loader import IGNORE, Batch
from data.measure import cascade_curve, cascade_rows, measure
from data.report import table
from data.tokenizer import Tokenizer
from model import Config, Transformer, save

V, WINDOW = 60, 40
IDS = torch.randint(V, (1, 9), generator=torch.Generator().manual_seed(9))


def tiny(seed, vocab=V, **shape):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                 max_position_embeddings=WINDOW) | shape
    model, g = Transformer(Config(vocab_size=vocab, **shape)), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.35 if p.ndim > 1 else 1.0, generator=g)
    return model.eval()


class Always(sample.DraftLength):
    def __call__(self):
        return 9


@pytest.fixture(scope="module")
def big():
    return tiny(0, num_hidden_layers=3)


def written(write, model, n=70, ids=IDS, seed=3, **options):
    return [int(i) for i in write(model, ids=ids, max_new_tokens=n, generator=torch.Generator().manual_seed(seed), **options)]


# --- reading ---

def test_a_reader_gives_what_full_forwards_give_at_every_step_and_after_any_rollback(big):
    text = torch.randint(V, (1, 120), generator=torch.Generator().manual_seed(1))
    reader, start = sample.Reader(big, 120), 0
    for n in range(5, 121):                                     # past the window, where the last half is read again
        start = n - WINDOW // 2 if n - start > WINDOW else start
        assert torch.allclose(reader.logits(text[:, :n])[0], big(text[:, start:n])[0, -1], atol=1e-4)
    reader = sample.Reader(big, 120)
    for n, count, changed in ((10, 1, 10), (15, 5, 10), (13, 3, 11), (14, 1, 14), (30, 9, 22), (26, 4, 23)):
        text[:, changed:] = torch.randint(V, (1, 120 - changed), generator=torch.Generator().manual_seed(n))      # not taken
        assert torch.allclose(reader.logits(text[:, :n], count), big(text[:, :n])[0, -count:], atol=1e-4)
    assert reader.read == 10 + 5 + 3 + 1 + 16 + 4


# --- guessing ---

@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=0, repetition_penalty=1.3), dict(temperature=0.9),
                                      dict(temperature=1.2, top_p=0.9, top_k=20, repetition_penalty=1.1)])
def test_the_text_is_that_of_generate_whoever_guesses_and_however_many(big, settings):
    plain = written(sample.generate, big, vocab_size=58, **settings)
    for draft in (None, tiny(5), sample.first_layers(big, 2), big, tiny(6, max_position_embeddings=12, vocab=64)):
        for length in (Always(), sample.DraftLength()):
            assert written(sample.speculate, big, vocab_size=58, draft=draft, length=length, **settings) == plain
            assert draft is not big or length.accepted == length.guessed > 0      # the same numbers are drawn: all are right
    stop = plain[40]
    assert written(sample.speculate, big, vocab_size=58, draft=big, stop=[stop], **settings) == plain[:plain.index(stop) + 1]


@pytest.mark.parametrize("draft", [None, tiny(7, vocab=8)])
def test_chi_square_of_what_guesses_lead_to(draft):
    """The second new token, after one that was taken or not, against its exact distribution."""
    model, ids, n = tiny(0, vocab=8), torch.tensor([[1, 5, 2, 1, 5]]), 600
    for p in model.parameters():
        p.data *= 0.7
    first = sample.next_probs(model(ids)[:, -1], ids, temperature=1.3)[0]
    pairs = torch.cat((ids.expand(8, -1), torch.arange(8)[:, None]), 1)
    second = first @ sample.next_probs(model(pairs)[:, -1], pairs, temperature=1.3)
    seen, g, length = torch.zeros(2, 8), torch.Generator().manual_seed(0), Always()
    for _ in range(n):
        for i, x in enumerate(sample.speculate(model, draft, ids, 3, generator=g, length=length, temperature=1.3)):
            if i < 2:
                seen[i, x] += 1
    assert 0 < length.accepted < length.guessed
    for counts, p in zip(seen, (first, second)):
        keep = p * n > 5
        assert ((counts - p * n) ** 2 / (p * n))[keep].sum() < 26                                # 7 degrees: p < 0.0005


def test_lookup_finds_the_latest_earlier_place():
    g = torch.Generator().manual_seed(0)
    for alphabet in (2, 4, 12):
        text, lookup = torch.randint(alphabet, (1, 60), generator=g), sample.Lookup()
        for n in range(1, 61):
            ids, expected = text[0, :n].tolist(), []
            for size in (3, 2):
                ends = [e for e in range(size, n) if n >= size and ids[e - size:e] == ids[-size:]]
                if ends and not expected:
                    longer = ids[:]
                    for _ in range(7):                                      # what was guessed may be repeated too
                        longer.append(longer[ends[-1] + len(longer) - n])
                    expected = longer[n:]
            if n % 3 == 0:                                                  # a call may come after several new tokens
                assert lookup(text[:, :n], 7) == expected


def timed(length, plain, guess, check, share, passes):
    """Runs a DraftLength on a clock of its own; (tokens per second, lengths asked for)."""
    random, tokens, seconds, asked = torch.Generator().manual_seed(0), 0, 0.0, []
    for _ in range(passes):
        n = length()
        right = next((i for i in range(n) if torch.rand((), generator=random) > share), n)
        length.note(n, right, right + 1, plain + n * (guess + check))
        tokens, seconds, asked = tokens + right + 1, seconds + plain + n * (guess + check), asked + [n]
    return tokens / seconds, asked


def test_the_draft_length_follows_acceptance_and_the_clock():
    for guess, share, least in ((0.01, 0.9, 0.88), (0.1, 0.8, 0.9), (0.02, 0.6, 0.9)):
        rate, asked = timed(sample.DraftLength(), 1.0, guess, 0.02, share, 2000)
        expected = [(1 - share ** (g + 1)) / (1 - share) / (1 + g * (guess + 0.02)) for g in range(7)]
        assert rate > least * max(expected) and max(asked) == 6       # of which a sixteenth is for plain passes
    length = sample.DraftLength()
    rate, asked = timed(length, 1.0, 0.9, 0.1, 0.5, 9000)       # a draft as slow as the model
    assert rate > 0.97 and sum(map(bool, asked)) < 50
    assert "0.99 x" in str(length) and f"{length.accepted / length.guessed:.0%} of {length.guessed} guessed" in str(length)
    assert sum(map(bool, timed(length, 1.0, 0.05, 0.0, 0.95, 2000)[1][1600:])) > 350   # the text is easy now: it comes back


# --- handing over ---

def test_a_cascade_is_full_forwards_of_the_one_that_is_sure(big):
    small, margin, ids, counts = tiny(5), 0.2, IDS, sample.collections.Counter()
    expected, last = [], 0
    for i in range(WINDOW - IDS.shape[1]):
        logits = small(ids)[:, -1].double()
        top = logits.softmax(-1).topk(2).values[0]
        if top[0] - top[1] < margin:
            logits, last = big(ids)[:, -1], ids.shape[1]
            expected.append(None)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    out = written(sample.cascade, small, n=WINDOW - IDS.shape[1], big=big, margin=margin, counts=counts, temperature=0)
    assert out == ids[0, IDS.shape[1]:].tolist()
    assert 3 < len(expected) == counts["escalated"] < counts["tokens"] == len(out) and counts["read"] == last
    for settings in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2)):               # past the window
        assert written(sample.cascade, small, big=big, margin=0.0, **settings) == written(sample.generate, small, **settings)
        assert written(sample.cascade, small, big=big, margin=1.1, **settings) == written(sample.generate, big, **settings)
        assert written(sample.cascade, small, big=None, margin=1.1, **settings) == written(sample.generate, small, **settings)


def test_the_curve_of_a_cascade_scores_each_token_by_the_one_that_writes_it(big):
    small, g = tiny(5), torch.Generator().manual_seed(2)
    batches, token_bytes = [], torch.randint(1, 5, (V,), generator=g)
    for _ in range(2):
        ids = torch.randint(V, (3, 12), generator=g)
        batches.append(Batch(ids[:, :-1], ids[:, 1:].clone(), None))
    batches[0].targets[1, 4:] = IGNORE
    curve = cascade_curve(small, big, batches, token_bytes, (0.0, 0.1, 0.5))
    tokens = []                                                 # (lead, nats of the small one, nats of the big one, window, place)
    for b, batch in enumerate(batches):
        ps, pb = (m(batch.ids).detach().double().softmax(-1) for m in (small, big))
        for r in range(3):
            for t in range(11):
                if (target := batch.targets[r, t]) >= 0:
                    top = ps[r, t].sort(descending=True).values
                    tokens.append((float(top[0] - top[1]), -math.log(float(ps[r, t, target])), -math.log(float(pb[r, t, target])), 3 * b + r, t + 1))
    tokens.sort()
    bytes_ = sum(int(token_bytes[b.targets[b.targets >= 0]].sum()) for b in batches)
    for point, share in zip(curve, (0.0, 0.1, 0.5)):
        k = int(share * len(tokens))
        nats = sum(t[2] for t in tokens[:k]) + sum(t[1] for t in tokens[k:])
        assert abs(point["bits_per_byte"] - nats / math.log(2) / bytes_) < 1e-5 and point["share"] == share
        reads = sum(max((t[4] for t in tokens[:k] if t[3] == w), default=0) for w in range(6)) / 66
        assert abs(point["big_reads"] - reads) < 1e-6
        assert point["multiplications"] == pytest.approx(small.matmul_parameters() + reads * big.matmul_parameters())
        assert point["margin"] == pytest.approx(tokens[k][0], abs=1e-5)


def test_rows_of_a_cascade_fit_the_table(big):
    models = {"small": tiny(5), "big": big}
    ids = torch.randint(V, (4, 21), generator=torch.Generator().manual_seed(2))
    batches = [Batch(ids[:, :-1], ids[:, 1:], None)]
    rows = measure(models, batches, torch.ones(V), prompt_tokens=8, new_tokens=10, rounds=1)
    more = cascade_rows(models, rows, batches, torch.ones(V), (0.25,))
    shown = table(rows + more)
    assert shown.count("small + big 25%") == 3 and "handed over while timed: " in shown
    assert more[0]["parameters"] == rows[0]["parameters"] + rows[1]["parameters"]


# --- the command ---

@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A small model and two larger ones, one of them with another tokenizer, all at 300 bytes of window."""
    path, bytes_ = tmp_path_factory.mktemp("models"), Tokenizer.from_bytes()
    shape = dict(vocab=300, max_position_embeddings=200)
    save(tiny(1, num_hidden_layers=1, **shape), path / "small", bytes_)
    save(tiny(2, num_hidden_layers=3, **shape), path / "big", bytes_)
    save(tiny(3, num_hidden_layers=3, **shape), path / "other", Tokenizer.train(["ab ac ad " * 50], 262))
    return path


def talk(capsys, *argv):
    sample.main(list(map(str, argv)))
    return capsys.readouterr()


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_flags_that_guess_do_not_change_the_text(directories, capsys, temperature):
    flags = (directories / "big", "--prompt", "abcabc", "--max-new-tokens", 60, "--temperature", temperature, "--seed", 4)
    plain = talk(capsys, *flags).out
    for more in (("--draft", directories / "small"), ("--lookup",), ("--self-draft", 1)):
        done = talk(capsys, *flags, *more)
        assert done.out == plain and ("guessed tokens were taken" in done.err or more == ("--lookup",))
    assert talk(capsys, *flags, "--chat").out == talk(capsys, *flags, "--chat", "--draft", directories / "small").out


def test_flags_that_hand_over(directories, capsys):
    flags = ("--prompt", "ab", "--max-new-tokens", 40, "--temperature", 0)
    small, big, other = (talk(capsys, directories / name, *flags).out for name in ("small", "big", "other"))
    assert len({small, big, other}) == 3
    over = lambda *more: talk(capsys, directories / "small", *flags, "--escalate", *more)
    done = over(directories / "big", "--margin", 0.9999)
    assert done.out == big and "100% of" in done.err
    assert over(directories / "big", "--margin", 1e-9).out == small
    done = over(directories / "big")
    assert "tokens were handed over" in done.err and done.out == over(directories / "big", "--margin", 0.2).out
    done = over(directories / "other", "--margin", 0.9999)
    assert done.out == other and "the answer is handed over" in done.err
    done = over(directories / "other", "--margin", 1e-9)
    assert done.out == small and "the answer is kept" in done.err


@pytest.mark.parametrize("flags, match", [
    (["--draft", "other"], "other has another tokenizer"), (["--draft", "big"], "is the model itself: give a smaller"), (["--escalate", "big"], "give a larger"),
    (["--draft", "nowhere"], "no directory"), (["--draft", "small", "--lookup"], "not allowed with"), (["--lookup", "--samples", "2"], "--lookup is for one"),
    (["--margin", "0.3"], "--margin says when .* --escalate"), (["--escalate", "small", "--margin", "1.5"], "--margin is 1.5; it must"),
    (["--escalate", "small", "--margin", "0"], "--margin is 0.0; it must"), (["--escalate", "small", "--margin", "20%"], "--margin: invalid float"),
    (["--escalate", "other", "--chat", "--margin", "0.2"], "leave out --chat"), (["--self-draft", "3"], "has 3 layers")])
def test_what_does_not_fit_together(directories, flags, match, monkeypatch):
    monkeypatch.chdir(directories)
    with pytest.raises(UserError, match=match):
        sample.main(["big", "--prompt", "ab", "--max-new-tokens", "3", *flags])


def test_the_measured_cascade_is_in_the_report(directories, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("ab ac ad\n" * 60, encoding="utf-8")
    measure = lambda *more: compress.main(["--measure", str(directories / "small"), *map(str, more), "--text", str(text), "--smoke", "--threads", "1"])
    measure(directories / "big", "--escalate", "--out", tmp_path / "report")
    rows = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["name"] for row in rows] == ["small", "big", "small + big 10%", "small + big 25%", "small + big 50%"]
    assert rows[2]["file_bytes"] == rows[0]["file_bytes"] + rows[1]["file_bytes"] and rows[2]["sha256"] == rows[0]["sha256"] + rows[1]["sha256"]
    for more, match in (((directories / "other", "--escalate"), "same tokenizer"), (("--escalate",), "a small and a large one")):
        with pytest.raises(UserError, match=match):
            measure(*more)
    with pytest.raises(UserError, match="--escalate belongs to --measure"):
        compress.main([str(directories / "small"), "int8", "--escalate", "--out", str(tmp_path / "x")])


def test_guesses_agree_as_often_as_shared_numbers_allow():
    p, q = (torch.randn(6, generator=torch.Generator().manual_seed(s)).softmax(-1) for s in (1, 2))
    expected = sum(1 / torch.maximum(p / p[i], q / q[i]).sum() for i in range(6))                # both races won by i
    g, same = torch.Generator().manual_seed(0), 0
    for _ in range(4000):
        state = g.get_state()
        guess = sample.next_token(q.log()[None], None, generator=g)
        g.set_state(state)
        same += int(guess == sample.next_token(p.log()[None], None, generator=g))
    far = float((p - q).abs().sum() / 2)
    assert abs(same / 4000 - expected) < 0.03 and (1 - far) / (1 + far) - 0.03 < same / 4000 < 1 - far + 0.03
