"""Shards are made from folders, HDF5 files and Hugging Face datasets."""

import io
import json
import os
import re
import signal
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import datasets
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.sparse.csgraph import connected_components

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli.shards import main
from m3ae_fast.data.shard_names import INDEX_SUFFIX
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.shards import making, writer
from m3ae_fast.shards.duplicate_images import join
from m3ae_fast.shards.held_out import split_images, without_whole_classes
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.sources.folder import Folder
from m3ae_fast.shards.sources.huggingface import HuggingFace
from m3ae_fast.shards.sources.interface import to_int
from m3ae_fast.shards.sources.registry import kind_of_source
from tests.helpers.shards import caption, picture
from tests.helpers.source_shards import find_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """Write two classes of five images each, of which the first three have captions."""
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(picture(i, size=(80, 60)))
            if i < 3:
                (tmp_path / "in" / name / f"{i}.txt").write_text(f"a {name}, {caption(i)}\n")
    return tmp_path / "in"


def make(source, out, *options, workers=1):
    words = ["make", source, "--out", out, *options, "--workers", workers]
    return exit_cleanly(partial(main, [*map(str, words)]))


def contents(out, pattern="*.tar"):
    """Return the samples of all shards in the order of the shards' names, each as {suffix: bytes}."""
    samples = {}
    for path in sorted(out.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples.setdefault((path.name, key), {})[suffix] = tar.extractfile(member).read()
    return list(samples.values())


def test_a_folder_with_classes_and_captions_is_converted(tmp_path, pictures, capsys):
    (pictures / "dog" / "4.jpg").write_bytes(picture(1)[:-200])
    out = tmp_path / "a new/folder"
    assert make(pictures, out, "--short-side", "30", "--samples-per-shard", "4") == 0
    output = capsys.readouterr().out
    for text in (
        "9 samples in 3 shards",
        "6 paired, 3 image-only",
        "1 skipped sample that cannot be used",
        "dog/4.jpg: the image is damaged",
    ):
        assert text in output
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    samples = {json.loads(sample["json"])["path"]: sample for sample in contents(out)}
    assert sorted(samples) == [
        f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5) if (name, i) != ("dog", 4)
    ]
    for path, sample in samples.items():
        name, number = path[:3], int(path[4])
        assert sample["cls"] == str(["cat", "dog"].index(name)).encode()
        assert json.loads(sample["json"]) == {"path": path, "class_name": name, "label": int(sample["cls"])}
        assert sample.get("txt") == (f"a {name}, {caption(number)}".encode() if number < 3 else None)
        assert decode_image(sample["jpg"], 3).shape == (3, 30, 40)
    assert list(samples) != sorted(samples)  # the samples are shuffled
    assert len(list(out.glob("*" + INDEX_SUFFIX))) == 3


def test_suffixes_and_names_of_splits_may_be_written_in_capitals(tmp_path):
    for number, name in enumerate(["TRAIN/cat/0.JPG", "TRAIN/dog/1.Png", "TRAIN/dog/2.jpeg", "Val/cat/3.JPEG"]):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, fmt="PNG" if name.endswith("Png") else "JPEG"))
        path.with_suffix(".TXT").write_text(f"caption {number}")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    for pattern, captions in (("train-*.tar", {"caption 0", "caption 1", "caption 2"}), ("val-*.tar", {"caption 3"})):
        samples = contents(tmp_path / "out", pattern)
        assert {sample["txt"].decode() for sample in samples} == captions
        assert all({"jpg", "jpeg", "png"} & sample.keys() for sample in samples)


