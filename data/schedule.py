"""How far a run is: its schedule, its evaluations, and the number of steps that a time budget is.

A time budget becomes steps after the first PLANNED steps, and again just before the learning rate begins to fall: while
the rate is constant, runs of any length are the same. While it falls the total may still change, every 40 steps. Then
the rate falls on from where it is, faster or more slowly: `origin` is (step, share of the schedule done) of that change.
"""
from data.machine import from_first, say

PLANNED = 13                          # the step after which a time budget first becomes steps: the first are slower


def share_done(step, total, origin=(0, 0.0)):
    """The share of the schedule that is done after `step` steps of `total`."""
    begun, share = origin
    return share + (1 - share) * (step - begun) / (total - begun)


def evaluations(step, total, origin, cfg):
    """How many of a run's evaluations are due by a step."""
    return int(share_done(step, total, origin) * cfg.evals + 1e-9) if total else 0


def new_origin(step, planned, total, origin, falling):
    """The origin of a run of `planned` steps that has `total` from now on.

    Where the rate falls, or would jump down, the rate goes on from where it is. Where it has not fallen yet, a longer
    run is one of that length from the beginning.
    """
    return (step, share_done(step, planned, origin)) if planned and (falling or total < planned) else origin


def is_falling(step, total, origin, cfg):
    """Whether the learning rate of the step before this one was below that of the one before it."""
    return total > 0 and (cfg.schedule == "cosine" or origin[0] > 0 or step - 1 >= (1 - cfg.decay) * total)


def is_due(step, total, falling, cfg):
    """Whether the time budget is planned again after this step."""
    if not total:
        return step >= PLANNED
    return step % 40 == 0 if falling else step >= (1 - cfg.decay) * total


def plan(step, total, seconds, step_seconds, eval_cost, cfg, machine, origin=None):
    """Steps that fit the time budget, of which `seconds` have passed; the same number on every process.

    `total`, the number planned before, stays if it is right to 2 %, or while the rate falls to 8 % of the budget.
    origin: None before the rate falls
    """
    for evals in range(cfg.evals - (evaluations(step, total, origin, cfg) if origin else 0), 0, -1):
        steps = max(step + 1, int(step + (60 * cfg.minutes - seconds) / step_seconds - evals * eval_cost))
        if origin or evals == cfg.evals - evaluations(step, steps, (0, 0.0), cfg):
            break
    steps = from_first(steps)
    if total and abs(steps - total) <= max(1, 0.02 * total if origin is None else 5 * cfg.minutes / step_seconds):
        return total
    say(machine, f"step {step}: {cfg.minutes:g} minutes are {steps:,} steps of {1000 * step_seconds:.0f} ms")
    return steps
