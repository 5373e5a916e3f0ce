"""Random draws in the stream of samples follow the config. They are independent, because no two draws share a random
number."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from m3ae_fast.base.randomness import RandomStreams
from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.config import MaskingConfig
from m3ae_fast.data.dataset import Samples
from m3ae_fast.images import crops
from m3ae_fast.images.crops import random_crop
from m3ae_fast.images.patch_grid import Native
from tests.helpers.shards import members, picture, write_tar


def correlation(pairs) -> float:
    return abs(np.corrcoef(np.array(pairs, dtype=np.float64).T)[0, 1])


def test_flips_are_independent_of_the_crop_box(monkeypatch):
    """A flip is independent of the box's area, aspect ratio and position."""
    boxes, real = [], crops.draw_box
    monkeypatch.setattr(crops, "draw_box", lambda *args: boxes.append(real(*args)) or boxes[-1])
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 48, 64)  # brighter to the right, unless flipped
    flipped = []
    for seed in range(1500):
        crop = random_crop(ramp, 8, (0.2, 0.9), True, torch.Generator().manual_seed(seed))
        flipped.append(bool(crop[0, 0, 0] > crop[0, 0, -1]))
    assert abs(np.mean(flipped) - 0.5) < 0.05
    top, left, height, width = (np.array(column) for column in zip(*boxes))
    for number in (top / (49 - height), left / (65 - width), height * width, width / height):
        assert correlation(list(zip(flipped, number))) < 0.09


@pytest.mark.parametrize("transposed", [False, True])
def test_a_crop_may_be_as_wide_or_as_high_as_the_image(transposed):
    """A box of the full width or height is placed at random like any other box. The central box is used only if no box
    fits."""
    size = (8, 30) if transposed else (30, 8)
    boxes = [crops.draw_box(*size, (0.2, 0.5), torch.rand(41, generator=torch.Generator().manual_seed(seed)).tolist())
             for seed in range(300)]  # fmt: skip
    whole = [(left, top) if transposed else (top, left) for top, left, *part in boxes if part[transposed ^ 1] == 8]
    assert len({along for along, _ in whole}) > 10 and {across for _, across in whole} == {0}


def test_crops_equal_those_of_earlier_versions(monkeypatch):
    """A run that is resumed with a later version has the same crops."""
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(80), indexing="ij")
    image, found = torch.stack((rows, columns, rows)).to(torch.uint8), []
    monkeypatch.setattr(crops, "resize", lambda part, *size: part)
    for seed in range(4):
        part = random_crop(image, 8, (0.2, 1.0), True, torch.Generator().manual_seed(seed))
        ends = part[1, 0, [0, -1]].tolist()
        found.append((int(part[0, 0, 0]), min(ends), *part.shape[1:], ends[0] > ends[1]))
    assert found == [(3, 0, 64, 75, False), (6, 4, 86, 75, False), (15, 4, 77, 72, True), (16, 1, 45, 36, False)]


def test_masks_are_independent_of_crops(load, tmp_path, monkeypatch):
    """The first random number of a stream has a large effect on masks and on crops, so they must not share it."""
    path = write_tar(tmp_path / "a.tar", members(range(4), "image"))
    samples: Samples = load(path, tokenizer=False).dataset
    firsts, real = [], RandomStreams.generator

    def seeded(*key):
        firsts.append(torch.rand(1, generator=real(*key)).item())
        return real(*key)

    monkeypatch.setattr(RandomStreams, "generator", seeded)
    for position in range(400):
        samples[position]
    masks, boxes = firsts[::2], firsts[1::2]
    assert len(set(firsts)) == 800 and correlation(list(zip(masks, boxes))) < 0.15


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_held_out_masks_do_not_depend_on_the_batch(load, tmp_path, per):
    path = write_tar(tmp_path / "a.tar", members(range(12)))
    masking = MaskingConfig(image_ratio=0.5, text_ratio=0.5, per=per)

    def masks(**options) -> dict:
        found = {}
        for batch in load(path, train=False, masking=masking, **options):
            for key, ends in zip(batch.keys, batch.encoder.cu_seqlens.unfold(0, 2, 1).tolist()):
                found[key] = batch.encoder_table_ids[slice(*ends)].tolist()
        return found

    reference = masks(micro_batch=12)
    assert len(reference) == 12
    for options in ({"micro_batch": 1}, {"micro_batch": 5}, {"micro_batch": 3, "accumulation": 2}):
        assert masks(**options) == reference
    assert masks(micro_batch=12, seed=1) != reference


