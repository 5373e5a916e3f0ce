"""A pre-training run: what it is made of, and what is its own around each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from m3ae_kernels.dispatch import choose_impl
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast import checkpoint
from m3ae_fast.base.bad_samples import BadSamples
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import (
    dtype_of,
    fast_precision,
    missing_for_triton,
    peak_flops,
    pins_memory,
    settle_precision,
)
from m3ae_fast.batch.packed import LossCounts, PackedBatch
from m3ae_fast.checkpoint.resuming import Resume, layout_of, require_same
from m3ae_fast.config import Config, remembered, require_libraries_of
from m3ae_fast.data import Data, Preparation, ShardStore, eval_loader, manifest, open_data, train_loader
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.data.image_sizes import measured
from m3ae_fast.drawing.during_training import draw_training
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.optimizer import optimizer_groups, state_kinds
from m3ae_fast.engine.schedule import Change, Schedule, split_batch
from m3ae_fast.engine.validation import Yardsticks, evaluate
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.heartbeats import Pulse
from m3ae_fast.process.program import Session
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.stopping import Stopped, until_stopped
from m3ae_fast.training.attention import RunAttention
from m3ae_fast.training.initial_weights import constants, start_from
from m3ae_fast.training.loop import Loop, train
from m3ae_fast.training.notices import cautions, open_options
from m3ae_fast.training.run_folder import RunFolder
from m3ae_fast.training.throughput import StepCounts, Throughput
from m3ae_fast.training.time_limit import TimeLimit
from m3ae_fast.vqgan.model import with_image_targets


@dataclass(kw_only=True)
class Run(Loop):
    """A pre-training run."""

    config: Config
    data: Data
    eval_loader: DataLoader[PackedBatch] | None
    fixed: dict[str, Tensor]  # weights that training does not change
    notes: list[str]  # what a user should know before it starts

    def __post_init__(self) -> None:
        super().__post_init__()
        peak = self.ranks.world * peak_flops(self.ranks.device, dtype_of(self.config.train.precision))
        self.throughput = Throughput(self.config.model, self.config.masking, peak)
        self.probe: Callable[[Run], None] | None = None  # evaluates too, where it is due

    @classmethod
    def set_up(
        cls, config: Config, resume: str, session: Session, folder: RunFolder | None, with_changes: bool = False
    ) -> Run:
        """Open the data, build or restore model and engine. Raises UserError where something is missing or unfit."""
        ranks, cfg = session.ranks, config.train
        _require_kernels(ranks.device)
        found = Resume(config.run.dir, resume, ranks, partial(_extended, config))
        limit = TimeLimit(3600 * cfg.hours, found.info.spent if found.info else 0.0) if cfg.hours else None
        share = split_batch(cfg, ranks.world, ranks.rank)
        _count_shards(config, ranks, session.pulse)
        data = ranks.main_first(lambda: _open(config, progress=ranks.is_main), session.pulse.waiting)
        changes = tuple(Change(*each) for each in found.info.changes) if limit and found.info else ()
        schedule = Schedule(cfg, config.optim, data.train.samples * config.data.repeats, changes)
        layout, notes = layout_of(found.info, config.data, data.train, cfg.global_batch, with_changes)
        stream = fingerprint(data, layout)
        require_same(ranks, stream, data.val)
        notes += cautions(config, data, schedule) + found.notes(config, stream, resume, with_changes)

        model, fixed, started = _build_model(config, found, ranks)
        preparation = _preparation(config, model, data)
        engine = build_engine(model, config, ranks)
        found.load(engine)
        if data.image_tokenizer and config.data.image_tokens == "device":
            data.image_tokenizer.to(ranks.device)

        held_out, pin = None, pins_memory(ranks.device)
        if data.val:
            held_out = eval_loader(config.data, data.val, preparation, share, cfg.eval_samples, pin_memory=pin)
        ended = found.step >= schedule.total_steps
        steps = range(found.step, schedule.most_steps if limit and not ended else schedule.total_steps)
        node = session.node()
        make_loader = partial(train_loader, layout=layout, node=node, pin_memory=pin)
        loader = ranks.main_first(lambda: make_loader(config.data, data.train, preparation, share, steps))
        return cls(
            session=session,
            folder=folder,
            run=config.run,
            settings=cfg,
            sections=remembered(config),
            config=config,
            data=data,
            share=share,
            schedule=schedule,
            engine=engine,
            train_loader=loader,
            eval_loader=held_out,
            bad=BadSamples(config.data.max_bad_fraction, data.train.samples),
            stream=stream,
            fixed=fixed,
            notes=[*started, *notes],
            start=found.step,
            attention=found.info.attention if found.info else {},
            limit=limit,
        )

    def announce(self) -> None:
        """Say what the run is, and name the shards that are not whole."""
        dtype = dtype_of(self.config.train.precision)
        attention = RunAttention(self.config.model, self.config.masking, self.ranks.device, dtype)
        # rank 0 tries kernels, and its checkpoints remember them: or else ranks and resumed runs may differ in bits
        choose = partial(attention.choose, self.share.micro_batch, self.attention)
        self.attention, times = self.ranks.broadcast(choose)
        attention.settle(self.attention)
        described = attention.describe()
        damaged = self.data.train.damaged + (self.data.val.damaged if self.data.val else [])
        self.bad.report(self.ranks.from_main(damaged), say=self.ranks.is_main)
        if self.ranks.is_main:
            tried = [f"attention of the {part}: {_shown(each)}" for part, each in times.items()]
            self.log.say("\n".join([self._describe(described), *tried, *(f"note: {note}" for note in self.notes)]))

    def count(self, batches: list[PackedBatch]) -> StepCounts:
        return StepCounts.of(batches, self.config.model)

    @property
    def absent(self) -> tuple[str, ...]:
        return () if self.config.model.vocab_size else ("text_",)

    def counted(self, sums: list[float], waited: float) -> LossCounts:
        counts = StepCounts(*sums)
        self.bad.count(int(counts.samples + counts.skipped), int(counts.skipped))
        self.throughput.add(counts, waited)
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

    def evaluate_if_due(self) -> None:
        """Log the losses on held-out samples and the k-NN probe's accuracy, each where there is one and it is due; not
        where a rank is asked to stop."""
        train = self.config.train
        if self.eval_loader is not None:
            with self.evaluation("losses", train.eval_every):
                self._evaluate(self.eval_loader)
        if self.probe and train.probe:
            with self.evaluation("probe", train.probe.every):
                self.probe(self)

    def _evaluate(self, loader: DataLoader[PackedBatch]) -> None:
        if not self.to_evaluate(self.config.train.eval_every, "val_image_loss", "val_text_loss"):
            return
        self.stop_if_not_finite()
        model = self.engine.model
        assert isinstance(model, M3AE)
        yardsticks = Yardsticks(model, self.config.train.precision, self.ranks)
        batches = self.pulse.watch(loader, f"evaluating after step {self.step}")
        try:
            heeding = until_stopped(batches, self.ranks, self.stop)
            values = evaluate(self.engine, heeding, self.ranks, self.with_targets, yardsticks)
        except Stopped:
            self.cut_short()
            return
        self.log.log(self.step, values)
        if values and all(map(math.isfinite, values.values())):
            self.finite_evaluation = self.step

    def constants(self) -> dict[str, Tensor]:
        return {f"model/{name}": tensor for name, tensor in self.fixed.items()}

    def after_save(self, step: int, path: Path) -> None:
        """Draw samples, for the run folder and for the loggers."""
        if self.config.train.pictures:
            weights = checkpoint.read_weights(path, average=False)
            drawn = draw_training(self.config, weights, self.data.shown, self.data.tokenizer)
            for name, picture in drawn.items():
                self.log.picture(step, name, picture)

    def _describe(self, attention: str) -> str:
        """Return the lines a run begins with."""
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
        adjusted = f", adjusted to train.hours={config.train.hours:g}" if config.train.hours else ""
        begin = self.schedule.decay_begin
        falls = "" if begin is None else f", and falling after {begin:,} steps"
        lines = [
            f"M3AE, {parameters:,} parameters, on {self.ranks.world} x {device.type}, {precision}, {kind}, "
            f"attention: {attention}, optimiser: {self.engine.optimizer_name}",
            f"{self.data.train.samples:,} samples{views}, "
            f"batch {config.train.global_batch} = {self.ranks.world} ranks x {per_rank} samples{accumulated}, "
            f"steps {self.step} to {self.schedule.total_steps}{adjusted}, run folder {config.run.dir}",
            f"{self.schedule.describe_rate()}, after {self.schedule.warmup_steps:,} steps of warm-up{falls}",
        ]
        lines += filter(None, (open_options(config), self.engine.memory))
        if self.step >= self.schedule.total_steps:
            fixed = "set train.hours=null and " if config.train.hours else ""
            lines.append(f"training is complete; {fixed}raise train.epochs or train.steps to continue")
        return "\n".join(lines)


def pre_train(
    config: Config,
    session: Session,
    *,
    resume: str = "no",
    with_changes: bool = False,
    profile: bool = False,
    make_probe: Callable[[Run], Callable[[Run], None] | None] = lambda run: None,
) -> None:
    """Open the data, build or restore the model, and train it. Every rank must call it.

    Args:
        config: of the run.
        session: of the ranks.
        resume: "auto" continues from the last checkpoint, if any; "no" starts a new run; else the path of a checkpoint.
        with_changes: continue although data or masks differ from the checkpoint's.
        profile: write a profiler trace of some steps into the run folder.
        make_probe: makes an evaluation of the run in addition to the losses, or None.

    Raises:
        UserError: something is missing or does not fit, a loss is not finite, or a checkpoint cannot be written.
    """
    ranks = session.ranks
    ranks.on_main(lambda: require_libraries_of(config))
    settled = ranks.broadcast(lambda: settle_precision(config.train, ranks.device))
    config = config.model_copy(update={"train": settled})
    session.pulse.watch_over(config.run)
    with ranks.on_main(lambda: RunFolder(config.run.dir)) or nullcontext() as folder:
        run = Run.set_up(config, resume, session, folder, with_changes)
        run.probe = make_probe(run)
        train(run, config.run.dir if profile and ranks.is_main else None)


def _extended(config: Config, info: checkpoint.Info) -> bool:
    """Return whether a run whose learning rate stays until a decay is to be longer than when it wrote a checkpoint."""
    was, now = info.config.get("train") or {}, config.train
    lengths = ((getattr(now, key), was.get(key)) for key in ("steps", "epochs", "hours"))
    return config.optim.decay is not None and any(new and old and new > old for new, old in lengths)


def _shown(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()) or "no kernel but padded matmuls works"


def _count_shards(config: Config, ranks: Ranks, pulse: Pulse) -> None:
    """Make the manifests of remote shards that have none. Errors as `manifest.prepare`'s."""
    data = config.data
    store = ranks.main_first(lambda: ShardStore(data.cache_dir, data.cache_gb), pulse.waiting)

    def gather(value: Any) -> list[Any]:
        with pulse.waiting():
            return ranks.gather(value)

    for sources in (data.train, data.val):
        for number, source in enumerate(sources):
            manifest.prepare(source.shards, store, ranks, gather, ranks.is_main, (config.run.seed, number))


