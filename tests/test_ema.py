"""The exponential moving average of the weights follows its formula in every ZeRO stage."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.cli.convert import main as convert
from m3ae_fast.cli.draw import main as draw
from m3ae_fast.drawing import run_figures
from m3ae_fast.engine.optimizer import EMA, track_ema
from m3ae_fast.training import pretraining_task
from m3ae_fast.weights.open_model import open_model
from tests.helpers.checkpoints import save
from tests.helpers.pretraining_task import task_without_engine
from tests.helpers.trainer import zero

OPTIONS = ["--set", "train.ema=0.7", "--set", "train.save_every=2", "--set", "train.keep=9"]


def test_the_average_of_the_weights_follows_the_formula():
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    track_ema(optimizer, 0.9)
    expected = None
    for step in range(4):
        # in step 2, the gradient is 0, but the momentum still changes the weights
        p.grad = torch.randn(5) * (step != 2)
        optimizer.step()
        expected = p.detach().clone() if expected is None else 0.9 * expected + 0.1 * p.detach()
    torch.testing.assert_close(optimizer.state[p][EMA], expected)


@pytest.mark.parametrize("pictures", [0, 3])
def test_figures_during_training_show_the_weights_and_not_their_average(tmp_path, monkeypatch, pictures):
    weights, logged = [], []
    path = save(tmp_path, {"model/a": torch.ones(1), "ema/a": torch.zeros(1)}, checkpoint.Info(7, 0, 42, {}, {}))
    monkeypatch.setattr(pretraining_task, "draw_training", lambda _, own, *__: weights.append(own) or {"name": path})
    config = SimpleNamespace(train=SimpleNamespace(pictures=pictures))
    data = SimpleNamespace(shown=None, tokenizer=None)
    task = task_without_engine(config, data)
    task.after_save(SimpleNamespace(figure=lambda *given: logged.append(given)), 7, path)
    assert weights == ([{"a": torch.ones(1)}] if pictures else [])
    assert logged == ([(7, "name", path)] if pictures else [])


def _average(trainer, run: str, step: int) -> dict[str, torch.Tensor]:
    state = checkpoint.open_state(trainer.folder / run / f"checkpoints/step-{step:08d}")
    return {
        name: state.whole(name)
        for name in ("ema/encoder.norm.weight", "ema/text_head.weight", "model/text_head.weight")
    }


@pytest.mark.slow
def test_zero_partitions_the_averaged_weights_and_a_checkpoint_contains_all_of_them(trainer):
    trainer("plain", *zero(None), *OPTIONS)
    plain = _average(trainer, "plain", 6)
    for stage in (1, 3):
        trainer(f"zero-{stage}", *zero(stage), *OPTIONS, ranks=2)
        apart = _average(trainer, f"zero-{stage}", 6)
        for name, expected in plain.items():
            np.testing.assert_allclose(apart[name], expected, rtol=2e-3, atol=1e-4)
        assert not torch.allclose(apart["ema/text_head.weight"], apart["model/text_head.weight"], atol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_averaged_weights(trainer):
    trainer("run", *zero(1), *OPTIONS)
    whole = _average(trainer, "run", 6)
    shutil.rmtree(trainer.folder / "run/checkpoints/step-00000006")
    trainer("run", *zero(1), *OPTIONS, "--resume", "auto")
    assert all(torch.equal(whole[name], now) for name, now in _average(trainer, "run", 6).items())


@pytest.mark.slow
def test_exports_and_evaluations_use_the_averaged_weights(trainer, capsys, monkeypatch):
    """The figures of the run are an exception: they show the weights whose losses are logged."""
    trainer("run", *zero(None), *OPTIONS)
    run, average = trainer.folder / "run", _average(trainer, "run", 6)
    assert convert([str(run), "--out", str(trainer.folder / "out")]) == 0
    assert "the average of its weights (train.ema 0.7)" in capsys.readouterr().out
    assert "moving average with decay 0.7" in (trainer.folder / "out/README.md").read_text()
    assert convert([str(run), "--out", str(trainer.folder / "last"), "--weights", "last"]) == 0
    for model, kind in ((str(run), "ema"), (trainer.folder / "out", "ema"), (trainer.folder / "last", "model")):
        weights = open_model(str(model), text=False).state_dict()
        assert torch.equal(weights["text_head.weight"], average[f"{kind}/text_head.weight"])
    drawn = []
    monkeypatch.setattr(run_figures, "draw_run", lambda config, weights, *_, **__: drawn.append(weights) or True)
    assert draw(["reconstructions", str(run)]) == 0
    assert torch.equal(drawn[0]["text_head.weight"], average["model/text_head.weight"])


@pytest.mark.slow
def test_an_export_of_zero_on_one_rank_has_the_average_of_the_master_weights(trainer):
    """On one rank, plain torch takes the steps of ZeRO. It averages the float32 weights, not their bf16 copies."""
    out = trainer("run", *zero(1), *OPTIONS, "--set", "train.save_every=1", "--set", "train.precision=bf16")
    assert "plain torch, because ZeRO stage 1 partitions nothing on one rank" in out
    paths = checkpoint.saved_steps(trainer.folder / "run")
    average, *others = (checkpoint.read_weights(path, average=False) for path in paths)
    assert len(others) == 5
    for weights in others:
        average = {name: 0.7 * average[name] + 0.3 * weight for name, weight in weights.items()}
    assert convert([str(trainer.folder / "run"), "--out", str(trainer.folder / "out")]) == 0
    found = dict(open_model(str(trainer.folder / "out"), text=False).named_parameters())
    assert found.keys() >= {"encoder.norm.weight", "text_head.weight"}
    for name, weight in found.items():
        torch.testing.assert_close(weight.detach(), average[name], rtol=1e-6, atol=1e-8)
    weight = found["text_head.weight"].detach()
    assert not torch.equal(weight, weight.bfloat16().float())
    assert not torch.allclose(weight, others[-1]["text_head.weight"], atol=1e-4)


@pytest.mark.slow
def test_averaging_of_weights_can_be_enabled_when_a_run_is_resumed(trainer):
    trainer("run", *zero(2), *OPTIONS[2:], "--set", "train.steps=4")
    config = json.loads((trainer.folder / "run/checkpoints/step-00000004/state.json").read_text())["config"]
    assert config["train"]["ema"] is None
    trainer("run", *zero(2), *OPTIONS, "--resume", "auto")
    state = checkpoint.open_state(trainer.folder / "run/checkpoints/step-00000006")
    before = checkpoint.open_state(trainer.folder / "run/checkpoints/step-00000004")
    one, two = (state.whole(f"{kind}/text_head.bias") for kind in ("ema", "model"))
    assert one.abs().sum() > 0 and not torch.equal(one, two)
    assert not torch.equal(one, before.whole("model/text_head.bias"))
