"""`pretrain --from`: the settings that follow from the weights, and the initial weights of the run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import checkpoint, pretrain
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.pretrain import parse_args
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.pretraining import final_evaluation
from m3ae_fast.pretraining.automatic_settings import DatasetStatistics, Inputs, Shards, assumed, model_sizes, settings
from m3ae_fast.pretraining.dataset_statistics import inspect
from m3ae_fast.pretraining.given_weights import FOLDER, given_weights
from m3ae_fast.pretraining.model_sizes import MODEL_SIZES
from m3ae_fast.pretraining.size_and_length import Budget
from m3ae_fast.training.throughput_estimate import ThroughputEstimate
from m3ae_fast.weights.converting import convert
from tests.helpers.labelled import labelled_members, labelled_tar, tiny_run
from tests.helpers.mae import MAE
from tests.helpers.shards import write_tar
from tests.helpers.source_shards import find_shards
from tests.test_model import TINY as SMALL

SHARDS = Shards(["a.tar"], ["b.tar"], [])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a run of an untrained tiny model with a tokenizer."""
    torch.manual_seed(1)
    return tiny_run(tmp_path_factory.mktemp("base"))


def test_settings_are_derived_from_the_given_weights(base, tmp_path):
    """The model settings and the tokenizer are taken from the weights. The learning rate is a quarter of the usual one,
    and the warm-up is shorter.
    """
    given = given_weights(str(base), tmp_path, [])
    saved = M3AE.from_pretrained(tmp_path / FOLDER)
    statistics = DatasetStatistics(20_000, 100, 300, [0.1] * 3, [0.2] * 3, 3, 512, 8)
    (size,) = model_sizes(statistics, given.overrides)
    config = settings(Inputs(statistics, SHARDS, tmp_path, given.overrides), size, 64, 1000)
    free = {"size", "init_from", "pool"}
    assert config.model.model_dump(exclude=free) == saved.config.model_dump(exclude=free)
    assert config.model.init_from == str(tmp_path / FOLDER)
    assert config.data.tokenizer == str(tmp_path / FOLDER / "tokenizer.json")
    fresh = [override for override in given.overrides if not override.startswith("model.init_from")]
    usual = settings(Inputs(statistics, SHARDS, tmp_path, fresh), MODEL_SIZES[0], 64, 1000)
    assert config.optim.peak_lr == pytest.approx(usual.optim.peak_lr / 4, rel=1e-2)
    assert 0 < config.optim.warmup_epochs < usual.optim.warmup_epochs / 2
    own = settings(Inputs(statistics, SHARDS, tmp_path, [*given.overrides, "optim.peak_lr=0.5"]), size, 64, 1000)
    assert own.optim.peak_lr == 0.5


