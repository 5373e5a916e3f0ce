"""Native images: their grids, positions and batches, and a model on them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.config.evaluation import ImageConfig
from m3ae_fast.evaluation.model_images import set_images
from m3ae_fast.images.patch_grid import Native, patch_rows
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.positions import Positions, resampled, sincos_1d

SQUARE = ModelConfig(
    size=None, emb_dim=24, depth=2, num_heads=3, dec_emb_dim=16, dec_depth=2, dec_num_heads=2, image_size=16,
    patch_size=4, text_length=9, vocab_size=31,
)  # fmt: skip
SIZES = ((16, 16), (4, 32), (12, 20), (8, 4), (28, 8))  # height and width of images of 1 to 16 patches


def config(**settings) -> ModelConfig:
    return SQUARE.model_copy(update={"resize": "native", **settings})


def make_model(config: ModelConfig, **loss) -> M3AE:
    torch.manual_seed(0)
    return M3AE(config, LossConfig(**loss))


def make_samples(sizes=SIZES, words: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, (height, width) in enumerate(sizes):
        sample = Sample(str(number), torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        sample.image_mask = draw_mask(height * width // 16, 0.75, generator)
        if number % 2 == 0:  # pairs, and images without captions
            sample.tokens = torch.randint(0, 31, (words,), generator=generator)
            sample.text_mask = draw_mask(words, 0.5, generator)
        samples.append(sample)
    return samples


def gradients(model: M3AE, samples: list[Sample]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = model(pack(samples, model.geometry, repeat_shapes=True))
    losses.loss.backward()
    return losses.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("least", "most"), [(1, 256), (64, 196), (1, 1), (7, 7), (100, 1000)])
def test_patch_grids_preserve_the_aspect_ratio_within_their_bounds(least, most):
    """Any size becomes a grid within the bounds, with nearly the image's aspect ratio unless a side has one or two
    patches."""
    native = Native.of(config(patch_size=16, image_size=16, max_patches=most, min_patches=least))
    sides = (1, 7, 16, 100, 223, 256, 640, 3000, 20000)
    for height, width in itertools.product(sides, sides):
        rows, columns = native.grid(height, width)
        assert native.fits((rows, columns))
        assert sorted(native.grid(width, height)) == sorted((rows, columns))
        patches = min(max(height * width / 256, least), most, native.longest**2 * min(height / width, width / height))
        if min(rows, columns) >= 4:
            assert abs(math.log(columns / rows * height / width)) < 1 / min(rows, columns)
            assert abs(math.log(rows * columns / patches)) < 1 / min(rows, columns)


def test_images_within_the_bounds_keep_their_size_and_a_crop_has_the_number_of_patches_of_its_area():
    native = Native.of(config(patch_size=16, image_size=256))
    assert native.grid(160, 320) == (10, 20)
    assert native.grid(256, 256) == native.grid(4000, 4000) == (16, 16)
    assert native.grid(1024, 256) == (32, 8) and native.grid(8000, 1000)[0] == 32
    assert native.grid(50, 50, area=160 * 160) == (10, 10)


@pytest.mark.parametrize("where", ["absolute", "centred"])
@pytest.mark.parametrize(("was", "now"), [("square", "native"), ("native", "square")])
def test_a_model_whose_resize_setting_is_changed_equals_one_built_with_it(was, now, where):
    changed, made = (make_model(SQUARE.model_copy(update={"resize": r, "native_positions": where})) for r in (was, now))
    made.load_state_dict(changed.state_dict())
    image = torch.randint(0, 256, (3, 8, 32), dtype=torch.uint8)
    before = changed.encode(image, precision="fp32")
    set_images(changed, ImageConfig(resize=now))
    after = changed.encode(image, precision="fp32")
    assert torch.equal(after, made.encode(image, precision="fp32")) and not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("where", ["absolute", "centred"])
def test_position_embeddings_depend_on_row_and_column(where):
    """Each row of the table that `pack` selects is the sin-cos embedding of the patch's column and row."""
    model = make_model(config(native_positions=where))
    batch = pack(make_samples(), model.geometry)
    table = Positions(model.config, 24)(None, None, batch.grids)[0]
    ids, start = batch.decoder_table_ids, 0
    for number, (height, width) in enumerate(SIZES):
        rows, columns = height // 4, width // 4
        assert batch.grids[number] == (rows, columns)
        up, left = ((4 - side) // 2 if where == "centred" else 0 for side in (rows, columns))
        found = table[ids[start + 1 : start + 1 + rows * columns].long()]
        row, column = np.divmod(np.arange(rows * columns), columns)
        wanted = torch.cat([sincos_1d(12, torch.from_numpy(side)) for side in (column + left, row + up)], 1)
        torch.testing.assert_close(found, wanted)
        words = 5 if number % 2 == 0 else 0
        assert ids[start + 1 + rows * columns :][:words].tolist() == [len(table) + word for word in range(words)]
        start += 1 + rows * columns + words


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("where", ["absolute", "centred"])
def test_square_images_in_a_native_model_are_bitwise_those_of_a_square_model(where, stored):
    kind = "stored" if stored else "sincos"
    square = make_model(SQUARE.model_copy(update={"positions": kind}))
    native = make_model(config(native_positions=where, positions=kind))
    native.load_state_dict(square.state_dict())
    samples = make_samples([(16, 16)] * 4)
    (loss, grads), (native_loss, native_grads) = gradients(square, samples), gradients(native, samples)
    assert torch.equal(loss, native_loss)
    assert grads.keys() == native_grads.keys()
    for name, grad in grads.items():
        # the gradient of a type embedding is a sum that includes different rows of zeros, so it is rounded differently
        torch.testing.assert_close(native_grads[name], grad, rtol=1e-5 if "type" in name else 0, atol=1e-7, msg=name)
    pictures = [sample.image for sample in samples]
    assert torch.equal(native.encode(pictures), square.encode(pictures))


@pytest.mark.parametrize("settings", [{}, {"native_positions": "centred"}, {"positions": "stored"}])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_batch_of_mixed_sizes_equals_its_samples_processed_separately(settings, per):
    """The losses, gradients and features of a packed batch are those of its native samples, computed one by one."""
    model, samples = make_model(config(**settings), per=per, norm_pix=True), make_samples()
    loss, grads = gradients(model, samples)
    batch = pack(samples, model.geometry)
    parts = []
    for sample in samples:
        counts = batch.counts
        model.zero_grad()
        losses = model(pack([sample], model.geometry), counts)
        losses.loss.backward()
        parts.append((losses.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(loss, sum(part for part, _ in parts))
    for name, grad in grads.items():
        alone = sum(own[name] for _, own in parts if name in own)
        torch.testing.assert_close(grad, alone, rtol=1e-4, atol=1e-6, msg=name)
    pictures = [sample.image for sample in samples]
    together = model.encode(pictures, precision="fp32")
    for picture, feature in zip(pictures, together):
        torch.testing.assert_close(model.encode(picture, precision="fp32")[0], feature)
    rows = model.representation(samples[1].image[None])
    assert rows.shape == (1, 1 + 8, 24)
    torch.testing.assert_close(rows[0, 1:].mean(0), together[1])


@torch.no_grad()
def test_patch_features_of_each_sample_are_padded_with_zeros():
    model = make_model(config(depth=3)).eval()
    batch = pack(make_samples(), model.geometry, repeat_shapes=True)
    found, layers = model.pooled_and_patches(batch, [3, 1, 2])[1], dict(zip((3, 1, 2), range(3)))
    assert found.shape == (5, 3, 16, 24)
    for layer, place in layers.items():
        rows = model.encoder.norm(next(x for number, x in model._after([layer], batch) if number == layer))
        for number, (rows_of, start) in enumerate(zip(batch.grids, batch.encoder.cu_seqlens.tolist())):
            patches = rows_of[0] * rows_of[1]
            assert torch.equal(found[number, place, :patches], rows[start + 1 : start + 1 + patches])
            assert not found[number, place, patches:].any()


@pytest.mark.parametrize("rows", range(1, 10))
def test_stored_position_embeddings_are_resampled_as_by_timm_and_pillow(rows):
    from timm.layers import resample_abs_pos_embed

    positions_LD = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    planes = positions_LD.T.reshape(-1, 4, 4).numpy()
    for grid in ((rows, columns) for columns in range(1, 17)):
        found = resampled(positions_LD, grid)
        torch.testing.assert_close(
            found, resample_abs_pos_embed(positions_LD[None], list(grid), num_prefix_tokens=0)[0]
        )
        resized = [Image.fromarray(plane).resize(grid[::-1], Image.Resampling.BICUBIC) for plane in planes]
        torch.testing.assert_close(found.T, torch.from_numpy(np.stack(resized)).flatten(1), rtol=1e-5, atol=1e-5)
        assert (found is positions_LD) == (grid == (4, 4))


def test_every_kernel_implementation_accepts_patch_rows(monkeypatch):
    """The pixels of native images are stored as rows, one for each patch. Every implementation of the ops treats each
    row as an image of one patch."""
    model, samples = make_model(config()), make_samples()
    expected, _ = gradients(model, samples)
    monkeypatch.setenv("M3AE_KERNELS_IMPL", "torch")
    found, _ = gradients(model, samples)
    torch.testing.assert_close(found, expected)


def test_patch_rows_contain_the_patches_of_each_image():
    image = torch.arange(3 * 8 * 12).view(3, 8, 12)
    rows = patch_rows([image, image[:, :4]], 4)
    assert rows.shape == (9, 3, 4, 4)
    assert torch.equal(rows[4], image[:, 4:8, 4:8]) and torch.equal(rows[8], image[:, :4, 8:])


def test_image_sizes_that_do_not_fit_are_named():
    model = make_model(config())
    sample = Sample("odd", torch.zeros(3, 10, 16, dtype=torch.uint8), torch.zeros(10, dtype=torch.bool))
    for shape, message in (
        ((3, 10, 16), "odd: the image has 16 x 10 pixels, which are not multiples of the patch size 4"),
        ((3, 16, 20), "must have 3 channels, at most 16 patches"),
        ((3, 4, 64), "at most 8 patches along a side"),
        ((1, 16, 16), "must have 3 channels"),
        ((4, 16, 16), "must have 3 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            pack([replace(sample, image=torch.zeros(shape, dtype=torch.uint8))], model.geometry)


@pytest.mark.parametrize("resize", ["square", "native"])
def test_8_bit_and_normalised_images_cannot_be_mixed_in_one_call(resize):
    model = make_model(config(resize=resize))
    images = [torch.zeros(3, 16, 16, dtype=torch.uint8), torch.zeros(3, 16, 16)]
    with pytest.raises(ValueError, match=r"different dtypes, torch\.float32, torch\.uint8"):
        model.encode(images)


def test_native_images_may_have_float_channels():
    bands = {"channels": 5, "image_mean": (0.5,) * 5, "image_std": (0.25,) * 5, "image_dtype": "float32"}
    model = make_model(config(**bands))
    samples = [replace(sample, image=torch.rand(5, *sample.image.shape[1:])) for sample in make_samples()]
    loss, _ = gradients(model, samples)
    batch = pack(samples, model.geometry)
    assert batch.images.shape == (55, 5, 4, 4)
    torch.testing.assert_close(loss, sum(model(pack([one], model.geometry), batch.counts).loss for one in samples))
