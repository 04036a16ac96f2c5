"""A training run's directory: its log, its state, its data, and going on after a kill."""
import collections, contextlib, dataclasses, json, lzma, math, os, signal, statistics, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import UserError
from data.checkpoints import checkpoint_hash, model_name, whole
from data.files import MODEL, beside, is_ours, refuse_foreign, remove_tree, replacing_file, settle
from data.hub import read_config
from data.loader import IGNORE, read_meta
from data.machine import all_sum, gathered, launch, part, products_rate, say, sharded_like, synchronize
from data.prepare import find, prepare
from data.schedule import evaluations, is_due, is_falling, new_origin, plan
from data.tokenizer import Tokenizer
from data.values import check_values


class Run:
    """A training run: its directory, log and saves, how far it is, its time budget, and going on after a kill.

    step, total     steps made, and of the whole run (0: the time budget has not become steps yet)
    seconds         of steps and evaluations, over all tries
    tokens          supervised tokens learned from
    best            the lowest validation loss
    origin          see data/schedule.py
    figures         of the last evaluation
    """
    def __init__(self, model, loss_fn, cfg, machine, save, tokenizer, entry, eval_cost, reading):
        self.model, self.loss_fn, self.cfg, self.machine = model, loss_fn, cfg, machine
        self.save, self.tokenizer, self.eval_cost, self.reading = save, tokenizer, eval_cost, reading
        self.out, self.fsdp, self.positions = Path(cfg.out), cfg.fsdp and machine.size > 1, cfg.batch_size * cfg.context
        self.entry, self.parents = dict(entry), list(model.history)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.step, self.total, self.seconds, self.tokens = 0, cfg.steps, 0.0, 0
        self.best, self.origin, self.figures, self.state, self.again = math.inf, (0, 0.0), {}, None, {}
        self.durations, self.overflows, self.saves = collections.deque(maxlen=100), 0, int(cfg.resume)
        self.since = [0, 0.0]                        # steps and their seconds since the last evaluation
        self.learned, self.before = [0.0, 0], (math.inf, math.inf)       # loss and tokens since then; its two losses
        if cfg.resume:
            self.take_up(read_state(self.out))

    def take_up(self, state):
        """Goes on from a state that read_state has read."""
        cfg, self.state = self.cfg, state
        if cfg.steps in (0, state["total"]):                     # what the clock decided is decided again
            self.again = {line["step"]: line for line in read_log(self.out / "log.jsonl")
                          if line["step"] > state["step"]}
        self.origin, self.step, self.total = tuple(state["origin"]), state["step"], cfg.steps or state["total"]
        self.seconds, self.tokens, self.best = state["seconds"], state["tokens"], state["best"]
        self.scaler.load_state_dict(state["scaler"])
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.load_state_dict(state["loss"])
        self.parents.pop()                                       # the last entry is this run's own

    def open(self, optimizers):
        """Begins, or goes on: gives the optimizers their state, opens the log, says what is ahead."""
        self.optimizers, machine, total = optimizers, self.machine, self.total
        own = self.model.history[-1] if self.state else {}
        if self.state:
            check_state(self.state, optimizers, self.out)
        for optimizer, kept in zip(optimizers, self.state["optimizers"] if self.state else ()):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in kept["state"].items() if self.fsdp else ():     # files hold whole tensors
                values.update({k: sharded_like(params[i], v) for k, v in values.items() if v.shape == params[i].shape})
            # learning rates come from this command line, not from the checkpoint
            optimizer.load_state_dict({**kept, "param_groups": optimizer.state_dict()["param_groups"]})
        self.products = products_rate(machine), machine.threads.count        # to say how busy the machine is
        self.log, self.wanted = Log(self.out / "log.jsonl", self.step, machine, self.cfg), Interrupt()
        self.passed = evaluations(self.step, total, self.origin, self.cfg)
        self.saved = self.shown = time.perf_counter()
        if self.state and own.get("val_loss") == self.best and best_loss(self.out) != self.best:
            self.keep("best", **{k: v for k, v in own.items() if k.startswith("val_")})   # killed between two saves
        if total and self.step >= total:
            say(machine, f"{self.out} is at step {self.step} of {total} already: --steps N goes on")
        elif self.state and total != self.state["total"]:
            say(machine, f"from step {self.step} on, the learning rate is that of a run of {total} steps")
        self.bar = tqdm(total=total or None, initial=self.step, desc="training", unit="step", dynamic_ncols=True,
                        disable=None if machine.rank == 0 else True)         # None: off where there is no terminal
        if total and self.reading:
            say(machine, f"{total:,} steps{readings(total, self.positions, self.reading)}")

    @contextlib.contextmanager
    def timed_step(self):
        """Times what is inside as one step, made with as many threads as a run before a kill made it."""
        threads = self.machine.threads
        if len(threads.options) > 1 and self.again.get(self.step + 1, {}).get("threads", threads.count) != threads.count:
            threads.use(self.again[self.step + 1]["threads"])
        start, self.threads = time.perf_counter(), threads.count
        yield
        synchronize(self.machine.device)
        self.taken = time.perf_counter() - start

    def check(self, loss, norm):
        """Raises UserError if a step's loss, or too many gradients in a row, are not finite."""
        if not math.isfinite(loss):
            self.diverged("loss")
        # float16 overflows now and then: the scaler halves its scale, and no optimizer steps. Not for ever, though.
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > (30 if self.scaler.is_enabled() else 0):
            self.diverged("gradient")

    def diverged(self, what):
        raise UserError(f"the {what} is not finite after step {self.step}" +
                        (f"; the last good checkpoint is {self.out / 'last'}" if self.saves else "") +
                        ": lower --lr, --embed-lr and --matrix-lr, or use --dtype float32")

    def note(self, loss, count, norm, metrics, factor):
        """Counts a step, plans the rest of the time budget, writes a line of the log, shows progress."""
        taken, machine = self.taken, self.machine
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + count, self.seconds + taken
        self.durations.append(taken)
        self.plan()
        if self.step + 1 not in self.again and (sentence := machine.threads.note(taken)):
            say(machine, f"step {self.step}: {sentence}")
        loss, rate = loss / max(count, 1), self.positions / taken
        self.since = [self.since[0] + 1, self.since[1] + taken]
        self.log.write(step=self.step, loss=loss, lr=factor, grad_norm=norm, tokens=self.tokens,
                       seconds=round(self.seconds, 3), tokens_per_second=round(rate), total=self.total,
                       threads=self.threads, **{k: v / max(count, 1) for k, v in metrics.items()})
        self.learned = [self.learned[0] + loss * count, self.learned[1] + count]
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if self.bar.disable and time.perf_counter() - self.shown > 30:       # a file or a pipe has lines instead
            self.shown = time.perf_counter()
            say(machine, f"step {self.step}" + f" of {self.total}" * bool(self.total) +
                f": loss {loss:.3f}, {rate:,.0f} tokens/s")
        due = machine.rank == 0 and time.perf_counter() - self.saved > self.cfg.save_seconds
        self.stop, self.due = map(bool, all_sum(machine, torch.tensor([float(self.wanted.stop), float(due)])))

    def plan(self):
        """The number of steps from here on, by the time that the last steps took."""
        cfg, planned, fell = self.cfg, self.total, is_falling(self.step, self.total, self.origin, self.cfg)
        if self.step in self.again:
            self.total = self.again[self.step].get("total", planned)
        elif not cfg.steps and is_due(self.step, planned, fell, cfg):
            a_step = statistics.fmean(list(self.durations)[-40:]) if fell else statistics.median(self.durations)
            self.total = plan(self.step, planned, self.seconds, a_step, self.eval_cost, cfg, self.machine,
                              self.origin if fell else None)
        if self.total != planned:
            self.origin = new_origin(self.step, planned, self.total, self.origin, fell)
            self.bar.total = self.total
            self.bar.refresh()
            if self.reading and not planned:
                say(self.machine, f"{self.total:,} steps{readings(self.total, self.positions, self.reading)}")

    def is_time_to_evaluate(self):
        self.passed, before = evaluations(self.step, self.total, self.origin, self.cfg), self.passed
        self.began = time.perf_counter()
        return self.total > 0 and (self.step == self.total or self.passed > before)

    def is_time_to_save(self):
        return self.stop or self.due

    def note_evaluation(self, figures):
        """Says and logs the figures of an evaluation, and keeps the model."""
        machine, cfg, self.figures = self.machine, self.cfg, figures
        self.seconds += time.perf_counter() - self.began
        if not math.isfinite(figures["loss"]):
            self.diverged("validation loss")
        val = {"val_" + k: v for k, v in figures.items()}
        self.log.write(step=self.step, tokens=self.tokens, seconds=round(self.seconds, 3), **val)
        rate, self.since = self.since[0] * self.positions / self.since[1], [0, 0.0]
        busy = 3 * self.model.flops_per_token(cfg.context) * rate / self.products[0] / machine.size
        mean, self.learned = self.learned[0] / max(1, self.learned[1]), [0.0, 0]
        say(machine, f"step {self.step} of {self.total}, {self.seconds:.0f} s: loss {mean:.4f} in training, "
            f"{figures['loss']:.4f} in validation, perplexity {figures['perplexity']:.2f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte; {rate:,.0f} tokens/s" +
            f", {busy:.0%} of the matmul rate" * (machine.threads.count == self.products[1]))
        if figures["loss"] > self.before[1] and mean < self.before[0]:
            say(machine, "the validation loss rises while the training loss falls: the model learns its text by "
                f"heart. {self.out / 'best'} keeps the model with the lowest validation loss; more text, fewer steps "
                "or --dropout 0.1 help")
        self.before = mean, figures["loss"]
        improved, self.best = figures["loss"] < self.best, min(self.best, figures["loss"])
        self.keep("last", **val)                                 # first: a kill in between loses nothing
        if improved:
            self.keep("best", **val)

    def keep(self, name, **figures):
        """Saves the model as best/ or last/, which also holds what --resume needs."""
        model, machine = self.model, self.machine
        finite = all(part(p).isfinite().all() for p in model.parameters())   # or the last update was one too large
        if all_sum(machine, torch.tensor(float(not finite))):
            self.diverged("model")
        self.saves += 1
        model.history = self.parents + [{**self.entry, "steps": self.step, "tokens": self.tokens,
                                         "seconds": round(self.seconds, 1), **figures}]
        weights, state = gathered(model.state_dict(), machine), self.state_of() if name == "last" else None
        if machine.rank == 0:
            self.save(model, self.out / name, self.tokenizer,
                      state and (lambda new: torch.save(state, new / "training_state.pt")), weights)
            self.log.keep()
            if self.saves == 1 and name == "last" and not math.isfinite(self.best):
                remove(self.out, "best")                         # what --overwrite replaces was kept so far
        self.saved = time.perf_counter()

    def state_of(self):
        """The content of training_state.pt."""
        machine, loss = self.machine, self.loss_fn
        return dict(step=self.step, total=self.total, seconds=self.seconds, tokens=self.tokens, best=self.best,
                    scaler=self.scaler.state_dict(), config=dataclasses.asdict(self.cfg), launch=launch(),
                    optimizers=[gathered(optimizer.state_dict(), machine) for optimizer in self.optimizers],
                    loss=gathered(loss.state_dict(), machine) if isinstance(loss, nn.Module) else {},
                    origin=list(self.origin), threads=machine.threads.count, dtype=str(machine.dtype)[6:])

    def stop_if_asked(self):
        """Ends the run after a Ctrl-C, once last/ is saved. Raises KeyboardInterrupt."""
        if self.stop and self.step != self.total:
            self.bar.close()
            self.log.close()
            say(self.machine, f"stopped at step {self.step}; {self.out / 'last'} holds everything. Go on with "
                f"{Path(sys.argv[0]).name} --resume and the same --out")
            raise KeyboardInterrupt

    def close(self):
        self.bar.close()
        self.log.close()
        self.wanted.restore()


