"""Logistic regressions equal those of scikit-learn, and their inverse strength is chosen on held-out samples."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from m3ae_fast.heads import logistic_regression
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.logistic_regression import INVERSE_STRENGTHS, USUAL, fit, fit_chosen


def _bank(features, labels=None):
    return FeatureBank([f"a.tar/{number}" for number in range(len(features))], features, labels)


def _samples(count, classes, noise, width=24, seed=0, decay=2):
    """Return features and labels. Unless `decay` is 0, the variances of the features' principal components differ by
    many orders of magnitude, as those of networks do."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    features = means[labels] + noise * torch.randn(count, width, generator=generator)
    mixing = (
        torch.randn(width, width, generator=torch.Generator().manual_seed(8))
        * torch.logspace(0, -decay, width)[:, None]
    )
    return features @ mixing + 7, labels


def _of_scikit_learn(features, labels, queries):
    scaler = StandardScaler().fit(features)
    judge = LogisticRegression(max_iter=10_000, tol=1e-6).fit(scaler.transform(features), labels)
    return torch.from_numpy(judge.decision_function(scaler.transform(queries)))


@pytest.fixture
def passes(monkeypatch):
    """Return a list to which each pass over all samples appends the number of penalty strengths that it evaluates."""
    seen, real = [], logistic_regression._Objective.__call__
    monkeypatch.setattr(
        logistic_regression._Objective, "__call__", lambda self, w, at: seen.append(len(at)) or real(self, w, at)
    )
    return seen


@pytest.mark.parametrize("logits_at_a_time", [1 << 22, 700])
def test_logistic_regression_equals_that_of_scikit_learn_in_few_iterations(monkeypatch, passes, logits_at_a_time):
    monkeypatch.setattr(logistic_regression, "_AT_A_TIME", logits_at_a_time)
    (features, labels), (queries, _) = _samples(300, 4, 2.0), _samples(50, 4, 2.0, seed=1)
    found = logits(fit(_bank(features), labels, 4), _bank(queries, torch.zeros(50).long()))
    expected = _of_scikit_learn(features.double(), labels, queries.double())
    torch.testing.assert_close(found - found.mean(1, keepdim=True), expected.float(), rtol=0.02, atol=0.02)
    assert sum(passes) < 40  # scikit-learn needs hundreds

    lists = torch.stack((labels == 0, labels < 2, labels < 0, labels < 4), 1)
    found = logits(fit(_bank(features), lists, 4), _bank(queries, torch.zeros(50).long()))
    for number in range(2):
        expected = _of_scikit_learn(features.double(), lists[:, number], queries.double())
        torch.testing.assert_close(found[:, number], expected.float(), rtol=0.02, atol=0.02)
    # no sample has the third label, and all samples have the fourth
    assert len(found[:, 2].unique()) == len(found[:, 3].unique()) == 1


def test_wide_features_are_classified_as_by_scikit_learn_although_few_eigenvalues_are_computed(monkeypatch, passes):
    monkeypatch.setattr(logistic_regression, "_EIGENVALUES", 40)
    options = {"width": logistic_regression._WIDE + 9, "noise": 4.0}
    (features, labels), (queries, _) = _samples(200, 3, **options), _samples(50, 3, seed=1, **options)
    features[:, 5] = queries[:, 5] = 1.0
    found = logits(fit(_bank(features), labels, 3), _bank(queries, torch.zeros(50).long()))
    expected = _of_scikit_learn(features.double(), labels, queries.double())
    torch.testing.assert_close(found - found.mean(1, keepdim=True), expected.float(), rtol=0.05, atol=0.05)
    assert sum(passes) < 60


def test_two_classes_have_the_penalty_of_scikit_learn():
    (features, labels), (queries, _) = _samples(60, 2, 4.0), _samples(50, 2, 4.0, seed=1)
    found = logits(fit(_bank(features), labels, 2), _bank(queries, torch.zeros(50).long()))
    expected = _of_scikit_learn(features.double(), labels, queries.double())
    torch.testing.assert_close(found[:, 1] - found[:, 0], expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e15])
