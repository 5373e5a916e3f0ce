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

from m3ae_fast.data import Corpus, Preparation, Share, Skipped, eval_loader
from m3ae_fast.data.dataset import Transform
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.data.order import hash64
from m3ae_fast.encoding import UNMASKED, check_skipped, require_tokenizer
from m3ae_fast.errors import UserError
from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.progress import track
from m3ae_fast.transfer.classifier import Classifier
from m3ae_fast.transfer.corruptions import Corruption
from m3ae_fast.transfer.job import Job
from m3ae_fast.transfer.metrics import accuracies
from m3ae_fast.transfer.robustness_pgd import pgd

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
        require_tokenizer(model.backbone)
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
    every = [share for found in result["corruptions"].values() for share in found]
    if every:
        result["mean_corruption_top1"] = sum(every) / len(every)
    result["val_samples"] = min(config.samples or val.samples, val.samples)
    return result


def _accuracy(
    job: Job, corpus: Corpus, classify: Classify, title: str, transform: Transform | None = None
) -> dict[str, float]:
    """Accuracies over all ranks."""
    config, ranks, model = job.config.robustness, job.ranks, job.model
    preparation = Preparation(model.backbone.geometry, UNMASKED, model.backbone.tokenizer, job.config.run.seed)
    share = Share(config.batch, 1, ranks.rank, ranks.world)
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
    """Logits of what PGD makes of a batch's images."""
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
    """[S, C, H, W] uniform in [-1, 1], a function of the seed and the samples only."""
    generator = torch.Generator()
    starts = []
    for key in batch.keys:
        generator.manual_seed(hash64(seed, crc32(key.encode())) & 0xFFFFFFFF)
        starts.append(torch.rand(batch.images.shape[1:], generator=generator) * 2 - 1)
    return torch.stack(starts)
