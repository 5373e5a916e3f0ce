"""Splits and classes of a folder of images, and held-out shards by their names."""

import json
import os
import re

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.images.image_kind import Kind
from m3ae_fast.shards import overview
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.sources.folder import Folder
from m3ae_fast.shards.sources.folder_layout import split_of_file
from tests.data.test_shards_make import contents, make
from tests.helpers.shards import members, picture, write_tar
from tests.helpers.source_shards import find_shards


def tree(root, *paths):
    """Write a different image for each path, and return `root`."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(number, fmt="PNG"))
    return root


def _paths(shards):
    """Return the split, label and path of each sample in a folder of shards."""
    found = set()
    for split in {path.name.rpartition("-")[0] for path in shards.glob("*.tar")}:
        for sample in contents(shards, f"{split}-*.tar"):
            path = json.loads(sample["json"])["path"]
            found.add((split, int(sample["cls"]) if "cls" in sample else None, path))
    return found


LAYOUTS = {
    "ImageFolder": {
        ("train", 0, "train/cat/0.png"), ("train", 1, "train/dog/0.png"),
        ("val", 0, "val/cat/0.png"), ("val", 1, "val/dog/0.png"),
    },
    "any case, and a class that only one split has": {
        ("train", 0, "Train/cat/0.png"), ("train", 2, "Train/emu/a/0.png"), ("val", 0, "Valid/cat/0.png"),
        ("val", 1, "Validation/dog/0.png"), ("test", 2, "TEST/emu/0.png"),
    },
    "training images alone": {("train", 0, "train/cat/0.png"), ("train", 1, "train/dog/0.png")},
    "without classes": {("train", None, "train2017/0.png"), ("val", None, "val2017/0.png")},
    "an unlabelled test split": {
        ("train", 0, "train/cat/0.png"), ("train", 1, "train/dog/0.png"), ("test", None, "test/0.png")
    },
    "in another folder": {
        ("train", 0, "images/train/cat/0.png"), ("train", 1, "images/train/dog/0.png"),
        ("val", 0, "images/val/cat/0.png"), ("val", 1, "images/val/dog/0.png"),
    },
    "splits below classes": {
        ("train", 0, "nail/train/good/0.png"), ("train", 1, "nut/train/good/0.png"),
        ("test", 0, "nail/test/bad/0.png"), ("test", 1, "nut/test/bad/0.png"),
    },
    "one folder of training images, without classes": {("train", None, "train/0.png"), ("train", None, "train/1.png")},
    "a class called test": {
        ("train", 0, "cat/0.png"), ("train", 1, "dog/0.png"), ("train", 2, "emu/0.png"), ("train", 3, "test/0.png")
    },
    "images beside a folder called train": {("train", None, "0.png"), ("train", None, "train/0.png")},
    "other words": {("train", 0, "contest/0.png"), ("train", 1, "trainval/0.png"), ("train", 2, "validated/0.png")},
}  # fmt: skip
SAID = {
    "any case, and a class that only one split has": "note: only val has the class dog",
    "an unlabelled test split": "note: the images of test have no class, because they are not in class folders",
    "a class called test": "note: test is interpreted as a class, like the folders next to it",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_and_classes_are_taken_from_folder_names(tmp_path, capsys, layout):
    """`shards make` writes the shards of each split, with the same class ids in all of them."""
    expected = LAYOUTS[layout]
    root = tree(tmp_path / "data", *sorted(path for _, _, path in expected))
    assert make(root, tmp_path / "out") == 0
    assert _paths(tmp_path / "out") == expected
    output = capsys.readouterr().out
    assert SAID.get(layout, "") in output and (layout in SAID or "note:" not in output)
    assert all(f'"{split}": [{{"shards": "{tmp_path}/out/{split}-*.tar"}}]' in output for split, _, _ in expected)


@pytest.mark.parametrize(("name", "split"), [("val", "val"), ("validation", "val"), ("Test", "test"), ("Dev", "train")])
def test_a_folder_named_val_becomes_held_out_shards(tmp_path, name, split):
    """A folder called dev is not a split, because many users keep their projects in ~/dev."""
    tree(tmp_path / name, "cat/0.png", "dog/0.png")
    assert make(tmp_path / name, tmp_path / "out") == 0
    assert _paths(tmp_path / "out") == {(split, 0, "cat/0.png"), (split, 1, "dog/0.png")}
    assert make(tmp_path / name, tmp_path / "both", "--held-out", "0.5") == 0
    assert sorted(split for split, _, _ in _paths(tmp_path / "both")) == ["train", "val"]


def test_the_flat_option_ignores_folder_names(tmp_path):
    root = tree(tmp_path / "data", "train/0.png", "val/0.png")
    assert make(root, tmp_path / "out", "--flat") == 0
    assert _paths(tmp_path / "out") == {("train", None, "train/0.png"), ("train", None, "val/0.png")}


def test_captions_are_read_for_each_split(tmp_path):
    root = tree(tmp_path / "data", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    (root / "val/cat/0.txt").write_text("a cat", encoding="utf-8-sig")  # with a byte order mark, as on Windows
    assert make(root, tmp_path / "beside") == 0
    assert [sample["txt"] for sample in contents(tmp_path / "beside", "val-*.tar")] == [b"a cat"]
    (tmp_path / "t.csv").write_text("path,caption\nval/cat/0.png,one\nval/cat/0.png,two\ntrain/dog/0.png,three\n")
    assert make(root, tmp_path / "table", "--captions", tmp_path / "t.csv") == 0
    found = {
        split: [s.get("txt") for s in contents(tmp_path / "table", f"{split}-*.tar")] for split in ("train", "val")
    }
    assert sorted(found["val"]) == [b"one", b"two"] and sorted(found["train"], key=str) == [None, b"three"]


def test_any_change_of_images_captions_or_splits_is_another_conversion(tmp_path):
    """The fingerprint must differ: otherwise, a conversion that is repeated after the change would keep the old
    shards."""
    root = tree(tmp_path / "data", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    text = root / "train/cat/0.txt"
    changes = [
        lambda: None,
        lambda: text.write_text("a cat"),
        lambda: os.utime(text, (1, 1)),
        lambda: text.write_text("a black cat"),
        lambda: text.rename(root / "train/dog/0.txt"),
        lambda: os.utime(root / "val/cat/0.png", (1, 1)),
        lambda: (root / "val/cat/0.png").write_bytes(picture(9, fmt="PNG")),
        lambda: (root / "val/cat/0.png").rename(root / "val/cat/1.png"),
        lambda: (root / "train/dog/0.png").rename(root / "train/dog/1.png"),
        lambda: (root / "train/dog/2.png").symlink_to("1.png"),
        lambda: (root / "val").rename(root / "test"),
    ]
    seen = []
    for change in changes:
        change()
        seen.append(json.dumps(Folder(root, SourceOptions()).identity))
    assert len({*seen}) == len(seen) and json.dumps(Folder(root, SourceOptions()).identity) == seen[-1]
    photos = tree(tmp_path / "photos", "cat/0.png", "dog/0.png")
    before = Folder(photos, SourceOptions()).identity
    assert Folder(photos.rename(tmp_path / "pictures"), SourceOptions()).identity == before
    assert Folder((tmp_path / "pictures").rename(tmp_path / "val"), SourceOptions()).identity != before, (
        "the images form another split"
    )


def test_a_table_may_contain_only_labels(tmp_path, capsys):
    """The columns of the table become fields of the samples' json; captions are next to the images, and class ids are
    unchanged."""
    root = tree(tmp_path / "data", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    (root / "val/cat/0.txt").write_text("a cat")
    (root / "t.csv").write_text("path,site\nval/cat/0.png,north\ntrain/dog/0.png,south\n")
    assert make(root, tmp_path / "out", "--captions", root / "t.csv", "--caption-column", "") == 0
    assert f"note: fields of {root}/t.csv for --labels: json.site\n" in capsys.readouterr().out
    found = {json.loads(sample["json"])["path"]: sample for sample in contents(tmp_path / "out")}
    fields = [json.loads(found[path]["json"]) for path in sorted(found)]
    assert [(own["label"], own.get("site")) for own in fields] == [(0, None), (1, "south"), (0, "north")]
    assert [own for own, sample in found.items() if "txt" in sample] == ["val/cat/0.png"]
    (root / "t.csv").write_text("path,site\nelsewhere.png,north\n")
    assert (
        "is not used: 1 of 1 rows refer to images that are"
        in find_shards(str(root), tmp_path / "run", None, []).notes[0]
    )
    identities = []
    for site in "ab":
        (root / "t.csv").write_text(f"path,site\nval/cat/0.png,{site}\n")
        identities.append(Folder(root, SourceOptions(captions=root / "t.csv", caption_column="")).identity)
    assert identities[0] != identities[1]


def test_a_second_text_file_of_an_image_is_reported_as_ignored(tmp_path):
    root = tree(tmp_path / "data", "0.png")
    for suffix in ("txt", "TXT"):
        (root / f"0.{suffix}").write_text(f"read from {suffix}")
    folder = Folder(root, SourceOptions())
    assert folder.read("train", 0).caption == "read from txt"
    assert folder.ignored.lines()[1:] == ["    0.TXT"]


def test_images_outside_the_splits_are_skipped_and_named(tmp_path, capsys):
    root = tree(tmp_path / "data", "logo.png", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    assert make(root, tmp_path / "out") == 0
    assert "1 skipped image outside the folders of splits:\n    logo.png" in capsys.readouterr().out
    assert len(_paths(tmp_path / "out")) == 3


def test_split_folders_mixed_with_other_folders_are_refused(tmp_path):
    root = tree(tmp_path / "data", "train/0.png", "val/0.png", "masks/0.png")
    with pytest.raises(
        UserError,
        match=r"train, val are names of splits, but other folders are next to them \(masks\); move the others",
    ):
        Folder(root, SourceOptions())


def test_pretraining_keeps_the_splits(tmp_path):
    root = tree(tmp_path / "data", *(f"{split}/{name}/0.png" for split in ("train", "val", "test") for name in "ab"))
    shards = find_shards(str(root), tmp_path / "run", None, [])
    assert (shards.train, shards.val) == tuple([f"{tmp_path}/run/shards/{each}-*.tar"] for each in ("train", "val"))
    assert any(
        re.fullmatch("test: used neither for training nor for evaluation; the shards are in .*", n)
        for n in shards.notes
    )
    assert _paths(tmp_path / "run/shards") == {
        (split, "ab".index(name), f"{split}/{name}/0.png") for split in ("train", "val", "test") for name in "ab"
    }
    (root / "val").rename(tmp_path / "val")
    shards = find_shards(str(root), tmp_path / "second", None, [])
    assert shards.val == [f"{tmp_path}/second/shards/test-*.tar"]
    (root / "train").rename(tmp_path / "train")
    shards = find_shards(str(root / "test"), tmp_path / "third", None, [])  # a test split is used if it is named
    assert {split for split, _, _ in _paths(tmp_path / "third/shards")} == {"train", "val"}
    (tmp_path / "val").rename(root / "val")
    with pytest.raises(
        UserError, match="has the splits val and test, but no split to train on; pass one of the splits as SOURCE"
    ):
        find_shards(str(root), tmp_path / "fourth", None, [])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((f"{name}.tar", "val") for name in ("food-val-0", "imagenet1k-validation-00", "VAL_0", "valid3", "x.val")),
        *((f"{name}.tar", "test") for name in ("test", "my_test_01", "train-test-0", "A-TEST")),
        *(
            (f"{name}.tar", None)
            for name in ("trainval-0", "validated", "contest1", "0", "train-0", "test\u00e9", "dev-0")
        ),
    ],
)
def test_words_in_the_name_of_a_shard_mark_it_as_held_out(name, split):
    assert split_of_file(name) == split


def _shards(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(root / name, members(range(4 * number, 4 * number + 4)))


def test_shards_are_held_out_by_their_names(tmp_path):
    names = ("food-test-0.tar", "food-train-0.tar", "food-trainval-1.tar", "food-val-0.tar")
    _shards(tmp_path, *names)
    shards = find_shards(str(tmp_path), tmp_path / "run", None, [])
    assert shards.train == [str(tmp_path / name) for name in names[1:3]] and shards.val == [str(tmp_path / names[3])]
    assert shards.notes == [
        f"held out because of their names: 1 of 4 shards, such as {tmp_path}/food-val-0.tar",
        f"not used, because there is also a validation split: 1 test shard, such as {tmp_path}/food-test-0.tar",
    ]
    (tmp_path / names[3]).unlink()
    assert find_shards(str(tmp_path), tmp_path / "run", None, []).val == [str(tmp_path / names[0])]


def test_shards_are_held_out_by_the_folders_above_them(tmp_path):
    """Folders that contain all shards are ignored."""
    _shards(tmp_path, "test/train/0.tar", "test/Val/0.tar", "test/Val/train-1.tar")
    shards = find_shards(f"{tmp_path}/test/*/*.tar", tmp_path / "run", None, [])
    assert (shards.train, len(shards.val)) == ([f"{tmp_path}/test/train/0.tar"], 2)


def test_a_class_folder_that_links_to_another_is_reported(tmp_path, capsys):
    """The images count in both classes."""
    root = tree(tmp_path / "data", "train/cat/0.png", "train/cat/1.png", "train/dog/0.png")
    (root / "train/wolf").symlink_to(root / "train/dog")
    (root / "train/puma").symlink_to(root / "train/cat")
    assert make(root, tmp_path / "out") == 0
    assert (
        "note: train/puma links to train/cat, so its images count twice; the same applies to train/wolf\n"
        in capsys.readouterr().out
    )
    assert len(_paths(tmp_path / "out")) == 6


def test_an_empty_class_folder_is_reported(tmp_path):
    root = tree(tmp_path / "data", "train/cat/a/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png")
    for name in ("train/emu", "val/emu", "train/.hidden", "train/cat/a/none"):
        (root / name).mkdir()
    (root / "train/emu/readme.md").write_text("none")
    folder = Folder(root, SourceOptions())
    assert folder.classes == ["cat", "dog"]
    assert folder.notes == ["train/emu, val/emu: no images, although neighbouring folders have some"]
    assert Folder(root, SourceOptions(flat=True)).notes == []


def test_the_most_frequent_of_many_kinds_of_images_are_printed():
    counts = {1: 5, 3: 4, 5: 3, 7: 1}
    kinds = [Kind(channels, False, "uint8", 8, 8) for channels, count in counts.items() for _ in range(count)]
    shown = overview._images(overview.Part("train", 13, "", kinds=kinds, seen=13))
    assert shown == "grey (5), colour (4), 5 bands (3), ..., 8 x 8 px"
    assert overview._images(overview.Part("train", 1, "", kinds=kinds[-1:], seen=1)) == "7 bands, 8 x 8 px"
