"""Progress of a run: the schedule, the evaluations, the number of steps that fit a time budget, and
the training loss beside the validation loss.

A time budget is converted to steps after the first PLANNED steps, and again just before the
learning rate decays: while the rate is constant, runs of any length are the same. During the decay
the total may still change, every 40 steps. Then the rate continues to fall from the present value,
faster or more slowly: `origin` is (step, share of the schedule done) at the last change.
"""
from data.processes import from_first, say

AUTO = -1                             # of a setting that is chosen here
PLANNED = 13                          # step after which a time budget first becomes steps: the first steps are slow


def share_done(step, total, origin=(0, 0.0)):
    """Share of the schedule that is done after `step` of `total` steps."""
    begin, share = origin
    return share + (1 - share) * (step - begin) / (total - begin)


def evaluations(step, total, origin, cfg):
    """Number of the run's evaluations that are due by this step."""
    return int(share_done(step, total, origin) * cfg.evals + 1e-9) if total else 0


def new_origin(step, planned, total, origin, falling):
    """The origin of a run of `planned` steps whose total changes to `total` now.

    The rate continues from the present value if it falls already, or would jump down. Otherwise the
    old origin stays: a longer run at a constant rate has been the same from the beginning.
    """
    return (step, share_done(step, planned, origin)) if planned and (falling or total < planned) else origin


def is_falling(step, total, origin, cfg):
    """Whether the learning rate has begun to decay before this step."""
    return total > 0 and (cfg.schedule == "cosine" or origin[0] > 0 or step - 1 >= (1 - cfg.decay) * total)


def is_due(step, total, falling, cfg):
    """Whether the time budget is converted again after this step."""
    if not total:
        return step >= PLANNED
    return step % 40 == 0 if falling else step >= (1 - cfg.decay) * total


def plan(step, total, seconds, step_seconds, eval_cost, cfg, machine, origin=None):
    """Total number of steps that fits the time budget, the same on every process.

    The old `total` stays if the new one differs by at most 2 %, or during the decay by at most 8 %
    of the budget.

    seconds        time used so far
    step_seconds   time of a step
    eval_cost      cost of an evaluation, in steps
    origin         None before the decay
    """
    for evals in range(cfg.evals - (evaluations(step, total, origin, cfg) if origin else 0), 0, -1):
        steps = max(step + 1, int(step + (60 * cfg.minutes - seconds) / step_seconds - evals * eval_cost))
        if origin or evals == cfg.evals - evaluations(step, steps, (0, 0.0), cfg):
            break                                    # as many evaluations as this total leaves to do
    steps = from_first(steps)
    if total and abs(steps - total) <= max(1, 0.02 * total if origin is None else 5 * cfg.minutes / step_seconds):
        return total
    say(machine, f"step {step}: {cfg.minutes:g} minutes are {steps:,} steps of {1000 * step_seconds:.0f} ms")
    return steps


def regularization(times, steps_per_reading, cfg):
    """How a run that reads its text `times` times resists learning it by heart: a tuple of

    decay      share of each weight that weight decay takes in a step at the peak rate
    dropout    rate of dropout
    average    number of steps over which the weights are averaged; 0: not

    The rule is measured: `python tests/bench_train.py epochs`. A text that is read often is forgotten
    within a third of a reading (Wang and Aitchison, 2024, on this time; Kim et al., 2025, on the
    strength). A model that learns on has weight decay alone, less at a lower rate: at 3e-4 this
    decay, undiminished, made a general model forget all that it knew. Settings other than AUTO stand.
    """
    decay, dropout, average = 0.0, 0.0, 0
    if times > 1.5:
        decay = min(0.01, 2.8 / steps_per_reading) * min(1, (times - 1.5) / 3.5)
        if cfg.init_from:
            decay *= min(1, cfg.matrix_lr / 0.002)
        else:
            dropout, average = min(0.2, 0.02 * times), round(times * steps_per_reading / 12)
    if cfg.weight_decay != AUTO:
        decay = cfg.weight_decay * cfg.matrix_lr
    return (decay, dropout if cfg.dropout == AUTO else cfg.dropout, average if cfg.average == AUTO else cfg.average)


class Trend:
    """Training loss beside validation loss, evaluation after evaluation, in nats per learned token.

    Of `numbers`, which training_state.pt keeps: loss and tokens are sums since the last evaluation;
    best_step and best_train, step and training loss of the best evaluation; worse, the number of
    evaluations since.
    """
    def __init__(self):
        self.numbers = dict(loss=0.0, tokens=0, best_step=0, best_train=0.0, worse=0)

    def add(self, loss, tokens):
        """Counts a step: the loss, summed over so many learned tokens."""
        self.numbers["loss"] += loss
        self.numbers["tokens"] += tokens

    def turn(self, step, improved):
        """Ends an interval with an evaluation: returns the mean training loss since the last one."""
        numbers = self.numbers
        train_loss = numbers["loss"] / max(1, numbers["tokens"])
        numbers.update(loss=0.0, tokens=0, worse=numbers["worse"] + 1)
        if improved:
            numbers.update(best_step=step, best_train=train_loss, worse=0)
        return train_loss

    def warning(self, train_loss, val_loss, lowest, times, best):
        """A sentence on a text that is learned by heart; "" while nothing shows that.

        The training loss is then lower than at the best evaluation, and the validation loss higher,
        by 0.2 % (less is noise), of a text that has been read more than once.

        lowest   validation loss so far
        times    how often the text has been read; 0: not known
        best     directory of the best model
        """
        step, worse = self.numbers["best_step"], self.numbers["worse"]
        if train_loss >= self.numbers["best_train"] or val_loss < 1.002 * lowest or 0 < times < 1:
            return ""
        if worse & (worse - 1):                                  # said after 1, 2, 4, 8 ... evaluations
            return ""
        many = f"{worse} evaluations" if worse > 1 else "one evaluation"
        read = f", having read it {times:.1f} times" * (times > 0)
        return (f"overfitting: for {many} now the validation loss is higher than at step {step}, and the training "
                f"loss lower: the model learns the text by heart{read}. {best} keeps the model of step {step}, and "
                f"sample.py takes it. For a better one give more text, raise --dropout, or stop earlier: --steps "
                f"{step}, or fewer --minutes. More --evals find the best step more exactly")
