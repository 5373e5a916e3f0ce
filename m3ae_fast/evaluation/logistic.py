"""Logistic regression on the frozen encoder's pooled features, which are computed once, without augmentation."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation.fit_heads import logits
from m3ae_fast.evaluation.job import Job, PartialResult
from m3ae_fast.evaluation.logistic_regression import fit_chosen


def run(job: Job) -> dict[str, Any]:
    """Run the task, write the classifier, and return the result. Raises UserError as `Job.open_labelled` and
    `Job.encode` do."""
    job.keep_if_stopped(lambda: PartialResult("the samples are being encoded", {}, {}))
    train, val, classes = job.open_labelled()
    whole = job.time_left(train.samples + val.samples, shorter=lambda _: "fewer --train shards")
    bank, held_out = (
        job.encode(corpus, title, whole, corpus.samples)
        for corpus, title in ((train, "encoding train"), (val, "encoding val"))
    )
    job.keep_if_stopped(lambda: PartialResult("the samples are encoded", {}, {}))
    job.say(f"logistic regression of {job.config.encode.pool} features of {len(bank.keys):,} samples")
    heads, strength = fit_chosen(bank, len(classes), job.heartbeats)
    predictions = held_out.predictions(logits(heads, held_out))
    job.save_probe("logistic", heads.head(0))
    job.keep(predictions.columns(classes))
    return predictions.accuracies() | {
        "inverse_strength": strength,
        "classes": len(classes),
        "train_samples": len(bank.keys),
        "val_samples": len(held_out.keys),
        "skipped": len(bank.skipped) + len(held_out.skipped),
    }
