"""The schedule of a resumed run, and of a run that is extended: resumed with settings that make it longer."""

from __future__ import annotations

from m3ae_fast import checkpoint
from m3ae_fast.config import Config
from m3ae_fast.engine.schedule import Change, Schedule


def is_extended(config: Config, info: checkpoint.Info) -> bool:
    """Return whether the config makes the run longer (in steps, epochs or hours) than the config in the checkpoint
    does. The result is False unless `optim.decay` is set."""
    was, now = info.config.get("train") or {}, config.train
    lengths = ((getattr(now, key), was.get(key)) for key in ("steps", "epochs", "hours"))
    longer = any(new and old and new > old for new, old in lengths)
    return config.optim.decay is not None and longer


def resumed_schedule(config: Config, samples: int, info: checkpoint.Info | None) -> Schedule:
    """Return the schedule of a run when it starts or resumes.

    If the run has `train.hours`, its number of steps may have been changed before the checkpoint. A resumed run keeps
    these changes, and therefore its learning rates. An extended run gets its new number of steps when it resumes,
    before it takes a step. Otherwise, its decay would begin at the step for which it was planned before the extension.

    Args:
        config: config of the run.
        samples: number of samples per epoch.
        info: content of the checkpoint from which the run resumes; None for a new run.
    """
    cfg = config.train
    if info is None:
        return Schedule(cfg, config.optim, samples)
    changes = tuple(Change(*each) for each in info.changes) if cfg.hours else ()
    schedule = Schedule(cfg, config.optim, samples, changes)
    if not (cfg.hours and is_extended(config, info)) or info.decays:
        return schedule  # once the decay has begun, `TimeLimit` lengthens the run
    return schedule.changed(info.step, _expected_steps(schedule, info, 3600 * cfg.hours))


def _expected_steps(schedule: Schedule, info: checkpoint.Info, seconds: float) -> int:
    """Return the number of steps that take `seconds` at the mean speed before the checkpoint, but at least the number
    in the schedule. `TimeLimit` adjusts this number as soon as it has measured some steps."""
    expected = info.step * seconds / info.spent if info.spent else schedule.configured_steps
    return max(round(min(expected, schedule.most_steps)), schedule.total_steps)
