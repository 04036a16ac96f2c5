"""Tables and pictures of measurements."""
import json, math, statistics, time
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError
from data.chain import check_writable
from data.checkpoints import find_model
from data.files import REPORT, replacing_file
from data.heldout import interval
from data.log import read_log


# ---------------------------------------------------------------------------------------------------------------------
# One renderer of tables, one way to draw

def markdown(columns, rows, left=1):
    """A Markdown table of {heading: function of a row -> text}; `left` columns are words."""
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    adjust = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    lines.insert(1, ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join("| " + " | ".join(f(text, w) for f, text, w in zip(adjust, line, widths)) + " |" for line in lines)


# Legible at half size: large text. Colours of Okabe and Ito (2008), which the colour-blind tell apart; as
# a printer may know grey only, each curve has a marker or a dash of its own, too.
STYLE = {"font.size": 13, "legend.fontsize": 11, "axes.titlesize": 13, "lines.linewidth": 2, "lines.markersize": 8,
         "axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.45"


def new_figure(name, columns=1, size=(7, 4.2)):
    """(figure, axes or a row of axes); without matplotlib a sentence, and (None, None)."""
    try:
        import matplotlib                                        # here: importing it takes a second
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{name} is skipped: matplotlib is not installed")
        return None, None
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=size, layout="constrained")          # without pyplot: no display, nothing to close
    return figure, figure.subplots(1, columns, sharey=True)


def save_figure(figure, path):
    """Writes a figure as a PNG file, as a whole or not at all."""
    with replacing_file(path) as new:
        figure.savefig(new, dpi=120, format="png")


def write_text(path, text):
    """Writes a text file, as a whole or not at all."""
    with replacing_file(path) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------------------------------------------
# Training and distillation

def training_curve(lines):
    """(tokens learned after each step, loss of each in bits per byte) of the lines of a log."""
    end, steps = [l for l in lines if "val_loss" in l][-1], [l for l in lines if "loss" in l]
    side = "train" if end.get("train_loss") and "train_bits_per_byte" in end else "val"       # logs of earlier versions
    bits = end[f"{side}_bits_per_byte"] / max(end[f"{side}_loss"], 1e-9)       # per byte, for a nat per token
    return [l["tokens"] for l in steps], [bits * l["loss"] for l in steps]


def validation_curves(lines):
    """{label: (tokens learned, bits per byte)} of the lines of a log, the main data first."""
    end, curves = [l for l in lines if "val_loss" in l][-1], {}
    for key in end:
        if key.startswith("val_") and key.endswith("bits_per_byte"):
            name = "validation " + key.removeprefix("val_").removesuffix("bits_per_byte")
            curves[name.rstrip(" _")] = list(zip(*((l["tokens"], l[key]) for l in lines if key in l)))
    return curves


def picture(out):
    """Draws OUT/loss.png from OUT/log.jsonl: training and validation loss against tokens.

    Both are in bits per byte of the learned text. A vertical line stands where a reading of it ends.
    """
    figure, ax = new_figure("loss.png")
    lines = read_log(out / "log.jsonl")
    if not figure or not {"val_bits_per_byte", "loss"} <= set().union(*lines):
        return
    (tokens, losses), validation = training_curve(lines), validation_curves(lines)
    n, label = max(1, len(losses) // 50), "training on all data" if len(validation) > 1 else "training"
    means = [statistics.fmean(losses[i:i + n]) for i in range(0, len(losses) - n + 1, n)]
    ax.plot(tokens, losses, color="0.85", linewidth=0.6, label=f"{label}, a step")
    many = f"mean of {n} steps" if n > 1 else "every step"
    ax.plot(tokens[n - 1::n], means, "--", color=GREY, label=f"{label}, {many}")
    for (name, points), style in zip(validation.items(), ("o-", "s:", "^:", "D:", "v:")):
        ax.plot(*points, style, color=BLUE, label=name)
    mark_readings(ax, [l for l in lines if "val_loss" in l][-1], tokens)
    # The first steps of a new model would press the rest into a line.
    shown = means[min(2, len(means) - 1):] + [loss for points in validation.values() for loss in points[1]]
    room = 0.1 * (max(shown) - min(shown)) + 0.01
    ax.set_ylim(max(0, min(shown) - room), max(shown) + room)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=5)
    ax.set(xlabel="tokens learned", ylabel="loss (bits per byte)",
           title=f"{out.name}: {min(validation['validation'][1]):.3f} at best")
    figure.legend(loc="outside lower center", ncols=2)
    ax.grid(axis="y", alpha=0.3)
    save_figure(figure, out / "loss.png")


def mark_readings(ax, end, tokens):
    """Draws a thin vertical line where a reading of the text ends; of more than 20, at every few.

    end      the last evaluation's line of the log
    tokens   learned after each step
    """
    times = end.get("times_read", 0)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10 ** 9) if times / n <= 20)
    ends = [round(end["step"] * n / times) for n in range(every, int(times) + 1, every)]                 # in steps
    for i, step in enumerate(ends):
        ax.axvline(tokens[min(max(step, 1), len(tokens)) - 1], color="0.65", linewidth=0.7, zorder=0,
                   label=f"the text is read {'again' if every == 1 else f'{every} times more'}" if i == 0 else None)


