"""Logistic regression on the frozen encoder's pooled features, which are computed once, without augmentation."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.probe_grid import run_probes
from m3ae_fast.evaluation.tasks import Logistic
from m3ae_fast.heads.classifier import OF_LISTS, Head
from m3ae_fast.heads.predictions import ListPredictions


def run(job: Job[Logistic]) -> dict[str, Any]:
    """Run the task and return the result. The classifier is written too, if there is only one. Raises UserError as
    `run_probes` does."""
    entries, found, _ = run_probes(job)
    if found.classifier and not job.options.is_image_features:  # a saved classifier needs a network
        kind: Head = OF_LISTS if isinstance(found, ListPredictions) else "logistic"
        job.save_probe(kind, found.classifier.head(0), found.chosen["pool"])
    return entries
