"""Probes by layer and by number of shots require one pass over the images and give the results of separate probes."""

import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import cross_entropy

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.arguments import chosen_layers
from m3ae_fast.evaluation import probe_grid
from m3ae_fast.evaluation.probe_grid import few_shot
from m3ae_fast.evaluation.significance import interval, mean_accuracy
from m3ae_fast.evaluation.task_runner import evaluate
from m3ae_fast.evaluation.tasks import Knn
from m3ae_fast.heads import attentive_online, encoding, feature_bank, probes
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.hyperparameter_choice import best
from m3ae_fast.heads.recipe import ATTENTIVE_RATES
from m3ae_fast.images.crops import centre_crop
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.weights.open_model import open_model
from tests.evaluation.conftest import figure_names, settings
from tests.helpers.labelled import NAMES, coloured, labelled_members, labelled_tar
from tests.helpers.shards import write_tar

pytestmark = pytest.mark.slow

SHORT = {
    "knn": [],
    "logistic": [],
    "attentive": settings("attentive.steps=20", "attentive.batch=16"),
}


@pytest.fixture
def encoded_samples(monkeypatch):
    """Return the list of the keys of the samples that the encoder has processed."""
    seen, real = [], MultimodalEncoder._input
    monkeypatch.setattr(MultimodalEncoder, "_input", lambda self, batch: seen.extend(batch.keys) or real(self, batch))
    return seen


@pytest.mark.parametrize("task", SHORT)
def test_images_are_encoded_once_for_all_layers_and_the_accuracies_are_plotted_by_depth(
    transfer, tmp_path, encoded_samples, task, capsys
):
    result = transfer(task, "--layers", "all", *SHORT[task])
    assert len(encoded_samples) == 48 + 18
    assert [(row["layer"], row["shots"]) for row in result["results"]] == [(1, None), (2, None)]
    assert result["top1"] == result["results"][1]["top1"] and result["top1"] > 0.4  # chance level is a third
    chosen = {"knn": set(), "logistic": {"inverse_strength"}}.get(task, {"peak_lr"})
    assert all({"inverse_strength", "peak_lr"} & {*row} == chosen for row in result["results"])
    assert figure_names(tmp_path / "out") == ["depth"]
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    for row in result["results"]:
        own = table[table.layer == row["layer"]]
        assert len(own) == 18 and (own.label == own.prediction).mean() == pytest.approx(row["top1"])
    output = capsys.readouterr().out
    assert f"{task} probe at 2 of 2 layers, all 48 training samples: 2 probes" in output and "layer 1: " in output
    attends = task == "attentive"
    assert ("the patch tokens of 66 samples at 2 layers need" in output) == attends
    few = "layer 2: only 20 steps: without attentive.steps, the run would have at least 1,000"
    assert (few in result.get("warnings", [])) == (f"warning: {few}" in output) == attends


@pytest.mark.parametrize("task", ["knn", "logistic"])
def test_the_result_of_the_last_layer_is_bitwise_that_of_the_task_without_layers(transfer, tmp_path, monkeypatch, task):
    """Features that do not fit into memory are stored in a folder. It must be the output folder."""
    folders, rows = [], encoding.Rows
    monkeypatch.setattr(encoding, "Rows", lambda *given: folders.append(given[2]) or rows(*given))
    transfer(task, "--layers", "1,2", out="layers")
    assert {*folders} == {tmp_path / "layers"}
    folders.clear()
    transfer(task, out="plain")
    assert {*folders} == {tmp_path / "plain"}
    layers, plain = (
        parquet.read_table(tmp_path / name / "predictions.parquet").to_pandas() for name in ("layers", "plain")
    )
    last = layers[layers.layer == 2].reset_index(drop=True)
    for column in ("key", "label", "prediction", "score"):
        assert last[column].equals(plain[column])