DISTILLATION = (("parameters", "parameters", "{:,}"), ("bits per byte", "bits_per_byte", "{:.4f}"),
                ("perplexity", "perplexity", "{:.2f}"), ("quality kept", "quality_kept", "{:.1%}"),
                ("gap closed", "gap_closed", "{:.0%}"), ("same top token", "agreement", "{:.1%}"),
                ("decode", "decode_x", "{:.2f} x"), ("prefill", "prefill_x", "{:.2f} x"),
                ("time", "seconds", "{:.0f} s"), ("teacher's share", "teacher_seconds", "{:.0f} s"))


def write_distillation(rows, cfg, cached):
    """Prints a distillation's rows {name: figures}, and writes report.md and report.png.

    cached   seconds that the cache of labels took: the student begins so much later
    """
    out, student, base = Path(cfg.out), rows["student"], next(iter(rows.values()))["bits_per_byte"]
    columns = {"model": lambda item: item[0]}
    for heading, key, form in DISTILLATION:
        columns[heading] = lambda item, key=key, form=form: form.format(item[1][key]) if key in item[1] else ""
    text = markdown(columns, rows.items())
    if student["bits_per_byte"] < base and not cfg.exits:
        text += (f"\n\nWarning: at {base:.4f} bits per byte the teacher is worse than the student, at "
                 f"{student['bits_per_byte']:.4f}: train the teacher longer.")
    if "control" in rows:
        won = rows["control"]["bits_per_byte"] - student["bits_per_byte"]
        text += (f"\n\nThe teacher was worth its cost: {won:.4f} bits per byte below the control." if won > 0 else
                 f"\n\nThe teacher was not worth its cost: {-won:.4f} bits per byte above the control.")
    write_text(out / "report.md", text + "\n")
    print("\n" + text)
    figure, ax = new_figure("report.png")
    if not figure:
        return
    for name, run, later, style, color in (("teacher", find_model(cfg.teacher).parent, 0, "s:", GREY),
                                           ("student", out, cached, "o-", BLUE),
                                           ("control", out / "control", 0, "^--", ORANGE)):
        if name not in rows:
            continue
        label = f"{name}: {rows[name]['bits_per_byte']:.3f}"
        points = [(later + line["seconds"], line["val_bits_per_byte"]) for line in read_log(run / "log.jsonl")
                  if "val_bits_per_byte" in line]
        if points:
            ax.plot(*zip(*points), style, color=color, label=label)
        else:
            ax.axhline(rows[name]["bits_per_byte"], color=color, linestyle=":", label=label)
    ax.set(xlabel="time of training, evaluation and teacher (s)", ylabel="validation (bits per byte)")
    ax.legend()
    ax.grid(alpha=0.3)
    save_figure(figure, out / "report.png")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of `measure`

def cell(form, value, more=""):
    """The text of a value that may be unknown, None."""
    return "n/a" if value is None else form.format(value) + more


