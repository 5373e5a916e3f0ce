"""A training run: what it is made of, and what happens around each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from m3ae_kernels.dispatch import choose_impl
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.config import Config
from m3ae_fast.data import BadSamples, Data, Preparation, Share, eval_loader, open_data, train_loader
from m3ae_fast.data.order import hash64
from m3ae_fast.drawing import draw_run
from m3ae_fast.engine import checkpoint
from m3ae_fast.engine.background import Background
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.evaluate import evaluate
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.interface import Engine
from m3ae_fast.engine.loss_watch import LossWatch
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.engine.run_folder import RunFolder
from m3ae_fast.engine.run_log import RunLog
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.engine.signals import StopRequest
from m3ae_fast.engine.throughput import StepCounts, Throughput
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import dtype_of, fast_precision, missing_for_triton, peak_flops, peak_memory
from m3ae_fast.model.attention import attention_backend
from m3ae_fast.model.batch import LossCounts, PackedBatch
from m3ae_fast.model.m3ae import M3AE, Losses


@dataclass
class Run:
    """Parts that stay, and `step`: optimiser steps taken so far."""

    config: Config
    ranks: Ranks
    folder: RunFolder | None  # on the main rank alone, as the log
    log: RunLog | None
    data: Data
    share: Share
    schedule: Schedule
    engine: Engine
    train_loader: DataLoader[PackedBatch]
    eval_loader: DataLoader[PackedBatch] | None
    throughput: Throughput
    watch: LossWatch
    saving: Background  # of checkpoints, on the main rank
    bad: BadSamples
    start: int
    step: int

    @classmethod
    def set_up(cls, config: Config, resume: str, ranks: Ranks, folder: RunFolder | None) -> Run:
        """Find the checkpoint to go on from, open the data, build model and engine.

        Raises:
            UserError: something is missing, or does not fit something else.
        """
        try:
            triton = choose_impl("auto", ranks.device) == "triton"
        except ValueError as error:
            raise UserError(str(error)) from None
        if triton and ranks.device.type == "cuda" and (missing := missing_for_triton()):
            raise UserError(f"Triton, which the kernels are written in, needs {' and '.join(missing)} on this machine")
        cfg = config.train
        found = ranks.told(lambda: checkpoint.find(config.run.dir, resume))
        share = Share(*split_batch(cfg, ranks.world), ranks.rank, ranks.world)
        data = ranks.main_first(lambda: open_data(config.data, config.model, progress=ranks.is_main))
        schedule = Schedule(cfg, config.optim, data.train.samples)

        torch.manual_seed(config.run.seed)
        model = M3AE(config.model, config.loss)
        engine = build_engine(model, config, ranks)
        step = _restore(engine, found, config, ranks) if found else 0

        preparation = Preparation(model.geometry, config.masking, data.tokenizer, config.run.seed)
        steps, pin = range(step, schedule.total_steps), ranks.device.type == "cuda"
        peak = ranks.world * peak_flops(ranks.device, dtype_of(cfg.precision))
        return cls(
            config,
            ranks,
            folder,
            RunLog(config.run.dir, step, schedule.total_steps) if ranks.is_main else None,
            data,
            share,
            schedule,
            engine,
            train_loader(config.data, data.train, preparation, share, steps, pin_memory=pin),
            eval_loader(config.data, data.val, preparation, share, cfg.eval_samples, pin_memory=pin)
            if data.val
            else None,
            Throughput(config.model, config.masking, peak),
            LossWatch(),
            Background(),
            BadSamples(config.data.max_bad_fraction, data.train.samples),
            start=step,
            step=step,
        )

    def announce(self) -> None:
        """Say what the run is, and name the shards that are not whole."""
        if self.log:
            self.bad.report(self.data.train.damaged)
            self.log.say(self._describe())

    def begin_agreement(self, stop: StopRequest, batches: list[PackedBatch]) -> Callable[[], list[float]]:
        """Begin to sum over ranks what they must agree on before a step: whether anybody wants to stop, and counts."""
        own = (stop.asked, self.watch.failed() or self.saving.failed(), *StepCounts.of(batches, self.config.model))
        return self.ranks.start_sum(own)

    def agree(self, fed: Fed) -> LossCounts | None:
        """What the losses of the next step are means over; None where a rank asks to stop or has failed.

        Raises:
            UserError: too many samples cannot be used.
        """
        asked, failed, *sums = fed.agreed()
        if asked or failed:
            return None
        counts = StepCounts(*sums)
        for batch in fed.host:
            self.bad.report(batch.skipped)
        self.bad.count(int(counts.samples + counts.skipped), int(counts.skipped))
        self.throughput.add(counts, fed.waited)
        return LossCounts(counts.images / self.ranks.world, counts.captions / self.ranks.world)

    def take_step(self, fed: Fed, counts: LossCounts) -> tuple[list[Losses], Tensor]:
        """One optimiser step. Returns the micro-batches' losses and the gradient norm."""
        if self.step == self.start:
            self._begin()
        if self.config.model.has_dropout:
            torch.manual_seed(hash64(self.config.run.seed, self.step, self.ranks.rank) & 0xFFFFFFFF)
        losses, grad_norm = self.engine.step(fed.device, counts, self.schedule.lr(self.step))
        self.step += 1
        self.watch.add(self.step, [key for batch in fed.host for key in batch.keys], losses, grad_norm)
        if self.log:
            self.log.advance(self.step)
        return losses, grad_norm

    def log_step(self, losses: list[Losses], grad_norm: Tensor) -> None:
        """Log the step just taken, where it is due."""
        if self.step != 1 and not self.schedule.due(self.step, self.config.train.log_every):
            return
        sums = self.ranks.sum([sum(values).item() for values in zip(*losses)])
        if self.log:
            values = {name: value / self.ranks.world for name, value in zip(Losses._fields, sums)}
            values |= {"lr": self.schedule.lr(self.step - 1), "grad_norm": float(grad_norm)}
            values |= {"epoch": self.step / self.schedule.steps_per_epoch, **self.throughput.rates()}
            values |= {"peak_memory_gb": peak_memory(self.ranks.device) / 1e9, "skipped": self.bad.bad}
            self.log.log(self.step, values)

    def evaluate(self) -> None:
        """Log the losses on held-out samples, where there are any and it is due."""
        due = self.step == 0 or self.schedule.due(self.step, self.config.train.eval_every)
        if self.eval_loader is None or not due:
            return
        self.stop_if_not_finite()
        values = evaluate(self.engine, self.eval_loader, self.ranks)
        if self.log:
            self.log.log(self.step, values)

    def save_if_due(self) -> None:
        if self.schedule.due(self.step, self.config.train.save_every):
            self.stop_if_not_finite()
            self.save()

    def save(self) -> None:
        """Gather a checkpoint, then write it, and reconstructions, in the background. Every rank must call it.

        Raises:
            UserError: the save before this one has failed.
        """
        self.ranks.on_main(self.saving.wait)  # before there is a second state in memory
        config, state = self.config, self.engine.state()
        seen = self.step * config.train.global_batch
        info = checkpoint.Info(self.step, seen, config.run.seed, config.model_dump(mode="json"), checkpoint.versions())

        def write() -> None:
            assert self.folder and self.log and state is not None
            self.folder.keep()
            self.log.say(f"saved {checkpoint.save(config.run.dir, state, info, config.train.keep)}")
            if config.train.pictures:
                out = config.run.dir / "reconstructions.png"
                weights = checkpoint.weights(state)
                draw_run(config, weights, self.data.shown, self.data.tokenizer, out, config.train.pictures)

        if self.ranks.is_main:
            self.saving.start(write)

    def finish(self, stop: StopRequest) -> None:
        """Wait for the last save; where the run was stopped early, save what it has.

        Raises:
            UserError: on all ranks where a save has failed.
        """
        self.ranks.on_main(self.saving.wait)
        self.stop_if_not_finite()
        if self.step == self.schedule.total_steps:
            return
        if self.step > self.start:
            self.save()
            self.ranks.on_main(self.saving.wait)
        if self.log:
            reason = stop.reason or "asked by another rank"
            saved = "" if self.step > self.start else "; nothing to save"
            self.log.say(f"stopped at step {self.step} ({reason}){saved}; --resume auto goes on")

    def stop_if_not_finite(self) -> None:
        """Raises UserError on all ranks where a step of any rank had a loss or gradient norm that is not finite."""
        for found in self.ranks.gather(self.watch.first_bad()):
            if found:
                raise UserError(
                    f"{found}. The last good checkpoint is intact: look at these samples, or go on from it with a "
                    "lower optim.peak_lr, optim.clip_grad=1.0, or train.precision=fp32"
                )

    def _begin(self) -> None:
        """Now that there is a step to take, put away what an earlier attempt left beyond it."""
        if self.log:
            self.log.begin()
            for path in checkpoint.set_aside_after(self.config.run.dir, self.start):
                self.log.say(f"the run goes on from step {self.start}: a later checkpoint is now {path}")

    def _describe(self) -> str:
        """The lines a run begins with."""
        config, model, device = self.config, self.config.model, self.ranks.device
        dtype = dtype_of(config.train.precision)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.model.parameters())
        dims = {model.emb_dim // model.num_heads, model.dec_emb_dim // model.dec_num_heads}
        backends = {attention_backend(device, dtype, dim, model.att_drop > 0) for dim in dims}
        precision: str = config.train.precision
        if precision == "bf16" and fast_precision(device) == "fp32":
            precision = "bf16 (fp32 is faster here)"
        kind = "plain torch" if config.zero is None else f"DeepSpeed ZeRO stage {config.zero.stage}"
        accumulated = f" in {self.share.accumulation} parts" if self.share.accumulation > 1 else ""
        lines = [
            f"M3AE, {parameters:,} parameters, on {self.ranks.world} x {device.type}, {precision}, {kind}, "
            f"attention: {' and '.join(sorted(backends))}, optimiser: {self.engine.optimizer_name}",
            f"{self.data.train.samples:,} samples, batch {config.train.global_batch} = {self.ranks.world} ranks x "
            f"{self.share.micro_batch * self.share.accumulation} samples{accumulated}, "
            f"steps {self.step} to {self.schedule.total_steps}, run folder {config.run.dir}",
        ]
        if self.step >= self.schedule.total_steps:
            lines.append("training is complete; raise train.epochs or train.steps to continue")
        return "\n".join(lines)


def _restore(engine: Engine, path: Path, config: Config, ranks: Ranks) -> int:
    """Load a checkpoint into the engine. Returns the step to go on from."""
    info = ranks.told(lambda: checkpoint.read_info(path))
    checkpoint.check_fits(path, info, config)
    read = ranks.on_main(lambda: checkpoint.open_state(path))

    def own(name: str) -> Tensor:
        assert read is not None  # asked on the main rank alone
        return read(name)

    engine.load_state(info.step, lambda name: ranks.told(lambda: own(name)))
    return info.step
