"""Warnings about the reliability of an accuracy: too few training steps, or a classifier that still improved."""

from __future__ import annotations

from typing import Any

from m3ae_fast.heads.training_defaults import Official

_RISE = 0.02  # smallest rise in training accuracy that is reported


def training_warnings(
    section: str, length: str, steps: int, official: Official, lines: list[dict[str, Any]], batch: int
) -> list[str]:
    """Return warnings about the reliability of the result of a training run, one line each.

    Args:
        section: section of the settings.
        length: the setting that determines the length of the training.
        steps: number of steps of the training.
        official: the published recipe.
        lines, batch: as in `rising`.
    """
    found = []
    if steps < official.fewest_steps:
        given = f"{section}.epochs and {section}.steps" if length.endswith("epochs") else length
        found.append(f"only {steps:,} steps: without {given}, the run would have at least {official.fewest_steps:,}")
    if rise := rising(lines, batch):
        found.append(f"the training accuracy was still rising (by {rise:.1%}); raise {length}")
    return found


def rising(lines: list[dict[str, Any]], batch: int) -> float:
    """Return by how much the mean training accuracy in the last quarter of a run is above that in the third quarter; 0
    if the difference is small or within two standard errors. `lines`: logged metrics, each for a step of `batch`
    samples."""
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    quarter = len(accuracies) // 4
    if not quarter:
        return 0.0
    before, last = (sum(part) / quarter for part in (accuracies[-2 * quarter : -quarter], accuracies[-quarter:]))
    middle = (before + last) / 2
    error = (2 * middle * (1 - middle) / (quarter * batch)) ** 0.5
    return last - before if last - before > max(_RISE, 2 * error) else 0.0