def _require_kernels(device: torch.device) -> None:
    """Raise UserError if the kernels cannot run: an impossible M3AE_KERNELS_IMPL, or no compiler for Triton."""
    try:
        triton = choose_impl("auto", device) == "triton"
    except ValueError as error:
        raise UserError(str(error)) from None
    if triton and device.type == "cuda" and (missing := missing_for_triton()):
        raise UserError(f"Triton, which the kernels are written in, needs {' and '.join(missing)} on this machine")


def _build_model(config: Config, found: Resume, ranks: Ranks) -> tuple[M3AE, dict[str, Tensor], list[str]]:
    """Return the model on the CPU, with the weights that it starts from; its weights that training does not change; and
    a note on others' weights. Raises UserError where weights do not fit it."""
    torch.manual_seed(config.run.seed)
    model, notes = M3AE(config.model, config.loss), []
    found.open(model, state_kinds(model, optimizer_groups(model, config.optim), config.train.ema))
    if not found.read and config.model.init_from:
        notes = [start_from(model, config.model.init_from, ranks)]
    return model, constants(model, found.read), notes


def _open(config: Config, progress: bool) -> Data:
    """Open the data, and of native images their sizes."""
    data = open_data(config.data, config.model, progress=progress)
    return data if config.model.resize == "square" else replace(data, train=measured(data.train, progress=progress))


def _preparation(config: Config, model: M3AE, data: Data) -> Preparation:
    tokens, vqgan = config.data.image_tokens, data.image_tokenizer
    return Preparation(
        model.geometry,
        config.masking,
        data.tokenizer,
        config.run.seed,
        image_tokenizer=vqgan if tokens == "workers" else None,
        stored_codebook=config.model.codebook_size if vqgan and tokens == "shards" else None,
        counted_for=config.model,
    )
