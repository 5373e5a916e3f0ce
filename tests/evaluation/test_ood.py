import json
import re
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import read_parquet, write_parquet
from m3ae_fast.cli.evaluate import main
from m3ae_fast.config import ModelConfig
from m3ae_fast.evaluation import ood
from m3ae_fast.evaluation.compare_results import areas_apart
from m3ae_fast.evaluation.ood import SCORES, Scores, auroc_and_fpr, auroc_interval
from m3ae_fast.evaluation.tasks import Ood, named_sets
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.images.decoding import decode_image
from tests.evaluation.conftest import figure_names
from tests.helpers.labelled import NAMES, coloured, labelled_tar
from tests.helpers.shards import members, picture, write_tar

pytestmark = pytest.mark.slow

SIZES = ModelConfig(
    size=None, emb_dim=32, depth=2, num_heads=4, image_size=32, patch_size=8, text_length=16, vocab_size=0
)


def _bank(features, labels=None):
    labels = None if labels is None else torch.from_numpy(labels)
    return FeatureBank([""] * len(features), torch.from_numpy(features), labels)


def test_auroc_and_fpr_equal_those_of_the_roc_curve():
    random = np.random.RandomState(0)
    inside, outside = random.randn(200) + 1, random.randn(300)
    area, passed = auroc_and_fpr(inside, outside)
    assert area == pytest.approx((inside[:, None] > outside).mean())
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [200, 300]), np.concatenate((inside, outside)), drop_intermediate=False)
    assert passed == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    coarse = inside.round(), outside.round()  # many of these scores are equal, and some equal the threshold
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [200, 300]), np.concatenate(coarse), drop_intermediate=False)
    assert auroc_and_fpr(*coarse)[1] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    assert auroc_and_fpr(np.arange(30.0), np.arange(30.0))[1] == 29 / 30  # 95 % are 28.5 samples, so 29 are accepted
    assert auroc_and_fpr(np.ones(5), np.zeros(5)) == (1.0, 0.0)
    assert auroc_and_fpr(np.zeros(5), np.ones(5)) == (0.0, 1.0)


def _average_precision(truth, scores):
    """Return the sum over distinct scores of the precision times the increase in recall."""
    area, before = 0.0, 0
    for score in sorted(set(scores), reverse=True):
        found = truth[scores >= score]
        area += (found.sum() - before) / truth.sum() * found.mean()
        before = found.sum()
    return area


@pytest.mark.parametrize("classes", [2, 3])
def test_ood_scores_are_lower_far_from_the_training_samples(classes):
    random = np.random.RandomState(0)
    labels = np.arange(120) % classes
    train = (4 * np.eye(6)[labels] + random.randn(120, 6)).astype(np.float32)
    scores = Scores(_bank(train, labels), 5)
    near, far = scores(_bank(train[:40] + 0.01)), scores(_bank(-6 + random.randn(40, 6).astype(np.float32)))
    for name in ("knn", "mahalanobis"):
        assert near[name].min() > far[name].max()
    means = np.stack([train[labels == c].mean(0) for c in range(classes)])
    precision = LedoitWolf(assume_centered=True).fit(train - means[labels]).precision_
    distance = [min((x - m) @ precision @ (x - m) for m in means) for x in train[:3]]
    np.testing.assert_allclose(scores(_bank(train[:3]))["mahalanobis"], -np.array(distance), rtol=1e-5)
    judge = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-6))
    odds = judge.fit(train, labels).predict_proba(train[:5]).max(1)
    np.testing.assert_allclose(scores(_bank(train[:5]))["max_softmax"], odds, rtol=3e-3)


def test_colour_noise_is_detected_as_out_of_distribution(transfer, tmp_path, monkeypatch):
    drawn = []
    other = write_tar(tmp_path / "other.tar", members(range(20), "image"))
    draw = ood.draw_detection
    monkeypatch.setattr(ood, "draw_detection", lambda path, *scores: drawn.extend(scores) or draw(path, *scores))
    result = transfer("ood", "--ood", other, "--set", "knn.k=5")  # fewer than the 16 samples of a class
    assert result["knn_auroc"] > 0.95
    assert figure_names(tmp_path / "out") == ["scores"]
    inside, outside = drawn
    for name in inside:  # the figure shows the reported values
        both = np.concatenate((inside[name], outside[name]))
        assert result[f"{name}_auroc"] == pytest.approx(roc_auc_score(np.arange(len(both)) < 18, both))
        truth = np.arange(len(both)) < 18
        assert result[f"{name}_aupr_in"] == pytest.approx(_average_precision(truth, both))
        assert result[f"{name}_aupr_out"] == pytest.approx(_average_precision(~truth, -both))
    assert result["mahalanobis_fpr95"] < 0.1
    assert (result["train_samples"], result["val_samples"], result["ood_samples"]) == (48, 18, 20)


