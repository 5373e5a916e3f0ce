"""Block sizes by kernel, element size and architecture, as JSON files in this folder.

Files such as `sm_90.json` contain the launch settings of every kernel for 16-bit inputs ("16") and wider inputs ("32").
The kernels of attention may have further entries for a head dimension and a class of sample lengths, such as
"16, D=64, up to 128 keys". `m3ae-kernels tune` rewrites the file of this machine's GPU. Nothing is tuned at run time,
so every rank runs the same code.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
INTERPRETER = "interpreter"
OLDEST = (8, 0)  # oldest supported compute capability; older devices run on torch
# Names of tables by compute capability. Other NVIDIA devices, all of which have less shared memory, use FALLBACK.
NVIDIA = {
    (8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip
FALLBACK = "sm_89"
# Fused multiply-adds: the default in Triton up to 3.9, and an option in newer versions.
FUSE = {"enable_fp_fusion": True}
AMD = "gfx942"
SHORT = 128  # maximum number of keys of a short sample, such as the visible patches and words of an encoder's sample

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
    """Return the class of samples of at most `longest` keys for which attention has settings of its own."""
    return f"D={head_dim}, {f'up to {SHORT}' if longest <= SHORT else f'more than {SHORT}'} keys"


def entry(width: str, samples: str = "") -> str:
    """Return the name of an entry: "16" or "32", and the class of samples, if there is one."""
    return ", ".join(filter(None, (width, samples)))


def settings(arch: str, kernel: str, width: str, samples: str = "") -> dict[str, int]:
    """Return the settings of a kernel as a new dict. Those of its width apply if there is no entry for `samples`."""
    entries = table(arch)[kernel]
    return dict(entries.get(entry(width, samples), entries[width]))


def config(kernel: str, device: torch.device, dtype: torch.dtype, samples: str = "") -> dict[str, int]:
    """Return the launch settings of a kernel as a new dict. `samples`: class of samples, for attention."""
    arch = arch_of(device)
    found = settings(arch, kernel, "16" if dtype.itemsize == 2 else "32", samples)
    return found if arch == INTERPRETER else found | FUSE
