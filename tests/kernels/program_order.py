"""Program instances of a launch are independent: results are bitwise the same in any order, each address is written by
only one instance and read by no other, and every access is within an argument. test_kernel_interpreter.py runs this
file, because only Triton's interpreter shows addresses. The interpreter runs instances one after another, so that a
race would not change results, and must be found by the addresses."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import m3ae_kernels
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from m3ae_kernels import aot, tuning
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.kernel_cases import make, run

ORDERS: dict[str, Callable[[list[int]], None]] = {
    "forward": lambda programs: None,
    "reversed": list.reverse,
    "shuffled": random.Random(7).shuffle,
}
# Cases with incomplete tiles for every kernel. They are small, because the interpreter is slow.
CHECKED = (
    "attend-some", "attend-queries", "embed-p14", "embed-last", "embed-bands-float", "gather-some", "norm-some",
    "norm-no-bias", "gelu-some", "scatter-vocab", "pixel-norm", "pixel-rows", "pixel-bands", "hog-p48", "hog-bands",
    "hog-mean-last", "token-z", "token-mean", "token-rows",
)  # fmt: skip
builder = interpreter.interpreter_builder


@dataclass
class Launches:
    """Record of the launches of a test, with addresses in bytes. `faults` contains descriptions of forbidden
    accesses."""

    order: Callable[[list[int]], None]
    kernels: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    name: str = ""
    starts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    programs: list[int] = field(default_factory=list)  # program instances in order of execution
    program: int = 0
    loads: list[tuple[int, np.ndarray]] = field(default_factory=list)  # program, addresses
    stores: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def begin(self, name: str, tensors: list[Tensor]) -> None:
        self.name, self.loads, self.stores = name, [], []
        self.kernels.add(name)
        spans = sorted(span(t) for t in tensors if t.numel())
        self.starts = np.array([start for start, _ in spans], np.int64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.int64))

    def access(self, kind: str, pointers, mask) -> None:
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64).ravel()
        if not len(addresses):
            return
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > self.ends[at])
        if outside.any():
            self.faults.append(f"{self.name}: {outside.sum()} {kind}s outside of its arguments")
        distinct = np.unique(addresses)
        if kind == "store" and len(distinct) < len(addresses):
            self.faults.append(f"{self.name}: one store writes an address twice")
        (self.stores if kind == "store" else self.loads).append((self.program, distinct))

    def end(self) -> None:
        stored, writers = flattened(self.stores)
        address, program = np.unique(np.stack((stored, writers)), axis=1)
        if (shared := (np.diff(address) == 0).sum()) > 0:
            self.faults.append(f"{self.name}: {shared} addresses are written by several programs")
        loaded, readers = flattened(self.loads)
        if len(address) and len(loaded):
            at = np.minimum(np.searchsorted(address, loaded), len(address) - 1)
            if (theirs := ((address[at] == loaded) & (program[at] != readers)).sum()) > 0:
                self.faults.append(f"{self.name}: {theirs} loads of what another program writes")


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte, and that after its last byte."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def flattened(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return all addresses, and the program instance of each."""
    none = np.empty(0, np.int64)
    return (
        np.concatenate([none, *(addresses for _, addresses in accesses)]),
        np.concatenate([none, *(np.full(len(addresses), program) for program, addresses in accesses)]),
    )


@pytest.fixture
def watch(monkeypatch):
    """Return a function that runs the program instances of all launches in a given order and records their accesses."""
    real = {
        name: getattr(interpreter.InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "set_grid_dim", "set_grid_idx")
    }
    launch = interpreter.GridExecutor.__call__

    def with_order(order: str) -> Launches:
        seen = Launches(ORDERS[order])

        def watched(self, *arguments, **options):
            tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
            seen.begin(self.fn.__name__, tensors)
            launch(self, *arguments, **options)
            seen.end()

        def set_grid_dim(self, *sizes):
            seen.programs = list(range(math.prod(sizes)))
            seen.order(seen.programs)
            real["set_grid_dim"](self, *sizes)

        def set_grid_idx(self, *index):
            seen.program = seen.programs[np.ravel_multi_index(index, self.grid_dim)]
            real["set_grid_idx"](self, *(int(i) for i in np.unravel_index(seen.program, self.grid_dim)))

        def load(self, pointers, mask, *others):
            seen.access("load", pointers, mask)
            return real["create_masked_load"](self, pointers, mask, *others)

        def store(self, pointers, value, mask, *others):
            seen.access("store", pointers, mask)
            return real["create_masked_store"](self, pointers, value, mask, *others)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
        for name, function in (
            ("set_grid_dim", set_grid_dim), ("set_grid_idx", set_grid_idx), ("create_masked_load", load),
            ("create_masked_store", store),
        ):  # fmt: skip
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, function)
        return seen

    return with_order


@pytest.mark.parametrize("case", CHECKED)
def test_program_instances_run_in_any_order_without_data_races(case, watch):
    results = {}
    for order in ORDERS:
        seen = watch(order)
        results[order] = run(m3ae_kernels, case, make(case, torch.float16))
        assert seen.kernels and not seen.faults
    for order in ("reversed", "shuffled"):
        for name, got in results[order].items():
            assert torch.equal(got, results["forward"][name]), (order, name)


@pytest.mark.parametrize("case", ["attend-some", "embed-bands", "pixel-norm", "hog-bands"])
def test_h100_tiles_have_no_data_races(case, watch, monkeypatch):
    monkeypatch.setattr(tuning, "arch_of", lambda device: "sm_90")
    seen = watch("reversed")
    run(m3ae_kernels, case, make(case, torch.float32))
    assert seen.kernels and not seen.faults


def test_float32_kernels_have_no_data_races_and_every_kernel_is_covered(watch):
    seen = watch("reversed")
    for case in CHECKED:
        run(m3ae_kernels, case, make(case, torch.float32))
    assert not seen.faults
    assert seen.kernels == {f"{case.kernel}_kernel" for case in aot.CASES}


@triton.jit
def all_write_one_kernel(x, out):
    pid = tl.program_id(0)
    tl.store(out, tl.load(x + pid))


@triton.jit
def read_a_neighbours_kernel(x, out):
    pid = tl.program_id(0)
    tl.store(out + pid, tl.load(x + pid))
    tl.store(out + 4 + pid, tl.load(out + (pid + 1) % 4))


@triton.jit
def past_the_end_kernel(x, out):
    pid = tl.program_id(0)
    tl.store(out + pid, tl.load(x + pid + 1))


@triton.jit
def two_lanes_write_one_kernel(x, out):
    tl.store(out + tl.arange(0, 4) // 2 + tl.program_id(0) * 2, tl.arange(0, 4))


@pytest.mark.parametrize(
    "kernel, fault",
    [
        (all_write_one_kernel, "3 addresses are written by several programs"),
        (read_a_neighbours_kernel, "4 loads of what another program writes"),
        (past_the_end_kernel, "1 loads outside of its arguments"),
        (two_lanes_write_one_kernel, "one store writes an address twice"),
    ],
)
def test_data_races_are_detected(kernel, fault, watch):
    seen = watch("shuffled")
    kernel[(4,)](torch.arange(4), torch.zeros(8, dtype=torch.int64))
    assert f"{kernel.fn.__name__}: {fault}" in seen.faults
