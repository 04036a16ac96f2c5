"""The figures of distill.py, as its README section quotes them: is a teacher worth its cost?

    python tests/bench_distill.py                                           # stdlib; about 20 minutes on two cores
    python tests/bench_distill.py stdlib faq.jsonl                          # a second corpus of your own: as long again
    python tests/bench_distill.py --minutes 5 --teacher-minutes 20 --seeds 5    # longer
    python tests/bench_distill.py stdlib --teacher DIR --steps 400          # a teacher you have, a number of steps

For each corpus: a teacher; what twice its time would give; for each seed a student with cached labels and the control
of the same time; then, at equal steps on equal text, the online teacher and its sampled cache; at last early exits.
Runs are kept in --work, and those that are there are not run again.
"""
import argparse, functools, itertools, json, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample
from data.loader import Windows
from data.machine import accelerate
from data.prepare import find, prepare
from data.runs import read_state
from model import load


def command(script, out, *flags):
    """Runs a script whose result is OUT, unless it is there and whole."""
    done = out / ".done"
    if done.exists():
        return out
    line = [sys.executable, str(ROOT / script), *map(str, flags), "--out", str(out), "--overwrite"]
    print("$ python " + " ".join(a.replace(str(ROOT) + "/", "") for a in line[1:]), flush=True)
    subprocess.run(line, check=True, cwd=ROOT)
    done.touch()
    return out


def bits(run):
    return load(run).history[-1]["val_bits_per_byte"]


def spread(values, form="{:.4f}"):
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))} ... {form.format(max(values))})"


def proof(name, data, teacher, args, work):
    """A student and its control for each seed."""
    length = ("--steps", args.steps) if args.steps else ("--minutes", args.minutes)
    runs = [command("distill.py", work / f"student-{seed}", teacher, "--data", data, "--cache", "--control", "--seed",
                    seed, *length, *args.flags) for seed in range(args.seeds)]
    reports = [json.loads((run / "report.json").read_text(encoding="utf-8"))["models"] for run in runs]
    of = lambda model, key: [r[model][key] for r in reports]
    won = [c - s for s, c in zip(of("student", "bits_per_byte"), of("control", "bits_per_byte"))]
    step = [load(run).history[-1]["step_ms"] for run in runs]                     # measured in turns: student, control
    headers = [json.loads((run / "cache" / "header.json").read_text(encoding="utf-8")) for run in runs]
    first = reports[0]
    print(f"\n### {name}: {args.seeds} seeds, mean (least ... most)\n\n"
          "| | teacher | student | control |\n|---|---|---|---|")
    for label, key, form in (("parameters", "parameters", "{:,.0f}"), ("bits per byte", "bits_per_byte", "{:.4f}"),
                             ("quality kept", "quality_kept", "{:.1%}"), ("same top token", "agreement", "{:.1%}"),
                             ("decode, x teacher's", "decode_x", "{:.2f}"),
                             ("prefill, x teacher's", "prefill_x", "{:.2f}")):
        print(f"| {label} | {form.format(first['teacher'][key])} | {spread(of('student', key), form)} | "
              f"{spread(of('control', key), form)} |")
    steps = [[load(r).history[-1]["steps"] for r in (run, run / "control")] for run in runs]
    print("| steps | | " + " | ".join(spread(counts, "{:.0f}") for counts in zip(*steps)) + " |")
    print("| seconds | | " + " | ".join(spread(of(model, "seconds"), "{:.0f}") for model in ("student", "control")) + " |")
    share = first["student"]["parameters"] / first["teacher"]["parameters"]
    print(f"\nparameters, share of the teacher's: {share:.1%}")
    print(f"control minus student, bits per byte: {spread(won)}: the teacher was " +
          ("worth its cost for every seed" if min(won) > 0 else "not worth its cost" if max(won) <= 0 else
           "worth its cost for some seeds"))
    if all("gap_closed" in r["student"] for r in reports):
        print(f"gap closed: {spread(of('student', 'gap_closed'), '{:.0%}')}")
    print(f"cache: {spread([h['bytes_per_token'] for h in headers], '{:.1f}')} bytes a token, {headers[0]['draws']} "
          f"draws; made in {spread([h['seconds'] for h in headers], '{:.0f}')} s")
    print(f"training speed with it, x plain: {spread([control / student for student, control in step], '{:.2f}')}\n",
          flush=True)


