"""Lists of trials, and the execution of a trial: training, and tests of the trained encoder."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import m3ae_fast
from m3ae_fast import checkpoint, train
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.config import Config, parse
from m3ae_fast.config.load import apply_override
from m3ae_fast.engine.memory_estimate import typical_batch
from m3ae_fast.evaluation.tasks import TASKS
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.training.teacher import open_teacher, with_target_width
from m3ae_fast.training.throughput import newton_schulz_flops

TOP1 = ("top1",)
_OF_A_TRIAL = ("run.", "train.steps=")  # settings that a trial determines


@dataclass(frozen=True)
class Trial:
    """Pre-training from random weights, and its tests."""

    data: str  # key of the list's `data`
    arm: str  # key of the list's `arms`
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the trial's folder."""
        return f"{_words(self.data)}-{_words(self.arm)}-steps{self.steps}-seed{self.seed}"


@dataclass(frozen=True)
class TrialList:
    """A list of trials; lab/README.md describes the fields."""

    about: str
    common: dict[str, Any]
    data: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    overrides: Sequence[str] = ()  # "section.key=value" for all trials

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> TrialList:
        """Read a list from a JSON file. `overrides`: "section.key=value", applied to the settings of all trials. Raises
        UserError if there is no such file, if it is not a list of trials, or if an override replaces a setting that
        each trial determines."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = cls(*(content[key] for key in ("about", "common", "data", "arms", "trials")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a list of trials ({error}); lab/README.md describes the format") from None
        if own := next((each for each in overrides if each.startswith(_OF_A_TRIAL)), None):
            raise UserError(f"--set {own}: each trial has its own value; change the list, or choose from its trials")
        return replace(found, overrides=overrides)

    def trials(self) -> list[Trial]:
        """Return all trials, the first seed of every group before the second, so that an unfinished list is as
        informative as possible."""
        found: dict[Trial, None] = {}
        for seed in range(max(group["seeds"] for group in self.groups)):
            for group in self.groups:
                arms = self.arms if group["arms"] == "all" else group["arms"]
                if seed < group["seeds"]:
                    found |= {Trial(group["data"], arm, steps, seed): None for steps in group["steps"] for arm in arms}
        return [*found]


def _words(name: str) -> str:
    """Return a name as a part of a file name."""
    return "-".join(re.findall(r"\w+", name))


def result_of(trial: Trial, out: Path) -> Path:
    """Return the path of a trial's result, which exists if the trial is complete."""
    return out / "trials" / f"{trial.name}.json"


def config_of(trial_list: TrialList, trial: Trial, data: Path, run: Path) -> dict[str, Any]:
    """Return the config of a trial as JSON data. `data`: folder of the shards; `run`: run folder."""
    about = trial_list.data[trial.data]
    config = copy.deepcopy(trial_list.common)
    for name, section in about.get("common", {}).items():
        config.setdefault(name, {}).update(copy.deepcopy(section))
    config["run"] = {"dir": str(run), "seed": trial.seed}
    config["data"]["train"] = [{"shards": [str(data / pattern) for pattern in about["train"]]}]
    config["train"]["steps"] = trial.steps
    for setting, value in trial_list.arms[trial.arm].items():
        apply_override(config, f"{setting}={json.dumps(value)}")
    for override in trial_list.overrides:
        apply_override(config, override)
    return config


def perform(trial_list: TrialList, trial: Trial, data: Path, out: Path) -> bool:
    """Train and test a trial, and write its result. Return False if it was stopped.

    The cost of a trial is the number of executed FLOPs (forward and backward passes, passes of a teacher, and
    Newton-Schulz iterations), and the CPU seconds of this process during training without the time in which it waited
    for samples.
    """
    run = out / "runs" / trial.name
    run.parent.mkdir(parents=True, exist_ok=True)
    settings = config_of(trial_list, trial, data, run)
    settings_path, clock_path = run.with_suffix(".json"), run.with_suffix(".seconds")
    settings_path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    config = parse(Config, settings, trial.name)
    if not _complete(run, trial.steps):
        before, started = float(clock_path.read_text()) if clock_path.exists() else 0.0, time.process_time()
        train.main(["--config", str(settings_path), "--resume", "auto"])
        write_text_atomically(clock_path, f"{before + time.process_time() - started:.3f}\n")
    if not _complete(run, trial.steps):
        return False
    waited = fmean(line["data_wait"] for line in read_metrics(run) if "data_wait" in line)
    tests = {}
    about = trial_list.data[trial.data]
    for name, test in about["tests"].items():
        result = _evaluate(name, test, about.get("evaluation", {}), run, data, trial.seed)
        if result is None:
            return False
        tests[name] = result
    cost = {"flops": _flops(config), "cpu_seconds": float(clock_path.read_text()) * (1 - waited)}
    result_of(trial, out).parent.mkdir(parents=True, exist_ok=True)
    content = {"trial": asdict(trial), "cost": cost, "tests": tests}
    write_text_atomically(result_of(trial, out), json.dumps(content, indent=1) + "\n")
    return True


def _complete(run: Path, steps: int) -> bool:
    return any(checkpoint.step_of(each) == steps for each in checkpoint.saved_steps(run))


def _evaluate(
    name: str, test: dict[str, Any], sections: dict[str, Any], run: Path, data: Path, seed: int
) -> dict[str, float] | None:
    """Return the value of a test, its standard error if it is known, and the values of its baselines; None if the test
    was stopped."""
    folder = run.with_name(f"{run.name}-{_words(name)}")
    if (path := folder / "result.json").exists():  # of an earlier call that was stopped during a later test
        return values_of(json.loads(path.read_text(encoding="utf-8")), test.get("value", TOP1))
    given = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    uses = TASKS[test["task"]].uses
    overrides = {"run.seed": seed} | {name: value for name, value in given.items() if name in uses}
    shards = {key: str(data / test[key]) for key in ("train", "val")}
    if "ood" in test:
        shards["ood"] = {each: [str(data / pattern)] for each, pattern in test["ood"].items()}
    result = m3ae_fast.evaluate(test["task"], str(run), out=folder, overrides=overrides, **shards)
    return None if result is None else values_of(result, test.get("value", TOP1))


def values_of(result: dict[str, Any], path: Sequence[str]) -> dict[str, float]:
    """Return the value at a path of keys of result.json as "value". For the accuracy, also return its standard error
    and the accuracies of the baselines."""
    value: Any = result
    for key in path:
        value = value[key]
    found = {"value": value}
    if [*path] == [*TOP1]:
        found |= {"standard_error": result["top1_se"]}
        found |= {name: own["top1"] for name, own in result.get("baselines", {}).items()}
    return found


def results(trial_list: TrialList, out: Path) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Yield the complete trials of a list with their results."""
    for trial in trial_list.trials():
        if (path := result_of(trial, out)).exists():
            yield trial, json.loads(path.read_text(encoding="utf-8"))


def _flops(config: Config) -> float:
    teacher = open_teacher(config)
    config = with_target_width(config, teacher)
    with torch.device("meta"):
        model = M3AE(config.model, config.loss)
    steps, sample = config.train.steps or 0, executed_flops(config.model, typical_batch(config, model))
    sample += teacher.flops / config.data.repeats if teacher else 0.0
    return steps * (sample * config.train.global_batch + newton_schulz_flops(config, model, world=1))
