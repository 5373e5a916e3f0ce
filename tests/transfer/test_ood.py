import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from m3ae_fast.transfer import ood
from m3ae_fast.transfer.ood import Scores, auroc_and_fpr
from tests.helpers.shards import members, write_tar
from tests.transfer.conftest import pictures


def test_auroc_and_fpr_are_those_of_the_curve():
    random = np.random.RandomState(0)
    familiar, strange = random.randn(200) + 1, random.randn(300)
    area, passed = auroc_and_fpr(familiar, strange)
    assert area == pytest.approx((familiar[:, None] > strange).mean())
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [200, 300]), np.concatenate((familiar, strange)), drop_intermediate=False)
    assert passed == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    assert auroc_and_fpr(np.ones(5), np.zeros(5)) == (1.0, 0.0)
    assert auroc_and_fpr(np.zeros(5), np.ones(5)) == (0.0, 1.0)


@pytest.mark.parametrize("classes", [2, 3])
def test_every_score_is_lower_far_from_the_training_samples(classes):
    random = np.random.RandomState(0)
    labels = np.arange(120) % classes
    train = (4 * np.eye(6)[labels] + random.randn(120, 6)).astype(np.float32)
    scores = Scores(train, labels, 5, seed=0)
    near, far = scores(train[:40] + 0.01), scores(-6 + random.randn(40, 6).astype(np.float32))
    for name in ("knn", "mahalanobis"):
        assert near[name].min() > far[name].max()
    means = np.stack([train[labels == c].mean(0) for c in range(classes)])
    distance = [min((x - m) @ scores.precision_DD @ (x - m) for m in means) for x in train[:3]]
    np.testing.assert_allclose(scores(train[:3])["mahalanobis"], -np.array(distance), rtol=1e-5)
    odds = scores.classifier.predict_proba(train[:5]).max(1)
    np.testing.assert_allclose(scores(train[:5])["max_softmax"], odds, rtol=1e-5)


def test_noise_of_all_colours_is_told_from_plain_colours(transfer, tmp_path, monkeypatch):
    drawn = []
    other = write_tar(tmp_path / "other.tar", members(range(20), "image"))
    draw = ood.draw_detection
    monkeypatch.setattr(ood, "draw_detection", lambda path, *scores: drawn.extend(scores) or draw(path, *scores))
    result = transfer("ood", "--ood", other, "--set", "knn.k=5")  # below a class's 16 samples
    assert result["knn_auroc"] > 0.95
    assert pictures(tmp_path / "out") == ["scores"]
    familiar, strange = drawn
    for name in familiar:  # what is drawn is what is told
        both = np.concatenate((familiar[name], strange[name]))
        assert result[f"{name}_auroc"] == pytest.approx(roc_auc_score(np.arange(len(both)) < 18, both))
    assert result["mahalanobis_fpr95"] < 0.1
    assert (result["train_samples"], result["val_samples"], result["ood_samples"]) == (48, 18, 20)


def test_scores_are_those_of_scikit_learn_and_of_a_sort():
    random = np.random.RandomState(1)
    labels = np.array([7, 2, 5])[np.arange(90) % 3]  # ids with gaps, as where a class has no readable sample
    spread = random.randn(6, 6)
    train = (6 * np.eye(6)[labels % 6] + random.randn(90, 6) @ spread).astype(np.float32)
    queries = (3 * random.randn(20, 6)).astype(np.float32)
    found = Scores(train, labels, 4, seed=0)(queries)

    means = {label: train[labels == label].mean(0) for label in set(labels)}
    within = LedoitWolf(assume_centered=True).fit([x - means[label] for x, label in zip(train, labels)])
    distances = [within.mahalanobis(queries - mean) for mean in means.values()]
    np.testing.assert_allclose(found["mahalanobis"], -np.min(distances, 0), rtol=1e-4)

    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, train)]
    sorted_MN = np.sort(np.linalg.norm(unit[0][:, None] - unit[1][None], axis=2), axis=1)
    np.testing.assert_allclose(found["knn"], -sorted_MN[:, 3], rtol=1e-4)

    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels)
    np.testing.assert_allclose(found["max_softmax"], judge.predict_proba(queries).max(1), rtol=1e-3)
    np.testing.assert_allclose(found["energy"], logsumexp(judge.decision_function(queries), axis=1), rtol=1e-3)


def test_every_score_is_of_the_samples_that_it_is_said_to_be_of(transfer, shards, tmp_path, monkeypatch):
    """Familiar ones come first, and each number is of its own score."""
    given = []
    monkeypatch.setattr(ood, "auroc_and_fpr", lambda familiar, strange: (given.append((familiar, strange)), (0, 0))[1])
    other = write_tar(tmp_path / "other.tar", members(range(20), "image"))
    result = transfer("ood", "--ood", other, "--set", "knn.k=3")
    assert [(len(familiar), len(strange)) for familiar, strange in given] == [(18, 20)] * 4
    assert all(familiar.mean() > strange.mean() for familiar, strange in given[2:])
    assert [name for name in result if name.endswith("auroc")] == [
        f"{name}_auroc" for name in ("max_softmax", "energy", "knn", "mahalanobis")
    ]
