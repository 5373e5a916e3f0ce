"""The diagnosis of a failing run is correct, and so are the baselines of its losses."""

import json
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import Config, LossConfig, OptimConfig, TrainConfig, parse
from m3ae_fast.data import dataset
from m3ae_fast.engine.fragments import cut
from m3ae_fast.engine.validation_metrics import Baselines, entropy, position_share, rankme
from m3ae_fast.evaluation.knn_during_training import knn_probe
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.process.session import joined_program
from m3ae_fast.training.diagnostics import diagnose, fix_of_losses, verdict
from m3ae_fast.training.run import pre_train
from tests.helpers.trainer import TINY
from tests.test_model import MIXED
from tests.test_model import TINY as SMALL


def trained(folder, **sections):
    """Train the tiny model with changed settings for 12 steps, and return the logged lines."""
    data = json.loads(json.dumps(TINY))
    data["run"] = {"dir": str(folder / "run"), "loggers": []}
    data["data"]["workers"] = 0
    data["train"] |= {"steps": 12, "global_batch": 8, "micro_batch": None, "eval_samples": 16}
    data["optim"]["peak_lr"] = 0.1
    for name, values in sections.items():
        data.setdefault(name, {}).update(values)
    with joined_program() as session:
        pre_train(parse(Config, data, "test"), session, make_probe=knn_probe)
    return read_metrics(folder / "run")


def longer(metrics):
    """Return the log lines as if the run had been longer: step numbers are multiplied by ten, and relative losses are
    divided by two. In its few steps, the small model does not become better than constant predictions."""
    relative = "val_image_relative", "val_text_relative"
    return [
        line | {"step": 10 * line["step"]} | {name: line[name] / 2 for name in relative if name in line}
        for line in metrics
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("collapse", {"optim": {"peak_lr": 0.32, "weight_decay": 90.0}}),
        ("no learning", {"optim": {"peak_lr": 1e-9}}),
        ("only texts are learnt", {"loss": {"image_weight": 0.0}}),
        ("only images are learnt", {"loss": {"text_weight": 0.0}}),
    ],
)
def test_the_diagnostics_of_a_broken_run_name_the_problem(tmp_path, name, sections):
    assert [diagnostic.name for diagnostic in diagnose(longer(trained(tmp_path, **sections)))][:1] == [name]


@pytest.mark.slow
def test_a_run_that_waits_for_its_data_is_diagnosed_and_a_healthy_run_is_not(tmp_path, monkeypatch):
    def slowly(*args):
        time.sleep(0.4)  # a step takes less, also on a busy machine
        return decode_image(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "decode_image", slowly)
        slow = trained(tmp_path, data={"val": []}, train={"global_batch": 2, "steps": 3})
    assert [diagnostic.name for diagnostic in diagnose(slow)] == ["too few steps", "data bound"]
    # not the measured fraction, which may be large on a busy machine
    sound = [line | {"data_wait": 0.01} for line in longer(trained(tmp_path / "sound"))]
    assert diagnose(sound) == []
    assert "the image loss on held-out samples is " in verdict(sound) and "(RankMe)" in verdict(sound)


def test_without_held_out_samples_the_training_loss_is_diagnosed():
    still = [{"step": 20 * step, "loss": 2.0} for step in range(10)]
    assert [diagnostic.name for diagnostic in diagnose(still)] == ["no learning"]
    assert diagnose([line | {"loss": 2.0 - i / 9} for i, line in enumerate(still)]) == diagnose(still[:9]) == []
    assert verdict(still) == ""


def test_a_run_that_its_time_limit_has_shortened_is_diagnosed():
    config = {"train": {"steps": 542, "hours": 0.15}}
    metrics = [{"step": 10}, {"step": 10, "total_steps": 90}, {"step": 20, "total_steps": 134}, {"step": 134}]
    found = diagnose(metrics, config)[0]
    assert found.name == "shorter than planned"
    assert found.what.startswith("only 134 of the 542 planned steps fitted into train.hours=0.15")
    for same in (
        diagnose(metrics, {"train": {"steps": 140, "hours": 0.15}}),
        diagnose([metrics[0], metrics[3]], config),
    ):
        assert "shorter than planned" not in [each.name for each in same]


def test_a_single_held_out_sample_is_not_diagnosed_as_collapsed():
    assert diagnose([{"step": 500 * step, "val_rankme": 1.0} for step in range(2)]) == []
    (found,) = diagnose([{"step": 500 * step, "val_rankme": 9.0 - 8 * step} for step in range(2)])
    assert found.name == "collapse"


