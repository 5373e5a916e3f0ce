"""The network traffic that a dry run prints, and the weights that stage 3 keeps, equal those of steps on two ranks."""

import json

import pytest

from m3ae_fast.engine.memory_estimate import still_gathered
from m3ae_fast.training.dry_run import network_bytes
from tests.helpers.ranks import run_ranks

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# fraction of a collective's data that one of two ranks sends
SENT = {"allreduce": 1, "allgather_base": 0.5, "reduce_scatter_base": 0.5}
OVERHEAD = 100  # maximum bytes for norms and losses


@pytest.mark.slow
def test_steps_send_what_a_dry_run_prints_in_the_dtype_of_the_setting(tmp_path):
    found = tmp_path / "found.jsonl"
    code, out = run_ranks("tests.helpers.network_traffic", [str(found)], 2, tmp_path / "log")
    assert code == 0, out[-3000:]
    cases = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(cases) == 2 * 2 * (1 + 4 * 2)
    for stage, precision, sums, accumulation, parameters, kept, traffic in cases:
        sent = sum(elements * BYTES[which.split()[1]] * SENT[which.split()[0]] for which, elements in traffic.items())
        told = network_bytes(parameters, stage, 2, accumulation, precision == "bf16", sums == "fp32")
        assert told <= sent <= told + OVERHEAD, (stage, precision, sums, accumulation, traffic)
        reduction = "reduce_scatter_base" if stage == 3 else "allreduce"
        gradients = parameters * (accumulation if stage in (2, 3) else 1)
        number = traffic[f"{reduction} {'float32' if sums == 'fp32' else 'bfloat16'}"]
        assert gradients <= number <= gradients + OVERHEAD / 4, (stage, precision, sums, accumulation, traffic)
        assert kept == parameters == still_gathered(parameters)