def fidelity(name, data, teacher, args, work):
    """Online and sampled at equal steps on equal text, without cross-entropy's help."""
    common = (teacher, "--data", data, "--steps", args.fidelity_steps, "--pool", args.fidelity_steps * 1024 // 3,
              "--hard-weight", 0, "--evals", 1, *args.flags)
    runs = {"online teacher": command("distill.py", work / "online", *common),
            "sampled cache": command("distill.py", work / "sampled", *common, "--cache")}
    print(f"\n### {name}: {args.fidelity_steps} steps on the same text, weight of cross-entropy 0\n")
    print("| labels | bytes a token | validation loss, nats a token | to online |\n|---|---|---|---|")
    losses = {label: load(run).history[-1]["val_loss"] for label, run in runs.items()}
    for label, run in runs.items():
        header = run / "cache" / "header.json"
        size = json.loads(header.read_text(encoding="utf-8"))["bytes_per_token"] if header.exists() else ""
        more = losses[label] - losses["online teacher"]
        print(f"| {label} | {size} | {losses[label]:.4f} | {more:+.4f} |", flush=True)


def exits(name, data, teacher, args, work):
    """The first layer as a draft, before and after it was taught: guesses taken, and speed beside plain generation."""
    run = command("distill.py", work / "exits", teacher, "--data", data, "--exits", 1, "--steps", args.fidelity_steps,
                  "--evals", 1, *args.flags)
    val = Windows(data, "val", 64)
    prompts = [b.ids for b in itertools.islice(val.evaluation_batches(1, 64 * 6), 6)]
    print(f"\n### {name}: layer 1 guesses 4 tokens, all layers check, temperature 0\n")
    print("| | guesses taken | decode, x plain | tokens as plain | bits per byte of the model |\n|---|---|---|---|---|")
    for label, model, its in (("before", accelerate(load(teacher)), teacher),
                              ("after --exits 1", accelerate(load(run)), run)):
        length, ratios, equal = sample.DraftLength(), [], 0
        for ids in prompts:
            times, texts = [], []
            draft = sample.first_layers(model, 1)
            for write in (sample.generate, functools.partial(sample.speculate, draft=draft, length=length)):
                start = time.perf_counter()
                texts.append([int(i) for i in write(model, ids=ids, max_new_tokens=96, temperature=0)])
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
            equal += texts[0] == texts[1]
        print(f"| {label} | {length.accepted / max(1, length.guessed):.0%} | {statistics.median(ratios):.2f} | "
              f"{equal} of {len(prompts)} texts | {bits(its):.4f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*", default=["stdlib"], help="prepared data, stdlib, or a text or .jsonl")
    parser.add_argument("--work", default="bench-distill", help="where the runs are kept")
    parser.add_argument("--minutes", type=float, default=1.0, help="of a student; its control has as long")
    parser.add_argument("--teacher-minutes", type=float, default=3.0)
    parser.add_argument("--teacher", nargs="*", default=[], help="teachers that are there, one for each corpus")
    parser.add_argument("--steps", type=int, default=0, help="of a student, instead of --minutes")
    parser.add_argument("--fidelity-steps", type=int, default=200)
    parser.add_argument("--no-twice", action="store_true", help="do not train the teacher for twice as long beside it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags for distill.py, in one string")
    args = parser.parse_args()
    args.flags = args.flags.split()
    for i, corpus in enumerate(args.corpora):
        work = Path(args.work).resolve() / Path(corpus).stem
        if Path(corpus).is_file():
            there = (work / "data" / "meta.json").exists()
            data = work / "data" if there else prepare(inputs=[corpus], out=work / "data")
        else:
            data = find(corpus) or prepare(corpus)
        flags = ("--data", data, "--layers", 6)
        teacher = Path(args.teacher[i]).resolve() if i < len(args.teacher) else \
            command("train.py", work / "teacher", *flags, "--minutes", args.teacher_minutes)
        proof(corpus, data, teacher, args, work)
        fidelity(corpus, data, teacher, args, work)
        exits(corpus, data, teacher, args, work)
        if args.no_twice:
            continue
        state = read_state(teacher)
        twice = command("train.py", work / "teacher-twice", *flags, "--steps", 2 * state["total"])
        print(f"\n{corpus}: the teacher, {state['seconds']:.0f} s, has {bits(teacher):.4f} bits per byte; after twice "
              f"its steps it would have {bits(twice):.4f}", flush=True)


if __name__ == "__main__":
    main()