@pytest.mark.parametrize("task", ["knn", "logistic"])
def test_images_are_encoded_once_for_all_poolings(transfer, tmp_path, encoded_samples, task, capsys):
    """Each accuracy is that of a run with only this pooling."""
    given = [*SHORT[task], *settings("encode.precision=fp32")]
    result = transfer(task, "--layers", "all", "--pools", "cls,mean", *given)
    assert len(encoded_samples) == 48 + 18
    rows, pools = result["results"], ["cls", "mean"]
    assert [(row["layer"], row["pool"]) for row in rows] == [(layer, pool) for layer in (1, 2) for pool in pools]
    assert result["top1"] == rows[2]["top1"]  # the accuracy of the last layer with the pooling that is named first
    output = capsys.readouterr().out
    assert f"{task} probe at 2 of 2 layers, cls and mean features, all 48 training samples: 4 probes" in output
    assert "layer 1, cls: top1 " in output and figure_names(tmp_path / "out") == ["depth"]
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    for pool in pools:
        own = transfer(task, "--layers", "all", *given, *settings(f"encode.pool={pool}"), out=pool)
        assert [row["pool"] for row in own["results"]] == [pool, pool]
        assert [row for row in rows if row["pool"] == pool] == own["results"]
        alone = parquet.read_table(tmp_path / pool / "predictions.parquet").to_pandas()
        found = table[table.pool == pool].reset_index(drop=True)
        assert found.prediction.equals(alone.prediction)
        np.testing.assert_allclose(found.score, alone.score, rtol=1e-4)


@pytest.mark.parametrize("online", [False, True])
def test_linear_and_attentive_heads_are_trained_in_one_pass(transfer, tmp_path, encoded_samples, online, capsys):
    """The attentive heads are equal to those of a run without linear heads, and the linear heads also learn."""
    steps = ("attentive.steps=30", "attentive.batch=16", "encode.batch=16", f"attentive.online={str(online).lower()}")
    given = settings(*steps, "encode.precision=fp32")
    result = transfer("attentive", "--layers", "all", "--pools", "mean,cls", *given)
    assert len(encoded_samples) == (30 * 16 + 48 + 18 if online else 48 + 18)
    rows = result["results"]
    order = [(layer, pool) for layer in (1, 2) for pool in (None, "mean", "cls")]
    assert [(row["layer"], row["pool"]) for row in rows] == order and result["top1"] == rows[3]["top1"]
    assert min(row["top1"] for row in rows) > 0.6 and all(row["peak_lr"] in ATTENTIVE_RATES for row in rows)
    output = capsys.readouterr().out
    assert "linear probes of mean and cls features, " in output
    assert ("online" in output) == online and figure_names(tmp_path / "out") == ["depth"]
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    own = transfer("attentive", "--layers", "all", *given, out="attentive")
    assert [row for row in rows if row["pool"] is None] == own["results"]
    alone = parquet.read_table(tmp_path / "attentive/predictions.parquet").to_pandas()
    found = table[table.pool.isna()].reset_index(drop=True)
    assert found.prediction.equals(alone.prediction)
    np.testing.assert_allclose(found.score, alone.score, rtol=1e-4)
    scores = [table[(table.layer == 2) & (table.pool == pool)].score.to_numpy() for pool in ("mean", "cls")]
    assert not np.allclose(*scores)


def test_a_given_learning_rate_has_the_result_that_it_has_among_several_candidates(transfer, tmp_path):
    short = settings("attentive.steps=12", "attentive.batch=24")
    whole = transfer("attentive", *short, out="whole")
    (row,) = whole["results"]
    assert row["peak_lr"] in ATTENTIVE_RATES and "layer 2: only 12 steps: " in whole["warnings"][0]
    given = transfer("attentive", *short, *settings(f"attentive.peak_lr={row['peak_lr']}"), out="given")
    assert given["results"] == whole["results"]
    tables = [parquet.read_table(tmp_path / name / "predictions.parquet").to_pandas() for name in ("whole", "given")]
    np.testing.assert_allclose(*(table["score"] for table in tables), rtol=1e-5)


