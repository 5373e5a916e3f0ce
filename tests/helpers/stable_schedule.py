"""The decay of finished runs with a stable learning rate."""

from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.training.run_state import status


def decay(run):
    """Return the number of steps before the decay, and the total number of steps, of a finished run without warm-up
    that logs every step. Require that its learning rate is constant before the decay and then falls."""
    rates = [line["lr"] for line in read_metrics(run) if "lr" in line]
    begin = rates.count(max(rates)) - 1  # the first step of the decay still has the peak learning rate
    assert rates[: begin + 1] == [max(rates)] * (begin + 1)
    assert rates[begin + 1 :] == sorted(set(rates[begin + 1 :]), reverse=True) and rates[-1] < 0.2 * rates[0]
    assert status(run) == ("finished", f"finished at step {len(rates)} of {len(rates)}")
    return begin, len(rates)