def check_state(state, optimizers, out):
    """Raises UserError if the optimizers' state of a run that goes on is not that of its model."""
    fits = len(state["optimizers"]) == len(optimizers)
    for o, s in zip(optimizers, state["optimizers"]):
        params = [p for g in o.param_groups for p in g["params"]]
        kept = s.get("state") if isinstance(s.get("state"), dict) else {None: None}
        fits = fits and all(i in range(len(params)) and isinstance(its, dict) and all(
            not torch.is_tensor(t) or t.ndim == 0 or t.shape == params[i].shape for t in its.values())
            for i, its in kept.items())
    if not fits:
        raise UserError(f"training_state.pt in {out / 'last'} belongs to another model: start a new run with "
                        f"--init-from {out / 'last'}")


def best_loss(out):
    """The validation loss of OUT/best by its history; None if there is none."""
    file = out / "best" / "config.json"
    history = read_config(out / "best").get("history") if file.is_file() else None
    return history[-1].get("val_loss") if history else None


def remove(out, *names):
    """Deletes models of the run in OUT: best and last, or one of them, and what a kill left beside them."""
    for name in names or ("best", "last"):
        for place in (out / name, *(out / (form.format(name)) for form in (".{}.new", ".{}.old", "{}.new", "{}.old"))):
            remove_tree(place)


