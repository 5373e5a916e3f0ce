"""The statistics that `pretrain` derives from images, captions and labels. The settings that it chooses from them agree
with the settings that the user gives with `--set`."""

import re
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from m3ae_fast import checkpoint, pretrain
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import train_tokenizer
from m3ae_fast.cli.pretrain import main
from m3ae_fast.config import load_config
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.images.bit_depth import Depth
from m3ae_fast.images.image_kind import Kind
from m3ae_fast.pretraining.automatic_settings import Inputs, Shards, assumed, by_setting, check_overrides, settings
from m3ae_fast.pretraining.dataset_statistics import inspect
from m3ae_fast.pretraining.image_settings import range_of
from m3ae_fast.pretraining.model_sizes import MODEL_SIZES
from m3ae_fast.pretraining.size_and_length import Budget, _lines
from m3ae_fast.shards.problem_counts import Tally
from m3ae_fast.shards.tokenizer_training import caption_texts
from m3ae_fast.training.throughput_estimate import ThroughputEstimate
from tests.helpers.labelled import labelled_members
from tests.helpers.shards import caption, members, picture, write_tar
from tests.helpers.source_shards import find_shards

RANDOM = np.random.RandomState(0)


def _png(values, mode=None):
    out = BytesIO()
    Image.fromarray(values, mode).save(out, "PNG")
    return out.getvalue()


def _npy(values):
    out = BytesIO()
    np.save(out, values)
    return out.getvalue()


def _tiff(values, **options):
    out = BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


def _levels(*shape):
    return RANDOM.randint(0, 256, shape).astype(np.uint8)


def _deep(*shape, most=65535):
    values = RANDOM.randint(0, most + 1, shape).astype(np.uint16)
    values.flat[:2] = 0, most
    return values


def _grey_colours():
    return np.repeat(_levels(24, 20, 1), 3, axis=2)


def _grey_and_alpha():
    return np.stack((_levels(24, 20), np.full((24, 20), 255, np.uint8)), axis=2)


# for each kind of image: the suffix of its files, a function that returns the bytes of a file, and the channels, dtype
# and value range that the model must have
IMAGES = {
    "grey": ("png", lambda: _png(_levels(24, 20)), 1, "uint8", None),
    "grey, stored as colour": ("png", lambda: _png(_grey_colours()), 1, "uint8", None),
    "grey with alpha": ("png", lambda: _png(_grey_and_alpha()), 1, "uint8", None),
    "colour": ("png", lambda: _png(_levels(24, 20, 3)), 3, "uint8", None),
    "colour with alpha": ("png", lambda: _png(_levels(24, 20, 4)), 3, "uint8", None),
    "16 bits": ("png", lambda: _png(_deep(24, 20)), 1, "uint8", "dtype"),
    "two bands": ("npy", lambda: _npy(_levels(24, 20, 2)), 2, "uint8", None),
    "a TIFF of two": ("tif", lambda: _tiff(_levels(24, 20, 2), planarconfig="contig"), 2, "uint8", None),
    "a TIFF of four": ("tif", lambda: _tiff(_levels(24, 20, 4), photometric="rgb", extrasamples=[0]), 4, "uint8", None),
    "thirteen bands of 16 bits": ("npy", lambda: _npy(_deep(24, 20, 13)), 13, "uint16", "dtype"),
    "floats from 0 to 1": ("npy", lambda: _npy(RANDOM.rand(24, 20, 3).astype(np.float32)), 3, "float32", "dtype"),
}  # fmt: skip


def _folder(root, suffix, make, count=8):
    """Write `count` images of two classes."""
    for number in range(count):
        path = root / ("ab"[number % 2]) / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make())
    return root


@pytest.mark.parametrize("kind", IMAGES)
def test_channels_dtype_and_range_of_the_model_are_those_of_the_images(tmp_path, kind):
    """The images come from a folder, and from shards that contain its files unchanged."""
    suffix, make, channels, dtype, value_range = IMAGES[kind]
    photos = _folder(tmp_path / "photos", suffix, make)
    files = [(f"{path.stem}.{suffix}", path.read_bytes()) for path in sorted(photos.rglob(f"*.{suffix}"))]
    own = Shards([write_tar(tmp_path / "a.tar", files[:6])], [write_tar(tmp_path / "b.tar", files[6:])], [])
    for shards in (find_shards(str(photos), tmp_path / "run", None, []), own):
        statistics, _ = inspect(shards, tmp_path / "run", "cls")
        config = settings(Inputs(statistics, shards, tmp_path / "run"), MODEL_SIZES[0], 2, 9)
        m = config.model
        assert (m.channels, m.image_dtype, m.value_range) == (channels, dtype, value_range)
        assert len(m.image_mean) == len(m.image_std) == channels
        assert np.allclose(m.image_mean, 0.5, atol=0.25) and min(m.image_std) > 0.05


