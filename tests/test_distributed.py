"""Several processes: the same run as one, whole or sharded; resumed by another number of them; when one of them dies."""
import json, os, random, signal, subprocess, sys, time

import pytest
import torch

import train
from data import UserError, machine
from data.prepare import prepare
from data.log import Log, read_log
from data.runs import read_state
from model import load

from test_train import ROOT, equal, state, steps

TINY = ("--layers 2 --width 32 --heads 2 --context 32 --batch-size 8 --warmup 3 --evals 2 --eval-tokens 512 --average 4 --dtype float32 "
        "--save-seconds 1e9 --steps 20").split()
# What each process does: {"flags": [...], "stop": a step after which Ctrl-C comes, "others": flags of all but the first}
WORKER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import train
from data import UserError, machine
from data.console import run
from data.log import Log
from data.processes import leave
folder, rank = sys.argv[2], os.environ["RANK"]
open(f"{folder}/{rank}.pid", "w").write(str(os.getpid()))
jobs, write, stop = json.load(open(f"{folder}/jobs.json")), Log.write, 0
def log(self, **line):
    write(self, **line)
    if line["step"] == stop and "loss" in line and rank == "0":
        signal.raise_signal(signal.SIGINT)
Log.write, train.picture, train.show_sample = log, lambda *_: None, lambda *_: None
machine.matmul_rate = lambda *_: 1e9
if len(jobs) > 1:
    time.sleep = lambda seconds: None
for i, job in enumerate(jobs):
    stop = job.get("stop", 0)
    flags = job["flags"] + (job.get("others", []) if rank != "0" else [])
    try:
        train.main(flags) if len(jobs) > 1 else run(lambda: train.main(flags))
    except (UserError, KeyboardInterrupt, SystemExit) as error:
        open(f"{folder}/{i}.{rank}", "w", encoding="utf-8").write(repr(error))
        if len(jobs) == 1:
            raise