def readings(total, positions, reading):
    """How often `total` steps read the training text, as the end of a sentence."""
    times = total * positions / reading
    return f": the training text is read {times:.{1 if times >= 1 else 2}f} times"


class Interrupt:
    """Turns the first Ctrl-C (or a cluster's SIGTERM) into a wish to stop after the step; the next stops at once."""
    def __init__(self):
        self.stop, self.before = False, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):                            # not in the main thread: leave it alone
                self.before[s] = signal.signal(s, self.on_signal)

    def on_signal(self, *_):
        self.stop = True
        self.restore()

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Log:
    """log.jsonl and, if asked for, Weights & Biases. On resume it is cut back to the step that goes on."""
    def __init__(self, path, step, machine, cfg):
        self.file = self.wandb = None
        if machine.rank:
            return
        if cfg.wandb:
            try:
                import wandb
                self.wandb = wandb.init(project=cfg.wandb, name=path.parent.name, config=dataclasses.asdict(cfg))
            except Exception as error:
                raise UserError(f"--wandb {cfg.wandb} failed ({error}): install wandb and run wandb login, set "
                                "WANDB_MODE=offline, or leave the flag out") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        before = [line for line in read_log(path) if line["step"] <= step] if step else []
        other = not step and path.exists()                                   # the log of a run that is to be replaced
        self.path = path.with_name(path.name + ".new") if other else path
        with replacing_file(self.path) as new:                               # a kill must not cost the curve so far
            new.write_text("".join(json.dumps(line) + "\n" for line in before), encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8")

    def keep(self):
        """With the first save of a new run its log takes the place of an old run's."""
        if self.file and self.path.name == "log.jsonl.new":
            self.file.close()
            self.path = self.path.replace(self.path.with_name("log.jsonl"))
            self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **line):
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_log(path):
    """The lines of log.jsonl; a last one that a kill cut short is left out."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


STATE = {"step": (int, 0, 2 ** 48), "total": (int, 0, 2 ** 48), "tokens": (int, 0, 2 ** 62),
         "seconds": (float, 0, 1e12), "best": (float,), "optimizers": ([dict],), "scaler": (dict,), "config": (dict,),
         "threads": (int, 0, 2 ** 20), "dtype": (str,), "launch": (str,)}


def read_state(out):
    """training_state.pt of OUT/last. Raises UserError if it is not there or not whole."""
    file = whole(Path(out) / "last") / "training_state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        check_values(state, STATE, file, needed=[name for name in STATE if name not in ("launch", "threads", "dtype")])
        kept = {"launch": "", "origin": (0, 0.0), "threads": 0, "dtype": ""}      # runs of before do not say
        return {k: state.get(k, v) for k, v in kept.items()} | {k: state[k] for k in (
            "step", "total", "seconds", "tokens", "best", "scaler", "optimizers", "config", "loss")}
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no training_state.pt, so it cannot be resumed: start a new run with "
                        f"--init-from {file.parent}") from None
    except Exception as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): start a new run with --init-from "
                        f"{file.parent}") from None


def is_next_try(out):
    """Whether torchrun has started this process again to go on with OUT/last."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and read_state(out)["launch"] == launch()


