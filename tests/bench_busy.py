"""Training and generation beside a program that keeps one core busy, as ratios to one free core.

    python tests/bench_busy.py                        # about three minutes a round; --rounds 3 for medians of three

Each row is the quick start's model in a process of its own, as a user starts it: on an idle machine, with one thread on
an idle machine (what one free core can do), and while `while True: pass` runs, begun before or in the middle. Rates are
tokens over seconds of the last half of the steps, or of the tokens.
"""
import argparse, contextlib, json, os, platform, re, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@contextlib.contextmanager
def busy():
    """Another program, on one core of those that the system gives it."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def training(folder, steps, *flags, when=None):
    """(tokens/s, threads at the end) of train.py; the busy program is there "before", or from a third of the steps on."""
    out, stack = folder / "out", contextlib.ExitStack()
    shutil.rmtree(out, ignore_errors=True)
    with stack:
        if when == "before":
            stack.enter_context(busy())
        run = subprocess.Popen([sys.executable, ROOT / "train.py", "--steps", str(steps), "--evals", "1", "--eval-tokens",
                                "2048", "--out", out, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while run.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                if when == "middle" and (out / "log.jsonl").read_bytes().count(b"\n") > steps // 3:
                    stack.enter_context(busy())
                    when = "begun"
        assert run.returncode == 0 and when != "middle"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line][steps // 2:]
    tokens = lines[-1]["tokens"] - lines[0]["tokens"]
    return tokens / (lines[-1]["seconds"] - lines[0]["seconds"]), lines[-1]["threads"]


def generation(folder, *flags, when=None):
    """(tokens/s, threads at the end) of sample.py on the model that `training` left."""
    with busy() if when else contextlib.nullcontext():
        done = subprocess.run([sys.executable, ROOT / "sample.py", folder / "out", "--prompt", "import os", "--seed", "1",
                               "--max-new-tokens", "1000", *flags], capture_output=True, text=True, encoding="utf-8", check=True)
    rate, threads = re.search(r"then (\d+) tokens/s with (\d+) thread", done.stderr).groups()
    return float(rate), int(threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=180, help="of training")
    args = parser.parse_args()
    rows = {"training, one thread, idle": lambda f: training(f, args.steps, "--threads", "1"),
            "training, idle": lambda f: training(f, args.steps),
            "training, busy before": lambda f: training(f, args.steps, when="before"),
            "training, busy from the middle": lambda f: training(f, args.steps, when="middle"),
            "training, all threads, busy before": lambda f: training(f, args.steps // 2, "--threads", str(os.cpu_count()), when="before"),
            "generation, one thread, idle": lambda f: generation(f, "--threads", "1"),
            "generation, idle": lambda f: generation(f),
            "generation, busy before": lambda f: generation(f, when="before"),
            "generation, all threads, busy before": lambda f: generation(f, "--threads", str(os.cpu_count()), when="before")}
    rates, threads, cpu = {name: [] for name in rows}, {}, None
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, measure in rows.items():
                rate, threads[name] = measure(Path(folder))
                rates[name].append(rate)
                print(f"{name}: {rate:,.0f} tokens/s, {threads[name]} thread(s)", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    print(f"{os.cpu_count()} core(s), {cpu[1] if cpu else platform.machine()}, medians of {args.rounds} round(s)\n\n"
          "| | tokens/s | to one thread on an idle machine | threads at the end |\n|---|---:|---:|---:|")
    for name in rows:
        free = statistics.median(rates[name.split(",")[0] + ", one thread, idle"])
        rate = statistics.median(rates[name])
        print(f"| {name} | {rate:,.0f} | {rate / free:.2f} x | {threads[name]} |")


if __name__ == "__main__":
    main()