def test_a_score_with_an_auroc_significantly_below_one_half_is_reported_as_inverted(
    transfer, tmp_path, monkeypatch, capsys
):
    """A score is inverted if its whole confidence interval is below 0.5. A score that is merely not better than chance
    is not inverted."""
    scores = ood.Scores.__call__

    def inverted_scores(self, features):
        found = scores(self, features)
        return found | {"knn": -found["knn"], "energy": np.linspace(-1, 1, len(features.keys))}

    monkeypatch.setattr(ood.Scores, "__call__", inverted_scores)
    other = write_tar(tmp_path / "other.tar", members(range(20), "image"))
    result = transfer("ood", "--ood", f"noise={other}", "--set", "knn.k=5")
    (warning,) = result["warnings"]
    assert f"warning: {warning}\n" in capsys.readouterr().out
    assert warning.startswith(f"noise: inverted scores: knn (AUROC {result['noise_knn_auroc']:.2f}). They rate out-of")
    fine = {f"{name}_auroc{end}": 0.5 for name in ood.SCORES for end in ("", "_high")}
    assert not ood.inverted(fine)
    both = ood.inverted(fine | {"max_softmax_auroc_high": 0.49, "energy_auroc": 0.25, "energy_auroc_high": 0.4})
    assert "max_softmax (AUROC 0.50), energy (AUROC 0.25). " in both


def test_the_confidence_interval_of_a_single_sample_is_undefined():
    known, other = ({name: np.array(values) for name in SCORES} for values in ([0.0], [1.0, 2.0]))
    found = ood._compare(known, other, 0)
    assert found["knn_auroc"] == 0 and "knn_auroc_high" not in found
    assert not ood.inverted(found) and "cannot be estimated from a single sample" in ood.unknown_intervals(found)
    assert not ood.unknown_intervals(ood._compare(other, other, 0))
    assert "does not differ" in areas_apart([known["knn"], known["knn"]], [known["knn"], 1 + known["knn"]], "a", "b")


def test_progress_is_printed(transfer, tmp_path, capsys):
    sets = {name: write_tar(tmp_path / f"{name}.tar", members(range(9), "image")) for name in "ab"}
    given = [word for name, shards in sets.items() for word in ("--ood", f"{name}={shards}")]
    transfer("ood", *given, "--set", "knn.k=3")
    output = capsys.readouterr().out
    assert re.search(r"encoding val: 18 samples done \(79% of the encoding, about \d:\d\d:\d\d left\)", output)
    assert "encoding b: 9 samples done (100% of the encoding)\n" in output
    assert read_parquet(tmp_path / "out/predictions.parquet")["set"] == ["val"] * 18 + ["a"] * 9 + ["b"] * 9


