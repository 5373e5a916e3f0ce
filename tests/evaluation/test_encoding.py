import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import POOLS, DataConfig, ModelConfig, SourceConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.labels import label_corpus
from m3ae_fast.heads.encoding import check_skipped, corpus_batches, encode_batches, encode_types
from m3ae_fast.heads.feature_bank import FeatureType
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.model import inference
from m3ae_fast.model.inference import check_finite, encoding
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.weights.open_model import open_model
from tests.helpers.labelled import labelled_members
from tests.helpers.shards import write_tar
from tests.helpers.trainer import TINY


@pytest.fixture(scope="module")
def model(run):
    return open_model(str(run), text=True).eval()


def images(count, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_pooled_from_the_representation(model, pool):
    pictures, text = images(5), "a red house by the river"
    tokens = torch.from_numpy(model.tokenizer.encode(text)).expand(5, -1)
    for expected, given in (
        (model.representation(pictures), {"images": list(pictures)}),
        (model.representation(None, tokens), {"texts": [text] * 5}),
        (model.representation(pictures, tokens), {"images": list(pictures), "texts": [text] * 5}),
    ):
        pooled = expected[:, 0] if pool == "cls" else expected[:, 1:].mean(1)
        found = model.encode(**given, pool=pool, batch_size=2, precision="fp32")
        torch.testing.assert_close(found, pooled, rtol=1e-5, atol=1e-5)
        assert not found.requires_grad


@pytest.mark.parametrize("pool", POOLS)
def test_padding_rows_do_not_affect_features(model, pool):
    samples = [
        Sample(str(i), image=x, image_mask=torch.zeros(model.config.patches_per_image, dtype=torch.bool))
        for i, x in enumerate(images(5))
    ]
    exact, filled = (pack(samples, model.geometry, repeat_shapes=repeat) for repeat in (False, True))
    assert filled.encoder.rows > exact.encoder.rows
    torch.testing.assert_close(model.pooled(filled, pool), model.pooled(exact, pool))


@pytest.mark.parametrize("order", ["after_norm", "before_norm"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_of_a_layer_equal_those_of_a_model_truncated_after_it(tmp_path, pool, order):
    """The features of the last layer are bitwise equal to those of `encode` without a layer, whether they are computed
    alone or in one pass with other layers.
    """
    deep = M3AE(ModelConfig.model_validate({**TINY["model"], "depth": 3, "mean_pool": order}, strict=False))
    pictures, texts = list(images(5)), ["a red house"] * 5
    deep.tokenizer = load_tokenizer(TINY["data"]["tokenizer"], deep.config.text_length)
    cut = M3AE(deep.config.model_copy(update={"depth": 2}))
    names = cut.state_dict().keys()
    cut.load_state_dict({name: tensor for name, tensor in deep.state_dict().items() if name in names})
    cut.tokenizer = deep.tokenizer
    given = {"images": pictures, "texts": texts, "pool": pool, "precision": "fp32"}
    torch.testing.assert_close(deep.encode(**given, layer=2), cut.encode(**given), rtol=1e-5, atol=1e-5)
    assert (deep.encode(**given, layer=1) - deep.encode(**given, layer=2)).abs().max() > 1e-2
    samples = [unmasked_sample(i, x, "a red house", deep.config, deep.tokenizer) for i, x in enumerate(pictures)]
    batch = pack(samples, deep.geometry)
    with torch.no_grad():
        whole, each = deep.pooled(batch, pool), deep.pooled_of_layers(batch, [3, 1, 2], [pool])
        patches = deep.pooled_and_patches(batch, [2, 3], [pool])[1]
    assert torch.equal(each[:, 0], whole) and torch.equal(deep.encode(**given, batch_size=5), whole)
    for place, layer in enumerate((3, 1, 2)):
        assert torch.equal(each[:, place], deep.encode(**given, batch_size=5, layer=layer))
    torch.testing.assert_close(patches[:, 1], deep.representation(torch.stack(pictures), _tokens(deep))[:, 1:17])
    with torch.no_grad():
        both = deep.pooled_of_layers(batch, [2, 3], ["cls", "mean"]).unflatten(1, (2, 2))
    torch.testing.assert_close(both[:, :, ("cls", "mean").index(pool)], each[:, [2, 0]], rtol=1e-5, atol=1e-5)
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"layer {layer}: the encoder has layers 1 to 3"):
            deep.encode(**given, layer=layer)


def _tokens(model):
    return torch.from_numpy(model.tokenizer.encode("a red house")).expand(5, -1)


def test_encode_accepts_pil_images_and_tensors_of_any_size(model):
    pixels = images(1, 32)[0]
    pil = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    config = model.config
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    normalised = (pixels / 255 - mean) / std
    first, second, third = (model.encode(images=[x], precision="fp32") for x in (pixels, pil, normalised))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, third, rtol=1e-4, atol=1e-4)
    assert model.encode(images=[images(1, 50)[0], pil.convert("L"), pil.resize((64, 20))]).shape == (3, 32)
    assert model.encode(images=[]).shape == model.encode(texts=[]).shape == (0, 32)
    with torch.no_grad():
        empty = model.encode(texts=[""])
    assert not empty.any()  # for an empty caption, only the cls token is left


def test_floats_are_read_according_to_value_range(model):
    """For each value range, floating-point images have the same features as the uint8 images from which they were
    computed. This holds at the size of the model and at other sizes, and for tensors and arrays."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.image_mean, model.config.image_std))
    close = {"rtol": 0, "atol": 1e-5}
    for size in (32, 50):
        pixels = images(2, size)
        expected, unit = model.encode(pixels, precision="fp32"), pixels / 255
        ours = {(0, 1): unit, (0, 255): pixels.float(), (-1, 1): 2 * unit - 1, (0.0, 65535.0): pixels.double() * 257}
        for value_range, floats in ours.items():
            found = model.encode(floats, value_range=value_range, precision="fp32")
            torch.testing.assert_close(found, expected, **close)
            arrays = floats.permute(0, 2, 3, 1).numpy()
            assert torch.equal(model.encode(arrays, value_range=value_range, precision="fp32"), found)
    pixels = images(2)
    expected, normal = model.encode(pixels, precision="fp32"), (pixels / 255 - mean) / std
    for value_range in (None, "normalised"):
        found = model.encode(normal, value_range=value_range, precision="fp32")
        torch.testing.assert_close(found, expected, **close)
    for shape in ((3, 44, 32), (3, 32, 44)):  # one side has the right size already
        oblong = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        found = model.encode(oblong / 255, value_range=(0, 1), precision="fp32")
        torch.testing.assert_close(found, model.encode(oblong, precision="fp32"), **close)
    tokens = model.representation(pixels)
    torch.testing.assert_close(model.representation(pixels / 255, value_range=(0, 1)), tokens, **close)
    torch.testing.assert_close(model.representation(normal), tokens, **close)
    unrounded = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = model.encode(unrounded, value_range=(0, 1), precision="fp32")
    torch.testing.assert_close(found, model.encode((unrounded - mean) / std, precision="fp32"), **close)


def test_value_range_applies_only_to_images_with_more_than_8_bits(model, tmp_path):
    """Images are given as files, PIL images and arrays. The value range does not scale 8-bit images."""
    grey = images(1)[0, 0].numpy()
    expected = model.encode(Image.fromarray(grey), precision="fp32")
    deep = Image.fromarray(grey.astype(np.uint16) * 16)
    deep.save(tmp_path / "deep.png")
    for given in (deep, tmp_path / "deep.png", np.stack([np.asarray(deep)] * 3, -1)):
        assert torch.equal(model.encode(given, value_range=(0, 255 * 16), precision="fp32"), expected)
    assert torch.equal(model.encode(Image.fromarray(grey), value_range=(0, 4095), precision="fp32"), expected)


def test_float_images_that_are_evidently_not_normalised_are_refused(model):
    pixels = images(3)
    for floats, guess in (
        (pixels / 255, (0, 1)),
        (pixels.float(), (0, 255)),
        (pixels.float() * 257, (0, 65535)),
        (pixels.half() / 255, (0, 1)),
    ):
        message = f"values from 0 to .*: if these .*, pass value_range={guess};".replace("(", r"\(").replace(")", r"\)")
        for call in (model.encode, model.representation):
            with pytest.raises(ValueError, match=message):
                call(floats)
        with pytest.raises(ValueError, match=message):
            model.encode([images(1)[0], *floats])
        assert model.encode(floats, value_range="normalised").isfinite().all()
    for wrong in ((1, 0), (0,), "unit", 255):
        with pytest.raises(ValueError, match=r"value_range .*: must be \(black, white\) with black below white"):
            model.encode(pixels, value_range=wrong)


@pytest.mark.parametrize(
    ("scale", "value_range"), [(255, (0, 1)), (65535, (0, 1)), (65535, (0, 255)), (1, (0, 255)), (1, (0, 65535))]
)
def test_values_evidently_in_units_other_than_value_range_are_refused(model, scale, value_range):
    """With the wrong value range, images would be all white or all black."""
    unit = images(2) / 255
    message = f"value_range={value_range} sets the values of .* values from 0 to ".replace("(", r"\(").replace(
        ")", r"\)"
    )
    floats = unit * scale
    for given in (floats, floats[0].permute(1, 2, 0).numpy(), list(floats.half() if scale == 1 else floats)):
        with pytest.raises(ValueError, match=message):
            model.encode(given, value_range=value_range)
    with pytest.raises(ValueError, match=message):
        model.preprocess(floats[0], value_range)
    with pytest.raises(ValueError, match=message):
        model.representation(floats, value_range=value_range)
    with pytest.raises(ValueError, match="pass value_range"):
        model.preprocess(floats[0])


def test_a_few_values_outside_value_range_are_clipped(model):
    """The images have a few bright pixels, or values slightly outside the range as after resizing, or only the levels 0
    and 1 of a range up to 255."""
    unit = images(1) / 255
    bright = unit.clone()
    bright[..., 0] = 1000.0
    white = unit.clone()
    white[..., 0] = 1.0
    assert torch.equal(model.encode(bright, value_range=(0, 5000)), model.encode(bright / 5000, value_range=(0, 1)))
    assert model.encode(bright, value_range=(0, 1)).isfinite().all()
    assert model.encode(1.2 * unit - 0.1, value_range=(0, 1)).isfinite().all()
    assert model.encode((unit > 0.5).float(), value_range=(0, 255)).isfinite().all()


def test_an_array_with_misplaced_channels_is_refused_with_its_shape(model):
    grey = M3AE(model.config.model_copy(update={"channels": 1, "image_mean": (0.5,), "image_std": (0.2,)}))
    grey.reset_parameters()
    chw, hwc = images(2)[0], images(2)[0].permute(1, 2, 0)
    for call in (model.encode, lambda given: model.encode([given])):
        with pytest.raises(ValueError, match=r"\[3, 32, 32\].*x\.transpose\(1, 2, 0\)"):
            call(chw.numpy())
        with pytest.raises(
            ValueError, match=r"\[32, 32, 3\], but must have \[3, height, width\]; x\.permute\(2, 0, 1\)"
        ):
            call(hwc)
    with pytest.raises(ValueError, match=r"array of shape \[7, 32, 32\] is not an image \[height, width, 3\]"):
        model.encode(np.zeros((7, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"array of shape \[3, 32, 32\] is not an image .*pass list\(x\)"):
        grey.encode(chw.numpy())
    assert grey.encode(list(chw.numpy())).shape == (3, 32)
    assert grey.encode(np.zeros((5, 32, 32), np.uint8)).shape == (5, 32)


def test_a_sample_without_its_text_or_image_is_refused(model):
    """If the sample were accepted, only its other modality would be encoded."""
    pixels = images(2)
    with pytest.raises(ValueError, match="text 1 is NoneType: pass one text for each sample, or texts=None"):
        model.encode(pixels, ["a house", None])
    with pytest.raises(ValueError, match="image 0 is NoneType: pass one image for each sample"):
        model.encode([None, pixels[0]], ["a house", "a tree"])


def test_the_error_for_a_16_bit_array_names_value_range(model, tmp_path):
    deep = images(1)[0].permute(1, 2, 0).numpy().astype(np.uint16)
    Image.fromarray(deep[..., 0]).save(tmp_path / "deep.png")
    for given in (deep, Image.fromarray(deep[..., 0]), tmp_path / "deep.png"):
        with pytest.raises(ValueError, match=r"has unsigned 16-bit values: pass value_range=\(black, white\)") as error:
            model.encode(given)
        assert "model.value_range" not in str(error.value)


def test_float_images_that_may_be_normalised_are_accepted(model):
    """Neither a constant image nor one bright image among others shows whether images are normalised. With mean 0 and
    standard deviation 1, normalised images are the same as others."""
    bright = images(1) / 255
    for floats in (torch.zeros(1, 3, 32, 32), torch.full((2, 3, 32, 32), 0.5), torch.cat((bright, -bright))):
        assert torch.equal(model.encode(floats), model.encode(floats, value_range="normalised"))
    plain = M3AE(model.config.model_copy(update={"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}))
    assert torch.equal(plain.encode(bright), plain.encode(bright, value_range="normalised"))


def test_encode_accepts_paths_arrays_and_a_single_image(model, tmp_path):
    """Paths, arrays and a single image have the same features as the tensor. Transparent pixels are treated as in
    shards."""
    pixels = images(3, 40)
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, array in zip(paths, arrays):
        Image.fromarray(array).save(path)
    expected = model.encode(list(pixels), precision="fp32")
    for many in (pixels, np.stack(arrays), arrays, paths, list(map(str, paths)), [paths[0], arrays[1], pixels[2]]):
        assert torch.equal(model.encode(many, precision="fp32"), expected)
    for one in (pixels[0], arrays[0], paths[0], str(paths[0]), Image.fromarray(arrays[0])):
        torch.testing.assert_close(model.encode(one, precision="fp32"), expected[:1], rtol=1e-5, atol=1e-5)
    alpha = np.dstack((arrays[0], np.full((40, 40), 99, np.uint8)))
    Image.fromarray(alpha).save(tmp_path / "clear.png")
    shard = decode_image((tmp_path / "clear.png").read_bytes(), 3)
    for clear in (tmp_path / "clear.png", Image.fromarray(alpha)):
        torch.testing.assert_close(model.encode(clear), model.encode(shard))
    torch.testing.assert_close(model.encode(texts="a red house"), model.encode(texts=["a red house"]))
    grey = M3AE(model.config.model_copy(update={"channels": 1, "image_mean": (0.5,), "image_std": (0.5,)}))
    flat = arrays[0][..., 0]
    assert torch.equal(grey.encode(flat, precision="fp32"), grey.encode(pixels[0][:1], precision="fp32"))


def test_images_and_texts_may_be_any_iterables(model):
    pixels, texts = images(2), ["a red house", "a cat"]
    expected = model.encode(pixels, texts)
    for more in (np.array(texts), tuple(texts), (text for text in texts)):
        assert torch.equal(model.encode(iter(pixels), more), expected)


@pytest.mark.parametrize(("precision", "faster", "casts"), [
    ("auto", "bf16", True), ("auto", "fp32", False), ("bf16", "fp32", True), ("fp32", "bf16", False),
])  # fmt: skip
def test_matmuls_have_the_requested_or_the_fastest_precision(model, monkeypatch, precision, faster, casts):
    monkeypatch.setattr(inference, "fast_precision", lambda device: faster)
    with encoding(model, precision, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is casts and not torch.is_grad_enabled()
        assert not casts or torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


@pytest.mark.parametrize("order", ["after_norm", "before_norm"])
@pytest.mark.parametrize("pool", ["mean", "cls", "grid2"])
def test_features_have_the_precision_of_the_weights_and_at_least_float32(run, pool, order):
    pictures = list(images(3))
    own = open_model(str(run), text=False).eval()
    own.config = own.config.model_copy(update={"mean_pool": order})
    expected = own.double().encode(pictures, pool=pool, precision="fp32")
    batch = pack([unmasked_sample(i, x, None, own.config, None) for i, x in enumerate(pictures)], own.geometry)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        own.to(dtype)
        with torch.no_grad():
            alone = own.pooled(batch, pool)
            pooled, patches = own.pooled_and_patches(batch, [2], [pool])
        for found in (own.encode(pictures, pool=pool, precision="fp32"), alone, pooled.flatten(1)):
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        assert patches.dtype == dtype


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_half_precision_images_are_encoded(run, precision):
    """Weights and images in float16 are encoded on a CPU, where autocast to bfloat16 does not support float16
    weights."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = open_model(str(run), text=False).eval()
    expected = model.encode(pixels, precision="fp32")
    for own in (model, model.half()):
        found = own.encode(pixels.half(), precision=precision)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_file_that_is_not_an_image_is_named(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a.png: the file is not an image in a known format"):
        model.encode(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"nowhere.png: cannot be read \(No such file or directory\)"):
        model.encode(["nowhere.png"])
    for wrong in (np.zeros((4, 4, 3)), np.zeros((2, 2, 4, 4, 3), np.uint8)):
        with pytest.raises(
            ValueError,
            match=r"the image cannot be used: (arrays of float64 require|the array has shape \[2, 4, 4, 3\], but must)",
        ):
            model.encode(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "requires images, texts or both"),
        ({"images": [], "texts": ["a"]}, r"numbers of images \(0\) and texts \(1\) differ"),
        ({"images": [torch.zeros(1, 32, 32, dtype=torch.uint8)]}, "has shape"),
        ({"images": torch.zeros(32, 32, dtype=torch.uint8)}, r"has shape \[32, 32\], but must have \[3, height"),
        ({"images": [torch.zeros(3, 40, 40)]}, "the image has shape"),
        ({"images": [torch.zeros(3, 32, 32, dtype=torch.int64)]}, "but must be uint8 or floating-point"),
        ({"images": [torch.zeros(3, 0, 32, dtype=torch.uint8)]}, "has shape"),
        ({"images": [b"a file"]}, "images must be paths, PIL images, arrays or tensors, not bytes"),
        ({"images": [torch.full((3, 32, 32), math.nan)]}, "values that are not finite"),
        ({"images": [torch.zeros(3, 32, 32)], "pool": "other"}, f"pool 'other': must be one of {', '.join(POOLS)}"),
        ({"images": [torch.zeros(3, 32, 32)], "precision": "fp64"}, "precision 'fp64': must be auto, bf16 or fp32"),
        ({"images": [torch.zeros(3, 32, 32)], "batch_size": -1}, "batch_size -1: must be an integer of at least 1"),
    ],
)
def test_inputs_that_cannot_be_encoded_raise_a_value_error(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.encode(**given)


def test_texts_need_a_tokenizer(run):
    with pytest.raises(UserError, match="has no tokenizer"):
        open_model(str(run), text=False).encode(texts=["a cat"])


def test_a_dataset_is_encoded_in_file_order_with_labels_and_without_broken_samples(model, tmp_path):
    files = dict(labelled_members(range(7), {5: -1}))
    files["00002.png"] = b"broken"
    corpus = open_corpus(
        [SourceConfig(shards=write_tar(tmp_path / "a.tar", files.items()), modality="image")], ShardStore(tmp_path)
    )
    labelled, _ = label_corpus(corpus, "cls")
    data = DataConfig(train=[SourceConfig(shards="x")], workers=0, max_bad_fraction=0.2)
    with join_ranks() as ranks:
        encode = EncodeConfig(batch=2, precision="fp32")
        batches = corpus_batches(model, labelled, data, encode, ranks)
        found = encode_batches(model, batches, encode, ranks)
        with pytest.raises(UserError, match=r"1 of 6 samples cannot be used, for example .*00002: the file is not"):
            encode_batches(model, batches._replace(max_bad_fraction=0), encode, ranks)
    assert [key.rsplit("/")[-1] for key in found.keys] == ["00000", "00001", "00003", "00004", "00006"]
    assert found.labels_N.tolist() == [0, 1, 0, 1, 0]
    pil = [Image.open(BytesIO(files[f"{i:05d}.png"])) for i in (0, 1, 3, 4, 6)]
    torch.testing.assert_close(found.features_RD, model.encode(images=pil, precision="fp32"), rtol=1e-5, atol=1e-5)


@pytest.fixture
def deep():
    """Return a model in train mode with stochastic depth, in which the first block of the encoder is in eval mode."""
    model = M3AE(ModelConfig.model_validate({**TINY["model"], "depth": 3, "drop_path": 0.5}, strict=False)).train()
    model.encoder.blocks[0].eval()
    return model


def test_encoding_ignores_and_keeps_the_modes_of_modules(deep):
    pictures, modes = list(images(4)), [part.training for part in deep.modules()]
    features = deep.encode(pictures), deep.patch_features(pictures)
    with pytest.raises(ValueError, match="not finite"), encoding(deep, "auto", torch.device("cpu")):
        raise ValueError("not finite")
    assert [part.training for part in deep.modules()] == modes
    assert not torch.equal(*(deep.representation(torch.stack(pictures)) for _ in range(2))), "training drops branches"
    deep.eval()
    assert torch.equal(features[0], deep.encode(pictures)) and torch.equal(features[1], deep.patch_features(pictures))


def test_encoding_does_not_affect_other_threads(deep):
    """While one thread encodes, another one trains with stochastic depth."""
    batch = torch.stack(list(images(4)))
    with encoding(deep, "fp32", torch.device("cpu")), ThreadPoolExecutor(1) as other:
        first, second = (other.submit(deep.representation, batch).result() for _ in range(2))
        assert first.requires_grad and not torch.equal(first, second)
        assert torch.equal(deep.representation(batch), deep.representation(batch))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["pooled", "patches"])
