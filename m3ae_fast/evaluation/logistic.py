"""Logistic regression on the frozen encoder's pooled features, which are computed once, without augmentation."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation import multilabel
from m3ae_fast.evaluation.baselines import MODEL, accuracy_entries
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.tasks import Logistic
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.logistic_regression import fit, fit_chosen, predict


def run(job: Job[Logistic]) -> dict[str, Any]:
    """Run the task, write the classifier unless the labels are lists, and return the result. Raises UserError as
    `Job.open_labelled` and `Job.encode` do."""
    if job.has_lists:
        return multilabel.run(
            job,
            lambda bank, held_out, truth_NC: logits(fit(bank, truth_NC, truth_NC.shape[1], job.heartbeats), held_out),
        )
    train, val, classes = job.open_labelled()
    encoded = job.encode_for_classes(train, val)
    bank, held_out = encoded[MODEL]
    job.print(f"logistic regression of {bank.stored_SD.shape[1]:,} features of {len(bank.keys):,} samples")
    heads, strength = fit_chosen(bank, len(classes), job.heartbeats, job.tried(MODEL))
    found = {MODEL: held_out.predictions(logits(heads, held_out))}
    chosen = {MODEL: {"inverse_strength": strength, **job.chosen_pool(MODEL)}}
    numbers = {
        "classes": len(classes),
        "train_samples": len(bank.keys),
        "val_samples": len(held_out.keys),
        "skipped": len(bank.skipped) + len(held_out.skipped),
    }
    if not job.options.is_image_features:  # a saved classifier needs a network
        job.save_probe("logistic", heads.head(0))
    job.keep(found[MODEL].columns(classes))
    for name, banks in encoded.items():
        if name != MODEL:
            found[name], strength = predict(*banks, len(classes), job.heartbeats, job.tried(name))
            chosen[name] = {"inverse_strength": strength, **job.chosen_pool(name)}
    return accuracy_entries(found, chosen) | numbers
