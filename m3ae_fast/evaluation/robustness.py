"""Accuracy of a fine-tuned classifier or a probe on adversarial and on corrupted images, computed in float32.

Shapes: S samples, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import TimeLeft, track
from m3ae_fast.base.randomness import seed32
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import SourceConfig
from m3ae_fast.config.evaluation import RobustnessConfig
from m3ae_fast.data import Corpus, Share, eval_loader, eval_samples
from m3ae_fast.data.labels import Classes, class_names, label_corpus
from m3ae_fast.drawing.figures import Cell, draw_attack, draw_sheet
from m3ae_fast.evaluation.classifier import Classifier
from m3ae_fast.evaluation.corruptions import PROCEDURAL, Corruption
from m3ae_fast.evaluation.corruptions.published import published_sets
from m3ae_fast.evaluation.encoding import check_skipped, key_digest
from m3ae_fast.evaluation.job import Job, summary
from m3ae_fast.evaluation.predictions import Predictions, stacked
from m3ae_fast.images.normalisation import from_unit, to_unit

_TRIED = 8  # maximum number of samples that are searched to find an image for the figure
Classify = Callable[[PackedBatch], Tensor]  # a batch on the device -> logits [S, K]
CLEAN = "clean"
_BACKWARD = 2  # cost of a backward pass relative to a forward pass


class Pass(NamedTuple):
    """An evaluation of all samples under one condition."""

    classify: Classify
    corpus: Corpus
    cost: int = 1  # number of forward passes per sample
    corruption: Corruption | None = None


Severities = Mapping[str, Sequence[int]]  # severities by kind of corruption


def run(job: Job) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if the classifier, the images, or a set of corrupted images
    cannot be used."""
    config, model = job.config.robustness, job.model
    published = published_sets(Path(job.options.corrupted)) if job.options.corrupted else {}
    if published:
        if config.corruptions and "corruptions" in config.model_fields_set:
            raise UserError("--corrupted provides the corruptions; leave out robustness.corruptions")
        config = config.model_copy(update={"corruptions": []})
    applied = {kind: config.severities for kind in config.corruptions}
    kinds: Severities = applied | {kind: list(sets) for kind, sets in published.items()}
    if model.config.modality == "text":
        raise UserError(f"{job.options.model}: classifies texts; robustness needs an image classifier")
    if config.corruptions and (model.config.model.channels != 3 or model.config.model.image_dtype != "uint8"):
        raise UserError("robustness.corruptions: is supported only for 8-bit RGB images; set it to [] for other images")
    if config.epsilons and model.config.model.image_dtype == "float32":
        raise UserError(
            "robustness.epsilons: attacks require pixels in a limited range; set it to [] for image_dtype float32"
        )
    val = _open(job, job.config.data.val)
    corrupted = {
        f"{kind} {severity}": _open(job, [SourceConfig(shards=shards, modality=job.modality)])
        for kind, sets in published.items()
        for severity, shards in sets.items()
    }
    job.classes, job.names = model.config.classes, class_names(val, model.config.classes)
    if val.has_captions:
        model.backbone.require_tokenizer()
    model.requires_grad_(False)
    passes, images = _passes(job, config, val, corrupted), min(config.samples or val.samples, val.samples)
    job.print(_plan(config, images, passes, kinds))
    found: dict[str, Predictions] = {}
    time_left = job.time_left(
        sum(each.cost for each in passes.values()),
        shorter=lambda fraction: f"--set robustness.samples={max(int(fraction * images), 1)}",
    )
    for number, (name, each) in enumerate(passes.items(), 1):
        found[name] = _predictions(job, each, f"{name} ({number} of {len(passes)})", time_left)
        left = time_left.after(each.cost)
        job.print(f"{name} ({number} of {len(passes)}{left}): {summary(found[name].accuracies())}")
    job.keep(_columns(found, model.config.classes))
    result = _result(config, kinds, found)
    job.pictures.append(lambda: _draw(job, config, passes, kinds, result))
    return result | {"val_samples": images}


def _open(job: Job, sources: Sequence[SourceConfig]) -> Corpus:
    """Return the labelled samples of the sources. Raises UserError if a label is not among the classifier's classes."""
    classes = job.model.config.classes
    return label_corpus(job.open(sources), job.options.labels, classes, progress=job.ranks.is_main)[0]


def _passes(job: Job, config: RobustnessConfig, val: Corpus, corrupted: Mapping[str, Corpus]) -> dict[str, Pass]:
    """Return the attacks and corruptions to run, in order, by name."""
    model = job.model
    passes = {CLEAN: Pass(model, val)}
    for epsilon in config.epsilons:
        cost = 1 + config.steps * (1 + _BACKWARD)
        passes[_attack_name(epsilon)] = Pass(_attack(job, model, epsilon / 255), val, cost)
    for kind in config.corruptions:
        for severity in config.severities:
            passes[f"{kind} {severity}"] = Pass(model, val, corruption=Corruption(kind, severity))
    return passes | {name: Pass(model, corpus) for name, corpus in corrupted.items()}


