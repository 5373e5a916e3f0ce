"""On one rank, plain torch takes the steps of ZeRO stages 0 to 2, and loads and saves the checkpoints of DeepSpeed."""

import shutil
import threading
from itertools import product

import numpy as np
import pytest
import torch

from m3ae_fast import checkpoint
from m3ae_fast.checkpoint import resuming
from m3ae_fast.engine.deepspeed_engine import DeepSpeedEngine
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.torch_engine import TorchEngine
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers.trainer import ROOT, zero
from tests.helpers.zero_cases import config_of, deepspeed_engine_of, engine_of, take

pytestmark = pytest.mark.slow
HALF, STEPS = 5, 20


def _config(stage: int, precision: str, accumulation: int = 2, clip: float | None = None, optim: str = "adamw"):
    config = config_of(1, stage, accumulation, precision, {}, clip_grad=clip, optim={"name": optim})
    return config.model_copy(update={"train": config.train.model_copy(update={"ema": 0.9})})


def _kinds(engine: ModelEngine) -> set[str]:
    return {"model", *(kind for kinds in engine.kinds.values() for kind in kinds)}


def _assert_same_state(engine: ModelEngine, other: ModelEngine) -> None:
    for kind in _kinds(engine):
        state, expected = engine.whole(kind), other.whole(kind)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), kind
    for p, q in zip(engine.model.parameters(), other.model.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_steps_equal_those_of_deepspeed_bitwise_without_clipping(precision, optim):
    """Weights, moments and averages are equal after 20 steps. DeepSpeed rounds the gradients of all bf16 weights to
    bf16. In plain torch, a hook must round the gradients that the backward pass computes in float32."""
    with join_ranks() as ranks:
        for stage, accumulation in product((0, 1, 2), (1, 2)):
            config = _config(stage, precision, accumulation, optim=optim)
            engine, expected = engine_of(ranks, config), deepspeed_engine_of(ranks, config)
            assert isinstance(engine, TorchEngine) and isinstance(expected, DeepSpeedEngine)
            if precision == "bf16" and stage > 0:
                for p in engine.model.parameters():
                    p.register_hook(lambda grad: grad.bfloat16().float())
            curve, wanted = (np.array(take(ranks, each, config, range(STEPS))) for each in (engine, expected))
            assert np.ptp(curve[:, 0]) > 0.3 and np.array_equal(curve[:, 0], wanted[:, 0])
            np.testing.assert_allclose(curve[:, 1], wanted[:, 1], rtol=1e-6)  # the norm is a sum in another order
            _assert_same_state(engine, expected)


@pytest.mark.parametrize(("precision", "rounding"), [("bf16", 1e-2), ("fp32", 1e-5)])
def test_clipped_steps_equal_those_of_deepspeed_within_rounding_errors(precision, rounding):
    with join_ranks() as ranks:
        for stage, optim in product((0, 1, 2), ("adamw", "muon")):
            config, unclipped = (_config(stage, precision, clip=clip, optim=optim) for clip in (0.1, None))
            curve, free = (take(ranks, engine_of(ranks, each), each, range(HALF)) for each in (config, unclipped))
            wanted = take(ranks, deepspeed_engine_of(ranks, config), config, range(HALF))
            np.testing.assert_allclose(curve, wanted, rtol=rounding)
            assert curve != free


def _saved(ranks: Ranks, engine: ModelEngine, folder) -> None:
    info = checkpoint.Info(HALF, 0, 42, {"train": {"ema": 0.9}}, {})
    checkpoint.save(folder, engine.fragments(), info, 1, ranks=ranks.agreement(threading.Event()))


def _resumed(ranks: Ranks, engine: ModelEngine, folder) -> ModelEngine:
    (path,) = checkpoint.saved_steps(folder)
    info = checkpoint.read_info(path)
    engine.load_state(HALF, resuming.open_checkpoint(path, info, engine.model, ranks, engine.kinds))
    return engine


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_checkpoints_are_exchanged_with_deepspeed_without_loss(tmp_path, optim):
    """Each engine continues bitwise from its own checkpoint, and loads that of the other engine."""
    with join_ranks() as ranks:
        config, makers = _config(2, "bf16", optim=optim), (engine_of, deepspeed_engine_of)
        for saver, loader in product(makers, makers):
            engine, folder = saver(ranks, config), tmp_path / f"{saver.__name__}-{loader.__name__}"
            take(ranks, engine, config, range(HALF))
            _saved(ranks, engine, folder)
            other = _resumed(ranks, loader(ranks, config, seed=1), folder)
            _assert_same_state(other, engine)
            if saver is loader:
                steps = range(HALF, HALF + 3)
                assert take(ranks, other, config, steps) == take(ranks, engine, config, steps)


def test_offloading_and_stage_3_need_deepspeed():
    offload = {"offload_optimizer": {"device": "cpu"}}
    with join_ranks() as ranks:
        for stage, settings in ((1, offload), (2, offload), (3, {})):
            assert isinstance(engine_of(ranks, config_of(1, stage, 1, "fp32", settings)), DeepSpeedEngine)


@pytest.fixture
def without_deepspeed(tmp_path, monkeypatch):
    """Make DeepSpeed unavailable to all processes that the test starts."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("without_deepspeed")
def test_the_quickstart_runs_without_deepspeed_on_one_rank(trainer):
    small = ("data.workers=0", "train.steps=2", "model.depth=1", "model.dec_depth=1")
    options = [word for setting in small for word in ("--set", setting)]
    out = trainer.launch("run", "--config", str(ROOT / "configs/quickstart.json"), *options)
    assert "plain torch, because ZeRO stage 1 partitions nothing on one rank" in out
    assert trainer.checkpoints("run") == ["step-00000002"]


@pytest.mark.usefixtures("without_deepspeed")
def test_several_ranks_without_deepspeed_report_the_missing_library_once(trainer):
    out = trainer.launch("run", *zero(1), ranks=2, code=1)  # torchrun replaces the exit code 2
    message = "error: the section deepspeed needs DeepSpeed: pip install 'm3ae-fast[train]'"
    assert out.count(message) == 1 and 'train.py", line' not in out  # torchrun has a traceback of its own
    assert not (trainer.folder / "run").exists()


def test_a_run_on_two_ranks_with_zero_2_resumes_on_one_and_back(trainer):
    """The log says whether plain torch or DeepSpeed trains."""
    options = [*zero(2), "--set", "train.precision=bf16", "--set", "train.save_every=2", "--set", "train.keep=9"]
    out = trainer("run", *options, ranks=2)
    assert "DeepSpeed ZeRO stage 2" in out
    whole = np.array(trainer.losses("run"))
    engines = ((2, 1, "plain torch, because ZeRO stage 2 partitions nothing on one rank"), (4, 2, "DeepSpeed ZeRO"))
    for step, ranks, name in engines:
        for path in checkpoint.saved_steps(trainer.folder / "run"):
            if checkpoint.step_of(path) > step:
                shutil.rmtree(path)
        assert name in trainer("run", *options, "--resume", "auto", ranks=ranks)
        np.testing.assert_allclose(np.array(trainer.losses("run")), whole, rtol=1e-2)
