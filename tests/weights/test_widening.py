"""Weights for grey images start a model for colour images without a change of the features of grey images."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import LossConfig
from m3ae_fast.images.bit_depth import Depth
from m3ae_fast.images.image_kind import Kind
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import Pretrained, check_start, start_for
from m3ae_fast.pretraining.automatic_settings import Shards
from m3ae_fast.pretraining.dataset_statistics import inspect
from m3ae_fast.pretraining.given_weights import given_weights
from m3ae_fast.pretraining.image_settings import fit_to_images
from m3ae_fast.training.init_from import start_from
from tests.helpers.shards import members, write_tar
from tests.test_model import TINY, make_sample

GREY = TINY.model_copy(update={"channels": 1, "image_mean": (0.73,), "image_std": (0.44,), "vocab_size": 0})
COLOUR = GREY.model_copy(update={"channels": 3, "image_mean": (0.2, 0.5, 0.4), "image_std": (0.1, 0.3, 0.2)})
SIDE = GREY.image_size


def grey_model(norm_pix=False):
    """Return a grey model with random weights, including those that are 0 initially."""
    torch.manual_seed(0)
    model = M3AE(GREY, LossConfig(norm_pix=norm_pix)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def widened_model(grey, config=COLOUR, norm_pix=False):
    model = M3AE(config, LossConfig(norm_pix=norm_pix)).double().eval()
    start = start_for(config, Pretrained(grey.config, grey.state_dict()), norm_pix=norm_pix)
    check_start(config, start, "x")
    model.load_state_dict(start.state)
    return model


@pytest.mark.parametrize("channels", [2, 3, 4, 7])
def test_replicated_grey_images_have_the_features_of_the_grey_model(channels):
    of_images = {
        "image_mean": tuple(np.linspace(0.2, 0.6, channels)),
        "image_std": tuple(np.linspace(0.1, 0.4, channels)),
    }
    config, grey = COLOUR.model_copy(update={"channels": channels, **of_images}), grey_model()
    pixels = torch.randint(0, 256, (2, 1, SIDE, SIDE), dtype=torch.uint8)
    before = grey.representation(pixels)
    after = widened_model(grey, config).representation(pixels.repeat(1, channels, 1, 1))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert before.std() > 0.1


@pytest.mark.parametrize("norm_pix", [False, True])
def test_each_channel_is_predicted_as_the_grey_model_predicts_grey(norm_pix):
    """Without norm_pix, the predictions are equal in units in which black is 0 and white is 1."""
    grey = grey_model(norm_pix)
    colour = widened_model(grey, norm_pix=norm_pix)
    sample = make_sample(0, words=None)
    sample.image = sample.image[:1].clone()
    before, _ = grey.predict(pack([sample], grey.geometry))
    sample.image = sample.image.repeat(3, 1, 1)
    after, _ = colour.predict(pack([sample], colour.geometry))
    before, after = before.unflatten(1, (-1, 1)), after.unflatten(1, (-1, 3))
    if not norm_pix:
        before = before * torch.tensor(GREY.image_std) + torch.tensor(GREY.image_mean)
        after = after * torch.tensor(COLOUR.image_std) + torch.tensor(COLOUR.image_mean)
    torch.testing.assert_close(after, before.expand_as(after), rtol=0, atol=1e-5)


def test_gradients_flow_to_all_channels():
    model = widened_model(grey_model()).float()
    model(pack([make_sample(0, words=None)], model.geometry)).loss.backward()
    for grad in (model.patch_embed.weight.grad, model.image_head.weight.grad.T):
        assert (grad.unflatten(-1, (-1, 3)).abs().sum((0, 1)) > 0).all()
    red, green, _ = model.patch_embed.weight.grad.unflatten(-1, (-1, 3)).unbind(-1)
    assert not torch.allclose(red, green)  # the channels differ after a step


def test_a_run_with_more_channels_starts_from_widened_weights(tmp_path):
    grey = grey_model().float()
    grey.save_pretrained(tmp_path / "grey")
    model = M3AE(COLOUR)
    ranks = SimpleNamespace(on_main=lambda read: read(), from_main=lambda value: value)
    line = start_from(model, str(tmp_path / "grey"), ranks)
    assert line.endswith("the input layer is widened from 1 to 3 channels by repeating its weights")
    assert torch.equal(model.patch_embed.weight, widened_model(grey).patch_embed.weight.float())


def test_channels_are_never_dropped(tmp_path):
    model = M3AE(COLOUR)
    start = start_for(GREY, Pretrained(COLOUR, model.state_dict()), norm_pix=False)
    with pytest.raises(UserError, match=r"was trained with model\.channels = 3, but the config has 1"):
        check_start(GREY, start, "there")


def kind(channels, is_array=False, depth=None, low=0.0, high=255.0, dtype="uint8"):
    return Kind(channels, is_array, dtype, 8, 8, depth, low, high)


@pytest.mark.parametrize(
    ("weights", "images", "own", "fitted", "note"),
    [
        (1, [kind(1), kind(3)], [], ["model.channels=3"], "from 1 to 3 channels .* --set model.channels=1 reads"),
        (1, [kind(3)], ["model.channels=1"], [], ""),
        (1, [kind(1)], ["model.channels=3"], [], "from 1 to 3 channels"),
        (1, [kind(1)], [], [], ""),
        (3, [kind(1)], [], [], "the weights have 3 channels: grey images are read as colour images"),
        (4, [kind(3)], [], [], ""),
        (3, [kind(5, True)], [], ["model.channels=5"], "from 3 to 5 channels by repeating its weights, with the mean"),
        (5, [kind(5, True)], [], [], ""),
        (3, [kind(3, True, dtype="uint16")], [], ["model.image_dtype=uint16"], "as uint16, although .* with uint8"),
        (3, [kind(3, True, dtype="uint16")], ["model.image_dtype=uint8"], [], ""),
    ],
)  # fmt: skip
def test_images_are_read_with_all_their_channels_and_bits(weights, images, own, fitted, note):
    found, notes = fit_to_images(start_config(weights), images, None, own)
    assert found == fitted and len(notes) == bool(note)
    assert not note or re.search(note, notes[0])


def start_config(channels, **more):
    of_images = {"channels": channels, "image_mean": (0.5,) * channels, "image_std": (0.2,) * channels}
    return GREY.model_copy(update=of_images | more)


@pytest.mark.parametrize(("weights", "image"), [(5, kind(3)), (5, kind(4, True)), (2, kind(1)), (3, kind(1, True))])
def test_images_with_fewer_channels_that_cannot_be_converted_are_refused(weights, image):
    with pytest.raises(UserError, match=f"--from: the weights have {weights} channels, but the images have"):
        fit_to_images(start_config(weights), [image], None, [])


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (0, 255), (-5, 4000)])
def test_values_outside_the_range_of_the_weights_are_refused_unless_the_user_accepts_them(low, high):
    start, images = (
        start_config(1, value_range=(0.0, 4095.0)),
        [kind(1, depth=Depth("unsigned", 16), low=low, high=high)],
    )
    with pytest.raises(
        UserError, match=r"trained with black = 0 and white = 4095; .* --set model\.value_range=\[0\.0, 4095\.0\]"
    ):
        fit_to_images(start, images, None, [])
    assert fit_to_images(start, images, None, ["model.value_range=[0,4095]"]) == ([], [])
    assert fit_to_images(start, [kind(1, depth=Depth("unsigned", 16), high=4000.0)], None, []) == ([], [])
    assert fit_to_images(start, [kind(1)], None, []) == ([], [])  # levels from 0 to 255 do not depend on the range


def test_colour_photographs_widen_a_grey_model(tmp_path):
    """The widened model has a mean and a standard deviation for each channel, which are computed from the images."""
    M3AE(GREY).save_pretrained(tmp_path / "grey")
    shards = Shards([str(write_tar(tmp_path / "a.tar", members(range(8))))], [], [])
    for own, channels in (([], 3), (["model.channels=3"], 3), (["model.channels=1"], 1)):
        weights = given_weights(str(tmp_path / "grey"), tmp_path / f"run-{channels}", own)
        overrides = [*weights.overrides, *own]
        found, notes = inspect(shards, tmp_path, "cls", None, overrides, start=weights.config, own=own)
        assert len(found.image_mean) == channels
        assert any("is widened from 1 to 3 channels" in note for note in notes) == (channels == 3)
        fitted = [each.partition("=")[0] for each in found.fitted if each != "model.channels=3"]
        assert fitted == (["model.image_mean", "model.image_std"] if channels == 3 else [])