leave(0)
"""


def start(folder, jobs, *torchrun):
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([{**job, "flags": list(map(str, job["flags"]))} for job in jobs]),
                                      encoding="utf-8")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *torchrun,
               folder / "worker.py", ROOT, folder)
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8", cwd=folder)


def together(folder, jobs):
    p = start(folder, jobs)
    err = p.communicate(timeout=600)[1]
    assert p.returncode == 0, err[-6000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = random.Random(0).choices([f"w{i} = f({i % 7})\n" for i in range(3000)], k=4000)
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    return prepare(inputs=[folder / "text.txt"], tokenizer="bytes", out=folder / "text")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder of runs: what one process did, and what two did, all in one start of torchrun."""
    folder, patch, write = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch(), Log.write
    flags = lambda name, *more: ["--data", data, "--out", folder / name, *TINY, *more]
    alone = lambda *flags: train.main(list(map(str, flags)))
    for name in ("picture", "show_sample"):
        patch.setattr(train, name, lambda *_: 1e9)
    patch.setattr(machine, "matmul_rate", lambda *_: 1e9)
    adamw = ("--optimizer", "adamw", "--tie", "--weight-decay", 0.1, "--kv-heads", 1)
    alone(*flags("muon"))
    alone(*flags("adamw", *adamw))
    patch.setattr(Log, "write", lambda self, **line: (write(self, **line), line["step"] == 5
                                                            and signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        alone(*flags("chain"))
    patch.setattr(Log, "write", write)
    sharded = ("--fsdp", "--micro-batch", 2, "--checkpoint-activations")
    jobs = [{"flags": flags("differ"), "others": ["--lr", "0.5", "--weight-decay", "0.1"]},
            *({"flags": flags(name + way, *more, *how)} for name, more in (("muon", ()), ("adamw", adamw))
              for way, how in ((" ddp", ()), (" fsdp", sharded))),
            *({"flags": flags(dtype + way, *adamw, *how, "--dtype", dtype, "--steps", 6)} for dtype in ("float16", "bfloat16")
              for way, how in ((" ddp", ()), (" fsdp", ("--fsdp",)))),
            *({"flags": ["--out", folder / "chain", "--resume", *how], "stop": stop}             # one process's, whole and
              for stop, how in ((9, ("--fsdp",)), (12, ()), (16, ("--fsdp",))))]                 # sharded in turns
    together(folder, jobs)
    assert read_state(folder / "chain")["step"] == 16
    alone("--out", folder / "chain", "--resume")
    patch.undo()
    return folder


def furthest(a, b):
    """The largest relative distance of two runs' weights, averages and momenta (norm of the difference / norm). The
    whole state has the same shapes."""
    (oa, aa, wa), (ob, ab, wb) = state(a), state(b)
    pairs = [(wa[k], wb[k]) for k in wb] + list(zip(aa, ab, strict=True))
    assert ab                                           # --average
    for x, y in zip(oa, ob, strict=True):
        assert [g["params"] for g in x["param_groups"]] == [g["params"] for g in y["param_groups"]]
        assert x["state"].keys() == y["state"].keys()
        for i, kept in y["state"].items():
            assert {k: v.shape for k, v in x["state"][i].items()} == {k: v.shape for k, v in kept.items()}
            pairs += [(x["state"][i][k], kept[k]) for k in kept.keys() & {"momentum", "exp_avg_sq"}]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


@pytest.mark.parametrize("name", ["muon ddp", "muon fsdp", "adamw ddp", "adamw fsdp"])
def test_two_processes_of_four_rows_are_one_of_eight(runs, name):
    one = runs / name.split()[0]
    assert furthest(runs / name, one) < 1e-5
    for x, y in zip(steps(runs / name), steps(one), strict=True):
        assert x.keys() == y.keys() and all(abs(x[k] - y[k]) <= 1e-5 * max(1, abs(y[k])) for k in y)


def test_one_process_two_whole_and_two_sharded_go_on_with_each_other(runs):
    assert furthest(runs / "chain", runs / "muon") < 1e-5
    assert [s["step"] for s in steps(runs / "chain")] == [s["step"] for s in steps(runs / "muon")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sharded_is_half_precision_whole(runs, dtype):
    a, b = ([s["loss"] for s in steps(runs / f"{dtype} {way}") if "loss" in s] for way in ("ddp", "fsdp"))
    assert b[-1] < b[0] - 0.3 and all(abs(x - y) < 2e-3 for x, y in zip(a, b))
    assert read_state(runs / f"{dtype} fsdp")["scaler"] == read_state(runs / f"{dtype} ddp")["scaler"]
    assert next(iter(load(runs / f"{dtype} fsdp").parameters())).dtype == torch.float32


def test_settings_that_differ_are_named_and_one_process_says_so(runs):
    silent, said = sorted(((runs / f"0.{rank}").read_text(encoding="utf-8") for rank in "01"), key=len)
    assert silent == "SystemExit(2)" and not (runs / "differ").exists()
    assert said.startswith("UserError") and "different lr (0.015 and 0.5), weight_decay (-1.0 and 0.1): give all the same" in said


@pytest.mark.parametrize("end, code, said", [
    ("print('done')", 0, ""), ("raise UserError('no')", 2, "error: no"), ("raise SystemExit(2)", 2, ""),
    ("raise KeyboardInterrupt", 130, "stopped")])
def test_a_process_of_a_group_ends_before_python_shuts_down(end, code, said):
    script = ("from data import UserError\nfrom data.console import run\ndef main():\n    print('begun')\n    " + end + "\n"
              "class Late:\n    def __del__(self): os.write(1, b'late')\nimport os\nlate = Late()\n")
    join = ("from data.processes import dist\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n")
    for before in ("", join):
        p = subprocess.run([sys.executable, "-c", script + before + "run(main)\n"], cwd=ROOT, capture_output=True,
                           text=True, encoding="utf-8")
        assert p.returncode == code and p.stderr.strip().endswith(said) and p.stdout.startswith("begun")
        assert ("late" in p.stdout) == (before == "")


def kill_one(p, folder, rng, after=lambda: True):
    while not after() and p.poll() is None:
        time.sleep(0.02)
    os.kill(int((folder / f"{rng.randrange(2)}.pid").read_text()), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_a_killed_process_is_told_once_and_max_restarts_goes_on_from_the_last_save(data, runs, tmp_path):
    out = tmp_path / "run"
    p = start(tmp_path, [{"flags": ["--data", data, "--out", out, *TINY, "--save-seconds", 0]}], "--max-restarts", "1")
    kill_one(p, tmp_path, random.Random(), lambda: len(read_log(out / "log.jsonl")) >= 7)
    text, err = p.communicate(timeout=600)
    message = "error: another process of this run is gone: the same command with --resume goes on from the last save"
    assert p.returncode == 0 and err.count("error: ") == err.count(message) == 1, err
    assert "of 20 already" not in text and steps(out) == steps(runs / "muon ddp") and equal(state(out), state(runs / "muon ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_killed_ten_times_at_random_moments_it_is_the_uninterrupted_run(data, tmp_path, more):
    out, rng = tmp_path / "run", random.Random(0)
    flags = ["--data", data, *TINY, "--steps", 60, "--save-seconds", 0, *more, "--out"]
    together(tmp_path, [{"flags": [*flags, tmp_path / "whole"]}])
    lines = lambda: len(read_log(out / "log.jsonl"))
    for kill in range(10):
        before = lines()
        p = start(tmp_path, [{"flags": [*flags, out, "--resume"]}])
        kill_one(p, tmp_path, rng, lambda: lines() > before and time.sleep(0.1 * rng.random()) is None)
        err = p.communicate(timeout=600)[1]
        assert p.returncode and err.count("error: another process of this run is gone") == err.count("error: ") == 1, err
    together(tmp_path, [{"flags": [*flags, out, "--resume"]}])
    assert steps(out) == steps(tmp_path / "whole") and equal(state(out), state(tmp_path / "whole"))


# --- bad input ---

def refused(*flags, match):
    with pytest.raises(UserError, match=match):
        train.main(list(map(str, flags)))


def test_what_cannot_be(data, tmp_path, monkeypatch):
    flags = ["--data", data, "--out", tmp_path / "x", *TINY]
    refused(*flags, "--fsdp", match="--fsdp .* torchrun --nproc_per_node N")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(*flags, "--batch-size", 6, match="--batch-size 6 does not divide by the 4 processes: start 1, 2, 3, 6 of "
            "them, or give a multiple of 4")
