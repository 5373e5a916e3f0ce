"""Poolings that keep the position in the image: the means of the patches in each cell of a grid."""

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import GRIDS, POOLINGS, POOLS, ModelConfig, parse
from m3ae_fast.config.evaluation import EncodeConfig, EvaluationConfig
from m3ae_fast.config.poolings import usual_pool
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pooling import means_of_cells
from m3ae_fast.weights.converting import convert
from m3ae_fast.weights.open_model import load_model
from tests.helpers.trainer import TINY

LAYER = {"size": None, "emb_dim": 24, "depth": 2, "num_heads": 2, "vocab_size": 0}


def _model(seed=0, **options):
    torch.manual_seed(seed)
    return M3AE(ModelConfig.model_validate({**TINY["model"], **LAYER, **options}, strict=False)).eval()


def _images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def _by_area(patches_HWD, side):
    """Return the means of the cells of an image in which each patch has been enlarged to side x side equal pixels."""
    pixels = patches_HWD.repeat_interleave(side, 0).repeat_interleave(side, 1)
    height, width = patches_HWD.shape[:2]
    cells = pixels.unflatten(0, (side, height)).unflatten(2, (side, width))
    return cells.mean((1, 3)).flatten(0, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pooling_reduces_a_sample_to_its_number_of_vectors(pool):
    model = _model()
    images = enumerate(_images((64, 64), (64, 64)))
    batch = pack([unmasked_sample(number, each, None, model.config, None) for number, each in images], model.geometry)
    assert model.pooled_of_layers(batch, [1, 2], [pool]).shape == (2, 2 * POOLINGS[pool].vectors, 24)
    assert POOLINGS[pool].vectors == GRIDS.get(pool, 1) ** 2


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("grid", [(4, 4), (8, 12), (3, 5), (7, 2), (1, 1)])
def test_cells_have_equal_areas(grid, side):
    patches = torch.randn(2, *grid, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = F.pad(patches.flatten(1, 2), (0, 0, 0, 3))
    found = means_of_cells(padded, [grid], side)
    assert found.shape == (2, side**2, 5)
    torch.testing.assert_close(found, torch.stack([_by_area(each, side) for each in patches]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.mean(1), patches.mean((1, 2)), rtol=1e-6, atol=1e-6)


def test_images_of_different_grids_and_half_precision_patches_are_pooled():
    grids = [(2, 3), (4, 1), (3, 3)]
    whole = [torch.randn(rows * columns, 6) for rows, columns in grids]
    padded = torch.stack([F.pad(each, (0, 0, 0, 9 - len(each))) for each in whole]).half()
    found = means_of_cells(padded, grids, 2)
    assert found.dtype == torch.float32
    for own, each, grid in zip(found, padded, grids):
        expected = _by_area(each[: grid[0] * grid[1]].float().unflatten(0, grid), 2)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    assert means_of_cells(torch.zeros(0, 9, 6), [], 2).shape == (0, 4, 6)  # a rank may have no samples


@pytest.mark.parametrize("pool", GRIDS)
@pytest.mark.parametrize("native", [False, True])
def test_grid_features_are_means_of_patch_features(pool, native):
    options = {"resize": "native", "min_patches": 4, "max_patches": 16} if native else {}
    model, side = _model(**options), GRIDS[pool]
    images = _images((24, 32), (16, 64), (40, 24)) if native else _images((32, 32), (32, 32))
    found = model.encode(images, pool=pool, precision="fp32")
    assert found.shape == (len(images), side**2 * 24)
    for own, image in zip(found, images):
        patches_BHWD = model.patch_features([image], precision="fp32")
        assert patches_BHWD.any(-1).all()
        torch.testing.assert_close(own, _by_area(patches_BHWD[0], side).flatten(), rtol=1e-4, atol=1e-5)


def test_the_norm_is_applied_to_means_if_the_model_does_so():
    model = _model(mean_pool="before_norm")
    images = _images((32, 32), (32, 32))
    batch = pack([unmasked_sample(i, x, None, model.config, None) for i, x in enumerate(images)], model.geometry)
    with torch.no_grad():
        rows_SLD = torch.cat([x for _, x in model._after([2], batch)]).unflatten(0, (2, -1))
        cells = torch.stack([_by_area(each[1:].unflatten(0, (4, 4)), 2) for each in rows_SLD])
        expected, found = model.encoder.norm(cells).flatten(1), model.pooled(batch, "grid2")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_poolings_of_several_layers_are_computed_in_one_pass():
    model = _model()
    batch = pack(
        [unmasked_sample(i, x, None, model.config, None) for i, x in enumerate(_images((32, 32)))], model.geometry
    )
    with torch.no_grad():
        together = model.pooled_of_layers(batch, [1, 2], POOLS)
        with_patches = model.pooled_and_patches(batch, [1, 2], POOLS)[0]
        parts = [model.pooled_of_layers(batch, [layer], [pool]) for layer in (1, 2) for pool in POOLS]
    for found in (together, with_patches):
        torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


def test_the_default_pooling_is_that_of_the_model(tmp_path):
    """The default is saved with the model. Texts have no patches, so the mean takes the place of a grid."""
    _model(pool="grid2").save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "cls", pool="cls")
    with pytest.raises(UserError, match="pool other: must be one of mean, cls, "):
        convert(tmp_path / "own", tmp_path / "other", pool="other")
    own, cls = (load_model(tmp_path / name) for name in ("own", "cls"))
    image = _images((32, 32))
    assert torch.equal(own.encode(image), own.encode(image, pool="grid2"))
    assert torch.equal(cls.encode(image), own.encode(image, pool="cls"))
    assert own.config.default_pool(texts=True) == "mean" and cls.config.default_pool(texts=True) == "cls"
    assert EncodeConfig().of_model(own.config, texts=False).pool == "grid2"
    assert EncodeConfig(pool="cls").of_model(own.config, texts=False).pool == "cls"


@pytest.mark.parametrize(
    ("width", "pool"), [(64, "grid4"), (256, "grid4"), (384, "grid2"), (1024, "grid2"), (1280, "mean")]
)
def test_without_labels_the_pooling_is_the_largest_grid_with_at_most_4096_features(width, pool):
    assert usual_pool(width) == pool


def test_grids_without_images_are_refused():
    model = _model()
    with pytest.raises(ValueError, match="pool 'grid2': texts alone have no patches; use mean or cls"):
        model.encode(texts=["a"], pool="grid2")
    given = {"data": {"train": [{"shards": "a.tar", "modality": "text"}]}, "encode": {"pool": "grid4"}}
    with pytest.raises(UserError, match=r"encode\.pool: grid4 needs images, but captions are encoded; use mean or cls"):
        parse(EvaluationConfig, given, "--set")
