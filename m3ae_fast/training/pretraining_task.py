"""The pre-training task: loss denominators, evaluation on held-out samples, and the first log lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from m3ae_fast import checkpoint
from m3ae_fast.base.hardware import dtype_of, fast_precision
from m3ae_fast.base.wording import counted
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import Config
from m3ae_fast.data import Data
from m3ae_fast.drawing.during_training import draw_training
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.parameter_groups import lr_scale
from m3ae_fast.engine.validation_metrics import Baselines, evaluate
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.stoppable_loop import Stopped, until_stopped
from m3ae_fast.training.attention_kernels import RunAttention
from m3ae_fast.training.metrics_log import RunLog
from m3ae_fast.training.throughput import StepCounts
from m3ae_fast.training.trainer import Trainer
from m3ae_fast.training.user_warnings import open_options

_LOSSES = ("val_image_loss", "val_text_loss")


@dataclass(kw_only=True)
class PretrainingTask:
    """The task of pre-training an M3AE."""

    config: Config
    engine: ModelEngine
    data: Data
    eval_loader: DataLoader[PackedBatch] | None
    notes: list[str]  # notes for the user, printed at the start
    probe: Callable[[Trainer], None] | None  # an additional evaluation
    with_targets: Callable[[PackedBatch], PackedBatch]  # adds image targets to a batch on the device
    # names of the attention kernels by part of the network; before the first step, those of the resumed run
    attention: dict[str, str]

    @property
    def not_computed(self) -> tuple[str, ...]:
        """Return the prefixes of the losses that the run does not compute: without a vocabulary, those of texts."""
        return () if self.config.model.vocab_size else ("text_",)

    def count(self, batches: list[PackedBatch]) -> StepCounts:
        """Return the counts of a step's micro-batches, which are on the CPU."""
        return StepCounts.of(batches, self.config.model)

    def describe(self, trainer: Trainer) -> list[str]:
        """Choose the attention kernels, log incomplete shards, and return the first log lines."""
        ranks, model = trainer.ranks, self.config.model
        attention = RunAttention(model, self.config.masking, ranks.device, dtype_of(self.config.train.precision))
        # Only rank 0 benchmarks kernels, and checkpoints store its choice. If other ranks or a resumed run chose other
        # kernels, their results might not be bitwise equal.
        choose = partial(attention.choose, trainer.share.micro_batch, self.attention)
        self.attention, times = ranks.broadcast(choose)
        attention.use_kernels(self.attention)
        described = attention.describe()
        damaged = self.data.train.damaged + (self.data.val.damaged if self.data.val else [])
        trainer.bad.report(ranks.from_main(damaged), log=ranks.is_main)
        if not ranks.is_main:
            return []
        tried = [f"attention of the {part}: {_shown(each)}" for part, each in times.items()]
        return [*self._first_lines(trainer, described), *tried, *(f"note: {note}" for note in self.notes)]

    def evaluate(self, trainer: Trainer) -> None:
        """Evaluate and log the losses on held-out samples, if there are any, and the accuracy of the k-NN probe, if
        there is one. Each of the two evaluations runs only if it is due, and ends early if a rank is asked to stop."""
        train = self.config.train
        if self.eval_loader is not None:
            with trainer.evaluation("losses", train.eval_every):
                self._evaluate_losses(trainer, self.eval_loader)
        if self.probe and train.probe:
            with trainer.evaluation("probe", train.probe.every):
                self.probe(trainer)

    def conclude(self, trainer: Trainer) -> dict[str, Any]:
        """Return an empty result, because all results are in the run folder."""
        return {}

    def after_save(self, log: RunLog, step: int, path: Path) -> None:
        """Plot reconstructions of samples with the weights of the checkpoint at `path`, for the run folder and the
        loggers."""
        if self.config.train.pictures:
            weights = checkpoint.read_weights(path, average=False)
            drawn = draw_training(self.config, weights, self.data.shown, self.data.tokenizer)
            for name, picture in drawn.items():
                log.figure(step, name, picture)

    def _evaluate_losses(self, trainer: Trainer, loader: DataLoader[PackedBatch]) -> None:
        if not trainer.to_evaluate(self.config.train.eval_every, *_LOSSES):
            return
        trainer.stop_if_diverged()
        model = self.engine.model
        assert isinstance(model, M3AE)
        baselines = Baselines(model, self.config.train.precision, trainer.ranks)
        batches = trainer.heartbeats.watch(loader, f"evaluating after step {trainer.step}")
        try:
            stoppable = until_stopped(batches, trainer.ranks, trainer.stop)
            values = evaluate(self.engine, stoppable, trainer.ranks, self.with_targets, baselines)
        except Stopped:
            trainer.cut_short()
            return
        trainer.log.log(trainer.step, values)
        # if no held-out sample could be used, there is no loss
        if not values.keys().isdisjoint(_LOSSES) and all(map(math.isfinite, values.values())):
            trainer.saver.evaluation_was_finite(trainer.step)

    def _first_lines(self, trainer: Trainer, attention: str) -> list[str]:
        """Return the first log lines: model, device and engine; samples and steps; learning rate."""
        config, engine, ranks, schedule = self.config, self.engine, trainer.ranks, trainer.schedule
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
        precision: str = config.train.precision
        if precision == "bf16" and fast_precision(ranks.device) == "fp32":
            precision = "bf16 (fp32 is faster here)"
        views = f" x {config.data.repeats} views" if config.data.repeats > 1 else ""
        least, rest = divmod(config.train.global_batch, ranks.world)
        per_rank = f"{least} or {least + 1} samples" if rest else counted(least, "sample")
        accumulated = f" in {trainer.share.accumulation} micro-batches" if trainer.share.accumulation > 1 else ""
        adjusted = f", adjusted to train.hours={config.train.hours:g}" if config.train.hours else ""
        begin = schedule.decay_begin
        falls = "" if begin is None else f", with a decay after {begin:,} steps"
        lowest = lr_scale(0, config.model.depth, config.optim.layer_decay)
        layers = "" if lowest == 1 else f"; multiplied by {lowest:.3g} in the embeddings (optim.layer_decay)"
        lines = [
            f"M3AE, {parameters:,} parameters, on {ranks.world} x {ranks.device.type}, {precision}, {engine.name}, "
            f"attention: {attention}, optimiser: {engine.optimizer_name}",
            f"{self.data.train.samples:,} samples{views}, "
            f"batch {config.train.global_batch} = {counted(ranks.world, 'rank')} x {per_rank}{accumulated}, "
            f"steps {trainer.step} to {schedule.total_steps}{adjusted}, run folder {config.run.dir}",
            f"{schedule.describe_rate()}, after {schedule.warmup_steps:,} steps of warm-up{falls}{layers}",
        ]
        lines += filter(None, (open_options(config), engine.memory))
        if trainer.step >= schedule.total_steps:
            lines.append(f"training is complete; {how_to_continue(trainer, config)}")
        return lines


def how_to_continue(trainer: Trainer, config: Config) -> str:
    """Return advice on how to extend a run that has taken all of its steps."""
    schedule = trainer.schedule
    if config.train.hours and config.optim.decay is not None and schedule.total_steps < schedule.most_steps:
        return "raise train.hours to continue"
    fixed = "set train.hours=null and " if config.train.hours else ""
    return f"{fixed}raise train.epochs or train.steps to continue"


def _shown(times: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    return shown or "no fused attention kernel works on this GPU; padded attention is used"
