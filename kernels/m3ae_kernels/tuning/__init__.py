"""Launch settings of the Triton kernels, such as block sizes, in one JSON file for each kind of GPU.

A file such as `sm_90.json` contains two entries for every kernel: "16" for 16-bit inputs, and "32" for wider inputs.
The attention kernels may have further entries for a head dimension and a range of sample lengths, such as
"16, D=64, up to 128 keys". `m3ae-kernels tune` rewrites the file of this machine's GPU. Nothing is tuned while a model
runs, so every rank runs the same code.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
INTERPRETER = "interpreter"
OLDEST = (8, 0)  # lowest supported compute capability; on older GPUs, torch is used instead of Triton
# Names of the files by compute capability. All other NVIDIA GPUs use FALLBACK. Its settings fit into their shared
# memory, because it is the file of a GPU with as little shared memory as any supported one.
NVIDIA = {
    (8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip
FALLBACK = "sm_89"
# Enable fused multiply-adds, which are on by default up to Triton 3.9, but not in newer versions.
FUSE = {"enable_fp_fusion": True}
AMD = "gfx942"
SHORT = 128  # maximum number of keys of a short sample, such as the visible tokens of a sample in the encoder

Table = dict[str, dict[str, dict[str, int]]]  # kernel -> entry -> setting -> value


@lru_cache
def table(arch: str) -> Table:
    """Return the settings of an architecture."""
    return json.loads((FOLDER / f"{arch}.json").read_text(encoding="utf-8"))


def fits(device: torch.device) -> bool:
    """Return whether the Triton kernels support this GPU: any AMD GPU, or an NVIDIA GPU of compute capability
    `OLDEST` or higher."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= OLDEST


def nvidia_arch(capability: tuple[int, int]) -> str:
    """Return the name of the table for an NVIDIA GPU of this compute capability."""
    return NVIDIA.get(capability, FALLBACK)


@lru_cache
def arch_of(device: torch.device) -> str:
    """Return the name of the table for a device; a CPU runs the kernels on Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip:
        return AMD
    return nvidia_arch(torch.cuda.get_device_capability(device))


def samples_class(head_dim: int, longest: int) -> str:
    """Return the second part of an entry's name: the head dimension, and whether the longest sample, with `longest`
    keys, is short."""
    return f"D={head_dim}, {f'up to {SHORT}' if longest <= SHORT else f'more than {SHORT}'} keys"


def entry(width: str, samples: str = "") -> str:
    """Return the name of an entry: "16" or "32", followed by the result of `samples_class` if there is one."""
    return ", ".join(filter(None, (width, samples)))


def settings(arch: str, kernel: str, width: str, samples: str = "") -> dict[str, int]:
    """Return the settings of a kernel as a new dict. If there is no entry for `samples`, the result is the entry for
    all samples of this width."""
    entries = table(arch)[kernel]
    return dict(entries.get(entry(width, samples), entries[width]))


def config(kernel: str, device: torch.device, dtype: torch.dtype, samples: str = "") -> dict[str, int]:
    """Return the launch settings of a kernel as a new dict. `samples`: for attention, the result of `samples_class`."""
    arch = arch_of(device)
    found = settings(arch, kernel, "16" if dtype.itemsize == 2 else "32", samples)
    return found if arch == INTERPRETER else found | FUSE
