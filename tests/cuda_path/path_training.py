"""The trainer on a simulated GPU computes the same losses as on the CPU."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from m3ae_fast.base.environment import configure_libraries
from m3ae_fast.train import main
from m3ae_fast.training import throughput_estimate
from tests.cuda_path.fake_cuda import FakeCuda
from tests.cuda_path.stand_ins import FusedAdam, install
from tests.helpers.trainer import TINY
from tests.helpers.zero_cases import build_deepspeed


def train(folder: Path, name: str, *options: str, resume: str = "no", profile: bool = False) -> np.ndarray:
    """Train, and return the loss, the text loss and the gradient norm of each step."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    sizes = ["train.steps=2", "train.global_batch=4", "train.micro_batch=2", "train.eval_samples=4"]
    settings = [*sizes, f"run.dir={folder / name}", *options]
    arguments = ["--config", str(folder / "tiny.json"), "--resume", resume, *(["--profile"] if profile else [])]
    assert main([*arguments, *(word for setting in settings for word in ("--set", setting))]) == 0
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return np.array([[line["loss"], line["text_loss"], line["grad_norm"]] for line in lines if "loss" in line])


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> np.ndarray:
    return train(tmp_path_factory.mktemp("cpu"), "run")


@pytest.mark.parametrize(("stage", "library"), [(None, "torch"), (2, "torch"), (2, "DeepSpeed")])
def test_the_cuda_path_computes_the_same_values_as_the_cpu(tmp_path, monkeypatch, capsys, expected, stage, library):
    monkeypatch.setattr("m3ae_fast.training.run.peak_flops", lambda device, dtype: 1e12)  # measuring it takes a minute
    install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    if library == "DeepSpeed":
        monkeypatch.setattr("m3ae_fast.training.run.build_engine", build_deepspeed)
    section = "null" if stage is None else json.dumps({"zero_optimization": {"stage": stage}})
    with FakeCuda() as cuda:
        first = train(tmp_path, "run", f"deepspeed={section}", "train.save_every=1", "train.keep=9", profile=True)
        if library == "torch":  # DeepSpeed can be initialised only once per process
            (tmp_path / "run/checkpoints/step-00000002").rename(tmp_path / "away")
            again = train(tmp_path, "run", f"deepspeed={section}", resume="auto")
            np.testing.assert_allclose(again[-1], first[-1], rtol=1e-6)
    np.testing.assert_allclose(first, expected, rtol=1e-4)
    assert "on 1 x cuda" in (out := capsys.readouterr().out) and "FusedAdam" in out
    assert ("DeepSpeed ZeRO stage 2" in out) == (library == "DeepSpeed")
    assert cuda.events[0] == "set_device cuda:0" and "current waits for side" in cuda.events


def test_a_dry_run_measures_steps_and_updates_on_the_gpu(tmp_path, monkeypatch, capsys, cuda):
    """Successive events of the simulated GPU are one millisecond apart."""
    install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    monkeypatch.setattr("m3ae_fast.training.run.peak_flops", lambda device, dtype: 1e12)  # measuring it takes a minute
    monkeypatch.setattr("m3ae_fast.training.dry_run.missing_memory", lambda *_: "")
    monkeypatch.setattr("m3ae_fast.training.dry_run.MEASURED_S", 0.1)
    measured, measure = [], throughput_estimate.measure
    monkeypatch.setattr("m3ae_fast.training.dry_run.measure", lambda *_: measured.append(measure(*_)) or measured[-1])
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    assert main(["--config", str(tmp_path / "tiny.json"), "--dry-run", "--set", "deepspeed=null"]) == 0
    assert measured[0].update == pytest.approx(0.001)
    assert re.search(
        r"^step .*^. H100 .*^time +\S+ on this machine.*^loader +\S+ cores", capsys.readouterr().out, re.M | re.S
    )


def test_expandable_memory_segments_are_requested_unless_the_user_configures_the_allocator(monkeypatch):
    """Expandable segments are requested unless the user has set the variable, under its present or its older name."""
    for given in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None):
        environment = {given: "theirs"} if given else {}
        monkeypatch.setattr(os, "environ", environment)
        configure_libraries()
        assert environment.get(given or "PYTORCH_ALLOC_CONF") == ("theirs" if given else "expandable_segments:True")
        assert len(environment) == 4  # the other three variables are for threads, pages and logs


def test_missing_build_tools_for_triton_are_reported(tmp_path, monkeypatch, cuda):
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "triton")
    monkeypatch.setattr("m3ae_fast.training.run.missing_for_triton", lambda: ["a C compiler", "Python.h"])
    with pytest.raises(Exception, match=r"need a C compiler and Python\.h on this machine"):
        train(tmp_path, "run", "deepspeed=null")


def test_an_unknown_kernel_implementation_is_refused(tmp_path, monkeypatch, cuda):
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "tritn")
    with pytest.raises(Exception, match=r"impl is 'tritn' .*, but must be one of auto, triton, torch"):
        train(tmp_path, "run", "deepspeed=null")
