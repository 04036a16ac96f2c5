"""Measures models on the same text: size, quality, speed, memory. The one ruler of all tables.

    python data/measure.py out out-int8 out-int4                 # the first is the baseline
    python data/measure.py out out-int8 --text notes.txt --out report
    python data/measure.py out-small out --escalate              # the two also as a cascade

The models take turns, so that a slow moment of the machine meets all of them. compress.py --measure
and --sweep, sample.py --eval and the report of distill.py come here, too.
"""
import argparse, array, collections, dataclasses, functools, hashlib, itertools, json, math
import platform, shlex, shutil, statistics, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

if __name__ == "__main__":                                       # run as a script, the first import path is data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from compress import STEPS, make
from data import UserError, heldout
from data.chain import (MEASURING, chain_name, check_flags, check_order, check_together, needs_text, needs_training,
                        open_stages, parse_chain, resume_hint)
from data.chat import readable_pieces
from data.checkpoints import by_name, checkpoint_hash, find_model, model_name, tokenizer_of, weight_files
from data.console import Parser, run
from data.files import write_json
from data.loader import Windows
from data.machine import accelerate, how_quantized_layers_run, in_dtype, logits_at_once, pick_device, threads_for
from data.prepare import encode_example
from data.report import (Progress, check_report, evaluation_conditions, evaluation_table, step_by_step, table,
                         write_distillation, write_lines, write_report)
from data.runs import read_state
from data.sources import calibration_context, calibration_data, last_training, measuring_flags, scored_text, seed_of
from data.speed import one_turn, peak_alone, random_ids, speed_figures
from data.tokenizer import Tokenizer
from model import load
from sample import (at_positions, cascade, continuations, figures, generate, lead, open_model, refuse_not_a_number,
                    score, token_losses)


# ---------------------------------------------------------------------------------------------------------------------
# Quality, speed, and the row of a model

