"""Logistic regression on the frozen encoder's pooled features, which are computed once, without augmentation."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation import multilabel
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.probe_grid import run_probes
from m3ae_fast.evaluation.tasks import Logistic
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.logistic_regression import fit


def run(job: Job[Logistic]) -> dict[str, Any]:
    """Run the task, write the classifier if there is only one and its labels are not lists, and return the result.
    Raises UserError as `run_probes` does."""
    if job.has_lists:
        return multilabel.run(
            job,
            lambda bank, held_out, truth_NC: logits(fit(bank, truth_NC, truth_NC.shape[1], job.heartbeats), held_out),
        )
    entries, found, _ = run_probes(job)
    if found.classifier and not job.options.is_image_features:  # a saved classifier needs a network
        job.save_probe("logistic", found.classifier.head(0), found.chosen["pool"])
    return entries
