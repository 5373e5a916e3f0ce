"""The parts of the engine that run only on a GPU: asynchronous copies, the asynchronous check for finite losses,
optimisers, and ranks."""

import dataclasses

import pytest
import torch

from m3ae_fast.base import hardware
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import Config, DataConfig, MaskingConfig, OptimConfig, SourceConfig, parse
from m3ae_fast.data import Preparation, ShardStore, Share, open_corpus, train_loader
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.feed import feed
from m3ae_fast.engine.memory_estimate import memory_needed
from m3ae_fast.engine.optimizer import build_adamw, name_of, set_lr
from m3ae_fast.model.m3ae import M3AE, Losses
from m3ae_fast.model.transformer import MEMORY_BUDGET
from m3ae_fast.process.heartbeats import write_stacks
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.training.loss_watch import LossWatch
from m3ae_fast.training.throughput import ForwardTime
from tests.cuda_path.fake_cuda import CUDA, FakeCuda
from tests.cuda_path.stand_ins import BrokenAdam, FusedAdam, install
from tests.helpers.trainer import CLIPART
from tests.helpers.zero_cases import TINY, samples
from tests.test_attention import (  # noqa: F401  # these tests also run on the CUDA path
    test_a_resumed_run_keeps_its_attention_kernels_if_they_are_available,
    test_one_rank_chooses_the_attention_kernel_for_all_ranks,
    trials,
)
from tests.test_engine_on_gpu import steps_without_waiting

GEOMETRY = Geometry(16, 4, 3, 8)


def batches(count: int):
    from m3ae_fast.batch import pack

    return [pack(samples(i, text=True), GEOMETRY) for i in range(count)]


def test_missing_gpu_memory_is_reported(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 10**9, 80 * 10**9))
    assert hardware.missing_memory(8e9, CUDA) == ""
    assert hardware.missing_memory(9.5e9, CUDA) == "9.5 GB are needed, and 10 GB are free"


@pytest.mark.parametrize(("share", "checkpointing"), [(0.88, False), (0.92, False), (0.88, True)])
def test_all_activations_are_kept_if_the_memory_estimate_of_the_dry_run_allows_it(
    cuda, monkeypatch, share, checkpointing
):
    """A step that keeps all activations requires the fraction `share` of the free memory, of which nine tenths may be
    used."""
    train = {"steps": 3, "global_batch": 64, "micro_batch": 32, "compile": True, "precision": "bf16"}
    train["activation_checkpointing"] = checkpointing
    data = {"model": TINY, "data": {"train": [{"shards": "none.tar"}]}, "train": train, "deepspeed": None}
    config = parse(Config, data, "case")
    needed = memory_needed(config, 1, 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed / share, 0))
    settings = (
        torch._functorch.config.patch(activation_memory_budget=1.0),
        torch.compiler.config.patch(cache_key_tag=""),
    )
    with settings[0], settings[1], join_ranks() as ranks:
        engine = build_engine(M3AE(config.model, config.loss), config, ranks)
        budget = torch._functorch.config.activation_memory_budget
    kept = share < 0.9 and not checkpointing
    assert budget == (1.0 if kept else MEMORY_BUDGET)
    if checkpointing:
        assert engine.memory == ""
    elif kept:
        assert engine.memory == "activations: all are kept"
    else:
        assert engine.memory.startswith("activations: the outputs of GELU and LayerNorm are recomputed")
        assert engine.memory.endswith(
            f"to keep all activations, {needed / 1e9:.3g} GB are needed, and {needed / 0.92e9:.3g} GB are free"
        )


def test_batches_are_copied_on_a_separate_stream(cuda):
    def start_sums(host):
        cuda.events.append("sums")
        return lambda: []

    steps = []
    for inputs in feed(batches(4), 2, CUDA, start_sums):
        steps.append(inputs)
        cuda.events.append("computed")
    assert [len(inputs.device) for inputs in steps] == [2, 2]
    for host, device in zip(steps[1].host, steps[1].device):
        assert device.keys == host.keys and torch.equal(device.images, host.images)
    seen = [event for event in cuda.events if event != "current reads"]
    assert seen == ["sums", "on side", "off side", "current waits for side", "computed"] * 2
    reads = sum(isinstance(getattr(device, f.name), torch.Tensor) for f in dataclasses.fields(device)) + 3
    assert cuda.events.count("current reads") == 4 * reads  # every tensor, including those of the three segments


def test_pinned_batches_come_from_the_loader(cuda):
    data = DataConfig(train=[SourceConfig(shards=str(CLIPART / "train-0000.tar"))], workers=1)
    tokenizer = load_tokenizer(str(CLIPART / "tokenizer.json"), 8)
    preparation = Preparation(GEOMETRY, MaskingConfig(), tokenizer, seed=0)
    loader = train_loader(
        data, open_corpus(data.train, ShardStore(None)), preparation, Share(4), range(2), pin_memory=True
    )
    assert [len(batch.keys) for batch in loader] == [4, 4]
    assert cuda.pinned.count((4, 3, 16, 16)) == 2


