"""The results of a list of trials, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import results as machine
from lab.trials import Trial, TrialList, results
from m3ae_fast.base.atomic_file import write_text_atomically

NOT_BASELINES = ("value", "standard_error")


def write(trial_list: TrialList, out: Path) -> None:
    """Write results.json and README.md with the results of the complete trials."""
    found = [*results(trial_list, out)]
    about = machine.about()
    content = {
        "about": about,
        "common": trial_list.common,
        "arms": trial_list.arms,
        "trials": [own for _, own in found],
    }
    write_text_atomically(out / "results.json", json.dumps(content, indent=1) + "\n")
    parts = [f"# {trial_list.about}", _head(about)]
    for data, own in trial_list.data.items():
        rows = [(trial, result) for trial, result in found if trial.data == data]
        if rows:
            parts += [f"## {data}", _table([*own["tests"]], rows)]
    write_text_atomically(out / "README.md", "\n\n".join(parts) + "\n")


def _head(about: dict[str, Any]) -> str:
    return (
        f"{about['device']}, one thread, torch {about['torch']}, m3ae_fast {about['m3ae_fast']}, {about['date']}. "
        "Values are means over seeds in %, with standard errors. An error includes the spread over seeds and, if the "
        "test reports one, the standard error over the test samples."
    )


def _table(tests: Sequence[str], rows: Sequence[tuple[Trial, dict[str, Any]]]) -> str:
    groups: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for trial, result in rows:
        groups[trial.arm, trial.steps].append(result)
    lines = [["arm", "steps", "seeds", "TFLOP", "CPU s", *tests]]
    for (arm, steps), own in groups.items():
        cost = [
            f"{fmean(each['cost'][key] for each in own) / unit:,.3g}"
            for key, unit in (("flops", 1e12), ("cpu_seconds", 1))
        ]
        cells = [mean_and_error([each["tests"][test] for each in own]) for test in tests]
        lines.append([arm, f"{steps:,}", str(len(own)), *cost, *cells])
    for name in baselines(tests, rows[0][1]):
        cells = []
        for test in tests:
            values = [result["tests"][test][name] for _, result in rows if name in result["tests"][test]]
            cells.append(f"{100 * fmean(values):.1f}" if values else "-")
        lines.append([name, "-", "-", "-", "-", *cells])
    rule = ["---", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def baselines(tests: Sequence[str], result: dict[str, Any]) -> list[str]:
    """Return the names of the baselines of a trial's tests."""
    return [*dict.fromkeys(name for test in tests for name in result["tests"][test] if name not in NOT_BASELINES)]


def mean_and_error(values: Sequence[dict[str, float]]) -> str:
    """Return the mean over seeds in percent with its standard error, given the values of a test. All seeds use the
    same test samples, so the error over samples does not shrink when seeds are added."""
    over_seeds = stdev(each["value"] for each in values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    over_samples = fmean(each.get("standard_error", 0.0) for each in values)
    return f"{100 * fmean(each['value'] for each in values):.1f} ± {100 * math.hypot(over_seeds, over_samples):.1f}"