def test_few_shot_accuracies_equal_those_of_k_nn_computed_by_hand(transfer, run, shards, tmp_path):
    result = transfer("knn", "--shots", "1,5", *settings("knn.k=5", "encode.precision=fp32"))
    rows = result["results"]
    assert [(row["shots"], row["draws"], row["layer"]) for row in rows] == [(1, 5, 2), (5, 5, 2)]
    options = {"labels": "cls", "layers": None, "pools": [], "shots": [1, 5], "baselines": False}
    assert result["options"] == options and result["skipped"] == 0
    assert figure_names(tmp_path / "out") == ["shots"]
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    model = open_model(str(run), text=False)
    bank, queries = _encoded(model, range(48)), _encoded(model, range(100, 118))
    keys = [f"{shards[0]}/{number:05d}" for number in range(48)]
    whole = FeatureBank(keys, bank, torch.arange(48) % 3, None, [])
    for shots in (1, 5):
        accuracies = []
        for draw in range(5):
            few = few_shot(whole, shots, draw, range(3))
            judge = KNeighborsClassifier(
                min(5, len(few.keys)), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
            ).fit(few.features_RD, few.labels_N)
            expected = judge.predict(queries)
            own = table[(table.shots == shots) & (table.draw == draw)]
            assert own.prediction.tolist() == expected.tolist()
            # the scores show that these are the samples of this draw, because other draws have other scores
            np.testing.assert_allclose(own.score, judge.predict_proba(queries).max(1), rtol=1e-3)
            accuracies.append((expected == np.arange(100, 118) % 3).mean())
        row = next(row for row in rows if row["shots"] == shots)
        assert row["top1"] == pytest.approx(np.mean(accuracies))
        assert (row["low"], row["high"]) == pytest.approx(np.clip(interval(accuracies), 0, 1))


def _encoded(model, numbers):
    images = [decode_image(coloured(number, NAMES[number % 3]), 3) for number in numbers]
    return model.encode(images=images, precision="fp32")


@pytest.mark.parametrize(("options", "chosen"), [(["--layers", "2"], True), (["--shots", "3"], False)])
def test_hyper_parameters_are_reported_only_if_they_belong_to_a_single_draw(transfer, options, chosen):
    (row,) = transfer("logistic", *options)["results"]
    assert ("inverse_strength" in row) == chosen


def test_too_many_shots_are_refused_before_any_probe(transfer, capsys):
    with pytest.raises(UserError, match="shots 99: the class 0 has only 16 training samples"):
        transfer("knn", "--shots", "1,99")
    assert "1 shots" not in capsys.readouterr().out


def test_few_shot_samples_are_nested_and_differ_between_draws():
    bank = FeatureBank([f"a.tar/{i}" for i in range(60)], torch.arange(60.0)[:, None], torch.arange(60) % 3, None, [])
    one, five = (few_shot(bank, shots, 0, range(3)) for shots in (1, 5))
    assert {*one.keys} < {*five.keys} and five.labels_N.bincount().tolist() == [5, 5, 5]
    assert torch.equal(five.features_RD[:, 0].long() % 3, five.labels_N)
    assert {*five.keys} != {*few_shot(bank, 5, 1, range(3)).keys}
    with pytest.raises(UserError, match="shots 21: the class b has only 20 training samples"):
        few_shot(bank, 21, 0, ["b", "a", "c"])


def test_the_interval_over_draws_is_students_t_and_the_standard_error_includes_samples_and_draws():
    values = [0.5, 0.55, 0.65]
    assert interval(values) == pytest.approx(stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)))
    alike = np.repeat((np.arange(100) < 70)[None], 3, 0)
    assert mean_accuracy(alike) == pytest.approx((0.7, (0.7 * 0.3 / 100) ** 0.5))
    apart = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=bool)
    of_samples = np.var([1, 1, 0.5, 0.5]) / 4
    assert mean_accuracy(apart) == pytest.approx((0.75, (of_samples + np.var([0.5, 1], ddof=1) / 2) ** 0.5))


def test_layers_are_selected_by_the_number_of_blocks():
    assert chosen_layers("all", 4) == [1, 2, 3, 4] and chosen_layers(None, 4) == [4]
    given = {"model": "run", "train": "a.tar", "val": "b.tar", "out": "out"}
    assert chosen_layers(Knn(**given, layers="3,1,3").layers, 4) == [1, 3]
    for wrong in ("0", "1,,2", "last"):
        with pytest.raises(UserError, match=f"layers {wrong}: must be all, or numbers of blocks from 1"):
            Knn(**given, layers=wrong)
    with pytest.raises(UserError, match="layers 5: must be all, or numbers from 1 to 4"):
        chosen_layers([5], 4)


