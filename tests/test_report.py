"""The report of a run shows the run's records in one file."""

import json
import re
from html import escape
from io import BytesIO

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import write_parquet
from m3ae_fast.checkpoint.folder import Info
from m3ae_fast.cli.report import main
from m3ae_fast.drawing.curves import LEARNING, RUNNING, Chart, Line, draw_charts, points_of
from m3ae_fast.drawing.reconstructions import GIVEN_AWAY
from m3ae_fast.evaluation.compare_results import against_largest_class
from m3ae_fast.evaluation.run_report import write_report

LINES = [
    {"step": 0, "val_image_loss": 2.0},
    {"step": 1, "loss": 3.0, "image_loss": 2.5, "lr": 0.0},
    {"step": 2, "loss": float("nan"), "image_loss": 1.5, "lr": 0.1},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "<run>"
    for step in (1, 2):
        saved = folder / f"checkpoints/step-{step:08}"
        saved.mkdir(parents=True)
        info = Info(step, 16 * step, 42, {"model": {"size": "<tiny>"}}, {"torch": f"2.{step}"})
        (saved / "state.json").write_text(json.dumps(vars(info)))
        (saved / "state.safetensors").touch()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)) + '\n{"step": 3, "lo')
    Image.new("RGB", (4, 4)).save(folder / "reconstructions.png")
    (folder / "probe").mkdir()
    (folder / "probe/result.json").write_text('{"task": "linear", "top1": 0.421234}')
    return folder


def test_a_report_is_one_file_with_charts_results_and_settings(run):
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    charts = re.findall(r'alt="([^"]+)" src="data:image/png', page)
    assert charts == ["Training loss", "Image loss", "Learning rate"]
    assert page.count("data:image/png") == 4  # including the reconstructions
    assert "&lt;run&gt;" in page and "<run>" not in page and "&lt;tiny&gt;" in page
    assert '<td>linear</td><td>probe</td><td>top1</td><td class="number">0.4212</td>' in page and "torch" in page
    # the number of samples and the version of torch are those of the last checkpoint
    assert '<td>samples seen</td><td class="number">32</td>' in page and "<td>2.2</td>" in page
    last = {"steps": "2", "loss": "nan", "val_image_loss": "2"}
    assert all(f'<td>{name}</td><td class="number">{value}</td>' in page for name, value in last.items())
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


def test_a_report_states_what_reconstructions_take_from_the_original(run):
    state = run / "checkpoints/step-00000002/state.json"
    for norm_pix in (False, True):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"config": {"loss": {"norm_pix": norm_pix}}}))
        write_report(run, run / "report.html")
        page = (run / "report.html").read_text()
        assert all((escape(line) in page) == norm_pix for line in GIVEN_AWAY)


def test_the_head_of_a_report_summarises_the_run_in_words(run):
    lines = [{"step": 0, "val_image_relative": 1.5, "val_rankme": 20.0}]
    lines += [{"step": 900, "val_image_relative": 0.5, "val_rankme": 1.25}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "status.json").write_text('{"state": "stopped", "step": 900, "total_steps": 2000, "reason": "SIGTERM"}')
    write_report(run, run / "report.html")
    head = (run / "report.html").read_text().partition("<table>")[0]
    assert "Stopped at step 900 of 2,000 (SIGTERM). The image loss on held-out samples is 0.50 times that of" in head
    assert (
        "<b>collapse</b>: the effective rank of the features (RankMe) is 1.2" in head
        and "To try: a lower optim.peak_lr" in head
    )


def test_results_show_standard_errors_and_the_fraction_of_the_largest_class(run):
    """The chance level is the fraction of the largest class, not the accuracy of random guesses: if the data are
    imbalanced, a model exceeds the accuracy of random guesses by always predicting one class."""
    result = {"task": "knn", "top1": 0.5, "top5": 1.0, "classes": 10, "val_samples": 98, "model": "random:<run>"}
    shares = {"chance": 0.4, "chance_top5": 0.8}
    (run / "probe/result.json").write_text(json.dumps(result))
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    heads = "".join(f"<th>{name}</th>" for name in ("task", "model", "metric", "value", "chance level"))
    assert f"<table><tr>{heads}</tr><tr><td>" in page
    row = "<tr><td>knn</td><td>random weights of &lt;run&gt;</td><td>{}</td>" + 2 * '<td class="number">{}</td>'
    assert row.format("top1", "0.5", "") in page
    for model in ("pixels", "random:<run>"):
        more = {"top1_se": 0.07, "top5_se": 0.0, "model": model} | shares  # as tasks write them
        (run / "probe/result.json").write_text(json.dumps(result | more))
        write_report(run, run / "report.html")
        page = (run / "report.html").read_text()
        own = row if model.startswith("random") else row.replace("random weights of &lt;run&gt;", "downscaled pixels")
        assert own.format("top1", "50.0% ± 7.0%", "40.0%") in page
        assert own.format("top5", "100.0% ± 1.0%", "80.0%") in page
    assert "_se" not in page and "<td>chance" not in page