def test_features_of_any_scale_are_standardised(scale):
    """Constant features are ignored, also in samples in which they have other values."""
    (features, labels), (queries, _) = _samples(120, 3, 3.0, decay=0), _samples(50, 3, 3.0, seed=1, decay=0)
    expected = logits(fit(_bank(features), labels, 3), _bank(queries))
    features, queries = (
        torch.cat((scale * (each - 7), torch.full((len(each), 1), constant)), 1)
        for each, constant in ((features, 0.1), (queries, 5.0))
    )
    found = logits(fit(_bank(features), labels, 3), _bank(queries))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_the_strongest_penalty_within_one_standard_error_is_chosen(monkeypatch):
    """100 samples are held out, so an accuracy of 70 % has a standard error of 4.6 points, and one of 100 % about 1."""
    features, labels = _samples(1000, 4, 2.0)

    def chosen(*accuracies):
        monkeypatch.setattr(logistic_regression, "judge", lambda *_: [(each, 0.5) for each in accuracies])
        return fit_chosen(_bank(features, labels), 4)[1]

    assert chosen(0.5, 0.64, 0.66, 0.7, 0.69) == INVERSE_STRENGTHS[2]
    assert chosen(0.7, 0.66, 0.7, 0.7, 0.7) == INVERSE_STRENGTHS[0]
    assert chosen(0.5, 0.5, 0.6, 0.6, 0.7) == USUAL
    assert chosen(0.5, 0.98, 0.995, 1.0, 1.0) == INVERSE_STRENGTHS[2]
    assert chosen(0.0, 0.0, 0.0, 0.0, 0.0) == USUAL  # all strengths are equally bad on the held-out samples


def test_the_most_accurate_penalty_is_chosen_if_few_samples_are_held_out(monkeypatch):
    """In a tie, the loss decides. With 990 samples, 99 are held out."""

    def chosen(count, *judged):
        monkeypatch.setattr(logistic_regression, "judge", lambda *_: judged)
        return fit_chosen(_bank(*_samples(count, 4, 2.0)), 4)[1]

    judged = (0.79, 0.5), (0.8, 0.6), (0.81, 0.5), (0.81, 0.4), (0.81, 0.6)
    assert chosen(1000, *judged) == INVERSE_STRENGTHS[0]
    assert chosen(990, *judged) == chosen(60, *judged) == INVERSE_STRENGTHS[3]


def test_stronger_regularisation_is_chosen_if_the_default_overfits():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1200, 1, generator=generator)  # all features are noisy multiples of this variable
    features = hidden + 3 * torch.randn(1200, 200, generator=generator)
    labels = (hidden[:, 0] + torch.randn(1200, generator=generator) > 0).long()
    train, held_out = _bank(features[:400], labels[:400]), _bank(features[400:], labels[400:])
    heads, strength = fit_chosen(train, 2)
    right, usual = (
        (logits(each, held_out).argmax(1) == labels[400:]).float().mean()
        for each in (heads, fit(train, train.labels, 2))
    )
    assert strength < USUAL and right > usual + 0.03, (strength, right, usual)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (torch.arange(9) % 3, 3),  # too few samples to hold out any
        (torch.arange(120), 120),  # held-out classes have no training sample
    ],
)
def test_the_default_regularisation_is_used_if_no_other_can_be_chosen(labels, classes):
    assert _fit_of_random_features(labels, classes) == USUAL


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (torch.zeros(40).long(), 1),
        (torch.arange(40) % 2, 5),  # some classes have no sample
    ],
)
def test_classes_without_samples_are_never_predicted(labels, classes):
    _fit_of_random_features(labels, classes)


def _fit_of_random_features(labels, classes):
    """Return the inverse strength, after checking that the logits are finite and that only classes with samples are
    predicted."""
    features = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    features[:, 0] = 3.5  # a constant feature
    heads, strength = fit_chosen(_bank(features, labels), classes)
    found = logits(heads, _bank(features, labels))
    assert found.isfinite().all() and found.shape == (len(labels), classes)
    assert torch.isin(found.argmax(1), labels).all()
    return strength
