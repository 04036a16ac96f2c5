"""A training run's directory: log, saves, data, and resuming after a kill."""
import collections, contextlib, dataclasses, math, os, signal, statistics, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import UserError
from data.checkpoints import checkpoint_hash, find_model, model_name
from data.files import MODEL, beside, is_ours, refuse_foreign, remove_tree, settle
from data.hub import read_config
from data.loader import read_meta
from data.log import Log, read_log
from data.machine import products_rate, synchronize
from data.prepare import find, prepare
from data.processes import all_sum, gathered, launch, local_part, say, sharded_like
from data.schedule import Trend, evaluations, is_due, is_falling, new_origin, plan, regularization
from data.screen import evaluation_line, readings_line
from data.tokenizer import Tokenizer
from data.values import check_values

SHAPE = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "tie")               # settings of a new model only
FIXED = (*SHAPE, *"preset data mix init_from vocab_size context batch_size optimizer seed".split())      # of a run


class Run:
    """A training run: directory, log, saves, progress, time budget, resuming; see train.fit.

    step, total     steps done, and steps of the whole run (0: the time budget is not yet converted)
    seconds         of steps and evaluations, over all attempts
    tokens          supervised tokens so far
    best            lowest validation loss
    origin          see data/schedule.py
    figures         of the last evaluation
    """
    def __init__(self, model, loss_fn, cfg, machine, save_model, tokenizer, entry, eval_cost, reading,
                 bytes_per_token):
        self.model, self.loss_fn, self.cfg, self.machine = model, loss_fn, cfg, machine
        self.save_model, self.tokenizer, self.eval_cost = save_model, tokenizer, eval_cost
        self.reading, self.bytes_per_token = reading, bytes_per_token
        self.out, self.positions = Path(cfg.out), cfg.batch_size * cfg.context
        self.entry, self.parents = dict(entry), list(model.history)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.step, self.total, self.seconds, self.tokens = 0, cfg.steps, 0.0, 0
        self.best, self.origin, self.figures = math.inf, (0, 0.0), {}
        self.durations, self.overflows, self.saves = collections.deque(maxlen=100), 0, int(cfg.resume)
        self.since, self.trend = collections.Counter(), Trend()              # since: steps and seconds, as in Trend
        self.state, self.replay = None, {}               # of a resumed run: training_state.pt; {step: lost log line}
        if cfg.resume:
            self.restore(read_state(self.out))

    def restore(self, state):
        """Continues from a state that read_state has read."""
        cfg, self.state = self.cfg, state
        if cfg.steps in (0, state["total"]):             # decisions by the clock are repeated from the log
            self.replay = {line["step"]: line for line in read_log(self.out / "log.jsonl")
                           if line["step"] > state["step"]}
        self.origin, self.step, self.total = tuple(state["origin"]), state["step"], cfg.steps or state["total"]
        self.seconds, self.tokens, self.best = state["seconds"], state["tokens"], state["best"]
        self.trend.numbers.update(state["trend"])
        self.scaler.load_state_dict(state["scaler"])
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.load_state_dict(state["loss"])
        self.parents.pop()                               # the last history entry is the entry of this run

    def open(self, optimizers, average):
        """Starts the log and the progress bar; on resume, restores optimizers and average first."""
        self.optimizers, self.average, machine, total = optimizers, average, self.machine, self.total
        if self.state:
            load_optimizers(optimizers, self.state, self.out)
            load_average(average, self.state, self.out)
        self.matmul = products_rate(machine), machine.threads.count          # to print how busy the machine is
        self.log, self.interrupt = Log(self.out / "log.jsonl", self.step, machine, self.cfg), Interrupt()
        self.evaluated = evaluations(self.step, total, self.origin, self.cfg)
        self.last_save = self.last_line = time.perf_counter()
        if self.state:
            self.finish_saves()
        if total and self.step >= total:
            say(machine, f"{self.out} is at step {self.step} of {total} already: --steps N goes on")
        elif self.state and total != self.state["total"]:
            say(machine, f"from step {self.step} on, the learning rate is that of a run of {total} steps")
        self.bar = tqdm(total=total or None, initial=self.step, desc="training", unit="step", dynamic_ncols=True,
                        disable=None if machine.rank == 0 else True)         # None: off without a terminal
        if total:
            self.say_readings()

    def finish_saves(self):
        """Saves best/ if a kill came after the save of last/ and before the save of best/."""
        own = self.model.history[-1]
        if own.get("val_loss") == self.best and best_loss(self.out) != self.best:
            self.save_best({k: v for k, v in own.items() if k.startswith("val_")})

    def say_readings(self):
        """Prints how often the run reads the training text."""
        if self.reading:
            decay, dropout, average = self.regularization()
            chosen = [f"weight decay {decay / self.cfg.matrix_lr:.2g}"] * (decay > 0)
            chosen += [f"dropout {dropout:.2g}"] * (dropout > 0)
            chosen += [f"weights averaged over {average} steps"] * (average > 0)
            say(self.machine, f"{self.total:,} steps: {readings_line(self.readings(self.total))}" +
                f"; {', '.join(chosen)}" * bool(chosen))

    def readings(self, steps):
        """{name: how often that text has been read} after a number of steps, the main text first."""
        return {name: steps * self.positions / tokens for name, tokens in self.reading.items()}

    def regularization(self):
        """(weight decay, dropout rate, steps to average), by how often the run reads its text."""
        times = next(iter(self.readings(self.total).values()), 0.0)
        return regularization(times, self.total / times if times else 0, self.cfg)

    def is_finished(self):
        """Whether all steps are done."""
        return 0 < self.total <= self.step

    @contextlib.contextmanager
    def timed_step(self):
        """Times the body as one step. A step lost in a kill is repeated with the same threads."""
        threads = self.machine.threads
        count = self.replay.get(self.step + 1, {}).get("threads", threads.count)
        if len(threads.options) > 1 and count != threads.count:
            threads.use(count)
        start, self.threads = time.perf_counter(), threads.count
        yield
        synchronize(self.machine.device)
        self.duration = time.perf_counter() - start

    def check_finite(self, loss, norm):
        """Raises UserError if the loss, or too many gradients in a row, are not finite."""
        if not math.isfinite(loss):
            self.diverged("loss")
        # float16 overflows now and then: the scaler halves the loss scale and skips the step.
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > (30 if self.scaler.is_enabled() else 0):
            self.diverged("gradient")

    def diverged(self, noun):
        """Raises the UserError of a diverged run."""
        raise UserError(f"the {noun} is not finite after step {self.step}" +
                        (f"; the last good checkpoint is {self.out / 'last'}" if self.saves else "") +
                        ": lower --lr, --embed-lr and --matrix-lr, or use --dtype float32")

    def log_step(self, loss, count, norm, metrics, rate):
        """Counts a step, plans the time budget, writes a line of the log, shows progress.

        loss, metrics: sums over `count` supervised tokens; rate: share of the peak learning rate
        """
        duration, machine = self.duration, self.machine
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + count, self.seconds + duration
        self.durations.append(duration)
        self.plan()
        if self.step + 1 not in self.replay and (sentence := machine.threads.note(duration)):
            say(machine, f"step {self.step}: {sentence}")
        loss, speed = loss / max(count, 1), self.positions / duration
        self.since.update(steps=1, seconds=duration)
        self.trend.add(loss * count, count)
        self.log.write(step=self.step, loss=loss, lr=rate, grad_norm=norm, tokens=self.tokens,
                       seconds=round(self.seconds, 3), tokens_per_second=round(speed), total=self.total,
                       threads=self.threads, **{k: v / max(count, 1) for k, v in metrics.items()})
        val = f" in training, {self.figures['loss']:.3f} in validation" if self.figures else ""
        text = f"loss {loss:.3f}{val}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and time.perf_counter() - self.last_line > 30:   # a file or a pipe gets lines instead
            self.last_line = time.perf_counter()
            say(machine, f"step {self.step}" + f" of {self.total}" * bool(self.total) + f": {text}")
        due = machine.rank == 0 and time.perf_counter() - self.last_save > self.cfg.save_seconds
        self.stop, self.due = map(bool, all_sum(machine, torch.tensor([float(self.interrupt.stop), float(due)])))

    def plan(self):
        """Converts the rest of the time budget to steps, by the durations of the last steps."""
        cfg, planned, falling = self.cfg, self.total, is_falling(self.step, self.total, self.origin, self.cfg)
        if self.step in self.replay:
            self.total = self.replay[self.step].get("total", planned)
        elif not cfg.steps and is_due(self.step, planned, falling, cfg):
            typical = statistics.fmean(list(self.durations)[-40:]) if falling else statistics.median(self.durations)
            self.total = plan(self.step, planned, self.seconds, typical, self.eval_cost, cfg, self.machine,
                              self.origin if falling else None)
        if self.total != planned:
            self.origin = new_origin(self.step, planned, self.total, self.origin, falling)
            self.bar.total = self.total
            self.bar.refresh()
            if not planned:
                self.say_readings()

    def is_time_to_evaluate(self):
        """Whether one of the run's evaluations is due now."""
        before, self.evaluated = self.evaluated, evaluations(self.step, self.total, self.origin, self.cfg)
        self.eval_start = time.perf_counter()
        return self.total > 0 and (self.step == self.total or self.evaluated > before)

    def is_time_to_save(self):
        """Whether last/ is to be saved now: after --save-seconds, or before stopping."""
        return self.stop or self.due

    def log_evaluation(self, figures):
        """Prints and logs an evaluation; saves last/, and best/ if the loss is the lowest."""
        machine, cfg, since, self.figures = self.machine, self.cfg, self.since, figures
        self.seconds += time.perf_counter() - self.eval_start
        if not math.isfinite(figures["loss"]):
            self.diverged("validation loss")
        val, improved = {"val_" + k: v for k, v in figures.items()}, figures["loss"] < self.best
        training = {"train_loss": self.trend.turn(self.step, improved)}
        if self.bytes_per_token:
            training["train_bits_per_byte"] = training["train_loss"] / math.log(2) / self.bytes_per_token
        if times := next(iter(self.readings(self.step).values()), 0.0):
            training["times_read"] = times
        self.log.write(step=self.step, tokens=self.tokens, seconds=round(self.seconds, 3), **training, **val)
        speed = since["steps"] * self.positions / since["seconds"]
        since.clear()
        busy = 3 * self.model.flops_per_token(cfg.context) * speed / self.matmul[0] / machine.size
        say(machine, f"step {self.step} of {self.total}, {self.seconds:.0f} s: {evaluation_line(training, figures)}; "
            f"{speed:,.0f} tokens/s" + f", {busy:.0%} of the matmul rate" * (machine.threads.count == self.matmul[1]))
        self.best = min(self.best, figures["loss"])
        if warning := self.trend.warning(training["train_loss"], figures["loss"], self.best, times, self.out / "best"):
            say(machine, warning)
        self.save("last", **val)                         # first: see finish_saves
        if improved:
            self.save_best(val)

    def save_best(self, figures):
        """Saves best/: the averaged weights, which were evaluated, if there are any."""
        with self.average.in_place():
            self.save("best", **figures)

    def save(self, name, **figures):
        """Saves the model as best/, or as last/ with the state that --resume needs."""
        model, machine = self.model, self.machine
        finite = all(local_part(p).isfinite().all() for p in model.parameters())     # the last update may be too large
        if all_sum(machine, torch.tensor(float(not finite))):
            self.diverged("model")
        self.saves += 1
        model.history = self.parents + [{**self.entry, "steps": self.step, "tokens": self.tokens,
                                         "seconds": round(self.seconds, 1), **figures}]
        weights, state = gathered(model.state_dict(), machine), self.training_state() if name == "last" else None
        if machine.rank == 0:
            write_state = lambda directory: torch.save(state, directory / "training_state.pt")
            self.save_model(model, self.out / name, self.tokenizer, write_state if state else None, weights)
            self.log.replace_old()
            if self.saves == 1 and name == "last" and not math.isfinite(self.best):
                remove(self.out, "best")                 # of the run that --overwrite replaces
        self.last_save = time.perf_counter()

    def training_state(self):
        """The content of training_state.pt."""
        machine, loss = self.machine, self.loss_fn
        return dict(step=self.step, total=self.total, seconds=self.seconds, tokens=self.tokens, best=self.best,
                    scaler=self.scaler.state_dict(), config=dataclasses.asdict(self.cfg), launch=launch(),
                    optimizers=[gathered(optimizer.state_dict(), machine) for optimizer in self.optimizers],
                    loss=gathered(loss.state_dict(), machine) if isinstance(loss, nn.Module) else {},
                    origin=list(self.origin), threads=machine.threads.count, dtype=str(machine.dtype)[6:],
                    trend=self.trend.numbers, average=[gathered(t, machine) for t in self.average.weights],
                    average_steps=self.average.steps)

    def stop_if_asked(self):
        """Ends the run after a Ctrl-C, once last/ is saved. Raises KeyboardInterrupt."""
        if self.stop and self.step != self.total:
            self.bar.close()
            self.log.close()
            say(self.machine, f"stopped at step {self.step}; {self.out / 'last'} holds everything. Go on with "
                f"{Path(sys.argv[0]).name} --resume and the same --out")
            raise KeyboardInterrupt

    def close(self):
        """Ends the progress bar, the log, and the handling of signals."""
        self.bar.close()
        self.log.close()
        self.interrupt.restore()


