"""Draws tests/figures/*.png from the tables of tests/FIGURES.md and tests/SPECIALIST.md, and from runs.

    python tests/bench_figures.py all                       # all pictures of tables
    python tests/bench_figures.py race                      # one: road, race, decode, distill, sweep, fit, specialist
    python tests/bench_figures.py loss out                  # a training run, as OUT/loss.png
    python tests/bench_figures.py readings OLD=DIR NEW=DIR  # held-out loss against readings of the text, a curve a run

A picture reads the table that stands on the page, so the two cannot differ. --out FOLDER (default: tests/figures).
"""
import argparse, re, shutil, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import UserError
from data.console import run
from data.report import BLUE, GREY, ORANGE, new_figure, picture, save_figure, tradeoff
from data.log import read_log

TESTS = ROOT / "tests"


def table(page, heading):
    """Rows {column: cell} of the first table below a heading. Raises UserError if there is none."""
    lines = iter((TESTS / page).read_text(encoding="utf-8").splitlines())
    if not any(line.lstrip("# ") == heading for line in lines):
        raise UserError(f"{page} has no heading {heading!r}")
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        elif rows or line.startswith("#"):
            break
    if len(rows) < 3:
        raise UserError(f"{page} has no table below {heading!r}")
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def numbers(cell):
    """The numbers in a cell, as floats; [] if it has none."""
    return [float(n.replace(",", "")) for n in re.findall(r"[+-]?\d[\d,]*\.?\d*", cell)]


def labelled(figure, ax, **labels):
    ax.set(**labels)
    ax.grid(axis="y", alpha=0.3)
    return figure


def road():
    """Boxes and arrows: each command, what it makes, and one number that it earned."""
    steps = table("FIGURES.md", "The road")
    figure, ax = new_figure("road.png", size=(10, 3.6))
    ax.axis("off")
    ax.set(xlim=(-0.5, 7.1), ylim=(-0.4, 1.35))
    places = [(0, 1), (3.1, 1), (6.3, 1), (6.3, 0), (3.1, 0), (0, 0)]          # forth above, back below
    for (x, y), name in zip(places, ["text", *(step["makes"] for step in steps)]):
        ax.text(x, y, name, ha="center", va="center", fontsize=16, weight="bold",
                bbox=dict(boxstyle="round,pad=0.5", facecolor="0.93", edgecolor="0.3"))
    for step, (x, y), (to_x, to_y) in zip(steps, places, places[1:]):
        ends, at, ways = ((x + 0.6, y), (to_x - 0.65, y)), ((x + to_x) / 2, y), ("center", "center", "bottom", "top")
        if to_x < x:
            ends = (x - 0.75, y), (to_x + 0.75, y)
        elif to_x == x:
            ends, at, ways = ((x, y - 0.22), (x, to_y + 0.22)), (x - 0.15, 0.5), ("right", "right", "bottom", "top")
        ax.annotate("", ends[1], ends[0], arrowprops=dict(arrowstyle="-|>", linewidth=2.5, color=BLUE))
        what = step["one number"].replace("; ", ", " if to_x == x else "\n")
        ax.text(at[0], at[1] + 0.06, step["command"], ha=ways[0], va=ways[2], family="monospace", fontsize=14)
        ax.text(at[0], at[1] - 0.06, what, ha=ways[1], va=ways[3], fontsize=13, color="0.2")
    return figure


def race():
    """Loss at the end of whole runs against their seconds, a line a seed and side."""
    figure, ax = new_figure("race.png")
    for i, row in enumerate(table("FIGURES.md", "The race")):
        value = {name: numbers(cell)[0] for name, cell in row.items()}
        long, short = value["nanoGPT, s"], value["ours to that, s"]
        ax.plot([short, long], [value["its loss in our time"], value["loss"]], "s--", color=GREY,
                label=None if i else "nanoGPT")
        ax.plot([short, long], [value["loss"], value["our loss in its time"]], "o-", color=BLUE,
                label=None if i else "train.py")
    ax.annotate("", (1.12 * short, value["loss"]), (0.9 * long, value["loss"]),
                arrowprops=dict(arrowstyle="->", color="0.6", linestyle=":", linewidth=1.5))
    ax.text((short * long) ** 0.5, value["loss"] + 0.02, f"the same loss, {value['x faster']:.0f} x sooner", ha="center")
    ax.set_xscale("log")
    ax.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
    ax.minorticks_off()
    ax.legend()
    return labelled(figure, ax, xlabel="time of training (s)", ylabel="held-out loss (nats a character)")


