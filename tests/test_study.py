"""The paper's study, at toy size."""

import io
import json
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from benchmarks import table
from lab.study import __main__ as study
from lab.study import report, shards
from lab.study.plan import ARMS, Encoder, Job, m3ae, plan
from lab.study.run import SETTINGS, Study
from m3ae_fast import train
from tests.helpers.labelled import labelled_tar
from tests.helpers.shards import write_tar

TINY = {
    "train.model": {
        "size": None, "emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "dec_depth": 1, "dec_num_heads": 2,
        "image_size": 16, "patch_size": 8, "text_length": 8, "vocab_size": 2048,
    },
    "train.train": {"global_batch": 8, "steps": 3, "eval_samples": 8, "pictures": 0},
    "transfer.linear.epochs": 1,
    "transfer.finetune": {"epochs": 1, "global_batch": 16, "rand_augment": None},
}  # fmt: skip


@pytest.fixture
def call(tmp_path):
    """call(*options) -> the exit code of a study at toy size."""
    (tmp_path / "data").mkdir()
    labelled_tar(tmp_path / "data/train-0.tar", range(32))
    labelled_tar(tmp_path / "data/val-0.tar", range(100, 118))

    def perform(*options):
        sets = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
        where = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--seeds", "1"]
        return study.main([*where, *(word for each in sets for word in ("--set", each)), *options])

    return perform


def some(width, steps, seeds, arms=()):
    """Of a plan: a job of each kind."""
    kinds = [
        ("m3ae", None),
        ("m3ae", "knn"),
        ("m3ae", "linear"),
        ("m3ae", "finetune"),
        ("mae", None),
        ("random", "knn"),
    ]
    jobs = [
        job for job in plan(width, steps, seeds) if (job.encoder.width, job.encoder.captions) != (width, "nameless")
    ]
    chosen = [next(job for job in jobs if (job.encoder.objective, job.task) == kind) for kind in kinds]
    nameless = [job for job in plan(width, steps, seeds) if job.encoder.captions == "nameless"]
    fewer = [job for job in plan(width, steps, seeds) if job.encoder.caption_fraction < 1]
    return chosen + nameless[:2] + fewer[:2]


def test_a_study_is_done_once_and_goes_on_where_it_was_stopped(call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "plan", some)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # asked to stop before its first checkpoint
        assert call() == 1
    assert not (out / report.JSON).exists()
    assert call("--minutes", "0") == 0 and "10 jobs are left" in capsys.readouterr().out
    assert call() == 0
    found = json.loads((out / report.JSON).read_text())
    assert [(row["objective"], row["captions"], row["task"]) for row in found["rows"]] == [
        ("m3ae", "whole", "knn"), ("m3ae", "whole", "linear"), ("m3ae", "whole", "finetune"), ("random", None, "knn"),
        ("m3ae", "nameless", "knn"), ("m3ae", "whole", "knn"),
    ]  # fmt: skip
    assert [row["caption_fraction"] for row in found["rows"]] == [1.0] * 5 + [0.1]
    (fewer,) = (path for path in out.glob("*captions10*.json") if path.is_file())
    assert json.loads(fewer.read_text())["data"]["train"][0]["caption_fraction"] == 0.1
    assert all(0 <= row["top1"] <= 1 for row in found["rows"])
    assert [("val_text_loss" in row, row["val_image_loss"] > 0) for row in found["encoders"]] == [
        (True, True), (False, True), (True, True), (True, True),
    ]  # fmt: skip
    assert (found["data"]["classes"], found["data"]["majority class"]) == (3, pytest.approx(1 / 3))
    monkeypatch.setattr(Study, "perform", lambda self, job: pytest.fail(f"{job.name} is done again"))
    assert call() == 0