def test_truncated_shards_are_named(tmp_path):
    files = [(f"{number}.png", _png(_levels(24, 20, 3))) for number in range(8)]
    shards = [write_tar(tmp_path / f"{number}.tar", files) for number in range(5)]
    for path in map(Path, shards[:4]):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, notes = inspect(Shards(shards[1:], shards[:1], []), tmp_path / "run", "cls")
    assert [note.partition(":")[0] for note in notes[1:4]] == [*shards[1:4]]
    assert notes[4:] == ["further damaged or unreadable shards: 1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _png(_deep(24, 20, most=4095)),
            r"unsigned 16-bit values, which range from 0 to 4095 .*model.value_range=\[0,4095\]; ",
        ),
        (
            lambda: _npy(_deep(24, 20, 2, most=900)),
            r"unsigned 16-bit values, which range from 0 to 900 .*model.value_range=\[0,1023\]",
        ),
        (
            lambda: _npy(np.full((24, 20), 7, np.float32)),
            r"float 32-bit values, which range from 7 to 7 .*=dtype sets 0 and 1",
        ),
    ],
)
def test_the_values_of_black_and_white_must_be_given_if_they_are_not_evident(tmp_path, make, message):
    suffix = "npy" if make().startswith(b"\x93NUMPY") else "png"
    photos = _folder(tmp_path / "photos", suffix, make)
    with pytest.raises(UserError, match=message):
        find_shards(str(photos), tmp_path / "run", None, [])
    assert not (tmp_path / "run/shards").exists()


@pytest.mark.parametrize(("high", "white"), [(256, 511), (1000, 1023), (4095, 4095), (4096, 8191), (40_000, 65_535)])
def test_the_proposed_value_range_contains_all_values_and_corresponds_to_a_bit_depth(high, white):
    deep = Kind(1, True, "uint16", 8, 8, Depth("unsigned", 16), 0, high)
    with pytest.raises(
        UserError, match=rf"--set model\.value_range=\[0,{white}\]; model\.value_range=dtype sets 0 and 65535"
    ):
        range_of([deep])


def test_channels_set_by_the_user_are_used(tmp_path):
    photos = _folder(tmp_path / "photos", "png", lambda: _png(_levels(24, 20)))
    shards = find_shards(str(photos), tmp_path / "run", None, [])
    for override, channels in (("model.channels=3", 3), ("model.image_mean=[0.5,0.5,0.5]", 3), ("model.size=small", 1)):
        statistics, _ = inspect(shards, tmp_path / "run", "cls", None, [override])
        config = settings(Inputs(statistics, shards, tmp_path / "run", [override]), MODEL_SIZES[0], 2, 9)
        assert config.model.channels == channels == len(config.model.image_std)


def _chosen(*overrides, statistics=None):
    shards, statistics = Shards(["a.tar"], ["b.tar"], []), statistics or assumed(overrides)
    return settings(Inputs(statistics, shards, Path("r"), overrides), MODEL_SIZES[1], 64, 100)


