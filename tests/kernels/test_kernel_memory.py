"""Peak memory of the token loss on the CPU, as the operating system sees it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import torch, m3ae_kernels

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

rows, dim, vocab = 8192, 32, 30522
hidden = torch.randn(rows, dim, requires_grad=True)
weight, bias = torch.zeros(vocab, dim, requires_grad=True), torch.zeros(vocab, requires_grad=True)
targets = torch.zeros(rows, dtype=torch.int32)

def step(count):
    m3ae_kernels.masked_token_loss(
        hidden[:count], weight, targets[:count], bias=bias, row_weight=torch.ones(count), reduction="sum"
    ).backward()

step(2)
before = peak()
step(rows)
print((peak() - before) / (4 * rows * vocab))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_token_loss_stays_far_below_its_logits():
    """The forward and backward passes, including the gradient of the weight, allocate less than a quarter of the
    float32 logits."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < 0.25
