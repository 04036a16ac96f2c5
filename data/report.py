"""Tables and pictures of what was measured."""
import itertools, json, math, re, statistics, time
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError
from data.chain import check_writable
from data.files import REPORT, replacing_file
from data.heldout import interval
from data.runs import read_log


def picture(out):
    """Draws loss.png from log.jsonl."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("loss.png is skipped: matplotlib is not installed")
        return
    lines = read_log(out / "log.jsonl")
    train = [(l["tokens"], l["loss"]) for l in lines if "loss" in l]
    val = [(l["tokens"], l["val_loss"]) for l in lines if "val_loss" in l]
    if not val:
        return
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(*zip(*train), color="0.85", linewidth=0.8, label="training, a step")
    n = max(1, len(train) // 50)
    smooth = [(train[i + n - 1][0], statistics.fmean(l for _, l in train[i:i + n]))
              for i in range(0, len(train) - n + 1, n)]
    ax.plot(*zip(*smooth), color="0.4", label=f"training, mean of {n}")
    ax.plot(*zip(*val), "o-", color="tab:blue", label="validation")
    ax.set(xlabel="tokens learned", ylabel="loss (nats per token)",
           title=f"{out.name}: validation loss {val[-1][1]:.3f}")
    ax.set_ylim(min(min(l for _, l in train), min(l for _, l in val)) - 0.1, None)
    ax.legend(loc="upper right")
    ax.grid(alpha=0.3)
    with replacing_file(out / "loss.png") as new:
        fig.savefig(new, dpi=120, format="png")
    plt.close(fig)


def table(rows):
    """Rows of `measure` as three Markdown tables, size, quality, speed, and the conditions they hold under."""
    base, mb = rows[0], lambda n: None if n is None else n / 1e6

    def cell(form, value, more=""):
        return "n/a" if value is None else form.format(value) + more

    def rate(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    def times(row, key):
        return f" ({row[key] / base[key]:.2f} x)" if row[key] and base[key] and row is not base else ""

    def markdown(columns):                                       # {heading: function of a row that gives a cell}
        lines = [["model", *columns], *([row["name"], *(make(row) for make in columns.values())] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
        return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
                         for line in lines)

    size = {"parameters": lambda r: f"{r['parameters']:,}",
            "file, MB": lambda r: cell("{:,.2f}", mb(r["file_bytes"]), times(r, "file_bytes")),
            "in memory, MB": lambda r: cell("{:,.2f}", mb(r["resident_bytes"]), times(r, "resident_bytes")),
            "bits per weight": lambda r: f"{r['bits_per_weight']:.2f}",
            "process peak, MB": lambda r: cell("{:,.0f}", mb(r["peak_bytes"]),
                                                             f" ({mb(r['empty_bytes'] or 0):,.0f})")}
    quality = {"bits per byte": lambda r: f"{r['bits_per_byte']:.4f}" + ("" if r is base else
               f" ({r['bits_per_byte'] / base['bits_per_byte'] - 1:+.2%})" if base["bits_per_byte"] else ""),
               "loss": lambda r: f"{r['loss']:.4f}", "perplexity": lambda r: f"{r['perplexity']:,.2f}",
               "mean KL": lambda r: "" if r is base else cell("{:.5f}", r["kl"]),
               "99.9 % KL": lambda r: "" if r is base else cell("{:.4f}", r["kl_p999"]),
               "same first choice": lambda r: "" if r is base else cell("{:.2%}", r["agreement"])}
    fast = {f"{phase}, tokens/s": lambda r, p=phase: rate(r[f"{p}_tokens_per_s"]) +
            ("" if r is base else f" ({r[f'{p}_x']:.2f} x)") for phase in ("prefill", "decode")}
    fast |= {"first token, ms": lambda r: f"{r['first_token_ms']:.1f}",
             "later, p50 / p95, ms": lambda r: f"{r['token_p50_ms']:.2f} / {r['token_p95_ms']:.2f}",
             "joules per token": lambda r: cell("{:.3f}", r["joules_per_token"])}
    if any("note" in row for row in rows):
        fast["note"] = lambda r: r.get("note", "")
    threads = f" with {base['threads']} thread(s)" if base["device"] == "cpu" else ""
    conditions = (
        f"Scored: {base['tokens']:,} tokens, {base['bytes']:,} bytes of text. Speed: batch {base['batch_size']}, "
        f"a prompt of {base['prompt_tokens']} tokens, {base['new_tokens']} new ones, on {base['device']}{threads}, "
        f"{base['dtype']}; medians of {base['rounds']} rounds in which the models took turns; x is the median of the "
        "rounds' ratios. Process peak: of a fresh process that loads the model and generates; (of it before loading).")
    how = sorted({row["quantized_layers"] for row in rows} - {None})
    if how:
        conditions += f" Quantized layers: {'; '.join(how)}."
    return "\n\n".join([*map(markdown, (size, quality, fast)), conditions])


def evaluation_table(results, groups):
    """Markdown of what `evaluate` gave, {name: rows}; the first is what the others are compared with. groups: {name:
    line numbers}. In brackets 95 % intervals of the difference."""
    base = next(iter(results))

    def column(name, chosen, key):
        return torch.tensor([float(results[name][i][key]) for i in chosen], dtype=torch.float64)

    def difference(name, chosen, key, form, scale=100, relative=False):
        if name == base or not chosen:
            return ""
        ours, theirs = column(name, chosen, key), column(base, chosen, key)
        both = lambda at: ours[at].sum() / theirs[at].sum() - 1 if relative else (ours[at] - theirs[at]).mean()
        low, high = interval(both, len(chosen))
        middle = f"{scale * both(torch.arange(len(chosen))):{form}} % " if relative else ""
        return f"{middle}({scale * low:{form}} ... {scale * high:{form}})"

    def cells(name, group):
        rows, its = results[name], groups[group]
        with_choices, answered = ([i for i in its if key in rows[i]] for key in ("chosen", "f1"))
        spans = [rows[i]["spans"] for i in answered if "spans" in rows[i]]
        share = lambda chosen, key: f"{column(name, chosen, key).mean():.1%}" if chosen else "n/a"
        return [group, name, f"{len(its):,}",
                f"{column(name, its, 'nats').sum() / math.log(2) / max(1, column(name, its, 'bytes').sum()):.4f}",
                difference(name, its, "nats", "+.1f", relative=True),
                f"{column(name, answered, 'f1').mean():.3f} {difference(name, answered, 'f1', '+.3f', 1)}".rstrip()
                if answered else "n/a", share(answered, "exact"),
                f"{share(with_choices, 'chosen')} {difference(name, with_choices, 'chosen', '+.1f')}".rstrip(),
                f"{sum(s for s, _ in spans) / max(1, sum(n for _, n in spans)):.1%}" if spans else "n/a"]
    head = ["group", "model", "lines", "bits per byte", f"to {base}", "token-F1", "exact match", "right choice",
            "verbatim"]
    lines = [head, ["---", "---", *["---:"] * 7], *(cells(name, group) for group in groups for name in results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Progress:
    """How far a list of jobs is, by what each of them costs: a bar on a terminal, and a line before each job."""
    def __init__(self, total):
        self.bar = tqdm(total=total, desc="sweep", disable=None, bar_format="{l_bar}{bar}| {elapsed}")
        self.total, self.done, self.now, self.start = total, 0, 0, time.monotonic()

    def next(self, name, cost):
        self.done, self.now = self.done + self.now, cost
        self.bar.update(self.done - self.bar.n)
        left = (time.monotonic() - self.start) * (self.total / self.done - 1) / 60 if self.done else None
        tqdm.write(f"--- {name}" + ("" if left is None else f"; about {left:.0f} minutes left"))


def step_by_step(rows):
    """What each step of the chains of several did to bits per byte, as Markdown lines."""
    bits, lines = {row["name"]: row["bits_per_byte"] for row in rows}, []
    for name in list(bits)[1:]:                                  # the first is what they were made of
        if "+" in name and not any(other.startswith(name + "+") for other in bits):
            parts = name.split("+")
            values = [rows[0]["bits_per_byte"], *(bits["+".join(parts[:n + 1])] for n in range(len(parts)))]
            lines.append("- " + ", ".join(f"{part} {b - a:+.4f}" for part, a, b in zip(parts, values, values[1:])))
    return "Bits per byte, step by step:\n\n" + "\n".join(lines) if lines else ""


def write_lines(rows, out):
    """results.jsonl, a line a row."""
    with replacing_file(out / "results.jsonl") as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8",
                       newline="\n")


def write_report(rows, text, out, shown=()):
    """results.jsonl (a line a row), report.md and, where matplotlib is installed, tradeoff.png in directory `out`: of
    all rows, or if they are too many to be told apart of those named in `shown`."""
    drawn = [row for row in rows if len(rows) <= 15 or row is rows[0] or row["name"] in shown]
    far = [row for row in drawn if row["bits_per_byte"] > 2 * rows[0]["bits_per_byte"]]      # they would hide the rest
    picture = tradeoff([row for row in drawn if row not in far], out) if len(rows) > 1 else False
    link = "\n\n![bits per byte against file size and against decoding speed](tradeoff.png)" if picture else ""
    if picture and far:
        link += f"\n\nNot drawn, at more than twice the baseline's bits per byte: {', '.join(r['name'] for r in far)}."
    report = f"# {rows[0]['name']} and what was made of it\n\n{text}{link}\n\n    {rows[0]['command']}\n"
    write_lines(rows, out)
    with replacing_file(out / "report.md") as new:
        new.write_text(report, encoding="utf-8", newline="\n")
    print(f"\nwrote results.jsonl, report.md{' and tradeoff.png' if picture else ''} to {out}")


def front(points):
    """Of points (cost, loss), those that no other beats in both, in the order of their cost."""
    best, result = math.inf, []
    for cost, loss in sorted(points):
        if loss < best:
            best = loss
            result.append((cost, loss))
    return result


def label_points(ax, points):
    """Writes the names of `points` [(name, x, y), ...], each at the place nearest to its point that is free; a line
    leads to one that is far."""
    from matplotlib.transforms import Bbox
    ax.figure.canvas.draw()
    taken = [Bbox.from_bounds(*(ax.transData.transform((x, y)) - 7), 14, 14) for _, x, y in points]
    taken += [ax.get_legend().get_window_extent()] if ax.get_legend() else []
    places = [(dx, dy, "left" if dx > 0 else "right" if dx else "center") for dx, dy in
              itertools.product(range(-78, 79, 6), range(-90, 91, 6)) if dx or abs(dy) >= 12]
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        for dx, dy, side in sorted(places, key=lambda place: math.hypot(place[0], 1.5 * place[1] - 9)):
            text = ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=8, ha=side, va="center")
            box = text.get_window_extent()
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        taken.append(box)
        if math.hypot(dx, dy) > 15:
            ax.annotate("", (x, y), (dx, dy), textcoords="offset points", zorder=1,
                        arrowprops=dict(arrowstyle="-", color="0.6", lw=0.6, shrinkA=0, shrinkB=0))


def tradeoff(rows, out):
    """Draws tradeoff.png; False if it could not. Left: bits per byte against the file's bytes, right: against decoding
    speed. The line joins the Pareto front, the models that none beats in both."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("tradeoff.png is skipped: matplotlib is not installed")
        return False
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True, layout="constrained")
    low, high = (f(r["bits_per_byte"] for r in rows) for f in (min, max))
    pad = max(0.1 * (high - low), 0.005 * high)                  # differences of less than that should look small
    recovered = any("+recover" in row["name"] for row in rows)
    for ax, label, cost, sign in ((axes[0], "file, MB", lambda r: r["file_bytes"] / 1e6, 1),
                                  (axes[1], f"decode, x {rows[0]['name']}", lambda r: r["decode_x"], -1)):
        line = front([(sign * cost(r), r["bits_per_byte"]) for r in rows])
        ax.step([sign * x for x, _ in line], [y for _, y in line], where="post", color="0.7", zorder=1,
                label="best for its cost")
        ax.axhline(rows[0]["bits_per_byte"], color="tab:orange", linestyle=":", linewidth=1, zorder=0)   # to get under
        for r in rows:
            dense = r is rows[0]
            ax.scatter(cost(r), r["bits_per_byte"], color="tab:orange" if dense else "tab:blue", zorder=2,
                       marker="*" if dense else "o", s=120 if dense else 30, label="baseline" if dense else None)
        ax.set(xlabel=label)
        ax.set_xlim(0, 1.12 * max(map(cost, rows)))
        ax.set_ylim(low - pad, high + pad)
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte (lower is better)", title="smaller is to the left")
    axes[1].set(title="faster is to the right")
    axes[1].legend(fontsize=8, title="+r: and a recovery" if recovered else None, title_fontsize=8)
    for ax, cost in ((axes[0], lambda r: r["file_bytes"] / 1e6), (axes[1], lambda r: r["decode_x"])):
        label_points(ax, [(re.sub(r"\+recover-\d+", "+r", r["name"]), cost(r), r["bits_per_byte"]) for r in rows])
    with replacing_file(out / "tradeoff.png") as new:
        fig.savefig(new, dpi=120, format="png")
    plt.close(fig)
    return True


def is_report(file):
    """Whether results.jsonl is one that write_lines wrote."""
    try:
        with open(file, encoding="utf-8") as lines:
            row = json.loads(lines.readline())
        return isinstance(row, dict) and {"protocol", "sha256"} <= row.keys()
    except (OSError, ValueError):
        return False


def check_report(args):
    """Raises UserError if the report cannot be written to --out, or must not be."""
    out = Path(args.out)
    if out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} is a {'file' if out.is_file() else 'model'}; the report is three files in a "
                        "directory: give another name")
    foreign = next((name for name in sorted(REPORT) if (out / name).exists()), None)
    if foreign and not is_report(out / "results.jsonl"):
        raise UserError(f"--out {out} holds {foreign}, which is not of a report that compress.py wrote: give another "
                        "name")
    if foreign and not args.overwrite:
        raise UserError(f"--out {out} holds a report already: give another name or --overwrite")
    check_writable(out)
