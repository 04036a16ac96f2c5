"""Distillation: losses against float64, the sampled cache's expectation, masks, accumulation, processes, resume, bad input."""
import dataclasses, json, random, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import distill, sample, train
from data import UserError
from data.labels import Cache, LabelledBatch, systematic
from data.loader import IGNORE, Batch, Windows
from data.machine import Machine, Threads
from data.measure import compare
from data.prepare import prepare
from data.log import Log, read_log
from data.runs import read_state
from data.tokenizer import Tokenizer
from model import Config, Transformer, load, save
from data.structure import shaped

ROOT = Path(distill.__file__).parent
RUN = "--context 32 --batch-size 4 --warmup 3 --evals 2 --eval-tokens 512 --save-seconds 1e9".split()
MACHINE = Machine(torch.device("cpu"), torch.float32, 0, 1, Threads([1]))
KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill-data")
    words = [f"w{i} = f({i % 7})\n" for i in range(300)]
    (folder / "text.txt").write_text("".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return prepare(inputs=[folder / "text.txt"], tokenizer="bytes", out=folder / "text")


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill-examples")
    lines = [{"prompt": f"what is {i}?", "response": f"it is {'very ' * (i % 9)}{i}"} for i in range(200)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines), encoding="utf-8")
    return prepare(inputs=[folder / "qa.jsonl"], tokenizer="bytes", out=folder / "qa")


@pytest.fixture(scope="session")
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    train.main(["--data", str(data), "--out", str(out), *RUN, "--layers", "4", "--width", "32", "--steps", "20"])
    return out


@pytest.fixture(scope="session")
def qa_teacher(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "qa-teacher"
    train.main(["--data", str(examples), "--out", str(out), *RUN, "--context", "160", "--layers", "3", "--width", "32", "--steps", "8"])
    return out


def go(teacher, data, out, *flags):
    distill.main([*map(str, (teacher, "--data", data, "--out", out)), *RUN, *map(str, flags)])


def steps(out):
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_log(Path(out) / "log.jsonl")]


def weights(out):
    return load(Path(out) / "last").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tiny(seed, vocab=64, layers=2, width=32, **more):
    model = Transformer(Config(vocab_size=vocab, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
                               num_attention_heads=2, num_key_value_heads=2, head_dim=16, **more))
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 1) + (p.ndim == 1)
    return model


def ids_of(vocab=64, B=3, T=16, seed=0):
    ids = torch.randint(vocab, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:].clone(), None)


def loss_of(teacher, student, layers=(0, 1), vocab=64, **settings):
    return distill.Distillation(teacher.requires_grad_(False), student, list(layers), vocab, distill.DistillConfig(**settings))


# --- losses ---

