"""Compilation without a GPU: one correct kernel of each kind compiles, and defective ones are reported."""

import importlib
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import m3ae_kernels
import pytest
import torch
import torch._dynamo
from m3ae_kernels import aot, dispatch, tuning
from m3ae_kernels.aot import CASES, SHARED_BYTES, compile_case
from m3ae_kernels.attention.choice import kernel_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_cases import SMALL, Inputs, call, make

CASE = {case.kernel: case for case in reversed(CASES)}
SPILLING = {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "arch, instruction",
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
def test_matmul_kernel_is_sound(arch, instruction):
    report = compile_case(CASE["pixel_error"], arch, "bf16")
    assert report.problems == ()
    assert report.instruction == instruction
    assert 32 < report.registers <= 512
    assert report.shared_bytes > 0


def test_statistics_of_a_patch_need_no_communication_between_warps():
    """Warps communicate through shared memory. An RGB patch has one warp; 13 bands have several."""
    rgb, bands = (case for case in CASES if case.kernel == "patch_stats")
    assert compile_case(rgb, "sm_90", "bf16").shared_bytes == 0 < compile_case(bands, "sm_90", "bf16").shared_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, problem",
    [
        ((256, 128, 32, 4, 2), r"\d+ spills"),
        ((128, 128, 128, 8, 6), r"needs \d+ bytes of shared memory; 232448 are available"),
        ((100, 64, 32, 4, 2), "does not compile"),
    ],
)
def test_unsound_settings_are_reported(settings, problem):
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    report = compile_case(CASE["pixel_error"], "sm_90", "bf16", dict(zip(names, settings)))
    assert any(re.match(problem, p) for p in report.problems), report