def load_optimizers(optimizers, state, out):
    """Restores the optimizers from a training state. Raises UserError for that of another model.

    Learning rates come from the command line, not from the file. The file holds whole tensors; with
    FSDP each process takes its shard.
    """
    params = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    saved = [s.get("state") for s in state["optimizers"]]
    if len(saved) != len(optimizers) or not all(map(matches, saved, params)):
        raise UserError(f"training_state.pt in {out / 'last'} belongs to another model: start a new run with "
                        f"--init-from {out / 'last'}")
    for optimizer, entry, ps in zip(optimizers, state["optimizers"], params):
        for i, tensors in entry["state"].items():
            tensors.update({k: sharded_like(ps[i], t) for k, t in tensors.items()
                            if torch.is_tensor(t) and t.shape == ps[i].shape})
        optimizer.load_state_dict({**entry, "param_groups": optimizer.state_dict()["param_groups"]})


def load_average(average, state, out):
    """Restores a train.Average from a training state. Raises UserError for that of another model."""
    params = list(average.model.parameters())
    if state["average"] and [getattr(t, "shape", None) for t in state["average"]] != [p.shape for p in params]:
        raise UserError(f"training_state.pt in {out / 'last'} belongs to another model: start a new run with "
                        f"--init-from {out / 'last'}")
    average.steps = state["average_steps"]
    average.weights = [sharded_like(p, t.to(p.device)) for p, t in zip(params, state["average"])]