# each setting that `pretrain` chooses, with another value, and an expression that must hold then
SETTINGS = {
    "model.channels=1": "m.channels == len(m.image_mean) == len(m.image_std) == 1",
    "model.channels=13": "m.channels == len(m.image_mean) == 13",
    "model.image_mean=[0.1]": "m.image_mean == (0.1,) and len(m.image_std) == m.channels == 1",
    "model.image_std=[0.1,0.2]": "m.image_std == (0.1, 0.2) and m.channels == 2",
    'model.image_dtype="float32"': "m.image_dtype == 'float32'",
    "model.image_size=64": "m.image_size == 64 and 64 % m.patch_size == 0",
    "model.patch_size=5": "m.patch_size == 5 and m.image_size % 5 == 0",
    "model.text_length=20": "m.text_length == 20",
    "model.vocab_size=0": "m.vocab_size == 0 and c.data.train[0].modality == 'image' and c.data.tokenizer is None",
    "data.tokenizer=null": "m.vocab_size == 0 and c.data.tokenizer is None",
    "model.size=base": "m.emb_dim == 768",
    "model.num_heads=6": "m.num_heads == 6",
    "model.emb_dim=240": "m.emb_dim == 240",
    "model.depth=2": "m.depth == 2",
    "model.dec_emb_dim=64": "m.dec_emb_dim == 64",
    "model.dec_depth=1": "m.dec_depth == 1",
    "model.dec_num_heads=2": "m.dec_num_heads == 2",
    "loss.norm_pix=false": "not c.loss.norm_pix",
    "data.crop_scale=[0.1,1]": "c.data.crop_scale == (0.1, 1)",
    "deepspeed={}": "c.deepspeed is not None",
    "data.repeats=2": "c.data.repeats == 2 and o.warmup_epochs == 0.25",  # an epoch has twice as many steps
    "model.value_range=[0,4095]": "m.value_range == (0, 4095)",
    "model.pool=cls": "m.pool == 'cls'",
    "data.val=[]": "not c.data.val and t.probe is None",
    "data.show_channels=[5,1,0]": "m.channels == 6",
    "optim.peak_lr=1e-3": "o.peak_lr == 1e-3",
    "optim.warmup_epochs=2": "o.warmup_epochs == 2",
    "optim.clip_grad=null": "o.clip_grad is None",
    'optim={"clip_grad":2}': "o.clip_grad == 2 and o.peak_lr > 1e-3",  # the learning rate is still chosen
    "train.global_batch=32": "t.global_batch == 32 and o.warmup_epochs == 0.25",
    "train.steps=20": "t.steps == 20 and o.warmup_epochs == 0.1 and t.eval_every == t.save_every == 10",
    "train.epochs=2": "t.epochs == 2 and t.steps is None and o.warmup_epochs == 0.1 and t.save_every == 10",
    "train.log_every=3": "t.log_every == 3",
    "train.eval_every=null": "t.eval_every is None",
    "train.eval_samples=7": "t.eval_samples == 7",
    "train.save_every=7": "t.save_every == 7",
    "train.probe=null": "t.probe is None",
    "train.probe.k=7": "t.probe.k == 7",
    'train={"epochs":2}': "t.epochs == 2 and t.hours is t.probe is None and o.warmup_epochs == 0.1",
}


@pytest.mark.parametrize("override", SETTINGS)
def test_each_single_override_leads_to_a_consistent_config(tmp_path, override):
    """The statistics are assumed to fit the setting. `pretrain` also makes this assumption when it checks the overrides
    before it opens the samples."""
    check_overrides([override])
    c = _chosen(override, statistics=assumed([override], samples=640))
    assert eval(SETTINGS[override], {"c": c, "m": c.model, "t": c.train, "o": c.optim, "len": len})
    assert load_config(_written(tmp_path, c)) == load_config(_written(tmp_path, c), by_setting([override])) == c


def _written(folder, config):
    (folder / "config.json").write_text(config.model_dump_json())
    return folder / "config.json"


