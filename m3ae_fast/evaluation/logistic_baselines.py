"""Baselines of tasks that train a classifier: logistic regression on the features of random weights and on downscaled
pixels."""

from __future__ import annotations

from m3ae_fast.data import Corpus
from m3ae_fast.evaluation.fit_heads import logits
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.logistic_regression import fit_chosen
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.process.stop_request import BY_ANOTHER
from m3ae_fast.process.stoppable_loop import Stopped


def logistic_baselines(job: Job, corpora: tuple[Corpus, Corpus], classes: int) -> dict[str, Predictions]:
    """Return the predictions of each baseline for the held-out samples, by name of the baseline; empty if the task
    evaluates no baselines, or if a rank is asked to stop. Each image is decoded once for all baselines. Every rank must
    call it after training, when a stop request no longer ends the program by itself.

    Args:
        job: the job.
        corpora: the training and the held-out samples.
        classes: number of classes.
    """
    try:
        encoded = job.encode_baselines(*corpora, job.stop)
    except Stopped:
        job.say(f"stopped ({job.stop.reason or BY_ANOTHER}): the result is written without baselines")
        return {}
    found = {}
    for name, (bank, held_out) in encoded.items():
        heads, _ = fit_chosen(bank, classes, job.heartbeats)
        found[name] = held_out.predictions(logits(heads, held_out))
    return found
