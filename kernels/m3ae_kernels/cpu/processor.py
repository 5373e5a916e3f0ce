"""This machine's CPU: vendor, name and instruction sets."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cpu:
    vendor: str  # "GenuineIntel", "AuthenticAMD"; "" if unknown
    name: str  # for people
    flags: frozenset[str]  # instruction sets

    @property
    def pairs(self) -> bool:
        """Return whether AVX-512's products of bf16 pairs beat those of floats. AMD's are twice as fast; Intel's, as
        measured on Emerald Rapids, half as fast."""
        return self.vendor == "AuthenticAMD" and "avx512_bf16" in self.flags

    @property
    def tiles(self) -> bool:
        """Return whether AMX multiplies bf16."""
        return self.flags >= {"amx_tile", "amx_bf16"}

    @property
    def bf16(self) -> bool:
        """Return whether torch's matmuls are faster in bf16 than in float32."""
        return self.pairs or self.tiles


@functools.cache
def this_cpu() -> Cpu:
    """Return what Linux says of it in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    # all cores are alike: the last one speaks for them
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = re.sub(r"\((R|TM)\)", "", fields.get("model name", ""))
    if name and not re.search(r"\d", name):  # what a virtual machine calls "AMD EPYC" can be any of them
        name += f", family {fields.get('cpu family')} model {fields.get('model')}"
    return Cpu(fields.get("vendor_id", ""), name, frozenset(fields.get("flags", "").split()))
