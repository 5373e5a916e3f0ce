"""The task attentive, which trains a linear classifier together with a query that pools the patch tokens of the frozen
encoder."""

from __future__ import annotations

from typing import Any

from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.probe_grid import run_probes
from m3ae_fast.evaluation.tasks import Attentive


def run(job: Job[Attentive]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError as `run_probes` does."""
    return run_probes(job).entries