def reference(student, teacher, kind, beta, T):
    """The definitions, in float64, from probabilities."""
    q, p = (student.double() / T).softmax(1), (teacher.double() / T).softmax(1)
    kl = lambda a, b: (a * (a / b).log()).sum(1)
    m = beta * p + (1 - beta) * q
    return T * T * {"forward": kl(p, q), "reverse": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("T", [1.0, 2.5])
def test_divergences_equal_float64(kind, beta, T):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(9, 50, generator=g) * 3, torch.randn(9, 50, generator=g) * 3
    d, grad = distill.divergence(s, t, kind, beta, T)
    x = s.double().requires_grad_()
    right = reference(x, t, kind, beta, T)
    assert torch.allclose(d.double(), right, rtol=1e-4, atol=1e-6)
    assert torch.allclose(grad.double(), torch.autograd.grad(right.sum(), x)[0], rtol=1e-3, atol=1e-6)


def test_jsd_has_the_limits_of_forward_and_reverse():
    g = torch.Generator().manual_seed(1)
    s, t = torch.randn(9, 50, generator=g).double(), torch.randn(9, 50, generator=g).double()
    for beta, scale, kind in ((1e-6, 1e-6, "forward"), (1 - 1e-6, 1e-6, "reverse")):
        (d, grad), (limit, its) = distill.divergence(s, t, "jsd", beta), distill.divergence(s, t, kind)
        assert torch.allclose(d / scale, limit, rtol=0.02) and (grad / scale - its).abs().max() < 0.05 * its.abs().max()


@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergences_are_never_negative_and_zero_only_for_equals(kind, beta):
    g = torch.Generator().manual_seed(2)
    t = torch.randn(200, 300, generator=g) * 8
    for noise in (1e-6, 1e-3, 1.0, 30.0):
        d, grad = distill.divergence(t + noise * torch.randn(200, 300, generator=g), t, kind, beta)
        assert (d >= 0).all() and d.isfinite().all() and grad.isfinite().all()
    d, grad = distill.divergence(t, t.clone(), kind, beta)
    assert d.max() < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind, beta", KINDS)
def test_loss_and_gradient_are_zero_where_the_student_is_the_teacher(kind, beta):
    student, sizes = tiny(0), []
    for teacher in (tiny(1), tiny(0)):                                        # one that is another, for the scale; and itself
        loss_fn = loss_of(teacher, student, loss=kind, beta=beta, hard_weight=0.0, hidden="mse", attention_weight=1.0)
        loss, count, _ = loss_fn(student, ids_of())
        grads = torch.autograd.grad(loss, [p for p in student.parameters()], allow_unused=True)
        sizes.append((loss.item(), max(g.abs().max().item() for g in grads if g is not None)))
    (other, its), (loss, grad) = sizes                # not quite 0: norms without a gradient take another kernel, in C
    assert count == 48 and loss < 1e-6 * other and grad < 1e-4 * its, sizes


@pytest.mark.parametrize("vocab", [64, 90_000])                               # 90,000: several chunks
def test_the_loss_through_the_head_equals_autograd(vocab, monkeypatch):
    monkeypatch.setattr(train, "LEAST_ROWS", 1)
    student, teacher, batch = tiny(0, vocab), tiny(1, vocab), ids_of(vocab)
    batch.targets[0, :5] = IGNORE
    loss_fn = loss_of(teacher, student, vocab=vocab, loss="jsd", beta=0.3, hard_weight=0.4, temperature=2.0)
    loss, count, metrics = loss_fn(student, batch)
    keep = (batch.targets != IGNORE).flatten()
    s, t = student(batch.ids).flatten(0, 1)[keep], teacher(batch.ids).flatten(0, 1)[keep]
    ce, d = F.cross_entropy(s, batch.targets.flatten()[keep], reduction="sum"), reference(s, t, "jsd", 0.3, 2.0).sum()
    right = 0.4 * ce + 0.6 * d
    assert count == keep.sum() and abs(loss.item() / right.item() - 1) < 1e-4
    assert abs(metrics["ce"].item() / ce.item() - 1) < 1e-4 and abs(metrics["divergence"].item() / d.item() - 1) < 1e-4
    p = student.lm_head.weight, student.model.layers[0].mlp.up_proj.weight
    for a, b in zip(torch.autograd.grad(loss, p), torch.autograd.grad(right, p)):
        assert (a - b).abs().max() < 1e-3 * b.abs().max()


def test_what_is_not_learned_contributes_nothing():
    """Loss and gradients are the same whatever the targets, the teacher's labels and the two models do at masked positions."""
    student, teacher, batch = tiny(0), tiny(1), ids_of()
    batch.targets[:, 9:] = IGNORE
    results = []
    for change in (False, True):                                              # causal: later ids change only masked positions
        b = Batch(batch.ids.clone(), batch.targets, None)
        if change:
            b.ids[:, 10:] = (b.ids[:, 10:] + 7) % 64
        loss, count, _ = loss_of(teacher, student, hidden="cosine", attention_weight=1.0)(student, b)
        results.append((loss, *torch.autograd.grad(loss, [p for n, p in student.named_parameters() if ".1.mlp.up" in n or "lm_head" in n])))
    assert count == 27 and all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results))
    metrics = distill.collections.defaultdict(float)
    chunk = distill.sparse_targets(torch.tensor([[3, 5], [0, 0]]), torch.tensor([[0.5, 0.5], [0, 0]]), metrics)
    loss, grad = chunk(torch.randn(2, 8), slice(0, 2))
    assert grad[1].abs().max() == 0 and abs(grad[0].sum()) < 1e-6


