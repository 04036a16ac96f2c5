"""Breaks things on purpose: kills at file operations, full disks, damaged files. By hand, for minutes:

    python tests/breaking.py kills 200          # each killed command is run again, and ends with the bytes of a whole run
    python tests/breaking.py mutations 2000     # a damaged file is one sentence: no traceback, signal, 20 s or 2 GB
    python tests/breaking.py disks 20           # a disk that is full at 20 places of each command (needs root, Linux)

tests/test_lost.py runs a few of them. Commands run in forks of a process that has imported PyTorch, which saves seconds.
"""
import contextlib, hashlib, json, os, random, resource, runpy, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
TINY = ("--layers 1 --width 32 --heads 1 --context 32 --batch-size 1 --steps 4 --evals 2 --eval-tokens 64 --device cpu --dtype float32 "
        "--threads 1").split()


def command(argv, said, kill_at=0, count=None, seconds=60, memory=2 << 30):
    """The exit status (negative: a signal) of a script, run in a fork; its output goes to the file `said`.

    kill_at  SIGKILL just before its n-th operation that changes a file or a folder
    count    a file to which the number of these operations is written
    """
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number, fd in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
                os.dup2(number, fd)
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
            operations = [0]

            def hook(event, arguments):
                writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if writes or event in CHANGES:
                    operations[0] += 1
                    if operations[0] == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            sys.argv, sys.path[0], sys.stdin = list(map(str, argv)), str((ROOT / argv[0]).parent), open(0, encoding="utf-8")
            sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", errors="replace") for fd in (1, 2))
            code = 0
            try:
                runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            if count:
                Path(count).write_text(str(operations[0]), encoding="utf-8")
            os._exit(code)
        os._exit(99)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def note(wrong, what):
    print(*what, flush=True)
    wrong.append(what)


def make(folder):
    """Text, examples, prepared data and a model with its tokenizer, all tiny, in a folder."""
    import torch
    from data.prepare import prepare
    from data.tokenizer import Tokenizer
    from model import Config, Transformer, save
    r, words = random.Random(0), "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
    line = lambda: " ".join(r.choices(words, k=9))
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i:02}.txt").write_text("\n".join(line() for _ in range(30)) + "\n", encoding="utf-8")
    (folder / "faq.jsonl").write_text("".join(json.dumps({"prompt": f"what is {i}?", "response": line()}) + "\n" for i in range(40)),
                                      encoding="utf-8")
    with contextlib.redirect_stdout(None):
        prepare(inputs=[folder / "text"], name="text", out=folder / "data", tokenizer="bytes")
        prepare(inputs=[folder / "faq.jsonl"], name="faq", out=folder / "examples", tokenizer="bytes")
    tokenizer = Tokenizer.load(folder / "data")
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=64))
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    meta = json.loads((folder / "data" / "meta.json").read_text(encoding="utf-8"))
    model.history = [{"step": "train", "data": str(folder / "data"), "data_sha256": meta["sha256"], "seed": 0}]
    save(model, folder / "model", tokenizer)


def commands(folder, out):
    """{name: a command that writes `out`, and how it goes on}."""
    f = folder
    return {
        "prepare": (["data/prepare.py", "--input", f / "text", "--vocab-size", "300", "--out", out], []),
        "prepare --tokenizer": (["data/prepare.py", "--input", f / "faq.jsonl", "--tokenizer", f / "model", "--out", out], []),
        "train": (["train.py", "--data", f / "data", "--out", out, *TINY, "--save-seconds", "0"], ["--resume"]),
        "distill": (["distill.py", f / "model", "--data", f / "data", "--out", out, "--student-layers", "1", *TINY[6:]], ["--resume"]),
        "compress": (["compress.py", f / "model", "int8", "--out", out], []),
        "chain": (["compress.py", f / "model", "ffn:0.5:magnitude", "int8", "--out", out], ["--resume"])}


def contents(out):
    """{name: hash} of the files in which a run and its repetition must agree."""
    skip = {"log.jsonl", "log.jsonl.new", "loss.png", "report.md", "report.json", "report.png", "training_state.pt", "README.md", "config.json"}
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*"))
            if p.is_file() and p.name not in skip}


def litter(folder, before):
    return sorted(p.name for p in folder.iterdir() if p.name not in before)


def kills(folder, n, seed=0):
    """Kills each command at random operations and runs it again: a list of (what went wrong)."""
    r, wrong, whole, most = random.Random(seed), [], {}, {}
    make(folder)
    said, count = folder / "said.txt", folder / "count.txt"
    for name, (argv, _) in commands(folder, folder / "out").items():
        assert command(argv, said, count=count) == 0, (name, said.read_text(encoding="utf-8")[-2000:])
        whole[name], most[name] = contents(folder / "out"), int(count.read_text(encoding="utf-8"))
        shutil.rmtree(folder / "out")
    before = {p.name for p in folder.iterdir()} | {"out"}
    for i in range(n):
        name = list(whole)[i % len(whole)]
        argv, more = commands(folder, folder / "out")[name]
        at = r.randint(1, most[name])
        first = command(argv, said, kill_at=at)
        again = command([*argv, *more], said)
        text = said.read_text(encoding="utf-8")
        finished = "is there already" in text or "holds a model already" in text                   # killed after all was done
        if not (again == 0 or finished) or contents(folder / "out") != whole[name] or litter(folder, before):
            note(wrong, (name, at, first, again, text.strip().splitlines()[-1:], litter(folder, before)))
        for p in litter(folder, before):
            shutil.rmtree(folder / p) if (folder / p).is_dir() else (folder / p).unlink()
        shutil.rmtree(folder / "out", ignore_errors=True)
    return wrong


