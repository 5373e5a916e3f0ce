"""Vendor, name and instruction sets of this machine's CPU."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cpu:
    """A CPU model, and whether it computes fast in bf16."""

    vendor: str  # "GenuineIntel", "AuthenticAMD"; "" if unknown
    name: str  # for display
    flags: frozenset[str]  # instruction sets

    @property
    def pairs(self) -> bool:
        """Return whether AVX-512's bf16 dot products are faster than float32 products. They are twice as fast on AMD,
        and half as fast on Intel (measured on Emerald Rapids)."""
        return self.vendor == "AuthenticAMD" and "avx512_bf16" in self.flags

    @property
    def tiles(self) -> bool:
        """Return whether the CPU has AMX with products of bf16 values."""
        return self.flags >= {"amx_tile", "amx_bf16"}

    @property
    def bf16(self) -> bool:
        """Return whether torch's matmuls are faster in bf16 than in float32."""
        return self.pairs or self.tiles


@functools.cache
def this_cpu() -> Cpu:
    """Return the CPU described in Linux's /proc/cpuinfo; without this file, the fields of the result are empty."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    # all cores are equal, so the entry of the last core is used
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = re.sub(r"\((R|TM)\)", "", fields.get("model name", ""))
    if name and not re.search(r"\d", name):  # in virtual machines, "AMD EPYC" may be any model
        name += f", family {fields.get('cpu family')} model {fields.get('model')}"
    return Cpu(fields.get("vendor_id", ""), name, frozenset(fields.get("flags", "").split()))
