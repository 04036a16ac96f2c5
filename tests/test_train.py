"""Training: what a step computes, resume bit for bit, saves that survive a kill, bad input."""
import collections, json, random, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from data import UserError
from data.checkpoints import find_model
from data.loader import IGNORE, LEARNED, Batch, Windows
from data.machine import Machine
from data.prepare import prepare
from data.log import Log, read_log
from data.runs import read_state
from model import Config, Transformer, load
from data.schedule import is_due, is_falling, new_origin, plan, regularization

ROOT = Path(train.__file__).parent
TINY = "--layers 2 --width 32 --heads 2 --context 32 --batch-size 4 --warmup 3 --evals 2 --eval-tokens 512 --save-seconds 1e9 --device cpu".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    words = [f"w{i} = f({i % 7})\n" for i in range(3000)]
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(random.Random(0).choices(words, k=4000)), encoding="utf-8")
    return prepare(inputs=[folder / "text.txt"], tokenizer="bytes", out=folder / "text")


def go(data, out, *flags):
    train.main(["--data", str(data), "--out", str(out), *TINY, *map(str, flags)])


def steps(out):
    """log.jsonl without what a clock wrote."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_log(Path(out) / "log.jsonl")]


def state(out):
    s = read_state(out)
    return s["optimizers"], s["average"], load(Path(out) / "last").state_dict()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- what a step computes ---

def test_linear_cross_entropy_equals_torch(monkeypatch):
    monkeypatch.setattr(train, "LEAST_ROWS", 1)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(37, 16, generator=g) * 3, torch.randn(90_000, 16, generator=g)         # 90,000: several chunks
    t = torch.randint(90_000, (37,), generator=g)
    t[5:9] = IGNORE
    x, w = x.requires_grad_(), w.requires_grad_()
    ours = train.linear_cross_entropy(x, w, t)
    theirs = F.cross_entropy(x @ w.T, t, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(2 * ours, (x, w)), torch.autograd.grad(2 * theirs, (x, w))):
        assert torch.allclose(a, b, atol=1e-4)


def test_linear_cross_entropy_of_an_impossible_target_is_finite():
    x, w = torch.tensor([[300.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    assert abs(train.linear_cross_entropy(x, w, torch.tensor([1])).item() - 600) < 1e-3


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 40, 16), (2, 16, 40)])
def test_orthogonalize_brings_singular_values_to_one(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    x = u * torch.linspace(0.05, 1, min(shape[1:])) @ v
    values = torch.linalg.svdvals(train.orthogonalize(x))
    assert values.min() > 0.6 and values.max() < 1.3
    assert (train.orthogonalize(x) - u @ v).norm() < 0.35 * (u @ v).norm()


def test_loss_starts_at_ln_v_and_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=2, head_dim=16)).initialize()
    ids = torch.randint(64, (4, 17))
    batch = Batch(ids[:, :-1], ids[:, 1:], None)
    optimizers = train.make_optimizers(model, train.cross_entropy, train.TrainConfig(lr=0.01))
    for step in range(120):
        loss, count, _ = train.cross_entropy(model, batch)
        if step == 0:
            assert abs(loss.item() / count - 4.1589) < 0.1
        (loss / count).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert loss.item() / count < 0.05


def test_schedule():
    cfg = train.TrainConfig(warmup=9, decay=0.5)
    assert [round(train.lr_at(s, 100, cfg), 6) for s in (0, 9, 49, 50, 75, 99)] == [0.1, 1.0, 1.0, 1.0, 0.5, 0.02]
    cfg = train.TrainConfig(warmup=9, schedule="cosine")
    assert round(train.lr_at(50, 100, cfg), 6) == 0.5 and train.lr_at(99, 100, cfg) < 1e-3


def test_a_compilation_that_fails_costs_a_sentence(data, tmp_path, monkeypatch, capsys):
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    flags = ("--steps", 2, "--optimizer", "adamw", "--threads", 1)
    try:
        go(data, tmp_path / "a", *flags, "--compile")
    finally:
        torch.compiler.set_stance("default")
    assert "--compile does not work here" in capsys.readouterr().out
    go(data, tmp_path / "b", *flags)
    assert steps(tmp_path / "a") == steps(tmp_path / "b")


# --- batches ---

def test_rows_are_a_function_of_seed_and_number_and_an_epoch_reads_each_window_once(data):
    w = Windows(data, "train", 32)
    a, b = w.training_rows(3, 10, 8), w.training_rows(3, 14, 2)
    assert torch.equal(a.ids[4:6], b.ids) and torch.equal(a.ids[:, 1:], a.targets[:, :-1])
    assert not torch.equal(a.ids, w.training_rows(4, 10, 8).ids)
    epoch = w.training_rows(3, 0, w.per_epoch)
    shift = w._epoch[2]
    expected = torch.tensor(w.tokens[shift:shift + w.per_epoch * 32].astype(int)).view(-1, 32)
    order = lambda t: sorted(map(tuple, t.tolist()))
    assert order(epoch.ids) == order(expected)
    assert torch.equal(epoch.ids, Windows(data, "train", 32).training_rows(3, 0, w.per_epoch).ids)


def test_evaluation_predicts_every_token_once(data):
    w = Windows(data, "val", 32)
    targets = torch.cat([b.targets[b.targets != IGNORE] for b in w.evaluation_batches(3)])
    assert torch.equal(targets, torch.tensor(w.tokens[1:].astype(int)))


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    lines = [{"prompt": f"what is {i}?", "response": f"it is {'very ' * (i % 9)}{i}"} for i in range(200)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines), encoding="utf-8")
    return prepare(inputs=[folder / "qa.jsonl"], tokenizer="bytes", out=folder / "qa")


def test_packed_examples_learn_responses_only_and_do_not_see_each_other(examples):
    w = Windows(examples, "train", 160)
    batch = w.training_rows(0, 0, 4)
    assert (batch.segments.amax(1) > batch.segments[:, 0]).all()                    # several examples in each window
    learned = batch.targets[batch.targets != IGNORE]
    assert bytes(i for i in learned.tolist() if i < 256).startswith(b"it is ")
    model = Transformer(Config(vocab_size=300, num_hidden_layers=2)).initialize(torch.Generator().manual_seed(0)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    packed = model(batch.ids, segments=batch.segments)
    for row in range(2):
        for s in batch.segments[row].unique()[1:]:
            where = batch.segments[row] == s
            alone = model(batch.ids[row][where][None])
            assert (alone[0] - packed[row][where]).abs().max() < 1e-4


def test_windows_of_examples_hold_every_example_once(examples):
    w = Windows(examples, "train", 160)
    total = sum((b.targets != IGNORE).sum().item() for b in w.evaluation_batches(4))
    assert w.long == 0 and total == int(((w.mask & LEARNED) > 0).sum())
    assert len(w.pieces) == w.meta["splits"]["train"]["documents"]


# --- little text ---

def test_weight_decay_takes_the_same_share_of_every_matrix_and_nothing_of_vectors():
    cfg = train.TrainConfig()
    model = Transformer(Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                               num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=8))
    model.initialize(torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = train.make_optimizers(model, None, cfg)
    train.regularize(model, optimizers, 0.01, 0.25)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.99 if p.ndim > 1 else 1), rtol=1e-6), name
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_the_average_is_a_moving_one_and_in_place_only_in_its_context():
    model, expected, random = torch.nn.Linear(3, 2), None, torch.Generator().manual_seed(0)
    average = train.Average(model)
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=random))
        average.update(4)
        rate = 1 / min(4, step)                                  # the plain mean of the first four, then a moving one
        expected = model.weight.detach() * rate + (0 if step == 1 else (1 - rate) * expected)
    last = model.weight.detach().clone()
    with average.in_place():
        assert torch.allclose(model.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, last) and torch.allclose(average.weights[0], expected, atol=1e-6)
    average.update(0)
    assert average.weights == []


def test_best_holds_the_averaged_weights_that_were_evaluated(whole_run):
    best, last = load(whole_run / "best").state_dict(), load(whole_run / "last").state_dict()
    averaged = read_state(whole_run)["average"]
    assert all(torch.equal(t, best[name]) for (name, _), t in zip(load(whole_run / "last").named_parameters(), averaged))
    assert not equal(best, last)


def test_a_text_read_at_most_once_is_learned_as_ever_and_one_read_often_is_not(data, tmp_path, capsys):
    rule = lambda times, **flags: regularization(times, 100, train.TrainConfig(**flags))
    assert rule(0) == rule(1.0) == (0, 0, 0) and all(rule(3.0))
    assert rule(3.0, init_from="out", matrix_lr=2e-4) == pytest.approx((rule(3.0)[0] / 10, 0, 0))      # fine-tuning
    assert rule(3.0, weight_decay=0.0, dropout=0.0, average=0) == (0, 0, 0)
    assert rule(0, weight_decay=0.5, dropout=0.2, average=7) == pytest.approx((0.01, 0.2, 7))
    go(data, tmp_path / "run", "--steps", 350, "--eval-tokens", 32, "--batch-size", 8)
    assert "times; weight decay" in capsys.readouterr().out


# --- runs ---

@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    go(data, out, "--steps", 12, "--dropout", 0.1, "--average", 3, "--micro-batch", 2)
    return out


@pytest.mark.parametrize("stop", [1, 6, 7, 11])
def test_resume_is_the_uninterrupted_run_bit_for_bit(data, whole_run, tmp_path, stop, monkeypatch):
    real = Log.write

    def write(self, **line):                       # a Ctrl-C during step `stop`
        real(self, **line)
        if line["step"] == stop and "loss" in line:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Log, "write", write)
    with pytest.raises(KeyboardInterrupt):
        go(data, tmp_path / "run", "--steps", 12, "--dropout", 0.1, "--average", 3, "--micro-batch", 2)
    monkeypatch.undo()
    assert read_state(tmp_path / "run")["step"] == stop
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert steps(tmp_path / "run") == steps(whole_run)
    assert equal(state(tmp_path / "run"), state(whole_run))


def test_evaluation_does_not_change_training(data, whole_run, tmp_path):
    go(data, tmp_path / "run", "--steps", 12, "--dropout", 0.1, "--average", 3, "--micro-batch", 2, "--evals", 6)
    assert [s for s in steps(tmp_path / "run") if "loss" in s] == [s for s in steps(whole_run) if "loss" in s]


def close_runs(a, b, tolerance=1e-4):
    """Weights and losses of two runs that differ only in the order of float32 sums."""
    for x, y in zip(steps(a), steps(b)):
        assert abs(x.get("loss", 0) - y.get("loss", 0)) < tolerance
    for (k, x), y in zip(state(a)[2].items(), state(b)[2].values()):
        assert (x - y).abs().max() <= tolerance * max(1, y.abs().max()), k


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_equals_one_batch(data, tmp_path, optimizer):
    flags = ("--steps", 6, "--optimizer", optimizer, "--dtype", "float32")             # bfloat16 rounds otherwise
    go(data, tmp_path / "a", *flags)
    go(data, tmp_path / "b", *flags, "--micro-batch", 1)
    close_runs(tmp_path / "a", tmp_path / "b")


def test_accumulation_of_masked_examples_counts_learned_tokens(examples, tmp_path):
    flags = ("--steps", 6, "--context", 160, "--dtype", "float32")
    go(examples, tmp_path / "a", *flags)
    go(examples, tmp_path / "b", *flags, "--micro-batch", 1)
    close_runs(tmp_path / "a", tmp_path / "b")


def command(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8", cwd=ROOT,
                          timeout=300, **options)


def test_checkpointed_activations_change_nothing_but_memory(data, whole_run, tmp_path):
    """Bit for bit, dropout included."""
    go(data, tmp_path / "run", "--steps", 12, "--dropout", 0.1, "--average", 3, "--micro-batch", 2, "--checkpoint-activations")
    assert steps(tmp_path / "run") == steps(whole_run) and equal(state(tmp_path / "run"), state(whole_run))
    model, kept, ids = load(whole_run).train(), [], torch.zeros(4, 32, dtype=torch.long)
    for model.model.checkpoint in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            kept.append({})
            model(ids)
    assert sum(kept[1].values()) < 0.4 * sum(kept[0].values())


def test_bfloat16_and_the_float16_scaler_train(data, tmp_path):
    for dtype in ("bfloat16", "float16"):
        go(data, tmp_path / dtype, "--steps", 8, "--dtype", dtype, "--batch-size", 2, "--context", 16, "--eval-tokens", 64)
        losses = [s["loss"] for s in steps(tmp_path / dtype) if "loss" in s]
        assert losses[-1] < losses[0] - 0.05
        assert next(iter(load(tmp_path / dtype).parameters())).dtype == torch.float32


def test_best_is_kept_apart_from_last(data, tmp_path):
    go(data, tmp_path / "run", "--steps", 8)
    train.main(["--data", str(data), "--out", str(tmp_path / "worse"), "--init-from", str(tmp_path / "run"), "--steps", "8",
                "--evals", "2", "--lr", "3", "--matrix-lr", "3", "--clip", "0"])
    assert load(tmp_path / "worse").history[-1]["parent"]["name"] == "run" and len(load(tmp_path / "worse").history) == 2
    entries = [load(tmp_path / "worse" / d).history[-1]["val_loss"] for d in ("best", "last")]
    logged = [s["val_loss"] for s in steps(tmp_path / "worse") if "val_loss" in s]
    assert entries == [min(logged), logged[-1]]


def test_a_model_that_learns_on_has_the_rates_of_its_width(data, whole_run, tmp_path, capsys):
    width, run = load(whole_run).config.hidden_size, ["--out", str(tmp_path / "run")]
    train.main([*run, "--data", str(data), "--init-from", str(whole_run), "--steps", "2", "--lr", "0.01"])
    first = read_state(tmp_path / "run")["config"]
    assert f"a peak learning rate of {0.18 / width:.2g}, for width {width}" in capsys.readouterr().out
    assert first["lr"] == 0.01 and first["matrix_lr"] == first["embed_lr"] == 0.18 / width and first["evals"] == 10
    train.main([*run, "--resume", "--steps", "3"])
    assert {**read_state(tmp_path / "run")["config"], "steps": 2} == {**first, "steps": 2, "resume": True}


def test_the_directory_opens_in_transformers_with_equal_logits(data, whole_run):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(find_model(whole_run))
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(whole_run))
    ids = tokenizer("w3 = f(3)\nw4 = é🙂", return_tensors="pt").input_ids
    assert (theirs(ids).logits - load(whole_run)(ids)).abs().max() < 1e-4


@pytest.mark.slow
def test_killed_at_random_moments_it_always_resumes(data, whole_run, tmp_path):
    """kill -9, saves included: --resume ends with the weights of the uninterrupted run."""
    out, rng, kills = tmp_path / "run", random.Random(0), 0
    flags = ["train.py", "--data", data, "--out", out, *TINY, "--steps", 12, "--dropout", 0.1, "--average", 3, "--micro-batch", 2, "--save-seconds", 0]
    while True:
        p = subprocess.Popen([sys.executable, *map(str, flags), "--resume"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            assert p.wait(timeout=rng.uniform(2.5, 4.0) if kills < 20 else 300) == 0, p.stderr.read()
            if kills >= 20 or read_state(out)["step"] == 12:
                break
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            kills += 1
    assert kills and equal(state(out), state(whole_run))


# --- bad input: one sentence, exit code 2, nothing lost ---

def refused(*flags, match):
    with pytest.raises(UserError, match=match):
        train.main(list(map(str, flags)))


def test_bad_input(data, whole_run, examples, tmp_path, monkeypatch):
    d = ["--data", data, "--out", tmp_path / "x", "--steps", 2]
    refused(*d, "--widht", 32, match="did you mean --width")
    refused(*d, "--width", "wide", match="--width")
    refused(*d, "--width", 30, "--heads", 4, match="--width .30. does not divide by --heads")
    refused(*d, "--heads", 4, "--kv-heads", 3, match="num_key_value_heads")
    refused(*d, "--optimizer", "sgd", match="--optimizer must be one of")
    refused(*d, "--context", 10 ** 6, match="lower --context")
    refused(*d, "--device", "cuda:9", match="use --device")
    refused(*d, "--device", "cuda:x", match="use --device")
    refused(*d, "--preset", "gpu", "--device", "cpu", match=r"about 1.4 billion tokens .* data/prepare.py fineweb-edu --size 2GB")
    refused("--data", "stdlob", "--out", tmp_path / "x", match="stdlib")
    refused("--data", data, "--out", whole_run, match="--resume")
    refused("--out", whole_run, "--resume", "--width", 64, match="--width is 64, but the run")
    refused("--data", examples, "--out", tmp_path / "x", "--init-from", tmp_path / "nothing", match="no directory")
    refused(*d, "--init-from", whole_run, "--layers", 3, match="--layers is for a new model")
    refused(*d, "--vocab-size", 999, match="was prepared with 259 ids")
    refused(*d, "--seed", -1, match="--seed must be at least 0")
    refused(*d, "--beta1", 1.5, match="--beta1 must be at least 0 and below 1")
    refused(*d, "--lr", "nan", match="--lr must be at least 0")
    refused("--data", data, "--out", whole_run / "best", "--overwrite", match="is a model, not a run's directory")
    refused("--data", data, "--out", whole_run, "--overwrite", "--init-from", whole_run, match="would replace")
    refused("--out", whole_run, "--resume", "--optimizer", "adamw", match="--optimizer is adamw, but the run")
    refused("--out", whole_run, "--resume", "--minutes", 3, match="give --steps")
    refused("--out", whole_run, "--resume", "--preset", "hour", match="--preset is hour, but the run")
    monkeypatch.setitem(sys.modules, "wandb", None)                                  # as if it were not installed
    refused("--data", data, "--out", whole_run, "--overwrite", "--wandb", "project", match="install wandb")
    assert load(whole_run).history and read_log(whole_run / "log.jsonl")      # it is all still there
    other = Path(shutil.copytree(whole_run, tmp_path / "other"))
    t = json.loads((other / "best" / "tokenizer.json").read_text(encoding="utf-8"))
    t["model"]["vocab"]["zz"] = t["model"]["vocab"].pop("z")
    t["model"]["vocab"] |= {"z": t["model"]["vocab"].pop("zz")}
    t["added_tokens"][0]["content"] = "<|other|>"
    (other / "best" / "tokenizer.json").write_text(json.dumps(t), encoding="utf-8")
    (other / "best" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|other|>"}), encoding="utf-8")
    refused("--data", data, "--out", tmp_path / "x", "--init-from", other, match="another tokenizer")
    (find_model(other / "last") / "training_state.pt").write_bytes(b"cut")
    refused("--out", other, "--resume", match="--init-from")
    assert not (tmp_path / "x" / "last").exists()


def test_resume_refuses_data_that_changed(data, whole_run, tmp_path):
    run, changed = shutil.copytree(whole_run, tmp_path / "run"), shutil.copytree(data, tmp_path / "data")
    state = torch.load(run / "last" / "training_state.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "data": str(changed)}}, run / "last" / "training_state.pt")
    meta = json.loads((changed / "meta.json").read_text(encoding="utf-8"))
    (changed / "meta.json").write_text(json.dumps({**meta, "sha256": "other"}), encoding="utf-8")
    refused("--out", run, "--resume", "--steps", 20, match="not what this run began with")


def test_a_finished_run_resumes_to_itself_and_further(data, whole_run, tmp_path, capsys):
    run = shutil.copytree(whole_run, tmp_path / "run")
    train.main(["--out", str(run), "--resume"])
    assert "at step 12 of 12 already" in capsys.readouterr().out and equal(state(run), state(whole_run))
    train.main(["--out", str(run), "--resume", "--steps", "15", "--weight-decay", "0.25"])
    assert "of a run of 15 steps" in capsys.readouterr().out and read_state(run)["step"] == 15
    assert 0.25 in [group["weight_decay"] for o in read_state(run)["optimizers"] for group in o["param_groups"]]
    assert steps(run)[:12] == steps(whole_run)[:12] and len(load(run / "last").history) == 1


def test_a_time_budget_becomes_steps_again_when_the_machine_was_busy_at_first(capsys):
    cfg, machine = train.TrainConfig(minutes=1, evals=3), Machine(torch.device("cpu"), torch.float32, 0, 1, None)
    assert plan(13, 0, 13.0, 1.0, 2.0, cfg, machine) == 54             # 13 + 47 s / 1 s - 3 evaluations of 2 steps
    assert plan(50, 54, 20.0, 0.1, 2.0, cfg, machine) == 444 and "444 steps of 100 ms" in capsys.readouterr().out
    assert plan(100, 444, 25.5, 0.1, 2.0, cfg, machine) == 444 and not capsys.readouterr().out       # 439: near
    assert plan(60, 444, 61.0, 0.1, 2.0, cfg, machine) == 61           # the time is over: one more, and its end
    assert plan(13, 0, 13.0, 1.0, 20.0, cfg, machine) == 20            # two evaluations of three fit


def test_a_time_budget_follows_the_machine_while_the_rate_falls(capsys):
    """A slow end does not lengthen a run and a busy start does not shorten it by more than a fifth; the rate falls on
    without a jump."""
    def end_of(pace):                                                        # pace(second): seconds of a step then
        cfg, machine = train.TrainConfig(minutes=5, evals=3), Machine(torch.device("cpu"), torch.float32, 0, 1, None)
        step, total, seconds, origin, recent, rates = 0, 0, 0.0, (0, 0.0), collections.deque(maxlen=40), []
        while not total or step < total:
            rates.append(train.lr_at(step, total or 10 ** 9, cfg, origin))
            recent.append(pace(seconds))
            step, seconds = step + 1, seconds + recent[-1]
            falling = is_falling(step, total, origin, cfg)
            if is_due(step, total, falling, cfg):
                planned, total = total, plan(step, total, seconds, sum(recent) / len(recent), 0.0, cfg, machine,
                                                   origin if falling else None)
                if total != planned:
                    origin = new_origin(step, planned, total, origin, falling)
        jumps = [b - a for a, b in zip(rates[20:], rates[21:])]
        assert max(jumps) < 1e-9 and min(jumps) > -0.1 and rates[-1] < 0.1
        return seconds
    for pace in (lambda s: 0.1, lambda s: 0.4 if s < 60 else 0.1, lambda s: 0.4 if s < 150 else 0.1, lambda s: 0.1 if s < 100 else 0.5,
                 lambda s: 0.1 if s < 200 else 1.0, lambda s: 0.4 if 80 < s < 160 else 0.1):
        assert 240 < end_of(pace) < 360


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(data, tmp_path):
    go(data, tmp_path / "run", "--steps", 4)
    with pytest.raises(UserError, match="not finite after step .*last good checkpoint"):
        train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "300", "--lr", "1e30", "--matrix-lr", "1e30"])
    assert all(p.isfinite().all() for p in load(tmp_path / "run" / "last").parameters())


def test_a_model_that_is_not_finite_is_never_saved(data, tmp_path):
    with pytest.raises(UserError, match="the (model|validation loss) is not finite"):
        go(data, tmp_path / "run", "--steps", 20, "--evals", 20, "--lr", "1e38", "--warmup", 0)
    assert not (tmp_path / "run" / "last").exists()


def test_exit_code_and_one_sentence(data, tmp_path):
    r = command("train.py", "--data", data, "--out", tmp_path / "x", "--heads", 7)
    assert r.returncode == 2 and r.stderr.strip().count("\n") == 0 and r.stderr.startswith("error: "), r.stderr