def test_padded_vocabularies_are_cut_to_the_real_ids():
    student, teacher = tiny(0, 72), tiny(1, 96)
    loss, _, _ = loss_of(teacher, student, vocab=64, hard_weight=0.0)(student, ids_of())
    s, t = (m(ids_of().ids).flatten(0, 1)[:, :64] for m in (student, teacher))
    assert abs(loss.item() / reference(s, t, "forward", 0.5, 1.0).sum().item() - 1) < 1e-4
    assert torch.autograd.grad(loss, student.lm_head.weight)[0][64:].abs().max() == 0


def test_attention_map_is_what_attention_does():
    model, seen = tiny(0, layers=1), {}
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda m, args, out: seen.update(args=args, out=out))
    for segments in (None, torch.tensor([[0] * 6 + [1] * 10] * 3)):
        model(ids_of().ids, segments=segments, hidden=(hidden := []))
        x, rotary, mask, _ = seen["args"]
        states = distill.States(model.model.layers, hidden, [rotary], [mask])
        v = attention.v_proj(x).view(3, 16, 2, 16).transpose(1, 2)
        y = (distill.attention_map(states, 0).exp() @ v).transpose(1, 2).reshape(3, 16, 32)
        assert (attention.o_proj(y) - seen["out"]).abs().max() < 1e-4


def test_transfer_between_different_widths_and_heads_learns_a_projection():
    student = tiny(0, width=16)
    loss_fn = loss_of(tiny(1, layers=4), student, [1, 3], hidden="mse", attention_weight=1.0)
    loss, _, metrics = loss_fn(student, ids_of())
    loss.backward()
    assert all(p.weight.grad.abs().max() > 0 for p in loss_fn.projections) and metrics["attention"] > 0
    assert not any("teacher" in name for name, _ in loss_fn.named_parameters())


# --- the cache ---

def test_expected_counts_and_gradient_of_sampled_labels_are_the_full_ones():
    g = torch.Generator().manual_seed(0)
    teacher, student, n, draws = torch.randn(1, 40, generator=g) * 2, torch.randn(1, 40, generator=g), 20_000, 7
    p = teacher.softmax(1)
    ids, counts, lengths = systematic(p.expand(n, -1), draws, g)
    rows = torch.repeat_interleave(torch.arange(n), lengths)
    dense = torch.zeros(n, 40).index_put_((rows, ids), counts.float())
    assert (dense.sum(1) == draws).all() and (dense - draws * p).abs().max() < 1              # rounded down or up
    error = dense.mean(0) / draws - p[0]
    assert (error.abs() < 5 * (dense.std(0) / draws / n ** 0.5 + 1e-5)).all()
    metrics = distill.collections.defaultdict(float)
    weights = dense / draws
    _, grads = distill.sparse_targets(torch.arange(40).expand(n, -1), weights, metrics)(student.expand(n, -1), slice(0, n))
    full = distill.divergence(student, teacher)[1][0]
    assert (grads.mean(0) - full).abs().max() < 0.01 * full.abs().max()