def matches(saved, params):
    """Whether the tensors of a saved state, {index: {name: tensor}}, are scalars or fit params."""
    return isinstance(saved, dict) and all(
        i in range(len(params)) and isinstance(tensors, dict) and all(
            not torch.is_tensor(t) or t.ndim == 0 or t.shape == params[i].shape for t in tensors.values())
        for i, tensors in saved.items())


def best_loss(out):
    """The validation loss in the history of OUT/best; None without a model there."""
    file = out / "best" / "config.json"
    history = read_config(out / "best").get("history") if file.is_file() else None
    return history[-1].get("val_loss") if history else None


def remove(out, *names):
    """Deletes models of the run in OUT (best and last), and leftovers of killed saves."""
    for name in names or ("best", "last"):
        for place in (out / name, *(beside(out / name, ending) for ending in ("new", "old")),
                      out / f"{name}.new", out / f"{name}.old"):
            remove_tree(place)


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step; the second kills."""
    def __init__(self):
        self.stop, self.handlers = False, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):        # signals can be set in the main thread only
                self.handlers[s] = signal.signal(s, self.on_signal)

    def on_signal(self, *_):
        self.stop = True
        self.restore()

    def restore(self):
        """Sets the earlier handlers again."""
        for s, handler in self.handlers.items():
            signal.signal(s, handler)


STATE = {"step": (int, 0, 2 ** 48), "total": (int, 0, 2 ** 48), "tokens": (int, 0, 2 ** 62),
         "seconds": (float, 0, 1e12), "best": (float,), "optimizers": ([dict],), "scaler": (dict,), "config": (dict,),
         "loss": (dict,), "threads": (int, 0, 2 ** 20), "dtype": (str,), "launch": (str,), "trend": (dict,),
         "average": (list,), "average_steps": (int, 0, 2 ** 48)}
ADDED = {"launch": "", "origin": (0, 0.0), "threads": 0, "dtype": "", "trend": {}, "average": [],
         "average_steps": 0}                             # of no earlier version


def read_state(out):
    """training_state.pt of OUT/last, a dict. Raises UserError if the file is missing or damaged."""
    file = find_model(Path(out) / "last") / "training_state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        check_values(state, STATE, file, needed=[name for name in STATE if name not in ADDED])
        check_values(state.get("trend", {}), dict.fromkeys(Trend().numbers, (float,)), file)
        return {**ADDED, **state}
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no training_state.pt, so it cannot be resumed: start a new run with "
                        f"--init-from {file.parent}") from None
    except Exception as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): start a new run with --init-from "
                        f"{file.parent}") from None


def is_next_attempt(out):
    """Whether torchrun has restarted this process to continue OUT/last."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and read_state(out)["launch"] == launch()


