"""Accuracy of a fine-tuned classifier or a probe on adversarial images, computed in float32.

Shapes: S samples, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.pace import Pace
from m3ae_fast.base.progress import track
from m3ae_fast.base.randomness import seed32
from m3ae_fast.base.wording import counted
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config.evaluation import RobustnessConfig
from m3ae_fast.data import Corpus, Share, eval_loader
from m3ae_fast.data.labels import class_names, label_corpus
from m3ae_fast.drawing.figures import draw_attack
from m3ae_fast.evaluation.job import Job, summary
from m3ae_fast.evaluation.tasks import Robustness
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.encoding import check_skipped, key_digest
from m3ae_fast.heads.predictions import Predictions, stacked
from m3ae_fast.images.normalisation import from_unit, to_unit

Classify = Callable[[PackedBatch], Tensor]  # a batch on the device -> logits [S, K]
CLEAN = "clean"
_BACKWARD = 2  # cost of a backward pass relative to a forward pass


class Pass(NamedTuple):
    """An evaluation of all samples under one condition."""

    classify: Classify
    cost: int = 1  # cost per sample, relative to a forward pass


def run(job: Job[Robustness]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if the classifier or the images cannot be used."""
    config, model = job.config.robustness, job.model
    if model.config.modality == "text":
        raise UserError(f"{job.options.model}: classifies texts; robustness needs an image classifier")
    if config.epsilons and model.config.model.image_dtype == "float32":
        raise UserError(
            "robustness.epsilons: attacks require pixels in a limited range; with image_dtype float32, set it to []"
        )
    classes = model.config.classes
    val, _ = label_corpus(job.open(job.config.data.val), job.options.labels, classes, progress=job.ranks.is_main)
    job.classes, job.names = classes, class_names(val, classes)
    if val.has_captions:
        model.backbone.require_tokenizer()
    model.requires_grad_(False)
    passes, images = _passes(job, config), min(config.samples or val.samples, val.samples)
    job.print(_plan(config, images, passes))
    found: dict[str, Predictions] = {}
    whole = job.pace(
        sum(each.cost for each in passes.values()),
        shorter=lambda fraction: f"--set robustness.samples={max(int(fraction * images), 1)}",
    )
    for number, (name, each) in enumerate(passes.items(), 1):
        found[name] = _predictions(job, val, each, f"{name} ({number} of {len(passes)})", whole)
        job.print(f"{name} ({number} of {len(passes)}{whole.describe_left()}): {summary(found[name].accuracies())}")
    job.keep(stacked(((predictions, {"condition": name}) for name, predictions in found.items()), classes))
    pgd = {f"{epsilon:g}/255": found[_attack_name(epsilon)].accuracies()["top1"] for epsilon in config.epsilons}
    clean = found[CLEAN].accuracies()
    if pgd:
        picture = job.out / "attack.png"
        job.pictures.append(lambda: draw_attack(picture, config.epsilons, list(pgd.values()), clean["top1"]))
    return {**clean, "pgd": pgd, "val_samples": images}


def _passes(job: Job, config: RobustnessConfig) -> dict[str, Pass]:
    """Return the pass over the clean images and the attacks, in the order in which they run, by name."""
    cost = 1 + config.steps * (1 + _BACKWARD)
    attacks = {_attack_name(each): Pass(_attack(job, job.model, each / 255), cost) for each in config.epsilons}
    return {CLEAN: Pass(job.model)} | attacks


def _attack_name(epsilon: float) -> str:
    return f"pgd {epsilon:g}/255"


def _plan(config: RobustnessConfig, images: int, passes: Mapping[str, Pass]) -> str:
    """Return a line that describes the attacks to run."""
    forward, attacks = sum(each.cost for each in passes.values()), len(config.epsilons)
    return (
        f"robustness: {images:,} images in {len(passes)} pass{'es' * (len(passes) != 1)}: clean images and "
        f"{counted(attacks, 'attack')} of {config.steps} steps; this is equivalent to classifying "
        f"{forward * images:,} images (to use fewer images, set robustness.samples)"
    )