def _attack_name(epsilon: float) -> str:
    return f"pgd {epsilon:g}/255"


def _plan(config: RobustnessConfig, images: int, passes: Mapping[str, Pass], kinds: Severities) -> str:
    """Return a line that describes the attacks and corruptions to run."""
    severities, attacks = max(map(len, kinds.values()), default=0), len(config.epsilons)
    forward = sum(each.cost for each in passes.values())
    return (
        f"robustness: {images:,} images in {len(passes)} passes: clean images, {attacks} attacks of {config.steps} "
        f"steps, {len(kinds)} corruptions at {severities} severities; this is equivalent to classifying "
        f"{forward * images:,} images (to use fewer images, set robustness.samples)"
    )


def _result(config: RobustnessConfig, kinds: Severities, found: Mapping[str, Predictions]) -> dict[str, Any]:
    """Return the entries of result.json for the completed passes; empty if there are none."""
    if CLEAN not in found:
        return {}
    top1 = {name: predictions.accuracies()["top1"] for name, predictions in found.items()}
    pgd = {f"{e:g}/255": top1[_attack_name(e)] for e in config.epsilons if _attack_name(e) in top1}
    corruptions: dict[str, list[float]] = {
        kind: [top1[f"{kind} {severity}"] for severity in severities if f"{kind} {severity}" in top1]
        for kind, severities in kinds.items()
    }
    result: dict[str, Any] = {**found[CLEAN].accuracies(), "pgd": pgd, "corruptions": corruptions}
    if corruptions and all(len(each) == len(kinds[kind]) for kind, each in corruptions.items()):
        result |= corruption_errors(corruptions, top1[CLEAN])
        result["procedural"] = [kind for kind in config.corruptions if kind in PROCEDURAL]
    return result


def _columns(found: Mapping[str, Predictions], classes: Classes) -> dict[str, list[Any]]:
    """Return all predictions as the columns of a table. The column `condition` contains the name of the pass."""
    return stacked(((predictions, {"condition": name}) for name, predictions in found.items()), classes)


def corruption_errors(corruptions: dict[str, list[float]], clean: float) -> dict[str, Any]:
    """Return the error of each kind of corruption (mean over severities), the mean over kinds, and the difference
    between this mean and the error on clean images. Unlike in arXiv 1903.12261, errors are not divided by those of
    AlexNet. `corruptions`: accuracies by kind, one for each severity."""
    errors = {kind: 1 - sum(found) / len(found) for kind, found in corruptions.items()}
    mean = sum(errors.values()) / len(errors)
    return {
        "corruption_error": errors,
        "mean_corruption_error": mean,
        "relative_mean_corruption_error": mean - (1 - clean),
    }


def _draw(
    job: Job, config: RobustnessConfig, passes: Mapping[str, Pass], kinds: Severities, result: dict[str, Any]
) -> None:
    """Plot the accuracy over epsilon, and one sample with every corruption at every severity."""
    if config.epsilons:
        draw_attack(job.out / "attack.png", config.epsilons, list(result["pgd"].values()), result["top1"])
    clean = _first_image(job, passes[CLEAN])
    if clean is None or not kinds:
        return
    rows, columns = [], list(dict.fromkeys(number for severities in kinds.values() for number in severities))
    for kind, severities in kinds.items():
        cells = dict.fromkeys(columns, Cell(None))
        for severity, top1 in zip(severities, result["corruptions"][kind]):
            each = passes[f"{kind} {severity}"]
            image = each.corruption(clean, job.config.run.seed) if each.corruption else _first_image(job, each)
            cells[severity] = Cell(image, f"accuracy {top1:.1%}")
        rows.append([Cell(clean, kind), *cells.values()])
    draw_sheet(job.out / "corruptions.png", rows, ("without corruption", *(f"severity {number}" for number in columns)))


def _first_image(job: Job, each: Pass) -> Tensor | None:
    """Return the first image of a pass, preprocessed for the classifier but without the pass's corruption; None if no
    image is found."""
    samples = eval_samples(each.corpus, job.preparation, _TRIED)
    return next((sample.image for sample in samples if sample.image is not None), None)


def _predictions(job: Job, each: Pass, title: str, whole: TimeLeft) -> Predictions:
    """Return the predictions of one pass over the samples of all ranks."""
    config, ranks, corpus = job.config.robustness, job.ranks, each.corpus
    share = Share(config.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    batches = eval_loader(job.config.data, corpus, job.preparation, share, config.samples, transform=each.corruption)
    shown: Iterable[PackedBatch] = track(batches, title, len(batches), whole=whole, part=each.cost)
    own: list[Predictions | None] = []  # by batch; None: no sample can be read
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
