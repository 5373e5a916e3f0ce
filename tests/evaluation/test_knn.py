from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.config import KnnConfig, SourceConfig
from m3ae_fast.data import Preparation, ShardStore, open_corpus, samples_of
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.evaluation import class_metrics, job, knn
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.knn import knn_predictions, knn_scores
from m3ae_fast.heads.predictions import best_classes, topk_accuracy
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.weights.converting import convert
from tests.evaluation.conftest import figure_names
from tests.helpers.labelled import NAMES, coloured, labelled_tar, tiny_run


def _bank(features, labels=None):
    return FeatureBank([""] * len(features), features, labels)


def test_k_nn_votes_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(200, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 7, (200,), generator=generator)
    judge = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
    ).fit(bank, labels)
    scores = knn_scores(_bank(bank, labels), _bank(queries), 7, 20, 0.07)
    torch.testing.assert_close(
        scores / scores.sum(1, keepdim=True),
        torch.from_numpy(judge.predict_proba(queries)).float(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_more_neighbours_than_samples_and_a_low_temperature_are_accepted():
    bank = _bank(torch.eye(3), torch.arange(3))
    scores = knn_scores(bank, _bank(torch.eye(3)), 3, 20, 1e-3)
    assert scores.isfinite().all()
    assert knn_scores(bank, _bank(torch.tensor([[1.0, 0, 0], [1, 1, 1]])), 3, 1, 1e-3).sum(1).min() == 1
    assert topk_accuracy(best_classes(scores), torch.arange(3)) == {"top1": 1.0}


@pytest.mark.parametrize("twins", [True, False])
def test_the_number_of_neighbours_is_chosen_on_training_samples(twins):
    """If each sample has a near copy, one neighbour is best; if labels are noisy, 20 neighbours are. The held-out
    samples, whose labels are random, have no influence."""
    generator = torch.Generator().manual_seed(0)
    if twins:
        labels = torch.randint(0, 4, (300,), generator=generator).repeat(2)
        features = 5 + torch.randn(300, 32, generator=generator).repeat(2, 1)
        features += 0.01 * torch.randn(600, 32, generator=generator)
    else:
        groups = torch.arange(600) % 4
        noise = torch.rand(600, generator=generator) < 0.4
        labels = torch.where(noise, torch.randint(0, 4, (600,), generator=generator), groups)
        features = 3 * torch.eye(32)[groups] + 0.5 * torch.randn(600, 32, generator=generator)
    bank = FeatureBank([f"a.tar/{number}" for number in range(600)], features, labels)
    queries = replace(bank.rows(range(50)), labels_N=torch.randint(0, 4, (50,)))
    found = knn_predictions(bank, queries, 4, KnnConfig())
    assert found.chosen == {"k": 1 if twins else 20, "standardised": False}
    given = knn_predictions(bank, queries, 4, KnnConfig(k=found.chosen["k"]))
    assert given.chosen == found.chosen and torch.equal(given.best_NK, found.best_NK)
    assert knn_predictions(bank, queries, 4, KnnConfig(k=7)).chosen == {"k": 7, "standardised": False}


def test_features_are_standardised_if_held_out_training_samples_are_then_classified_more_accurately():
    """The largest feature is noise. The mean and the standard deviation are those of the training samples, and a
    constant feature does not matter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (450,), generator=generator)
    noise = torch.randn(450, 6, generator=generator)
    features = torch.cat((F.one_hot(labels, 4) + 0.3 * noise[:, :4], 50 * noise[:, 4:5], torch.full((450, 1), 7.0)), 1)
    bank = FeatureBank([f"a.tar/{number}" for number in range(400)], features[:400], labels[:400])
    queries = _bank(features[400:], labels[400:])
    found = knn_predictions(bank, queries, 4, KnnConfig())
    k = found.chosen["k"]
    assert found.chosen == {"k": k, "standardised": True}
    mean, std = features[:400].mean(0), features[:400].std(0, correction=0)
    std[-1] = 1
    plain = [_bank((each - mean) / std, bank.labels_N) for each in (features[:400], features[400:])]
    expected = knn_scores(*plain, 4, k, 0.07)
    assert torch.equal(found.best_NK[:, 0], expected.argmax(1))
    raw = knn_predictions(bank, queries, 4, KnnConfig(k=k))
    assert found.accuracies()["top1"] > raw.accuracies()["top1"] + 0.2


def test_the_scale_of_features_is_that_of_all_samples_whose_features_are_read():
    features = torch.arange(12.0).view(6, 2).half()
    found = _bank(features).rows([1, 3, 4]).measured()
    kept = features[[1, 3, 4]].float()
    assert torch.equal(found.mean_D, kept.mean(0)) and torch.allclose(found.std_D, kept.std(0, correction=0))
    scaled = replace(_bank(features), standard=found)
    assert torch.allclose(scaled.features_RD, (features.float() - found.mean_D) / found.std_D)
    assert torch.equal(scaled.rows([2, 5]).features_RD, scaled.take(torch.tensor([2, 5])))


def test_the_usual_number_of_neighbours_is_kept_if_held_out_samples_show_no_difference():
    """Each class has one sample, or there are too few samples to hold out any."""
    for count in (30, 9):
        bank = FeatureBank([f"a.tar/{number}" for number in range(count)], torch.eye(count), torch.arange(count))
        found = knn_predictions(bank, bank, count, KnnConfig())
        assert found.chosen == {"k": min(20, count), "standardised": False}


def test_top_k_accuracy_is_the_fraction_of_labels_among_the_highest_scores():
    scores = torch.arange(8.0).expand(4, 8)
    assert topk_accuracy(best_classes(scores), torch.tensor([7, 3, 2, 6])) == {"top1": 0.25, "top5": 0.75}
    # with 5 classes, top-5 would always be right
    assert [best_classes(torch.eye(classes)).shape[1] for classes in (5, 6)] == [1, 5]


@pytest.mark.slow
def test_images_of_three_colours_are_classified_correctly(transfer, run, tmp_path):
    result = transfer("knn", "--labels", "json.name")
    assert (result["task"], result["top1"], result["classes"], result["val_samples"]) == ("knn", 1.0, 3, 18)
    few = transfer("knn", "--labels", "json.name", "--set", "knn.k=1000", out="few")
    assert few["k"] == few["train_samples"]  # all training samples are neighbours
    assert list((tmp_path / "out/tensorboard").iterdir())
    assert figure_names(tmp_path / "out") == ["confusion", "neighbours"]
    untrained = transfer("knn", "--modality", "paired", model=f"random:{run}", out="random")
    assert 0 <= untrained["top1"] <= 1
    convert(run, tmp_path / "exported")
    assert transfer("knn", model=tmp_path / "exported", out="export")["top1"] == 1.0


def test_neighbour_figures_show_class_names(transfer, shards, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        class_metrics, "draw_confusion", lambda path, labels, predicted, names: drawn.update(confusion=names)
    )
    monkeypatch.setattr(knn, "draw_sheet", lambda path, rows, titles: drawn.update(texts=[r[0].text for r in rows]))
    monkeypatch.setattr(job, "class_names", lambda corpus, classes: ["navy", "lime", "ruby"])
    assert transfer("knn")["classes"] == 3
    assert drawn["confusion"] == ["navy", "lime", "ruby"] and {*drawn["texts"]} <= {*drawn["confusion"]}


def test_samples_are_looked_up_by_key(shards, tmp_path):
    corpus = open_corpus([SourceConfig(shards=list(shards), modality="image")], ShardStore(tmp_path))
    corpus, _ = label_corpus(corpus, "cls")
    keys = [f"{shards[1]}/00105", f"{shards[0]}/00003", f"{shards[0]}/99999"]
    preparation = Preparation(Geometry(40, 8, 3, 16), UNMASKED, None, 0)
    found = samples_of(corpus, preparation, keys)
    assert found.keys() == set(keys[:2])
    for key, number in zip(keys, (105, 3)):
        assert torch.equal(found[key].image, decode_image(coloured(number, NAMES[number % 3]), 3))
        assert found[key].label == number % 3


@pytest.mark.slow
def test_a_result_is_never_overwritten(transfer, tmp_path):
    transfer("knn")
    before = (tmp_path / "out/result.json").read_bytes()
    with pytest.raises(UserError, match=r"already contains a result.json"):
        transfer("knn")
    assert (tmp_path / "out/result.json").read_bytes() == before


def test_user_errors_are_reported_in_one_line_and_leave_no_files(transfer, run, shards, tmp_path):
    image_only = tiny_run(tmp_path / "image-only", vocab_size=0)
    foreign = labelled_tar(tmp_path / "foreign.tar", range(6), dict.fromkeys(range(6), 9))
    for options, more, message in (
        (["--set", "knn.kay=3"], {}, "unknown key knn.kay; did you mean knn.k?"),
        (["--set", "linear.k=3"], {}, "override linear.k: knn does not use this setting; did you mean knn.k?"),
        ([], {"model": tmp_path / "nothing"}, "nothing: no such file or folder"),
        ([], {"val": foreign}, "no training sample has the label 9"),
        (["--labels", "txt"], {}, "must be cls, or json.FIELD"),
        (["--modality", "text"], {"model": image_only}, "is an image-only model, which does not accept text"),
    ):
        with pytest.raises(UserError, match=message):
            transfer("knn", *options, **more)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_scores_are_refused(value):
    scores = torch.eye(3)
    scores[1, 2] = value
    with pytest.raises(UserError, match="1 of 3 samples have scores that are not finite"):
        best_classes(scores)
