"""Baselines of tasks that train a classifier: logistic regression on the features of random weights and on downscaled
pixels."""

from __future__ import annotations

from collections.abc import Mapping

from m3ae_fast.data import Corpus
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.fit_heads import logits
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.logistic_regression import fit_chosen
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.process.heartbeats import Heartbeats
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
    return logistic_predictions(encoded, classes, job.heartbeats)


def logistic_predictions(
    encoded: Mapping[str, tuple[FeatureBank, FeatureBank]], classes: int, heartbeats: Heartbeats
) -> dict[str, Predictions]:
    """Fit a logistic regression to the features of each model, and return the predictions for the held-out samples, by
    name of the model. Every rank must call it.

    Args:
        encoded: features of the training and held-out samples, by name of the model.
        classes: number of classes.
        heartbeats: heartbeats of this rank.
    """
    found = {}
    for name, (bank, held_out) in encoded.items():
        heads, _ = fit_chosen(bank, classes, heartbeats)
        found[name] = held_out.predictions(logits(heads, held_out))
    return found
