"""A step never makes the host wait for the device. On a CPU, calls that would wait on a GPU are counted."""

import itertools
import json
import math

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.synchronisation import Reads

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple, dict]:
    """Return the counts of each case. They come from a separate process, because DeepSpeed can be initialised only once
    per process."""
    folder = tmp_path_factory.mktemp("waits")
    code, out = run_ranks("tests.helpers.synchronisation", [str(folder / "found")], 1, folder / "log")
    assert code == 0, out
    lines = map(json.loads, (folder / "found").read_text().splitlines())
    return {tuple(line.pop("case")): line for line in lines}


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_does_not_read_from_or_synchronise_with_the_device(found, stage, clip, precision):
    case = found[stage, clip, precision]
    assert case["reads"] == {} and case["synchronised"] == 0
    assert case["norm"] > 0


def test_stage_2_waits_for_its_reductions_on_the_device(found):
    """The device waits instead of the host: work that depends on the reductions must not begin before they have
    ended."""
    for clip, precision in itertools.product((None, 1.0), ("bf16", "fp32")):
        assert found[2, clip, precision]["stream waits"] >= 1


def test_concurrent_streams_of_stage_2_have_no_data_races(found):
    """Copies into buckets, reductions on their stream, and the code that uses the gradients each begin after the work
    on which they depend. The test fails if one of the waits is removed."""
    right, wrong = found["races", True], found["races", False]
    assert right["races"] == {} and "c10d::allreduce_" in right["reduced by"]
    assert sum(wrong["races"].values()) > 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_non_finite_gradient_norm_is_returned(found, stage):
    """DeepSpeed returns -1, which could be mistaken for a norm."""
    assert not math.isfinite(found["nan", stage]["norm"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipped_gradients_equal_those_of_plain_torch(found, stage, clip):
    """The gradients agree within the rounding error of bf16, for norms above and below the limit."""
    assert found["clipped", stage, clip]["off"] < 0.1


def test_the_test_helper_counts_reads_from_the_device():
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.found == {"aten::_local_scalar_dense": 1}
