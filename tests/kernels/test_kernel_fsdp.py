"""Weights of FSDP2: modules under `fully_shard` on two ranks give the results of one process, and DTensors passed
directly are rejected."""

import os
import subprocess
import sys

import m3ae_kernels
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from tests.helpers.trainer import ROOT

PROGRAM = """
import os, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from m3ae_kernels import GatherNorm, MaskedPixelLoss, MaskedTokenLoss, PatchEmbed

PIXELS = {"patch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}

class Model(torch.nn.Module):
    def __init__(self, reduction):
        super().__init__()
        self.embed, self.norm = PatchEmbed(12, **PIXELS), GatherNorm(12)
        self.pixels = MaskedPixelLoss(12, norm_pix=True, reduction=reduction, **PIXELS)
        self.tokens = MaskedTokenLoss(12, 31, reduction=reduction)

    def forward(self, images, targets):
        ids = torch.arange(len(targets))
        x = self.norm(self.embed(images, ids), ids ^ 1)
        return (self.pixels(x, images, ids) + self.tokens(x, targets)).sum()

def step(model, images, targets, scale):
    loss = model(images, targets)
    (scale * loss).backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.003)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

dist.init_process_group("gloo")
rank = dist.get_rank()
for reduction in ("sum", "none"):
    torch.manual_seed(0)
    images, targets = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.randint(0, 31, (16,))
    alone, sharded = Model(reduction), Model(reduction)
    sharded.load_state_dict(alone.state_dict())
    for module in (sharded.embed, sharded.norm, sharded.pixels, sharded.tokens, sharded):
        fully_shard(module)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    losses = []
    for _ in range(3):
        expected = step(alone, images, targets, 1)
        # fully_shard averages gradients over ranks
        mine = step(sharded, images.chunk(2)[rank], targets.chunk(2)[rank], 2)
        dist.all_reduce(mine)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        losses.append(mine)
    assert losses[2] < 0.99 * losses[0]
    for (name, whole), part in zip(alone.named_parameters(), sharded.parameters()):
        torch.testing.assert_close(part.full_tensor(), whole, rtol=1e-4, atol=1e-5, msg=name)
print("equal", flush=True)
dist.barrier()
# fully_shard keeps the group, and with it gloo's threads: one that frees a tensor while Python ends aborts the process
os._exit(0)
"""


@pytest.mark.slow
def test_fsdp_sharded_modules_equal_a_single_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 2


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_a_dtensor_is_refused_in_one_line(mesh, placement):
    """If the full tensor is passed instead, as the error message suggests, the DTensor receives its gradient."""
    hidden, targets = torch.randn(4, 8), torch.arange(4)
    weight = DTensor.from_local(torch.randn(11, 8), mesh, [placement]).requires_grad_()
    with pytest.raises(TypeError, match=r"^weight is a DTensor: pass weight.full_tensor\(\), or use a module"):
        m3ae_kernels.masked_token_loss(hidden, weight, targets)
    with pytest.raises(TypeError, match="x is a DTensor"):
        m3ae_kernels.gather_tokens(weight, targets)
    m3ae_kernels.masked_token_loss(hidden, weight.full_tensor(), targets, reduction="sum").backward()
    assert weight.grad is not None and weight.grad.full_tensor().shape == (11, 8)