def test_two_aurocs_are_compared_with_paired_bootstrap_samples(transfer, run, tmp_path, capsys):
    random = np.random.RandomState(3)
    inside, outside = random.randn(300), random.randn(200)
    noise = [0.1 * random.randn(len(part)) for part in (inside, outside)]
    good = [inside + 1.0 + noise[0], outside + noise[1]]
    bad, same = [inside + 0.9, outside], [inside + 1.0, outside]
    assert areas_apart(good, [inside, outside], "A", "B").startswith("A is better than B: AUROC +0.2")
    assert areas_apart([inside, outside], good, "B", "A").startswith("B is worse than A: AUROC -0.2")
    even = areas_apart(good, good, "A", "B")
    assert even.startswith("A does not differ") and even.endswith("AUROC +0.000, 95 % interval +0.000 to +0.000")
    # The confidence intervals of the two areas overlap, but with paired bootstrap samples their difference is
    # significant.
    low, high = auroc_interval(*bad, 0)[1], auroc_interval(*same, 0)[0]
    assert low > high and "A is better than B" in areas_apart(same, bad, "A", "B")
    draws = stats.bootstrap(
        (np.arange(300), np.arange(200)),
        lambda i, j: np.subtract(*(auroc_and_fpr(f[i], s[j])[0] for f, s in (same, bad))),
        vectorized=False, n_resamples=400, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    printed = [float(number) for number in re.findall(r"[+-]\d\.\d{3}", areas_apart(same, bad, "A", "B"))[1:]]
    assert printed == pytest.approx(list(draws.confidence_interval), abs=3e-3)

    other = write_tar(tmp_path / "o.tar", members(range(9), "image"))
    for name, model in (("one", run), ("two", f"random:{run}")):
        transfer("ood", "--ood", f"o={other}", "--set", "knn.k=3", out=name, model=model)
    table = read_parquet(tmp_path / "one/predictions.parquet")
    write_parquet(tmp_path / "three/predictions.parquet", {name: column[1:] for name, column in table.items()})
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"o, {score}" for score in SCORES]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    for score, line in zip(SCORES, lines):
        apart = results[0][f"o_{score}_auroc"] - results[1][f"o_{score}_auroc"]
        assert f"AUROC {apart:+.3f}, 95 % interval" in line
    with pytest.raises(UserError, match="1 sample in only one of the two"):
        main(["compare", str(tmp_path / "one"), str(tmp_path / "three")])


def test_ood_scores_do_not_allocate_memory_per_sample_class_and_dimension():
    """For the validation samples of ImageNet, a tensor with an element for each sample, class and dimension would take
    154 GB."""
    random = np.random.RandomState(0)
    train, labels = random.randn(400, 32).astype(np.float32), np.arange(400) % 200
    scores = Scores(_bank(train, labels), 5, head=lambda features: features)
    tracemalloc.start()
    scores(_bank(random.randn(2000, 32).astype(np.float32)))
    assert tracemalloc.get_traced_memory()[1] < 2000 * 200 * 32 * 4
    tracemalloc.stop()


@pytest.mark.parametrize("labels", [[0, 0], [4, 9, 4]])
def test_directions_without_variance_do_not_affect_the_mahalanobis_score(labels):
    random = np.random.RandomState(0)
    train, queries = (random.randn(count, 5).astype(np.float32) for count in (len(labels), 4))
    found = Scores(_bank(train, np.array(labels)), 20)(_bank(queries))
    means = np.stack([train[labels == label].mean(0) for label in np.unique(labels)])
    centred = train - means[np.unique(labels, return_inverse=True)[1]]
    precision = LedoitWolf(assume_centered=True).fit(centred.astype(float)).precision_
    distance = [min((x - m) @ precision @ (x - m) for m in means) for x in queries]
    np.testing.assert_allclose(found["mahalanobis"], -np.array(distance), rtol=1e-4, atol=1e-9)
    assert all(np.isfinite(own).all() for own in found.values())


def test_ood_scores_equal_those_of_scikit_learn_and_of_sorted_similarities():
    random = np.random.RandomState(1)
    labels = np.array([7, 2, 5])[np.arange(90) % 3]  # ids with gaps, as if a class had no readable sample
    spread = random.randn(6, 6)
    train = (6 * np.eye(6)[labels % 6] + random.randn(90, 6) @ spread).astype(np.float32)
    queries = (3 * random.randn(20, 6)).astype(np.float32)
    found = Scores(_bank(train, labels), 4)(_bank(queries))

    means = {label: train[labels == label].mean(0) for label in set(labels)}
    within = LedoitWolf(assume_centered=True).fit([x - means[label] for x, label in zip(train, labels)])
    distances = [within.mahalanobis(queries - mean) for mean in means.values()]
    np.testing.assert_allclose(found["mahalanobis"], -np.min(distances, 0), rtol=1e-4)

    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, train)]
    sorted_MN = np.sort(np.linalg.norm(unit[0][:, None] - unit[1][None], axis=2), axis=1)
    np.testing.assert_allclose(found["knn"], -sorted_MN[:, 3], rtol=1e-4)
    # with fewer than k samples, the farthest sample replaces the k-th
    few = Scores(_bank(train[:6], labels[:6]), 50)(_bank(queries))["knn"]
    farthest_M = np.linalg.norm(unit[0][:, None] - unit[1][None, :6], axis=2).max(1)
    np.testing.assert_allclose(few, -farthest_M, rtol=1e-4)

    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-6)).fit(
        train.astype(float), labels
    )
    np.testing.assert_allclose(found["max_softmax"], judge.predict_proba(queries).max(1), rtol=3e-3)
    np.testing.assert_allclose(found["energy"], logsumexp(judge.decision_function(queries), axis=1), rtol=3e-3)


