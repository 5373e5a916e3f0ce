"""Samples of images and captions, and their packing into batches."""

from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack
