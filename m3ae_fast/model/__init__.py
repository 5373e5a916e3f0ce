"""The model: samples -> packed batch -> losses."""

from m3ae_fast.model.batch import PackedBatch
from m3ae_fast.model.m3ae import M3AE, Losses
from m3ae_fast.model.masking import draw_mask
from m3ae_fast.model.packing import Geometry, Sample, pack

__all__ = ["M3AE", "Geometry", "Losses", "PackedBatch", "Sample", "draw_mask", "pack"]
