"""Logistic regression on the frozen encoder's pooled features, which are computed once, without augmentation."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.probe_grid import run_probes
from m3ae_fast.evaluation.tasks import Logistic


def run(job: Job[Logistic]) -> dict[str, Any]:
    """Run the task and return the result. The classifier is written too, if there is only one and the samples have
    single labels instead of lists. Raises UserError as `run_probes` does."""
    entries, found, _ = run_probes(job)
    if found.classifier and not job.options.is_image_features:  # a saved classifier needs a network
        job.save_probe("logistic", found.classifier.head(0), found.chosen["pool"])
    return entries