def resumed(cfg, given):
    """The config of the run in cfg.out with the given flags. Raises UserError for one in FIXED."""
    stored, given = read_state(cfg.out)["config"], () if is_next_attempt(cfg.out) else given
    for f in dataclasses.fields(cfg):
        if f.name in stored and type(stored[f.name]) is not type(f.default) and type(stored[f.name]) is not int:
            raise UserError(f"training_state.pt in {cfg.out} has {f.name} = {stored[f.name]!r}: start a new run")
    if stored.keys() - vars(cfg).keys():
        raise UserError(f"the run in {cfg.out} was begun by another script, such as distill.py: resume it with that")
    if "minutes" in given:
        raise UserError("--minutes plans a new run; to go on beyond this one's last step give --steps")
    for name in FIXED:
        if name in given and getattr(cfg, name) != stored.get(name, ""):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but the run in {cfg.out} has "
                            f"{stored.get(name) or 'none'}: leave the flag out, or give another --out")
    return type(cfg)(**{**stored, **{name: getattr(cfg, name) for name in given}, "out": cfg.out, "resume": True,
                        "fsdp": cfg.fsdp})


def is_saved(directory):
    """Whether best/ or last/ of a run is there, possibly under the name that a killed save left."""
    return any((place / "config.json").is_file() for place in (directory, beside(directory, "new"),
                                                               beside(directory, "old")))