def test_a_batch_mask_is_shared_by_all_micro_batches_of_a_step(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(24)))
    masking = MaskingConfig(image_ratio=0.5, text_ratio=0.5, per="batch")
    for parts in (
        {"micro_batch": 12},
        {"micro_batch": 4, "accumulation": 3},
        {"micro_batch": 6, "world": 2},
        {"micro_batch": 12, "config": {"repeats": 2}},
    ):
        steps = [set(), set()]
        for rank in range(parts.get("world", 1)):
            batches = list(load(path, steps=2, rank=rank, masking=masking, **parts))
            for number, batch in enumerate(batches):
                for first, last in batch.encoder.cu_seqlens[: len(batch.keys) + 1].unfold(0, 2, 1).tolist():
                    patches = [row for row in batch.encoder_table_ids[first:last].tolist() if 0 < row <= 16]
                    steps[number * 2 // len(batches)].add(tuple(patches))
        assert [len(step) for step in steps] == [1, 1] and steps[0] != steps[1]


def test_the_crop_settings_of_the_config_are_used(load, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i, fmt="PNG")) for i in range(24)])
    areas, real = [], crops.draw_box

    def box(*args):
        areas.append(np.prod((found := real(*args))[2:]) / (40 * 30))
        return found

    monkeypatch.setattr(crops, "draw_box", box)

    def images(**config) -> dict:
        areas.clear()
        (batch,) = load(path, micro_batch=24, steps=1, tokenizer=False, config=config)
        low, high = config["crop_scale"]
        assert len(areas) == 24 and all(low - 0.03 < area < high + 0.03 for area in areas)
        return dict(zip(batch.keys, batch.images))

    plain, flips = (images(crop_scale=(0.5, 0.6), flip=flip) for flip in (False, True))
    flipped = [torch.equal(plain[key].flip(-1), flips[key]) for key in plain]
    assert 6 <= sum(flipped) <= 18
    assert all(is_flipped or torch.equal(plain[key], flips[key]) for key, is_flipped in zip(plain, flipped))
    small = images(crop_scale=(0.1, 0.2), flip=False)
    assert not any(torch.equal(plain[key], small[key]) for key in plain)


def test_masks_of_neighbouring_samples_differ():
    generator = torch.Generator()
    masks = {tuple(draw_mask(16, 0.5, generator.manual_seed(seed)).tolist()) for seed in range(200)}
    assert len(masks) > 190


def test_random_numbers_of_a_forward_pass_depend_only_on_the_view_of_a_sample(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(6)))

    def draws(**options) -> dict:
        return {
            position: (key, draw)
            for batch in load(path, steps=9, config={"repeats": 2}, **options)
            for position, key, draw in zip(batch.positions, batch.keys, batch.draws.tolist())
        }

    whole = draws()
    assert sorted(whole) == list(range(36)) and len({draw for _, draw in whole.values()}) == 36
    assert all(whole[position][0] == whole[position + 1][0] for position in range(0, 36, 2))
    assert whole != draws(seed=1)
    assert min(draw for _, draw in whole.values()) >= 0
    small = load(path, micro_batch=1, accumulation=4, steps=9, config={"repeats": 2})
    assert whole == {b.positions[0]: (b.keys[0], b.draws.item()) for b in small}


def test_area_and_aspect_ratio_of_a_native_crop_are_within_their_ranges(monkeypatch):
    """The box has an area and an aspect ratio within the ranges. The model's input has about the aspect ratio of the
    box, and about as many patches as the whole image would have."""
    boxes, real = [], crops.draw_box
    monkeypatch.setattr(crops, "draw_box", lambda *args: boxes.append(real(*args)) or boxes[-1])
    native = Native(patch_size=4, least=1, most=100, longest=20, positions="absolute")
    image = torch.zeros(3, 30, 90, dtype=torch.uint8)
    for seed in range(300):
        crop = random_crop(image, native, (0.2, 0.9), True, torch.Generator().manual_seed(seed))
        _, _, height, width = boxes[-1]
        assert 0.19 < height * width / (30 * 90) < 0.92
        assert 0.72 < width / height / 3 < 1.38
        rows, columns = crop.shape[1] / 4, crop.shape[2] / 4
        assert (rows, columns) == native.grid(height, width, 30 * 90)
        assert abs(np.log(columns / rows * height / width)) < 0.2 and 75 <= rows * columns <= 100
    assert {(height, width) for _, _, height, width in boxes[:5]} != {boxes[0][2:]}


def test_every_image_size_has_a_patch_grid_within_the_bounds():
    """If the image is not very long, the aspect ratio of the grid is close to that of the image, and the number of
    patches is close to the exact number within the bounds."""
    native = Native(patch_size=16, least=4, most=64, longest=16, positions="absolute")
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(0, np.log(5000), (2000, 2))).round().astype(int).tolist()
    for height, width in [*sizes, (1, 10**6), (10**6, 1), (1, 1)]:
        rows, columns = native.grid(height, width)
        assert 1 <= rows * columns <= 64 and max(rows, columns) <= 16
        if max(height, width) <= 4 * min(height, width):
            assert abs(np.log(columns * height / (rows * width))) < np.log(2)
            assert min(max(height * width / 256, 4), 64) / 1.6 <= rows * columns


def test_native_images_with_the_same_patch_grid_share_the_batch_mask(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(24), "image"))
    masking, native = MaskingConfig(image_ratio=0.5, per="batch"), Native(8, 1, 16, 8, "absolute")
    samples: Samples = load(path, micro_batch=12, masking=masking, tokenizer=False, native=native).dataset
    steps = [defaultdict(list), defaultdict(list)]
    for position in range(24):
        sample = samples[position]
        steps[position // 12][sample.image.shape].append(sample.image_mask.tolist())
    assert max(len(masks) for step in steps for masks in step.values()) > 1
    assert all(mask == masks[0] for step in steps for masks in step.values() for mask in masks)
    assert any(steps[0][grid][0] != steps[1][grid][0] for grid in steps[0].keys() & steps[1].keys())