def test_the_same_input_gives_bitwise_identical_shards(tmp_path, pictures):
    options = ("--samples-per-shard", "3", "--held-out", "0.2")
    assert make(pictures, tmp_path / "one", *options) == 0
    assert make(pictures, tmp_path / "two", *options, workers=3) == 0
    names = [path.name for path in sorted((tmp_path / "one").glob("*.tar"))]
    assert names == [f"train-{i:05d}.tar" for i in range(3)] + ["val-00000.tar"]
    for name in (*names, "classes.json", "conversion.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    seen = [json.loads(sample["json"])["path"] for sample in contents(tmp_path / "one")]
    assert len(seen) == len(set(seen)) == 10


def test_progress_within_a_shard_is_shown_with_several_workers(tmp_path, pictures, monkeypatch):
    """A shard may have ten thousand samples, so finished shards are not enough to show progress."""
    out, seen, gate, shrink = tmp_path / "out", [], tmp_path / "gate", writer.as_member

    def held_up(*arguments):
        if len(written := list((tmp_path / "counts").iterdir())) == 4:  # four of ten samples are written
            for _ in range(200):
                if gate.exists():
                    break
                time.sleep(0.05)
        (tmp_path / "counts" / str(len(written))).touch()
        return shrink(*arguments)

    @contextmanager
    def progress(title, total):
        def advance(count):
            seen.append((count, any(out.glob("*.tar"))))
            if sum(each for each, _ in seen) >= 2:
                gate.touch()

        yield advance

    (tmp_path / "counts").mkdir()
    monkeypatch.setattr(writer, "as_member", held_up)
    monkeypatch.setattr(writer, "progress", progress)
    monkeypatch.setattr(writer, "_TICK_S", 0.05)
    assert make(pictures, out, "--samples-per-shard", "5", workers=2) == 0
    assert sum(count for count, _ in seen) == 10
    assert sum(count for count, whole in seen if not whole) >= 2, "progress is shown before the first shard is complete"


def test_an_interrupted_conversion_is_resumed(tmp_path, pictures, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert make(pictures, whole, "--samples-per-shard", "3") == 0
    done, shrink = [], writer.as_member

    def stop(*arguments):
        done.append(1)
        if len(done) == 5:
            raise OSError(28, "No space left on device")
        return shrink(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "as_member", stop)
        assert make(pictures, out, "--samples-per-shard", "3") == 2
    assert "No space left on device); complete shards are kept" in capsys.readouterr().err
    assert [path.name for path in sorted(out.iterdir())] == ["classes.json", "conversion.json", "train-00000.tar"]
    (out / ".train-00001.tar.partial").write_bytes(b"of a process that was killed")
    assert make(pictures, out, "--samples-per-shard", "3") == 0
    assert not list(out.glob(".*"))
    for path in whole.glob("*.tar"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "as_member", lambda *arguments: pytest.fail("converted again"))
        assert make(pictures, out, "--samples-per-shard", "3") == 0
    for change in (["--short-side", "20"], ["--flat"], []):
        if not change:  # the file was truncated
            os.truncate(out / "conversion.json", 99)
        assert make(pictures, out, "--samples-per-shard", "3", *change) == 2
        assert "contains shards of another conversion" in capsys.readouterr().err


def test_a_worker_that_fails_leaves_no_incomplete_shards_of_the_others(tmp_path, pictures, monkeypatch):
    out, add = tmp_path / "out", writer.add_member

    def stop(tar, name, data):
        """Fail in the second shard once the first one has been begun. The process that writes the first shard waits."""
        add(tar, name, data)
        if tar.name.endswith(".train-00000.tar.partial"):
            time.sleep(60)
        while not (out / ".train-00000.tar.partial").exists():
            time.sleep(0.01)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "add_member", stop)
    assert make(pictures, out, "--samples-per-shard", "5", workers=2) == 2
    assert [path.name for path in sorted(out.iterdir())] == ["classes.json", "conversion.json"]


def test_ctrl_c_while_workers_start_is_not_lost(tmp_path, pictures, monkeypatch):
    """Python ignores exceptions that are raised in hooks around a fork, such as those of logging. A KeyboardInterrupt
    in such a hook must not be lost."""
    once: list[int] = []
    os.register_at_fork(after_in_parent=lambda: once and os.kill(os.getpid(), once.pop()))

    class Pool(writer.ProcessPoolExecutor):
        def submit(self, *work):
            if not self._processes:
                once.append(signal.SIGINT)
            return super().submit(*work)

    monkeypatch.setattr(writer, "ProcessPoolExecutor", Pool)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # other tests may have left another handler
    try:
        assert make(pictures, tmp_path / "out", "--samples-per-shard", "5", workers=2) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not once
    # otherwise, the thread and Python's exit could close the pool's pipe at the same time, which Python reports
    assert not [thread for thread in threading.enumerate() if "ExecutorManager" in type(thread).__name__]
    assert make(pictures, tmp_path / "out", "--samples-per-shard", "5") == 0


TABLES = {
    "csv": '\ufefffile_name,caption\ncat/0.jpg,"one, two"\ncat/0.jpg,three\ndog/1.jpg,\n',
    "tsv": "path\tTEXT\ncat/0.jpg\tone, two\ncat/0.jpg\tthree\ndog/1.jpg\t\n",
    "jsonl": '{"image": "cat/0.jpg", "caption": "one, two"}\n\n{"image": "./cat/0.jpg", "caption": "three"}\n'
    '{"image": "dog/1.jpg", "caption": null}\n',
}


@pytest.mark.parametrize("kind", [*TABLES, "parquet"])
def test_captions_are_read_from_a_table(tmp_path, pictures, kind):
    table = tmp_path / f"captions.{kind}"
    if kind == "parquet":
        rows = {"image": ["cat/0.jpg", "cat/0.jpg", "dog/1.jpg"], "caption": ["one, two", "three", None]}
        pyarrow.parquet.write_table(pyarrow.table(rows), table)
    else:
        table.write_text(TABLES[kind])
    assert make(pictures, tmp_path / "out", "--captions", table, "--flat", "--keep-order") == 0
    samples = contents(tmp_path / "out")
    found = [(json.loads(sample["json"])["path"], sample.get("txt")) for sample in samples]
    others = [(f"{name}/{i}.jpg", None) for name in ("cat", "dog") for i in range(5)][1:]
    assert found == [("cat/0.jpg", b"one, two"), ("cat/0.jpg", b"three"), *others]
    assert not any("cls" in sample for sample in samples)


def _different_images(split, samples):
    numbers = np.arange(samples)
    return SimpleNamespace(
        splits={split: samples}, images=lambda _: numbers, rows=lambda _: samples, classes_of=lambda _: None
    )


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize(("samples", "share"), [(10, 0.28), (10, 0.22), (10, 0.01), (1000, 0.0348), (7, 0.5), (2, 0.1)])
def test_the_number_of_held_out_samples_is_nearest_to_the_fraction(samples, share, keep_order):
    """At least one sample is held out, and each sample is either held out or trained on."""
    settings = writer.Settings(samples_per_shard=6, held_out=share, keep_order=keep_order)
    shards, _ = writer._plan(_different_images("train", samples), settings)
    val, train = ([shard.numbers for shard in shards if shard.name.startswith(name)] for name in ("val", "train"))
    val, train = np.concatenate(val).tolist(), np.concatenate(train).tolist()
    assert len(val) == 1 or abs(len(val) - share * samples) <= 0.5
    assert sorted(val + train) == list(range(samples))
    assert ((val, train) == (sorted(val), sorted(train))) == (keep_order or samples == 2)


@pytest.mark.parametrize(("split", "rest"), [("train", "train"), ("extra", "extra"), ("test", "train")])
def test_remaining_shards_keep_the_name_of_their_split_unless_it_means_held_out(split, rest):
    shards, _ = writer._plan(_different_images(split, 10), writer.Settings(held_out=0.2))
    assert {shard.name.partition("-")[0] for shard in shards} == {rest, "val"}


def test_a_field_called_label_is_not_replaced_by_the_class():
    files = writer._files(writer.Record(None, "a cat", 3, {"label": "tabby"}), writer.Settings())
    assert json.loads(files["json"]) == {"label": "tabby"} and files["cls"] == b"3"


@pytest.mark.parametrize("keep_order", [False, True])
def test_samples_are_shuffled_unless_their_order_is_kept(tmp_path, keep_order):
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / f"in/{number}.png").write_bytes(picture(number, fmt="PNG"))
    making.make(tmp_path / "in", tmp_path / "out", keep_order=keep_order, workers=1)
    with tarfile.open(tmp_path / "out/train-00000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
    assert len(names) == 9 and (names == sorted(names)) == keep_order


def test_samples_joined_by_either_of_two_relations_form_connected_components():
    random = np.random.default_rng(0)
    for count in (1, 2, 9, 40):
        first, second = random.integers(0, count, (2, count))
        joined = join(first, second)
        same = (first[:, None] == first) | (second[:, None] == second)
        _, expected = connected_components(same)
        assert ((joined[:, None] == joined) == (expected[:, None] == expected)).all()


@pytest.mark.parametrize("label", [1.5, np.float32(1.5), np.float64(1.5), np.nan, np.float32("inf"), "a", "1.0"])
def test_a_label_is_a_whole_number(label):
    assert [to_int(number) for number in (3, 3.0, np.float32(3), np.int8(3), "3", None)] == [3] * 5 + [None]
    with pytest.raises(BadSample, match="is not an integer"):
        to_int(label)


def test_small_jpegs_are_copied_unchanged(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(picture(1))
    grey = picture(2, mode="L", fmt="PNG")
    (tmp_path / "in" / "b.png").write_bytes(grey)
    (tmp_path / "in" / "c.jpg").write_bytes(picture(3, mode="CMYK"))
    (tmp_path / "in" / ".hidden.jpg").write_bytes(b"nothing")
    assert make(tmp_path / "in", tmp_path / "out", "--keep-order") == 0
    first, second, third = (sample["jpg"] for sample in contents(tmp_path / "out"))
    assert first == picture(1)
    assert Image.open(io.BytesIO(second)).format == "JPEG"
    assert (decode_image(second, 3).float() - decode_image(grey, 3).float()).abs().mean() < 3
    assert Image.open(tmp_path / "in" / "c.jpg").mode == "CMYK" and third != picture(3, mode="CMYK")


def test_labels_follow_the_given_list_of_classes(tmp_path, pictures, capsys):
    (tmp_path / "classes.json").write_text('["bird", "dog", "cat"]')
    assert make(pictures, tmp_path / "out", "--classes", tmp_path / "classes.json") == 0
    for sample in contents(tmp_path / "out"):
        assert sample["cls"] == {"cat": b"2", "dog": b"1"}[json.loads(sample["json"])["class_name"]]
    (tmp_path / "classes.json").write_text('["dog"]')
    assert make(pictures, tmp_path / "other", "--classes", tmp_path / "classes.json") == 2
    assert "'cat'" in capsys.readouterr().err


def _hdf5(path, **fields):
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            if isinstance(values[0], bytes):
                data = file.create_dataset(name, len(values), h5py.vlen_dtype(np.uint8))
                for i, value in enumerate(values):
                    data[i] = np.frombuffer(value, np.uint8)
            else:
                file[name] = values
    return path


def test_hdf5_files_of_pairs_and_of_text_are_converted(tmp_path):
    captions = [caption(i).encode() for i in range(4)] + ["grün".encode(), b""]
    path = _hdf5(tmp_path / "pairs.hdf5", jpg=[picture(i) for i in range(6)], caption=captions)
    assert make(path, tmp_path / "out", "--keep-order") == 0
    samples = contents(tmp_path / "out")
    assert [sample.get("txt", b"") for sample in samples] == captions
    assert [sample["jpg"] for sample in samples] == [picture(i) for i in range(6)]
    path = _hdf5(tmp_path / "text.hdf5", text=["one", "two", "three"])
    assert make(path, tmp_path / "text", "--keep-order") == 0
    assert contents(tmp_path / "text") == [{"txt": b"one"}, {"txt": b"two"}, {"txt": b"three"}]


def test_an_hdf5_file_of_imagenet_is_converted(tmp_path):
    parts = {"train_jpg": [picture(i) for i in range(5)], "train_labels": [3, 1, 4, 1, 5]}
    parts |= {"val_jpg": [picture(i) for i in range(5, 7)], "val_labels": [9, 2]}
    path = _hdf5(tmp_path / "imagenet.hdf5", **parts)
    assert make(path, tmp_path / "out", "--samples-per-shard", "2", workers=2) == 0
    found = [{(sample["jpg"], int(sample["cls"])) for sample in contents(tmp_path / "out", p)} for p in ("t*r", "v*r")]
    assert found == [set(zip(parts[f"{name}_jpg"], parts[f"{name}_labels"])) for name in ("train", "val")]


def test_a_fractional_label_is_named_and_skipped(tmp_path, capsys):
    path = _hdf5(tmp_path / "t.hdf5", train_jpg=[picture(i) for i in range(3)], train_labels=[0.5, 1.0, np.inf])
    assert make(path, tmp_path / "out") == 0
    assert [sample["cls"] for sample in contents(tmp_path / "out")] == [b"1"]
    assert "train_jpg 0: the label np.float64(0.5) is not an integer" in capsys.readouterr().out


def test_an_empty_hdf5_file_is_refused(tmp_path, capsys):
    with h5py.File(tmp_path / "none.hdf5", "w") as file:
        file.create_dataset("jpg", (0,), h5py.vlen_dtype(np.uint8))
    assert make(tmp_path / "none.hdf5", tmp_path / "out") == 2
    assert "no sample can be used" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def dataset():
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": [datasets.Value("string")],
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "id": datasets.Value("int64"),
        }
    )
    rows = {
        "image": [{"bytes": picture(i), "path": None} for i in range(4)],
        "caption": [["one", "two"], ["three"], [], ["four", "five", "six"]],
        "label": [0, 1, -1, 1],
        "id": [10, 11, 12, 13],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_hugging_face_dataset_is_converted(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    assert make(tmp_path / "saved", tmp_path / "out", "--keep-order") == 0
    samples = contents(tmp_path / "out")
    expected = [
        (0, "one", 0),
        (0, "two", 0),
        (1, "three", 1),
        (2, None, None),
        *((3, w, 1) for w in ["four", "five", "six"]),
    ]
    assert len(samples) == len(expected)
    for sample, (number, text, label) in zip(samples, expected):
        assert sample["jpg"] == picture(number)
        assert sample.get("txt") == (text and text.encode())
        assert sample.get("cls") == (None if label is None else str(label).encode())
    assert json.loads(samples[0]["json"]) == {"class_name": "cat", "label": 0}
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]


def test_the_case_of_column_names_does_not_matter(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "usual")
    dataset.rename_columns({"image": "Image", "caption": "CAPTION", "label": "Label"}).save_to_disk(tmp_path / "other")
    for name in ("usual", "other"):
        assert make(tmp_path / name, tmp_path / f"from {name}") == 0
    found = contents(tmp_path / "from other")
    assert len(found) == 7 and found == contents(tmp_path / "from usual")


def test_a_row_with_an_empty_image_becomes_a_text_only_sample(tmp_path):
    rows = {"image": [{"bytes": None, "path": None}], "caption": ["a cat"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows, features.arrow_schema), tmp_path / "data" / "train.parquet")
    assert make(tmp_path / "data", tmp_path / "out") == 0
    (sample,) = contents(tmp_path / "out")
    assert sample["txt"] == b"a cat" and "jpg" not in sample


def test_splits_and_columns_of_a_dataset_can_be_selected(tmp_path, dataset, capsys):
    plain = dataset.map(lambda row: {"title": "a " + str(row["id"])}, remove_columns="caption")
    datasets.DatasetDict(train=plain.select(range(3)), test=plain.select([3])).save_to_disk(tmp_path / "saved")
    names = ["--caption-column", "title", "--label-column", "id"]
    assert make(tmp_path / "saved", tmp_path / "out", *names) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["test-00000.tar", "train-00000.tar"]
    assert {(s["txt"], s["cls"]) for s in contents(tmp_path / "out")} == {
        (b"a %d" % i, b"%d" % i) for i in range(10, 14)
    }
    assert make(tmp_path / "saved", tmp_path / "one", "--split", "test", *names) == 0
    assert [path.name for path in (tmp_path / "one").glob("*.tar")] == ["test-00000.tar"]
    assert make(tmp_path / "saved", tmp_path / "two", "--held-out", "0.5") == 2
    assert "is already split (train, test)" in capsys.readouterr().err


def test_a_split_without_usable_columns_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(picture(1))
    for number in range(9):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"no image")
    assert make(tmp_path / "in", tmp_path / "out", "--held-out", "0.1") == 2
    assert re.search(
        r"no sample of train can be used; the first error is: \d.jpg: the file is not an image", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "good.jpg").unlink()
    assert make(tmp_path / "in", tmp_path / "out", "--held-out", "0.1") == 2
    assert "all 9 samples have the same image, so none of them can be held out" in capsys.readouterr().err
    (tmp_path / "in" / "1.jpg").write_bytes(b"another image")
    assert make(tmp_path / "in", tmp_path / "out", "--held-out", "0.99") == 2
    assert "--held-out 0.99: holds out all 9 samples; lower it" in capsys.readouterr().err


