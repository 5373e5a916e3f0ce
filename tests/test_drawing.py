"""Reconstructions show what the model predicted."""

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import drawing
from m3ae_fast.drawing import BLACK, GREEN, GREY, RED, _cut, _images, _join
from m3ae_fast.model.packing import pack
from tests.test_model import PATCHES, TINY, make_model, make_sample


def test_joining_undoes_cutting():
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    assert torch.equal(_join(_cut(image[:, :, :16], 4), 4, 4), image[:, :, :16])
    patches = _cut(image, 8)  # row-major; rows, columns and channels of a patch
    assert torch.equal(patches[4].view(8, 8, 3), image[:, 8:, 8:16].permute(1, 2, 0))


@pytest.mark.parametrize("options", [{}, {"norm_pix": True}, {"image_all_tokens": True}])
def test_perfect_predictions_rebuild_the_picture(options):
    """Targets in place of predictions, in the units of the loss."""
    model = make_model(**options)
    sample = make_sample(3)
    mean, std = (torch.tensor(v).repeat(16) for v in (TINY.image_mean, TINY.image_std))
    targets = (_cut(sample.image, 4) / 255 - mean) / std
    if model.loss_config.norm_pix:
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    rows = torch.ones(PATCHES, dtype=torch.bool) if options.get("image_all_tokens") else sample.image_mask
    original, masked, rebuilt = _images(model, sample.image, sample.image_mask, targets[rows])
    assert torch.equal(original, sample.image)
    assert (rebuilt.int() - sample.image.int()).abs().max() <= 1
    hidden = _cut(masked, 4)[sample.image_mask]
    assert (hidden == GREY).all() and torch.equal(
        _cut(masked, 4)[~sample.image_mask], _cut(original, 4)[~sample.image_mask]
    )
    wrong = _images(model, sample.image, sample.image_mask, targets[rows] + 0.5)[2]
    changed = (_cut(wrong, 4) != _cut(original, 4)).any(-1)
    assert torch.equal(changed, sample.image_mask)


def colours(model, sample, guesses: torch.Tensor, monkeypatch, tmp_path) -> list[tuple[str, tuple]]:
    """(text, colour) of the words that are drawn beside a sample."""
    seen = []

    class Draw:
        def __init__(self, image):
            pass

        def textlength(self, text, font):
            return 8.0 * len(text)

        def text(self, place, text, fill, font):
            if place[1] != 5:  # of the titles
                seen.append((text, fill))

    monkeypatch.setattr(drawing.ImageDraw, "Draw", Draw)
    logits = torch.nn.functional.one_hot(guesses, 31).float()
    pixels = torch.zeros(int(sample.image_mask.sum()), 48)
    monkeypatch.setattr(model, "predict", lambda batch: (pixels, logits), raising=False)
    drawing.draw_reconstructions(model, [sample], None, tmp_path / "out.png")
    return seen


def test_words_are_black_where_seen_green_where_right_and_red_where_wrong(monkeypatch, tmp_path):
    model, sample = make_model(), make_sample(3, words=6)
    sample.text_mask = torch.tensor([True, False, True, True, False, True])
    truth = sample.tokens[sample.text_mask]
    wrong = torch.tensor([False, True, False, True])
    guesses = torch.where(wrong, (truth + 1) % 31, truth)
    t, g = sample.tokens.tolist(), guesses.tolist()
    assert colours(model, sample, guesses, monkeypatch, tmp_path) == [
        (f"{t[0]}", GREEN),
        (f"{t[1]}", BLACK),
        (f"{g[1]} ({t[2]})", RED),
        (f"{t[3]}", GREEN),
        (f"{t[4]}", BLACK),
        (f"{g[3]} ({t[5]})", RED),
    ]


def test_a_sheet_shows_each_sample(tmp_path):
    model = make_model()
    samples = [make_sample(0), make_sample(1, words=None), make_sample(2, image=False)]
    drawing.draw_reconstructions(model, samples, None, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(float)
    rows = [sheet[24 + i * 168 :][:160] for i in range(3)]
    assert [row[:, 8:168].std() > 5 for row in rows] == [True, True, False]
    assert [row[:, 512:].std() > 1 for row in rows] == [True, False, True]
    assert model.training and pack(samples, model.geometry).keys == ["0", "1", "2"]