def check_out(cfg):
    """Sets cfg.resume to whether a run in OUT continues. Raises UserError if OUT is taken.

    After a restart by torchrun (--max-restarts) the run always continues.
    """
    out, first = Path(cfg.out), os.environ.get("RANK", "0") == "0"
    saved = is_saved(out / "last") or is_saved(out / "best")
    refuse_strangers(out, saved)
    if is_saved(out / "last") and is_next_attempt(out):
        cfg.resume, cfg.overwrite = True, False
    if saved and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{out} holds a model already: go on with --resume, replace it with --overwrite, or give "
                        "another --out")
    if cfg.init_from and not cfg.resume and find_model(cfg.init_from).resolve().parent == out.resolve():
        raise UserError(f"--init-from {cfg.init_from} is the run that --out {out} would replace: give another --out")
    if cfg.resume and first:
        if saved:
            for name in ("best", "last"):
                settle(out / name, MODEL)
                for leftover in (out / f"{name}.new", out / f"{name}.old"):     # of a kill in an older version
                    if (out / name / MODEL.marker).exists():
                        remove_tree(leftover)
        else:
            print(f"nothing is saved in {out} yet: starting from the beginning")
    cfg.resume = cfg.resume and saved


UNSAVED = {"best", "last", "cache", "control", "samples", "samples.jsonl", "log.jsonl.new"}  # before a first save


def refuse_strangers(out, saved):
    """Raises UserError if OUT holds anything but a run."""
    if out.is_file() or (out / "config.json").exists():
        raise UserError(f"--out {out} is a {'file' if out.is_file() else 'model'}, not a run's directory: give another "
                        "--out")
    for name in ("best", "last"):
        refuse_foreign(out / name, MODEL)
    for file in sorted(out.iterdir()) if out.is_dir() and not saved else ():
        is_log = file.name in ("log.jsonl", ".log.jsonl.new") and (not file.stat().st_size or read_log(file))
        if not is_log and not is_ours(file.name, UNSAVED):
            raise UserError(f"--out {out} holds {file.name}, which is no part of a run: give another --out")


def open_data(cfg, given, machine):
    """The directory of prepared data. One process prepares a missing corpus; the others wait."""
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


def history_entry(cfg, meta, tokenizer, model, mix=()):
    """The history entry of this run. Raises UserError if the data of a resumed run has changed."""
    mixed = [{"data": part.name, "data_sha256": part.sha256, "share": float(part.share)} for part in mix]
    if cfg.resume:
        entry = model.history[-1] if model.history else {}
        if "data_sha256" not in entry:
            raise UserError(f"the model in {cfg.out} does not say what it learned: start a new run with --init-from "
                            f"{cfg.out}")
        changed = cfg.data if entry["data_sha256"] != meta["sha256"] else f"of --mix {cfg.mix}"
        if changed == cfg.data or entry.get("mix", []) != mixed:
            raise UserError(f"the data {changed} is not what this run began with: prepare that again, or start a new "
                            f"run with --init-from {cfg.out}")
        return {k: v for k, v in entry.items() if not k.startswith("val_")}
    entry = {"step": "train", "data": meta["name"], "data_sha256": meta["sha256"], "tokenizer": tokenizer.hash[:16],
             "seed": cfg.seed, "batch_size": cfg.batch_size, "context": cfg.context, **({"mix": mixed} if mix else {})}
    if cfg.init_from:
        entry["parent"] = {"name": model_name(cfg.init_from), "sha256": checkpoint_hash(cfg.init_from)}
    return entry
