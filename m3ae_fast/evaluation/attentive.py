"""Attentive probes: a linear classifier and a query, which pools the frozen encoder's patch tokens, are trained."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.probe_grid import run_probes
from m3ae_fast.evaluation.tasks import Attentive


def run(job: Job[Attentive]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError as `run_probes` does."""
    return run_probes(job).entries