def test_every_dtype_and_head_width_is_compiled_in_both_directions(monkeypatch):
    """By default, only some combinations are compiled: each head dimension in bf16, each dtype at one head dimension,
    and float32 at the largest head dimension. With --full, each head dimension is compiled in each dtype."""
    asked = []

    def compile_nothing(case, arch, dtype):
        asked.append((case.kernel, case.sample[0], arch, dtype))
        return aot.Report(case.kernel, arch, dtype, "")

    monkeypatch.setattr(aot, "compile_case", compile_nothing)
    monkeypatch.setattr(aot, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert aot.main([]) == 0
    few = set(asked)
    archs = SHARED_BYTES.keys() - {"sm_75", *aot.AS_OTHERS}
    assert all(tuning.nvidia_arch(aot._capability(arch)) == "sm_89" for arch in aot.AS_OTHERS)
    for kernel in ("attention", "attention_backward"):
        for arch in archs:
            assert {(kernel, dim, arch, "bf16") for dim in (32, 64, 128)} | {(kernel, 128, arch, "fp32")} <= few
        assert {(kernel, dim, "sm_90", "bf16") for dim in (80, 96)} <= few
        assert {(kernel, 64, "sm_90", dtype) for dtype in aot.DTYPES} <= few
    for kernel in {case.kernel for case in CASES}:
        assert {arch for name, _, arch, dtype in few if (name, dtype) == (kernel, "bf16")} == archs
        assert {dtype for name, _, arch, dtype in few if (name, arch) == (kernel, "sm_90")} == {*aot.DTYPES}
    asked.clear()
    assert aot.main(["--full"]) == 0
    assert len(asked) == len(CASES) * len(archs) * len(aot.DTYPES) and few < set(asked)


@pytest.mark.slow
def test_few_register_spills_are_accepted_and_many_are_not(monkeypatch):
    report = compile_case(CASE["pixel_error"], "sm_90", "bf16", SPILLING)
    assert report.spills > aot.MOST_SPILLS and "spills" in report.problems[0]
    monkeypatch.setattr(aot, "MOST_SPILLS", report.spills)
    assert not compile_case(CASE["pixel_error"], "sm_90", "bf16", SPILLING).problems


def test_tuning_tables_contain_exactly_the_kernels():
    names = {case.table or case.kernel for case in CASES}
    for path in tuning.FOLDER.glob("*.json"):
        table = tuning.table(path.stem)
        assert table.keys() == names, path.name
        for kernel, entries in table.items():
            special = entries.keys() - {"16", "32"}
            assert len(entries) == len(special) + 2 and all(entries[e].keys() == entries["16"].keys() for e in special)
            assert not special or kernel.startswith("attention"), "only attention has entries for classes of samples"


@pytest.mark.parametrize("arch", sorted(path.stem for path in tuning.FOLDER.glob("*.json")))
def test_the_settings_of_a_dtype_are_those_of_its_width(arch, monkeypatch):
    """A caller cannot change the settings for the next caller."""
    monkeypatch.setattr(tuning, "arch_of", lambda device: arch)
    wide = {torch.float16: "16", torch.bfloat16: "16", torch.float32: "32", torch.float64: "32"}
    for kernel, by_width in tuning.table(arch).items():
        for dtype, width in wide.items():
            found = tuning.config(kernel, torch.device("cpu"), dtype)
            assert found.items() >= by_width[width].items()
            found.clear()


@pytest.mark.slow
def test_the_aot_command_reports_its_checks():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "m3ae_kernels.aot", "--arch", "sm_90", "--kernel", "take_rows"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 compilations pass all checks" in result.stdout
    interpreted = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert interpreted.returncode == 2 and "Traceback" not in interpreted.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_the_largest_kernels_fit_into_the_shared_memory_of_small_gpus(arch):
    """The largest kernel of each kind, including attention's longest tile, fits into 99 KiB of shared memory."""
    for kernel in ("pixel_error", "attention_backward"):
        report = compile_case(CASE[kernel], arch, "bf16")
        assert report.problems == () and 0 < report.shared_bytes <= 99 << 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, part, programs", [("sm_80", 32, 2), ("sm_90", 32, 2), ("sm_90", 64, 2), ("sm_100", 32, 4)]
)
def test_the_backward_pass_of_attention_spills_nothing_at_the_sizes_of_the_large_config(arch, part, programs):
    """`part`: head dimension of the encoder (64) or of the decoder (32); `programs`: program instances that must fit on
    a multiprocessor. kernels/TRIED.md lists the registers."""
    case = next(c for c in CASES if c.kernel == "attention_backward" and c.sample[0] == part)
    report = compile_case(replace(case, programs=programs), arch, "bf16")
    assert report.problems == () and report.spills == 0


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU with the given compute capability."""
    monkeypatch.delenv("M3AE_KERNELS_IMPL", raising=False)

    def of(capability: tuple[int, int]) -> torch.device:
        dispatch._best_on_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
        return torch.device("cuda", 0)

    yield of
    dispatch._best_on_gpu.cache_clear()


def test_gpus_too_old_for_the_kernels_run_on_torch_with_one_warning(gpu):
    device = gpu((7, 5))
    with pytest.warns(UserWarning, match=r"^m3ae_kernels: on Tesla T4, .* run on torch: .* 8\.0 or higher$") as warned:
        assert [dispatch.choose_impl("auto", device) for _ in range(3)] == ["torch"] * 3
    assert len(warned) == 1
    assert dispatch.choose_impl("triton", device) == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_supported_gpus_run_the_kernels_without_a_warning(gpu, capability):
    device = gpu(capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose_impl("auto", device) == "triton"
    assert f"sm_{capability[0]}{capability[1]}" in SHARED_BYTES


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_float64_runs_on_torch_on_every_gpu(gpu, case, impl):
    """Triton does not compile the kernels of patch_embed in float64 for any NVIDIA GPU, and spills registers in other
    kernels. The last argument of an op is its implementation."""
    device = gpu((9, 0))
    asked = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "m3ae":
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    for dtype, expected in ((torch.float32, "triton"), (torch.float64, "torch")):
        inputs = make(case, dtype)
        # attention chooses inside the op, so it is checked separately; in float32, "auto" also selects torch
        if case.startswith("attend"):
            found = kernel_for(impl, device, dtype, 2, 16, 9).name
            assert found == ("triton" if (impl, expected) == ("triton", "triton") else "padded matmuls")
            continue
        with FakeTensorMode(), Record():
            tensors = {
                name: None if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)
                for name, t in inputs.tensors.items()
            }
            call(m3ae_kernels, case, Inputs(tensors, inputs.options | {"impl": impl}))
        assert asked and set(asked) == {expected}
        asked.clear()


def test_the_choice_of_an_implementation_causes_no_graph_break(gpu):
    device = gpu((7, 5))
    torch._dynamo.reset()

    def doubled(x):
        return 2 * x if dispatch.choose_impl("auto", device) == "torch" else x

    with pytest.warns(UserWarning, match="ops run on torch"):
        assert torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(())) == 2


def test_kernels_are_not_compiled_for_an_architecture_that_uses_torch(capsys):
    assert aot.main(["--arch", "sm_75", "--kernel", "attention"]) == 0
    assert "sm_75: nothing is compiled" in capsys.readouterr().out


def test_pointers_with_different_alignments_compile_once():
    """Ids and values per row come from callers or from the middle of a tensor. Their alignment to 16 bytes can change
    from step to step, and such a change must not cause another compilation."""
    anywhere = {
        "ids", "rows", "places", "src", "fill_ids", "table_ids", "targets", "order", "unit_weight", "row_loss",
        "correct", "cu_queries", "cu_keys",
    }  # fmt: skip
    numbers = "M", "N", "T", "Q", "blocks", "program_rows", "splits", "split_rows", "ignore_index"
    seen = set()
    for case in CASES:
        kernel = getattr(importlib.import_module(f"m3ae_kernels.triton_impl.{case.module}"), f"{case.kernel}_kernel")
        for parameter in kernel.params:
            kind = case.pointers.get(parameter.name)
            if parameter.name in anywhere and kind not in (None, "x"):
                seen.add(parameter.name)
                assert parameter.do_not_specialize_on_alignment, (case.kernel, parameter.name)
            if parameter.name in numbers and kind is None:
                assert parameter.do_not_specialize, (case.kernel, parameter.name)
    assert seen == anywhere