def megabytes(row, key, base):
    """The text of a number of bytes, with the ratio to the baseline's."""
    ratio = f" ({row[key] / base[key]:.2f} x)" if row[key] and base[key] and row is not base else ""
    return cell("{:,.2f}", row[key] and row[key] / 1e6, ratio)


def size_columns(base):
    """Columns for `markdown`: the sizes of the models, beside the row `base`."""
    return {"model": lambda r: r["name"], "parameters": lambda r: f"{r['parameters']:,}",
            "file, MB": lambda r: megabytes(r, "file_bytes", base),
            "in memory, MB": lambda r: megabytes(r, "resident_bytes", base),
            "bits per weight": lambda r: f"{r['bits_per_weight']:.2f}",
            "process peak, MB": lambda r: cell("{:,.0f}", r["peak_bytes"] and r["peak_bytes"] / 1e6,
                                               f" ({(r['empty_bytes'] or 0) / 1e6:,.0f})")}


def quality_columns(base):
    """Columns for `markdown`: the quality of the models, beside the row `base`."""
    def beside(row, text):
        return "" if row is base else text

    def bits(row):
        change = row["bits_per_byte"] / base["bits_per_byte"] - 1 if base["bits_per_byte"] else None
        return f"{row['bits_per_byte']:.4f}" + beside(row, "" if change is None else f" ({change:+.2%})")
    return {"model": lambda r: r["name"], "bits per byte": bits, "loss": lambda r: f"{r['loss']:.4f}",
            "perplexity": lambda r: f"{r['perplexity']:,.2f}",
            "mean KL": lambda r: beside(r, cell("{:.5f}", r["kl"])),
            "99.9 % KL": lambda r: beside(r, cell("{:.4f}", r["kl_p999"])),
            "same first choice": lambda r: beside(r, cell("{:.2%}", r["agreement"]))}


def speed_columns(base, notes):
    """Columns for `markdown`: the speed of the models, beside the row `base`, and notes."""
    def rate(row, phase):
        value = row[f"{phase}_tokens_per_s"]
        text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        return text if row is base else f"{text} ({row[f'{phase}_x']:.2f} x)"
    columns = {"model": lambda r: r["name"], "prefill, tokens/s": lambda r: rate(r, "prefill"),
               "decode, tokens/s": lambda r: rate(r, "decode"),
               "first token, ms": lambda r: f"{r['first_token_ms']:.1f}",
               "later, p50 / p95, ms": lambda r: f"{r['token_p50_ms']:.2f} / {r['token_p95_ms']:.2f}",
               "joules per token": lambda r: cell("{:.3f}", r["joules_per_token"])}
    return {**columns, "note": lambda r: r.get("note", "")} if notes else columns


def table(rows):
    """Rows of `measure` as Markdown: tables of size, quality and speed, and the conditions."""
    base = rows[0]
    threads = f" with {base['threads']} thread(s)" if base["device"] == "cpu" else ""
    conditions = (
        f"Scored: {base['tokens']:,} tokens, {base['bytes']:,} bytes of text. Speed: batch {base['batch_size']}, "
        f"a prompt of {base['prompt_tokens']} tokens, {base['new_tokens']} new ones, on {base['device']}{threads}, "
        f"{base['dtype']}; medians of {base['rounds']} rounds in which the models took turns; x is the median of the "
        "rounds' ratios. Process peak: of a fresh process that loads the model and generates; in brackets: before "
        "loading.")
    how = sorted({row["quantized_layers"] for row in rows} - {None})
    if how:
        conditions += f" Quantized layers: {'; '.join(how)}."
    columns = size_columns(base), quality_columns(base), speed_columns(base, any("note" in row for row in rows))
    return "\n\n".join([*(markdown(c, rows) for c in columns), conditions])


def step_by_step(rows):
    """Changes of bits per byte at each step of the longer chains, as Markdown lines."""
    bits, lines = {row["name"]: row["bits_per_byte"] for row in rows}, []
    for name in list(bits)[1:]:                                  # the first is the model that all were made from
        if "+" in name and not any(other.startswith(name + "+") for other in bits):
            parts = name.split("+")
            values = [rows[0]["bits_per_byte"], *(bits["+".join(parts[:n + 1])] for n in range(len(parts)))]
            lines.append("- " + ", ".join(f"{part} {b - a:+.4f}" for part, a, b in zip(parts, values, values[1:])))
    return "Bits per byte, step by step:\n\n" + "\n".join(lines) if lines else ""


