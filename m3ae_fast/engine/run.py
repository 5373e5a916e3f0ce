"""A pre-training run: what it is made of, what it counts, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from m3ae_kernels.dispatch import choose_impl
from torch.utils.data import DataLoader

from m3ae_fast.config import Config
from m3ae_fast.data import BadSamples, Data, Preparation, Share, eval_loader, open_data, train_loader
from m3ae_fast.drawing import draw_run
from m3ae_fast.engine import checkpoint
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.evaluate import evaluate
from m3ae_fast.engine.feed import Fed
from m3ae_fast.engine.interface import State
from m3ae_fast.engine.loop import Loop, restore
from m3ae_fast.engine.loss_watch import LossWatch
from m3ae_fast.engine.ranks import Ranks
from m3ae_fast.engine.run_folder import RunFolder
from m3ae_fast.engine.run_log import RunLog
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.engine.throughput import StepCounts, Throughput
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import dtype_of, fast_precision, peak_flops
from m3ae_fast.model.attention import attention_backend
from m3ae_fast.model.batch import LossCounts, PackedBatch
from m3ae_fast.model.m3ae import M3AE


@dataclass(kw_only=True)
class Run(Loop):
    """A pre-training run."""

    config: Config
    data: Data
    eval_loader: DataLoader[PackedBatch] | None
    throughput: Throughput

    @classmethod
    def set_up(cls, config: Config, resume: str, ranks: Ranks, folder: RunFolder | None) -> Run:
        """Find the checkpoint to go on from, open the data, build model and engine.

        Raises:
            UserError: something is missing, or does not fit something else.
        """
        try:
            choose_impl("auto", ranks.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        cfg = config.train
        found = ranks.told(lambda: checkpoint.find(config.run.dir, resume))
        share = Share(*split_batch(cfg, ranks.world), ranks.rank, ranks.world)
        data = ranks.main_first(lambda: open_data(config.data, config.model, progress=ranks.is_main))
        schedule = Schedule(cfg, config.optim, data.train.samples)

        torch.manual_seed(config.run.seed)
        model = M3AE(config.model, config.loss)
        engine = build_engine(model, config, ranks)
        sections = config.model_dump(mode="json")
        step = 0
        if found:
            same = [("model", key) for key in sections["model"]] + [("run", "seed"), ("train", "global_batch")]
            step = restore(engine, found, ranks, sections, same)[0]

        preparation = Preparation(model.geometry, config.masking, data.tokenizer, config.run.seed)
        steps, pin = range(step, schedule.total_steps), ranks.device.type == "cuda"
        peak = ranks.world * peak_flops(ranks.device, dtype_of(cfg.precision))
        return cls(
            run=config.run,
            loop=cfg,
            sections=sections,
            config=config,
            ranks=ranks,
            folder=folder,
            log=RunLog(config.run.dir, step, schedule.total_steps) if ranks.is_main else None,
            data=data,
            share=share,
            schedule=schedule,
            engine=engine,
            train_loader=train_loader(config.data, data.train, preparation, share, steps, pin_memory=pin),
            eval_loader=eval_loader(config.data, data.val, preparation, share, cfg.eval_samples, pin_memory=pin)
            if data.val
            else None,
            throughput=Throughput(config.model, config.masking, peak),
            watch=LossWatch(),
            bad=BadSamples(config.data.max_bad_fraction, data.train.samples),
            start=step,
            step=step,
        )

    def announce(self) -> None:
        """Say what the run is, and name the shards that are not whole."""
        if self.log:
            self.bad.report(self.data.train.damaged)
            self.log.say(self._describe())

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
        return LossCounts(counts.images / self.ranks.world, counts.captions / self.ranks.world)

    def seed_step(self) -> None:
        if self.config.model.has_dropout:
            super().seed_step()

    def rates(self) -> dict[str, float]:
        return self.throughput.rates()

    def evaluate(self) -> None:
        """Log the losses on held-out samples, where there are any and it is due."""
        due = self.step == 0 or self.schedule.due(self.step, self.config.train.eval_every)
        if self.eval_loader is None or not due:
            return
        self.stop_if_not_finite()
        values = evaluate(self.engine, self.eval_loader, self.ranks)
        if self.log:
            self.log.log(self.step, values)

    def after_save(self, state: State) -> None:
        """Reconstructions."""
        config = self.config
        if config.train.pictures:
            out = config.run.dir / "reconstructions.png"
            weights = checkpoint.weights(state)
            draw_run(config, weights, self.data.shown, self.data.tokenizer, out, config.train.pictures)

    def _describe(self) -> str:
        """The lines a run begins with."""
        config, model, device = self.config, self.config.model, self.ranks.device
        dtype = dtype_of(config.train.precision)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.model.parameters())
        dims = {model.emb_dim // model.num_heads, model.dec_emb_dim // model.dec_num_heads}
        backends = {attention_backend(device, dtype, dim, model.att_drop > 0) for dim in dims}
        precision = config.train.precision
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