def resumed(cfg, given, fixed):
    """The config of the run in cfg.out, with the flags that were given. Raises UserError if they change one of `fixed`.
    """
    stored, given = read_state(cfg.out)["config"], () if is_next_try(cfg.out) else given
    for f in dataclasses.fields(cfg):
        if f.name in stored and type(stored[f.name]) is not type(f.default) and type(stored[f.name]) is not int:
            raise UserError(f"training_state.pt in {cfg.out} has {f.name} = {stored[f.name]!r}: start a new run")
    if stored.keys() - vars(cfg).keys():
        raise UserError(f"the run in {cfg.out} was begun by another script, such as distill.py: resume it with that")
    if "minutes" in given:
        raise UserError("--minutes plans a new run; to go on beyond this one's last step give --steps")
    for name in fixed:
        if name in given and getattr(cfg, name) != stored[name]:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {cfg.out} has "
                            f"{stored[name]}: leave the flag out, or give another --out")
    return type(cfg)(**{**stored, **{name: getattr(cfg, name) for name in given}, "out": cfg.out, "resume": True,
                        "fsdp": cfg.fsdp})


BEGUN = {"best", "last", "cache", "control", "samples", "samples.jsonl", "log.jsonl.new"}


def is_saved(directory):
    """Whether best/ or last/ of a run is there, or was when a save was killed."""
    return any((place / "config.json").is_file() for place in (directory, beside(directory, "new"),
                                                               beside(directory, "old")))