@pytest.fixture(scope="session")
def cached(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached") / "run"
    go(teacher, data, out, "--steps", 12, "--cache", "--control", "--student-layers", 2)
    return out


def test_cached_rows_are_the_teachers_labels_of_those_rows(teacher, data, cached):
    header = json.loads((cached / "cache" / "header.json").read_text())
    assert header["bytes_per_token"] <= 40 and header["tokens"] == header["windows"] * 32
    wanted = {k: header[k] for k in ("teacher", "windows", "context")}
    cache, windows = Cache(cached / "cache", wanted), Windows(data, "train", 32).subset(header["windows"], 0)
    rows = cache.rows(windows, 0, 14, 5, 0.25)
    text = windows.training_rows(0, 14, 5)
    assert torch.equal(rows.ids, text.ids) and torch.equal(rows.labels[..., 0], text.targets)
    assert torch.allclose(rows.weights.sum(2), torch.ones(5, 32)) and (rows.weights[..., 0] == 0.25).all()
    p = load(teacher)(rows.ids).softmax(2)[..., :259]
    dense = torch.zeros_like(p).scatter_add_(2, rows.labels[..., 1:], rows.weights[..., 1:]) / 0.75
    assert ((dense - p) * header["draws"]).abs().max() < 1.001


@pytest.mark.parametrize("context", [160, 32])                                       # 32 cuts most examples into pieces
def test_cached_labels_of_masked_examples_are_at_all_that_is_learned_and_only_there(qa_teacher, examples, context, tmp_path):
    go(qa_teacher, examples, tmp_path / "run", "--steps", 4, "--cache", "--context", context)
    header = json.loads((tmp_path / "run" / "cache" / "header.json").read_text())
    cache = Cache(tmp_path / "run" / "cache", {k: header[k] for k in ("windows", "context")})
    rows = cache.rows(Windows(examples, "train", context).subset(header["windows"], 0), 0, 0, 4, 0.3)
    assert torch.allclose(rows.weights.sum(2), (rows.targets != IGNORE).float()) and header["tokens"] < header["windows"] * context


def test_a_stale_or_cut_cache_is_refused(teacher, qa_teacher, examples, data, cached, tmp_path):
    go_on = lambda d, *more: go(teacher, data, tmp_path / "x", "--steps", 2, "--cache", "--cache-dir", d, *more)
    with pytest.raises(UserError, match="stale: its context is 32"):
        go_on(cached / "cache", "--context", 16)
    other = shutil.copytree(cached / "cache", tmp_path / "other")
    header = json.loads((other / "header.json").read_text())
    (other / "header.json").write_text(json.dumps({**header, "teacher": "0123"}))
    with pytest.raises(UserError, match="stale: its teacher is '0123'"):
        go_on(other)
    cut = shutil.copytree(cached / "cache", tmp_path / "cut")
    (cut / "ids.bin").write_bytes((cut / "ids.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="cut short .ids.bin.: delete it"):
        go_on(cut)
    assert not (tmp_path / "x" / "best").exists()


# --- the student ---

def test_layers_are_spread_and_copied(teacher, tmp_path, data):
    assert [distill.spread(n, t) for n, t in ((1, 4), (2, 4), (3, 6), (4, 4), (6, 12))] == \
        [[0], [0, 3], [0, 3, 5], [0, 1, 2, 3], [0, 2, 4, 7, 9, 11]]
    t = load(teacher)
    cfg = distill.DistillConfig(layer_map="1,3")
    student, layers = distill.make_student(cfg, set(), t, None, MACHINE)
    assert layers == [1, 3] and student.config.num_hidden_layers == 2
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, t.model.layers[3].mlp.up_proj.weight)
    assert torch.equal(student.lm_head.weight, t.lm_head.weight)
    assert student.lm_head.weight.data_ptr() != t.lm_head.weight.data_ptr()
    n = distill.default_layers(t)
    small = distill.make_student(distill.DistillConfig(), set(), t, None, MACHINE)[0]
    assert small.config.num_hidden_layers == n and small.parameters_count() <= 0.6 * t.parameters_count()
    fresh, _ = distill.make_student(distill.DistillConfig(init="random", student_width=16, student_layers=5), set(), t, None, MACHINE)
    assert (fresh.config.hidden_size, fresh.config.num_hidden_layers, fresh.config.intermediate_size) == (16, 5, 48)


def test_hard_weight_1_is_plain_training_bit_for_bit(teacher, data, tmp_path):
    rates = ("--lr", 0.01, "--embed-lr", 0.1, "--matrix-lr", 0.02, "--optimizer", "muon", "--beta1", 0.5, "--decay", 0.7)
    go(teacher, data, tmp_path / "a", "--student", teacher, "--hard-weight", 1, "--steps", 6, *rates)
    train.main(["--data", str(data), "--out", str(tmp_path / "b"), "--init-from", str(teacher), "--steps", "6", *RUN, *map(str, rates)])
    logs = [[{k: v for k, v in line.items() if k != "train_bits_per_byte"} for line in steps(tmp_path / name)] for name in "ab"]
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")) and logs[0] == logs[1]


# --- runs ---

def close_runs(a, b, tolerance=2e-4):
    for x, y in zip(steps(a), steps(b)):
        assert abs(x.get("loss", 0) - y.get("loss", 0)) < tolerance
    for (k, x), y in zip(weights(a).items(), weights(b).values()):
        assert (x - y).abs().max() <= tolerance * max(1, y.abs().max()), k


TRANSFER = ("--steps", 5, "--context", 160, "--hidden", "cosine", "--attention-weight", 0.5, "--loss", "jsd", "--init", "random",
            "--student-width", 16, "--student-layers", 2, "--on-policy", 0.4)


def test_accumulation_and_two_processes_are_one_batch(qa_teacher, examples, tmp_path):
    """Masked prompts, learned projections, rows the student writes: all in the mean over the whole step's tokens."""
    exact = (*TRANSFER, "--dtype", "float32")                                          # bfloat16 rounds otherwise
    go(qa_teacher, examples, tmp_path / "one", *exact)
    go(qa_teacher, examples, tmp_path / "micro", *exact, "--micro-batch", 1)
    close_runs(tmp_path / "one", tmp_path / "micro")
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "distill.py",
                        *map(str, (qa_teacher, "--data", examples, "--out", tmp_path / "two", *RUN, *exact))],
                       capture_output=True, text=True, encoding="utf-8", cwd=ROOT, timeout=300)
    assert r.returncode == 0, r.stderr
    close_runs(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "report.md").exists()


