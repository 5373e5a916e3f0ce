"""A pre-training run: what it is made of, and what is its own around each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from m3ae_kernels.dispatch import choose_impl
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.config import Config, DataConfig
from m3ae_fast.data import (
    BadSamples,
    Data,
    Preparation,
    ShardStore,
    counting,
    eval_loader,
    fingerprint,
    open_data,
    train_loader,
)
from m3ae_fast.drawing import draw_run
from m3ae_fast.engine import checkpoint, resuming
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.cautions import cautions
from m3ae_fast.engine.evaluate import evaluate
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.initial_weights import constants, start_from
from m3ae_fast.engine.interface import State
from m3ae_fast.engine.loop import Loop
from m3ae_fast.engine.loss_watch import LossWatch
from m3ae_fast.engine.optimizer import state_kinds
from m3ae_fast.engine.pulse import Pulse
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.engine.run_folder import RunFolder
from m3ae_fast.engine.run_log import RunLog
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.engine.signals import StopRequest
from m3ae_fast.engine.stopping import Stopped, until_stopped
from m3ae_fast.engine.throughput import StepCounts, Throughput
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import dtype_of, fast_precision, missing_for_triton, peak_flops, pins_memory
from m3ae_fast.model.attention import describe
from m3ae_fast.model.batch import LossCounts, PackedBatch
from m3ae_fast.model.image_tokens import with_image_targets
from m3ae_fast.model.m3ae import M3AE


@dataclass(kw_only=True)
class Run(Loop):
    """A pre-training run."""

    config: Config
    data: Data
    eval_loader: DataLoader[PackedBatch] | None
    throughput: Throughput
    fixed: dict[str, Tensor]  # weights that training does not change
    started: str  # from what other weights, for the log
    notes: list[str]  # what a user should know before it starts

    @classmethod
    def set_up(
        cls,
        config: Config,
        resume: str,
        ranks: Ranks,
        folder: RunFolder | None,
        pulse: Pulse,
        with_changes: bool = False,
    ) -> Run:
        """Find the checkpoint to continue from, open the data, build model and engine.

        Raises:
            UserError: something is missing, or does not fit something else.
        """
        _require_kernels(ranks.device)
        cfg = config.train
        found = ranks.told(lambda: resuming.find(config.run.dir, resume))
        share = split_batch(cfg, ranks.world, ranks.rank)
        _count_shards(config.data, ranks, pulse)
        data = ranks.main_first(lambda: open_data(config.data, config.model, progress=ranks.is_main), pulse.waiting)
        schedule = Schedule(cfg, config.optim, data.train.samples * config.data.repeats)

        info = ranks.told(lambda: checkpoint.read_info(found)) if found else None
        layout, notes = resuming.layout_of(info, config.data, data.train, cfg.global_batch, with_changes)
        stream, notes = fingerprint(data, layout), notes + cautions(config, data, schedule)
        if found and info:
            notes += resuming.check_fits(found, info, config, stream, with_changes)
            if resume == "auto":
                notes += ranks.told(lambda: resuming.passed_over(config.run.dir))

        torch.manual_seed(config.run.seed)
        model = M3AE(config.model, config.loss)
        started, step, read = "", 0, None
        if found:
            step, read = resuming.open_checkpoint(found, model, ranks, state_kinds(cfg.ema))
        elif config.model.init_from:
            started = start_from(model, config.model.init_from, ranks)
        fixed = constants(model, read)
        engine = build_engine(model, config, ranks)
        if read:
            engine.load_state(step, read)

        preparation = _preparation(config, model, data)
        if data.image_tokenizer and config.data.image_tokens == "device":
            data.image_tokenizer.to(ranks.device)
        steps, pin = range(step, schedule.total_steps), pins_memory(ranks.device)
        held_out, log, sections = None, None, config.model_dump(mode="json")
        if data.val:
            held_out = eval_loader(config.data, data.val, preparation, share, cfg.eval_samples, pin_memory=pin)
        if ranks.is_main:
            log = RunLog(config.run.dir, step, schedule.total_steps, config.run.loggers, sections)
        peak = ranks.world * peak_flops(ranks.device, dtype_of(cfg.precision))
        return cls(
            run=config.run,
            loop=cfg,
            sections=sections,
            config=config,
            ranks=ranks,
            pulse=pulse,
            folder=folder,
            log=log,
            data=data,
            share=share,
            schedule=schedule,
            engine=engine,
            train_loader=train_loader(
                config.data, data.train, preparation, share, steps, layout=layout, pin_memory=pin
            ),
            eval_loader=held_out,
            throughput=Throughput(config.model, config.masking, peak),
            watch=LossWatch(),
            bad=BadSamples(config.data.max_bad_fraction, data.train.samples),
            fixed=fixed,
            started=started,
            stream=stream,
            notes=notes,
            start=step,
            step=step,
        )

    def announce(self) -> None:
        """Say what the run is, and name the shards that are not whole."""
        config, dtype = self.config, dtype_of(self.config.train.precision)
        attention = describe(config.model, config.masking, self.ranks.device, dtype)  # on all ranks: a GPU's is tried
        if self.log:
            self.bad.report(self.data.train.damaged)
            self.log.say("\n".join([self._describe(attention), *(f"note: {note}" for note in self.notes)]))

    def count(self, batches: list[PackedBatch]) -> StepCounts:
        return StepCounts.of(batches, self.config.model)

    def agree(self, fed: Fed) -> LossCounts | None:
        """What the losses of the next step are means over; None where a rank asks to stop or has failed.

        Raises:
            UserError: too many samples cannot be used.
        """
        sums = self.agreed(fed)
        if sums is None:
            return None
        counts = StepCounts(*sums)
        self.bad.count(int(counts.samples + counts.skipped), int(counts.skipped))
        self.throughput.add(counts, fed.waited)
        return LossCounts(counts.loss_image / self.ranks.world, counts.loss_text / self.ranks.world)

    def seed_step(self) -> None:
        if self.config.model.has_dropout:
            super().seed_step()

    def with_targets(self, batch: PackedBatch) -> PackedBatch:
        """Make the image targets that are made on the device."""
        vqgan = self.data.image_tokenizer
        if vqgan is None or self.config.data.image_tokens != "device":
            return batch
        return with_image_targets(batch, vqgan, self.config.model)

    def rates(self) -> dict[str, float]:
        return self.throughput.rates()

    def evaluate(self, stop: StopRequest) -> None:
        """Log the losses on held-out samples, where there are any and it is due; not where a rank is asked to stop."""
        if self.eval_loader is None:
            return
        if not self.to_evaluate(self.config.train.eval_every, "val_image_loss", "val_text_loss"):
            return
        self.stop_if_not_finite()
        batches = self.pulse.watch(self.eval_loader, f"evaluating after step {self.step}")
        try:
            values = evaluate(self.engine, until_stopped(batches, self.ranks, stop), self.ranks, self.with_targets)
        except Stopped:
            self.cut_short()
            return
        if self.log:
            self.log.log(self.step, values)
        if values and all(map(math.isfinite, values.values())):
            self.proven = self.step

    def complete(self, state: State) -> State:
        return state | {f"model/{name}": tensor for name, tensor in self.fixed.items()}

    def after_save(self, step: int, state: State) -> None:
        """Reconstructions."""
        config = self.config
        if config.train.pictures and self.log:
            out = config.run.dir / "reconstructions.png"
            weights = checkpoint.weights(state)
            draw_run(config, weights, self.data.shown, self.data.tokenizer, out, config.train.pictures)
            self.log.picture(step, "reconstructions", out)

    def _describe(self, attention: str) -> str:
        """The lines a run begins with."""
        config, device = self.config, self.ranks.device
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.model.parameters())
        precision: str = config.train.precision
        if precision == "bf16" and fast_precision(device) == "fp32":
            precision = "bf16 (fp32 is faster here)"
        kind = "plain torch" if config.zero is None else f"DeepSpeed ZeRO stage {config.zero.stage}"
        views = f" x {config.data.repeats} views" if config.data.repeats > 1 else ""
        least, rest = divmod(config.train.global_batch, self.ranks.world)
        per_rank = f"{least} or {least + 1}" if rest else f"{least}"
        accumulated = f" in {self.share.accumulation} parts" if self.share.accumulation > 1 else ""
        lines = [
            f"M3AE, {parameters:,} parameters, on {self.ranks.world} x {device.type}, {precision}, {kind}, "
            f"attention: {attention}, optimiser: {self.engine.optimizer_name}",
            f"{self.data.train.samples:,} samples{views}, "
            f"batch {config.train.global_batch} = {self.ranks.world} ranks x {per_rank} samples{accumulated}, "
            f"steps {self.step} to {self.schedule.total_steps}, run folder {config.run.dir}",
            *([self.started] if self.started else []),
        ]
        if self.step >= self.schedule.total_steps:
            lines.append("training is complete; raise train.epochs or train.steps to continue")
        return "\n".join(lines)


def _count_shards(config: DataConfig, ranks: Ranks, pulse: Pulse) -> None:
    """Make the manifests of remote shards that have none. Errors as `counting.prepare`'s."""
    store = ranks.main_first(lambda: ShardStore(config.cache_dir), pulse.waiting)

    def gather(value: Any) -> list[Any]:
        with pulse.waiting():
            return ranks.gather(value)

    for source in (*config.train, *config.val):
        counting.prepare(source.shards, store, ranks, gather, ranks.is_main)


def _require_kernels(device: torch.device) -> None:
    """Raises UserError where the kernels cannot run: an impossible M3AE_KERNELS_IMPL, or no compiler for Triton."""
    try:
        triton = choose_impl("auto", device) == "triton"
    except ValueError as error:
        raise UserError(str(error)) from None
    if triton and device.type == "cuda" and (missing := missing_for_triton()):
        raise UserError(f"Triton, which the kernels are written in, needs {' and '.join(missing)} on this machine")


def _preparation(config: Config, model: M3AE, data: Data) -> Preparation:
    tokens, vqgan = config.data.image_tokens, data.image_tokenizer
    return Preparation(
        model.geometry,
        config.masking,
        data.tokenizer,
        config.run.seed,
        image_tokenizer=vqgan if tokens == "workers" else None,
        stored_codebook=config.model.codebook_size if vqgan and tokens == "shards" else None,
    )
