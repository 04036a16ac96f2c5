"""The figures of compress.py, as the README quotes them: what each way of rounding costs, and which order is best.

    python tests/bench_compress.py out                      # a model trained here, scored on its validation split
    python tests/bench_compress.py DIR --chains int8 int4:32:gptq --text test.txt --calibration valid.txt
    python tests/bench_compress.py --kernels                # products alone, by shape: quantized against float32
    python tests/bench_compress.py out --orders             # a cut, low rank, recovery and rounding in all legal orders
    python tests/bench_compress.py out --fit 1.27MB 634kB 423kB --minutes 1     # --fit beside chains made by hand

Each chain of steps is compress.py's own command in a process of its own, whose time and peak memory are printed; then
one `compress.py --measure` compares all results with the model they came from. Results are kept in --work, and a chain
that is there is not run again.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import compress
from data import fit, native
from data.chain import needs_text, parse_chain
from data.checkpoints import find_model
from model import Int4Linear, Int8Linear, load

CHAINS = ("int8", "int4:32:rtn", "int4:32:gptq", "int4:32:qat")
SHAPES = {"2.6M: q, o": (160, 160), "2.6M: gate, up": (480, 160), "2.6M: head": (4096, 160),
          "135M: q, o": (576, 576), "135M: k, v": (192, 576), "135M: gate, up": (1536, 576),
          "135M: down": (576, 1536), "135M: head": (49152, 576)}


def bench_kernels(rounds=7):
    """Prints, for each shape (out, in), one token and 256: float32's time, how much faster quantized products are."""
    print(f"{torch.get_num_threads()} thread(s); quantized layers: {'C' if native.library()[0] else native.library()[1]}\n\n"
          "| layer | tokens | float32, us | int8 | int4 |\n|---|---:|---:|---:|---:|")
    for name, (n_out, n_in) in SHAPES.items():
        for tokens in (1, 256):
            # For one token, as many copies as do not fit the cache: in a model each layer comes once a token.
            copies = range(max(1, 48_000_000 // (4 * n_out * n_in)) if tokens == 1 else 1)
            dense = [nn.Linear(n_in, n_out, bias=False) for _ in copies]
            kinds = [dense, *([native.attach_layer(kind.from_dense(d)) for d in dense] for kind in (Int8Linear, Int4Linear))]
            x, seconds = torch.randn(1, tokens, n_in), [[] for _ in kinds]
            with torch.inference_mode():
                for _ in range(rounds + 1):                                  # the first warms up
                    for layers, times in zip(kinds, seconds):
                        count, start = 0, time.perf_counter()
                        while time.perf_counter() - start < 0.05:
                            for layer in layers:
                                layer(x)
                            count += len(layers)
                        times.append((time.perf_counter() - start) / count)
            us = 1e6 * statistics.median(seconds[0][1:])
            ratios = [statistics.median(f / q for f, q in zip(seconds[0][1:], times[1:])) for times in seconds[1:]]
            print(f"| {name} ({n_out} x {n_in}) | {tokens} | {us:,.0f} | " + " | ".join(f"{r:.2f} x" for r in ratios) +
                  " |", flush=True)


# Cut, low rank, int8 and 96 steps of recovery (of 4 windows; qat has 8 in a step). They end in files of one size. What
# teaches is the model that enters, so before all else only the text can.
ORDERS = ("width:0.75 lowrank:0.8 int8", "width:0.75 lowrank:0.8 recover:96 int8", "width:0.75 recover:96 lowrank:0.8 int8",
          "recover:96:text width:0.75 lowrank:0.8 int8", "width:0.75 recover:48 lowrank:0.8 recover:48 int8",
          "width:0.75 lowrank:0.8 int8:qat", "width:0.75 lowrank:0.8 recover:48 int4:gptq",
          "width:0.75 recover:48 lowrank:0.8 int4:gptq", "width:0.75 lowrank:0.8 int4:qat")


def bench_orders(args, work):
    """Prints what each of ORDERS makes of the model: a sweep for each seed."""
    bits, files = {}, {}
    for seed in range(args.seeds):
        out = work / f"orders-{seed}"
        flags = ["--seed", seed, "--qat-steps", 48, "--eval-tokens", args.eval_tokens, "--rounds", 1, "--resume",
                 *(["--smoke"] if args.smoke else []), *(["--calibration", args.calibration] if args.calibration else [])]
        command = [sys.executable, str(ROOT / "compress.py"), str(args.model), "--sweep", *ORDERS, "--out", str(out)]
        subprocess.run([*command, *map(str, flags)], check=True)
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            bits.setdefault(row["name"], []).append(row["bits_per_byte"])
            files[row["name"]] = row["file_bytes"]
    base = rows[0]["name"]
    print(f"\n{args.seeds} seeds, mean (least ... most)\n\n| order | file | bits per byte | to dense |\n|---|---:|---:|---:|")
    names = {chain: chain.replace(":", "-").replace(" ", "+") for chain in ORDERS}
    for chain, name in names.items():
        values, dense = bits[name], bits[base][0]
        mean = statistics.fmean(values)
        print(f"| {chain} | {files[base] / files[name]:.2f} x smaller | {mean:.4f} ({min(values):.4f} ... {max(values):.4f}) | "
              f"{mean / dense - 1:+.2%} |")


# By hand, at a limit: the KEEP at which the file fits, as much training, and one way of rounding for all.
BY_HAND = (("width:{keep:.2f} recover:{steps} int4:gptq", 4.5), ("depth:{keep:.2f} recover:{steps} int4:gptq", 4.5),
           ("vocab:{keep:.2f} recover:{steps} int4:gptq", 4.5), ("width:{keep:.2f} recover:{steps} int8", 8.2))
UNIFORM = ("recover:{steps} int4:gptq", "recover:{steps} int8")


def bench_fit(args, work):
    """Prints, for each limit on the file, what --fit chose and foresaw, and chains by hand that end in such a file."""
    text = ["--text", args.text] if args.text else []
    common = [*text, "--eval-tokens", args.eval_tokens, "--rounds", "1", *(["--calibration", args.calibration] if args.calibration else [])]
    lines = []
    for limit in args.fit:
        out, start = work / f"fit-{limit}", time.perf_counter()
        if not (work / f"fit-{limit}.fit" / "report.md").exists():
            subprocess.run([sys.executable, str(ROOT / "compress.py"), str(args.model), "--fit", limit, "--minutes", str(args.minutes),
                            "--out", str(out), "--overwrite", *common], check=True)
        report = (work / f"fit-{limit}.fit" / "report.md").read_text(encoding="utf-8")
        lines += [f"{limit}, {time.perf_counter() - start:,.0f} s:", *(l for l in report.splitlines() if "chosen" in l)]
        most, chain = fit.Limits.parse(limit).bytes, next(l for l in report.splitlines() if "python compress.py" in l)
        steps = next((word.split(":")[1] for word in chain.split() if word.startswith("recover:")), None)
        model = load(find_model(args.model))
        shares = [(form, most * 8 / bits / model.parameters_count() - 0.015) for form, bits in BY_HAND]
        chains = [form.format(keep=keep, steps=steps) for form, keep in shares if 0.1 < keep < 1] + [u.format(steps=steps) for u in UNIFORM]
        chains = [c if steps else " ".join(w for w in c.split() if not w.startswith("recover")) for c in chains]
        subprocess.run([sys.executable, str(ROOT / "compress.py"), str(args.model), "--sweep", *chains, "--out", str(work / f"hand-{limit}"),
                        *common, "--resume"], check=True)
        rows = [json.loads(line) for line in (work / f"hand-{limit}" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        lines += [f"| by hand: {row['name']} | {row['file_bytes'] / 1e6:.3f} | {row['bits_per_byte']:.4f} | "
                  f"{row['bits_per_byte'] / rows[0]['bits_per_byte'] - 1:+.2%} | {'' if row['file_bytes'] <= most else 'too large'} |"
                  for row in rows]
    print("\n" + "\n".join(lines))


def run_chain(model, chain, out, calibration):
    """compress.py in a process of its own; (seconds, peak bytes), kept beside the result."""
    note = out.with_name(out.name + ".json")
    if not (note.exists() and (out / "config.json").exists()):
        flags = ["--calibration", calibration] if calibration and needs_text(parse_chain(chain.split(), compress.STEPS)) else []
        command = [sys.executable, str(ROOT / "compress.py"), str(model), *chain.split(), "--out", str(out),
                   "--overwrite", *flags]
        print("$ python compress.py " + " ".join(command[2:]), flush=True)
        start, child = time.perf_counter(), subprocess.Popen(command)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"{chain} failed")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        note.write_text(json.dumps([time.perf_counter() - start, peak]), encoding="utf-8")
    return json.loads(note.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory, or a training run's")
    parser.add_argument("--chains", nargs="+", default=CHAINS, help=f"default: {' '.join(CHAINS)}")
    parser.add_argument("--text", help="score this file instead of the validation split")
    parser.add_argument("--eval-tokens", default="0", help="so many of them (default: all)")
    parser.add_argument("--orders", action="store_true", help="only the orders of a cut, low rank, recovery and rounding")
    parser.add_argument("--seeds", type=int, default=3, help="of --orders")
    parser.add_argument("--smoke", action="store_true", help="of --orders: does it run?")
    parser.add_argument("--calibration", help="for steps that look at text (default: what the model was trained on)")
    parser.add_argument("--work", type=Path, help="default: out-bench beside the model")
    parser.add_argument("--fit", nargs="+", metavar="LIMIT", help="only compress.py --fit, beside chains by hand")
    parser.add_argument("--minutes", type=float, default=1.0, help="of training, of --fit")
    parser.add_argument("--kernels", action="store_true", help="only the products, by shape")
    args = parser.parse_args()
    if args.kernels:
        return bench_kernels()
    if not args.model:
        parser.error("give a model directory, or --kernels")
    work = args.work or Path(args.model).resolve().parent / "out-bench"
    work.mkdir(parents=True, exist_ok=True)
    if args.orders:
        return bench_orders(args, work)
    if args.fit:
        return bench_fit(args, work)
    outs = {chain: work / chain.replace(":", "-").replace(" ", "+") for chain in args.chains}
    costs = {chain: run_chain(args.model, chain, out, args.calibration) for chain, out in outs.items()}
    text = ["--text", args.text] if args.text else []
    subprocess.run([sys.executable, str(ROOT / "compress.py"), "--measure", args.model, *map(str, outs.values()), *text,
                    "--eval-tokens", args.eval_tokens, "--out", str(work / "report"), "--overwrite"], check=True)
    rows = [json.loads(line) for line in (work / "report" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    base = rows[0]
    print("\n| chain | seconds | peak, MB | file | bits per byte | perplexity |\n|---|---:|---:|---:|---:|---:|")
    for row, (chain, (seconds, peak)) in zip(rows[1:], costs.items()):
        print(f"| {chain} | {seconds:,.0f} | {peak / 1e6:,.0f} | {row['file_bytes'] / base['file_bytes']:.4f} x | "
              f"{row['bits_per_byte'] - base['bits_per_byte']:+.5f} "
              f"({row['bits_per_byte'] / base['bits_per_byte'] - 1:+.3%}) | "
              f"{row['perplexity'] / base['perplexity'] - 1:+.3%} |")


if __name__ == "__main__":
    main()