def test_user_errors_are_reported_in_one_line_and_leave_no_files(transfer, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unrecognized arguments: --layers all"):
        transfer("linear", "--layers", "all")
    with pytest.raises(UserError, match="layers 3: must be all, or numbers from 1 to 2"):
        transfer("knn", "--layers", "3")
    with pytest.raises(UserError, match=r"pools replaces encode\.pool; leave out one of the two"):
        transfer("knn", "--pools", "all", *settings("encode.pool=cls"))
    with pytest.raises(UserError, match="--pools other: must be mean, cls, "):
        transfer("knn", "--pools", "other")
    with pytest.raises(UserError, match="unrecognized arguments: --pools all"):
        transfer("finetune", "--pools", "all")
    with pytest.raises(UserError, match="pools other: must be mean, cls, "):
        evaluate("knn", "run", train="a.tar", val="b.tar", out=tmp_path / "out", pools=["other"])
    with pytest.raises(UserError, match="pools: finetune does not use it; leave it out"):
        evaluate("finetune", "run", train="a.tar", val="b.tar", out=tmp_path / "out", pools="all")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def peak(monkeypatch):
    """Record the largest number of bytes of patch tokens that exist at the same time, and the largest number of bytes
    that are stored for a sample."""
    most, alive = {"tokens": 0, "stored": 0}, weakref.WeakSet()
    encode, encoded, append = (
        MultimodalEncoder.pooled_and_patches,
        attentive_online._encoded,
        feature_bank.Rows.append,
    )

    def count(tokens):
        alive.add(tokens)
        most["tokens"] = max(most["tokens"], sum(each.nbytes for each in alive))

    def pooled_and_patches(self, *given):
        pooled, tokens = encode(self, *given)
        count(tokens)
        return pooled, tokens

    def of_a_step(batch, *given):
        pooled, tokens, labels = encoded(batch, *given)
        assert len(labels) == sum(not attentive_online.is_held_out(key) for key in batch.keys)
        count(tokens)
        return pooled, tokens, labels

    def stored(self, rows):
        append(self, rows)
        most["stored"] = max(most["stored"], rows[:1].nbytes)

    monkeypatch.setattr(MultimodalEncoder, "pooled_and_patches", pooled_and_patches)
    monkeypatch.setattr(attentive_online, "_encoded", of_a_step)
    monkeypatch.setattr(feature_bank.Rows, "append", stored)
    return most


def test_the_memory_of_an_online_probe_does_not_grow_with_the_number_of_images(transfer, tmp_path, peak, capsys):
    """Three times as many images require the same memory. While learning rates are tried, the probe is not trained on
    the tenth of the samples with which they are compared."""
    options = settings("attentive.steps=4", "attentive.batch=16", "encode.batch=8", "attentive.online=true")
    peaks = []
    for count in (60, 180):
        train = labelled_tar(tmp_path / f"{count}.tar", range(count))
        result = transfer("attentive", "--layers", "all", *options, train=train, out=str(count))
        assert [row["layer"] for row in result["results"]] == [1, 2]
        peaks.append(dict(peak))
    assert peaks[0] == peaks[1] and 0 < peaks[0]["stored"] < 200 < peaks[0]["tokens"]
    assert "online, 180 training samples, batch 16, 4 steps, learning rates: 0.0001" in capsys.readouterr().out


def test_an_online_probe_has_the_rate_with_the_best_results_on_the_held_out_tenth(
    transfer, run, shards, tmp_path, monkeypatch
):
    """The results of all learning rates, the chosen rate and the predictions are computed again from the trained heads.
    One held-out sample cannot be read."""
    trained, right, fit = [], [], attentive_online.fit_heads
    monkeypatch.setattr(attentive_online, "fit_heads", lambda *given: right.append(fit(*given)) or right[-1])
    warned = probes.head_warnings
    monkeypatch.setattr(probes, "head_warnings", lambda one, recipe: trained.append(one) or warned(one, recipe))
    online = ("attentive.online=true", "attentive.steps=8", "attentive.batch=16", "encode.precision=fp32")
    val = write_tar(tmp_path / "val.tar", [*labelled_members(range(100, 118)), ("a.png", b""), ("a.cls", b"0")])
    result = transfer("attentive", "--pools", "mean", *settings(*online), val=val)
    assert result["val_samples"] == 18
    model = open_model(str(run), text=False)
    held_out = [number for number in range(48) if attentive_online.is_held_out(f"{shards[0]}/{number:05d}")]
    assert 0 < len(held_out) < 12
    kinds = [FeatureType(2, None), FeatureType(2, "mean")]
    for place, one in enumerate(trained):
        assert one.accuracies == right[0][kinds[place]][:, one.number].tolist() and not one.heads.training
        with torch.no_grad():
            tenth, val = (one.heads(_features(model, numbers, place == 0)) for numbers in (held_out, range(100, 118)))
        labels = torch.tensor(held_out) % 3
        for number, tried in enumerate(one.tried):
            assert tried.value == ATTENTIVE_RATES[number]
            assert tried.quality == pytest.approx((tenth[:, number].argmax(1) == labels).double().mean().item())
            assert tried.loss == pytest.approx(cross_entropy(tenth[:, number], labels).item(), rel=1e-2)
        assert one.number == one.tried.index(best(one.tried)) and result["results"][place]["peak_lr"] == one.peak_lr
        top1 = (val[:, one.number].argmax(1) == torch.arange(100, 118) % 3).double().mean().item()
        assert result["results"][place]["top1"] == pytest.approx(top1)
    assert {one.number for one in trained} != {0}, (
        "the first head must not be the best in every case, because then its number would not be tested"
    )


def _features(model, numbers, tokens):
    """Return the patch tokens or the mean-pooled features of coloured images."""
    images = [decode_image(coloured(number, NAMES[number % 3]), 3) for number in numbers]
    if not tokens:
        return model.encode(images=images, precision="fp32")
    return model.representation(torch.stack([centre_crop(image, 32) for image in images]))[:, 1:]


def test_the_memory_of_patch_tokens_is_that_of_all_ranks(monkeypatch):
    """If the memory of one rank is too small, no rank stores its tokens."""
    asked = []
    monkeypatch.setattr(probe_grid, "missing_in_host_memory", lambda *given: asked.append(given) or "")
    for found, online in (([""] * 3, False), (["", "", "9 GB needed"], True)):
        said = []
        job = SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(most_patches=196, emb_dim=768)),
            ranks=SimpleNamespace(world=3, of_node=[1, 2], gather=lambda own, found=found: found),
            config=SimpleNamespace(attentive=SimpleNamespace(online=None)),
            print=said.append,
        )
        corpora = [SimpleNamespace(samples=samples) for samples in (90_000, 10_000)]
        assert probe_grid.trains_online(job, [6, 12], corpora) == online
    assert asked == [(100_000 * 2 * 196 * 768 * 2 / 3, 2)] * 2
    assert len(said) == 1 and re.search(r"100,000 samples at 2 layers do not fit into memory \(9 GB", said[0])


