"""Accuracy of a probed or fine-tuned classifier on attacked and on corrupted images, in float32.

Shapes: S samples, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from m3ae_fast.batch.bad_samples import Skipped
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.data import Corpus, Preparation, Share, eval_loader, eval_samples
from m3ae_fast.data.dataset import Transform
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.data.order import hash64
from m3ae_fast.encoding import UNMASKED, check_skipped
from m3ae_fast.errors import UserError
from m3ae_fast.pictures.figures import Cell, draw_attack, draw_sheet
from m3ae_fast.progress import track
from m3ae_fast.transfer.classifier import Classifier
from m3ae_fast.transfer.corruptions import PROCEDURAL, Corruption
from m3ae_fast.transfer.job import Job
from m3ae_fast.transfer.metrics import accuracies
from m3ae_fast.transfer.robustness_pgd import pgd

_TRIED = 8  # samples, until one has an image to be drawn
Classify = Callable[[PackedBatch], Tensor]  # a batch on the device -> logits [S, K]


def run(job: Job) -> dict[str, Any]:
    config, model = job.config.robustness, job.model
    if model.config.modality == "text":
        raise UserError(f"{job.args.model}: classifies texts; robustness needs a classifier of images")
    if config.corruptions and model.config.model.channels != 3:
        raise UserError("robustness.corruptions: need RGB images; set it to [] for other channels")
    val, _ = label_corpus(
        job.open(job.config.data.val), job.args.labels, model.config.classes, progress=job.ranks.is_main
    )
    if val.has_captions:
        model.backbone.require_tokenizer()
    model.requires_grad_(False)
    clean = _accuracy(job, val, model, "clean")
    result: dict[str, Any] = {**clean, "pgd": {}, "corruptions": {}}
    for epsilon in config.epsilons:
        attacked = _attack(job, model, epsilon / 255)
        result["pgd"][f"{epsilon:g}/255"] = _accuracy(job, val, attacked, f"pgd {epsilon:g}/255")["top1"]
    for kind in config.corruptions:
        found = [
            _accuracy(job, val, model, f"{kind} {severity}", Corruption(kind, severity))["top1"]
            for severity in config.severities
        ]
        result["corruptions"][kind] = found
    if config.corruptions:
        result |= corruption_errors(result["corruptions"], clean["top1"])
    job.pictures.append(lambda: _draw(job, val, result))
    result["val_samples"] = min(config.samples or val.samples, val.samples)
    return result


def corruption_errors(corruptions: dict[str, list[float]], clean: float) -> dict[str, Any]:
    """Return errors from accuracies by kind and severity: by kind, the plain mean over kinds, and how much that is
    above the error on clean images. Not divided by AlexNet's, as those of arXiv 1903.12261 are."""
    errors = {kind: 1 - sum(found) / len(found) for kind, found in corruptions.items()}
    mean = sum(errors.values()) / len(errors)
    return {
        "corruption_error": errors,
        "mean_corruption_error": mean,
        "relative_mean_corruption_error": mean - (1 - clean),
        "procedural": [kind for kind in corruptions if kind in PROCEDURAL],
    }


def _draw(job: Job, val: Corpus, result: dict[str, Any]) -> None:
    """Draw accuracy over epsilon, and one sample under every corruption at every severity."""
    config, backbone = job.config.robustness, job.model.backbone
    if config.epsilons:
        draw_attack(job.out / "attack.png", config.epsilons, list(result["pgd"].values()), result["top1"])
    preparation = Preparation(backbone.geometry, UNMASKED, backbone.tokenizer, job.config.run.seed)
    sample = next((s for s in eval_samples(val, preparation, _TRIED) if s.image is not None), None)
    if sample is None or sample.image is None or not config.corruptions:
        return
    rows = []
    for kind, found in result["corruptions"].items():
        row = [Cell(sample.image, f"{kind}: none")]
        for severity, top1 in zip(config.severities, found):
            row.append(Cell(Corruption(kind, severity)(sample.image, job.config.run.seed), f"{top1:.1%} right"))
        rows.append(row)
    draw_sheet(job.out / "corruptions.png", rows, ("", *(f"severity {number}" for number in config.severities)))


def _accuracy(
    job: Job, corpus: Corpus, classify: Classify, title: str, transform: Transform | None = None
) -> dict[str, float]:
    """Return accuracies over all ranks."""
    config, ranks, model = job.config.robustness, job.ranks, job.model
    preparation = Preparation(model.backbone.geometry, UNMASKED, model.backbone.tokenizer, job.config.run.seed)
    share = Share(config.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    batches = eval_loader(job.config.data, corpus, preparation, share, config.samples, transform=transform)
    shown: Iterable[PackedBatch] = track(batches, title, len(batches), show=ranks.is_main)
    names = ("top1", "top5") if len(model.config.classes) > 5 else ("top1",)
    samples, sums = 0, dict.fromkeys(names, 0.0)
    skipped: list[Skipped] = []
    for batch in shown:
        skipped += batch.skipped
        if not batch.keys:
            continue
        batch = batch.to(ranks.device)
        assert batch.labels is not None
        with torch.no_grad():
            found = accuracies(classify(batch), batch.labels)
        samples += len(batch.keys)
        sums = {name: sums[name] + found[name] * len(batch.keys) for name in names}
    skipped = [each for part in ranks.gather(skipped) for each in part]
    check_skipped(skipped, min(config.samples or corpus.samples, corpus.samples), job.config.data.max_bad_fraction)
    total, *correct = ranks.sum([samples, *sums.values()])
    return {name: value / total for name, value in zip(names, correct)}


def _attack(job: Job, model: Classifier, epsilon: float) -> Classify:
    """Return a classifier that takes a batch's images after PGD has attacked them."""
    config, sizes = job.config.robustness, model.config.model
    mean, std = (
        torch.tensor(values, device=job.ranks.device)[:, None, None] for values in (sizes.image_mean, sizes.image_std)
    )

    def classify(batch: PackedBatch) -> Tensor:
        def logits_of(images: Tensor) -> Tensor:
            return model(replace(batch, images=(images - mean) / std))

        assert batch.labels is not None
        start = _start(batch, job.config.run.seed).to(job.ranks.device)
        step_size = config.step_size * epsilon
        with torch.enable_grad():
            attacked = pgd(logits_of, batch.images / 255, batch.labels, start, epsilon, config.steps, step_size)
        return logits_of(attacked)

    return classify


def _start(batch: PackedBatch, seed: int) -> Tensor:
    """Return [S, C, H, W] uniform in [-1, 1], a function of the seed and the samples only."""
    generator = torch.Generator()
    starts = []
    for key in batch.keys:
        generator.manual_seed(hash64(seed, crc32(key.encode())) & 0xFFFFFFFF)
        starts.append(torch.rand(batch.images.shape[1:], generator=generator) * 2 - 1)
    return torch.stack(starts)