@torch.inference_mode()
def compare(models, batches, token_bytes):
    """Quality of models {name: model} on the same tokens: {name: `figures` and

    kl           mean over tokens of KL(baseline || model), nats; kl_p999: the 99.9th percentile
    agreement    share of tokens where both have the same likeliest id}

    The first model is the baseline. The models share a tokenizer. Rows of padding ids may differ:
    distributions are over the len(token_bytes) real ids.
    """
    device, ids = next(next(iter(models.values())).parameters()).device, len(token_bytes)
    token_bytes = torch.as_tensor(token_bytes, device=device)
    rows = max(1, logits_at_once(device) // max(m.config.vocab_size for m in models.values()))
    # Numbers, not tensors: small tensors pin the memory of the logits that were freed beside them.
    nats, same = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    divergence = {name: array.array("f") for name in models}
    tokens = n_bytes = 0
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        learned = batch.targets >= 0
        targets = batch.targets[learned]                                                             # (N,)
        tokens, n_bytes = tokens + len(targets), n_bytes + int(token_bytes[targets].sum())
        hidden = {n: m(batch.ids, segments=batch.segments, head=False)[learned] for n, m in models.items()}  # (N, C)
        for i in range(0, len(targets), rows):
            base = None
            for name, model in models.items():
                logits = model.lm_head(hidden[name][i:i + rows]).float()                             # (rows, V)
                nats[name] += float(F.cross_entropy(logits, targets[i:i + rows], reduction="sum"))
                logp = logits[:, :ids].log_softmax(-1)
                base = logp if base is None else base
                divergence[name].extend((base.exp() * (base - logp)).sum(-1).tolist())
                same[name] += int((logp.argmax(-1) == base.argmax(-1)).sum())
    result = {}
    for name in models:
        kl = torch.frombuffer(divergence[name], dtype=torch.float32) if tokens else torch.zeros(1)
        result[name] = {**figures(nats[name], tokens, n_bytes), "kl": float(kl.double().mean()),
                        "kl_p999": float(kl.kthvalue(math.ceil(0.999 * len(kl))).values),
                        "agreement": same[name] / max(1, tokens)}
    return result


def speed(models, prompt_tokens=256, new_tokens=64, batch_size=1, rounds=5, clock=time.perf_counter, prompt=None,
          writers=None):
    """Speed of greedy generation by models {name: model}: {name: figures}; first: the baseline.

    The models take turns, `rounds` times after a warm-up. Figures are medians over the rounds, and
    *_x medians of the ratios to the baseline in a round. Raises UserError beyond a window.

    prompt      ids (B, T); default: random ones, as no kernel depends on the text
    writers     {name: function} to time instead of `generate`
    prefill_tokens_per_s    batch_size x prompt_tokens over the time to the first new token
    decode_tokens_per_s     batch_size x new_tokens over the time from there to the last
    first_token_ms, token_p50_ms, token_p95_ms     the wait for the first token, and for later ones
    joules_per_token        energy of the device while decoding; None without a readable counter
    prefill_rounds, decode_rounds                  tokens/s of each round
    """
    for name, model in models.items():
        window = model.config.max_position_embeddings
        if prompt_tokens + new_tokens > window:
            raise UserError(f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than {name}'s window of "
                            f"{window}: lower one of the two")
    turns = {name: [] for name in models}
    for i in range(1 + rounds):
        for name, model in models.items():
            ids = random_ids(model, batch_size, prompt_tokens) if prompt is None else prompt
            turn = one_turn((writers or {}).get(name, functools.partial(generate, model)), ids, new_tokens, clock)
            if i:
                turns[name].append(turn)
    result = {name: speed_figures(turns[name], batch_size * prompt_tokens, batch_size * new_tokens) for name in models}
    base = next(iter(result.values()))
    for row in result.values():
        for phase in ("prefill", "decode"):
            ratios = [own / other for own, other in zip(row[f"{phase}_rounds"], base[f"{phase}_rounds"])]
            row[f"{phase}_x"] = statistics.median(ratios)
    return result


def measure(models, batches, token_bytes, directories=None, other_text=None, prompt_tokens=256, new_tokens=64,
            rounds=5):
    """The rows of all tables: a dict for each of models {name: model}. The first is the baseline.

    batches, token_bytes     the scored text, see `score`
    directories   {name: model directory}, for the size of files and the memory of a fresh process
    other_text    {name: (batches, token_bytes)}: the same text for a model with another tokenizer:
                  only bits per byte can be compared; kl, kl_p999 and agreement are None

    A row holds name, the figures of `compare` and `speed`, and
    parameters, resident_bytes, bits_per_weight     see Transformer; tied weights once, with scales
    file_bytes    of model.safetensors or the shards, without the tokenizer
    peak_bytes, empty_bytes    of a fresh process that loads the model and generates (peak_alone)
    device, dtype, threads, quantized_layers, prompt_tokens, new_tokens, batch_size, rounds
    None: could not be measured; nothing is an estimate.
    """
    directories, other_text = directories or {}, other_text or {}
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    speeds, rows = speed(models, prompt_tokens, new_tokens, rounds=rounds), []
    quality = compare({n: m for n, m in models.items() if n not in other_text}, batches, token_bytes)
    for name, text in other_text.items():
        alone = compare({name: models[name]}, *text)[name]
        quality[name] = {**alone, "kl": None, "kl_p999": None, "agreement": None}
    for name, model in models.items():
        parameters, resident, where = model.parameters_count(), model.resident_bytes(), directories.get(name)
        files = weight_files(where) if where else ()
        peak, empty = peak_alone(where, model, prompt_tokens, new_tokens) if where else (None, None)
        device = next(model.parameters()).device
        rows.append({"name": name, "parameters": parameters,
                     "file_bytes": sum(f.stat().st_size for f in files) or None, "resident_bytes": resident,
                     "bits_per_weight": 8 * resident / parameters, "peak_bytes": peak, "empty_bytes": empty,
                     **quality[name], **speeds[name],
                     "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                     "dtype": str(model.dtype)[6:], "threads": torch.get_num_threads(),
                     "quantized_layers": how_quantized_layers_run(model), "prompt_tokens": prompt_tokens,
                     "new_tokens": new_tokens, "batch_size": 1, "rounds": rounds})
        model.train(training[name])
    return rows


def leads(model, batch):
    """`lead` at each position of a batch, (B, T); infinite where there is no target."""
    return at_positions(model, batch, lambda logits, targets: lead(logits).where(targets >= 0, math.inf))


def margin_for(share, token_leads):
    """The margin below which lies this share (0 to 1) of the finite leads of tokens."""
    finite = token_leads[token_leads < math.inf].sort().values
    return float(finite[min(int(share * len(finite)), len(finite) - 1)])


def cascade_curve(small, big, batches, token_bytes, shares):
    """Quality of `cascade` for several shares of tokens handed over: for each a dict, `figures` and

    share, margin     handed over, and the margin for it
    big_reads         share of the tokens that the big model reads: in a window up to the last one
                      handed over. A cascade saves passes of the big model, not multiplications
    multiplications   per token: matrices of the small model, and of the big one for tokens read
    """
    device, token_bytes = next(small.parameters()).device, torch.as_tensor(token_bytes)
    columns = [array.array(code) for code in "fffq"]             # numbers, not tensors: see `compare`
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        for column, t in zip(columns, (leads(small, batch), token_losses(small, batch), token_losses(big, batch),
                                       batch.targets)):
            column.extend(t.flatten().tolist())
    token_leads, small_nats, big_nats, targets = (               # (windows, T) each
        torch.frombuffer(column, dtype=kind).view(-1, batch.targets.shape[1])
        for column, kind in zip(columns, (*[torch.float32] * 3, torch.int64)))
    learned, result = targets >= 0, []
    n_bytes = token_bytes[targets[learned]].sum()
    for share in shares:
        over = token_leads < (margin := margin_for(share, token_leads))
        reads = float((over * torch.arange(1, over.shape[1] + 1)).amax(1).sum() / over.numel())
        nats = torch.where(over, big_nats, small_nats).double().sum()
        result.append({"share": share, "margin": margin, "big_reads": reads,
                       "multiplications": small.matmul_parameters() + reads * big.matmul_parameters(),
                       **figures(nats, learned.sum(), n_bytes)})
    return result


def cascade_rows(models, rows, batches, token_bytes, shares=(0.1, 0.25, 0.5)):
    """Rows for `table` of a cascade of the first two of `models`, beside their `rows` of `measure`.

    Timing continues the beginning of the scored text: the share in the note differs.
    """
    base, row_of, first = list(models)[:2], dict(zip(models, rows)), rows[0]
    small, big = sorted(base, key=lambda name: models[name].matmul_parameters())
    curve = cascade_curve(models[small], models[big], batches, token_bytes, shares)
    names = [f"{small} + {big} {point['share']:.0%}" for point in curve]
    counts = {name: collections.Counter() for name in names}
    writers = {name: functools.partial(cascade, models[small], models[big], margin=point["margin"], counts=counts[name])
               for name, point in zip(names, curve)}
    prompt = batches[0].ids[:1, :first["prompt_tokens"]].to(next(models[small].parameters()).device)           # (1, T)
    speeds = speed({base[0]: models[base[0]], **dict.fromkeys(names, models[small])}, prompt.shape[1],
                   first["new_tokens"], 1, first["rounds"], prompt=prompt, writers=writers)
    both = {key: row_of[small][key] + row_of[big][key] for key in ("parameters", "file_bytes", "resident_bytes",
            "sha256") if row_of[small].get(key) and row_of[big].get(key)}
    unknown = dict.fromkeys(("peak_bytes", "empty_bytes", "kl", "kl_p999", "agreement", "quantized_layers"))
    return [{**first, **both, **unknown, "bits_per_weight": 8 * both["resident_bytes"] / both["parameters"], **point,
             **speeds[name], "name": name, "note": f"handed over while timed: "
             f"{counts[name]['escalated'] / counts[name]['tokens']:.0%}"}
            for name, point in zip(names, curve)]


def response_loss(model, tokenizer, prompt, response, token_bytes):
    """[nats, tokens, bytes] of a response and the end token, given the prompt; see encode_example.

    A text longer than the window is scored in pieces, each after half a window of context.
    """
    ids, mask = encode_example(tokenizer, prompt, response)
    windows = Windows.of([(ids, mask)], min(model.config.max_position_embeddings, len(ids) - 1))
    batches = (batch._replace(segments=None) for batch in windows.evaluation_batches(8))       # a piece a window
    return score(model, batches, token_bytes).tolist()


def evaluate(model, tokenizer, lines, answered, max_new_tokens, name=""):
    """Results of a model on heldout.Lines, a dict each: nats, tokens and bytes of the response, and

    chosen              with choices: whether the response has the fewest bits per byte of them
    answer, f1, exact   for the line numbers in `answered`: the greedy answer, compared by words
    """
    rows, token_bytes, unread = [], tokenizer.token_bytes(), 0
    for i, line in enumerate(tqdm(lines, desc=name, unit="line", disable=None, leave=False)):
        losses = {text: response_loss(model, tokenizer, line.prompt, text, token_bytes)
                  for text in dict.fromkeys((line.response, *line.choices))}
        refuse_not_a_number(list(losses.values()))
        nats, tokens, size = losses[line.response]
        row = {"nats": nats, "tokens": int(tokens), "bytes": int(size)}
        if line.choices:
            bits = {text: choice_nats / max(1, choice_bytes) for text, (choice_nats, _, choice_bytes) in losses.items()}
            row["chosen"] = min(line.choices, key=bits.get) == line.response
        prompt = tokenizer.render(line.messages[:-1])
        unread += len(tokenizer.encode(prompt, special=True)) > model.config.max_position_embeddings
        if i in answered:
            stream = map(int, continuations(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=0))
            answer = "".join(readable_pieces(tokenizer, stream, tokenizer.eos_ids)).strip()
            row.update(answer=answer, f1=heldout.token_f1(answer, line.response),
                       exact=heldout.words_of(answer) == heldout.words_of(line.response))
        rows.append(row)
    if unread:
        print(f"{unread:,} prompts exceed {name}'s window of {model.config.max_position_embeddings} tokens: only their "
              "end is read", file=sys.stderr)
    return rows


def evaluate_command(args):
    """--eval: prints the table; with --out writes a line for each model and prompt."""
    directories, (lines, data) = by_name(args.model, "--eval"), heldout.of_command(args)
    text = data and functools.partial(heldout.training_text, data, Tokenizer.load(data))
    shares = text and heldout.overlap(lines, text())
    groups = heldout.groups(lines, shares, args.by)
    count = min(args.answers, len(lines))
    answered = [i * len(lines) // count for i in range(count)]                    # spread over the file
    device, results = pick_device(args.device), {}
    threads_for(None, args.threads or torch.get_num_threads(), device)
    for name, directory in directories.items():
        start, (model, tokenizer) = time.perf_counter(), open_model(directory, device, args.native, torch.float32)
        results[name] = evaluate(model, tokenizer, lines, answered, args.max_new_tokens, name)
        print(f"[{name}: {len(lines):,} responses scored, {count} prompts answered in "
              f"{time.perf_counter() - start:.0f} s]", file=sys.stderr)
    for rows in results.values() if text else ():
        spans = heldout.verbatim([rows[i]["answer"] for i in answered], text())
        for i, found_and_all in zip(answered, spans):
            rows[i]["spans"] = found_and_all
    print(f"{evaluation_table(results, groups)}\n\n"
          f"{evaluation_conditions(len(lines), count, args.max_new_tokens, with_text=bool(text))}")
    if args.out:
        heldout.write_answers(Path(args.out), lines, results, shares)


# ---------------------------------------------------------------------------------------------------------------------
# Commands: data/measure.py and compress.py --measure, compress.py --sweep, the report of distill.py

def ruler(directories, args, command):
    """Prepares a comparison of {name: directory}, with all checks: returns (protocol, rows_of).

    protocol   the scored text, in words
    rows_of    function of names: measures these models with the first one, returns the rows of all
    """
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = {name: load(directory) for name, directory in directories.items()}          # mapped: nothing is read yet
    tokenizers = {name: tokenizer_of(model, directories[name]) for name, model in models.items()}
    if args.escalate and (len(models) != 2 or len({tokenizer.hash for tokenizer in tokenizers.values()}) > 1):
        raise UserError("--escalate measures two models at work together, a small and a large one with the same "
                        "tokenizer: data/measure.py SMALL BIG --escalate")
    base, files = next(iter(models)), dict(directories)
    dtype = torch.float32 if device.type == "cpu" else models[base].dtype         # of all; a CPU is slow at 16 bits
    window = min(model.config.max_position_embeddings for model in models.values())
    new_tokens = args.new_tokens or max(1, min(64, window // 4))
    prompt = args.prompt_tokens or max(1, min(256, window - new_tokens))
    if prompt + new_tokens > window:
        raise UserError(f"a prompt of {prompt} tokens and {new_tokens} new ones are more than the smallest window, "
                        f"{window}: lower --prompt-tokens or --new-tokens")
    history = models[base].history
    protocol, batches = scored_text(args, tokenizers, history, min(window, last_training(history).get("context", 512)))
    print(f"measuring {', '.join(models)} on {device}: {protocol}", flush=True)

    def rows_of(names):
        models = {name: accelerate(load(directories[name], device, dtype), args.native) for name in (base, *names)}
        others = {name: (batches[name], tokenizers[name].token_bytes()) for name in names
                  if tokenizers[name].hash != tokenizers[base].hash}
        bar = tqdm(batches[base], desc="score", disable=None, leave=False)        # silent unless on a terminal
        rows = measure(models, bar, tokenizers[base].token_bytes(), files, others, prompt, new_tokens,
                       rounds=args.rounds)
        files.pop(base, None)                                    # the memory of the baseline is measured once
        for row in rows:
            row.update(protocol=protocol, command=command, tokenizer=tokenizers[row["name"]].hash[:16],
                       **origin(directories[row["name"]], models[row["name"]].history))
        if args.escalate:
            rows += cascade_rows(models, rows, batches[base], tokenizers[base].token_bytes())
        return rows
    return protocol, rows_of


def origin(directory, history):
    """The part of a row that says which model was measured by which software, and the note."""
    sparse = any(entry["step"] == "sparse" for entry in history)
    note = {"note": "no speed-up expected: zeros are multiplied too"} if sparse else {}
    return {"sha256": checkpoint_hash(directory), "seed": seed_of(history),
            "history": hashlib.sha256(json.dumps(history, sort_keys=True).encode()).hexdigest()[:16],
            "python": platform.python_version(), "torch": torch.__version__, **note}


def measure_command(args, command):
    """--measure: prints the table; with --out writes results.jsonl, report.md, tradeoff.png."""
    directories = by_name(args.measure, "--measure")
    if args.out:
        check_report(args)
    protocol, rows_of = ruler(directories, args, command)
    rows = rows_of(list(directories)[1:])
    text = f"{table(rows)}\n\nText: {protocol}."
    print(f"\n{text}")
    if args.out:
        write_report(rows, text, Path(args.out))


# The chains of --sweep, with the control: the same recovery of the model itself.
SWEEP = ("width:0.75 recover:95", "width:0.75 recover:95 int8", "width:0.75 recover:95 int4:gptq",
         "width:0.5 recover:95", "depth:0.75 recover:95", "vocab:0.75 recover:95", "lowrank:0.8 recover:95",
         "sparse:0.5 recover:95", "int8", "int4", "int4:gptq", "recover:95")
MEASURE_COST = 100                                               # of a model, in steps of training, about


def step_cost(step, args):
    """About how long a step of a chain takes, in steps of training."""
    if step.name == "recover":
        return int(step.value)
    if step.method == "qat":
        return 2 * args.qat_steps
    return args.calibration_windows // 2 if step.text else 5


def chains_of(args, model):
    """The parsed chains of --sweep. Raises UserError for one that cannot be, before any work."""
    chains = [parse_chain(text.split(), STEPS) for text in args.sweep or (SWEEP[:1] if args.smoke else SWEEP)]
    for chain in chains:
        if chain[-1].name == "gguf":
            raise UserError("--sweep measures models, and gguf writes a file for other programs: leave it out")
        check_order(chain, model)
    check_flags(args, [step for chain in chains for step in chain])
    return chains


def make_stages(stages, args, out, progress, costs):
    """Makes the stages {name: steps}; returns ({name: directory}, {name: why it is left out})."""
    directories, left_out = {}, {}
    for name, steps in stages.items():
        if any(name.startswith(f"{other}+") for other in left_out):
            continue
        if name in costs:
            progress.next(name, costs[name])
        try:
            make(steps, args, out)
            directories[name] = out / name
        except UserError as error:                               # a family without such heads, rows without such groups
            left_out[name] = f"- {name}, and what follows it, is left out: {error}"
            tqdm.write(left_out[name])
    if not directories:
        raise UserError(f"nothing is there to measure: {'; '.join(left_out.values()) or 'each chain trains first'}")
    return directories, left_out


def sweep_command(args, command):
    """--sweep: makes and measures each stage of each chain, and writes the report.

    With --resume, stages and rows that are there are neither made nor measured again. One sequence
    of work on lists of stages and rows: most branches are loops.
    """
    out, directory = Path(args.out), find_model(args.model)
    model, tokenizer, base = load(directory), Tokenizer.load(directory), model_name(directory)
    chains = chains_of(args, model)
    args.measure = [args.model]                                  # the model whose history names the text
    scored_text(args, {base: tokenizer}, model.history, calibration_context(model))      # refuses before any work
    open_stages(out, args, (*MEASURING, "device"))
    with resume_hint(out):
        args.run = str(out / "model.run")
        if any(map(needs_text, chains)) and calibration_data(model, tokenizer, args).is_file():
            if any(map(needs_training, chains)):
                print(f"recover and qat, and what comes after them, are left out: they learn from prepared data, and "
                      f"--calibration {args.calibration} is a text file")
            chains = [list(itertools.takewhile(lambda step: not step.trains, chain)) for chain in chains]
    shutil.rmtree(out / "model.run", ignore_errors=True)
    stages = {chain_name(chain[:n]): chain[:n] for chain in chains for n in range(1, len(chain) + 1)}
    base += " before" * (base in stages)
    before = out / "results.jsonl"
    rows = [json.loads(line) for line in before.read_text(encoding="utf-8").splitlines()] if before.exists() else []
    costs = {name: step_cost(steps[-1], args) for name, steps in stages.items()
             if name not in {row["name"] for row in rows}}
    progress = Progress(sum(costs.values()) + MEASURE_COST * len(costs))
    with resume_hint(out):
        directories, left_out = make_stages(stages, args, out, progress, costs)
        directories = {base: directory, **directories}
        protocol, rows_of = ruler(directories, args, command)
        rows = [row for row in rows if row["protocol"] == protocol and row["name"] in directories
                and row["sha256"] == checkpoint_hash(directories[row["name"]])]
        for name in [name for name in directories if name not in {base, *(row["name"] for row in rows)}]:
            progress.next(f"measuring {name}", MEASURE_COST)
            first, row = rows_of([name])
            rows = [*(rows or [first]), row]
            write_lines(rows, out)
    progress.bar.close()
    order = list(directories)
    rows.sort(key=lambda row: order.index(row["name"]))
    text = "\n\n".join(filter(None, (table(rows), f"Text: {protocol}.", step_by_step(rows),
                                     "\n".join(left_out.values()))))
    print(f"\n{text}")
    write_report(rows, text, out, [chain_name(chain) for chain in chains])


def report(cfg, machine, models, val, tokenizer, cached):
    """Measures a distillation and writes report.json, report.md and report.png.

    models   {name: model}: student, and where there are such teacher (first), control, exits
    cached   seconds that the cache of labels took
    """
    out, window = Path(cfg.out), min(m.config.max_position_embeddings for m in models.values())
    with in_dtype(machine):
        rows = compare(models, val.evaluation_batches(max(1, 8192 // cfg.context), cfg.eval_tokens),
                       tokenizer.token_bytes())
    speeds = speed({n: m for n, m in models.items() if n != "control"}, window // 2, max(1, window // 4))
    base, runs = next(iter(rows.values()))["bits_per_byte"], {"student": out, "control": out / "control"}
    for name, row in rows.items():
        figures_of_speed = speeds["student" if name == "control" else name]      # the two have one shape
        row.update({k: v for k, v in figures_of_speed.items() if not k.endswith("_rounds")},
                   parameters=models[name].parameters_count(), quality_kept=base / row["bits_per_byte"])
    for name in runs.keys() & rows.keys():
        state, beforehand = read_state(runs[name]), cached if name == "student" else 0
        rows[name]["seconds"] = state["seconds"] + beforehand
        rows[name]["teacher_seconds"] = float(state["loss"].get("teacher_seconds", 0)) + beforehand
    control = rows["control"]["bits_per_byte"] if "control" in rows else 0
    if control > 1.01 * base:                                    # below 1 % there is no gap to close
        rows["student"]["gap_closed"] = (control - rows["student"]["bits_per_byte"]) / (control - base)
    write_json(out / "report.json", {"models": rows, "config": dataclasses.asdict(cfg)})
    write_distillation(rows, cfg, cached)


def main(argv=None):
    """The command: compares finished models."""
    parser = Parser(__doc__)
    parser.add_argument("measure", nargs="+", metavar="MODEL", help="model directories, or training runs'")
    add = parser.add_argument
    add("--out", metavar="DIR", help="a directory for results.jsonl, report.md and tradeoff.png (default: none)")
    add("--overwrite", action="store_true", help="replace the report that is at --out")
    add("--native", action=argparse.BooleanOptionalAction, default=True, help="kernels in C on a CPU, or PyTorch alone")
    add("--smoke", action="store_true", help="few tokens and two rounds")
    measuring_flags(parser)
    parser.set_defaults(model=None, steps=[], sweep=None, head_bits=None)
    args = parser.parse_args(argv)
    check_together(args, ())
    measure_command(args, "python data/measure.py " + shlex.join(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run(main)
