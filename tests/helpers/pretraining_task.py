"""The task of pre-training without an engine, for tests of single methods."""

from __future__ import annotations

from m3ae_fast.training.pretraining_task import PretrainingTask


def task_without_engine(config, data) -> PretrainingTask:
    """Return the task of a run with this config and data, without an engine and evaluations."""
    return PretrainingTask(
        config=config,
        engine=None,
        data=data,
        eval_loader=None,
        notes=[],
        probe=None,
        with_targets=lambda batch: batch,
        attention={},
    )
