import numpy as np
import pytest
from sklearn.metrics import roc_curve

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


def test_noise_of_all_colours_is_told_from_plain_colours(transfer, tmp_path):
    other = write_tar(tmp_path / "other.tar", members(range(20), "image"))
    result = transfer("ood", "--ood", other, "--set", "knn.k=5")  # below a class's 16 samples
    assert result["knn_auroc"] > 0.95
    assert pictures(tmp_path / "out") == ["scores"]
    assert result["mahalanobis_fpr95"] < 0.1
    assert (result["train_samples"], result["val_samples"], result["ood_samples"]) == (48, 18, 20)