# --- damaged files ---

VALUES = (None, True, -1, 0, 1, 2, 10 ** 8, 2 ** 36, 10 ** 30, -2.5, 0.5, 1e300, "", "x", "\udce9", [], {}, [1], ["x"], {"a": 1}, [[]],
          float("nan"), float("inf"))


def damage(file, r):
    """Damages a file in a random way; says how."""
    data = file.read_bytes()
    if file.suffix == ".json" and r.random() < 0.8:
        content = json.loads(data)
        node, path = content, []
        while isinstance(node, (dict, list)) and node and (not path or r.random() < 0.6):
            key = r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node))
            path.append(key)
            parent, node = node, node[key]
        if path:
            value = r.choice(VALUES)
            if r.random() < 0.2:
                del parent[path[-1]]
                value = "nothing"
            else:
                parent[path[-1]] = value
            file.write_text(json.dumps(content), encoding="utf-8")
            return f"{file.name} {'.'.join(map(str, path))[:60]} = {value!r}"
    way = r.choice(("cut", "flip", "longer", "empty", "gone", "head"))
    if way == "gone":
        file.unlink()
    else:
        at = r.randrange(max(1, len(data)))
        flipped = bytearray(data)
        for _ in range(8):
            if flipped:
                flipped[r.randrange(len(flipped) if way == "flip" else min(400, len(flipped)))] = r.randrange(256)
        file.write_bytes({"cut": data[:at], "longer": data + b"\0" * 100, "empty": b""}.get(way, bytes(flipped)))
    return f"{file.name}: {way}"


def readers(f, out):
    """{folder that is damaged: commands that read it}."""
    return {
        "model": (["sample.py", f / "model", "--prompt", "a", "--max-new-tokens", "5"],
                  ["compress.py", f / "model", "int8", "--out", out],
                  ["compress.py", "--measure", f / "model", "--data", f / "data", "--smoke", "--rounds", "1"],
                  ["sample.py", f / "model", "--eval", f / "examples", "--smoke", "--answers", "1"]),
        "data": (["train.py", "--data", f / "data", "--out", out, *TINY],),
        "examples": (["train.py", "--data", f / "examples", "--out", out, *TINY],
                     ["sample.py", f / "model", "--eval", f / "examples", "--smoke", "--answers", "1"]),
        "run": (["train.py", "--out", f / "run", "--resume", "--steps", "5"], ["sample.py", f / "run", "--prompt", "a", "--smoke"]),
        "student": (["distill.py", f / "model", "--data", f / "data", "--cache", "--cache-dir", f / "student" / "cache", "--out", out,
                     "--student-layers", "1", *TINY[6:]],)}


def mutations(folder, n, seed=0):
    """Damages a file of what commands read and runs one of them: a list of (how, what went wrong)."""
    r, wrong, said = random.Random(seed), [], folder / "said.txt"
    make(folder)
    assert command(["train.py", "--data", folder / "data", "--out", folder / "run", *TINY], said) == 0
    assert command(["distill.py", folder / "model", "--data", folder / "data", "--cache", "--out", folder / "student", "--student-layers", "1",
                    *TINY[6:]], said) == 0, said.read_text(encoding="utf-8")
    kinds = list(readers(folder, folder / "out"))
    for _ in range(n):
        kind = r.choice(kinds)
        shutil.copytree(folder / kind, folder / "kept")
        how = damage(r.choice([p for p in sorted((folder / kind).rglob("*")) if p.is_file() and p.suffix not in (".png", ".md")]), r)
        argv = r.choice(readers(folder, folder / "out")[kind])
        code, text = command(argv, said, seconds=20), said.read_text(encoding="utf-8", errors="replace")
        if code not in (0, 2) or "Traceback" in text or "panicked" in text:
            note(wrong, (how, " ".join(map(str, argv[:2])), code, text.strip().splitlines()[-1:]))
        shutil.rmtree(folder / kind)
        (folder / "kept").rename(folder / kind)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return wrong


# --- full disks ---

def disks(folder, n):
    """Runs each command on a disk that is full at n places: the old result stays, and the message is one sentence."""
    wrong, said, disk = [], folder / "said.txt", folder / "disk"
    make(folder)
    disk.mkdir()
    for name, (argv, more) in commands(folder, disk / "out").items():
        again = [*argv, "--overwrite"]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=True)
        try:
            assert command(argv, said) == 0, said.read_text(encoding="utf-8")
            before = contents(disk / "out")
            used = shutil.disk_usage(disk).used
            for i in range(n):
                filler = disk / "filler"
                filler.write_bytes(b"\0" * max(0, shutil.disk_usage(disk).free - (used * (i + 1) * 2 // n)))
                code, text = command(again, said), said.read_text(encoding="utf-8")
                filler.unlink()
                left = contents(disk / "out")
                if code not in (0, 2) or "Traceback" in text or left != before:
                    note(wrong, (name, i, code, text.strip().splitlines()[-1:], sorted(left.items() ^ before.items())[:2]))
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    return wrong


if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    what, n = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        found = {"kills": kills, "mutations": mutations, "disks": disks}[what](Path(place), n, *map(int, sys.argv[3:]))
    print(f"{what}: {n} tried" + " at each command" * (what == "disks") + f", {len(found)} wrong")
