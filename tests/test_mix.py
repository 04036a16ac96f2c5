"""Several data sets in one stream (--mix), and the training loss beside the validation loss."""
import json, math, shutil, signal
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import distill, sample, train
from data.checkpoints import find_model
from data.loader import IGNORE, Windows
from data.mixture import Mixture, Part
from data.report import mark_readings, training_curve, validation_curves
from data.log import Log, read_log
from data.runs import read_state
from data.prepare import prepare
from data.schedule import Trend
from data.tokenizer import Tokenizer
from model import Config, Transformer, load

from test_train import data, equal, examples, go, refused, state, steps  # noqa: F401 - fixtures


def part(directory, share, context=32):
    train_split, val = (Windows(directory, split, context) for split in ("train", "val"))
    return Part(train_split.meta["name"], train_split.meta["sha256"], Fraction(share), train_split, val)


@pytest.mark.parametrize("shares", [["0.3"], ["1/7"], ["0.999"], ["0.2", "0.5"], ["0.3", "0.3", "0.3"]])
def test_every_stretch_has_the_share_and_each_source_gives_its_rows_in_order(data, shares):
    mixture = Mixture(Windows(data, "train", 32), [part(data, share) for share in shares])
    rows, seen = [mixture.source_of(n) for n in range(3000)], {}
    for source, n in rows:
        assert n == seen.get(id(source), 0)                      # whole epochs, no row twice
        seen[id(source)] = n + 1
    for source, share in zip(mixture.sources, [*map(Fraction, shares), 1 - sum(map(Fraction, shares))]):
        for first, count in ((0, 10), (17, 100), (1000, 1000), (0, 3000)):
            got = sum(s is source for s, _ in rows[first:first + count])
            assert abs(got - share * count) <= len(shares) + (len(shares) > 1), (share, first, count)
    assert mixture.source_of(0)[0] is mixture.sources[-1]        # the example that a run shows is of the main data


def test_a_row_is_a_function_of_seed_and_number_whatever_the_batch(data, examples):
    mixture = Mixture(Windows(examples, "train", 160), [part(data, "0.4", 160)])
    whole = mixture.training_rows(3, 0, 20)
    for size in (1, 3, 7):
        pieces = [mixture.training_rows(3, n, min(size, 20 - n)) for n in range(0, 20, size)]
        assert all(torch.equal(t, torch.cat(u)) for t, u in zip(whole, zip(*pieces)))
    for n in range(20):
        source, k = mixture.source_of(n)
        alone = Windows(examples if source.mask is not None else data, "train", 160).training_rows(3, k, 1)
        assert torch.equal(whole.ids[n], alone.ids[0]) and torch.equal(whole.targets[n], alone.targets[0])
        assert torch.equal(whole.segments[n], torch.ones(160).long() if alone.segments is None else alone.segments[0])


