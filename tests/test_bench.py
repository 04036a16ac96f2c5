"""tests/bench_train.py: what it refuses, and the arithmetic that its figures rest on."""
import math, os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench_train
from data import UserError
from model import Config, Transformer


def sentence(tmp_path, *argv):
    with pytest.raises(UserError) as error:
        bench_train.main(["race", *map(str, argv)])
    return str(error.value)


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))                        # main sets the processes' threads
    checkout, text = tmp_path / "nanoGPT", tmp_path / "text.txt"
    text.write_bytes(b"a few words\n" * 100)
    assert "no train.py" in sentence(tmp_path, "--corpus", text, "--nanogpt", checkout)
    for name in ("train.py", "model.py", "config/train_shakespeare_char.py", "data/shakespeare_char/prepare.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("", encoding="utf-8")
    said = sentence(tmp_path, "--corpus", text, "--nanogpt", checkout)
    assert "1,200 bytes" in said and "12,800" in said
    text.write_text("caf\u00e9 " * 9000, encoding="utf-8")
    assert "not ASCII" in sentence(tmp_path, "--corpus", text, "--nanogpt", checkout)
    assert "--corpus" in sentence(tmp_path, "--nanogpt", checkout)


def test_both_sides_get_the_bytes_of_the_file(tmp_path):
    """Repeated lines, and lines that are in both parts, included: no duplicate is dropped, nothing is normalized."""
    (tmp_path / "text.txt").write_bytes(b"the same line, again and again;\r\n\ttabs  and spaces \n" * 400)
    corpus = bench_train.read_corpus(tmp_path / "text.txt")
    assert len(corpus["val"]) == math.ceil(0.1 * (tmp_path / "text.txt").stat().st_size)
    bench_train.Ours(tmp_path, corpus)
    for split, text in corpus.items():
        ids = np.fromfile(tmp_path / "data" / f"{split}.bin", "<u2")
        assert bytes(ids[:-1].astype(np.uint8)) == text and ids[-1] == 256           # and the end of the text


def test_score_is_the_mean_over_each_token_once():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                               num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=4))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    for length in (2, 4, 5, 18):
        ids = torch.randint(11, (length,))
        with torch.no_grad():
            # token i is predicted from what its window holds before it: windows begin at 0, 4, 8, ...
            losses = [F.cross_entropy(model(ids[None, (i - 1) // 4 * 4:i])[0, -1], ids[i]) for i in range(1, length)]
        expected = torch.stack(losses).mean().item()
        assert bench_train.score(model, ids, context=4, rows=2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("first", [50, 300, 1500])
def test_the_search_finds_the_fewest_steps(first):
    tried = []

    def train_for(steps):
        tried.append(steps)
        return bench_train.Run(steps, steps / 10, 1 + 10 / steps ** 0.4, 0)

    found = bench_train.time_to_loss(train_for, 1 + 10 / 400 ** 0.4, first, runs=9)
    assert 400 <= found.steps <= 1.06 * 400 and len(tried) == len(set(tried))
    assert bench_train.time_to_loss(train_for, 0.5, first) is None


def test_the_curve_is_recovered():
    E, A, a, B, b = 0.6, 30.0, 0.31, 900.0, 0.44
    n, d = (x.ravel() for x in np.meshgrid([1e5, 4e5, 1.5e6, 6e6], [3e6, 2e7, 1e8]))
    loss = E + A / n ** a + B / d ** b
    assert bench_train.fit_curve(n, d, loss) == pytest.approx((E, A, a, B, b), rel=0.02)
    assert bench_train.fit_curve(n, d, 3 + 0.1 * np.log(n * d)) is None           # more of both makes it worse