def test_every_automatic_setting_has_a_test_of_its_override():
    """Settings that follow from the arguments of the command are an exception."""
    config = _chosen().model_dump(exclude_unset=True)
    chosen = {f"{section}.{key}" for section in config if config[section] for key in config[section]}
    assert chosen - {override.partition("=")[0] for override in SETTINGS} == {"run.dir", "data.train", "train.hours"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.0.shards=x.tar", "override data.train.0.shards: use SOURCE instead"),
        ('data.val=[{"shards":"x.tar"}]', r"override data.val: can be only \[\] .* with SOURCE or --val"),
        ("train.probe.labels=json.x", "override train.probe.labels: use --labels instead"),
        ("model.init_from=runs/a", "override model.init_from: use --from instead"),
        ("model.image_targets=vqgan", "data.image_tokenizer: model.image_targets vqgan needs the folder of a VQGAN"),
        ("train.steps=null", "set the length of the run: epochs or steps"),
        ("model.num_heads=7", r"emb_dim \d+ is not divisible by num_heads 7"),
        ('data={"flip":false}', "override data: use SOURCE, --val and --set data.KEY instead"),
        ("train=5 train.epochs=3", "train.epochs=3: train is a value, not a section"),
        ("model=null model.size=base", "model.size=base: model is null"),
        ('model={"init_from":"a"}', "override model.init_from: use --from instead"),
        ("model=null", r"model: input should be an object \(got null\)"),
        ('train={"steps":5} train.probe.k=3', "train.probe.train is missing"),
        ("train.steps=5 train.epochs=3", "set epochs or steps, not both"),
        ("train.epochs=3 train.steps=5", "set epochs or steps, not both"),
        ("train.epochs=1e308", "train.epochs: input should be less than or equal to 1000000"),
        (f"train.epochs={10**400}", "train.epochs: input should be"),
        (f"train.epochs=0.5 data.repeats={10**400}", "data.repeats: input should be"),
        (f"train.steps={10**400}", r"overrides: train.steps: input should be [^()]*\(got 10+\.*\)$"),
        ("model.channels=99999999999", "model.channels: input should be less than or equal to 256"),
        ("data.show_channels=[0,1,99999999999]", "the model has channels 0 to 255"),
    ],
)
def test_contradicting_settings_are_refused_in_one_line_before_any_work(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as caught:
        pretrain(tmp_path / "nothing", tmp_path / "run", overrides=override.split())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", [1, -1])
def test_no_override_is_lost_in_any_order_of_the_overrides(order):
    c = _chosen(*["train.hours=2", "train.steps=7", "model.emb_dim=96", "model.size=small"][::order])
    assert (c.train.hours, c.train.steps, c.model.emb_dim, c.model.depth) == (2, 7, 96, 12)


def test_image_tokens_are_compatible_with_the_chosen_settings(tmp_path):
    (tmp_path / "vqgan").mkdir()
    overrides = ["model.image_targets=vqgan", f"data.image_tokenizer={tmp_path}/vqgan"]
    check_overrides(overrides)
    config = _chosen(*overrides)
    assert config.model.channels == 3 and not config.loss.norm_pix


def test_a_missing_setting_of_a_probe_is_reported():
    with pytest.raises(UserError, match=r"override train\.probe\.k: there is no probe, because .* with --labels"):
        _chosen("train.probe.k=7", statistics=replace(assumed([]), classes=0))


def _captioned(path, count):
    files = [
        (name, data)
        for i in range(count)
        for name, data in ((f"{i}.jpg", picture(i)), (f"{i}.txt", f"{caption(i)} {i}".encode()))
    ]
    return write_tar(path, files)


def test_the_vocabulary_size_set_by_the_user_is_used(tmp_path):
    shards = Shards([_captioned(tmp_path / "a.tar", 30)], [], [])
    sizes = {}
    for override in ("model.vocab_size=60", "model.vocab_size=0", "data.tokenizer=null", "model.text_length=9"):
        sizes[override] = inspect(shards, tmp_path, "cls", None, [override])[0].vocab_size
    train_tokenizer([caption(i) for i in range(9)], 50).save(str(tmp_path / "mine.json"))
    mine = inspect(shards, tmp_path / "other", "cls", None, [f"data.tokenizer={tmp_path}/mine.json"])[0].vocab_size
    assert [*sizes.values()][:3] == [60, 0, 0] and 0 < mine <= 50 < sizes["model.text_length=9"]
    assert not (tmp_path / "other").exists()
    with pytest.raises(
        UserError, match=r"model.vocab_size=9999: the captions yield a vocabulary of \d+ tokens; set this size"
    ):
        inspect(shards, tmp_path, "cls", None, ["model.vocab_size=9999"])


def test_a_subset_of_many_captions_is_read(tmp_path, monkeypatch):
    """The subset consists of evenly spaced samples from evenly spaced shards."""
    monkeypatch.setattr("m3ae_fast.shards.tokenizer_training._SHARDS", 2)
    for shard in range(6):
        files = [(f"{i}.txt", f"{shard} {i}".encode()) for i in range(10)]
        write_tar(tmp_path / f"{shard}.tar", files)
    names = [f"{tmp_path}/{{0..5}}.tar"]
    found = [list(caption_texts(names, ShardStore(), Tally(), most)) for most in (4, 30, 60, None)]
    assert found[0] == ["0 0", "0 9", "5 0", "5 9"]
    assert len(found[1]) == 30 and {text[0] for text in found[1]} == {"0", "2", "5"}
    assert found[2] == found[3] == [f"{shard} {i}" for shard in range(6) for i in range(10)]


def test_unusable_samples_are_reported(tmp_path):
    files = [*members(range(4)), ("9.jpg", picture(1)[:-300])]
    _, notes = inspect(Shards([write_tar(tmp_path / "a.tar", files)], [], []), tmp_path, "cls")
    assert any(re.match("1 of 5 inspected samples cannot be used: the image is damaged", note) for note in notes)


def test_missing_labels_that_were_requested_end_the_command_before_training(tmp_path):
    """For labels that the user did not request, only a note is printed."""

    def labelled(name):
        files = [
            (f"{n}.{end}", data) for n in range(4) for end, data in (("jpg", picture(n)), ("cls", b"%d" % (n % 2)))
        ]
        return write_tar(tmp_path / f"{name}.tar", files)

    train, val = map(labelled, ("train", "val"))
    shards = Shards([train], [val], [])
    assert inspect(shards, tmp_path / "run", "cls")[0].classes > 1
    with pytest.raises(UserError, match=r"--labels json\.nope: .*nope"):
        inspect(shards, tmp_path / "run", "json.nope")


@pytest.mark.slow
def test_a_run_is_trained_on_an_imbalanced_folder_of_grey_images_with_splits_and_labels(tmp_path, capsys):
    """The folder has the layout of ImageFolder and a table of labels. The data are inspected first, and the model is
    one for grey images."""
    root = tmp_path / "cells"
    rows = ["path,site,caption"]
    for split, counts in {"train": (18, 6, 3), "val": (6, 3, 2)}.items():
        for name, count in zip(("broken", "cracked", "dark"), counts):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                path = f"{split}/{name}/{number}.png"
                Image.fromarray(_levels(24, 20)).save(root / path)
                rows.append(f"{path},{'north' if number % 2 else 'south'},a {name} cell")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    line = [str(root), "--out", str(tmp_path / "run"), "--hours", "0.001", "--labels", "json.site"]
    line += [part for each in ("data.workers=0", "train.steps=2", "train.pictures=0") for part in ("--set", each)]
    assert main([*line, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.index("trained on") < output.index("length: 2 steps")
    for text in (
        "3: broken 18, cracked 6, dark 3",
        '"a broken cell"',
        "grey, 20 x 24 px",
        "27 samples and 11 held out",
    ):
        assert text in output
    assert "classes by json.site: 2: south 14, north 13" in output and "2 classes" in output
    assert main([*line, "--set", "train.probe=null"]) == 0
    config = load_config(tmp_path / "run/config.json")
    assert config.model.channels == 1 and config.model.vocab_size > 0
    assert checkpoint.locate(tmp_path / "run").name == "step-00000002" and (tmp_path / "run/export").is_dir()


@pytest.mark.parametrize(
    ("overrides", "with_captions", "without"),
    [
        ([], "captions of up to 8 tokens (vocabulary: ", "no captions: image-only; "),
        (["model.vocab_size=0"], "captions are not used: image-only; ", "no captions: image-only; "),
        (["data.tokenizer=null", "model.vocab_size=9"], "captions are not used; ", "no captions; "),
    ],
)
def test_the_plan_distinguishes_missing_captions_from_captions_that_are_not_used(
    tmp_path, overrides, with_captions, without
):
    pairs = list(labelled_members(range(6)))
    images = [(name, data) for name, data in pairs if not name.endswith(".txt")]
    for files, words in ((pairs, with_captions), (images, without)):
        shards = Shards([str(write_tar(tmp_path / f"{len(files)}.tar", files))], [], [])
        statistics, _ = inspect(shards, tmp_path / "run", "cls", None, overrides)
        assert f"held out; {words}" in plan_of(statistics, shards, overrides)[0]


def test_the_plan_states_that_images_are_flipped_unless_the_user_excludes_it(tmp_path):
    shards = Shards([str(write_tar(tmp_path / "a.tar", labelled_members(range(6))))], [], [])
    statistics, _ = inspect(shards, tmp_path / "run", "cls")
    assert [line for line in plan_of(statistics, shards, []) if "--set data.flip=false" in line]
    assert not [line for line in plan_of(statistics, shards, ["data.flip=false"]) if "flip" in line]


def plan_of(statistics, shards, overrides):
    """Return the lines of the plan of a run of the smallest model."""
    config = settings(Inputs(statistics, shards, Path("run"), overrides), MODEL_SIZES[0], 4, 1000, hours=1.0)
    budget = Budget(statistics, False, 1.0, time.monotonic())
    return _lines(config, budget, MODEL_SIZES[0], "", ThroughputEstimate(1e-3, 64, 9))