def test_non_finite_features_are_refused_and_their_sample_is_named(run, tmp_path, part, value):
    model = open_model(str(run), text=True)
    pooled, both, second = model.pooled_of_layers, model.pooled_and_patches, torch.tensor([1])

    def spoilt(*args):
        return pooled(*args).index_fill(0, second, value)

    def patches_spoilt(*args):
        return both(*args)[0], both(*args)[1].index_fill(0, second, value)

    model.pooled_of_layers, model.pooled_and_patches = spoilt, patches_spoilt
    shard = write_tar(tmp_path / "a.tar", labelled_members(range(3)))
    corpus = open_corpus([SourceConfig(shards=shard, modality="image")], ShardStore(tmp_path))
    data = DataConfig(train=[SourceConfig(shards="x")], workers=0)
    with (
        join_ranks() as ranks,
        pytest.raises(UserError, match=r"1 of 3 samples \(for example, .*/00001\) have features"),
    ):
        batches = corpus_batches(model, corpus, data, EncodeConfig(), ranks)
        kind, tokens = (FeatureType(model.config.depth, pool) for pool in ("mean", None))
        encode_types([model], [[kind, tokens] if part == "patches" else [kind]], batches, EncodeConfig(), ranks)
    with pytest.raises(
        UserError, match=r"1 of 2 samples \(for example, number 1\) have features that are not finite; the"
    ):
        model.encode(images=list(images(2)))


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_a_single_non_finite_value_is_found_in_any_row(shape):
    check_finite(torch.zeros(shape), "abcd")
    check_finite(torch.zeros(0, *shape[1:]), "")
    for place in itertools.product(*map(range, shape)):
        values = torch.zeros(shape)
        values[place] = torch.nan
        values[3, ..., 0] = torch.inf
        with pytest.raises(UserError, match=f"{1 + (place[0] < 3)} of 4 samples .*example, {'abcd'[place[0]]}"):
            check_finite(values, "abcd")


def test_bad_samples_are_tolerated_up_to_the_limit_unless_all_samples_are_bad():
    bad = Skipped("a.tar", "0", "broken")
    check_skipped([bad] * 2, 10, 0.2)
    for count, samples, most in ((3, 10, 0.2), (1, 10, 0.0), (10, 10, 1.0)):
        with pytest.raises(UserError, match=f"{count} of {samples} samples cannot be used"):
            check_skipped([bad] * count, samples, most)