def test_a_result_not_above_the_largest_class_is_marked_in_the_report(run):
    """The report also compares the result with random weights and with pixels, if their accuracies were measured."""
    labels = ["a"] * 70 + ["b"] * 30
    predicted = {"m": ["a"] * 100, "random:m": ["b"] * 100, "pixels": labels}
    for number, (model, predictions) in enumerate(predicted.items()):
        folder = run / f"results/{number}"
        folder.mkdir(parents=True)
        columns = {"key": [*map(str, range(100))], "label": labels, "prediction": predictions}
        write_parquet(folder / "predictions.parquet", columns)
        entries = against_largest_class(folder, {})
        assert entries["chance"] == 0.7
        result = {"task": "knn", "model": model, "top1": 0.5, "val_samples": 100} | entries
        (folder / "result.json").write_text(json.dumps(result))
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    (paragraph,) = re.findall("<p>(knn: [^/]*?)</p>", page)
    lines = paragraph.split("<br>")
    assert lines[0].startswith("knn: m is better than random weights: +40.0 points, 95 % interval")
    assert lines[1].startswith("knn: m is worse than downscaled pixels: -30.0 points")
    assert lines[2].startswith("knn: m does not differ significantly from the largest class on these samples: +0.0 poi")
    (run / "results/0/predictions.parquet").unlink()
    write_report(run, run / "report.html")
    assert "<p>knn: the model does not differ significantly from the largest" in (run / "report.html").read_text()


def test_long_sections_of_a_report_are_collapsed(run):
    write_report(run, run / "report.html")
    folded = re.findall(r"<details( open)?><summary>([^<]+)</summary>", (run / "report.html").read_text())
    shown = ["Curves", "Reconstructions"]
    assert [name for is_open, name in folded if is_open] == shown
    assert {"Config", "Versions", "Speed and optimiser"} <= {name for is_open, name in folded if not is_open}