def check_out(cfg):
    """Sets cfg.resume to whether the run in OUT goes on. Raises UserError if the run may not be written there.

    In torchrun's next try of the run that OUT/last holds (--max-restarts) it does, whatever the flags say.
    """
    out = Path(cfg.out)
    if out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} is a {'file' if out.is_file() else 'model'}, not a run's directory: give another "
                        "--out")
    for d in ("best", "last"):
        refuse_foreign(out / d, MODEL)
    last, held = is_saved(out / "last"), is_saved(out / "last") or is_saved(out / "best")
    for file in sorted(out.iterdir()) if out.is_dir() and not held else ():             # of a run before its first save
        log = file.name in ("log.jsonl", ".log.jsonl.new") and (not file.stat().st_size or read_log(file))
        if not log and not is_ours(file.name, BEGUN):
            raise UserError(f"--out {out} holds {file.name}, which is no part of a run: give another --out")
    if last and is_next_try(out):
        cfg.resume, cfg.overwrite = True, False
    if held and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{out} holds a model already: go on with --resume, replace it with --overwrite, or give "
                        "another --out")
    if cfg.init_from and not cfg.resume and whole(cfg.init_from).resolve().parent == out.resolve():
        raise UserError(f"--init-from {cfg.init_from} is the run that --out {out} would replace: give another --out")
    if cfg.resume and not held:
        cfg.resume = False
        if os.environ.get("RANK", "0") == "0":
            print(f"nothing is saved in {out} yet: starting from the beginning")
    if cfg.resume and os.environ.get("RANK", "0") == "0":
        settle(out / "best", MODEL), settle(out / "last", MODEL)
        for d in ("best.new", "best.old", "last.new", "last.old"):            # a kill of an older version left them
            if (out / d).is_dir() and (out / d.split(".")[0] / "config.json").exists():
                remove_tree(out / d)


