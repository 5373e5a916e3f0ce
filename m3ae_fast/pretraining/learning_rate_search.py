"""Choice of a run's learning rate by short runs on the same data."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.config import Config, stored_config
from m3ae_fast.pretraining.final_evaluation import stage
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.training.run import pre_train
from m3ae_fast.training.run_lock import is_held
from m3ae_fast.training.run_state import status

FOLDER, FILE = "tuning", "tuning.json"  # names in the run folder
FACTORS = (0.5, 1.0, 2.0)  # the learning rates that are tried, as multiples of the default
PART = 0.05  # length of each trial as a fraction of the run's steps
FEWEST = 20  # minimum number of steps of a trial
NEEDS_STEPS = "--tune derives the length of its short runs from train.steps: set train.steps in place of train.epochs"


def tune(config: Config, path: Path, device: Device | None = None) -> Config | None:
    """Choose `optim.peak_lr` by the loss of short runs, each with a complete schedule, and write the config with the
    chosen value to `path`. The time that the search takes is subtracted from `train.hours`, of which at least half is
    kept. An interrupted search resumes with the interrupted trial; a completed search is not repeated.

    Returns:
        The config of the run; None if the search is stopped.

    Raises:
        UserError: the run has already begun or is too short, its length is given in epochs, no trial has a finite loss,
            or the table of an earlier call is damaged.
    """
    run, table = config.run.dir, config.run.dir / FILE
    done, before = _read(table), _settings(config)
    if "chosen" in done:  # an interrupted call may have written only the table
        return _write(config, path, done) if done.get("before") == before else config
    if checkpoint.saved_steps(run):
        raise UserError(f"--tune: the run in {run} has begun; leave out --tune, or choose another --out")
    steps = trial_steps(config)
    print(f"tuning optim.peak_lr with {len(FACTORS)} runs of {steps:,} steps", flush=True)
    for factor in FACTORS:
        rate = float(f"{factor * config.optim.peak_lr:.3g}")
        if f"{rate:g}" in done["tried"]:
            continue
        began = time.monotonic()
        loss = _try(config, rate, steps, device)
        done["seconds"] += time.monotonic() - began
        if loss is not None:
            done["tried"][f"{rate:g}"] = loss if math.isfinite(loss) else None
        write_text_atomically(table, json.dumps(done, indent=1) + "\n")
        if loss is None:
            return None
        print(f"optim.peak_lr {rate:g}: loss {loss:.4g}", flush=True)
    found = {rate: loss for rate, loss in done["tried"].items() if loss is not None}
    if not found:
        rates = ", ".join(done["tried"])
        raise UserError(
            f"--tune: the loss was not finite with any of the learning rates {rates}; set a lower optim.peak_lr"
        )
    best = min(found, key=lambda rate: found[rate])
    tried = [*done["tried"]]
    done |= {"chosen": float(best), "before": before}
    write_text_atomically(table, json.dumps(done, indent=1) + "\n")
    tuned = _write(config, path, done)
    is_end = best in (tried[0], tried[-1])
    note = ", the lowest or highest of these rates; the best rate may be outside their range" if is_end else ""
    print(f"chosen: optim.peak_lr {best}{note}", flush=True)
    return tuned


def forget_search(run: Path) -> None:
    """Remove the table and the trials of an earlier search, because the settings or the samples of the run are no
    longer the same. Raises UserError if they cannot be removed."""
    try:
        (run / FILE).unlink(missing_ok=True)
        if (run / FOLDER).exists():
            shutil.rmtree(run / FOLDER)
    except OSError as error:
        raise UserError(f"{error.filename or run / FOLDER}: cannot be removed ({error.strerror or error})") from None


def is_in_use(run: Path) -> bool:
    """Return whether another process is training in the run folder: the run itself, or a trial of the search."""
    return any(map(is_held, (run, *run.glob(f"{FOLDER}/*"))))


def trial_steps(config: Config) -> int:
    """Return the number of steps of a trial. Raises UserError if the run is too short, or its length is given in
    epochs."""
    if config.train.steps is None:
        raise UserError(NEEDS_STEPS)
    steps = round(PART * config.train.steps)
    if steps < FEWEST:
        longer = "--hours" if config.train.hours else "train.steps"
        raise UserError(
            f"--tune: trial runs of {steps:,} steps ({PART:.0%} of {config.train.steps:,}) are too short to compare; "
            f"increase {longer}, or leave out --tune"
        )
    return steps


def _read(table: Path) -> dict[str, Any]:
    """Return the content of the table of an earlier call, or an empty table. Raises UserError if it is damaged."""
    try:
        done = read_json(table)
        losses = [loss for loss in done["tried"].values() if loss is not None]
        [float(number) for number in (*done["tried"], *losses, done["seconds"], done.get("chosen", 0))]
    except FileNotFoundError:
        return {"tried": {}, "seconds": 0.0}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{table}: is damaged ({error}); remove it to repeat the search of the learning rate") from None
    return done


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that the search changes."""
    return {"peak_lr": config.optim.peak_lr, "hours": config.train.hours, "steps": config.train.steps}


