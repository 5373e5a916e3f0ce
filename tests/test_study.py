"""The paper's study, at toy size."""

import io
import json
import tarfile
from dataclasses import asdict

import pytest
from PIL import Image

from benchmarks import table
from lab.study import __main__ as study
from lab.study import report, shards
from lab.study.plan import Job, plan
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


def some(width, steps, seeds):
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
    return chosen + [job for job in plan(width, steps, seeds) if job.encoder.captions == "nameless"][:2]


def test_a_study_is_done_once_and_goes_on_where_it_was_stopped(call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "plan", some)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # asked to stop before its first checkpoint
        assert call() == 1
    assert not (out / report.JSON).exists()
    assert call("--minutes", "0") == 0 and "8 jobs are left" in capsys.readouterr().out
    assert call() == 0
    found = json.loads((out / report.JSON).read_text())
    assert [(row["objective"], row["captions"], row["task"]) for row in found["rows"]] == [
        ("m3ae", "whole", "knn"), ("m3ae", "whole", "linear"), ("m3ae", "whole", "finetune"), ("random", None, "knn"),
        ("m3ae", "nameless", "knn"),
    ]  # fmt: skip
    assert all(0 <= row["top1"] <= 1 for row in found["rows"])
    assert [("val_text_loss" in row, row["val_image_loss"] > 0) for row in found["encoders"]] == [
        (True, True), (False, True), (True, True),
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
    assert "| 64 | 600 | M3AE | 51.0 (1) | 51.0 (1) |" in text
    assert "| MAE | 0.800 | - | - |" in text
    assert (tmp_path / report.PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_study_cut_short_has_tables_too(tmp_path):
    report.save(tmp_path, results_of(usual_jobs()[:2]))
    text = (tmp_path / report.PAGE).read_text()
    assert "| random | - | - | - |" in text and "| M3AE | 51.0 (1) | - | - |" in text