def test_a_row_of_text_among_examples_has_the_loss_that_it_has_alone(data, examples):
    mixture = Mixture(Windows(examples, "train", 160), [part(data, "0.5", 160)])
    batch, text = mixture.training_rows(0, 0, 4), Windows(data, "train", 160).training_rows(0, 0, 2)
    model = Transformer(Config(vocab_size=300)).initialize(torch.Generator().manual_seed(0)).eval()
    rows = type(batch)(*(t[1::2] for t in batch))
    assert torch.equal(rows.ids, text.ids)
    losses = [train.cross_entropy(model, some)[0].item() for some in (rows, text)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- runs ---

MIX = ("--steps", 8, "--context", 160, "--dropout", 0.1, "--micro-batch", 2, "--dtype", "float32", "--threads", 1)


@pytest.fixture(scope="module")
def mixed_run(data, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "run"
    go(examples, out, "--mix", f"{data}:0.3", *MIX)
    return out


def test_figures_of_both_stand_in_log_history_and_card(data, examples, mixed_run):
    entry, end = load(mixed_run).history[-1], read_log(mixed_run / "log.jsonl")[-1]
    meta = Windows(data, "train", 32).meta
    assert entry["mix"] == [{"data": "text", "data_sha256": meta["sha256"], "share": 0.3}] and entry["data"] == "qa"
    model, tokenizer = load(find_model(mixed_run)).eval(), Tokenizer.load(data)
    for directory, prefix in ((examples, "val_"), (data, "val_text_")):
        batches = Windows(directory, "val", 160).evaluation_batches(8, 512)
        figures = sample.figures(*sample.score(model, batches, tokenizer.token_bytes()))
        for name in ("loss", "bits_per_byte", "tokens"):
            assert entry[prefix + name] == pytest.approx(figures[name], rel=1e-4)
    assert end["val_text_loss"] != end["val_loss"]
    assert "val_text_bits_per_byte: " in (mixed_run / "best" / "README.md").read_text(encoding="utf-8")


def test_resume_is_the_uninterrupted_run_bit_for_bit(data, examples, mixed_run, tmp_path, monkeypatch):
    real = Log.write

    def write(self, **line):                       # a Ctrl-C between two evaluations
        real(self, **line)
        if line["step"] == 6 and "lr" in line:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Log, "write", write)
    with pytest.raises(KeyboardInterrupt):
        go(examples, tmp_path / "run", "--mix", f"{data}:0.3", *MIX)
    monkeypatch.undo()
    assert read_state(tmp_path / "run")["step"] == 6
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert steps(tmp_path / "run") == steps(mixed_run) and equal(state(tmp_path / "run"), state(mixed_run))


def test_resume_refuses_another_mix_and_mixed_data_that_changed(data, examples, mixed_run, tmp_path):
    refused("--out", mixed_run, "--resume", "--mix", f"{data}:0.4", match="--mix is .*:0.4, but the run")
    run, changed = shutil.copytree(mixed_run, tmp_path / "run"), shutil.copytree(data, tmp_path / "text")
    saved = torch.load(run / "last" / "training_state.pt", weights_only=True)
    torch.save({**saved, "config": {**saved["config"], "mix": f"{changed}:0.3"}}, run / "last" / "training_state.pt")
    meta = json.loads((changed / "meta.json").read_text(encoding="utf-8"))
    (changed / "meta.json").write_text(json.dumps({**meta, "sha256": "other"}), encoding="utf-8")
    refused("--out", run, "--resume", "--steps", 20, match="of --mix .* is not what this run began with")


def test_bad_mixes(data, examples, tmp_path):
    base = ["--data", examples, "--out", tmp_path / "x", "--steps", 2, "--context", 160]
    for mix in (f"{data}", f"{data}:", f"{data}:0", f"{data}:1", f"{data}:-0.5", f"{data}:nan", f"{data}:some", ":0.3", f"{data}:0.3,"):
        refused(*base, "--mix", mix, match="must be NAME_OR_DIR:SHARE with a share between 0 and 1")
    refused(*base, "--mix", "stdlob:0.3", match="--mix stdlob: no such dataset .did you mean 'stdlib'")
    refused(*base, "--mix", f"{examples}:0.3", match="there is already data of the name qa")
    shutil.copytree(data, tmp_path / "more")
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    (tmp_path / "more" / "meta.json").write_text(json.dumps({**meta, "name": "more"}), encoding="utf-8")
    refused(*base, "--mix", f"{data}:0.5,{tmp_path / 'more'}:0.5", match="the shares make 1, which leaves nothing for --data")
    refused(*base, "--mix", f"{data}:0.3", "--context", 100_000, match="the train split of text has .* tokens, less than one window")
    (tmp_path / "b.txt").write_text("another text, another tokenizer\n" * 300, encoding="utf-8")
    other = prepare(inputs=[tmp_path / "b.txt"], vocab_size=300, out=tmp_path / "b")
    refused(*base, "--mix", f"{other}:0.3", match=f"another tokenizer .* data/prepare.py --tokenizer {examples} --out NEW_DIR")
    assert not (tmp_path / "x").exists()


def test_a_student_learns_from_a_mixture(data, examples, mixed_run, tmp_path):
    flags = [str(mixed_run), "--data", str(examples), "--mix", f"{data}:0.3", "--out", str(tmp_path / "student"), "--steps", "2",
             "--batch-size", "4", "--evals", "1", "--eval-tokens", "512", "--dtype", "float32", "--threads", "1"]
    with pytest.raises(train.UserError, match="--mix goes without --cache"):
        distill.main([*flags, "--cache"])
    distill.main(flags)
    entry = load(tmp_path / "student").history[-1]
    assert entry["mix"][0]["share"] == 0.3 and entry["val_text_loss"] > 0


# --- the training loss beside the validation loss ---

def test_the_training_loss_is_the_mean_since_the_last_evaluation_in_bits_of_the_learned_bytes(data, examples, mixed_run):
    lines, tokens, since = read_log(mixed_run / "log.jsonl"), 0, []
    for line in lines:
        if "lr" in line:
            since.append((line["loss"], line["tokens"] - tokens))
            tokens = line["tokens"]
        else:
            mean = sum(loss * n for loss, n in since) / sum(n for _, n in since)
            assert line["train_loss"] == pytest.approx(mean, rel=1e-9)
            since = []
    mixture, tokenizer = Mixture(Windows(examples, "train", 160), [part(data, "0.3", 160)]), Tokenizer.load(data)
    targets = torch.cat([mixture.training_rows(0, n, 1).targets.flatten() for n in range(2 ** 18 // 160)])
    learned = targets[targets != IGNORE].tolist()
    size = len(tokenizer.decode_bytes([i for i in learned if i < 256])) / len(learned)             # end tokens have no bytes
    assert lines[-1]["train_bits_per_byte"] == pytest.approx(lines[-1]["train_loss"] / math.log(2) / size, rel=1e-6)
    tokens, losses = training_curve(lines)
    assert len(losses) == 8 and tokens[-1] == lines[-1]["tokens"]
    assert losses[-1] == pytest.approx(lines[-2]["loss"] / math.log(2) / size, rel=1e-6)
    curves = validation_curves(lines)
    assert list(curves) == ["validation", "validation text"] and curves["validation text"][1][1] == lines[-1]["val_text_bits_per_byte"]
    main = mixture.sources[-1]
    assert lines[-1]["times_read"] == pytest.approx(8 * 4 * 0.7 / main.per_epoch)


def test_overfitting_is_told_once_it_shows():
    def said(pairs, times=2.0):
        trend, lowest, texts = Trend(), math.inf, []
        for step, (training, validation) in enumerate(pairs, 1):
            trend.add(10 * training, 10)
            improved, lowest = validation < lowest, min(lowest, validation)
            assert trend.turn(10 * step, improved) == pytest.approx(training)
            texts.append(trend.warning(training, validation, lowest, times, Path("best")))
        return texts
    texts = said([(3, 3.2), (2, 3), (1.5, 3.1), (1.2, 3.2), (1, 3.3), (0.9, 3.4), (0.8, 2.9), (0.7, 3)])
    assert [bool(text) for text in texts] == [False, False, True, True, False, True, False, True]
    assert "for one evaluation now the validation loss is higher than at step 20" in texts[2] and "--steps 20" in texts[2]
    assert "for 4 evaluations now" in texts[5] and "having read it 2.0 times" in texts[5] and "than at step 70" in texts[7]
    assert not any(said([(3, 3.2), (2.9, 3.204)])) and any(said([(3, 3.2), (2.9, 3.21)]))          # less than 0.2 % is noise
    assert not any(said([(3, 3.2), (3.1, 3.4)])) and not any(said([(3, 3.2), (2, 3.4)], times=0.9))
    assert any(said([(3, 3.2), (2, 3.4)], times=0))                                                # of an unknown text


def test_each_reading_is_marked_where_it_ends():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    for times, marks in ((0.9, []), (3.5, [1, 2, 3]), (70, range(5, 71, 5))):
        ax, tokens = figure.subplots(), [7 * step for step in range(1, 701)]
        mark_readings(ax, {"step": 700, "times_read": times}, tokens)
        assert [line.get_xdata()[0] for line in ax.lines] == [7 * round(700 * n / times) for n in marks]