def lines(**series):
    """Return log lines with these values, one after the other."""
    return [dict(zip(series, values)) for values in zip(*series.values())]


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ({"val_rankme": (3.0, 9.0, 1.9)}, "collapse"),
        ({"val_rankme": (3.0, 1.0, 2.0)}, None),
        ({"val_rankme": (100.0, 120.0, 49.0)}, "collapse"),  # 49 dimensions are left, but more than half are lost
        ({"val_rankme": (100.0, 10.0, 51.0)}, None),
        ({"val_rankme": (2.0, 1.9)}, "collapse"),
        ({"val_rankme": (1.9, 1.5)}, None),  # the rank is low from the start, as with few samples
        ({"val_rankme": (1.5,)}, None),
        ({"val_rankme": (50.0, 49.0, math.nan)}, None),  # values that are not finite are reported elsewhere
        ({"data_wait": (1.0, 0.2)}, None),  # the first value includes the start of the workers
        ({"data_wait": (0.0, 0.2, 0.4, 0.4)}, "data bound"),
        ({"data_wait": (0.0, 0.5)}, "data bound"),
        ({"data_wait": (0.0, 0.9, 0.1, 0.1)}, None),
        ({"loss": (*[2.0] * 11, 1.0)}, "no learning"),  # a single lucky step
        ({"loss": (*[2.0] * 9, 1.9, 1.9, 9.0)}, None),
        ({"val_image_relative": (1.0, 0.97), "val_text_relative": (1.0, 0.99)}, "only images are learnt"),
        ({"val_image_relative": (1.0, 0.99), "val_text_relative": (1.0, 0.97)}, "only texts are learnt"),
        ({"val_image_relative": (1.0, 0.5, 0.99), "val_text_relative": (1.0, 0.5, 1.5)}, "no learning"),
        ({"val_text_relative": (1.0, 0.99), "loss": (2.0, 1.0)}, "no learning"),
    ],
)
def test_diagnostics_compare_first_and_last_values(metrics, name):
    assert [diagnostic.name for diagnostic in diagnose(lines(**metrics))] == ([name] if name else [])


def test_the_verdict_contains_each_metric_and_its_value_before_training():
    metrics = lines(
        val_image_relative=(1.25, 9.0, 0.5),
        val_text_relative=(1.75, 9.0, 0.75),
        val_knn_top1=(0.125, 0.9, 0.5),
        val_rankme=(20.0, 9.0, 12.5),
    )
    image, text, knn, rank = verdict(metrics).split("; ")
    assert re.search(r"image loss .* 0\.50 times .*mean patch .*1\.25", image)
    assert re.search(r"text loss .* 0\.75 times .*frequency .*1\.75", text)
    assert re.search(r"k-NN accuracy 50\.0% .*12\.5%", knn) and re.search(r"rank .* 12\.5 .*20\.0", rank)
    for top1, words in (
        (0.75, "75.0% (before training: 12.5%), above"),
        (0.66, "66.0% (before training: 12.5%), not above"),
    ):
        metrics = lines(val_knn_top1=(0.125, top1), val_knn_largest_class=(0.66, 0.66))
        assert verdict(metrics) == f"k-NN accuracy {words} the share of the largest class (66.0%)"
    (diagnostic,) = diagnose(lines(val_rankme=(20.0, 3.0)))
    assert diagnostic.what.startswith(
        "the effective rank of the features (RankMe) is 3.0, compared with 20.0 before training"
    )
    (diagnostic,) = diagnose(lines(val_image_relative=(1.0, 0.9), val_text_relative=(1.5, 1.6)))
    assert diagnostic.what.startswith("the text loss") and diagnostic.suggestion.startswith(
        "more steps, a higher loss.text_weight, o"
    )


@pytest.mark.parametrize(
    ("steps", "rates", "names"),
    [
        ((0, 13), (1e-3, 1e-3), ["too few steps"]),
        ((0, 45), (1e-3, 1e-4), ["too few steps"]),
        ((0, 99), (1e-3, 1e-4), ["too few steps"]),
        ((0, 100), (1e-3, 1e-4), ["collapse", "no learning"]),
        ((0, 400), (1e-4, 2e-4), ["too few steps"]),  # the warm-up has not ended
        ((0, 400), (2e-4, 2e-4), ["collapse", "no learning"]),
    ],
)
def test_a_run_with_too_few_steps_is_not_diagnosed_as_collapsed(steps, rates, names):
    metrics = lines(step=steps, lr=rates, val_rankme=(20.0, 3.0), val_image_relative=(1.0, 1.0))
    found = diagnose(metrics)
    assert [diagnostic.name for diagnostic in found] == names
    if names == ["too few steps"]:
        assert f"{steps[-1]} steps are too few" in found[0].what and "train.steps" in found[0].suggestion
        assert ("warm-up" in found[0].what) == (rates[1] > rates[0])


