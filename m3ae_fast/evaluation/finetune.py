"""Fine-tuning: training of the encoder together with a classification head, on augmented labelled samples.

Shapes: S samples of a batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.hardware import pins_memory, resolve_precision
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.checkpoint.resuming import SAMPLING, Rules
from m3ae_fast.data import eval_loader, lay_out
from m3ae_fast.engine.build import make_engine
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.optimizer import EMA
from m3ae_fast.evaluation.augment import Mixing, RandAugment, mixes
from m3ae_fast.evaluation.finetune_groups import layer_decay_groups
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import ClassLosses, LabelledTask, open_training
from m3ae_fast.evaluation.tasks import Finetune
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.heads.encoding import check_skipped
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.training_defaults import sentence
from m3ae_fast.process.stoppable_loop import Stopped, until_stopped
from m3ae_fast.training.diagnostics import fix_of_losses
from m3ae_fast.training.init_from import constants
from m3ae_fast.training.trainer import Trainer

# if train.eval_every is not set: maximum number of evaluations, and maximum fraction of the run's time for them
_EVALUATIONS, _EVALUATING = 10, 0.05
_AUGMENTATION = ("label_smoothing", "mixup", "cutmix", "switch_prob", "rand_augment")
RULES = Rules(
    same=(
        "classifier.*",
        "task.model",
        "run.seed",
        "train.global_batch",
        *SAMPLING,
        *(f"finetune.{name}" for name in _AUGMENTATION),
    )
)


class TrainableClassifier(Classifier):
    """A classifier with augmentation by mixing. In training mode, `forward(batch, samples)` returns ClassLosses, which
    are sums over the batch divided by `samples`."""

    def __init__(self, config: ClassifierConfig, mixing: Mixing) -> None:
        super().__init__(config)
        self.mixing = mixing

    def forward(self, batch: PackedBatch, samples: float = 1.0) -> Any:
        """Return ClassLosses in training mode, otherwise logits [S, K]."""
        if not self.training:
            return super().forward(batch)
        batch, labels_SK = self.mixing(batch, self.backbone.patch_embed.weight.dtype)
        logits_SK = super().forward(batch).float()
        samples = samples or 1.0  # without samples, the sums are 0, and must not be divided by 0
        loss = F.cross_entropy(logits_SK, labels_SK, reduction="sum") / samples
        correct = (logits_SK.argmax(1) == labels_SK.argmax(1)).sum()
        return ClassLosses(loss, correct.float() / samples)


@dataclass(kw_only=True)
class FineTuningTask(LabelledTask):
    """The task of fine-tuning an encoder with a classification head."""

    model: TrainableClassifier
    engine: ModelEngine
    val_loader: DataLoader[PackedBatch]
    fixed: dict[str, Tensor]  # weights that training does not change
    averaged: Classifier | None  # with train.ema: a copy that receives the averaged weights for evaluations

    def first_line(self, trainer: Trainer) -> str:
        ranks, train = trainer.ranks, trainer.config.train
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        return (
            f"classifier, {parameters:,} parameters, on {ranks.world} x {ranks.device.type}, {train.precision}, "
            f"{self.engine.name}, optimiser: {self.engine.optimizer_name}, {sentence(trainer.schedule, trainer.step)}"
        )

    def is_due(self, trainer: Trainer) -> bool:
        return trainer.to_evaluate(trainer.config.train.eval_every or self._default_period(trainer), "val_top1")

    def _default_period(self, trainer: Trainer) -> int:
        """Return the default number of steps between evaluations, with which evaluations take a small part of the time.
        For one sample, an evaluation takes a third of the time of a training step."""
        schedule = trainer.schedule
        cheap = math.ceil(self.start.val.samples / (3 * trainer.share.global_batch * _EVALUATING))
        return max(schedule.total_steps // _EVALUATIONS, schedule.steps_per_epoch, cheap)

    def shorter(self, trainer: Trainer, steps: float) -> str:
        per_epoch = trainer.schedule.steps_per_epoch
        epochs = int(max(steps / per_epoch, 1))
        return (
            f"--set train.epochs={epochs} ({epochs * per_epoch:,} steps, with a lower accuracy), or the task "
            "logistic, which encodes each image once"
        )

    def conclude(self, trainer: Trainer) -> dict[str, float] | None:
        trainer.stop_if_diverged()
        ranks = trainer.ranks
        own: list[tuple[Predictions, tuple[Skipped, ...]]] = []
        batches = trainer.heartbeats.watch(self.val_loader, f"evaluating after step {trainer.step}")
        try:
            with self._inference(ranks.device) as infer:
                for batch in until_stopped(batches, ranks, trainer.stop):
                    assert batch.labels is not None
                    scores_SK = infer(batch.to(ranks.device)).float()
                    own.append(
                        (
                            Predictions.of(batch.keys, batch.labels, scores_SK, image_hashes=batch.image_hashes),
                            batch.skipped,
                        )
                    )
        except Stopped:
            trainer.cut_short()
            return None
        # the batches are assigned to the ranks in turn, and all ranks have the same number of batches
        predictions, skipped = zip(*(part for turn in zip(*ranks.gather(own)) for part in turn))
        most_bad = self.job.config.data.max_bad_fraction
        check_skipped([each for part in skipped for each in part], self.start.val.samples, most_bad)
        return self.evaluated(trainer, Predictions.joined(predictions))

    @contextmanager
    def _inference(self, device: torch.device) -> Iterator[Callable[[PackedBatch], Tensor]]:
        """Yield a function that maps a batch to its logits, as a context manager. It uses the averaged weights if there
        are any."""
        if self.averaged is None:
            yield self.engine.evaluate
            return
        average = self.engine.whole(EMA)
        for name, p in self.averaged.named_parameters():
            p.data.copy_(average[name])
        bf16 = self.job.config.train.precision == "bf16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield self.averaged

    def save_classifier(self, trainer: Trainer) -> None:
        """Write the classifier to the run folder, with the averaged weights if there are any."""
        folder = trainer.config.run.dir
        if self.averaged is not None:
            save = partial(self.averaged.save_pretrained, folder)
        else:
            save = partial(self.model.save_pretrained, folder, self.engine.whole("model") | self.fixed)
        trainer.ranks.on_main(save)


def set_up(job: Job[Finetune]) -> tuple[FineTuningTask, Trainer]:
    """Open the data, build or restore the classifier, and return the task and its trainer. Raises UserError if the
    data, the model or the checkpoint cannot be used."""
    ranks = job.ranks
    resolved = ranks.broadcast(lambda: resolve_precision(job.config.train, ranks.device))
    job.config = job.config.model_copy(update={"train": resolved})
    start = open_training(job)
    config = job.config
    data, optim, settings = config.data, config.optim, config.finetune

    torch.manual_seed(config.run.seed)
    # if samples are mixed in pairs, each step takes an even number of samples from each lane
    pairs = 2 if mixes(settings, job.modality == "image") else 1
    layout = lay_out(data, start.train.sizes, start.share.global_batch // pairs)
    model = _build(job, layout.lanes)
    model.mixing.check_share(start.share)
    transform = None
    if settings.rand_augment and job.modality != "text":
        transform = RandAugment(settings.rand_augment, model.config.model)
    fixed, averaged = constants(model, None), None
    if config.train.ema is not None:
        averaged = Classifier(model.config).to(ranks.device).eval()
        averaged.load_state_dict(model.state_dict())  # copies the position embeddings; the weights will be overwritten
        averaged.backbone.tokenizer = model.backbone.tokenizer  # so that it is saved with the weights
    groups = layer_decay_groups(model, model.config.model.depth, optim.weight_decay, optim.layer_decay)
    engine = make_engine(model, groups, [model.backbone.encoder], config, ranks)
    sections = {"classifier": model.config.model_dump(mode="json"), "task": {"model": job.options.model}}
    val_batches = eval_loader(data, start.val, job.preparation, start.share, pin_memory=pins_memory(ranks.device))
    task = FineTuningTask(
        job=job,
        start=start,
        model=model,
        engine=engine,
        val_loader=val_batches,
        fixed=fixed,
        averaged=averaged,
    )
    return task, task.trainer(engine, layout, sections, RULES, fix_of_losses(config.train, optim), transform)


def _build(job: Job, lanes: int) -> TrainableClassifier:
    """Return the classifier with the pre-trained encoder, on the CPU."""
    config = job.config.finetune
    sizes = job.model.config.model_copy(update={"drop_path": config.drop_path})
    classifier = ClassifierConfig(
        model=sizes, head="finetune", pool=config.pool, modality=job.modality, classes=list(job.classes)
    )
    images_only = job.modality == "image"
    seed, repeats = job.config.run.seed, job.config.data.repeats
    mixing = Mixing(config, sizes, len(job.classes), images_only, seed, repeats, lanes)
    model = TrainableClassifier(classifier, mixing)
    model.load_backbone(job.model.cpu())
    return model


def run(job: Job[Finetune]) -> dict[str, Any] | None:
    """Run the task and return its result; None if it was stopped before its end."""
    job.heartbeats.watch_over(job.config.run)
    task, trainer = set_up(job)
    return task.complete(trainer, task.start.val.samples)
