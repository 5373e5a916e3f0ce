"""Set-up and training of a new or resumed pre-training run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from m3ae_kernels.dispatch import choose_impl
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.base.bad_samples import BadSamples
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import dtype_of, missing_for_triton, peak_flops, pins_memory, resolve_precision
from m3ae_fast.base.pace import Pace
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.checkpoint.resuming import TEACHER, Resume, require_same
from m3ae_fast.config import Config, require_libraries_of, stored_config
from m3ae_fast.data import (
    Data,
    Layout,
    Preparation,
    ShardStore,
    Share,
    eval_loader,
    lay_out,
    manifest,
    open_data,
    split_batch,
    train_loader,
)
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.data.image_sizes import measured
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.optimizer import state_kinds
from m3ae_fast.engine.parameter_groups import optimizer_groups
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.session import Session
from m3ae_fast.training.diagnostics import fix_of_losses
from m3ae_fast.training.extension import is_extended, resumed_schedule
from m3ae_fast.training.init_from import constants, start_from
from m3ae_fast.training.pretraining_task import PretrainingTask
from m3ae_fast.training.run_lock import RunFolder
from m3ae_fast.training.teacher import Teacher, open_teacher, with_target_width
from m3ae_fast.training.throughput import Throughput, newton_schulz_flops
from m3ae_fast.training.time_limit import FIRST, TimeLimit
from m3ae_fast.training.trainer import Trainer
from m3ae_fast.training.user_warnings import run_warnings
from m3ae_fast.vqgan.model import with_image_targets

Probe = Callable[[Trainer], None]


def pre_train(
    config: Config,
    session: Session,
    *,
    resume: str = "no",
    profile: bool = False,
    make_probe: Callable[[Config, Ranks], Probe | None] = lambda config, ranks: None,
    folder: RunFolder | None = None,
) -> float:
    """Open the data, build or restore the model, and train it. Return the seconds that its evaluations took. Every rank
    must call this function.

    Args:
        config: config of the run.
        session: session of the ranks.
        resume: "auto" to resume from the last checkpoint, if any; "no" to start a new run; or the path of a checkpoint
            or run folder.
        profile: whether to write a profiler trace of some steps to the run folder.
        make_probe: function that returns an evaluation to run in addition to the held-out losses, or None.
        folder: the run folder if the caller has locked it; None: it is locked during the call.

    Raises:
        UserError: data, weights or a library are missing or do not fit the config, a loss is not finite, or a
            checkpoint cannot be written.
    """
    ranks = session.ranks
    ranks.on_main(lambda: require_libraries_of(config, ranks.world))
    resolved = ranks.broadcast(lambda: resolve_precision(config.train, ranks.device))
    config = config.model_copy(update={"train": resolved})
    session.heartbeats.watch_over(config.run)
    locked = nullcontext(folder) if folder else ranks.on_main(lambda: RunFolder(config.run.dir))
    with locked or nullcontext() as folder:
        trainer = set_up(config, resume, session, folder, make_probe)
        trainer.train(config.run.dir if profile and ranks.is_main else None)
        return trainer.pace.paused


def set_up(
    config: Config,
    resume: str,
    session: Session,
    folder: RunFolder | None,
    make_probe: Callable[[Config, Ranks], Probe | None] = lambda config, ranks: None,
) -> Trainer:
    """Open the data, build or restore the model and its engine, and return the trainer. See `pre_train` for the
    arguments. Raises UserError if data or weights are missing or do not fit the config."""
    ranks, cfg = session.ranks, config.train
    _require_kernels(ranks.device)
    teacher = ranks.main_first(lambda: open_teacher(config), session.heartbeats.waiting)
    config = with_target_width(config, teacher)
    found = Resume(config.run.dir, resume, ranks, partial(is_extended, config))
    stream = _open_stream(config, session, found, teacher)
    notes = stream.notes + found.notes(config, stream.fingerprint, resume)
    model, fixed, started = _build_model(config, found, ranks)
    preparation = preparation_of(config, model, stream.data)
    about_teacher = [teacher.to(ranks.device).describe(config)] if teacher else []
    engine = build_engine(model, config, ranks, *([teacher.pass_bytes] if teacher else []))
    found.load(engine)
    held_out, loader = _loaders(config, stream, preparation, found.step, session)
    probe = make_probe(config, ranks)
    task = PretrainingTask(
        config=config,
        engine=engine,
        data=stream.data,
        eval_loader=held_out,
        notes=[*started, *about_teacher, *notes],
        probe=probe,
        with_targets=teacher.with_targets if teacher else _targets_on_device(config, stream.data, ranks.device),
        attention=found.info.attention if found.info else {},
    )
    peak = ranks.world * peak_flops(ranks.device, dtype_of(cfg.precision))
    updates = ranks.world * newton_schulz_flops(config, model, ranks.world)
    return Trainer(
        task=task,
        session=session,
        folder=folder,
        config=config,
        sections=stored_config(config),
        share=stream.share,
        schedule=stream.schedule,
        engine=engine,
        train_loader=loader,
        throughput=Throughput(config.model, config.masking, peak, updates, teacher.flops if teacher else 0.0),
        bad=BadSamples(config.data.max_bad_fraction, stream.data.train.samples),
        stream=stream.fingerprint,
        start=found.step,
        suggested_fix=fix_of_losses(cfg, config.optim),
        constants={f"model/{name}": tensor for name, tensor in fixed.items()},
        limit=stream.limit,
    )


@dataclass(frozen=True)
class _Stream:
    """The data of a run, the sample order, and the resulting schedule of steps."""

    data: Data
    layout: Layout
    share: Share
    schedule: Schedule
    limit: TimeLimit | None
    fingerprint: dict[str, str]
    notes: list[str]


def _open_stream(config: Config, session: Session, found: Resume, teacher: Teacher | None) -> _Stream:
    """Open the data and determine the sample order. Every rank must call this function. Raises UserError if data are
    missing or do not fit the model, or if the data or the teacher differ between ranks."""
    ranks, cfg, info = session.ranks, config.train, found.info
    limit = TimeLimit(3600 * cfg.hours, Pace(first=FIRST), info.spent if info else 0.0) if cfg.hours else None
    share = split_batch(cfg, ranks.world, ranks.rank)
    _count_shards(config, ranks, session.heartbeats)
    data = ranks.main_first(lambda: _open(config, progress=ranks.is_main), session.heartbeats.waiting)
    schedule = resumed_schedule(config, data.train.samples * config.data.repeats, info)
    layout = lay_out(config.data, data.train.sizes, cfg.global_batch)
    mine = fingerprint(data, layout) | ({TEACHER: teacher.identity} if teacher else {})
    require_same(ranks, mine, data.val)
    return _Stream(data, layout, share, schedule, limit, mine, run_warnings(config, data, schedule))


def _loaders(
    config: Config,
    stream: _Stream,
    preparation: Preparation,
    step: int,
    session: Session,
) -> tuple[DataLoader[PackedBatch] | None, DataLoader[PackedBatch]]:
    """Return the loaders of held-out samples, if there are any, and of training samples from `step` on."""
    cfg, data, schedule, pin = config.train, stream.data, stream.schedule, pins_memory(session.ranks.device)
    held_out = None
    if data.val:
        held_out = eval_loader(config.data, data.val, preparation, stream.share, cfg.eval_samples, pin_memory=pin)
    changing = stream.limit and step < schedule.total_steps
    last = schedule.most_steps if changing else schedule.total_steps
    steps = range(step, last)
    make = partial(train_loader, layout=stream.layout, node=session.ranks.node(), pin_memory=pin)
    return held_out, session.ranks.main_first(lambda: make(config.data, data.train, preparation, stream.share, steps))


def _targets_on_device(config: Config, data: Data, device: torch.device) -> Callable[[PackedBatch], PackedBatch]:
    """Return a function that adds image targets computed on the device to a batch, or returns the batch unchanged if
    there are no such targets."""
    vqgan = data.image_tokenizer
    if vqgan is None or config.data.image_tokens != "device":
        return lambda batch: batch
    vqgan.to(device)
    return lambda batch: with_image_targets(batch, vqgan, config.model)


def _count_shards(config: Config, ranks: Ranks, heartbeats: Heartbeats) -> None:
    """Create the missing manifests of remote shards. Raises the same errors as `manifest.prepare`."""
    data = config.data
    store = ranks.main_first(lambda: ShardStore(data.cache_dir, data.cache_gb), heartbeats.waiting)
    for sources in (data.train, data.val):
        for number, source in enumerate(sources):
            manifest.prepare(source.shards, store, ranks, heartbeats.waiting, (config.run.seed, number))


def _require_kernels(device: torch.device) -> None:
    """Raise UserError if the kernels cannot run, because M3AE_KERNELS_IMPL is invalid or there is no compiler for
    Triton."""
    try:
        triton = choose_impl("auto", device) == "triton"
    except ValueError as error:
        raise UserError(str(error)) from None
    if triton and device.type == "cuda" and (missing := missing_for_triton()):
        raise UserError(f"the Triton kernels need {' and '.join(missing)} on this machine")


def _build_model(config: Config, found: Resume, ranks: Ranks) -> tuple[M3AE, dict[str, Tensor], list[str]]:
    """Return the model on the CPU with its initial weights, the weights that training does not change, and notes about
    imported weights. Raises UserError if weights do not fit."""
    torch.manual_seed(config.run.seed)
    model, notes = M3AE(config.model, config.loss), []
    found.open(model, state_kinds(model, optimizer_groups(model, config.optim), config.train.ema))
    if not found.read and config.model.init_from:
        notes = [start_from(model, config.model.init_from, ranks)]
    return model, constants(model, found.read), notes


def _open(config: Config, progress: bool) -> Data:
    """Open the datasets and, for models with native aspect ratio, read the image sizes."""
    data = open_data(config.data, config.model, progress=progress)
    return data if config.model.resize == "square" else replace(data, train=measured(data.train, progress=progress))


def preparation_of(config: Config, model: M3AE, data: Data) -> Preparation:
    """Return the settings by which the loader converts samples to batches: the geometry of the images, the masking, the
    tokenizers and the seed."""
    tokens, vqgan = config.data.image_tokens, data.image_tokenizer
    return Preparation(
        model.geometry,
        config.masking,
        data.tokenizer,
        config.run.seed,
        image_tokenizer=vqgan if tokens == "workers" else None,
        # with one crop, one pass of the teacher serves all views of a sample
        one_crop=config.model.image_targets == "features",
        counted_for=config.model,
    )