def test_charts_show_several_runs_together(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "val_image_loss": 1.0}))
    (other / "result.json").write_text('{"task": "linear", "top1": 0.75}')
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **options: drawn.append(options["label"]) or plot(*args, **options))
    assert main([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert drawn[:4] == [str(run), str(other)] * 2  # loss, image loss
    page = (tmp_path / "both.html").read_text()
    assert "0.75" in page and f"{other}: Step 1" in page


def test_each_curve_shows_the_metric_named_in_title_and_label(monkeypatch):
    """For several runs, the held-out metric is plotted if there is one."""
    expected = {
        ("Training loss", "training"): "loss",
        ("Image loss", "training"): "image_loss",
        ("Image loss", "held-out"): "val_image_loss",
        ("Text loss", "training"): "text_loss",
        ("Text loss", "held-out"): "val_text_loss",
        ("Text accuracy", "training"): "text_accuracy",
        ("Text accuracy", "held-out"): "val_text_accuracy",
        ("k-NN accuracy of the features", "largest class"): "val_knn_largest_class",
        ("k-NN accuracy of the features", "held-out"): "val_knn_top1",
        ("Effective rank of the features", "held-out"): "val_rankme",
        ("Variance of the patch features that positions explain", "held-out"): "val_position_share",
        ("Held-out loss relative to a constant prediction", "image"): "val_image_relative",
        ("Held-out loss relative to a constant prediction", "text"): "val_text_relative",
        ("Throughput", ""): "samples_per_s",
        ("Utilisation of the peak FLOP/s", "reference FLOPs"): "mfu",
        ("Utilisation of the peak FLOP/s", "executed FLOPs"): "utilisation",
        ("Time spent waiting for data", ""): "data_wait",
        ("Learning rate", ""): "lr",
        ("Gradient norm before clipping", ""): "grad_norm",
        ("Peak memory", "peak"): "peak_memory_gb",
    }
    names, plotted = list(expected.values()), []
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # saving figures takes a long time
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, **options: plotted.append((options["label"], a[1:])) or plot(*a, **options)
    )

    def drawn(runs):
        for title, _ in draw_charts((*LEARNING, *RUNNING), runs):
            for label, (steps, values) in plotted:
                assert steps == (5,)
                yield title, label, names[values[0]]
            plotted.clear()

    metrics = [{"step": 5} | {name: value for value, name in enumerate(names)}]
    assert {(title, label): name for title, label, name in drawn({"run": metrics})} == expected
    for title, label, name in drawn({"one": metrics, "two": metrics}):
        held_out = [found for (own, _), found in expected.items() if own == title and found.startswith("val_")]
        assert label in ("one", "two") and (name in held_out or not held_out)


def test_results_may_be_stored_in_another_folder(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/result.json").write_text('{"task": "knn", "top1": 0.5}')
    write_report(run, tmp_path / "page.html", [tmp_path / "other"])
    assert "knn" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "edited",
    [
        {"baselines": None},
        {"baselines": []},
        {"baselines": {"random weights": 3}},
        {"baselines": {"random weights": {"difference": {"value": 0.1}, "top1": 0.5}}},
        {"baselines": {"random weights": {"difference": {"value": "0.1", "low": None, "high": 1}}}},
        {"per_class": [1]},
        {"per_class": [{"accuracy": 0.5}]},
        {"per_class": [{"class": 1, "samples": 2, "accuracy": None}]},
    ],
)
def test_an_edited_result_is_an_error_that_names_the_file(run, edited):
    (run / "probe/result.json").write_text(json.dumps({"task": "knn", "top1": 0.5} | edited))
    with pytest.raises(UserError, match=r"probe/result\.json: is damaged"):
        write_report(run, run / "report.html")
    assert not (run / "report.html").exists()


def test_a_result_without_classes_has_no_table_of_classes(run):
    (run / "probe/result.json").write_text('{"task": "knn", "top1": 0.5, "per_class": []}')
    write_report(run, run / "report.html")
    assert "of each class" not in (run / "report.html").read_text()


def test_user_errors_are_reported(run, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(UserError, match="no such folder"):
        write_report(run, tmp_path / "page.html", [tmp_path / "nothing"])
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run, run / "probe/result.json/page.html")  # the path is below a file
    (run / "probe/result.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        write_report(run, tmp_path / "page.html")
    (run / "metrics.jsonl").write_text("nothing")
    with pytest.raises(UserError, match="contains no steps"):
        write_report(run, tmp_path / "page.html")
    assert not list(tmp_path.glob("*.html"))


def test_plotted_points_are_the_logged_values():
    """For several runs, only the last metric of a chart is plotted."""
    odd = [float("nan"), float("inf"), float("-inf"), None, "1.0"]
    metrics = [{"step": step, "a": value, "b": step} for step, value in enumerate([1, *odd, 2.5])] + [{"step": 9}]
    chart = Chart("", "", [Line("a", "first", "#111111"), Line("b", "second", "#222222"), Line("c", "none", "#333333")])
    assert [*points_of(chart, {"run": metrics})] == [
        ("first", "#111111", [(0, 1), (6, 2.5)]), ("second", "#222222", [(step, step) for step in range(7)]),
    ]  # fmt: skip
    two = chart._replace(lines=chart.lines[:2])
    points = [(step, step) for step in range(7)]
    assert [*points_of(two, {"one": metrics, "two": metrics})] == [("one", None, points), ("two", None, points)]
    assert [*points_of(two, {"one": metrics, "two": []})] == [("one", None, points)]


def test_a_training_loss_of_a_single_step_is_visible():
    """The loss is plotted as a point, because a single step does not form a line."""
    metrics = {"run": [{"step": 1, "loss": 1.0}]}
    ((_, png),) = draw_charts([Chart("Loss", "", [Line("loss", "training", "#ff0000")])], metrics)
    red, green, _ = np.asarray(Image.open(BytesIO(png)).convert("RGB"), dtype=int).transpose(2, 0, 1)
    assert (red - green > 200).any()
