"""Fine-tuning: encoder and classification head trained together, as training trains, on augmented labelled samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from m3ae_fast.batch.bad_samples import BadSamples
from m3ae_fast.config.transfer import FineTuneConfig
from m3ae_fast.data import Data, Preparation, eval_loader, train_loader
from m3ae_fast.data.dataset import UNMASKED
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.data.labels import Classes
from m3ae_fast.engine.build import make_engine
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.errors import library
from m3ae_fast.hardware import pins_memory, settle_precision
from m3ae_fast.run.initial_weights import constants
from m3ae_fast.run.resuming import STREAM, Resume, layout_of, require_same
from m3ae_fast.transfer.augment import Mixing, RandAugment, mixes
from m3ae_fast.transfer.classifier import Classifier, ClassifierConfig
from m3ae_fast.transfer.finetune_loop import FineTuning, TrainableClassifier
from m3ae_fast.transfer.job import Job
from m3ae_fast.transfer.labelled_loop import complete
from m3ae_fast.transfer.layer_decay import layer_decay_groups
from m3ae_fast.transfer.recipe import settled

_AUGMENTATION = ("label_smoothing", "mixup", "cutmix", "switch_prob", "rand_augment")


def set_up(job: Job) -> FineTuning:
    """Open the data, build the classifier, find the checkpoint to continue from.

    Raises:
        UserError: something is missing, or does not fit something else.
    """
    library("timm", "finetune needs timm: pip install 'm3ae-fast[transfer]'")
    ranks, run, data = job.ranks, job.config.run, job.config.data
    config = ranks.broadcast(lambda: settle_precision(job.config.finetune, ranks.device))
    found = Resume(run.dir, job.args.resume, ranks)
    train, val, classes = job.open_labelled()
    if train.has_captions:
        job.model.require_tokenizer()
    config = settled(config, train.samples, found.section("finetune"))
    share = split_batch(config, ranks.world, ranks.rank)
    schedule = Schedule(config, config, train.samples)

    torch.manual_seed(run.seed)
    # a lane has pairs of samples in each step where samples are mixed
    pairs = 2 if mixes(config, job.args.modality == "image") else 1
    layout, notes = layout_of(found.info, data, train, share.global_batch // pairs)
    model = _build(job, config, classes, layout.lanes)
    model.mixing.check_share(share)
    transform = None
    if config.rand_augment and job.args.modality != "text":
        transform = RandAugment(config.rand_augment, model.config.model)
    fixed, averaged = constants(model, None), None
    if config.ema is not None:
        averaged = Classifier(model.config).to(ranks.device).eval()
        averaged.load_state_dict(model.state_dict())  # its stored positions: the weights will be the average's
    groups = layer_decay_groups(model, model.config.model.depth, config.weight_decay, config.layer_decay)
    engine = make_engine(model, groups, [model.backbone.encoder], config, config, config.deepspeed, ranks, config.ema)
    sections = {
        "run": run.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "finetune": config.model_dump(mode="json"),
        "classifier": model.config.model_dump(mode="json"),
    }
    stream = fingerprint(Data(train, val, job.model.tokenizer), layout)
    require_same(ranks, stream, val)
    same = [("classifier", key) for key in sections["classifier"]]
    same += [("run", "seed"), ("finetune", "global_batch")]
    same += [("data", key) for key in STREAM] + [("finetune", key) for key in _AUGMENTATION]
    notes += found.restore(engine, sections, same, stream)
    preparation = Preparation(model.backbone.geometry, UNMASKED, job.model.tokenizer, run.seed)
    steps, pin = range(found.step, schedule.total_steps), pins_memory(ranks.device)
    return FineTuning(
        session=job.session,
        folder=job.folder,
        run=run,
        settings=config,
        sections=sections,
        model=model,
        share=share,
        schedule=schedule,
        engine=engine,
        train_loader=train_loader(
            data,
            train,
            preparation,
            share,
            steps,
            layout=layout,
            node=job.session.node(),
            transform=transform,
            pin_memory=pin,
        ),
        val=val,
        val_loader=eval_loader(data, val, preparation, share, pin_memory=pin),
        max_bad_fraction=data.max_bad_fraction,
        fixed=fixed,
        averaged=averaged,
        bad=BadSamples(data.max_bad_fraction, train.samples),
        stream=stream,
        notes=notes,
        classes=classes,
        names=job.names,
        start=found.step,
    )


def _build(job: Job, config: FineTuneConfig, classes: Classes, lanes: int) -> TrainableClassifier:
    """Build the classifier on the CPU, with the pre-trained encoder."""
    sizes = job.model.config.model_copy(update={"drop_path": config.drop_path})
    classifier = ClassifierConfig(
        model=sizes, head="finetune", pool=config.pool, modality=job.args.modality, classes=list(classes)
    )
    images_only = job.args.modality == "image"
    seed, repeats = job.config.run.seed, job.config.data.repeats
    mixing = Mixing(config, sizes, len(classes), images_only, seed, repeats, lanes)
    model = TrainableClassifier(classifier, mixing)
    model.load_backbone(job.model.cpu())
    return model


def run(job: Job) -> dict[str, Any] | None:
    """Return the accuracies; None where the run was stopped before its end."""
    job.pulse.watch_over(job.config.run)
    loop = set_up(job)
    return complete(job, loop, partial(_save_classifier, loop), loop.val.samples)


def _save_classifier(loop: FineTuning) -> None:
    """Write the trained classifier into the run's folder."""
    if loop.averaged is not None:  # as it was evaluated
        loop.ranks.on_main(partial(loop.averaged.save_pretrained, loop.run.dir))
        return
    weights = loop.engine.whole("model") | loop.fixed
    loop.ranks.on_main(partial(loop.model.save_pretrained, loop.run.dir, weights))