def bars(figure, ax, groups, series, unit, digits=".2f"):
    """Bars {name: value of each group, or None}; the value stands on the bar."""
    width = 0.8 / len(series)
    for i, ((name, values), (color, hatch)) in enumerate(zip(series.items(), ((BLUE, ""), (ORANGE, "//"), (GREY, "..")))):
        at = [(x + (i - (len(series) - 1) / 2) * width, v) for x, v in enumerate(values) if v is not None]
        drawn = ax.bar(*zip(*at), width, color=color, hatch=hatch, edgecolor="white", label=name)
        ax.bar_label(drawn, fmt=f"%{digits}{unit}", fontsize=11)
    ax.set_xticks(range(len(groups)), groups)
    ax.legend()


def decode():
    """Ratios of decoding speed, in bars."""
    rows = table("FIGURES.md", "Decoding")
    figure, ax = new_figure("decode.png")
    first = lambda cell: numbers(cell)[0] if numbers(cell) else None
    bars(figure, ax, [row[""] for row in rows],
         {"to transformers (float32)": [first(row["decode, to transformers"]) for row in rows],
          "to llama.cpp (same kind)": [first(row["to llama.cpp of that kind"]) for row in rows]}, " x")
    ax.axhline(1, color="0.3", linestyle=":", linewidth=1)
    return labelled(figure, ax, ylabel="decoding speed, ratio")


def distill():
    """Student and control with their ranges over seeds, and the teacher, for each corpus."""
    rows, steps = table("FIGURES.md", "Distillation"), "student's steps"
    shift = {"teacher": -0.2, "student": 0, "control of the same time": 0.2}
    figure, ax = new_figure("distill.png")
    for (name, at), style, color in zip(shift.items(), ("s", "o", "^"), (GREY, BLUE, ORANGE)):
        for x, row in enumerate(rows):
            mean, low, high = (numbers(row[name]) * 3)[:3]
            ax.errorbar(x + at, mean, [[mean - low], [high - mean]], fmt=style, color=color, capsize=5, markersize=10,
                        label=None if x else name)
    ax.set_xticks(range(len(rows)), [f"{row['']}, {row[steps]} steps" for row in rows])
    ax.set_xlim(-0.5, len(rows) - 0.5)
    ax.legend()
    return labelled(figure, ax, ylabel="bits per byte (lower is better)")


def sweep():
    """The rows of the sweep, drawn as `compress.py --sweep` draws them."""
    rows = []
    for row in table("FIGURES.md", "The sweep"):
        name = row["chain"].split(",")[0].replace(" ", "+").replace(":", "-")
        rows.append({"name": name, "file_bytes": 1e6 * numbers(row["file, MB"])[0],
                     "bits_per_byte": numbers(row["bits per byte"])[0],
                     "decode_x": numbers(row["decode"])[0] if rows else 1.0})           # the first row: tokens/s
    with tempfile.TemporaryDirectory() as folder:
        tradeoff(rows, Path(folder))
        return (Path(folder) / "tradeoff.png").read_bytes()