@pytest.mark.parametrize("stop, where", [(5, "run"), (4, "control")])
def test_resume_is_the_uninterrupted_proof_bit_for_bit(teacher, data, cached, tmp_path, stop, where, monkeypatch):
    out, real = tmp_path / "run", Log.write
    steps_of_control = read_state(cached / "control")["total"]

    def write(self, **line):                       # a Ctrl-C during step `stop`
        real(self, **line)
        if line["step"] == stop and "loss" in line and Path(self.file.name).parent.name == where:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Log, "write", write)
    monkeypatch.setattr(distill, "step_seconds", lambda model, batches, loss_fn, *more:            # as in the whole run
                        12 / steps_of_control if loss_fn is train.cross_entropy else 1.0)
    monkeypatch.setattr(Cache, "__init__", lambda self, d, w, v, init=Cache.__init__: (
        init(self, d, w, v), self.header.update(seconds=0.0))[0])
    with pytest.raises(KeyboardInterrupt):
        go(teacher, data, out, "--steps", 12, "--cache", "--control", "--student-layers", 2)
    monkeypatch.setattr(Log, "write", real)
    distill.main(["--out", str(out), "--resume"])
    for run in ("", "control"):
        assert steps(out / run) == steps(cached / run) and same(weights(out / run), weights(cached / run))


def test_the_report_says_what_was_measured(cached, teacher):
    report = json.loads((cached / "report.json").read_text())["models"]
    assert list(report) == ["teacher", "student", "control"] and report["teacher"]["agreement"] == 1
    for name, model in (("teacher", load(teacher)), ("student", load(cached)), ("control", load(cached / "control"))):
        assert report[name]["parameters"] == model.parameters_count()
        assert abs(report[name]["quality_kept"] - report["teacher"]["bits_per_byte"] / report[name]["bits_per_byte"]) < 1e-9
    assert report["student"]["teacher_seconds"] == json.loads((cached / "cache" / "header.json").read_text())["seconds"]
    text = (cached / "report.md").read_text(encoding="utf-8")
    assert text.count("|\n") == 5 and "its cost" in text and (cached / "report.png").stat().st_size > 5000
    entry = load(cached).history[-1]
    assert entry["step"] == "distill" and entry["teacher"]["name"] == "teacher" and load(cached / "control").history[-1]["step"] == "control"


def test_fewer_layers_of_a_hub_model_name_as_many_types():
    """transformers writes them for models whose attention slides nowhere, too, and refuses another number of them."""
    config = dataclasses.replace(tiny(0, layers=4).config, hub={"layer_types": ["full_attention"] * 4})
    fewer = shaped(config, [0, 3])
    assert fewer.hub["layer_types"] == ["full_attention"] * 2 and fewer.layer_types is None


def test_a_time_budget_is_shared_with_a_control(teacher, data, tmp_path):
    go(teacher, data, tmp_path / "run", "--minutes", 0.03, "--control", "--student-layers", 2)
    for run in ("", "control"):
        state = read_state(tmp_path / "run" / run)
        assert state["step"] == state["total"] >= 1
    assert "control" in json.loads((tmp_path / "run" / "report.json").read_text())["models"]