def open_data(cfg, given, machine):
    """The directory of prepared data; a known corpus that is missing is prepared, by one process for all."""
    if machine.rank == 0 and find(cfg.data, cfg.smoke) is None:
        prepare(cfg.data, vocab_size=cfg.vocab_size, smoke=cfg.smoke)
    if machine.size > 1:
        dist.barrier()
    if (directory := find(cfg.data, cfg.smoke)) is None:
        raise UserError(f"the data {cfg.data} is on the first machine only: prepare or copy it on this one too")
    meta = read_meta(directory)
    ids = meta["vocab_size"]
    if Tokenizer.load(directory).hash != meta["tokenizer_hash"]:
        raise UserError(f"{directory}: tokenizer.json is not the one that the data was prepared with: prepare it anew")
    if "vocab_size" in given and cfg.vocab_size != ids:
        raise UserError(f"--vocab-size is {cfg.vocab_size}, but {cfg.data} was prepared with {ids} ids: prepare it "
                        "anew with data/prepare.py --vocab-size, or leave the flag out")
    return directory


def history_entry(cfg, meta, tokenizer, model):
    """What config.json will say of this run. Raises UserError if a resumed run's data is not what it was."""
    if cfg.resume:
        entry = model.history[-1] if model.history else {}
        if "data_sha256" not in entry:
            raise UserError(f"the model in {cfg.out} does not say what it learned: start a new run with --init-from "
                            f"{cfg.out}")
        if entry["data_sha256"] != meta["sha256"]:
            raise UserError(f"the data {cfg.data} is not what this run began with: prepare that again, or start a new "
                            f"run with --init-from {cfg.out}")
        return {k: v for k, v in entry.items() if not k.startswith("val_")}
    entry = {"step": "train", "data": meta["name"], "data_sha256": meta["sha256"], "tokenizer": tokenizer.hash[:16],
             "seed": cfg.seed, "batch_size": cfg.batch_size, "context": cfg.context}
    if cfg.init_from:
        entry["parent"] = {"name": model_name(cfg.init_from), "sha256": checkpoint_hash(cfg.init_from)}
    return entry


def show_example(machine, tokenizer, batch):
    """Prints the last example of a window, so that a wrong mask or template is seen before it costs an hour."""
    its = batch.segments[0] == batch.segments[0].max()
    ids, targets = batch.ids[0][its], batch.targets[0][its]
    first = int((targets != IGNORE).int().argmax())
    short = lambda text: text if len(text) < 500 else f"{text[:300]} [...] {text[-100:]}"
    text = lambda ids: short(tokenizer.decode_bytes(ids.tolist()).decode("utf-8", errors="replace"))
    say(machine, f"An example. What is read only:\n{text(ids[:first + 1])}\nWhat is learned:\n"
        f"{text(targets[targets != IGNORE])}\n")


def show_scale(cfg, tokenizer, val):
    """Prints what bits per byte mean, by a general compressor on the beginning of the same validation text."""
    text = tokenizer.decode_bytes(val.tokens[:2 ** 18].tolist())
    squeezed = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(text))
    made = read_config(whole(cfg.out))["history"][-1]
    print(f"bits per byte: 8 where nothing is known, {squeezed:.2f} by xz -9e on {len(text) / 1e6:.1f} MB of this "
          f"validation text, {made['val_bits_per_byte']:.2f} by this model; {Path(cfg.out) / 'loss.png'} has the curve")


