"""What is pre-trained and what is measured of it: encoders that differ from a common one in one thing each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

TEXT_RATIOS = (0.15, 0.5, 0.75, 0.9)
USUAL_RATIO = 0.75
CAPTION_FRACTIONS = (0.1, 0.3, 1.0)  # 0 is MAE
SHORTER, LONGER, NARROWER = 2, 3, 2  # what training time and width are divided, and multiplied, by

# what is compared: what was trained for; captions that name no class; and the paper's figures 5, 3 and 4
ARMS = ("objectives", "nameless", "ratios", "fractions", "widths", "lengths")

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
    caption_fraction: float = 1.0  # of the pairs that keep their caption

    @property
    def name(self) -> str:
        """Return the name of the job's folder."""
        text = () if self.text_ratio is None else (f"text{100 * self.text_ratio:.0f}", str(self.captions))
        text += () if self.caption_fraction == 1 else (f"captions{100 * self.caption_fraction:.0f}",)
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


def plan(width: int, steps: int, seeds: int, arms: Collection[str] = ARMS) -> list[Job]:
    """Return all jobs, each comparison once and then by further seeds, so that a study cut short says what it can.

    Args:
        width, steps: of the common encoder.
        seeds: of each encoder.
        arms: which comparisons, of ARMS; the common encoders that they are compared with are in each.
    """
    jobs: dict[Job, None] = {}
    for seed in range(seeds):
        for arm in ARMS:
            if arm in arms:
                for encoder, tasks in _encoders(arm, width, steps, seed):
                    if encoder.objective != "random":
                        jobs[Job(encoder, None)] = None
                    jobs |= {Job(encoder, task): None for task in tasks}
    return list(jobs)


def _encoders(arm: str, width: int, steps: int, seed: int) -> Iterator[tuple[Encoder, tuple[Task, ...]]]:
    common, mae, random = (
        m3ae(width, steps, seed),
        Encoder("mae", width, steps, seed),
        Encoder("random", width, 0, seed),
    )
    both = common, mae
    others: dict[str, list[Encoder]] = {
        "objectives": [random],
        "nameless": [replace(common, captions="nameless")],
        "ratios": [replace(common, text_ratio=ratio) for ratio in TEXT_RATIOS if ratio != USUAL_RATIO],
        "fractions": [replace(common, caption_fraction=fraction) for fraction in CAPTION_FRACTIONS if fraction < 1],
        "widths": [replace(encoder, width=width // NARROWER) for encoder in both],
        "lengths": [replace(encoder, steps=n) for n in (steps // SHORTER, steps * LONGER) for encoder in both],
    }
    tasks = ALL if arm == "objectives" else FROZEN
    yield from ((encoder, tasks) for encoder in (*both, *others[arm]))