def _write(config: Config, path: Path, done: dict[str, Any]) -> Config:
    """Write the config with the chosen learning rate to `path`, and return it. `done`: table of a completed search."""
    tuned = _with_rate(config, done["chosen"], done["seconds"])
    write_text_atomically(path, json.dumps(stored_config(tuned), indent=2) + "\n")
    return tuned


def _with_rate(config: Config, rate: float, seconds: float) -> Config:
    """Return the config with this learning rate. If there is a time limit, `seconds` are subtracted from it, but at
    least half of it is kept, and the number of steps is reduced in proportion."""
    train = config.train
    if train.hours:
        left = max(train.hours - seconds / 3600, train.hours / 2)
        steps = max(round((train.steps or 1) * left / train.hours), 1)
        train = train.model_copy(update={"hours": round(left, 5), "steps": steps})
    return config.model_copy(update={"train": train, "optim": config.optim.model_copy(update={"peak_lr": rate})})


def _try(config: Config, rate: float, steps: int, device: Device | None) -> float | None:
    """Train a short run and return its final loss, on held-out samples if there are any. The result is infinite if the
    loss of a step was not finite. Return None if the run is stopped."""
    folder = config.run.dir / FOLDER / f"peak_lr-{rate:g}"
    short = {
        "steps": steps, "epochs": None, "hours": None, "eval_every": None, "probe": None,
        "pictures": 0, "save_every": steps, "log_every": max(steps // 20, 1), "keep": 1,
    }  # fmt: skip
    warmup = config.optim.warmup_epochs * steps / (config.train.steps or steps)
    trial = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": folder, "loggers": []}),
            "train": config.train.model_copy(update=short),
            "optim": config.optim.model_copy(update={"peak_lr": rate, "warmup_epochs": warmup}),
        }
    )
    try:
        with stage(device) as session:
            pre_train(trial, session, resume="auto")
    except UserError as error:
        if "is not finite" in str(error):
            return math.inf
        raise
    if session.stop.requested or status(folder)[0] != "finished":
        return None
    return _loss(trial)


def _loss(config: Config) -> float:
    """Return the loss of the last evaluation on held-out samples, or the mean of the last logged training losses if
    there was no evaluation."""
    lines, weights = read_metrics(config.run.dir), config.loss
    by_name = {"val_image_loss": weights.image_weight, "val_text_loss": weights.text_weight}
    if evaluations := [line for line in lines if not line.keys().isdisjoint(by_name)]:
        return sum(weight * evaluations[-1].get(name, 0.0) for name, weight in by_name.items())
    losses = [line["loss"] for line in lines if "loss" in line]
    return fmean(losses[-max(len(losses) // 5, 1) :])