@pytest.mark.parametrize(
    ("image", "text", "name", "what"),
    [
        (
            (1.0, 0.6),
            (1.4, 1.01),
            "only images are learnt",
            "before training: 1.40): the model has learnt only the token",
        ),
        (
            (1.0, 0.6),
            (1.4, 0.99),
            "only images are learnt",
            "the model has learnt only the token frequencies",
        ),
        ((1.0, 0.6), (1.4, 0.97), None, ""),
        ((1.0, 0.6), (1.0, 1.0), "only images are learnt", "before training: 1.00"),
        ((1.5, 1.0), (1.4, 0.7), "only texts are learnt", "the model has learnt only the mean patch"),
        ((1.5, 1.0), (1.4, 1.0), "no learning", "the image loss on held-out samples is 1.00"),
    ],
)
def test_a_loss_no_better_than_a_constant_prediction_is_diagnosed(image, text, name, what):
    found = diagnose(lines(step=(0, 400), val_image_relative=image, val_text_relative=text))
    assert [diagnostic.name for diagnostic in found] == ([name] if name else [])
    assert all(what in diagnostic.what for diagnostic in found)


@pytest.mark.parametrize(
    ("optim", "advice"),
    [
        ({}, "a longer warm-up, or a lower optim.weight_decay"),
        ({"clip_grad": None}, "optim.clip_grad=1.0, a longer warm-up, or a lower optim.weight_decay"),
        ({"clip_grad": 5.0, "weight_decay": 0.0}, "optim.clip_grad=1.0, or a longer warm-up"),
        ({"clip_grad": 1.0, "weight_decay": 0.0}, "a lower optim.clip_grad, or a longer warm-up"),
    ],
)
def test_advice_depends_on_the_current_settings(optim, advice):
    (found,) = diagnose(lines(step=(0, 400), val_rankme=(20.0, 3.0)), {"optim": optim})
    assert found.suggestion == f"a lower optim.peak_lr, {advice}"
    (found,) = diagnose(lines(step=(200, 400), data_wait=(0.5, 0.5)), {"data": {"repeats": 2}})
    assert found.suggestion.endswith("data.repeats=3")


@pytest.mark.parametrize(
    ("clip_grad", "precision", "remedy"),
    [
        (None, "bf16", "a lower optim.peak_lr, optim.clip_grad=1.0, or train.precision=fp32"),
        (1.0, "fp32", "a lower optim.peak_lr, or a lower optim.clip_grad"),
    ],
)
def test_advice_for_a_non_finite_loss_depends_on_the_current_settings(clip_grad, precision, remedy):
    assert fix_of_losses(TrainConfig(steps=1, precision=precision), OptimConfig(clip_grad=clip_grad)) == remedy


def test_the_advice_of_the_report_depends_on_the_settings_of_the_run(tmp_path):
    """The settings are read from the last checkpoint."""
    found = [{"step": step, "val_rankme": 20.0 / (1 + step)} for step in (0, 400)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, found)))
    info = checkpoint.Info(400, 0, 42, {"optim": {"clip_grad": 1.0}}, {})
    checkpoint.save(tmp_path, cut({"model/w": torch.ones(3)}, 0, 1), info, 1)
    write_report(tmp_path, tmp_path / "report.html")
    head = (tmp_path / "report.html").read_text().partition("<table>")[0]
    assert "a lower optim.clip_grad" in head and "clip_grad=1.0" not in head


