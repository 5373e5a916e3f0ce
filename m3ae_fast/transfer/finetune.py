"""Fine-tuning: encoder and classification head trained together, as training trains, on augmented labelled samples."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from m3ae_fast.config.transfer import FineTuneConfig
from m3ae_fast.data import BadSamples, Data, Preparation, eval_loader, fingerprint, train_loader
from m3ae_fast.data.labels import Classes
from m3ae_fast.encoding import UNMASKED, require_tokenizer
from m3ae_fast.engine import checkpoint, resuming
from m3ae_fast.engine.build import make_engine
from m3ae_fast.engine.feed import feed
from m3ae_fast.engine.garbage import GarbageCollection
from m3ae_fast.engine.initial_weights import constants
from m3ae_fast.engine.loop import restore
from m3ae_fast.engine.loss_watch import LossWatch
from m3ae_fast.engine.run_log import RunLog
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import pins_memory, settle_precision
from m3ae_fast.transfer.augment import Mixing, RandAugment
from m3ae_fast.transfer.classifier import Classifier, ClassifierConfig
from m3ae_fast.transfer.finetune_loop import FineTuning, TrainableClassifier
from m3ae_fast.transfer.job import Job
from m3ae_fast.transfer.layer_decay import parameter_groups


def set_up(job: Job, resume: str) -> FineTuning:
    """Open the data, build the classifier, find the checkpoint to continue from.

    Raises:
        UserError: something is missing, or does not fit something else.
    """
    try:
        import timm  # noqa: F401
    except ImportError:
        raise UserError("finetune needs timm: pip install 'm3ae-fast[transfer]'") from None
    ranks, run, data = job.ranks, job.config.run, job.config.data
    config = ranks.told(lambda: settle_precision(job.config.finetune, ranks.device))
    found = ranks.told(lambda: resuming.find(run.dir, resume))
    share = split_batch(config, ranks.world, ranks.rank)
    train, val, classes = job.open_labelled()
    if train.has_captions:
        require_tokenizer(job.model)
    schedule = Schedule(config, config, train.samples)

    torch.manual_seed(run.seed)
    model = _build(job, config, classes)
    transform = None
    if config.rand_augment and job.args.modality != "text":
        transform = RandAugment(config.rand_augment, model.config.model)
    fixed, averaged = constants(model, None), None
    if config.ema is not None:
        averaged = Classifier(model.config).to(ranks.device).eval()
        averaged.load_state_dict(model.state_dict())  # its stored positions: the weights will be the average's
    groups = parameter_groups(model, model.config.model.depth, config.weight_decay, config.layer_decay)
    engine = make_engine(model, groups, [model.backbone.encoder], config, config, config.deepspeed, ranks, config.ema)
    sections = {
        "run": run.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "finetune": config.model_dump(mode="json"),
        "classifier": model.config.model_dump(mode="json"),
    }
    step, info = 0, ranks.told(lambda: checkpoint.read_info(found)) if found else None
    layout, _ = resuming.layout_of(info, data, train, config.global_batch)
    if found:
        same = [("classifier", key) for key in sections["classifier"]]
        same += [("run", "seed"), ("finetune", "global_batch")]
        step = restore(engine, found, ranks, sections, same)
    preparation = Preparation(model.backbone.geometry, UNMASKED, job.model.tokenizer, run.seed)
    steps, pin = range(step, schedule.total_steps), pins_memory(ranks.device)
    return FineTuning(
        run=run,
        loop=config,
        sections=sections,
        config=config,
        model=model,
        ranks=ranks,
        pulse=job.pulse,
        folder=job.folder,
        log=RunLog(run.dir, step, schedule.total_steps, run.loggers, sections) if ranks.is_main else None,
        share=share,
        schedule=schedule,
        engine=engine,
        train_loader=train_loader(
            data, train, preparation, share, steps, layout=layout, transform=transform, pin_memory=pin
        ),
        val=val,
        val_loader=eval_loader(data, val, preparation, share, pin_memory=pin),
        max_bad_fraction=data.max_bad_fraction,
        fixed=fixed,
        averaged=averaged,
        watch=LossWatch(),
        bad=BadSamples(data.max_bad_fraction, train.samples),
        stream=fingerprint(Data(train, val, job.model.tokenizer), layout),
        start=step,
        step=step,
    )


def _build(job: Job, config: FineTuneConfig, classes: Classes) -> TrainableClassifier:
    """The classifier on the CPU, with the pre-trained encoder."""
    sizes = job.model.config.model_copy(update={"drop_path": config.drop_path})
    classifier = ClassifierConfig(
        model=sizes, head="finetune", pool=config.pool, modality=job.args.modality, classes=list(classes)
    )
    model = TrainableClassifier(classifier, Mixing(config, sizes, len(classes), job.args.modality == "image"))
    model.load_backbone(job.model.cpu())
    return model


def run(job: Job) -> dict[str, Any] | None:
    """None where the run was stopped before its end."""
    stop = job.stop
    job.pulse.timeout = job.config.run.stall_timeout
    loop = set_up(job, job.args.resume)
    stop.listen()
    with loop.log or nullcontext(), loop.saving, GarbageCollection() as garbage:
        if loop.log:
            loop.log.say(_describe(loop))
        loop.evaluate_if_due(stop)
        for fed in feed(loop.batches(), loop.share.accumulation, job.ranks.device, partial(loop.begin_agreement, stop)):
            samples = loop.agree(fed)
            if samples is None:
                break
            losses, grad_norm = loop.take_step(fed, samples)
            loop.log_step(losses, grad_norm)
            loop.evaluate_if_due(stop)
            loop.save_if_due()
            garbage.after_step(loop.step)
        loop.finish(stop)
        if loop.step < loop.schedule.total_steps:
            return None
        result = loop.evaluate(stop)
        if result is None:
            return None
    _save_classifier(loop)
    loop.draw(loop.model.config.classes)
    return result | {
        "classes": len(loop.model.config.classes),
        "steps": loop.step,
        "train_samples": loop.schedule.samples,
        "val_samples": loop.val.samples,
        "skipped": loop.bad.bad,
    }


def _save_classifier(loop: FineTuning) -> None:
    """Write the trained classifier into the run's folder."""
    if loop.averaged is not None:  # as it was evaluated
        loop.ranks.on_main(partial(loop.averaged.save_pretrained, loop.run.dir))
        return
    state = loop.engine.state()

    def write() -> None:
        assert state is not None
        weights = {name.removeprefix("model/"): t for name, t in state.items() if name.startswith("model/")}
        loop.model.save_pretrained(loop.run.dir, weights | loop.fixed)

    loop.ranks.on_main(write)


def _describe(loop: FineTuning) -> str:
    """The line a run begins with."""
    config, ranks = loop.config, loop.ranks
    deepspeed = config.deepspeed
    kind = f"DeepSpeed ZeRO stage {deepspeed.zero_optimization.stage}" if deepspeed else "plain torch"
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in loop.model.parameters())
    return (
        f"classifier, {parameters:,} parameters, on {ranks.world} x {ranks.device.type}, {config.precision}, {kind}, "
        f"optimiser: {loop.engine.optimizer_name}, {loop.schedule.samples:,} samples, batch {config.global_batch}, "
        f"steps {loop.step} to {loop.schedule.total_steps}"
    )
