"""`draw attention --patch` draws the softmax of the encoder's attention, which is computed by hand here."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.draw import main
from m3ae_fast.drawing import attention
from m3ae_fast.drawing.attention import (
    OUTLINE,
    SHADE,
    attention_to_patches,
    attention_to_words,
    draw_patch_attention,
    shade,
)
from m3ae_fast.model.m3ae import M3AE
from tests.helpers.labelled import labelled_tar, tiny_run
from tests.test_draw import SIZES, _set_held_out_shard

HEADS, LENGTH = 4, 16  # in SIZES: number of heads, and patches of an image


@pytest.fixture
def model():
    torch.manual_seed(0)
    return M3AE(SIZES).eval()


@pytest.fixture
def sample():
    none = torch.zeros(16, dtype=torch.bool)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    return Sample("a", image, none, tokens=torch.arange(5), text_mask=none[:5])


@torch.no_grad()
def by_hand(model, sample, number):
    """Return the attention weights of all heads of a block, float64 [H, T, T], from norm, matmul and softmax in
    NumPy."""
    inputs = []
    block = model.encoder.blocks[number]
    handle = block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.forward_encoder(pack([sample], model.geometry))
    handle.remove()
    x = inputs[0].double().numpy()
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    x = x * block.norm1.weight.numpy() + block.norm1.bias.numpy()
    q, k, _ = np.split(x @ block.attn.qkv.weight.double().numpy().T + block.attn.qkv.bias.numpy(), 3, axis=1)
    width = q.shape[1] // HEADS
    found = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        e = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
        found.append(e / e.sum(1, keepdims=True))
    return np.stack(found)


@pytest.mark.parametrize("block", [0, 1, -1])
def test_the_attention_of_a_patch_equals_a_softmax_computed_by_hand(model, sample, block):
    weights = by_hand(model, sample, block).mean(0)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        found = attention_to_words(model, sample, (row, column), block).numpy()
        np.testing.assert_allclose(found, weights[1 + 4 * row + column, 1 + LENGTH :], rtol=1e-4)
    patches = weights[[0, 18], 1 : 1 + LENGTH]
    found = attention_to_patches(model, sample, [0, 18], block).numpy()
    np.testing.assert_allclose(found, patches / patches.sum(1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (8, 40)])
def test_a_patch_of_a_native_image_is_selected_by_row_and_column(size):
    torch.manual_seed(0)
    model = M3AE(SIZES.model_copy(update={"resize": "native"})).eval()
    rows, columns = (side // 8 for side in size)
    none = torch.zeros(rows * columns, dtype=torch.bool)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    sample = Sample("a", image, none, tokens=torch.arange(5), text_mask=none[:5])
    weights, patches = by_hand(model, sample, -1).mean(0), iter(range(1, 1 + rows * columns))
    for patch in itertools.product(range(rows), range(columns)):
        found = attention_to_words(model, sample, patch).numpy()
        np.testing.assert_allclose(found, weights[next(patches), 1 + rows * columns :], rtol=1e-4)


def test_attention_differs_between_blocks(model, sample):
    first, last, default = (attention_to_words(model, sample, (1, 1), *block).tolist() for block in ([0], [1], []))
    assert first != last == default


def test_shades_are_proportional_to_attention():
    assert (shade(0, 0.2), shade(0.2, 0.2), shade(0, 0)) == ((255, 255, 255), SHADE, (255, 255, 255))
    assert shade(0.1, 0.2) == tuple(round((255 + end) / 2) for end in SHADE)


class Words:
    """A tokenizer of five tokens."""

    def pieces(self, numbers):
        return [["a", " red", "dish", " old", " boat"][number] for number in numbers]


def test_the_patch_is_outlined_and_each_word_shaded(model, sample, tmp_path, monkeypatch):
    model.tokenizer = Words()
    parts = torch.tensor([0.0, 0.125, 0.0625, 0.25, 0.1875])
    monkeypatch.setattr(attention, "attention_to_words", lambda *_: parts)
    sample.image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    draw_patch_attention(model, [Sample("text"), sample, sample, sample], tmp_path / "a.png", 2, (1, 2))
    sheet = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert len(sheet) == 8 + 2 * 200  # of the three samples with image and caption, two are drawn
    for top in (8, 208):
        image = sheet[top : top + 192, 8:200]
        rows, columns = np.nonzero((image == OUTLINE).all(-1))
        assert [rows.min(), rows.max(), columns.min(), columns.max()] == [48, 95, 96, 143]
        line = sheet[top, 208:]  # the upper edge of the shaded words
        seen = [tuple(colour) for i, colour in enumerate(line) if i == 0 or (colour != line[i - 1]).any()]
        assert [colour for colour in seen if colour != (255, 255, 255)] == [
            shade(part, 0.25) for part in parts[1:].tolist()
        ]
    with pytest.raises(UserError, match="has both a caption and an image with the patch 1,2"):
        draw_patch_attention(model, [Sample("text")], tmp_path / "b.png", 2, (1, 2))


@pytest.mark.parametrize(
    ("patch", "frame"), [((1, 3), (96, 143, 144, 191)), ((3, 1), (144, 191, 96, 143)), ((1, 2), (96, 143, 96, 143))]
)
def test_a_patch_is_outlined_in_images_of_any_aspect_ratio_that_contain_it(tmp_path, monkeypatch, patch, frame):
    """One image is wide, with 2 x 4 patches, and the other is high, with 4 x 2 patches. All four sides of the frame are
    checked."""
    model = M3AE(SIZES.model_copy(update={"resize": "native"})).eval()
    model.tokenizer, words = Words(), torch.arange(5)
    monkeypatch.setattr(attention, "attention_to_words", lambda *_: torch.ones(5))
    images = [torch.full((3, *size), 200, dtype=torch.uint8) for size in ((16, 32), (32, 16))]
    samples = [Sample("pair", image, torch.zeros(8, dtype=torch.bool), words) for image in images]
    draw_patch_attention(model, samples, tmp_path / "a.png", 2, patch)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert len(sheet) == 8 + 200
    rows, columns = np.nonzero((sheet[8:200, 8:200] == OUTLINE).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == frame
    with pytest.raises(UserError, match="image with the patch 2,2"):
        draw_patch_attention(model, samples, tmp_path / "b.png", 2, (2, 2))


def test_the_draw_command_passes_its_options(tmp_path, monkeypatch):
    torch.manual_seed(0)
    run = tiny_run(tmp_path / "run")
    _set_held_out_shard(run, labelled_tar(tmp_path / "val.tar", range(6)))
    choices, real = [], attention.attention_to_words
    monkeypatch.setattr(
        attention, "attention_to_words", lambda *given: choices.append(given[2:]) or real(*given)
    )  # fmt: skip
    out = tmp_path / "a.png"
    base = ["attention", str(run), "--pictures", "2", "--out", str(out)]
    assert main([*base, "--patch", "1,3", "--layers", "1"]) == 0
    assert main([*base, "--patch", "0,0"]) == 0
    assert choices == [((1, 3), 0)] * 2 + [((0, 0), 1)] * 2
    height = Image.open(out).height
    assert main([*base, "--patch", "0,0", "--layers", "all"]) == 0
    assert choices[4:] == [((0, 0), 0), ((0, 0), 1)] * 2 and Image.open(out).height > 1.9 * height
    pictures, heights = set(), []
    for options in ([], ["--layers", "1"], ["--word", "blue"], ["--layers", "1,2"]):
        assert main([*base, *options]) == 0
        pictures.add(out.read_bytes())
        heights.append(Image.open(out).height)
    assert len(pictures) == 4 and heights[0] == heights[1] < heights[3]
    out.unlink()
    for options, message in (
        (["--patch", "4,0"], "patch 4,0: must be from 0,0 to 3,3"),
        (["--layers", "3"], "layers 3: must be all, or numbers from 1 to 2"),
        (["--patch", "1"], "--patch 1: must be ROW,COLUMN"),
        (["--layers", "0"], "--layers 0: must be all, or numbers of blocks from 1"),
        (["--pictures", "0"], "--pictures 0: must be greater than or equal to 1"),
        (["--word", "blue", "--patch", "0,0"], "--patch: cannot be combined with word"),
    ):
        with pytest.raises(UserError, match=message):
            main([*base, *options])
    alone = tiny_run(tmp_path / "alone", vocab_size=0)
    with pytest.raises(UserError, match="is an image-only model"):
        main(["attention", str(alone), "--patch", "0,0", "--val", str(tmp_path / "val.tar"), "--out", str(out)])
    assert not out.exists()
