import json

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.embed import main
from m3ae_fast.embedding.features import embed
from m3ae_fast.weights.open_model import load_model, open_model
from tests.helpers.labelled import labelled_members, labelled_tar, tiny_run
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import picture, write_tar


@pytest.fixture
def features(run, tmp_path):
    """Return a function of shards, a name and options that extracts features and returns the file."""

    def make(shards, name="out.npz", *options):
        given = [shards] if isinstance(shards, str) else shards
        fixed = ["--out", str(tmp_path / name), "--set", "data.workers=0", "--set", "encode.precision=fp32"]
        assert main([str(run), *given, *fixed, *options]) == 0
        return tmp_path / name

    return make


def test_the_table_of_features_contains_keys_features_and_labels(features, tmp_path, run, caplog):
    files = dict(labelled_members(range(5), {3: None}))
    files["00001.png"] = b"broken"
    first = write_tar(tmp_path / "a.tar", files.items())
    second = labelled_tar(tmp_path / "b.tar", range(5, 8))
    file = np.load(features([first, second], "out.npz", "--set", "data.max_bad_fraction=0.2"))
    assert f"1 of 8 samples are left out, for example {first}/00001: " in caplog.text
    assert sorted(file) == ["features", "keys", "labels", "shards"]
    assert file["keys"].tolist() == [f"{i:05d}" for i in (0, 2, 3, 4, 5, 6, 7)]
    assert file["shards"].tolist() == [first] * 4 + [second] * 3
    assert file["labels"].tolist() == [0, 2, -1, 1, 2, 0, 1]
    assert (file["features"].shape, file["features"].dtype) == ((7, 32), np.float32)


def test_features_have_the_pooling_of_the_model_unless_another_one_is_set(tmp_path):
    run = tiny_run(tmp_path / "run", pool="grid2")
    shard = labelled_tar(tmp_path / "a.tar", range(3))
    model, images = load_model(run), {"overrides": ["data.workers=0", "encode.precision=fp32"]}
    found, mean = embed(run, shard, **images), embed(model, shard, overrides=[*images["overrides"], "encode.pool=mean"])
    assert found["features"].shape == (3, 4 * 32) and mean["features"].shape == (3, 32)
    np.testing.assert_array_equal(embed(model, shard, **images)["features"], found["features"])


def test_a_sample_without_a_text_label_has_an_empty_label(features, tmp_path):
    files = dict(labelled_members(range(4)))
    names = [json.loads(files[f"{number:05d}.json"])["name"] for number in range(4)]
    del files["00003.json"]
    file = np.load(features(write_tar(tmp_path / "a.tar", files.items()), "out.npz", "--labels", "json.name"))
    assert file["labels"].tolist() == [*names[:3], ""]


def test_parquet_and_npz_files_have_the_same_content(features, shards):
    options = ["--labels", "json.name", "--patches", "--set", "encode.pool=cls"]
    arrays = np.load(features(shards[1], "a.npz", *options))
    table = parquet.read_table(features(shards[1], "a.parquet", *options))
    assert table.column_names == list(arrays)
    for name in ("keys", "shards", "labels"):
        assert table[name].to_pylist() == arrays[name].tolist()
    for name in ("features", "patches"):
        column = np.stack(table[name].to_numpy())
        assert np.array_equal(column, arrays[name].reshape(len(column), -1))
    assert arrays["patches"].shape == (18, 16, 32)


def test_requested_columns_identify_each_sample(features, tmp_path):
    """The columns contain only the readable samples. A sample without a value has an empty text."""
    files = {}
    for name, content in labelled_members(range(5)):
        files[name] = content
        if name.endswith("json"):
            files[name] = json.dumps({"path": f"red/{name}", "class_name": "Rouge"}).encode()
    files["00001.png"] = b"broken"
    del files["00002.txt"], files["00003.json"]
    shards = [write_tar(tmp_path / "a.tar", files.items()), labelled_tar(tmp_path / "b.tar", range(5, 7))]
    options = ["--columns", "caption,path,class", "--set", "data.max_bad_fraction=0.2"]
    table = parquet.read_table(features(shards, "out.parquet", *options)).to_pydict()
    captions = {n[:5]: c.decode() for n, c in labelled_members(range(7)) if n.endswith("txt")} | {"00002": ""}
    assert table["keys"] == ["00000", "00002", "00003", "00004", "00005", "00006"]
    assert table["caption"] == [captions[key] for key in table["keys"]]
    assert table["path"] == ["red/00000.json", "red/00002.json", "", "red/00004.json", "", ""]
    assert table["class"] == ["Rouge", "Rouge", "", "Rouge", "", ""]