def test_each_auroc_is_computed_from_the_score_and_the_samples_of_its_column(transfer, shards, tmp_path, monkeypatch):
    """`auroc_and_fpr` receives the in-distribution scores first, and each result has the name of its score."""
    given = []
    monkeypatch.setattr(ood, "auroc_and_fpr", lambda inside, outside: (given.append((inside, outside)), (0, 0))[1])
    other = write_tar(tmp_path / "other.tar", members(range(20), "image"))
    result = transfer("ood", "--ood", other, "--set", "knn.k=3")
    assert [(len(inside), len(outside)) for inside, outside in given] == [(18, 20)] * 4
    assert all(inside.mean() > outside.mean() for inside, outside in given[2:])
    assert [name for name in result if name.endswith("auroc")] == [
        f"{name}_auroc" for name in ("max_softmax", "energy", "knn", "mahalanobis")
    ]


def test_the_confidence_interval_equals_that_of_scikit_learns_aurocs_of_the_same_bootstrap_samples(monkeypatch):
    monkeypatch.setattr(ood, "BOOTSTRAPS", 60)
    random = np.random.RandomState(2)
    inside, outside = random.randn(40).round(1) + 1, random.randn(25).round(1)  # some are equal
    draws, truth, areas = np.random.default_rng(7), np.repeat([1, 0], [40, 25]), []
    for _ in range(60):
        known, other = (part[draws.integers(len(part), size=len(part))] for part in (inside, outside))
        areas.append(roc_auc_score(truth, np.concatenate((known, other))))
    assert auroc_interval(inside, outside, 7) == pytest.approx(np.quantile(areas, (0.025, 0.975)))
    assert auroc_interval(inside, outside, 7) != auroc_interval(inside, outside, 8)


def test_the_width_of_the_confidence_interval_matches_the_uncertainty_of_the_auroc():
    """The interval is compared with the standard deviation of the area over redrawn samples."""
    random = np.random.RandomState(3)
    pairs = [(random.randn(150) + 1, random.randn(100)) for _ in range(200)]
    spread = np.std([auroc_and_fpr(*pair)[0] for pair in pairs])
    low, high = auroc_interval(*pairs[0], 0)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.25)
    assert low < auroc_and_fpr(*pairs[0])[0] < high
    assert auroc_interval(np.ones(5), np.zeros(5), 0) == (1.0, 1.0)


def test_several_ood_datasets_require_names():
    assert named_sets([["a-*.tar", "b.tar"]]) == {"": ["a-*.tar", "b.tar"]}
    assert named_sets([["pipe:cat a=b.tar"]]) == {"": ["pipe:cat a=b.tar"]}
    assert named_sets([["svhn=a.tar", "b.tar"], ["dtd=s3://x?y=z"]]) == {
        "svhn": ["a.tar", "b.tar"],
        "dtd": ["s3://x?y=z"],
    }
    for given in ([["a.tar"], ["b=b.tar"]], [["b=a.tar"], ["b=b.tar"]]):
        with pytest.raises(UserError, match="give each set a different name"):
            named_sets(given)
    with pytest.raises(UserError, match="ood val: the result already uses this name for val"):
        Ood(model="run", train="b.tar", val="c.tar", out="out", ood=[["val=a.tar"]])


@pytest.fixture
def classifier(tmp_path):
    """Return the folder of a classifier of three colours with random weights, and the classifier itself."""
    torch.manual_seed(0)
    config = ClassifierConfig(model=SIZES, head="finetune", pool="cls", modality="image", classes=[0, 1, 2])
    model = Classifier(config).eval()
    model.backbone.reset_parameters()
    torch.nn.init.normal_(model.head.linear.weight)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier", model