@pytest.mark.parametrize(("kind", "norm_pix"), [("pixels", False), ("pixels", True), ("hog", False)])
def test_losses_are_relative_to_the_best_constant_prediction(kind, norm_pix):
    """A model that predicts the mean target and the frequencies of words has relative losses of 1."""
    torch.manual_seed(0)
    model = M3AE(SMALL.model_copy(update={"image_targets": kind}), LossConfig(norm_pix=norm_pix, per="batch"))
    batch = pack(MIXED, model.geometry)
    with join_ranks() as ranks:
        ours = Baselines(model, "fp32", ranks)
        ours.add(batch)
        numbers = ours.values({"val_image_loss": 1.0, "val_text_loss": 1.0})
        parts = Baselines(model, "fp32", ranks)
        for sample in MIXED:
            parts.add(pack([sample], model.geometry))
        again = parts.values({"val_image_loss": 1.0, "val_text_loss": 1.0})
    assert {name: again[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    rows = batch.image_row_weight != 0
    targets = model.image_targets.of(batch, rows)
    words = batch.text_targets[batch.text_row_weight != 0].long()
    with torch.no_grad():
        for head in (model.image_head, model.text_head):
            head.weight.zero_()
        model.image_head.bias.copy_(targets.mean(0))
        model.text_head.bias.copy_(
            (torch.bincount(words, minlength=SMALL.vocab_size) / len(words)).clamp_min(1e-30).log()
        )
        losses = model.eval()(batch)
    assert losses.image_loss.item() * numbers["val_image_relative"] == pytest.approx(1, rel=1e-4)
    assert losses.text_loss.item() * numbers["val_text_relative"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_effective_rank_is_computed_from_the_features_of_all_ranks(monkeypatch, world):
    """The result equals that of a single rank, for any number of samples. Only one rank computes it."""
    features = torch.randn(5000, SMALL.emb_dim, generator=torch.Generator().manual_seed(0))
    features[4000:] *= torch.linspace(0, 3, SMALL.emb_dim)  # the last samples span other dimensions than the first
    model = M3AE(SMALL)
    nothing = pack([], model.geometry)
    computed = []
    ranks = SimpleNamespace(device=torch.device("cpu"), broadcast=lambda work: computed.append(1) or work())
    parts = [Baselines(model, "fp32", ranks) for _ in range(world)]
    for rank, part in enumerate(parts):
        for own in features[rank::world].split(700):
            monkeypatch.setattr(model, "pooled_and_rows", lambda batch, own=own: (own, torch.empty(0, SMALL.emb_dim)))
            part.add(nothing)
    each: list[torch.Tensor] = []
    for part in parts[1:]:
        ranks.sum_tensor = lambda values: each.append(values) or values
        part.values({})
    ranks.sum_tensor = lambda values: sum(each, values)
    computed.clear()
    expected = rankme_by_svd(features)
    assert parts[0].values({}) == {"val_rankme": pytest.approx(expected, rel=1e-6)} and computed == [1]


@pytest.mark.parametrize("norm", ["before_norm", "after_norm"])
def test_the_share_of_positions_is_that_of_an_analysis_of_variance(norm):
    """val_position_share is 0 on average for features that do not depend on the position, and 1 for features that
    depend only on the position."""
    torch.manual_seed(0)
    model = M3AE(SMALL.model_copy(update={"mean_pool": norm}))
    with join_ranks() as ranks, torch.no_grad():
        ours = Baselines(model, "fp32", ranks)
        features, positions = [], []
        for sample in MIXED:
            batch = pack([sample], model.geometry)
            ours.add(batch)
            patches = batch.encoder_src >= 0
            features.append(model.eval().forward_encoder(batch)[patches].double())
            positions += (batch.encoder_table_ids[patches] - 1).tolist()
            torch.testing.assert_close(model.pooled_and_rows(batch)[0], model.pooled(batch))
        found = ours.values({})["val_position_share"]
    values, at = torch.cat(features), torch.tensor(positions)
    dummies = torch.nn.functional.one_hot(at).double()
    dummies = dummies[:, dummies.any(0)]
    fitted = dummies @ torch.linalg.lstsq(dummies, values).solution
    within = (values - fitted).square().sum() / (len(values) - dummies.shape[1])
    total = (values - values.mean(0)).square().sum() / (len(values) - 1)
    assert found == pytest.approx(1 - (within / total).item(), rel=1e-6)


def test_the_share_of_positions_can_be_0_or_1_or_undefined():
    random = torch.Generator().manual_seed(0)
    at = torch.arange(20).repeat(50)

    def share(values):
        sums = torch.zeros(25, values.shape[1], dtype=torch.float64).index_add_(0, at[: len(values)], values)
        return position_share(
            torch.bincount(at[: len(values)], minlength=25).double(), sums, values.square().sum().item()
        )

    noise = torch.randn(1000, 8, generator=random, dtype=torch.float64)
    tables = torch.randn(20, 8, generator=random, dtype=torch.float64)
    assert abs(share(noise)) < 0.01 and share(tables[at]) == pytest.approx(1)
    assert share(noise + tables[at]) == pytest.approx(0.5, abs=0.1)
    assert share(noise[:20]) is None and share(torch.ones(1000, 8, dtype=torch.float64)) is None


def rankme_by_svd(features: torch.Tensor) -> float:
    """Return RankMe as the paper defines it."""
    sizes = torch.linalg.svdvals(features.double())
    p = sizes / sizes.sum() + 1e-7
    return math.exp(-(p * p.log()).sum())


def test_rankme_counts_the_dimensions_of_the_features():
    random = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(64, 8, generator=random))
    for features, dimensions in ((q, 8), (q[:, :3], 3), (torch.ones(64, 8), 1), (torch.zeros(64, 8), 1)):
        found = rankme(features.double().T @ features.double(), len(features))
        assert found == pytest.approx(dimensions, rel=1e-3)
    few = torch.randn(5, 8, generator=random)
    assert rankme(few.double().T @ few.double(), 5) == pytest.approx(rankme_by_svd(few), rel=1e-6)
    assert math.isnan(rankme(torch.full((2, 2), math.nan), 3))
    assert entropy(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(math.log(2)) and entropy(torch.zeros(2)) == 0
