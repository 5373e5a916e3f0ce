"""Samples of any kind, and the packed batch that they become."""

from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack
