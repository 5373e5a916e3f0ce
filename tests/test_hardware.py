"""The GPUs of a machine: a driver that is too old for torch, and GPUs that a single process does not use."""

import json

import pytest
import torch

from m3ae_fast.base import hardware
from m3ae_fast.base.errors import UserError
from m3ae_fast.train import main
from tests.helpers.trainer import TINY


def test_a_driver_that_is_too_old_is_an_error_unless_the_cpu_is_chosen(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(hardware, "_supported_cuda", lambda: 12020)
    monkeypatch.setattr(hardware, "_DRIVER", tmp_path / "version")
    old = r"supports CUDA 12\.2, but the installed torch was built for CUDA 13\.2: update the driver.*add --device cpu"
    with pytest.raises(UserError, match=f"the NVIDIA driver {old}"):
        hardware.uses_gpu(None)
    module = "NVIDIA UNIX Open Kernel Module for x86_64  535.54.03  Release Build"
    (tmp_path / "version").write_text(f"NVRM version: {module}  (user@host)\nGCC version:  gcc version 12.2.0\n")
    for device in (None, "cuda"):
        with pytest.raises(UserError, match=rf"the NVIDIA driver 535\.54\.03 {old}"):
            hardware.uses_gpu(device)
    assert not hardware.uses_gpu("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not hardware.uses_gpu(None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for supported in (0, 13000, 14000):  # 0: there is no driver
        monkeypatch.setattr(hardware, "_supported_cuda", lambda supported=supported: supported)
        assert not hardware.uses_gpu(None)


def test_the_cuda_version_of_the_driver_is_read_from_its_library(monkeypatch):
    class Library:
        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = 12040
            return self.error

    library = Library()
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: library)
    for library.error, expected in ((0, 12040), (3, 0)):
        assert hardware._supported_cuda() == expected

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hardware.ctypes, "CDLL", missing)
    assert hardware._supported_cuda() == 0


@pytest.mark.parametrize(("flops", "sizes"), [(1e7, [128]), (1e9, [128, 1024])])
def test_the_peak_of_a_slow_cpu_is_measured_with_a_small_matmul(monkeypatch, flops, sizes):
    """A large matmul would take seconds, for example in bf16 on a CPU without instructions for bf16."""
    measured = []
    monkeypatch.setattr(hardware, "_matmul_flops", lambda size, *_: measured.append(size) or flops * size)
    assert hardware.peak_flops(torch.device("cpu"), torch.bfloat16) == flops * sizes[-1]
    assert measured == sizes


def test_a_single_process_leaves_all_gpus_but_one_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert hardware.unused_gpus(1, torch.device("cuda")) == 3
    assert hardware.unused_gpus(4, torch.device("cuda")) == hardware.unused_gpus(1, torch.device("cpu")) == 0


def test_training_names_the_command_that_uses_all_gpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "unused_gpus", lambda world, device: 3)
    monkeypatch.setattr("m3ae_fast.training.run.pre_train", lambda *_, **options: None)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    assert main(["--config", str(tmp_path / "tiny.json"), "--set", f"run.dir={tmp_path / 'run'}"]) == 0
    assert "unused GPUs of this machine: 3; to use all of them: torchrun --nproc-per-node 4 -m m3ae_fast" in (
        capsys.readouterr().out
    )
