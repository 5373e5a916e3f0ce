"""The largest model that the data and the time allow, and for how many steps: measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m3ae_fast.config import Config
from m3ae_fast.engine.needs import memory_needed
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.hardware import missing_memory, settle_precision
from m3ae_fast.pretraining import choices
from m3ae_fast.pretraining.choices import Facts, Rung, Shards
from m3ae_fast.process.program import Session
from m3ae_fast.progress import duration
from m3ae_fast.run.pace import Pace, measure

TRAINING = 0.8  # of the time; the rest is for evaluating, pictures and saving
_TRIAL, _LONGEST_TRIAL = 0.02, 8.0  # of the time, and seconds, for the steps that measure a size


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why."""

    config: Config
    lines: list[str]


def choose(
    facts: Facts, shards: Shards, out: Path, hours: float, labels: str, overrides: Sequence[str], session: Session
) -> Plan:
    """Return the config of a run that fits the time.

    Raises:
        UserError: an override is not possible, or what would stop the run at its start.
        Stopped: somebody asks to stop.
    """
    seconds = TRAINING * 3600 * hours

    def config_of(rung: Rung, batch: int, steps: int) -> Config:
        return choices.settings(facts, shards, out, rung, batch, steps, labels, overrides)

    allowed = choices.possible(choices.rungs(facts), lambda rung: config_of(rung, choices.SMALLEST_BATCH, 1))

    def measured(rung: Rung) -> Pace:
        config = config_of(rung, choices.batch_of(facts.samples), 1)
        settled = config.model_copy(update={"train": settle_precision(config.train, session.ranks.device)})
        return measure(settled, session, min(_TRIAL * 3600 * hours, _LONGEST_TRIAL))

    rung, pace = allowed[0], measured(allowed[0])
    why = _why_not_larger(facts)
    for larger in allowed[1:]:
        needed = memory_needed(config_of(larger, choices.SMALLEST_BATCH, 1), 1, choices.SMALLEST_BATCH)
        if lacking := missing_memory(needed, session.ranks.device):
            why = f'not "{larger.name}", for which {lacking}'
            break
        other = measured(larger)
        if not choices.reaches(seconds, other.sample, facts.samples):
            why = _too_slow(larger, seconds, other, facts)
            break
        rung, pace = larger, other
    fitted = choices.fitted_batch(seconds, pace.sample, facts.samples)
    batch = choices.given(overrides, "train.global_batch") or fitted
    config = config_of(rung, batch, choices.steps_in(seconds, pace.sample, batch, facts.samples))
    return Plan(config, _lines(config, facts, rung, why, pace, hours))


def _why_not_larger(facts: Facts) -> str:
    """Return why no larger size than those that fit the samples is considered."""
    above = [rung for rung in choices.LADDER if rung.samples > facts.samples]
    return f'"{above[0].name}" is for {above[0].samples:,.0f} samples or more' if above else "there is no larger one"


def _too_slow(rung: Rung, seconds: float, pace: Pace, facts: Facts) -> str:
    """Return why a size is too slow for the time."""
    seen = seconds / pace.sample
    epochs = seen / facts.samples
    return (
        f'"{rung.name}" is too slow: in the time it would train on {seen:,.0f} images, '
        f"{epochs:,.{0 if epochs >= 10 else 1}f} epochs, and a larger model is chosen from {choices.EPOCHS} epochs and "
        f"{choices.SEEN:,} images on"
    )


def _lines(config: Config, facts: Facts, rung: Rung, why: str, pace: Pace, hours: float) -> list[str]:
    m, t = config.model, config.train
    schedule = Schedule(t, config.optim, facts.samples)
    steps, per_epoch = schedule.total_steps, schedule.steps_per_epoch
    kind = (
        f"captions of up to {m.text_length} tokens of {m.vocab_size:,}" if m.vocab_size else "no captions: image-only"
    )
    seconds = pace.seconds(config, schedule)
    epochs = steps / per_epoch
    capped = f"; {choices.LONGEST} epochs are the most" if epochs == choices.LONGEST else ""
    return [
        f"data: {facts.samples:,} samples and {facts.held_out:,} held out; {kind}; "
        + (f"{facts.classes} classes" if facts.classes else "no classes"),
        f'model: "{m.size or rung.name}", {m.emb_dim} wide, {m.depth} deep, images of {m.image_size} px in patches of '
        f"{m.patch_size} (half of them have {facts.short_side} px or more); {why}",
        f"length: {steps:,} steps of {t.global_batch} samples, {epochs:,.{0 if epochs >= 10 else 1}f} epochs, about "
        f"{duration(seconds)} at {1 / pace.sample:,.0f} samples/s, measured over {pace.steps} steps; "
        f"--hours {hours:g}{capped}",
    ]
