"""What depends on the machine: number type and threads, and what a run says at its beginning and end."""
import os, subprocess, sys, time

import pytest
import torch

import sample, train
from data import machine as machine_module, runs, schedule
from data.loader import Windows
from data.machine import Machine, Threads, halvings
from data.log import Log, read_log
from data.runs import read_state
from model import Config, Transformer, load

from test_train import ROOT, TINY, data, examples, go  # noqa: F401 - fixtures


@pytest.fixture
def used(monkeypatch):
    """The thread counts that are set, instead of setting them."""
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    if machine_module.native:
        monkeypatch.setattr(machine_module.native, "set_threads", lambda count: None)
    return used


def test_threads_step_down_beside_another_program_and_up_again(used, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    threads, alone, beside = Threads([4, 2, 1]), {4: 0.1, 2: 0.15, 1: 0.3}, {4: 1.0, 2: 0.4, 1: 0.3}

    def steps(seconds, n):
        said = []
        for _ in range(n):
            clock[0] += seconds[threads.count]
            said.append(threads.note(seconds[threads.count]))
        return [text for text in said if text]
    assert steps(alone, 100) == [] and threads.count == 4 and used == []
    said = steps(beside, 60)
    assert threads.count == 1 and len(said) == 1 and "1 thread from now on" in said[0] and used == [4, 2, 1, 1]
    assert steps(alone, 250) == [] and threads.count == 4                     # a trial a minute, silent
    assert steps(alone, 1000) == [] and threads.count == 4
    one = Threads([2])
    assert not any(one.note(s) for s in [0.1] * 30 + [9.0] * 30) and one.count == 2 and halvings(6) == [6, 3, 1]


def test_timed_steps_leave_model_and_loss_what_they_were(data):
    windows, kept = Windows(data, "train", 32), {}
    model = Transformer(Config(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                               num_key_value_heads=2, head_dim=16)).initialize()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    machine = Machine(torch.device("cpu"), torch.float32, 0, 1, Threads([torch.get_num_threads()]))
    machines = {"a": machine, "b": machine._replace(dtype=torch.bfloat16)}
    cfg = train.TrainConfig(context=32, batch_size=2)
    taken = train.timed_steps(model, lambda *rows: windows.training_rows(0, *rows), train.cross_entropy, cfg, machines, seconds=0, rounds=2)
    assert {name: len(times) for name, times in taken.items()} == {"a": 6, "b": 6} and min(map(min, taken.values())) > 0
    assert all(torch.equal(t, kept[name]) and True for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def smoke(out, data, **environment):
    done = subprocess.run([sys.executable, "train.py", "--data", data, "--out", out, *TINY, "--steps", "8", "--smoke"], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8", check=True, env={**os.environ, **environment})
    return done.stdout, read_state(out)


def test_threads_are_timed_printed_kept_and_resumed(data, tmp_path):
    clean = {"SLM_TEST_DTYPE": "", "SLM_TEST_THREADS": "", "OMP_NUM_THREADS": "2"}
    said, kept = smoke(tmp_path / "a", data, **clean)
    line = next(line for line in said.splitlines() if line.startswith("device cpu"))
    assert "2 threads: float32" in line and "1 thread: float32" in line and kept["threads"] in (1, 2)
    assert {entry["threads"] for entry in read_log(tmp_path / "a" / "log.jsonl") if "loss" in entry} == {kept["threads"]}
    said, kept = smoke(tmp_path / "b", data, **{**clean, "SLM_TEST_THREADS": "1", "SLM_TEST_DTYPE": "bfloat16"})
    assert "device cpu, 1 thread; bfloat16" in said and kept["threads"] == 1 and kept["dtype"] == "bfloat16"
    resumed = subprocess.run([sys.executable, "train.py", "--out", tmp_path / "b", "--resume", "--steps", "9"], cwd=ROOT, check=True,
                             capture_output=True, text=True, encoding="utf-8", env={**os.environ, **clean})
    assert "device cpu, 1 thread; bfloat16 (as before)" in resumed.stdout and "Warning" not in resumed.stderr


def test_what_the_clock_decided_is_decided_again_after_a_kill(data, tmp_path, monkeypatch):
    """Threads and the number of steps change at step 7; killed at 9, the run goes on from step 6 and changes there again."""
    class Killed(BaseException):
        pass
    real = Log.write

    def write(self, **line):
        real(self, **line)
        if line["step"] == 9 and "loss" in line:
            raise Killed
    monkeypatch.setattr(train, "tuned", lambda machine, *_: machine._replace(threads=Threads([2, 1])))
    monkeypatch.setattr(schedule, "PLANNED", 1)
    monkeypatch.setattr(runs, "plan", lambda step, total, *_: {1: 12, 7: 10}.get(step, total))
    monkeypatch.setattr(runs, "is_due", lambda *_: True)
    monkeypatch.setattr(Threads, "note", lambda self, _: self.use(1) or "")
    monkeypatch.setattr(Threads, "use", lambda self, count: setattr(self, "count", count if clock[0] else self.count))
    clock = [1]
    flags = ["--evals", "2", "--decay", "1"]
    monkeypatch.setattr(Log, "write", write)
    with pytest.raises(Killed):
        go(data, tmp_path / "run", *flags)
    monkeypatch.setattr(Log, "write", real)
    before = {s["step"]: s for s in read_log(tmp_path / "run" / "log.jsonl") if "loss" in s}
    assert read_state(tmp_path / "run")["step"] == 6 and max(before) == 9 and before[7]["total"] == 10
    monkeypatch.setattr(runs, "plan", lambda step, total, *_: total)                    # the clock would decide otherwise
    monkeypatch.setattr(Threads, "note", lambda self, _: "")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    after = {s["step"]: s for s in read_log(tmp_path / "run" / "log.jsonl") if "loss" in s}
    assert max(after) == 10
    for step in range(1, 10):
        assert {k: v for k, v in after[step].items() if "second" not in k} == {k: v for k, v in before[step].items() if "second" not in k}


def test_autocast_on_a_cpu_keeps_the_kernels_and_warns_of_nothing(data, tmp_path, recwarn):
    go(data, tmp_path / "run", "--steps", 4, "--dtype", "bfloat16")
    assert not [w for w in recwarn if "rms_norm" in str(w.message)]
    model, ids = load(tmp_path / "run").train(), torch.randint(255, (2, 32))
    grads = []
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            loss = model(ids).float().square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads):
        assert (a - b).norm() < 0.05 * a.norm() + 1e-6


# --- what a run says ---

def test_the_first_screen(data, examples, tmp_path, capsys):
    go(data, tmp_path / "my run", "--steps", 4)
    said = capsys.readouterr().out
    for text in ("4 steps: the training text is read 0.0", "by xz -9e on", f"{tmp_path / 'my run' / 'loss.png'} has the curve",
                 "--- how the validation text begins:\n", "\n--- and how the model goes on:\n",
                 f"More: python sample.py '{tmp_path / 'my run'}' --prompt TEXT"):
        assert text in said, text
    go(examples, tmp_path / "qa", "--steps", 4, "--context", 160)
    assert f"More: python sample.py {tmp_path / 'qa'} --chat" in capsys.readouterr().out


def test_overfitting_is_said(data, tmp_path, monkeypatch, capsys):
    losses = iter([5.0, 5.1, 5.2, 5.3])
    monkeypatch.setattr(train, "evaluator", lambda *_: lambda model: {**sample.figures(100, 20, 20), "loss": next(losses)})
    go(data, tmp_path / "run", "--steps", 40, "--evals", 4, "--batch-size", 64)                  # reads the text 1.6 times
    said = capsys.readouterr().out
    assert "overfitting: for 2 evaluations now the validation loss is higher than at step 10" in said
    assert f"{tmp_path / 'run' / 'best'} keeps the model of step 10" in said


def test_progress_has_lines_where_there_is_no_terminal(data, tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def later():
        clock[0] += 7.0
        return clock[0]
    monkeypatch.setattr(time, "perf_counter", later)
    monkeypatch.setattr(train, "tuned", lambda machine, *_: machine)
    monkeypatch.setattr(runs, "products_rate", lambda machine: 1.0)
    go(data, tmp_path / "run", "--steps", 8)
    assert "step 4 of 8: loss " in capsys.readouterr().out


def test_what_is_measured_takes_memory_that_does_not_grow_with_the_text():
    """In a process of its own: small tensors that were kept pinned 8 MB of freed logits each."""
    code = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from data.loader import Batch
from data.measure import compare
from model import Config, Transformer
torch.set_num_threads(1)
m = Transformer(Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16))
def batches(n):
    for i in range(n):
        ids = torch.randint(4096, (8, 256), generator=torch.Generator().manual_seed(i))
        yield Batch(ids, ids, None)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = torch.ones(4096)
rows = compare({"a": m, "b": m}, batches(3), tokens)
before = peak()
compare({"a": m, "b": m}, batches(20), tokens)
print((peak() - before) / 1000)
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True, encoding="utf-8", check=True)
    assert float(done.stdout) < 100, done.stdout                                         # MB; it was 8 MB for each 512 tokens
