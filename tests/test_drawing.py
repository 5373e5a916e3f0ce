"""Figures show the input and the predictions of the model."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from m3ae_fast.batch.packing import pack
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.drawing.figures import box_in, shown
from m3ae_fast.drawing.reconstructions import (
    BLACK,
    GAP,
    GIVEN_AWAY,
    GREEN,
    GREY,
    HIDDEN,
    RED,
    SIDE,
    TEXT_WIDTH,
    _cut,
    _join,
    _write_captions,
    caption_views,
    draw_reconstructions,
    views_of,
)
from m3ae_fast.model.m3ae import M3AE
from tests.test_model import TINY, make_model, make_sample

SMALL = ModelConfig(
    size=None, emb_dim=8, depth=1, num_heads=1, dec_emb_dim=8, dec_depth=1, dec_num_heads=1,
    image_size=12, patch_size=4, text_length=4, vocab_size=9, image_mean=(0.1, 0.5, 0.9), image_std=(0.2, 0.3, 0.4),
)  # fmt: skip


def test_joining_all_patches_gives_the_image():
    image = torch.arange(3 * 12 * 12).reshape(3, 12, 12)
    assert torch.equal(_join(_cut(image, 4), (3, 3), 4), image)
    assert torch.equal(_cut(image, 4)[1].reshape(4, 4, 3), image[:, :4, 4:8].permute(1, 2, 0))


def test_true_pixels_as_predictions_reproduce_the_image():
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, True, True, False, False, True, False, True])
    mean, std = (torch.tensor(values).repeat(16) for values in (SMALL.image_mean, SMALL.image_std))
    normal = (_cut(image, 4) / 255 - mean) / std
    for loss in (LossConfig(), LossConfig(norm_pix=True), LossConfig(image_all_tokens=True)):
        pixels = normal if loss.image_all_tokens else normal[mask]
        if loss.norm_pix:
            pixels = (pixels - pixels.mean(1, keepdim=True)) / (pixels.var(1, keepdim=True) + 1e-6).sqrt()
        original, masked, rebuilt, *_ = views_of(M3AE(SMALL, loss), image, mask, pixels)
        assert torch.equal(original, image) and torch.equal(rebuilt, image)
        assert torch.equal((_cut(masked, 4) == GREY).all(1), mask)
        assert torch.equal(_cut(masked, 4)[~mask], _cut(image, 4)[~mask])


def test_a_uniform_patch_is_reconstructed_exactly():
    """With loss.norm_pix, a prediction is multiplied by the standard deviation of the true patch, and its mean is
    added. A prediction of zero therefore gives the mean, which is the exact value of all pixels of a uniform patch."""
    sizes = SMALL.model_copy(update={"image_mean": (0.5,) * 3, "image_std": (0.25,) * 3})
    image, mask = torch.full((3, 12, 12), 200, dtype=torch.uint8), torch.arange(9) % 2 == 0
    _, _, rebuilt, _ = views_of(M3AE(sizes, LossConfig(norm_pix=True)), image, mask, torch.zeros(5, 48))
    assert torch.equal(rebuilt, image)


def test_the_zero_prediction_shows_what_a_figure_takes_from_the_original():
    """With loss.norm_pix, a figure takes the mean and the standard deviation of each patch from the original.
    Therefore, a prediction of zero is drawn as the mean of the true patch."""
    sizes = SMALL.model_copy(update={"image_mean": (0.5,) * 3, "image_std": (0.25,) * 3})
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) % 2 == 0
    model = M3AE(sizes, LossConfig(norm_pix=True))
    *_, rebuilt, zero = views_of(model, image, mask, torch.randn(5, 48, generator=torch.Generator().manual_seed(1)))
    patches = _cut(image, 4).float()
    patches[mask] = patches[mask].mean(1, keepdim=True).round().expand(-1, 48)
    assert (zero - _join(patches, (3, 3), 4)).abs().max() <= 1 and not torch.equal(rebuilt, zero)
    # without norm_pix, nothing is taken from the original, so there is no fourth picture
    assert len(views_of(M3AE(sizes), image, mask, torch.zeros(5, 48))) == 3


def test_a_figure_of_standardised_patches_states_what_it_takes_from_the_original(tmp_path, monkeypatch):
    """The error is stated relative to that of the zero prediction, so it is 1 for a model that predicts zero."""
    model, written = make_model(norm_pix=True), []
    with torch.no_grad():
        model.image_head.weight.zero_()
        model.image_head.bias.zero_()
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, *args, **style: (written.append(args[1]), write(self, *args, **style))
    )
    draw_reconstructions(model, [make_sample(0), make_sample(2, image=False)], None, tmp_path / "sheet.png")
    for text in (
        "zero prediction",
        *GIVEN_AWAY,
        "Squared error of the reconstructions: 1.00 times that of the zero prediction.",
    ):
        assert text in written
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 4 * (SIDE + GAP) + TEXT_WIDTH
    columns = [sheet[24 : 24 + SIDE, GAP + i * (SIDE + GAP) :][:, :SIDE] for i in range(4)]
    assert (columns[2] == columns[3]).all() and (columns[2] != columns[1]).any()
    written.clear()
    draw_reconstructions(model, [make_sample(2, image=False)], None, tmp_path / "sheet.png")
    assert not set(GIVEN_AWAY) & set(written)  # there are no images


def test_correct_words_are_green_and_incorrect_words_are_red():
    shown = caption_views(torch.tensor([4, 5, 6]), torch.tensor([False, True, True]), {1: 5, 2: 7}, None)
    assert shown["caption"] == [(" 4", BLACK), (" 5", BLACK), (" 6", BLACK)]
    assert [word for word, _ in shown["masked"]] == [" 4", f" {HIDDEN}", f" {HIDDEN}"]
    assert shown["predicted"] == [(" 4", BLACK), (" 5", GREEN), (" 7", RED)]


def test_a_sheet_shows_each_sample(tmp_path, monkeypatch):
    model, written, write = make_model(), [], ImageDraw.ImageDraw.text

    def text(self, place, what, **style):
        written.append((*place, what))
        write(self, place, what, **style)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    samples = [make_sample(0), make_sample(1, words=None), make_sample(2, image=False)]
    draw_reconstructions(model, samples, None, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(float)
    rows = [sheet[24 + i * 168 :][:160] for i in range(3)]
    assert [row[:, 8:168].std() > 5 for row in rows] == [True, True, False]
    assert [row[:, 512:].std() > 1 for row in rows] == [True, False, True]
    titles = [what.partition(";")[0] for x, y, what in sorted(written) if y == 5]
    assert titles == ["original", "masked", "reconstruction", "caption"]
    sheet = Image.open(tmp_path / "sheet.png").crop((0, 24, 3 * (SIDE + GAP), 24 + SIDE))
    with torch.no_grad():
        pixels_IK, _ = model.eval().predict(pack(samples[:1], model.geometry))
    for number, image in enumerate(views_of(model, samples[0].image, samples[0].image_mask, pixels_IK)):
        column = sheet.crop((GAP + number * (SIDE + GAP), 0, (number + 1) * (SIDE + GAP), SIDE))
        assert np.abs(np.asarray(column).astype(int) - np.asarray(shown(image, SIDE)).astype(int)).max() <= 1, number


def test_a_figure_does_not_depend_on_the_tokens_on_which_the_loss_is_computed(tmp_path):
    """Visible patches and words are shown unchanged, and masked ones as predicted with the same weights."""
    sheets = set()
    for losses in ({}, {"image_all_tokens": True}, {"text_all_tokens": True}):
        draw_reconstructions(make_model(**losses), [make_sample(0), make_sample(1)], None, tmp_path / "sheet.png")
        sheets.add((tmp_path / "sheet.png").read_bytes())
    assert len(sheets) == 1


def inks(sheet: Image.Image, top: int, height: int) -> set[str]:
    """Return the colours of the words in a horizontal band of a figure. Antialiased edges are mixed with white."""
    left = 3 * (SIDE + GAP) + GAP + 64
    r, g, _ = np.asarray(sheet.crop((left, top, sheet.width, top + height))).astype(int).reshape(-1, 3).T
    found = {"red": r - g > 60, "green": g - r > 60, "black": np.maximum(r, g) < 100}
    return {name for name, pixels in found.items() if pixels.any()}


def test_predicted_words_are_coloured_by_correctness(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.text_head.bias[5] = 1e3  # the model predicts 5 for every word
    samples = [make_sample(0, words=4), make_sample(1, words=4)]
    for sample, word in zip(samples, (5, 7)):
        sample.tokens, sample.text_mask = torch.full((4,), word), torch.tensor([True, True, False, True])
    draw_reconstructions(model, samples, None, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    for number, colour in enumerate(("green", "red")):
        lines = [inks(sheet, 24 + number * (SIDE + GAP) + line * 22, 20) for line in range(3)]
        assert lines == [{"black"}, {"black"}, {"black", colour}]


def width(words: list[str]) -> tuple[int, int]:
    """Return the width and the height in pixels that words occupy in a line of captions."""
    row = Image.new("RGB", (3 * (SIDE + GAP) + TEXT_WIDTH + 200, 400), "white")
    _write_captions(ImageDraw.Draw(row), {"": [(word, BLACK) for word in words]}, 3 * (SIDE + GAP))
    left, top, right, bottom = ImageOps.invert(row).getbbox()
    return right - left, bottom - top


def test_word_pieces_are_joined_and_lines_are_broken_only_between_words():
    assert width(["play", "ing"]) == width(["playing"]) == width([" play", "ing"])
    assert width(["play", " ing"])[0] > width(["playing"])[0]
    one_line, many = width([" word"] * 4), width([" word"] * 40)
    assert many[0] <= TEXT_WIDTH and many[1] > 3 * one_line[1]


def test_the_height_of_a_row_fits_a_long_caption(tmp_path):
    model = make_model(TINY.model_copy(update={"text_length": 200}))
    sheets = []
    for words in (4, 200):
        samples = [make_sample(0, words=words), make_sample(1, words=4)]
        samples[0].text_mask = torch.arange(words) % 4 > 0
        draw_reconstructions(model, samples, None, tmp_path / "sheet.png")
        sheets.append(Image.open(tmp_path / "sheet.png").convert("L"))
    short, long = (sheet.height for sheet in sheets)
    assert short == 24 + 2 * (SIDE + GAP) and long > short + SIDE
    end = long - SIDE - GAP  # end of the long row
    assert sheets[1].crop((600, end - 60, 900, end - GAP)).getextrema()[0] < 128  # the last words are visible


def test_a_sheet_is_drawn_without_stochastic_depth_in_any_mode_of_the_model(tmp_path):
    model = make_model(TINY.model_copy(update={"drop_path": 0.5}))
    sheets = []
    for training in (True, True, False):
        model.train(training)
        draw_reconstructions(model, [make_sample(0), make_sample(1)], None, tmp_path / "sheet.png")
        assert model.training is training
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert len(set(sheets)) == 1


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    height=st.integers(1, 600), width=st.integers(1, 600), side=st.integers(1, 200), channels=st.sampled_from([1, 3])
)
@example(height=1, width=600, side=128, channels=3)
@example(height=600, width=1, side=128, channels=1)
def test_an_image_is_shown_uncropped_in_the_centre_of_a_square(height, width, side, channels):
    image = torch.full((channels, height, width), 40, dtype=torch.uint8)
    sheet = np.asarray(shown(image, side))
    assert sheet.shape == (side, side, 3)
    rows, columns = np.nonzero((sheet == 40).all(-1))
    assert (sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 40).all()
    sizes = rows.max() + 1 - rows.min(), columns.max() + 1 - columns.min()
    assert box_in(image, side) == (columns.min(), rows.min(), sizes[1], sizes[0])
    assert max(sizes) == side
    for size, first, own in zip(sizes, (rows.min(), columns.min()), (height, width)):
        assert abs(size - side * own / max(height, width)) <= 0.5 or size == 1
        assert first == (side - size) // 2
