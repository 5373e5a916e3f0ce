"""What is pre-trained and what is measured of it: encoders that differ from a common one in one thing each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

TEXT_RATIOS = (0.15, 0.5, 0.75, 0.9)
USUAL_RATIO = 0.75
SHORTER, LONGER, NARROWER = 2, 3, 2  # what training time and width are divided, and multiplied, by

Task = Literal["knn", "linear", "finetune"]
ALL: tuple[Task, ...] = ("knn", "linear", "finetune")
FROZEN: tuple[Task, ...] = ("knn", "linear")


@dataclass(frozen=True)
class Encoder:
    """An encoder, by what it was trained on and for."""

    objective: Literal["random", "mae", "m3ae"]
    width: int
    steps: int  # of pre-training
    seed: int
    text_ratio: float | None = None  # fraction of the text tokens masked; None without text
    captions: Literal["whole", "nameless"] | None = None

    @property
    def name(self) -> str:
        """Return the name of the job's folder."""
        text = () if self.text_ratio is None else (f"text{100 * self.text_ratio:.0f}", str(self.captions))
        return "-".join([self.objective, *text, f"width{self.width}", f"steps{self.steps}", f"seed{self.seed}"])


class Job(NamedTuple):
    """A pre-training, or a test of its encoder."""

    encoder: Encoder
    task: Task | None  # None: the pre-training

    @property
    def name(self) -> str:
        return f"{self.encoder.name} {self.task or 'pre-training'}"

    @property
    def work(self) -> float:
        """Return about how long it takes, beside other jobs of its kind."""
        return (1 + self.encoder.width / 64) * (self.encoder.steps if self.task is None else 1)


def m3ae(width: int, steps: int, seed: int = 0) -> Encoder:
    """Return the common encoder."""
    return Encoder("m3ae", width, steps, seed, USUAL_RATIO, "whole")


def plan(width: int, steps: int, seeds: int) -> list[Job]:
    """Return all jobs, each comparison once and then by further seeds, so that a study cut short says what it can.

    Args:
        width, steps: of the common encoder.
        seeds: of each encoder, but for those of other sizes, which have one.
    """
    jobs: dict[Job, None] = {}
    for encoder, tasks in _encoders(width, steps, seeds):
        if encoder.objective != "random":
            jobs[Job(encoder, None)] = None
        jobs |= {Job(encoder, task): None for task in tasks}
    return list(jobs)


def _encoders(width: int, steps: int, seeds: int) -> Iterator[tuple[Encoder, tuple[Task, ...]]]:
    common = m3ae(width, steps)
    mae, random = Encoder("mae", width, steps, 0), Encoder("random", width, 0, 0)
    nameless = replace(common, captions="nameless")
    ratios = [replace(common, text_ratio=ratio) for ratio in TEXT_RATIOS if ratio != USUAL_RATIO]

    def of(
        seeds: range, encoders: list[Encoder], tasks: tuple[Task, ...]
    ) -> Iterator[tuple[Encoder, tuple[Task, ...]]]:
        for seed in seeds:
            yield from ((replace(encoder, seed=seed), tasks) for encoder in encoders)

    narrow, short, long = width // NARROWER, steps // SHORTER, steps * LONGER
    first, more = range(1), range(1, seeds)
    yield from of(first, [common, mae, random], ALL)
    yield from of(first, [nameless, *ratios], FROZEN)
    yield from of(first, [replace(encoder, steps=short) for encoder in (common, mae)], FROZEN)
    yield from of(first, [replace(encoder, width=narrow) for encoder in (common, mae)], FROZEN)
    yield from of(more, [common, mae, random], ALL)
    yield from of(first, [replace(encoder, steps=long) for encoder in (common, mae)], FROZEN)
    yield from of(more, [nameless], FROZEN)
    yield from of(more, ratios, FROZEN)