def test_the_check_for_synchronisation_runs(cuda):
    steps_without_waiting(None, "fp32")
    assert cuda.events.count("sync_debug_mode error") == 3


def losses(value: float) -> list[Losses]:
    return [Losses(*(torch.tensor(v) for v in (value, 0.0, 0.0, 0.0)))]


def test_a_non_finite_loss_is_detected_without_synchronisation(cuda):
    watch, norm = LossWatch(), torch.tensor(1.0)
    cuda.late = 4  # the GPU lags behind the host
    for step, value in enumerate((1.0, float("nan"), 1.0)):
        watch.add(step, [f"sample {step}"], losses(value), norm)
        if step < 2:
            assert not watch.failed() and "wait for event" not in cuda.events
    cuda.late = 100
    assert not watch.failed()  # with three steps in flight, the host waits for the first one
    assert cuda.events.count("wait for event") == 1
    assert "the loss of step 1 is not finite; samples: sample 1" in watch.first_bad()
    assert watch.failed()


@pytest.mark.parametrize(
    ("apex", "where", "taken"),
    [
        (FusedAdam, {}, "apex"),
        (FusedAdam, {"partitioned": True}, "torch"),
        (FusedAdam, {"on_cpu": True}, "torch"),
        (BrokenAdam, {}, "torch"),
        (None, {}, "torch"),
    ],
)
def test_the_apex_optimiser_is_used_if_it_works_and_supports_the_settings(monkeypatch, cuda, apex, where, taken):
    own = {} if apex is None else {"FusedAdam": type("FusedAdam", (apex,), {"__module__": "apex.optimizers"})}
    install(monkeypatch, "apex.optimizers", **own)
    model = torch.nn.Linear(3, 3).to(CUDA)
    optimizer = build_adamw([{"params": list(model.parameters())}], OptimConfig(), **where)
    assert name_of(optimizer).split()[0] == taken
    model(torch.ones(1, 3)).sum().backward()
    set_lr(optimizer, 0.1)
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_ranks_are_joined_with_nccl_on_gpus(cuda, monkeypatch):
    backends = []
    begin = torch.distributed.init_process_group  # the stand-in, which falls back to gloo
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **o: backends.append(backend) or begin(backend, **o)
    )
    with join_ranks() as ranks:
        assert ranks.device == CUDA and ranks.sum([1.5, 2]) == [1.5, 2]
    assert backends == ["nccl"] and "set_device cuda:0" in cuda.events


def test_forward_passes_are_timed_with_gpu_events(cuda):
    model = torch.nn.Linear(3, 3)
    timer = ForwardTime(model, CUDA)
    for _ in range(4):
        model(torch.ones(1, 3))
    assert cuda.events == ["record"] * 8
    assert timer.per_step(2) == pytest.approx(2e-3)
    assert ForwardTime(model, torch.device("cpu")).per_step(1) == 0
    model(torch.ones(1, 3))


def test_a_stall_writes_the_last_nccl_collectives(tmp_path, monkeypatch):
    for name, answer in (("is_nccl_available", True), ("is_initialized", True), ("get_backend", "nccl")):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    write_stacks(tmp_path / "stall", 3)
    assert (tmp_path / "stall/nccl_trace_rank_3").read_bytes() == b"trace"
    assert "test_a_stall_writes" in (tmp_path / "stall/rank-3.txt").read_text()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOCAL_RANK": "1"}, "rank 0 needs GPU 1 of this node, which has only 1"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "start the ranks with deepspeed, torchrun or srun"),
    ],
)
def test_an_invalid_launch_is_refused(cuda, monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), join_ranks():
        pass


def test_without_a_gpu_ranks_share_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with join_ranks() as ranks:
        assert ranks.device.type == "cpu"
    with pytest.raises(UserError, match="device cuda: torch finds no GPU on this machine"), join_ranks("cuda"):
        pass


def test_a_gpu_is_used_if_there_is_one_unless_the_cpu_is_requested(cuda):
    assert hardware.chosen_device(None).type == "cuda" and hardware.chosen_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device abacus: must be cpu or cuda"):
        hardware.chosen_device("abacus")


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((7, 5), "fp32")])
def test_precision_follows_the_gpu(capability, precision):
    with FakeCuda(capability=capability):
        assert hardware.fast_precision(CUDA) == precision


def test_peak_throughput_is_taken_from_the_data_sheet_or_measured(monkeypatch, cuda):
    assert hardware.peak_flops(CUDA, torch.bfloat16) == 989e12
    monkeypatch.setattr(hardware.torch, "randn", lambda *size, **_: torch.zeros(2, 2))
    assert hardware.peak_flops(CUDA, torch.float32) > 0
    assert cuda.events.count("synchronize") == 4
    with FakeCuda(name="a card of tomorrow"):
        assert hardware.peak_flops(CUDA, torch.bfloat16) > 0
    assert hardware.peak_flops(torch.device("cpu"), torch.float32) > 0


def test_memory_use_is_that_of_the_gpu_or_the_process(cuda):
    assert hardware.peak_memory(CUDA) == 123_000_000
    assert hardware.peak_memory(torch.device("cpu")) > 50e6


def test_a_gpu_without_free_memory_is_recognised():
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