def test_rows_the_student_writes(teacher, data):
    student, windows = load(teacher), Windows(data, "train", 32)
    cfg, tokenizer = distill.DistillConfig(on_policy=0.5), Tokenizer.load(data)
    rows = lambda first, n: distill.on_policy_rows(windows.training_rows(0, first, n), first, student, tokenizer, cfg, MACHINE)
    text, taught = windows.training_rows(0, 0, 12), rows(0, 12)
    mine = taught.sampled.any(1)
    assert 2 <= mine.sum() <= 10 and torch.equal(taught.ids[~mine], text.ids[~mine]) and torch.equal(taught.targets[~mine], text.targets[~mine])
    assert torch.equal(taught.ids[mine][:, :8], text.ids[mine][:, :8]) and (taught.targets[mine][:, :7] == IGNORE).all()
    assert torch.equal(taught.ids[mine][:, 8:], taught.targets[mine][:, 7:-1]) and not torch.equal(taught.ids[mine], text.ids[mine])
    assert all(torch.equal(a[5:8], b) for a, b in zip((taught.ids, taught.targets), rows(5, 3)))  # whatever the accumulation
    hard = loss_of(load(teacher), student, [0] * 4, 259, hard_weight=0.5)(student, taught)[2]["ce"].item()
    kept = LabelledBatch(*taught._replace(targets=taught.targets.masked_fill(taught.sampled, IGNORE)))
    assert abs(hard - loss_of(load(teacher), student, [0] * 4, 259, hard_weight=0.5)(student, kept)[2]["ce"].item()) < 1e-2


# --- exits and self-speculation ---

def test_exits_are_recorded_and_improve_and_self_draft_is_exact(teacher, data, tmp_path):
    rates = ("--steps", "25", "--optimizer", "muon", "--lr", "0.01", "--embed-lr", "0.1", "--matrix-lr", "0.02", "--beta1", "0.5")
    go(teacher, data, tmp_path / "run", "--exits", "1,3", *rates)
    train.main(["--data", str(data), "--out", str(tmp_path / "plain"), "--init-from", str(teacher), *RUN, *rates])
    plain, after = load(tmp_path / "plain"), load(tmp_path / "run")
    assert after.exits == [1, 3] and "exits" not in json.loads((tmp_path / "plain" / "best" / "config.json").read_text())
    kl = lambda m: compare({"all": m, "exit": sample.first_layers(m, 1)}, Windows(data, "val", 32).evaluation_batches(8),
                                  Tokenizer.load(data).token_bytes())["exit"]["kl"]
    assert kl(after) < 0.5 * kl(plain)
    save(after, tmp_path / "again")
    assert load(tmp_path / "again").exits == [1, 3]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}])
def test_greedy_speculation_is_plain_generation_past_the_window(settings):
    model = tiny(0, layers=4, max_position_embeddings=40).eval()
    ids = ids_of().ids[:1]
    for draft, least in ((sample.first_layers(model, 2), 0), (model, 1)):
        length = sample.DraftLength()
        plain = [int(i) for i in sample.generate(model, ids, 100, vocab_size=60, temperature=0, **settings)]
        guessed = [int(i) for i in sample.speculate(model, draft, ids, 100, vocab_size=60, temperature=0, length=length, **settings)]
        assert plain == guessed and length.accepted >= least * length.guessed
    stop = plain[37]
    assert [int(i) for i in sample.speculate(model, draft, ids, 100, stop=[stop], vocab_size=60, temperature=0, **settings)] == \
        plain[:plain.index(stop) + 1]


