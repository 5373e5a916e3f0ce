"""The tasks knn and logistic choose the pooling of an encoder on held-out training samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import parquet

from m3ae_fast.config import GRIDS, POOLINGS
from m3ae_fast.config import POOLS as ALL
from m3ae_fast.config.poolings import candidates
from m3ae_fast.evaluation import task_features
from m3ae_fast.evaluation.job import SharedFeatures
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.heads import pool_choice
from m3ae_fast.heads.classifier import Classifier
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.hyperparameter_choice import Trial
from m3ae_fast.heads.logistic_regression import Tried, fit_chosen
from m3ae_fast.heads.pool_choice import best_type
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.session import joined_program
from tests.evaluation.conftest import settings

TYPES = [FeatureType(2, pool) for pool in ("mean", "cls", "grid2")]


class _Heartbeats:
    def mark(self, _):
        pass


def _bank(samples, informative, seed=0):
    """Return features of which only the vectors with the given indices contain the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    features = torch.randn(samples, 6, 8, generator=generator)
    features[:, informative] += 4 * torch.eye(8)[labels][:, None]
    return FeatureBank([f"a.tar/{number}" for number in range(samples)], features, labels, types=TYPES)


def _best_pool(bank):
    """Return the pooling with the highest accuracy."""
    return best_type(bank, 3, _Heartbeats())[0].pool


@pytest.mark.parametrize(("informative", "pool"), [([1], "cls"), ([4], "grid2"), ([0, 1, 2, 3, 4, 5], "mean")])
def test_the_most_accurate_pooling_is_chosen_and_the_mean_in_a_tie(informative, pool):
    bank = _bank(300, informative)
    assert _best_pool(bank) == pool
    part = bank.of(FeatureType(2, pool)).stored_SD
    first, count = {"mean": (0, 1), "cls": (1, 1), "grid2": (2, 4)}[pool]
    assert torch.equal(part, bank.stored_SD[:, first : first + count].flatten(1))


def test_the_mean_is_used_if_no_sample_can_be_held_out():
    assert _best_pool(_bank(9, [1])) == "mean"
    assert _best_pool(_bank(30, [1])) == "cls"
    # every image would be both held out and trained on
    copies = replace(_bank(30, [1]), image_hashes=["a", "b", "c"] * 10)
    assert _best_pool(copies) == "mean"


def test_some_of_many_samples_are_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(pool_choice, "MOST_SAMPLES", 40)
    tried = Tried([Trial(1.0, 0.5, None)], 4, None)
    monkeypatch.setattr(pool_choice, "try_strengths", lambda bank, *_: seen.append(bank.keys) or tried)
    assert best_type(_bank(300, [1]), 3, _Heartbeats()) == (TYPES[0], None)
    assert [len(keys) for keys in seen] == [40] * 3 and seen[0] == seen[1] == sorted(
        seen[0], key=lambda key: int(key.removeprefix("a.tar/"))
    )


def test_the_regressions_of_the_chosen_pooling_are_not_repeated(monkeypatch):
    bank = _bank(300, [1])
    own = bank.of(FeatureType(2, "cls"))
    head, strength = fit_chosen(own, 3)
    tried = best_type(bank, 3, _Heartbeats())[1]
    monkeypatch.setattr("m3ae_fast.heads.logistic_regression.try_strengths", None)
    again, same = fit_chosen(own, 3, tried=tried)
    assert same == strength and all(
        torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items()
    )


def test_grids_are_candidates_for_images_and_up_to_4096_features():
    assert candidates(256, is_image=True) == [*ALL]
    assert candidates(260, is_image=True) == [pool for pool in ALL if pool != "grid4"]
    others = [pool for pool in ALL if pool not in GRIDS]
    assert candidates(2048, is_image=True) == candidates(5000, is_image=True) == others
    assert candidates(64, is_image=False) == [pool for pool in ALL if not POOLINGS[pool].needs_images]


@pytest.mark.parametrize("task", ["knn", "logistic"])
def test_the_result_is_that_of_the_chosen_pooling(transfer, tmp_path, task, monkeypatch, capsys):
    # the choices for the model and for its random weights
    chosen = iter([FeatureType(2, "grid2"), FeatureType(2, "cls")])
    monkeypatch.setattr("m3ae_fast.evaluation.task_features.best_type", lambda *_: (next(chosen), None))
    result = transfer(task, baselines=True)
    assert result["pool"] == "grid2" and result["baselines"]["random weights"]["pool"] == "cls"
    assert "pool" not in result["baselines"]["downscaled pixels"]
    assert "chosen on held-out training samples: the model: grid2, random weights: cls" in capsys.readouterr().out
    alone = transfer(task, *settings("encode.pool=grid2"), baselines=True, out="alone")
    for name in ("top1", "top1_se"):
        assert result[name] == alone[name]
        assert result["baselines"]["downscaled pixels"][name] == alone["baselines"]["downscaled pixels"][name]
    tables = [parquet.read_table(tmp_path / out / "predictions.parquet").to_pandas() for out in ("out", "alone")]
    np.testing.assert_allclose(tables[0].score, tables[1].score, rtol=1e-4)
    if task == "logistic":
        classifier = Classifier.from_pretrained(tmp_path / "out").eval()
        assert classifier.config.pool == "grid2"
        assert classifier.head.linear.in_features == 4 * classifier.config.model.emb_dim


def test_samples_are_encoded_once_for_all_candidates(transfer, monkeypatch):
    seen, pooled = [], MultimodalEncoder.pooled_of_layers
    monkeypatch.setattr(
        MultimodalEncoder,
        "pooled_of_layers",
        lambda self, batch, layers, pools: (
            seen.append((len(batch.keys), tuple(pools))) or pooled(self, batch, layers, pools)
        ),
    )
    transfer("knn")
    assert {pools for _, pools in seen} == {ALL}
    assert sum(count for count, _ in seen) == 48 + 18


@pytest.mark.slow
def test_two_tasks_that_share_features_encode_once_and_have_the_same_results(run, shards, tmp_path, monkeypatch):
    passes, encode = [], task_features.encode_types

    def counted(*args, **more):
        passes.append(args[2])
        return encode(*args, **more)

    monkeypatch.setattr(task_features, "encode_types", counted)

    def perform(task, how, **more):
        given = {"train": shards[0], "val": shards[1], "overrides": "data.workers=0", **more}
        result = evaluate(task, run, out=tmp_path / f"{how}-{task}", session=session, **given)
        return result | {"seconds": 0, "config": 0}

    with joined_program("cpu") as session:
        alone = {task: perform(task, "alone") for task in ("knn", "logistic")}
        once, shared = len(passes) // 2, SharedFeatures()
        together = {task: perform(task, "together", shared=shared) for task in alone}
    assert together == alone and len(passes) == 3 * once
    for task in alone:
        tables = [parquet.read_table(tmp_path / f"{how}-{task}/predictions.parquet") for how in ("alone", "together")]
        assert tables[0].equals(tables[1])
