"""The page of a run says what the run said, in one file."""

import json
import re

import pytest
from PIL import Image

from m3ae_fast.errors import UserError
from m3ae_fast.report import main, write_report
from m3ae_fast.run.checkpoint import Info

LINES = [
    {"step": 0, "val_image_loss": 2.0},
    {"step": 1, "loss": 3.0, "image_loss": 2.5, "lr": 0.0},
    {"step": 2, "loss": float("nan"), "image_loss": 1.5, "lr": 0.1},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "<run>"
    saved = folder / "checkpoints/step-00000002"
    saved.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)) + '\n{"step": 3, "lo')
    info = Info(2, 32, 42, {"model": {"size": "<tiny>"}}, {"torch": "2.x"})
    (saved / "state.json").write_text(json.dumps(vars(info)))
    (saved / "state.safetensors").touch()
    Image.new("RGB", (4, 4)).save(folder / "reconstructions.png")
    (folder / "probe").mkdir()
    (folder / "probe/result.json").write_text('{"task": "linear", "top1": 0.421234}')
    return folder


def test_one_file_with_everything(run):
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    charts = re.findall(r'alt="([^"]+)" src="data:image/png', page)
    assert charts == ["Loss", "Image loss", "Learning rate"]
    assert page.count("data:image/png") == 4  # and the reconstructions
    assert "&lt;run&gt;" in page and "<run>" not in page and "&lt;tiny&gt;" in page
    assert "top1 0.4212" in page and "torch" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


def test_results_may_lie_elsewhere(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/result.json").write_text('{"task": "knn", "top1": 0.5}')
    write_report(run, tmp_path / "page.html", [tmp_path / "other"])
    assert "knn" in (tmp_path / "page.html").read_text()


def test_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(UserError, match="no such folder"):
        write_report(run, tmp_path / "page.html", [tmp_path / "nothing"])
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run, run / "probe/result.json/page.html")  # below a file
    (run / "probe/result.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        write_report(run, tmp_path / "page.html")
    (run / "metrics.jsonl").write_text("nothing")
    with pytest.raises(UserError, match="holds no step"):
        write_report(run, tmp_path / "page.html")
    assert not list(tmp_path.glob("*.html"))