def fit():
    """Losses at each limit: what --fit chose, what it expected, and the best by hand; a panel for each model."""
    rows = table("FIGURES.md", "A limit instead of a chain")
    first = lambda cell: (numbers(cell) + [None])[0]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = new_figure("fit.png", len(models), size=(11, 4.6))
    for model, ax in zip(models, axes):
        here = [row for row in rows if row["model"] == model]
        bars(figure, ax, [row["limit"] for row in here],
             {"chosen by --fit": [first(row["loss"]) for row in here], "expected": [first(row["expected"]) for row in here],
              "best by hand": [first(row["by hand"]) for row in here]}, "", ".2g")
        ax.get_legend().set(visible=ax is axes[0])
        ax.set_yscale("symlog", linthresh=1)                         # a twelfth costs a hundred times a quarter's loss
        labelled(figure, ax, title=model, **({"ylabel": "bits per byte, change (%)"} if ax is axes[0] else {}))
    return figure


def specialist():
    """Difference of each model to the general one, with its interval, by overlap."""
    rows = [row for row in table("SPECIALIST.md", "How well they know it") if len(numbers(row["to smollm2"])) == 3]
    groups, models = (list(dict.fromkeys(row[name] for row in rows)) for name in ("group", "model"))
    figure, ax = new_figure("specialist.png", size=(7, 4.6))
    for i, (model, style, color) in enumerate(zip(models, "osD^", (BLUE, ORANGE, GREY, "black"))):
        at = 0.25 * (i - (len(models) - 1) / 2)
        for row in rows:
            if row["model"] == model:
                middle, low, high = numbers(row["to smollm2"])
                ax.errorbar(groups.index(row["group"]) + at, middle, [[middle - low], [high - middle]], fmt=style,
                            color=color, capsize=5, markersize=9, label=None if row["group"] != groups[0] else model)
    ax.axhline(0, color="0.3", linestyle=":")
    ax.text(-0.45, 1, "the general model", fontsize=11, color="0.3")
    ax.set_xticks(range(len(groups)), groups)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.legend()
    return labelled(figure, ax, xlabel="overlap of the answer with the training text",
                    ylabel="bits per byte, change (%)")


def readings(runs):
    """Held-out loss against readings of the text; runs {label: directory of a run}."""
    figure, ax = new_figure("readings.png")
    for (label, folder), style, color in zip(runs.items(), ("s--", "o-", "^:", "D-."), (GREY, BLUE, ORANGE, "black")):
        points = [(line["times_read"], line["val_bits_per_byte"]) for line in read_log(Path(folder) / "log.jsonl")
                  if "times_read" in line and "val_bits_per_byte" in line]
        if not points:
            raise UserError(f"{folder}: log.jsonl has no evaluation that says how often the text was read")
        ax.plot(*zip(*points), style, color=color, label=label)
    ax.set_ylim(bottom=ax.get_ylim()[0])
    ax.legend()
    return labelled(figure, ax, xlabel="readings of the training text", ylabel="held-out loss (bits per byte)")


TABLES = {"road": road, "race": race, "decode": decode, "distill": distill, "tradeoff": sweep, "fit": fit, "specialist": specialist}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "loss", "readings", "sweep", *TABLES])
    parser.add_argument("runs", nargs="*", help="loss: a run; readings: NAME=RUN, one or more")
    parser.add_argument("--out", type=Path, default=TESTS / "figures", help="the folder of the pictures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.what in ("loss", "readings")) != bool(args.runs):
        parser.error("loss and readings need a run, as `loss out`; the others take none")
    if args.what == "loss":
        with tempfile.TemporaryDirectory() as folder:                  # the run itself stays as it is
            copy = Path(folder) / Path(args.runs[0]).resolve().name
            copy.mkdir()
            shutil.copy(Path(args.runs[0]) / "log.jsonl", copy)
            picture(copy)
            shutil.copy(copy / "loss.png", args.out)
    elif args.what == "readings":
        save_figure(readings(dict(run.rpartition("=")[::2] for run in args.runs)), args.out / "readings.png")
    else:
        for name in TABLES if args.what == "all" else [args.what.replace("sweep", "tradeoff")]:
            drawn = TABLES[name]()
            if isinstance(drawn, bytes):
                (args.out / f"{name}.png").write_bytes(drawn)
            else:
                save_figure(drawn, args.out / f"{name}.png")


if __name__ == "__main__":
    run(main)