@pytest.mark.slow
def test_features_of_native_images_are_the_same_on_two_ranks(tmp_path):
    """The images have different sizes, one of them cannot be read, and their batches are assigned to the ranks in
    turn."""
    torch.manual_seed(0)
    model = str(tiny_run(tmp_path / "run", resize="native"))
    sizes = [(32, 32), (64, 16), (40, 24), (16, 16)]
    files = [
        (f"{i}.png", b"" if i == 2 else picture(i, sizes[i % 4], fmt="PNG"))
        if kind == "png"
        else (f"{i}.cls", b"%d" % (i % 3))
        for i in range(11)
        for kind in ("png", "cls")
    ]
    shards = [write_tar(tmp_path / "a.tar", files[:10]), write_tar(tmp_path / "b.tar", files[10:])]
    options = [model, *shards, "--patches", "--set", "data.workers=0", "--set", "encode.precision=fp32"]
    options += ["--set", "encode.batch=2", "--set", "data.max_bad_fraction=0.2"]
    assert main([*options, "--out", str(tmp_path / "one.npz")]) == 0
    arguments = [*options, "--out", str(tmp_path / "two.npz")]
    code, output = run_ranks("m3ae_fast.cli.embed", arguments, 2, tmp_path / "log")
    assert code == 0, output
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert [*one] == [*two] == ["keys", "shards", "features", "labels", "patches", "grids"]
    for name in one:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-3)
        else:
            assert one[name].tolist() == two[name].tolist(), name
    kept = [i for i in range(11) if i != 2]
    assert one["keys"].tolist() == [str(i) for i in kept] and one["labels"].tolist() == [i % 3 for i in kept]
    assert one["grids"].tolist() == [[sizes[i % 4][1] // 8, sizes[i % 4][0] // 8] for i in kept]
    filled = one["patches"].any(2).sum(1)
    assert filled.tolist() == [rows * columns for rows, columns in one["grids"].tolist()]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_patch_features_do_not_change_pooled_features(features, shards, pool):
    plain = np.load(features(shards[1], "plain.npz", "--set", f"encode.pool={pool}"))
    patches = np.load(features(shards[1], "patches.npz", "--set", f"encode.pool={pool}", "--patches"))
    np.testing.assert_allclose(patches["features"], plain["features"], rtol=1e-4, atol=1e-5)
    if pool == "mean":
        np.testing.assert_allclose(patches["patches"].mean(1, np.float32), plain["features"], rtol=1e-2, atol=2e-3)


def test_captions_are_encoded_without_their_images(features, shards, run):
    found = np.load(features(shards[1], "text.npz", "--modality", "text"))["features"]
    first = dict(labelled_members([100]))["00100.txt"].decode()
    expected = open_model(str(run), text=True).encode(texts=[first], precision="fp32")[0]
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_user_errors_are_reported_in_one_line_and_nothing_is_written(features, shards, tmp_path, monkeypatch):
    kept = features(shards[1], "kept.npz")
    before = kept.read_bytes()
    for name, options, message in (
        ("kept.npz", [], "already exists"),
        ("new.npz", ["--patches", "--modality", "text"], "texts have no patches"),
        ("new.npz", ["--set", "encode.bath=3"], "unknown key encode.bath; did you mean encode.batch?"),
        (
            "new.npz",
            ["--set", "linear.batch=3"],
            "override linear.batch: embed does not use this setting; did you mean encode.batch?",
        ),
    ):
        with pytest.raises(UserError, match=message):
            features(shards[1], name, *options)
    assert kept.read_bytes() == before
    assert not list(tmp_path.glob("*new*"))


def test_features_without_a_network_are_those_of_the_images_in_shards_or_in_a_folder(tmp_path):
    """The mean and standard deviation, by which pixels are normalised, are those of the readable images."""
    shard = labelled_tar(tmp_path / "a.tar", range(4))
    (tmp_path / "photos").mkdir()
    for name, data in labelled_members(range(4)):
        (tmp_path / "photos" / name).write_bytes(data)
    (tmp_path / "photos/00004.png").write_bytes(b"no image")
    no_workers = ["data.workers=0", "data.max_bad_fraction=0.5"]
    for name, width in (("pixels", 768), ("hog", 900), ("histogram", 64)):
        found, files = (embed(name, source, overrides=no_workers) for source in (shard, tmp_path / "photos"))
        assert found["features"].shape == (4, width) and len(np.unique(found["features"], axis=0)) == 4
        assert found["keys"].tolist() == [f"{i:05d}" for i in range(4)]
        assert files["keys"].tolist() == [f"{i:05d}.png" for i in range(4)]
        np.testing.assert_array_equal(files["features"], found["features"])


def test_the_range_of_images_with_16_bits_in_a_folder_is_that_of_most_images(tmp_path):
    """One image has values far above those of the others, and would reduce their contrast."""
    pixels = np.random.RandomState(0).randint(100, 400, (20, 48, 48)).astype(np.uint16)
    pixels[7] += 60_000
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{number:02d}.png")
    found = embed("histogram", tmp_path, overrides=["data.workers=0"])["features"]
    assert found.shape == (20, 16) and (found[0] > 0).all()
    for number, filled in ((0, 16), (7, 1)):
        assert np.count_nonzero(found[number]) == filled


def test_features_without_a_network_have_neither_patches_nor_captions(tmp_path):
    shard = labelled_tar(tmp_path / "a.tar", range(4))
    for options in ({"patches": True}, {"modality": "text"}):
        with pytest.raises(UserError, match="hog has one vector of features for each image"):
            embed("hog", shard, **options)