def write_lines(rows, out):
    """Writes results.jsonl, a row a line."""
    write_text(out / "results.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_report(rows, text, out, shown=()):
    """Writes results.jsonl, report.md and, with matplotlib, tradeoff.png to directory `out`.

    The picture has all rows, or of more than 15 the baseline and those named in `shown`.
    """
    drawn = [row for row in rows if len(rows) <= 15 or row is rows[0] or row["name"] in shown]
    far = [row for row in drawn if row["bits_per_byte"] > 2 * rows[0]["bits_per_byte"]]      # would hide the others
    has_picture = len(rows) > 1 and tradeoff([row for row in drawn if row not in far], out)
    if has_picture:
        text += "\n\n![bits per byte against file size and against decoding speed](tradeoff.png)"
    if has_picture and far:
        text += f"\n\nNot drawn, at more than twice the baseline's bits per byte: {', '.join(r['name'] for r in far)}."
    write_lines(rows, out)
    title = f"# {rows[0]['name']} and the models made of it"
    write_text(out / "report.md", f"{title}\n\n{text}\n\n    {rows[0]['command']}\n")
    print(f"\nwrote results.jsonl, report.md{' and tradeoff.png' if has_picture else ''} to {out}")


def front(points):
    """The Pareto front of points (cost, loss), in the order of cost."""
    best, result = math.inf, []
    for cost, loss in sorted(points):
        if loss < best:
            best = loss
            result.append((cost, loss))
    return result


def mark_model(ax, i, point, name, above=None):
    """Draws the i-th model at a point: a number in a mark. above: a loss that is beyond the edge."""
    style = dict(color=BLUE, marker="o") if i else dict(color=ORANGE, marker="s")                # the baseline
    label = f"{i} {name}" if above is None else f"{i} {name} ({above:.3f})"
    style |= {} if above is None else dict(marker="^")
    ax.scatter(*point, s=190 if above is None else 280, zorder=2 + i, edgecolor="white", label=label, **style)
    ax.annotate(str(i), point, ha="center", va="center", fontsize=10, weight="bold", color="white" if i else "black",
                zorder=2 + i)


def tradeoff(rows, out):
    """Draws tradeoff.png; returns whether it could. A point is a number, the legend has the names.

    Left: bits per byte against bytes of the file, right: against decoding speed. The grey line is
    the Pareto front. A model far above the others is a triangle at the upper edge, so that the
    others keep apart.
    """
    figure, axes = new_figure("tradeoff.png", 2, (10, 4.6 + 0.08 * len(rows)))
    if not figure:
        return False
    exact = [row["bits_per_byte"] for row in rows]
    ceiling = exact[0] + 4 * statistics.median(abs(loss - exact[0]) for loss in exact[1:] or exact)
    losses = [min(loss, ceiling) if ceiling > exact[0] else loss for loss in exact]
    pad = max(0.1 * (max(losses) - min(losses)), 0.005 * max(losses))          # smaller differences should look small
    for ax, label, costs, sign in (
            (axes[0], "file (MB): smaller to the left", [row["file_bytes"] / 1e6 for row in rows], 1),
            (axes[1], f"decoding (x {rows[0]['name']}): faster to the right", [row["decode_x"] for row in rows], -1)):
        best = front((sign * cost, loss) for cost, loss in zip(costs, losses))
        ax.step([sign * x for x, _ in best], [y for _, y in best], where="post", color="0.7", zorder=1,
                label="best for the cost")
        ax.axhline(losses[0], color=ORANGE, linestyle=":", zorder=0)                           # the baseline
        for i, point in enumerate(zip(costs, losses)):
            mark_model(ax, i, point, rows[i]["name"], exact[i] if exact[i] > losses[i] else None)
        ax.set(xlabel=label)
        ax.locator_params(axis="x", nbins=6)
        ax.set_xlim(0, 1.12 * max(costs))
        ax.set_ylim(min(losses) - pad, max(losses) + pad)
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte (lower is better)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=10, ncols=3)
    save_figure(figure, out / "tradeoff.png")
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