def test_speculated_tokens_are_distributed_as_the_models_own():
    """Chi-square of the second new token, which depends on what was taken, against its exact distribution."""
    model = tiny(0, vocab=8, layers=3, max_position_embeddings=40).eval()
    for p in model.parameters():
        p.data *= 0.7
    ids, g, n = torch.tensor([[1, 5, 2]]), torch.Generator().manual_seed(0), 800
    options = dict(temperature=1.3, top_k=6)
    first = sample.next_probs(model(ids)[:, -1], ids, **options)[0]
    pairs = torch.cat((ids.expand(8, -1), torch.arange(8)[:, None]), 1)
    second = first @ sample.next_probs(model(pairs)[:, -1], pairs, **options)
    draft, seen = sample.first_layers(model, 1), torch.zeros(2, 8)
    for _ in range(n):
        for i, x in enumerate(sample.speculate(model, draft, ids, 3, generator=g, **options)):
            if i < 2:
                seen[i, x] += 1
    for counts, p in zip(seen, (first, second)):
        keep = p * n > 5
        assert counts[p == 0].sum() == 0
        assert ((counts - p * n) ** 2 / (p * n))[keep].sum() < 26                                # 7 degrees: p < 0.0005


# --- another tokenizer ---

def test_from_samples_reaches_another_tokenizer(teacher, data, tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"w{i} = f({i % 7})\n" for i in range(2000)), encoding="utf-8")
    other = prepare(inputs=[tmp_path / "t.txt"], vocab_size=262, out=tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer .*--from-samples"):
        go(teacher, other, tmp_path / "x")
    go(teacher, other, tmp_path / "x", "--from-samples", 3000, "--steps", 4, "--student-layers", 2)
    assert load(tmp_path / "x").config.vocab_size == 262 and Tokenizer.load(tmp_path / "x" / "best").hash == Tokenizer.load(other).hash
    assert sum(len(json.loads(l)["text"]) for l in open(tmp_path / "x" / "samples.jsonl", encoding="utf-8")) > 1000


# --- bad input ---

@pytest.mark.parametrize("flags, match", [
    (["--beta", "1.5"], "--beta must be between"), (["--temperature", "0"], "--temperature must be between"),
    (["--hard-weight", "nan"], "--hard-weight must be between"), (["--loss", "kl"], "--loss must be one of forward, reverse, jsd"),
    (["--layer-map", "0,4"], "--layer-map 0,4 must be whole numbers from 0 to 3"), (["--layer-map", "0,1", "--student-layers", "3"], "names 2 layers"),
    (["--student-layers", "9"], "more than the teacher's 4"), (["--exits", "4"], "--exits 4 must be whole numbers from 1 to 3"),
    (["--student-width", "16"], "needs --init random"), (["--cache", "--loss", "reverse"], "--cache keeps samples"),
    (["--cache", "--hidden", "mse"], "leave it out, or --hidden"), (["--exits", "1", "--cache"], "--exits goes without"),
    (["--los", "jsd"], "did you mean --loss"), (["--layers", "3"], "unrecognized arguments: --layers"), (["--context", "64"], "teacher's window of 32"),
    (["--init", "random", "--student-width", "30", "--student-heads", "4"], "even multiple"), (["--student", "nowhere"], "no directory nowhere")])
def test_bad_input_is_one_sentence_and_nothing_is_written(teacher, data, tmp_path, flags, match):
    with pytest.raises(UserError, match=match):
        distill.main([str(teacher), "--data", str(data), "--out", str(tmp_path / "x"), *flags])
    assert not (tmp_path / "x").exists()


def test_more_bad_input(teacher, data, cached, tmp_path, capsys):
    with pytest.raises(UserError, match="begun by another script"):
        train.main(["--out", str(cached), "--resume"])
    with pytest.raises(UserError, match="which teacher"):
        distill.main(["--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--loss is reverse, but the run"):
        distill.main(["--out", str(cached), "--resume", "--loss", "reverse"])
    with pytest.raises(UserError, match="holds a model already"):
        go(teacher, data, cached)
    with pytest.raises(UserError, match="is the run that --out"):
        distill.main([str(teacher), "--data", str(data), "--out", str(teacher), "--overwrite"])
    other = shutil.copytree(teacher, tmp_path / "other-teacher")
    model = load(other)
    model.lm_head.weight.data = model.lm_head.weight.data + 1
    save(model, other / "best", Tokenizer.load(data))
    with pytest.raises(UserError, match="is not the one that the run in"):
        distill.main([str(other), "--out", str(cached), "--resume"])
    go(teacher, data, tmp_path / "large", "--init", "random", "--student-layers", 6, "--steps", 2)
    assert "is larger than its teacher" in capsys.readouterr().out
