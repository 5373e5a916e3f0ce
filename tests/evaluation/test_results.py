"""A task's result is kept even if its figures fail, and figures show any name unchanged."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.evaluate import main
from m3ae_fast.drawing.figures import draw_confusion
from m3ae_fast.evaluation import class_metrics, job, knn, labelled_task, ood
from tests.evaluation.conftest import settings
from tests.helpers.labelled import labelled_members
from tests.helpers.shards import write_tar

pytestmark = pytest.mark.slow

ODD = ["$\\frac{$", "_hidden", "a\\b{c}"]
QUICK = {
    "knn": (),
    "ood": (),
    "logistic": (),
    "linear": settings("train.steps=2", "train.global_batch=16", "optim.warmup_epochs=0"),
    "finetune": settings("train.steps=1", "train.global_batch=16", "train.micro_batch=16"),
}


@pytest.fixture
def texts(monkeypatch):
    """Return the list of the texts in all saved figures."""
    found = []
    save = Figure.savefig

    def savefig(figure, *args, **options):
        save(figure, *args, **options)
        found.extend(text.get_text() for text in figure.findobj(Text) if text.get_visible())

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def test_class_names_with_special_characters_are_drawn_literally(tmp_path, texts):
    labels_N = torch.arange(6) % 3
    draw_confusion(tmp_path / "confusion.png", labels_N, labels_N, ODD)
    assert set(ODD) <= set(texts)


def test_held_out_shards_that_are_also_used_for_training_are_reported(transfer, shards, monkeypatch, capsys):
    """The shards are recognised however their paths are written."""
    train = Path(shards[0])
    transfer("knn", "--labels", "json.name")
    assert "--val: " not in capsys.readouterr().out
    monkeypatch.chdir(train.parent)
    transfer("knn", "--labels", "json.name", train=str(train), val=f"./{train.name}", out="again")
    output = capsys.readouterr().out
    note = f"note: --val: 1 of its shards is also in --train (for example, ./{train.name}), so accuracies are not"
    assert note in output


def test_classes_with_unusual_names_do_not_prevent_a_result_and_its_figures(transfer, tmp_path):
    names = dict(enumerate(ODD))
    shards = []
    for split, numbers in (("train", range(24)), ("val", range(30, 42))):
        files = dict(labelled_members(numbers))
        for number in numbers:
            files[f"{number:05d}.json"] = json.dumps({"name": names[number % 3]}).encode()
        shards.append(write_tar(tmp_path / f"{split}.tar", files.items()))
    assert transfer("knn", "--labels", "json.name", train=shards[0], val=shards[1])["classes"] == 3
    assert (tmp_path / "out/confusion.png").exists()


@pytest.mark.parametrize("task", QUICK)
def test_a_failed_figure_does_not_prevent_the_result(transfer, shards, tmp_path, monkeypatch, task):
    def fails(*_, **__):
        raise ValueError("no such glyph")

    for name in ("draw_confusion", "draw_training", "draw_detection", "draw_sheet"):
        for module in (class_metrics, knn, ood, labelled_task):
            monkeypatch.setattr(module, name, fails, raising=False)
    more = ["--ood", shards[1]] if task == "ood" else []
    with pytest.raises(ValueError, match="no such glyph"):
        transfer(task, *more, *QUICK[task])
    assert json.loads((tmp_path / "out" / job.RESULT_FILE).read_text())["task"] == task


def test_an_unwritable_figure_is_reported_after_the_result(run, shards, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise UserError("confusion.png: cannot be written (No space left on device)")

    monkeypatch.setattr(class_metrics, "draw_confusion", fails)
    out = tmp_path / "out"
    options = ["--train", shards[0], "--val", shards[1], "--out", str(out), "--no-baselines"]
    message = f"(No space left on device); {out}/result.json is complete; only figures are missing"
    with pytest.raises(UserError, match=re.escape(message)):
        main(["knn", str(run), *options])
    assert "knn: top1 1" in capsys.readouterr().out
    assert json.loads((out / job.RESULT_FILE).read_text())["top1"] == 1