class Progress:
    """Progress of a list of jobs by cost: a bar on a terminal, and a line before each job."""
    def __init__(self, total):
        self.bar = tqdm(total=total, desc="sweep", disable=None, bar_format="{l_bar}{bar}| {elapsed}")
        self.total, self.done, self.now, self.start = total, 0, 0, time.monotonic()

    def next(self, name, cost):
        """Announces a job, with the minutes that are left once one is finished."""
        self.done, self.now = self.done + self.now, cost
        self.bar.update(self.done - self.bar.n)
        left = ""
        if self.done:
            minutes = (time.monotonic() - self.start) * (self.total / self.done - 1) / 60
            left = "; less than a minute left" if minutes < 1 else f"; about {minutes:.0f} min left"
        tqdm.write(f"--- {name}{left}")


# ---------------------------------------------------------------------------------------------------------------------
# Held-out prompts

def evaluation_table(results, groups):
    """A Markdown table of the results {model: rows of `evaluate`} by groups {name: line numbers}.

    The first model is the baseline. In brackets: 95 % intervals of the difference. A helper a
    column, therefore many branches.
    """
    base = next(iter(results))

    def column(model, lines, key):
        return torch.tensor([float(results[model][i][key]) for i in lines], dtype=torch.float64)            # (lines,)

    def difference(model, lines, key, form, scale=100, relative=False):
        if model == base or not lines:
            return ""
        own, others = column(model, lines, key), column(base, lines, key)
        both = lambda at: own[at].sum() / others[at].sum() - 1 if relative else (own[at] - others[at]).mean()
        low, high = interval(both, len(lines))
        middle = f"{scale * both(torch.arange(len(lines))):{form}} % " if relative else ""
        return f"{middle}({scale * low:{form}} ... {scale * high:{form}})"

    def having(model, lines, key):
        return [i for i in lines if key in results[model][i]]

    def bits_per_byte(model, lines):
        nats, size = (column(model, lines, key).sum() for key in ("nats", "bytes"))
        return f"{nats / math.log(2) / max(1, size):.4f}"

    def mean(model, lines, key, form, change="", scale=100):
        lines = having(model, lines, key)
        if not lines:
            return "n/a"
        shown = f"{column(model, lines, key).mean():{form}}"
        return f"{shown} {difference(model, lines, key, change, scale)}".rstrip() if change else shown

    def verbatim(model, lines):
        spans = [results[model][i]["spans"] for i in having(model, lines, "spans")]
        return f"{sum(s for s, _ in spans) / max(1, sum(n for _, n in spans)):.1%}" if spans else "n/a"

    columns = {"group": lambda row: row[0], "model": lambda row: row[1], "lines": lambda row: f"{len(row[2]):,}",
               "bits per byte": lambda row: bits_per_byte(*row[1:]),
               f"to {base}": lambda row: difference(*row[1:], "nats", "+.1f", relative=True),
               "token-F1": lambda row: mean(*row[1:], "f1", ".3f", "+.3f", 1),
               "exact match": lambda row: mean(*row[1:], "exact", ".1%"),
               "right choice": lambda row: mean(*row[1:], "chosen", ".1%", "+.1f"),
               "verbatim": lambda row: verbatim(*row[1:])}
    return markdown(columns, [(group, model, lines) for group, lines in groups.items() for model in results], left=2)


def evaluation_conditions(lines, answers, max_new_tokens, with_text):
    """The sentences below evaluation_table; with_text: whether the training text is known."""
    text = (f"Bits per byte of {lines:,} responses given their prompts, in each model's chat template; token-F1 "
            f"and exact match of {answers} greedy answers of at most {max_new_tokens} tokens; in brackets 95 % "
            "intervals of the difference (paired bootstrap over lines).")
    if with_text:
        text += (" Overlap: the share of a response's 8-word spans that stand in the training text; verbatim: of an "
                 "answer's 50-byte spans.")
    return text