def test_pre_training_on_images_continues_from_an_mae_without_a_decoder(tmp_path):
    mae = {name: t for name, t in MAE().state_dict().items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    # it must be given, because the width is not that of a published size
    with pytest.raises(UserError, match="num-heads"):
        given_weights(str(tmp_path / "mae.pth"), tmp_path / "run", [])
    convert(tmp_path / "mae.pth", tmp_path / "converted", num_heads=3)
    given = given_weights(str(tmp_path / "converted"), tmp_path / "run", [])
    assert "model.vocab_size=0" in given.overrides and not any("data." in override for override in given.overrides)
    assert any("the weights contain no decoder, so the decoder is randomly initialised" in note for note in given.notes)


def test_a_decoder_with_cross_attention_starts_from_an_encoder(tmp_path):
    M3AE(SMALL).save_pretrained(tmp_path / "self")
    given = given_weights(str(tmp_path / "self"), tmp_path / "run", ["model.dec_attention=cross"])
    note = (
        "the decoder of the weights was trained with model.dec_attention=self and model.image_targets=pixels, so the "
        "decoder is randomly initialised"
    )
    assert note in given.notes
    assert note not in given_weights(str(tmp_path / "self"), tmp_path / "other", []).notes


def test_the_value_range_is_that_of_the_given_weights(tmp_path):
    deep = SMALL.model_copy(update={"vocab_size": 0, "value_range": (0, 4095)})
    M3AE(deep).save_pretrained(tmp_path / "deep")
    overrides = given_weights(str(tmp_path / "deep"), tmp_path / "run", []).overrides
    (size,) = model_sizes(assumed(overrides), overrides)
    config = settings(Inputs(assumed(overrides), SHARDS, tmp_path, overrides), size, 64, 1000)
    assert config.model.value_range == (0, 4095)
    with pytest.raises(UserError, match=r"does not fit .*, which have model\.value_range=\[0\.0, 4095\.0\]"):
        given_weights(str(tmp_path / "deep"), tmp_path / "run", ["model.value_range=[0,1023]"])


def write_deep(folder, highest):
    """Write grey PNGs of 16 bits, whose values range from 0 to `highest`."""
    folder.mkdir()
    for number in range(20):
        pixels = np.random.RandomState(number).randint(0, highest + 1, (40, 40)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_the_values_of_files_are_compared_with_the_range_of_the_given_weights_before_shards_are_made(tmp_path):
    """Shards store values with 8 bits. Values outside the range of the weights would be clipped, and values that occupy
    only a small part of this range would be rounded to few levels."""
    suits, bright = write_deep(tmp_path / "suits", 4095), write_deep(tmp_path / "bright", 65535)
    for highest, folder in ((4095, bright), (65535, suits)):
        with pytest.raises(UserError, match=f"the weights were trained with black = 0 and white = {highest}; convert"):
            find_shards(str(folder), tmp_path / "run", None, [], start_range=(0, highest))
        assert not (tmp_path / "run").exists()
        find_shards(str(folder), tmp_path / f"accepted {highest}", None, [], (0, highest), start_range=(0, highest))
    assert find_shards(str(suits), tmp_path / "run", None, [], start_range=(0, 4095)).value_range == (0, 4095)


def test_a_note_says_that_the_shards_of_transparent_images_are_opaque(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        pixels = np.random.RandomState(number).randint(0, 256, (40, 40, 4)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    shards = find_shards(str(tmp_path / "photos"), tmp_path / "run", None, [])
    notes = inspect(shards, tmp_path / "run", "cls", None, ["model.channels=4"])[1]
    assert "opaque" in notes[-1]
    assert not [note for note in inspect(shards, tmp_path / "run", "cls")[1] if "opaque" in note]


@pytest.mark.slow
def test_a_run_with_the_value_range_of_the_given_weights_resumes(tmp_path, capsys):
    grey = {"channels": 1, "image_mean": (0.5,), "image_std": (0.2,), "vocab_size": 0, "value_range": (0, 4095)}
    M3AE(SMALL.model_copy(update=grey)).save_pretrained(tmp_path / "deep")
    few = ["train.steps=1", "data.workers=0", "train.pictures=0", "train.precision=fp32"]
    photos = write_deep(tmp_path / "photos", 4095)
    for _ in range(2):
        assert pretrain(photos, tmp_path / "run", start_from=tmp_path / "deep", overrides=few).finished
    assert "its settings are kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="white = 4095; convert the images"):
        pretrain(write_deep(tmp_path / "bright", 65535), tmp_path / "no", start_from=tmp_path / "deep", overrides=few)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.depth=3"],
            r"override model\.depth=3: does not fit the weights \S*base\S*, which have model\.depth=2; leave",
        ),
        (
            ["model.gelu=exact"],
            r'override model\.gelu=exact: does not fit the weights \S*, which have model\.gelu="tanh"; leave it out',
        ),
        (
            ["model.text_length=9", "model.patch_size=4"],
            r"override model\.patch_size=4: .*, which have model\.patch_size=8; leave",
        ),
        (
            ["model.channels=1"],
            r"override model\.channels=1: does not fit the weights \S*, which have model\.channels=3; leave",
        ),
        (["model.size=small"], r"override model\.size=small: does not fit the weights [^,]*; leave it out"),
        (["model.text_length=9", "optim.peak_lr=-1"], "optim.peak_lr"),
    ],
)
def test_a_setting_that_contradicts_the_given_weights_is_refused_at_once(base, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        given_weights(str(base), tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_another_image_size_is_possible_if_position_embeddings_are_computed(base, tmp_path):
    given = given_weights(str(base), tmp_path, ["model.image_size=64"])
    overrides = [*given.overrides, "model.image_size=64"]
    (size,) = model_sizes(assumed(overrides), overrides)
    config = settings(Inputs(assumed(overrides), SHARDS, tmp_path, overrides), size, 64, 1000)
    assert (config.model.image_size, config.model.patch_size) == (64, 8)


def test_files_that_are_not_a_model_are_refused(base, tmp_path):
    (checkpoint_folder,) = checkpoint.saved_steps(base)
    convert(base, tmp_path / "export")
    new = tmp_path / "new"  # a run that was stopped before its first checkpoint
    new.mkdir()
    (new / "config.json").write_text('{"run": {}}')
    (base / "results").mkdir(exist_ok=True)
    for name, message in (
        (tmp_path / "nowhere", "--from .*nowhere: no such file or folder"),
        (new, "--from .*new: this run has no checkpoint yet; continue the run, or specify another model"),
        (tmp_path, "--from .*: the folder contains neither checkpoints nor an exported model"),
        *(
            (folder, f"--from .*: specify the run folder, {base}, or one of the checkpoints in {base}/checkpoints$")
            for folder in (base / "checkpoints", base / "results")
        ),
        (
            checkpoint_folder / "state.json",
            f"--from .*: is one file of a checkpoint .*; specify its folder, {checkpoint_folder}",
        ),
        (
            tmp_path / "export/model.safetensors",
            "--from .*: is one file of .* an export; specify its folder, .*export$",
        ),
        (
            f"random:{base}",
            "--from random:.*: is not a trained model; to start from random weights, leave out --from",
        ),
        ("", "--from: is empty; specify a model"),
    ):
        with pytest.raises(UserError, match=message):
            given_weights(str(name), tmp_path / "run", [])
    args = parse_args(["photos", "--out", "run", "--from", "base"])
    assert args.start_from == "base"


def test_it_is_reported_if_only_the_weights_or_only_the_samples_have_text(base, tmp_path):
    pairs = Shards([str(labelled_tar(tmp_path / "pairs.tar", range(6)))], [], [])
    images = [(name, data) for name, data in labelled_members(range(6)) if not name.endswith(".txt")]
    alone = Shards([str(write_tar(tmp_path / "alone.tar", images))], [], [])
    text = given_weights(str(base), tmp_path / "run", []).overrides
    image = ["model.init_from=start", "model.vocab_size=0"]
    for shards, overrides, words in (
        (alone, text, "there are no captions: the weights for text are kept"),
        (
            pairs,
            image,
            "the captions are ignored, because the initial weights are those of an image-only model",
        ),
        (pairs, text, ""),
        (alone, image, ""),
    ):
        statistics, notes = inspect(shards, tmp_path, "cls", None, overrides)
        matching = [note for note in notes if "the captions are" in note or "no captions" in note]
        assert [words in note for note in matching] == ([True] if words else [])
        assert bool(statistics.vocab_size) == (shards is pairs and overrides is text)
    with pytest.raises(
        UserError, match=r"--from: .* the tokenizer of the weights is missing; .* --set data\.tokenizer=FILE"
    ):
        inspect(pairs, tmp_path, "cls", None, [*text, "data.tokenizer=null"])


def test_the_initial_weights_are_evaluated(tmp_path):
    """The time for this evaluation is part of the plan."""
    statistics, pace = (
        DatasetStatistics(1000, 100, 300, [0.1] * 3, [0.2] * 3, 3, 512, 8),
        ThroughputEstimate(1e-3, 64, 9),
    )
    config = settings(Inputs(statistics, SHARDS, tmp_path), MODEL_SIZES[0], 64, 1000)
    continued = settings(
        Inputs(statistics, SHARDS, tmp_path, [f"model.init_from={tmp_path}"]), MODEL_SIZES[0], 64, 1000
    )
    assert final_evaluation.STARTED not in final_evaluation._models(config)
    assert final_evaluation._models(continued)[final_evaluation.STARTED] == str(tmp_path)
    three, four = (Budget(statistics, True, 1.0, 0.0, models).after(pace) for models in (3, 4))
    assert four > three


@pytest.mark.slow
def test_a_run_starts_from_the_given_weights(base, tmp_path, capsys):
    """With a tiny learning rate, the weights hardly change. A finished run is not trained again."""
    for number in range(24):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 256, (40, 48, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a picture {number}")
    few = ["train.steps=1", "optim.peak_lr=1e-30", "data.workers=0", "train.pictures=0", "train.precision=fp32"]
    found = pretrain(tmp_path / "photos", tmp_path / "run", start_from=base, overrides=few)
    output = capsys.readouterr().out
    assert (
        found.finished and "continuing from the weights in " in output and 'model: "as its weights", width 32' in output
    )
    assert "recipe: " not in output  # no recipe is used
    before, after = checkpoint.read_weights(checkpoint.locate(base)), M3AE.from_pretrained(found.export).state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-20)
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["init_from"].endswith("run/start")
    again = pretrain(tmp_path / "photos", tmp_path / "run", start_from=tmp_path / "gone", overrides=few)
    assert again.finished