def _predictions(job: Job, corpus: Corpus, each: Pass, title: str, whole: Pace) -> Predictions:
    """Return the predictions of one pass over the samples of all ranks."""
    config, ranks = job.config.robustness, job.ranks
    share = Share(job.config.encode.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    batches = eval_loader(job.config.data, corpus, job.preparation, share, config.samples)
    shown: Iterable[PackedBatch] = track(batches, title, len(batches), whole=whole, part=each.cost)
    own: list[Predictions | None] = []  # predictions of each batch; None if none of its samples can be read
    skipped: list[Skipped] = []
    for batch in shown:
        skipped += batch.skipped
        if not batch.keys:
            own.append(None)
            continue
        batch = batch.to(ranks.device)
        assert batch.labels is not None
        with torch.no_grad():
            logits_SK = each.classify(batch)
            own.append(Predictions.of(batch.keys, batch.labels, logits_SK, image_hashes=batch.image_hashes))
    skipped = [some for part in ranks.gather(skipped) for some in part]
    check_skipped(skipped, min(config.samples or corpus.samples, corpus.samples), job.config.data.max_bad_fraction)
    # the batches are assigned to the ranks in turn, and all ranks have the same number of batches
    return Predictions.joined([some for turn in zip(*ranks.gather(own)) for some in turn if some is not None])


def _attack(job: Job, model: Classifier, epsilon: float) -> Classify:
    """Return a function that classifies a batch after a PGD attack on its images."""
    config, sizes = job.config.robustness, model.config.model
    normal = sizes.image_mean, sizes.image_std

    def classify(batch: PackedBatch) -> Tensor:
        def logits_of(images: Tensor) -> Tensor:
            return model(replace(batch, images=from_unit(images, *normal)))

        assert batch.labels is not None
        start = _start(batch, job.config.run.seed).to(job.ranks.device)
        step_size = config.step_size * epsilon
        with torch.enable_grad():
            images = to_unit(batch.images, *normal)
            attacked = pgd(logits_of, images, batch.labels, start, epsilon, config.steps, step_size)
        return logits_of(attacked)

    return classify


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    images_SCHW: Tensor,
    labels_S: Tensor,
    start_SCHW: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """Return adversarial images, which increase the cross entropy of the labels. They are computed by projected
    gradient descent (arXiv 1706.06083) within the L-infinity ball of radius `epsilon`.

    Args:
        logits_of: differentiable function that maps images to logits [S, K].
        images_SCHW: floating-point images in [0, 1]; the result is also in [0, 1].
        labels_S: class ids, int64.
        start_SCHW: values in [-1, 1]; the attack starts at images + epsilon * start.
        epsilon: maximum change of a pixel.
        steps: number of steps.
        step_size: factor by which the sign of the gradient is multiplied in each step.
    """
    low, high = (images_SCHW - epsilon).clamp(min=0), (images_SCHW + epsilon).clamp(max=1)
    attacked = torch.clamp(images_SCHW + epsilon * start_SCHW, low, high)
    for _ in range(steps):
        attacked.requires_grad_()
        loss = F.cross_entropy(logits_of(attacked), labels_S, reduction="sum")
        (grad,) = torch.autograd.grad(loss, attacked)
        attacked = torch.clamp(attacked.detach() + step_size * grad.sign(), low, high)
    return attacked


def _start(batch: PackedBatch, seed: int) -> Tensor:
    """Return uniform random values in [-1, 1] with the shape of the images. The values depend only on the seed and the
    samples."""
    generator = torch.Generator()
    starts = []
    for key, (rows, columns) in zip(batch.keys, batch.grids):
        generator.manual_seed(seed32(seed, crc32(key_digest(key))))
        own = 1 if len(batch.images) == len(batch.keys) else rows * columns  # native images are stored as patches
        starts.append(torch.rand(own, *batch.images.shape[1:], generator=generator) * 2 - 1)
    return torch.cat(starts)
