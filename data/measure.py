"""Measuring and comparing models: loss, speed, memory, answers. The one ruler of all tables."""
import array, collections, dataclasses, functools, hashlib, itertools, json, math, platform, shutil
import statistics, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from compress import STEPS, make
from data import UserError
from data.chain import (MEASURING, chain_name, check_flags, check_order, needs_text, needs_training, open_stages,
                        parse_chain, told_how_to_go_on)
from data.checkpoints import by_name, checkpoint_hash, model_name, tokenizer_of, whole
from data.files import replacing_file, write_json
from data.heldout import is_answers, token_f1, words_of
from data.machine import accelerate, how_quantized_layers_run, in_dtype, pick_device, threads_for
from data.report import Progress, check_report, evaluation_table, step_by_step, table, write_lines, write_report
from data.runs import read_log, read_state
from data.sources import calibration_context, calibration_data, last_training, scored_text, seed_of
from data.speed import one_turn, peak_alone, random_ids
from data.tokenizer import Tokenizer
from model import load
from sample import (at_positions, cascade, continuations, figures, generate, lead, open_model, readable_pieces,
                    refuse_not_a_number, score, token_losses)


@torch.inference_mode()
def compare(models, batches, token_bytes):
    """How well each of `models` ({name: model}, the first is the baseline) predicts the same tokens, and how far it is
    from the baseline there: {name: `figures` and

    kl           mean over tokens of KL(baseline || model) in nats; kl_p999: what 99.9 % of the tokens do not exceed
    agreement    share of tokens where both find the same id the likeliest}

    The models share a tokenizer; rows of padding ids may differ, so distances are between the distributions over the
    len(token_bytes) real ids. Never holds more than 2^21 logits of a model.
    """
    device, ids = next(next(iter(models.values())).parameters()).device, len(token_bytes)
    token_bytes = torch.as_tensor(token_bytes, device=device)
    rows = max(1, 2 ** 21 // max(m.config.vocab_size for m in models.values()))
    # Numbers, not tensors: small tensors that are kept pin the memory of the logits that were freed beside them.
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
    """How fast each of `models` ({name: model}, the first is the baseline) goes through `generate`, or what `writers`
    ({name: function}) has instead, likeliest token first, as a user's text does: {name: {...}}. It continues `prompt`,
    ids (B, T), or random ones, as no kernel here is faster for one text than for another. The models take turns,
    `rounds` times after one turn to warm up, so that a slow moment of the machine meets all. Medians over the rounds;
    *_x are medians of each round's ratio to the baseline's.

    prefill_tokens_per_s    batch_size x prompt_tokens over the time to the first new token
    decode_tokens_per_s     batch_size x new_tokens over the time from there to the last; prefill has no part in it
    first_token_ms, token_p50_ms, token_p95_ms     the wait for the first token, and for each later one
    joules_per_token        of decoding, all the device drew in that time; None without a counter we may read
    prefill_rounds, decode_rounds                  tokens/s of each round, in order

    Raises UserError if prompt and new tokens exceed a window: what a full window costs is another question.
    """
    for name, model in models.items():
        window = model.config.max_position_embeddings
        if prompt_tokens + new_tokens > window:
            raise UserError(f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than {name}'s window of "
                            f"{window}: lower one of the two")
    taken = {name: [] for name in models}
    for i in range(1 + rounds):
        for name, model in models.items():
            ids = random_ids(model, batch_size, prompt_tokens) if prompt is None else prompt
            turn = one_turn((writers or {}).get(name, functools.partial(generate, model)), ids, new_tokens, clock)
            if i:
                taken[name].append(turn)
    result, median = {}, statistics.median
    for name, turns in taken.items():
        waits = sorted(wait for turn in turns for wait in turn.waits)
        rates = {"prefill": [batch_size * prompt_tokens / turn.first for turn in turns],
                 "decode": [batch_size * new_tokens / sum(turn.waits) for turn in turns]}
        joules = None if None in [turn.joules for turn in turns] else sum(turn.joules for turn in turns)
        row = {"first_token_ms": 1000 * median(turn.first for turn in turns), "token_p50_ms": 1000 * median(waits),
               "token_p95_ms": 1000 * waits[math.ceil(0.95 * len(waits)) - 1],
               "joules_per_token": None if joules is None else joules / (rounds * batch_size * new_tokens)}
        for phase, values in rates.items():
            row.update({f"{phase}_tokens_per_s": median(values), f"{phase}_rounds": values})
            base = next(iter(result.values()), row)[f"{phase}_rounds"]
            row[f"{phase}_x"] = median(mine / its for mine, its in zip(values, base))
        result[name] = row
    return result


def measure(models, batches, token_bytes, directories=None, other_text=None, prompt_tokens=256, new_tokens=64,
            rounds=5):
    """The rows of every table of this project: one dict a model, size, quality and speed of the same loaded object.

    models        {name: model}, on their device; the first is the baseline the others are compared with
    batches, token_bytes     what is scored, see `score`
    directories   {name: where it was loaded from}, for the figures of files and of a process of its own
    other_text    {name: (batches, token_bytes)}: the same text for a model with another tokenizer than the baseline's,
                  of which only bits per byte can be compared. Its kl, kl_p999 and agreement are None

    A row holds name, `figures`, what `compare` and `speed` give, and
    parameters, resident_bytes, bits_per_weight     see Transformer; tied weights once, scales included
    file_bytes    of model.safetensors, or its shards; the tokenizer comes on top, the same for all
    peak_bytes, empty_bytes    most memory of a fresh process that loads this model and generates, and what of it Python
                  and torch have without any (see peak_alone)
    device, dtype, threads, quantized_layers (how they multiply), prompt_tokens, new_tokens, batch_size, rounds
    None stands for what could not be measured, never for an estimate.
    """
    directories, other_text = directories or {}, other_text or {}
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    speeds, rows = speed(models, prompt_tokens, new_tokens, rounds=rounds), []
    quality = compare({n: m for n, m in models.items() if n not in other_text}, batches, token_bytes)
    for name, (its_batches, its_bytes) in other_text.items():
        alone = compare({name: models[name]}, its_batches, its_bytes)[name]
        quality[name] = {**alone, "kl": None, "kl_p999": None, "agreement": None}
    for name, model in models.items():
        parameters, resident, where = model.parameters_count(), model.resident_bytes(), directories.get(name)
        files = whole(where).glob("*.safetensors") if where else ()
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
    """`lead` at each position of a batch, (B, T); infinite where there is nothing to be predicted."""
    return at_positions(model, batch, lambda logits, targets: lead(logits).where(targets >= 0, math.inf))


def margin_for(share, sure):
    """The margin by which `cascade` hands over this share (0 to 1) of tokens, whose leads are `sure`."""
    found = sure[sure < math.inf].sort().values
    return float(found[min(int(share * len(found)), len(found) - 1)])


def cascade_curve(small, big, batches, token_bytes, shares):
    """What `cascade` makes of a text if it hands over a share of its tokens: for each of `shares` a dict, `figures` and

    share, margin     handed over, and the margin that does it
    big_reads         share of the tokens that the big model reads: in each window up to the last one handed over. A
                      cascade saves passes of the big model, and thus time, but hardly any multiplications
    multiplications   per token: matrices of the small model, and those of the big one for what it reads
    """
    device, token_bytes = next(small.parameters()).device, torch.as_tensor(token_bytes)
    kept = [array.array(code) for code in "fffq"]                # numbers, not tensors: see `compare`
    for batch in batches:
        batch = type(batch)(*(None if t is None else t.to(device) for t in batch))
        for numbers, t in zip(kept, (leads(small, batch), token_losses(small, batch), token_losses(big, batch),
                                     batch.targets)):
            numbers.extend(t.flatten().tolist())
    sure, nats, its, targets = (                                 # (windows, T) each
        torch.frombuffer(numbers, dtype=kind).view(-1, batch.targets.shape[1])
        for numbers, kind in zip(kept, (*[torch.float32] * 3, torch.int64)))
    learned, result = targets >= 0, []
    n_bytes = token_bytes[targets[learned]].sum()
    for share in shares:
        over = sure < (margin := margin_for(share, sure))
        reads = float((over * torch.arange(1, over.shape[1] + 1)).amax(1).sum() / over.numel())
        result.append({"share": share, "margin": margin, "big_reads": reads,
                       "multiplications": small.matmul_parameters() + reads * big.matmul_parameters(),
                       **figures(torch.where(over, its, nats).double().sum(), learned.sum(), n_bytes)})
    return result


def cascade_rows(models, rows, batches, token_bytes, shares=(0.1, 0.25, 0.5)):
    """Rows for `table` of the first two of `models` in a cascade, beside those that `measure` gave. What is timed goes
    on from the beginning of the text that is scored, and hands over another share: see "note"."""
    base, its = list(models)[:2], dict(zip(models, rows))
    small, big = sorted(base, key=lambda name: models[name].matmul_parameters())
    curve = cascade_curve(models[small], models[big], batches, token_bytes, shares)
    names = [f"{small} + {big} {point['share']:.0%}" for point in curve]
    counts = {name: collections.Counter() for name in names}
    writers = {name: functools.partial(cascade, models[small], models[big], margin=point["margin"], counts=counts[name])
               for name, point in zip(names, curve)}
    first = its[base[0]]
    prompt = batches[0].ids[:1, :first["prompt_tokens"]].to(next(models[small].parameters()).device)
    speeds = speed({base[0]: models[base[0]], **dict.fromkeys(names, models[small])}, prompt.shape[1],
                   first["new_tokens"], 1, first["rounds"], prompt=prompt, writers=writers)
    both = {key: its[small][key] + its[big][key] for key in ("parameters", "file_bytes", "resident_bytes", "sha256")
            if its[small].get(key) and its[big].get(key)}
    unknown = dict.fromkeys(("peak_bytes", "empty_bytes", "kl", "kl_p999", "agreement", "quantized_layers"))
    return [{**first, **both, **unknown, "bits_per_weight": 8 * both["resident_bytes"] / both["parameters"], **point,
             **speeds[name], "name": name, "note": f"handed over while timed: "
             f"{counts[name]['escalated'] / counts[name]['tokens']:.0%}"}
            for name, point in zip(names, curve)]


def response_loss(model, tokenizer, prompt, response, token_bytes):
    """[nats, tokens, bytes] of a response and its end, given the prompt in the chat template; see `score`. What is
    longer than the window is read in pieces, each behind half a window."""
    from data.loader import Windows                              # here: to run a model needs no data
    from data.prepare import encode_example
    ids, mask = encode_example(tokenizer, prompt, response)
    windows = Windows.of([(ids, mask)], min(model.config.max_position_embeddings, len(ids) - 1))
    batches = (batch._replace(segments=None) for batch in windows.evaluation_batches(8))       # a piece a window
    return score(model, batches, token_bytes).tolist()


def evaluate(model, tokenizer, lines, answered, max_new_tokens, name=""):
    """What a model makes of heldout.Lines, a dict each: nats, tokens and bytes of the response; with choices `chosen`,
    whether it has the fewest bits per byte of them; for the line numbers in `answered` the greedy answer, its f1 and
    whether it is exact, both by words_of."""
    from tqdm import tqdm
    rows, token_bytes, unread = [], tokenizer.token_bytes(), 0
    for i, line in enumerate(tqdm(lines, desc=name, unit="line", disable=None, leave=False)):
        losses = {text: response_loss(model, tokenizer, line.prompt, text, token_bytes)
                  for text in dict.fromkeys((line.response, *line.choices))}
        refuse_not_a_number(list(losses.values()))
        nats, tokens, size = losses[line.response]
        row = {"nats": nats, "tokens": int(tokens), "bytes": int(size)}
        if line.choices:
            bits = {text: its_nats / max(1, its_bytes) for text, (its_nats, _, its_bytes) in losses.items()}
            row["chosen"] = min(line.choices, key=bits.get) == line.response
        prompt = tokenizer.render([{"role": "user", "content": line.prompt}])
        unread += len(tokenizer.encode(prompt, special=True)) > model.config.max_position_embeddings
        if i in answered:
            stream = map(int, continuations(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=0))
            answer = "".join(readable_pieces(tokenizer, stream, tokenizer.eos_ids)).strip()
            row.update(answer=answer, f1=token_f1(answer, line.response),
                       exact=words_of(answer) == words_of(line.response))
        rows.append(row)
    if unread:
        print(f"{unread:,} prompts exceed {name}'s window of {model.config.max_position_embeddings} tokens: only their "
              "end is read", file=sys.stderr)
    return rows


def evaluate_command(args):
    """--eval: prints the table; with --out writes a line for each model and prompt."""
    from data import heldout                                     # here: to run a model needs no data
    from data.prepare import find
    directories, text, is_file = by_name(args.model, "--eval"), None, args.eval.endswith(".jsonl")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a directory: give the name of a file")
    if args.out and Path(args.out).exists() and not args.overwrite:
        raise UserError(f"--out {args.out} is there already: give another name or --overwrite")
    if args.out and Path(args.out).exists() and not is_answers(args.out):
        raise UserError(f"--out {args.out} is not a file that --eval wrote, so --overwrite does not replace it: give "
                        "another name")
    if args.data and not is_file:
        raise UserError(f"--eval {args.eval} is prepared data, with its own training text: leave out --data")
    flag, wanted = ("--data", args.data) if args.data else ("--eval", args.eval)
    directory = find(wanted, args.smoke, flag) if args.data or not is_file else None
    if directory is None and (args.data or not is_file):
        raise UserError(f"{flag} {wanted} is not prepared yet: python data/prepare.py {wanted}")
    lines = heldout.read(args.eval if is_file else directory / "val.jsonl")
    lines = lines[:8 if args.smoke else None]
    groups = {"all": list(range(len(lines)))}
    if directory:
        text = functools.partial(heldout.training_text, directory, Tokenizer.load(directory))
        shares = heldout.overlap(lines, text())
        labels = list(map(heldout.group, shares))
        groups |= {f"overlap {group}": [i for i, its in enumerate(labels) if its == group] for group in heldout.GROUPS}
    if args.by:
        lacking = next((line for line in lines if args.by not in line.fields), None)
        if lacking:
            raise UserError(f"{lacking.place}: it has no field {args.by!r}, which --by names")
        values = [str(line.fields[args.by]) for line in lines]
        groups |= {f"{args.by} {v}": [i for i, its in enumerate(values) if its == v] for v in sorted(set(values))}
    count = min(args.answers, len(lines))
    answered = {i * len(lines) // count for i in range(count)}                    # spread over the file
    device, results = pick_device(args.device), {}
    threads_for(None, args.threads or torch.get_num_threads(), device)
    for name, directory in directories.items():
        start, (model, tokenizer) = time.perf_counter(), open_model(directory, device, args.native)
        results[name] = evaluate(model, tokenizer, lines, answered, args.max_new_tokens, name)
        print(f"[{name}: {len(lines):,} responses scored, {count} prompts answered in "
              f"{time.perf_counter() - start:.0f} s]", file=sys.stderr)
    for rows in results.values() if text else ():
        spans = heldout.verbatim([rows[i]["answer"] for i in sorted(answered)], text())
        for i, its in zip(sorted(answered), spans):
            rows[i]["spans"] = its
    print(evaluation_table(results, {name: its for name, its in groups.items() if its}))
    print(f"\nBits per byte of {len(lines):,} responses given their prompts, in each model's chat template; token-F1 "
          f"and exact match of {count} greedy answers of at most {args.max_new_tokens} tokens; in brackets 95 % "
          "intervals of the difference (paired bootstrap over lines)." + (
              " Overlap: the share of a response's 8-word spans that stand in the training text; verbatim: of an "
              "answer's 50-byte spans." if text else ""))
    if args.out:
        with replacing_file(Path(args.out)) as new, open(new, "w", encoding="utf-8", newline="\n") as file:
            for name, rows in results.items():
                for i, (line, row) in enumerate(zip(lines, rows)):
                    more = {"overlap": round(shares[i], 4)} if text else {}
                    file.write(json.dumps({**line.fields, "model": name, **more, **row}) + "\n")
        print(f"wrote {args.out}")


def ruler(directories, args, command):
    """(protocol, rows_of): what is scored, in words, and a function of names in `directories` ({name: model directory})
    that gives the rows of the first one there and of these, measured together."""
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = {name: load(directory) for name, directory in directories.items()}          # mapped: nothing is read yet
    tokenizers = {name: tokenizer_of(model, directories[name]) for name, model in models.items()}
    if args.escalate and (len(models) != 2 or len({tokenizer.hash for tokenizer in tokenizers.values()}) > 1):
        raise UserError("--escalate measures two models at work together, a small and a large one with the same "
                        "tokenizer: compress.py --measure SMALL BIG --escalate")
    base, files = next(iter(models)), dict(directories)
    window = min(model.config.max_position_embeddings for model in models.values())
    context = last_training(models[base].history).get("context", 512)
    new_tokens = args.new_tokens or max(1, min(64, window // 4))
    prompt = args.prompt_tokens or max(1, min(256, window - new_tokens))
    if prompt + new_tokens > window:
        raise UserError(f"a prompt of {prompt} tokens and {new_tokens} new ones are more than the smallest window, "
                        f"{window}: lower --prompt-tokens or --new-tokens")
    protocol, batches = scored_text(args, tokenizers, models[base].history, min(window, context))
    print(f"measuring {', '.join(models)} on {device}: {protocol}", flush=True)

    def rows_of(names):
        dtype = torch.float32 if device.type == "cpu" else None                   # a CPU is slow at 16 bits
        models = {name: accelerate(load(directories[name], device, dtype), args.native) for name in (base, *names)}
        others = {name: (batches[name], tokenizers[name].token_bytes()) for name in names
                  if tokenizers[name].hash != tokenizers[base].hash}
        bar = tqdm(batches[base], desc="score", disable=None, leave=False)        # silent unless on a terminal
        rows = measure(models, bar, tokenizers[base].token_bytes(), files, others, prompt, new_tokens,
                              rounds=args.rounds)
        files.pop(base, None)                                    # its memory is measured once
        for row in rows:
            history = models[row["name"]].history
            row.update(protocol=protocol, command=command, tokenizer=tokenizers[row["name"]].hash[:16],
                       sha256=checkpoint_hash(directories[row["name"]]), seed=seed_of(history),
                       history=hashlib.sha256(json.dumps(history, sort_keys=True).encode()).hexdigest()[:16],
                       python=platform.python_version(), torch=torch.__version__)
            if any(entry["step"] == "sparse" for entry in history):
                row["note"] = "no speed-up expected: zeros are multiplied too"
        if args.escalate:
            rows += cascade_rows(models, rows, batches[base], tokenizers[base].token_bytes())
        return rows
    return protocol, rows_of


def measure_command(args, command):
    """--measure: prints the table and, with --out, writes results.jsonl, report.md and tradeoff.png."""
    directories = by_name(args.measure, "--measure")
    if args.out:
        check_report(args)
    protocol, rows_of = ruler(directories, args, command)
    rows = rows_of(list(directories)[1:])
    text = f"{table(rows)}\n\nText: {protocol}."
    print(f"\n{text}")
    if args.out:
        write_report(rows, text, Path(args.out))


def sweep_command(args, command):
    """--sweep: makes and measures what each stage of the chains makes of the model, and writes the report. Stages and
    rows that are there, with --resume, are neither made nor measured again."""
    out, directory = Path(args.out), whole(args.model)
    model, tokenizer, base = load(directory), Tokenizer.load(directory), model_name(directory)
    chains = [parse_chain(text.split(), STEPS) for text in args.sweep or (SWEEP[:1] if args.smoke else SWEEP)]
    for chain in chains:
        if chain[-1].name == "gguf":
            raise UserError("--sweep measures models, and gguf writes a file for other programs: leave it out")
        check_order(chain, model)
    check_flags(args, [step for chain in chains for step in chain])
    args.measure = [args.model]                                  # where a text for the models is looked for
    scored_text(args, {base: tokenizer}, model.history, calibration_context(model))      # is there one?
    open_stages(out, args, MEASURING)
    with told_how_to_go_on(out):
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
    costs = {name: 100 + cost(steps[-1], args) for name, steps in stages.items()}
    there = {row["name"] for row in rows}
    progress = Progress(sum(c for name, c in costs.items() if name not in there))
    directories, left_out = {base: directory}, {}
    with told_how_to_go_on(out):
        for name, steps in stages.items():
            if any(name.startswith(f"{other}+") for other in left_out):
                continue
            if name not in there:
                progress.next(name, costs[name] - 100)
            try:
                make(steps, args, out)
                directories[name] = out / name
            except UserError as error:                           # a family without such heads, rows without such groups
                left_out[name] = f"- {name}, and what follows it, is left out: {error}"
                tqdm.write(left_out[name])
        if len(directories) == 1:
            raise UserError(f"nothing is there to measure: {'; '.join(left_out.values()) or 'each chain trains first'}")
        protocol, rows_of = ruler(directories, args, command)
        rows = [row for row in rows if row["protocol"] == protocol and row["name"] in directories
                and row["sha256"] == checkpoint_hash(directories[row["name"]])]
        for name in [name for name in directories if name not in {row["name"] for row in rows}]:
            if name != base:
                progress.next(f"measuring {name}", 100)
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


def cost(step, args):
    """About how long a step takes, in steps of training; measuring what it made takes about 100."""
    if step.name == "recover":
        return int(step.value)
    return 2 * args.qat_steps if step.method == "qat" else args.calibration_windows // 2 if step.text else 5


# What --sweep makes, with the control: the same recovery of the model itself. With --smoke the first one
SWEEP = ("width:0.75 recover:95", "width:0.75 recover:95 int8", "width:0.75 recover:95 int4:gptq",
         "width:0.5 recover:95", "depth:0.75 recover:95", "vocab:0.75 recover:95", "lowrank:0.8 recover:95",
         "sparse:0.5 recover:95", "int8", "int4", "int4:gptq", "recover:95")


COLUMNS = (("parameters", "parameters", "{:,}"), ("bits per byte", "bits_per_byte", "{:.4f}"),
           ("perplexity", "perplexity", "{:.2f}"), ("quality kept", "quality_kept", "{:.1%}"),
           ("gap closed", "gap_closed", "{:.0%}"), ("same top token", "agreement", "{:.1%}"),
           ("decode", "decode_x", "{:.2f} x"), ("prefill", "prefill_x", "{:.2f} x"), ("time", "seconds", "{:.0f} s"),
           ("of it teacher", "teacher_seconds", "{:.0f} s"))


def report(cfg, machine, models, val, tokenizer, cached):
    """Measures `models` ({name: model}; "teacher" first, if it can be compared) on the same text, and writes
    report.json, report.md and report.png. `cached`: seconds that making the cache took."""
    out, window = Path(cfg.out), min(m.config.max_position_embeddings for m in models.values())
    with in_dtype(machine):
        rows = compare(models, val.evaluation_batches(max(1, 8192 // cfg.context), cfg.eval_tokens),
                              tokenizer.token_bytes())
        speeds = speed({n: m for n, m in models.items() if n != "control"}, window // 2, max(1, window // 4))
    base, states = next(iter(rows.values()))["bits_per_byte"], {"student": read_state(out)}
    if "control" in models:
        states["control"] = read_state(out / "control")
    for name, row in rows.items():
        its = speeds["student" if name == "control" else name]               # they have one shape
        row.update({k: v for k, v in its.items() if not k.endswith("_rounds")},
                   parameters=models[name].parameters_count(), quality_kept=base / row["bits_per_byte"])
    for name, state in states.items():
        rows[name]["seconds"] = state["seconds"] + cached * (name == "student")
        rows[name]["teacher_seconds"] = float(state["loss"].get("teacher_seconds", 0)) + cached * (name == "student")
    ours, lines = rows["student"], ["| model | " + " | ".join(head for head, _, _ in COLUMNS) + " |",
                                    "|---" * (len(COLUMNS) + 1) + "|"]
    if "control" in rows:
        control = rows["control"]["bits_per_byte"]
        if control > 1.01 * base:                     # of less there is nothing to close
            ours["gap_closed"] = (control - ours["bits_per_byte"]) / (control - base)
    lines += ["| " + " | ".join([name, *(form.format(row[key]) if key in row else "" for _, key, form in COLUMNS)])
              + " |" for name, row in rows.items()]
    if ours["bits_per_byte"] < base and not cfg.exits:
        lines += ["", f"Warning: at {base:.4f} bits per byte the teacher is worse than the student, at "
                      f"{ours['bits_per_byte']:.4f}: train the teacher longer."]
    if "control" in rows:
        won = control - ours["bits_per_byte"]
        lines += ["", f"The teacher was worth its cost: {won:.4f} bits per byte below the control." if won > 0 else
                      f"The teacher was not worth its cost: {-won:.4f} bits per byte above the control."]
    with replacing_file(out / "report.md") as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(out / "report.json", {"models": rows, "config": dataclasses.asdict(cfg)})
    print("\n" + "\n".join(lines))
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("report.png is skipped: matplotlib is not installed")
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, where, later, color in (("teacher", whole(cfg.teacher).parent, 0, "0.6"),
                                      ("student", out, cached, "tab:blue"),
                                      ("control", out / "control", 0, "tab:orange")):
        points = [(later + line["seconds"], line["val_bits_per_byte"]) for line in read_log(where / "log.jsonl")
                  if "val_bits_per_byte" in line] if name in rows else []
        if points:
            ax.plot(*zip(*points), "o-", color=color, label=f"{name}: {rows[name]['bits_per_byte']:.3f}")
        elif name in rows:
            ax.axhline(rows[name]["bits_per_byte"], color=color, label=f"{name}: {rows[name]['bits_per_byte']:.3f}")
    ax.set(xlabel="seconds of training, evaluation and teacher", ylabel="validation, bits per byte", title=out.name)
    ax.legend()
    ax.grid(alpha=0.3)
    with replacing_file(out / "report.png") as new:
        fig.savefig(new, dpi=120, format="png")
    plt.close(fig)
