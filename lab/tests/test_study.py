"""The study of the paper at toy size."""

import io
import json
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import table
from lab.study import __main__ as program
from lab.study import measure, report, run, shards
from lab.study.plan import ARMS, Encoder, central, m3ae, plan
from lab.study.run import SETTINGS, Study
from lab.study.statistics import accuracy, difference
from m3ae_fast import train
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import write_parquet
from tests.helpers.labelled import described_tar, emoji, emoji_and_clothes
from tests.helpers.shards import write_tar

TINY = {
    "train.model": {
        "size": None, "emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "dec_depth": 1, "dec_num_heads": 2,
        "image_size": 16, "patch_size": 8, "text_length": 8, "vocab_size": 2048,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0],
    },
    "train.train": {"global_batch": 16, "steps": 4, "eval_samples": 8, "pictures": 0},
    "transfer.linear": {"epochs": 1, "peak_lr": 0.1},
    "transfer.attentive": {"steps": 2, "peak_lr": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return emoji_and_clothes(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """Shorten the study with few Fashion-MNIST images, few shots and other clip art."""
    monkeypatch.setattr(shards, "CLOTHES", {"probe": 15, "validation": 8, "images": 10})
    monkeypatch.setattr(measure, "SHOTS", (1, 2))
    described_tar(tmp_path / "clip/val-0.tar", {f"{i}": emoji(i) for i in range(6)})
    monkeypatch.setattr(run, "CLIP_ART", tmp_path / "clip")


@pytest.fixture
def call(data, tmp_path):
    """Return a function of options that runs a study at toy size and returns the exit code."""

    def perform(*options):
        sets = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
        where = [str(data), "--out", str(tmp_path / "out"), "--seeds", "1"]
        return program.main([*where, *(word for each in sets for word in ("--set", each)), *options])

    return perform


def _members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_splits_share_no_emoji_and_exclude_skin_tones(data, tmp_path):
    shards.prepare(data, tmp_path / "out", 24)
    labels = json.loads((tmp_path / "out" / shards.LABELS).read_text())
    seen = {}
    for part in range(shards.PARTS):
        by_vendor = [_members(tmp_path / f"out/emoji-{vendor}-{part}.tar") for vendor in shards.VENDORS]
        numbers = [{key.split("-")[1].split(".")[0] for key in own} for own in by_vendor]
        assert numbers[0] == numbers[1] and len(numbers[0]) > 5
        seen |= dict.fromkeys(numbers[0], part)
        for key, content in by_vendor[0].items():
            if key.endswith(".txt"):
                name = labels[key.removesuffix(".txt")]
                assert content.decode().startswith(name["category"].lower()) and "tone" not in name
            else:
                assert Image.open(io.BytesIO(content)).size == (24, 24)
    assert len(seen) == 60 and {shards.part_of(emoji): part for emoji, part in seen.items()} == {i: i for i in range(4)}
    clothes = [_members(tmp_path / f"out/fashion-{name}.tar") for name in ("probe", "validation", "images", "test")]
    assert [len(own) for own in clothes] == [15, 8, 10, 12]
    assert len({content for own in clothes[:3] for content in own.values()}) == 33
    assert {labels[key.removesuffix(".jpg")]["category"] for own in clothes for key in own} == {
        f"kind {i}" for i in range(3)
    }


def test_a_study_requires_the_folders_of_labelled_data(data, tmp_path):
    with pytest.raises(UserError, match=r"twitter: has no train-\*\.tar; make them with python -m lab\.labelled"):
        program.main([str(tmp_path), "--out", str(tmp_path / "out")])
    described_tar(tmp_path / "old/twitter/train-0.tar", {"0": (b"", "a", {"emoji": "1F600"})})
    with pytest.raises(UserError, match="was made by an earlier version"):
        program.main([str(tmp_path / "old"), "--out", str(tmp_path / "out")])


def test_a_study_is_run_once_and_can_be_resumed(call, tmp_path, monkeypatch, capsys):
    """There is one encoder of each kind, and each is tested on the samples that are listed in its result."""
    few = [each for each in plan(16, 4) if each.seed == 0 and central(each, 16, 4)]
    few = [each for each in few if each.objective != "mae"] + [Encoder("mae", 16, 4, 0, images="clothes")]
    monkeypatch.setattr(program, "plan", lambda *arguments: few)
    monkeypatch.setattr(report, "draw", lambda rows, path: None)  # see below
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # as if it were asked to stop before its first checkpoint
        assert call() == 1
    assert not (out / report.JSON).exists()
    assert call("--minutes", "0") == 0 and "5 encoders are left" in capsys.readouterr().out
    assert call() == 0
    found = {row["encoder"]["objective"] + row["encoder"]["images"]: row for row in Study(out, out, {}).results(few)}
    assert {name: sorted(row["correct"]) for name, row in found.items() if name != "m3aeemoji"} == {
        "captionsemoji": ["linear"],
        "maeclothes": [*report.CLOTHES],
        **{name: sorted([*EVERYTHING, *report.CLOTHES, *more])
           for name, more in (("randomemoji", ["attentive"]), ("pixelsemoji", []))},
    }  # fmt: skip
    assert sorted(found["m3aeemoji"]["correct"]) == sorted(
        [*EVERYTHING, *report.CLOTHES, *report.RETRIEVAL, "attentive"]
    )
    for row in found.values():
        assert all(0 <= value <= 1 for value in row["numbers"].values())
        if "knn" in row["correct"]:
            held = {key.split("-")[1] for key in row["correct"]["knn"]}
            assert {shards.part_of(emoji) for emoji in held} == {0}
            assert {key.split("-")[0] for key in row["correct"]["shift_knn"]} == {"google"}
            assert {key.split("-")[0] for key in row["correct"]["same_style_knn"]} == {"twitter"}
            assert set(report.OOD) < set(row["numbers"])
    assert len(found["maeclothes"]["correct"]["clothes_knn"]) == 12
    assert found["captionsemoji"]["numbers"]["linear"] == 1  # each caption contains its category
    page = (out / report.PAGE).read_text()
    assert "test samples" in page and "| words of the caption | - | 100.0 " in page
    assert call("--validation", "--minutes", "0") == 0  # validation uses different encoders
    assert "5 encoders are left" in capsys.readouterr().out
    assert "validation samples" in (out / "validation" / report.PAGE).read_text()
    monkeypatch.setattr(Study, "perform", lambda self, encoder: pytest.fail(f"{encoder.name} is done again"))
    assert call() == 0
    for result in out.glob("*.result.json"):
        result.rename(result.with_suffix(".moved"))  # as on another machine
    assert call() == 0 and (out / report.PAGE).read_text() == page
    assert all(
        json.loads(path.read_text()) == json.loads(path.with_suffix(".moved").read_text())
        for path in out.glob("*.result.json")
    )
    with pytest.raises(UserError, match="has results of other settings; choose another folder"):
        call("--set", "train.train.steps=5")


EVERYTHING = ["knn", "linear", "subcategory", *report.SHIFT, "shots1", "shots2"]


def test_an_encoder_is_trained_on_the_data_of_its_description(tmp_path):
    study = Study(tmp_path, tmp_path, json.loads(SETTINGS.read_text()))
    few = study._config(replace(study.common, caption_fraction=0.3, text_ratio=0.5, seed=2))
    (source,) = few["data"]["train"]
    assert (source["caption_fraction"], source["modality"], few["masking"]) == (0.3, "auto", {"text_ratio": 0.5})
    parts = {path.rpartition("/")[2] for path in source["shards"]}
    assert parts == {f"emoji-{vendor}-{part}.tar" for vendor in shards.VENDORS for part in (0, 1, 3)}
    mae = study._config(Encoder("mae", 64, 9, 0, images="clothes"))
    assert (mae["model"]["vocab_size"], mae["model"]["emb_dim"], mae["train"]["steps"]) == (0, 64, 9)
    assert mae["data"]["train"][0]["modality"] == "image" and "masking" not in mae
    assert [path.rpartition("/")[2] for path in mae["data"]["train"][0]["shards"]] == [
        "fashion-probe.tar", "fashion-images.tar"
    ]  # fmt: skip


def test_settings_are_chosen_on_samples_that_are_not_test_samples(tmp_path):
    tested = [run.split_of(tmp_path, seed, False) for seed in range(shards.FOLDS)]
    chosen = run.split_of(tmp_path, 0, True)
    assert all({*split.test["google"]}.isdisjoint(split.train["google"]) for split in [*tested, chosen])
    assert {*chosen.test["google"], *chosen.clothes[1]}.isdisjoint(
        path for split in tested for path in [*split.test["google"], *split.clothes[1]]
    )


def test_the_pixel_baseline_uses_the_input_of_the_encoder(tmp_path):
    grey = Image.new("RGB", (16, 16), (51, 102, 255))
    grey.save(out := io.BytesIO(), "PNG")
    write_tar(tmp_path / "a.tar", [("x.jpg", out.getvalue()), ("x.txt", b"a")])
    found = measure.pixels(8, [0.2, 0.2, 0.5], [1.0, 0.5, 0.25])([tmp_path / "a.tar"], False, False)
    assert found.keys == ["x"] and found.features_RD.shape == (1, 192)
    assert found.features_RD.reshape(64, 3).numpy() == pytest.approx(np.tile([0, 0.4, 2], (64, 1)), abs=1e-6)


def test_encoders_of_a_plan_differ_from_the_common_one_in_one_property():
    """Each encoder differs from the common encoder in one property. The training objectives come first, with all
    seeds."""
    encoders = plan(192, 400)
    assert len({each.name for each in encoders}) == len(encoders)
    first = [each for each in encoders if central(each, 192, 400)]
    assert encoders[: len(first)] == first and len(first) == 15
    common = asdict(m3ae(192, 400))
    for encoder in encoders:
        if encoder.objective == "m3ae":
            assert len({key for key, value in asdict(encoder).items() if value != common[key]} - {"seed"}) <= 1
        if encoder.objective == "random":  # random weights have the sizes of an encoder that was trained before
            assert m3ae(192, 400, encoder.seed) in encoders[: encoders.index(encoder)]


@pytest.mark.parametrize(
    ("arm", "key", "values"),
    [
        ("ratios", "text_ratio", {0.15, 0.5, 0.75, 0.9}),
        ("fractions", "caption_fraction", {0.1, 0.3, 1}),
        ("lengths", "steps", {200, 400, 1200}),
        ("widths", "width", {96, 192}),
    ],
)
def test_each_arm_corresponds_to_a_figure_of_the_paper(arm, key, values):
    encoders = plan(192, 400, 2, [arm])
    assert {asdict(each)[key] for each in encoders if each.objective == "m3ae"} == values
    assert {each.seed for each in encoders} == {0, 1} and {m3ae(192, 400), Encoder("mae", 192, 400, 0)} < {*encoders}
    assert {*encoders} < {*plan(192, 400)} and arm in ARMS


def test_the_standard_error_of_a_difference_treats_emoji_and_seeds_as_separate_sources():
    labels = {f"{vendor}-{i}": {"emoji": str(i)} for vendor in "ab" for i in range(4)}
    first = {0: {"a-0": 1.0, "b-0": 1.0, "a-1": 1.0, "b-1": 0.0}, 1: {"a-2": 1.0, "b-2": 1.0, "a-3": 0.0, "b-3": 0.0}}
    second = {0: {key: 0.0 for key in first[0]}, 1: {key: 0.0 for key in first[1]}, 2: {}}
    found = difference(first, second, labels)
    by_emoji, by_seed = [1, 0.5, 1, 0], [0.75, 0.5]
    error = np.hypot(np.std(by_emoji, ddof=1) / 2, np.std(by_seed, ddof=1) / np.sqrt(2))
    assert found == pytest.approx((0.625, error, 2, 4)) == accuracy(first, labels)
    assert difference(first, {5: {"a-0": 1.0}}, labels) is None
    assert difference({0: first[0]}, second, labels).error == pytest.approx(
        0.25
    )  # with one seed, only the error over samples is known


def _results(encoders):
    """Return synthetic results: two of four samples are correct, and three for M3AE. The fraction of captions and the
    number of steps shift the metrics."""
    rows = []
    for each in encoders:
        if each.objective == "captions":
            continue
        right = 3 if each.objective == "m3ae" and each.caption_fraction == 1 else 2
        correct = {test: {f"{each.seed}-{i}": float(i < right) for i in range(4)} for test in ALL}
        losses = {"val_image_loss": 0.8} if each.trained else {}
        numbers = dict.fromkeys(report.OOD, 0.5 + each.seed / 10) | {"retrieval_chance": 0.1}
        rows.append({"encoder": asdict(each), "losses": losses, "train_cpu_s": 60, "measure_cpu_s": 0,
                     "numbers": numbers, "correct": correct})  # fmt: skip
    return rows


ALL = [*report.EMOJI, *report.SHIFT, *report.SHOTS, *report.CLOTHES, *report.RETRIEVAL]
HEAD = {"about": {"device": "CPU", "torch": "2", "m3ae_fast": "0", "date": "2026-01-01"}, "validation": False}


def test_results_are_written_as_tables_and_a_plot(tmp_path, monkeypatch):
    settings = json.loads(SETTINGS.read_text())
    width, steps = settings["train"]["model"]["emb_dim"], settings["train"]["train"]["steps"]
    labels = {f"{seed}-{i}": {"emoji": f"{seed}-{i}"} for seed in range(3) for i in range(4)}
    page = tmp_path / report.PAGE
    page.write_text(f"By hand.\n{table.START}\n{table.END}\n")
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    report.save(tmp_path, HEAD | {"settings": settings}, _results(plan(width, steps)), labels)
    text = page.read_text()
    assert text.startswith("By hand.")
    assert "| M3AE | 75.0 ± 13.1 (3) |" in text and "| M3AE minus MAE | +25.0 ± 13.1 (3) |" in text
    assert "| MAE minus random weights | +0.0 ± 0.0 (3) |" in text and "| MAE of Fashion-MNIST | 50.0 " in text
    assert "| M3AE | 75.0 ± 13.1 (3) | 75.0 ± 13.1 (3) | 10.0 |" in text
    assert "| MAE | 60.0 (50.0 to 70.0) |" in text and "| MAE | 0.800 | - | - | - |" in text
    assert "| 0 % (MAE) | 50.0 ± 15.1 (3) | 50.0 ± 15.1 (3) | 50.0 ± 15.1 (3) | +0.0 ± 0.0 (3) | - |\n| 10 % " in text
    apart = "+25.0 ± 13.1 (3) |"  # differences from raw pixels and from MAE
    assert f"| {3 * steps}, M3AE | 75.0 ± 13.1 (3) | 75.0 ± 13.1 (3) | 75.0 ± 13.1 (3) | {apart} {apart}" in text
    (figure,) = figures
    ratios, captions, lengths, widths = figure.axes[3:7]

    def drawn(axes):
        return {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in axes.containers}

    assert drawn(captions) == {"M3AE": [[0, 50], [10, 50], [30, 50], [100, 75]]}
    assert drawn(ratios) == {"M3AE": [[15, 75], [50, 75], [75, 75], [90, 75]]}
    for axes, values in ((lengths, [steps // 2, steps, 3 * steps]), (widths, [width // 2, width])):
        assert drawn(axes) == {"MAE": [[x, 50] for x in values], "M3AE": [[x, 75] for x in values]}
    assert json.loads((tmp_path / report.JSON).read_text())["encoders"][0]["numbers"]["retrieval_chance"] == 0.1
    assert "correct" not in (tmp_path / report.JSON).read_text()


def test_an_incomplete_study_has_tables(tmp_path):
    settings = json.loads(SETTINGS.read_text())
    report.save(tmp_path, HEAD | {"settings": settings}, [], {})
    text = (tmp_path / report.PAGE).read_text()
    assert "| M3AE | - | - |" in text and "| captions kept |" not in text


def test_predictions_of_a_stopped_fine_tuning_are_not_results(tmp_path, monkeypatch):
    columns = {"key": ["a/1", "a/2"], "label": [0, 1], "prediction": [0, 0]}

    def evaluate(task, model, *, out, **options):
        out.mkdir(exist_ok=True)
        write_parquet(out / "predictions.parquet", columns)
        for name in written:
            (out / name).write_text("{}")

    monkeypatch.setattr(measure, "evaluate", evaluate)
    written = ["result-so-far.json"]
    assert measure.finetune("model", tmp_path / "train.tar", [], tmp_path / "out", {}) is None
    written = ["result.json"]
    assert measure.finetune("model", tmp_path / "train.tar", [], tmp_path / "out", {}) == {"1": 1, "2": 0}