def test_tokens_that_do_not_fit_into_memory_are_not_stored(transfer, peak, monkeypatch, capsys):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    transfer("attentive", *settings("attentive.steps=2", "attentive.batch=16", "attentive.online=null"))
    assert "patch tokens of 66 samples at 1 layer do not fit into memory (" in capsys.readouterr().out
    assert peak["stored"] < 200


@pytest.mark.parametrize(
    ("layers", "shots", "file", "lines"),
    [
        ((3, 6), (None,), "depth.png", {"all samples": [(3, 30, 1), (6, 60, 1)]}),
        ((3, 6), (1, 5), "depth.png", {"1 shots": [(3, 31, 1), (6, 61, 1)], "5 shots": [(3, 35, 1), (6, 65, 1)]}),
        ((6,), (1, 5), "shots.png", {"layer 6": [(1, 61, 1), (5, 65, 1)]}),
        ((6,), (5,), None, None),
    ],
)  # fmt: skip
def test_accuracies_are_plotted_by_depth_or_for_one_layer_by_shots(tmp_path, monkeypatch, layers, shots, file, lines):
    drawn = []
    monkeypatch.setattr(probe_grid, "draw_accuracies", lambda *what: drawn.append(what))
    rows = [
        {"layer": layer, "pool": "mean", "shots": of, "top1": 10 * layer + (of or 0), "top1_se": 1}
        for layer in layers
        for of in shots
    ]
    probe_grid._draw(SimpleNamespace(out=tmp_path), rows)
    assert [(path.name, points) for path, points, *_ in drawn] == ([(file, lines)] if file else [])
    drawn.clear()
    probe_grid._draw(SimpleNamespace(out=tmp_path), [*rows, *(row | {"pool": "cls"} for row in rows)])
    each = {f"{pool}, {name}": points for pool in ("mean", "cls") for name, points in (lines or {}).items()}
    assert [points for _, points, *_ in drawn] == ([each] if file else [])