def test_ignored_columns_of_a_dataset_are_named(tmp_path, dataset, capsys):
    """The message also names a column that has a usual name but an unusual type."""
    odd = dataset.map(lambda row: {"text": {"en": "a"}, "targets": [0, 1]}, remove_columns="caption")
    odd.save_to_disk(tmp_path / "saved")
    capsys.readouterr()
    assert make(tmp_path / "saved", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "3 unused columns:\n    id: Value('int64')\n    targets: List(Value('int64'))\n" in out
    assert out.endswith("    text: {'en': Value('string')}\n")


@pytest.mark.parametrize("change", [{"remove_columns": "caption"}, {"labels": ["dog", "cat"]}])
def test_splits_with_different_columns_are_refused(tmp_path, dataset, capsys, change):
    """If the splits were accepted, their labels would be mistaken for classes with other names."""
    other = dataset.remove_columns(change["remove_columns"]) if "remove_columns" in change else dataset
    if "labels" in change:
        other = dataset.cast_column("label", datasets.ClassLabel(names=change["labels"]))
    column = "label" if "labels" in change else "caption"
    datasets.DatasetDict(train=dataset, test=other).save_to_disk(tmp_path / "saved")
    capsys.readouterr()
    assert make(tmp_path / "saved", tmp_path / "out") == 2
    assert (
        f"the type of the column {column} differs between test and train; choose one of them with --split"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_different_columns_or_splits_of_a_dataset_are_different_conversions(tmp_path, dataset):
    both = dataset.map(lambda row: {"title": "a " + str(row["id"])})
    datasets.DatasetDict(train=both.select(range(3)), test=both.select([3])).save_to_disk(tmp_path / "saved")

    def identity(split=None, **columns):
        return json.dumps(HuggingFace(str(tmp_path / "saved"), SourceOptions(split=split, **columns)).identity)

    ways = [{}, {"caption_column": "title"}, {"label_column": "id"}, {"split": "train"}, {"split": "test"}]
    assert len({identity(**way) for way in ways}) == len(ways)
    assert identity() == identity()


def test_classes_in_another_order_are_a_different_conversion(pictures):
    orders = (["cat", "dog"], ["dog", "cat"], ["cat", "dog", "emu"])
    assert len({json.dumps(Folder(pictures, SourceOptions(classes=classes)).identity) for classes in orders}) == 3
    assert Folder(pictures, SourceOptions(classes=orders[0])).identity == Folder(pictures, SourceOptions()).identity


def _mistakes(folder):
    """Return command lines and the error that each must have. Nothing may be written."""
    (folder / "empty").mkdir()
    (folder / "in" / "captions.csv").write_text("image,caption\ncat/0.jpg,one\ncat/77.jpg,two\n")
    (folder / "in" / "columns.csv").write_text("a,b\n1,2\n")
    (folder / "in" / "broken.jsonl").write_text('{"image": "cat/0.jpg", "caption": "one"}\n{"image"\n')
    (folder / "no.hdf5").write_bytes(b"no")
    _hdf5(folder / "other.hdf5", images=[1, 2])
    _hdf5(folder / "uneven.hdf5", jpg=[picture(1)], caption=["one", "two"])
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "broken").mkdir()
    (folder / "broken" / "a.jpg").write_bytes(b"no image")
    table = [folder / "in", "OUT", "--captions"]
    yield [folder / "empty", "OUT"], "contains no images"
    yield [folder / "nowhere", "OUT"], "is neither a folder, nor an HDF5 file"
    yield [folder / "broken", "OUT"], "no sample can be used; the first error is:"
    yield [*table, folder / "in/captions.csv"], "1 of 2 rows refer to images that are not in .*'cat/77.jpg' .row 2."
    yield [*table, folder / "in/columns.csv"], "has the columns a, b; specify one of them with --image-column"
    yield [*table, folder / "in/captions.csv", "--caption-column", "title"], "--caption-column title"
    yield [*table, folder / "in/broken.jsonl"], "row 2 cannot be read"
    yield [*table, folder / "in/none.csv"], "No such file"
    yield [*table, folder / "in/cat/0.txt"], "must be a .csv"
    yield [folder / "in", folder / "full"], "is not empty"
    yield [folder / "in", "OUT", "--short-side", "0"], "--short-side 0: must be greater than or equal to 1"
    yield [folder / "in", "OUT", "--held-out", "1"], "--held-out 1"
    yield [folder / "no.hdf5", "OUT"], "not an HDF5 file"
    yield [folder / "none.hdf5", "OUT"], "No such file"
    yield [folder / "other.hdf5", "OUT"], "has images, but needs jpg"
    yield [folder / "uneven.hdf5", "OUT"], "different lengths .jpg 1, caption 2."
    datasets.Dataset.from_dict({"number": [1]}).save_to_disk(folder / "saved")
    yield [folder / "saved", "OUT", "--split", "none"], "--split none: .* has only the splits train"
    yield [folder / "saved", "OUT"], "has the columns number; choose one with --image-column"


def test_user_errors_are_reported_in_one_line_and_leave_no_files(tmp_path, pictures, capsys):
    mistakes = list(_mistakes(tmp_path))
    capsys.readouterr()
    for number, (arguments, message) in enumerate(mistakes):
        out = tmp_path / f"out-{number}"
        assert make(*[out if argument == "OUT" else argument for argument in arguments]) == 2, message
        output = capsys.readouterr().err
        assert output.count("\n") == 1 and re.search(message, output), output
        assert not out.exists()
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


def test_two_processes_cannot_write_shards_to_the_same_folder(tmp_path, pictures, capsys):
    from m3ae_fast.shards.output_claim import claimed

    with claimed(tmp_path / "out", {"source": {}, "settings": {}}, None):
        assert make(pictures, tmp_path / "out") == 2
    assert "another process is writing shards" in capsys.readouterr().err


def test_the_type_of_a_source_is_recognised(tmp_path, pictures):
    (tmp_path / "parquet/data").mkdir(parents=True)
    (tmp_path / "parquet/data/train.parquet").touch()
    (tmp_path / "parquet/README.md").touch()
    datasets.Dataset.from_dict({"number": [1]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/a.jpg").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/cat").symlink_to(pictures / "cat")
    (tmp_path / "linked/captions.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "capitals").mkdir()
    (tmp_path / "capitals/A.JPG").touch()
    (tmp_path / "capitals/CAPTIONS.CSV").touch()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/TRAIN.PARQUET").touch()
    (tmp_path / "a.h5").touch()
    (tmp_path / "B.H5").touch()
    _hdf5(tmp_path / "without a suffix", jpg=[1, 2])
    (tmp_path / "notes").write_text("no source")
    for name, kind in (
        ("in", "folder"),
        ("parquet", "huggingface"),
        ("saved", "huggingface"),
        ("linked", "folder"),
        ("empty", "folder"),
        ("capitals", "folder"),
        ("tables", "huggingface"),
        ("a.h5", "hdf5"),
        ("B.H5", "hdf5"),
        ("none.hdf5", "hdf5"),
        ("without a suffix", "hdf5"),
    ):
        assert kind_of_source(str(tmp_path / name)) == kind, name
    assert kind_of_source("owner/name") == kind_of_source("mnist") == "huggingface"
    for name in ("images/", "./images", str(tmp_path / "none"), str(tmp_path / "notes")):
        with pytest.raises(UserError, match="is neither a folder, nor an HDF5 file"):
            kind_of_source(name)
    with pytest.raises(UserError, match=r"add --captions .*CAPTIONS\.CSV"):
        kind_of_source(str(tmp_path / "capitals/CAPTIONS.CSV"))
    with pytest.raises(UserError, match="SOURCE is empty"):
        kind_of_source("")


def test_images_are_held_out_with_equal_probability_whatever_their_number_of_copies():
    """100 samples have different images, and 5 images have 4 to 16 copies each. About 17 of the 144 samples are held
    out."""
    copies = np.repeat(np.arange(100, 105), [4, 6, 8, 10, 16])
    images = np.random.default_rng(0).permutation(np.concatenate([np.arange(100), copies]))
    wanted, draws = 17, 3000
    held = np.array([np.bincount(images[split_images(images, wanted, seed)], minlength=105) for seed in range(draws)])
    samples = np.bincount(images)
    assert all(np.isin(count, (0, whole)).all() for count, whole in zip(held.T, samples))
    share = wanted / len(images)
    error = (share * (1 - share) / draws) ** 0.5
    assert (abs((held > 0).mean(0) - share) < 5 * error).all()
    assert abs(held.sum(1).mean() - wanted) < 0.5 and abs(held.sum(1) - wanted).max() < 16
    assert (split_images(images, wanted) == split_images(images + 7, wanted)).all()


def test_an_image_with_too_many_samples_is_held_out_only_if_all_have_too_many():
    assert not any(split_images(np.repeat([0, 1, 2], [11, 9, 9]), 10, seed)[:11].any() for seed in range(50))
    assert (split_images(np.repeat([0, 1], [60, 40]), 10) == np.repeat([False, True], [60, 40])).all()


def test_a_class_of_which_all_images_would_be_held_out_is_only_trained_on(tmp_path):
    """Such a class is not held out, because an evaluation needs training samples of each class."""
    for number, name in enumerate(["cat"] * 12 + [f"rare{i}" for i in range(12)]):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{number}.jpg").write_bytes(picture(number))
    assert make(tmp_path / "in", tmp_path / "out", "--held-out", 0.5) == 0
    train, val = (
        [int(sample["cls"]) for sample in contents(tmp_path / "out", f"{split}-*.tar")] for split in ("train", "val")
    )
    assert {*train} == {*range(13)} and {*val} == {0} and len(train) + len(val) == 24
    held, images = np.array([True, True, False, False]), np.array([0, 1, 2, 3])
    assert without_whole_classes(held, images, np.array(["a", "b", "c", "c"])).tolist() == held.tolist()
    held, images = np.array([True, True, True, False]), np.array([0, 0, 1, 2])  # copies of an image in two classes
    assert without_whole_classes(held, images, np.array(["a", "b", "b", "b"])).tolist() == [False, False, True, False]


def test_groups_and_identical_images_are_joined_and_stay_in_one_split(tmp_path, pictures, capsys):
    """The families are joined through identical images: cat/I.jpg and dog/I.jpg are copies of one image."""
    families = {"cat": "aabcd", "dog": "eeebf"}  # cat/0 to 3 and dog/0 to 3 form one group, cat/4 and dog/4 another
    rows = [f"{name}/{i}.jpg,{families[name][i]}" for name in families for i in range(5)]
    (pictures / "table.csv").write_text("\n".join(["image,family", *rows]))
    options = ("--captions", pictures / "table.csv", "--caption-column", "", "--flat", "--held-out", 0.3)
    for group in ("json.family", "family"):
        assert make(pictures, tmp_path / group, *options, "--group", group) == 0
        assert "5 of 10 images are copies of another image" in capsys.readouterr().out
        val = {json.loads(sample["json"])["path"] for sample in contents(tmp_path / group, "val-*.tar")}
        assert val == {"cat/4.jpg", "dog/4.jpg"}
    assert make(pictures, tmp_path / "family", *options) == 2
    assert "contains" in capsys.readouterr().err


def test_a_note_compares_the_number_of_held_out_samples_with_the_requested_number(tmp_path, capsys):
    """Groups of 12 and 8 samples cannot be divided into 18 and 2 samples."""
    for number in range(20):
        (tmp_path / f"in/{'ab'[number % 5 > 2]}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/{'ab'[number % 5 > 2]}/{number}.jpg").write_bytes(picture(number))
    note = (
        "8 of 20 samples (40%) are held out instead of 2 (10%), because samples with the same image or folder are in "
        "the same split"
    )
    assert make(tmp_path / "in", tmp_path / "out", "--held-out", 0.1, "--group", "folder") == 0
    assert f"{note}\n" in capsys.readouterr().out
    assert make(tmp_path / "in", tmp_path / "alone", "--held-out", 0.1) == 0
    assert "instead of" not in capsys.readouterr().out
    found = find_shards(str(tmp_path / "in"), tmp_path / "run", None, [], group="folder")
    assert note in found.notes


def test_a_group_that_no_sample_has_is_an_error_that_lists_the_fields(tmp_path, pictures):
    (pictures / "table.csv").write_text("image,caption,family\ncat/0.jpg,a cat,3\n")
    more = {"captions": pictures / "table.csv", "held_out": 0.3, "workers": 1}
    message = "--group caption: no sample has this field; choose from folder, path, class_name, family"
    with pytest.raises(UserError, match=message):
        making.make(pictures, tmp_path / "out", group="caption", **more)
    assert not (tmp_path / "out").exists()


def test_a_column_called_folder_is_not_confused_with_the_folder_of_an_image(tmp_path, pictures):
    (pictures / "table.csv").write_text("image,caption,folder\ncat/0.jpg,a cat,3\n")
    more = {"captions": pictures / "table.csv", "held_out": 0.3, "workers": 1}
    with pytest.raises(UserError, match=r"the table has a column of this name; use json\.folder for the column"):
        making.make(pictures, tmp_path / "out", group="folder", **more)
    assert not (tmp_path / "out").exists()


def test_images_with_more_than_8_bits_that_are_reduced_are_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(4):
        values = np.random.RandomState(number).randint(0, 65536, (40, 40)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"in/{number}.png")
        np.save(tmp_path / f"in/array{number}.npy", values)
        (tmp_path / f"in/ordinary{number}.jpg").write_bytes(picture(number))
    assert make(tmp_path / "in", tmp_path / "out", "--value-range", "dtype", "--keep-order") == 0
    assert "4 images with more than 8 bits per channel, reduced to 8 bits" in capsys.readouterr().out


def test_a_group_may_be_the_folder_of_an_image_or_a_column_of_a_dataset(tmp_path):
    for number in range(12):
        (tmp_path / f"in/{number // 2}/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/{number // 2}/a/{number}.jpg").write_bytes(picture(number))
    making.make(tmp_path / "in", tmp_path / "out", held_out=0.34, group="folder", workers=1)
    folders = [json.loads(sample["json"])["path"].split("/")[0] for sample in contents(tmp_path / "out", "val-*.tar")]
    assert len(folders) == 4 and len(set(folders)) == 2

    rows = {"text": [f"text {i}" for i in range(12)], "author": [i // 3 for i in range(12)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    making.make(tmp_path / "set", tmp_path / "texts", held_out=0.25, group="author", workers=1)
    numbers = [int(sample["txt"].split()[1]) for sample in contents(tmp_path / "texts", "val-*.tar")]
    assert len(numbers) == 3 and len({number // 3 for number in numbers}) == 1
    with pytest.raises(UserError, match="--group writer: the dataset has only the columns text, author"):
        making.make(tmp_path / "set", tmp_path / "no", held_out=0.25, group="writer")


def test_labels_may_be_a_field_that_only_the_finished_shards_contain(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(20)], "label": [i % 2 for i in range(20)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    find_shards(str(tmp_path / "set"), tmp_path / "run", None, [], labels="json.class_name")
    assert {json.loads(sample["json"])["class_name"] for sample in contents(tmp_path / "run/shards")} == {"cat", "dog"}


def test_a_group_must_exist_for_every_sample_and_needs_held_out_samples(tmp_path, pictures):
    (pictures / "table.jsonl").write_text(
        '{"image": "cat/0.jpg", "family": 3}\n{"image": "cat/1.jpg", "family": null}\n'
    )
    more = {"captions": pictures / "table.jsonl", "caption_column": "", "held_out": 0.3, "workers": 1}
    message = "--group family: the sample cat/1.jpg does not have this field"
    with pytest.raises(UserError, match=message):
        making.make(pictures, tmp_path / "out", group="family", **more)
    with pytest.raises(UserError, match="has an effect only if samples are held out"):
        making.make(pictures, tmp_path / "out", group="family", **{**more, "held_out": 0.0})
    with pytest.raises(UserError, match="all 10 samples have the same image or class_name"):
        making.make(pictures, tmp_path / "out", group="class_name", flat=False, held_out=0.3)
    assert not (tmp_path / "out").exists()