def test_a_study_needs_its_shards(tmp_path, capsys):
    with pytest.raises(study.UserError, match=r"has no train-\*\.tar"):
        study.main([str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_plan_compares_like_with_like():
    """Encoders differ from the common one in one thing; each test follows its pre-training."""
    jobs = plan(192, 360, 3)
    assert len(set(jobs)) == len(jobs)
    for i, job in enumerate(jobs):
        if job.task and job.encoder.objective != "random":
            assert Job(job.encoder, None) in jobs[:i]
    for task in ("knn", "linear", "finetune"):
        seen = {(job.encoder.objective, job.encoder.seed) for job in jobs if job.task == task}
        assert seen == {(objective, seed) for objective in ("random", "mae", "m3ae") for seed in range(3)}
    common = asdict(jobs[0].encoder)
    for encoder in {job.encoder for job in jobs if job.encoder.objective == "m3ae"}:
        changed = {key for key, value in asdict(encoder).items() if value != common[key]} - {"seed"}
        assert len(changed) <= 1


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_what_is_compared_and_what_with(arm):
    """By every seed, and in the whole plan too."""
    jobs = plan(192, 360, 2, [arm])
    common = {Job(Encoder(kind, 192, 360, seed, *text), task) for seed in range(2) for task in (None, "knn", "linear")
              for kind, text in (("m3ae", (0.75, "whole")), ("mae", ()))}  # fmt: skip
    assert common < set(jobs) < set(plan(192, 360, 2))
    differing = {key for job in {*jobs} - common for key, value in asdict(job.encoder).items()
                 if value != asdict(m3ae(192, 360))[key]} - {"seed"}  # fmt: skip
    changed = {"nameless": "captions", "ratios": "text_ratio", "fractions": "caption_fraction", "widths": "width",
               "lengths": "steps"}  # fmt: skip
    if arm != "objectives":
        assert differing - {"objective", "text_ratio", "captions"} <= {changed[arm]} <= differing
    assert {job.encoder.seed for job in {*jobs} - common} == {0, 1}


def test_the_arms_are_of_the_papers_figures():
    encoders = [job.encoder for job in plan(192, 360, 1)]
    assert {e.text_ratio for e in encoders} == {None, 0.15, 0.5, 0.75, 0.9}
    assert {e.caption_fraction for e in encoders} == {0.1, 0.3, 1.0}
    assert {e.width for e in encoders} == {96, 192} and {e.steps for e in encoders} == {0, 180, 360, 1080}
    assert len({e.name for e in encoders}) == len({*encoders})


@pytest.mark.parametrize(
    ("caption", "bare"),
    [
        ("zoom disabled. computer, action", "zoom disabled. action"),
        ("France. europe, flag, sign, Flags", "France. europe"),
        ("AIGA_Symbol_Signs. mapsym, aiga symbols", "AIGA . mapsym, aiga"),
        ("signage, peoples, designs", "signage, peoples, designs"),
        ("Office, PEOPLE_person", ""),
    ],
)
def test_captions_lose_what_classes_are_called_by(caption, bare):
    assert shards.without_classes(caption) == bare
    assert shards.names_class(caption) == (bare != caption) and not shards.names_class(bare)


def test_copies_of_shards_have_small_images_and_captions_without_classes(tmp_path):
    picture = io.BytesIO()
    Image.new("L", (40, 40), 200).save(picture, "JPEG")
    jpeg = picture.getvalue()
    members = [("0.jpg", jpeg), ("0.txt", b"a plant, green"), ("0.json", b"{}"), ("1.jpg", jpeg), ("1.txt", b"tools")]
    shard = tmp_path / "train-0.tar"
    write_tar(shard, members)
    for _ in range(2):
        shards.copy_shards([shard], tmp_path / "whole", 24)
        shards.copy_shards([shard], tmp_path / "bare", 24, nameless=True)
    assert list(shards.captions_of([tmp_path / "whole/train-0.tar"])) == ["a plant, green", "tools"]
    with tarfile.open(tmp_path / "bare/train-0.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(found) == ["0.jpg", "0.txt", "0.json", "1.jpg"]
    assert (found["0.txt"], found["0.json"]) == (b"a, green", b"{}")
    image = Image.open(io.BytesIO(found["1.jpg"]))
    assert (image.size, image.mode, image.getpixel((9, 9))) == ((24, 24), "RGB", (200, 200, 200))


def results_of(jobs):
    """Made-up results: an accuracy of 0.5, and 0.01 more for each seed and for M3AE."""
    rows = [
        asdict(job.encoder)
        | {"task": job.task, "top1": 0.5 + 0.01 * (job.encoder.seed + (job.encoder.objective == "m3ae")), "top5": 0.9}
        for job in jobs
        if job.task
    ]
    losses = {"val_image_loss": 0.8}
    return {
        "title": "Study",
        "about": {"device": "CPU", "threads": 1, "torch": "2", "m3ae_fast": "0", "date": "2026-01-01"},
        "data": {
            "labelled training samples": 1000, "labelled test samples": 100, "classes": 4,
            "chance": 0.25, "majority class": 0.33,
        },
        "settings": json.loads(SETTINGS.read_text()),
        "encoders": [asdict(job.encoder) | losses for job in jobs if job.task is None],
        "rows": rows,
    }  # fmt: skip


def usual_jobs():
    settings = json.loads(SETTINGS.read_text())["train"]
    return plan(settings["model"]["emb_dim"], settings["train"]["steps"], 3)


def test_results_become_tables_and_a_plot(tmp_path):
    page = tmp_path / report.PAGE
    page.write_text(f"By hand.\n{table.START}\n{table.END}\n")
    report.save(tmp_path, results_of(usual_jobs()))
    text = page.read_text()
    assert text.startswith("By hand.")
    assert "| M3AE | 52.0 ± 1.0 (3) | 52.0 ± 1.0 (3) | 52.0 ± 1.0 (3) |" in text
    assert "| M3AE less MAE | +1.0 ± 0.0 (3) |" in text
    assert "| 90 % | 52.0 ± 1.0 (3) |" in text
    assert "| 64 | 600 | M3AE | 52.0 ± 1.0 (3) | 52.0 ± 1.0 (3) |" in text
    assert "| 0 % | 51.0 ± 1.0 (3) | 51.0 ± 1.0 (3) |\n| 10 % | 52.0 ± 1.0 (3) |" in text
    assert "| MAE | 0.800 | - | - |" in text
    assert (tmp_path / report.PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_means_over_seeds_as_the_papers_figures_do(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    study = results_of(usual_jobs())
    for row in study["rows"]:  # each setting has its part
        row["top1"] += row["steps"] / 2e4 + row["width"] / 2e3 + row["caption_fraction"] / 20
        row["top1"] += (row["text_ratio"] or 0) / 20
    report.save(tmp_path, study)
    (figure,) = figures
    _, captions, lengths, widths, ratios = figure.axes

    def drawn(axes):
        return {bar.get_label(): bar.lines[0].get_xydata().T for bar in axes.containers}

    def expected(key, values, **wanted):
        rows = [row for row in study["rows"] if row["task"] == "linear" and all(row[k] == v for k, v in wanted.items())]
        return [100 * np.mean([row["top1"] for row in rows if row[key] == value]) for value in values]

    usual = {"objective": "m3ae", "captions": "whole", "width": 128, "steps": 600, "text_ratio": 0.75}
    x, y = drawn(captions)["linear probe"]
    kept = expected("caption_fraction", [0.1, 0.3, 1.0], **usual)
    mae = expected("steps", [600], objective="mae", width=128)
    assert x.tolist() == [0, 10, 30, 100] and y == pytest.approx([*mae, *kept])
    x, y = drawn(ratios)["M3AE, linear probe"]
    usual |= {"caption_fraction": 1.0}
    others = {key: value for key, value in usual.items() if key != "text_ratio"}
    assert x == pytest.approx([15.5, 50.5, 75.5, 90.5])
    assert y == pytest.approx(expected("text_ratio", [0.15, 0.5, 0.75, 0.9], **others))
    for axes, key, values in ((lengths, "steps", [300, 600, 1800]), (widths, "width", [64, 128])):
        for name, fixed in (("M3AE", usual), ("MAE", {"objective": "mae", "width": 128, "steps": 600})):
            fixed = {k: v for k, v in fixed.items() if k != key}
            x, y = drawn(axes)[name]
            assert x == pytest.approx(values, abs=20) and y == pytest.approx(expected(key, values, **fixed))


def test_a_study_of_an_earlier_version_has_the_same_tables():
    study = results_of([job for job in usual_jobs() if job.encoder.caption_fraction == 1])
    whole = report.tables(study)
    for row in [*study["rows"], *study["encoders"]]:
        del row["caption_fraction"]
    assert report.tables(study) == whole


def test_a_study_cut_short_has_tables_too(tmp_path):
    report.save(tmp_path, results_of(usual_jobs()[:2]))
    text = (tmp_path / report.PAGE).read_text()
    assert "| random | - | - | - |" in text and "| M3AE | 51.0 (1) | - | - |" in text