def test_ood_scores_of_a_classifier_use_its_features_and_its_head(transfer, classifier, tmp_path, monkeypatch):
    folder, model = classifier
    given = []
    real = ood.auroc_and_fpr
    monkeypatch.setattr(ood, "auroc_and_fpr", lambda *both: given.append(both) or real(*both))
    sets = {"noise": members(range(20), "image"), "other": members(range(40, 52), "image")}
    words = [word for name, files in sets.items() for word in (
        "--ood", f"{name}={write_tar(tmp_path / (name + '.tar'), files)}")]  # fmt: skip
    result = transfer("ood", *words, "--set", "knn.k=5", "--set", "encode.precision=fp32", model=folder)
    assert figure_names(tmp_path / "out") == ["scores-noise", "scores-other"]
    assert [result[f"{name}_samples"] for name in ("train", "val", "noise", "other")] == [48, 18, 20, 12]
    assert len(given) == 8

    def by_hand(images):
        with torch.no_grad():
            features_SD = model.backbone.encode(
                [decode_image(image, 3) for image in images], pool="cls", precision="fp32"
            )
            return features_SD.double().numpy(), model.head(features_SD).double().numpy()

    train, _ = by_hand([coloured(i, NAMES[i % 3]) for i in range(48)])
    labels = np.arange(48) % 3
    means = np.stack([train[labels == label].mean(0) for label in range(3)])
    within = LedoitWolf(assume_centered=True).fit(train - means[labels])
    for number, numbers in enumerate((range(20), range(40, 52))):
        parts = [[coloured(i, NAMES[i % 3]) for i in range(100, 118)], [picture(i) for i in numbers]]
        for place, images in enumerate(parts):
            features, logits = by_hand(images)
            softmaxes, energies, _, distances = (pair[place] for pair in given[4 * number : 4 * number + 4])
            np.testing.assert_allclose(softmaxes, softmax(logits, 1).max(1), rtol=1e-4)
            np.testing.assert_allclose(energies, logsumexp(logits, 1), rtol=1e-4, atol=1e-4)
            expected = np.min([within.mahalanobis(features - mean) for mean in means], 0)
            np.testing.assert_allclose(-distances, expected, rtol=1e-3)
    for number, name in enumerate(f"{a}_{b}" for a in sets for b in ("max_softmax", "energy", "knn", "mahalanobis")):
        assert result[f"{name}_auroc"] == pytest.approx(real(*given[number])[0])
        low, high = auroc_interval(*given[number], 42)
        assert (result[f"{name}_auroc_low"], result[f"{name}_auroc_high"]) == pytest.approx((low, high))
    assert 0 < result["noise_max_softmax_auroc_high"] - result["noise_max_softmax_auroc_low"] < 1


def test_a_classifier_with_other_classes_or_another_input_is_refused(transfer, classifier, shards, tmp_path):
    folder, _ = classifier
    for options, message in (
        (["--labels", "json.name"], "have 3 classes, and the classifier has 3: only one of the two has the class '0'"),
        (["--modality", "text"], "modality text: the classifier .* was trained with image; leave it out"),
        (
            ["--set", "encode.pool=mean"],
            "override encode.pool=mean: the classifier was trained with encode.pool=cls; leave out",
        ),
    ):
        with pytest.raises(UserError, match=message):
            transfer("ood", "--ood", shards[1], *options, model=folder)
        assert not (tmp_path / "out/result.json").exists()
    fewer = labelled_tar(tmp_path / "fewer.tar", range(12), {i: i % 2 for i in range(12)})
    with pytest.raises(
        UserError, match="have 2 classes, and the classifier has 3: only one of the two has the class '2'"
    ):
        transfer("ood", "--ood", shards[1], model=folder, train=fewer, val=fewer)
    config = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(config | {"classes": [2, 1, 0]}))
    with pytest.raises(UserError, match="have 3 classes, and the classifier has 3: their order differs"):
        transfer("ood", "--ood", shards[1], model=folder)
    (folder / "classifier.json").write_text(json.dumps({"head": 1}))
    with pytest.raises(UserError, match=r"classifier\.json"):
        transfer("ood", "--ood", shards[1], model=folder)
