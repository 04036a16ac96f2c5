"""log.jsonl: a line for each step and each evaluation of a training run."""
import contextlib, dataclasses, json
from pathlib import Path

from data import UserError
from data.files import replacing_file


class Log:
    """log.jsonl, cut back to the saved step on resume, and with --wandb Weights & Biases.

    A new run in the place of an old one writes log.jsonl.new until the first save.
    """
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
        self.path = path.with_name("log.jsonl.new") if not step and path.exists() else path
        with replacing_file(self.path) as new:           # so that a kill does not lose the curve
            new.write_text("".join(json.dumps(line) + "\n" for line in before), encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8")

    def replace_old(self):
        """Puts a new run's log in the place of the old run's."""
        if self.file and self.path.name == "log.jsonl.new":
            self.file.close()
            self.path = self.path.replace(self.path.with_name("log.jsonl"))
            self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **line):
        """Appends a line, a dict with "step"."""
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
    """The lines of log.jsonl, dicts of numbers; without lines that a kill or a bad disk damaged."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and all(type(v) in (int, float) for v in line.values())
            and isinstance(line.get("step"), int) and {"tokens", "seconds"} <= line.keys()]
