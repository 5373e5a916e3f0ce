"""The first steps of a user, through the deepspeed launcher."""

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli import draw
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.weights.converting import convert
from tests.helpers.labelled import tiny_run

pytestmark = pytest.mark.slow


def test_a_run_is_trained_exported_and_loaded(trainer):
    """Two ranks train with ZeRO-2, the run folder is complete, and the export contains the trained model."""
    options = ["train.steps=40", "train.log_every=5", "train.eval_every=20", "train.pictures=3", "train.save_every=15"]
    options += ['deepspeed={"zero_optimization":{"stage":2}}', "optim.peak_lr=8e-2"]
    out = trainer.launch("run", *(word for o in options for word in ("--set", o)), ranks=2, launcher="deepspeed")
    assert "Traceback" not in out
    run = trainer.folder / "run"

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "val_image_loss" in line]
    assert [line["step"] for line in held_out] == [0, 20, 40]
    for name in ("val_image_loss", "val_text_loss"):
        values = [line[name] for line in held_out]
        assert values[2] < values[1] < values[0], name
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, *range(5, 41, 5)]
    wanted = "image_loss text_loss text_accuracy lr grad_norm samples_per_s tokens_per_s mfu data_wait peak_memory_gb"
    assert all(np.isfinite(line[name]) for line in steps for name in wanted.split())

    assert trainer.checkpoints("run") == ["step-00000030", "step-00000040"]
    assert list((run / "tensorboard").glob("events.*"))
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.width > 3 * 160 and np.asarray(picture).std() > 10

    assert convert(run, trainer.folder / "out").kind.endswith("step-00000040")
    model = M3AE.from_pretrained(trainer.folder / "out")
    assert len({path.stat().st_mode for path in (trainer.folder / "out").iterdir()}) == 1
    features = model.representation(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([[1, 2, 3]] * 2))
    assert features.shape == (2, 1 + 16 + 3, 32) and features.isfinite().all()


def test_runs_of_every_zero_stage_export_the_same_model(trainer):
    for stage in (0, 3):
        section = json.dumps({"zero_optimization": {"stage": stage}})
        trainer(f"stage-{stage}", "--set", f"deepspeed={section}")
        convert(trainer.folder / f"stage-{stage}", trainer.folder / f"out-{stage}")
    one, other = (M3AE.from_pretrained(trainer.folder / f"out-{stage}").state_dict() for stage in (0, 3))
    # the gradient of the keys' bias is rounding error, which Adam amplifies
    for name in one.keys() - {n for n in one if n.endswith("qkv.bias")}:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("out", [".", "/dev/full/a.png"])
def test_figures_that_cannot_be_written_are_reported(tmp_path, monkeypatch, capsys, out):
    run = str(tiny_run(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert exit_cleanly(lambda: draw.main(["reconstructions", run, "--out", out])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither checkpoints nor an exported model"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="not an exported M3AE"):
        M3AE.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="SOURCE is empty; specify weights"):
        convert("", tmp_path / "out")
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"its model\.safetensors cannot be read: .*Too many levels of symbolic links"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("mistake", ["train.stepps=1", "data.train.0.shards=/nowhere/x.tar"])
def test_a_user_error_on_two_ranks_is_printed_once(trainer, mistake):
    out = trainer("run", "--set", mistake, ranks=2, code=2)
    assert out.count("error: ") == 1 and "Traceback" not in out


def test_the_launcher_exits_with_the_code_of_a_user_error(trainer):
    out = trainer.launch("run", "--set", "train.stepps=1", launcher="deepspeed", code=2)
    assert out.count("error: ") == 1 and "Traceback" not in out


def test_profile_writes_a_trace(trainer):
    trainer("run", "--profile", "--set", "train.steps=9")
    with gzip.open(trainer.folder / "run/trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"packed_attention", "packed_attentionBackward"} <= names
