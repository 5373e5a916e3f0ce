"""Folders and files as users have them: with unusual images, links, pipes and names, and with corrections after the
first attempt."""

import json
import os
import re
import socket
import struct
import zlib

import datasets
import h5py
import numpy as np
import pyarrow
import pytest
from PIL import Image

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.shards import main as data
from m3ae_fast.shards.problem_counts import CUT, EMPTY, REFUSED, Tally
from tests.data.test_shards_make import contents, make, own_cache, pictures  # noqa: F401
from tests.helpers.shards import picture, write_tar


def paths(out):
    return sorted(json.loads(sample["json"])["path"] for sample in contents(out))


def new_output(capsys):
    """Return the output printed since the last call, with one message per line."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.count("\n") <= 1
    return captured.out + captured.err


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(picture(1))
    (tmp_path / "in" / "good.txt").write_text("a good one")
    return tmp_path / "in"


def _long(path):
    Image.new("L", (70000, 200)).save(path)


def _bomb(path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x09IDAT" + b"\0" * 99
    )


def _device(path):
    path.symlink_to("/dev/zero")


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _large(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _captioned_by_a_pipe(path):
    path.write_bytes(picture(2))
    os.mkfifo(path.with_suffix(".txt"))


def _captioned_by_nothing(path):
    path.write_bytes(picture(2))
    path.with_suffix(".txt").symlink_to("nowhere")


def _captioned_in_latin(path):
    path.write_bytes(picture(2))
    path.with_suffix(".txt").write_bytes(b"caf\xe9")


ODD = {
    "70000 x 200 pixels, which is too long for a JPEG": _long,
    "more than 134217728": _bomb,
    "odd.png is not a regular file": os.mkfifo,
    "odd.png: No such device or address": _socket,
    "odd.png is not a regular file ": _device,
    "odd.png: has 1,099,511,627,776 bytes": _large,
    "odd.png: No such file or directory": lambda path: path.symlink_to("nowhere"),
    "odd.png: Too many levels of symbolic links": lambda path: path.symlink_to(path.name),
    "odd.txt is not a regular file": _captioned_by_a_pipe,
    "odd.txt: No such file or directory": _captioned_by_nothing,
    "odd.txt: is not UTF-8; save it in UTF-8": _captioned_in_latin,
}


@pytest.mark.parametrize("reason", ODD)
def test_a_malformed_image_is_named_and_skipped_and_the_others_are_kept(folder, tmp_path, capsys, reason):
    ODD[reason](folder / "odd.png")
    for _ in range(2):  # the second call finds that all shards are complete
        assert make(folder, tmp_path / "out") == 0
        assert "1 sample in 1 shard" in new_output(capsys)
    assert paths(tmp_path / "out") == ["good.jpg"]
    (tmp_path / "out" / "train-00000.tar").unlink()
    assert make(folder, tmp_path / "out") == 0
    assert re.search(rf"1 skipped sample that cannot be used:\n    odd.png: .*{reason.strip()}", new_output(capsys))


CORRECTIONS = {
    "pictures": lambda folder: (folder / "good.jpg").write_bytes(picture(1)[:-1] + b"x"),
    "captions": lambda folder: (folder / "good.txt").write_text("a goof one"),
    "captions was": lambda folder: (folder / "good.txt").unlink(),
}


@pytest.mark.parametrize("part", CORRECTIONS)
def test_changed_input_is_not_mistaken_for_the_same_conversion(folder, tmp_path, capsys, part):
    assert make(folder, tmp_path / "out") == 0
    assert make(folder, tmp_path / "out") == 0
    CORRECTIONS[part](folder)
    new_output(capsys)
    assert make(folder, tmp_path / "out") == 2
    assert re.search(
        rf"shards of another conversion \({part}.*specify a new folder, or remove this one", new_output(capsys)
    )


def test_a_changed_table_is_a_different_conversion(folder, tmp_path, capsys):
    table = tmp_path / "t.csv"
    for text, code in (("a dog", 0), ("a dog", 0), ("a fog", 2)):
        table.write_text(f"image,caption\ngood.jpg,{text}\n")
        assert make(folder, tmp_path / "out", "--captions", table) == code
    assert "(captions was" in new_output(capsys)


def test_a_changed_hdf5_file_is_a_different_conversion(tmp_path, capsys):
    for text, code in (("a dog", 0), ("a fog", 2)):
        with h5py.File(tmp_path / "t.hdf5", "w") as file:
            file["text"] = [text]
        assert make(tmp_path / "t.hdf5", tmp_path / "out") == code
    assert "(changed_ns was" in new_output(capsys)


def test_a_class_folder_that_links_to_another_is_kept_as_a_separate_class(pictures, tmp_path):  # noqa: F811
    (pictures / "ant").symlink_to("dog")
    (pictures / "dog" / "loop").symlink_to("..")
    (pictures / "dog" / "again").symlink_to(".")
    assert make(pictures, tmp_path / "out") == 0
    found = [(json.loads(s["json"])["class_name"], s["cls"]) for s in contents(tmp_path / "out")]
    assert sorted(found) == [("ant", b"0")] * 5 + [("cat", b"1")] * 5 + [("dog", b"2")] * 5
    assert make(pictures, tmp_path / "flat", "--flat") == 0
    assert len(paths(tmp_path / "flat")) == 10


def test_a_class_whose_name_is_not_utf8_is_refused_by_name(pictures, tmp_path, capsys):  # noqa: F811
    odd = os.fsencode(pictures) + b"/caf\xe9"
    os.rename(pictures / "dog", odd)
    assert make(pictures, tmp_path / "out") == 2
    assert r"the class b'caf\xe9' is not UTF-8; rename it, or use --flat" in new_output(capsys)
    assert not (tmp_path / "out").exists()
    assert make(pictures, tmp_path / "out", "--flat") == 0
    assert "caf\N{REPLACEMENT CHARACTER}/0.jpg" in paths(tmp_path / "out")


def test_a_folder_that_cannot_be_listed_is_named(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert make(pictures, tmp_path / "out") == 2
    assert "dog: cannot be listed (Permission denied)" in new_output(capsys)


def test_several_captions_of_a_row_become_several_samples(folder, tmp_path, capsys):
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "good.jpg", "caption": ["a", "", "b"]}\n{"image": "good.jpg", "caption": "a"}\n')
    assert make(folder, tmp_path / "out", "--captions", table, "--keep-order") == 0
    assert [sample["txt"] for sample in contents(tmp_path / "out")] == [b"a", b"b", b"a"]
    assert "empty" not in new_output(capsys)


def test_a_row_without_a_caption_has_an_empty_caption_and_an_image_without_a_row_has_none(folder, tmp_path, capsys):
    for number, name in enumerate(("other", "third"), 2):
        (folder / f"{name}.jpg").write_bytes(picture(number))
    (tmp_path / "t.csv").write_text("image,caption\nother.jpg,\nthird.jpg,a third one\n")
    assert make(folder, tmp_path / "out", "--captions", tmp_path / "t.csv") == 0
    assert "2 image-only" in (text := new_output(capsys))
    assert "1 sample with an empty caption:\n    other.jpg\n" in text


LISTS = {
    "strings [N, K]": lambda f: f.create_dataset("caption", data=[["a", "b"], ["c", ""]], dtype=h5py.string_dtype()),
    "bytes [N, K]": lambda f: f.create_dataset("caption", data=np.array([[b"a", b"b"], [b"c", b""]])),
    "vlen": lambda f: f.create_dataset("caption", (2,), h5py.vlen_dtype(h5py.string_dtype())),
}


@pytest.mark.parametrize("kind", LISTS)
def test_several_captions_of_an_hdf5_row_become_several_samples(tmp_path, kind):
    with h5py.File(tmp_path / "t.hdf5", "w") as file:
        jpg = file.create_dataset("jpg", (2,), h5py.vlen_dtype(np.uint8))
        captions = LISTS[kind](file)
        for row, texts in enumerate((["a", "b"], ["c"])):
            jpg[row] = np.frombuffer(picture(row), np.uint8)
            if kind == "vlen":
                captions[row] = np.array(texts, dtype=object)
    assert make(tmp_path / "t.hdf5", tmp_path / "out", "--keep-order") == 0
    found = [(sample["jpg"], sample["txt"]) for sample in contents(tmp_path / "out")]
    assert found == [(picture(0), b"a"), (picture(0), b"b"), (picture(1), b"c")]


LINKS = {
    "caption is a broken link": lambda f: f.update(caption=h5py.SoftLink("/nowhere")),
    "caption is a broken link ": lambda f: f.update(caption=h5py.SoftLink("/caption")),
    "caption is a broken link  ": lambda f: f.update(caption=h5py.ExternalLink("none.hdf5", "/x")),
    "caption is a group": lambda f: f.create_group("caption"),
}


@pytest.mark.parametrize("reason", LINKS)
def test_dangling_links_in_an_hdf5_file_are_reported(tmp_path, capsys, reason):
    with h5py.File(tmp_path / "t.hdf5", "w") as file:
        file.create_dataset("jpg", (1,), h5py.vlen_dtype(np.uint8))[0] = np.frombuffer(picture(0), np.uint8)
        file["unused"] = h5py.SoftLink("/unused")
    assert make(tmp_path / "t.hdf5", tmp_path / "alone") == 0
    with h5py.File(tmp_path / "t.hdf5", "a") as file:
        LINKS[reason](file)
    new_output(capsys)
    assert make(tmp_path / "t.hdf5", tmp_path / "out") == 2
    assert f"t.hdf5: {reason.strip()}" in new_output(capsys)


def test_invalid_captions_in_hdf5_files_and_datasets_are_named_and_skipped(tmp_path, capsys):
    with h5py.File(tmp_path / "t.hdf5", "w") as file:
        file["text"] = np.array([b"good", b"caf\xe9", b" "])
    assert make(tmp_path / "t.hdf5", tmp_path / "out") == 0
    assert "text 1: the caption is not UTF-8" in new_output(capsys)
    texts = datasets.Dataset(pyarrow.table({"caption": [["a", None, " "], None, ["b", "c"]]}))
    texts.save_to_disk(tmp_path / "saved")
    assert make(tmp_path / "saved", tmp_path / "hf", "--keep-order") == 0
    assert [sample["txt"] for sample in contents(tmp_path / "hf")] == [b"a", b"b", b"c"]
    assert "train row 1: the sample has neither image nor caption" in new_output(capsys)
    datasets.Dataset.from_dict({"caption": [{"raw": "a"}]}).save_to_disk(tmp_path / "dict")
    capsys.readouterr()  # drops the output of the library's progress bar
    assert make(tmp_path / "dict", tmp_path / "out2", "--caption-column", "caption") == 2
    assert "--caption-column caption: has the type" in new_output(capsys)


def test_the_summary_counts_and_names_skipped_samples(pictures, tmp_path, capsys):  # noqa: F811
    for number in range(5):
        (pictures / "cat" / f"{number}.txt").write_text(" \n")
    (pictures / "dog" / "0.txt").write_text("\N{SNOWMAN}" * 30_000)
    (pictures / "dog" / "1.jpg").write_bytes(b"no image")
    expected = f"""{tmp_path}/out: 9 samples in 5 shards (2 paired, 7 image-only), 2 with a caption
1 skipped sample that cannot be used:
    dog/1.jpg: the file is not an image in a known format
5 samples with an empty caption, such as
    cat/0.jpg
    cat/1.jpg
    cat/2.jpg
1 sample with a caption of more than 65,536 bytes, of which only the beginning is read:
    dog/0.jpg: 90,000 bytes
"""
    options = ("--samples-per-shard", "2", "--keep-order")
    assert make(pictures, tmp_path / "out", *options, workers=3) == 0
    assert expected in new_output(capsys)
    (tmp_path / "out" / "train-00000.tar").unlink()
    assert make(pictures, tmp_path / "out", *options) == 0
    text = new_output(capsys)
    assert (
        "2 samples with an empty caption" in text and "1 sample left out before the conversion was interrupted" in text
    )


def test_files_that_are_not_input_are_named(folder, tmp_path, capsys):
    for name in ("a.heic", "b.svg", "c.txt", "classes.json", ".hidden"):
        (folder / name).write_text("")
    (folder / "t.csv").write_text("image,caption\ngood.jpg,a\n")
    assert make(folder, tmp_path / "out") == 0
    assert (
        "5 ignored files (neither an image nor the caption of an image), such as\n    a.heic\n    b.svg\n    c.txt\n"
        in new_output(capsys)
    )
    assert make(folder, tmp_path / "table", "--captions", folder / "t.csv") == 0
    assert "5 ignored files" in new_output(capsys)  # good.txt is now one of them, and the table is not


def test_the_tally_shows_the_first_three_of_each_kind():
    first, second = Tally(), Tally()
    for number in range(4):
        (first if number < 2 else second).add(REFUSED, f"{number}\n{number}")
    second.add_caption("x" * 65_536, "fits")
    second.add_caption("x" * 65_537, "too long")
    second.add_caption("  ", "blank")
    second.add_caption(None, "none")
    first.merge(second)
    assert first.counts == {REFUSED: 4, CUT: 1, EMPTY: 1}
    assert first.examples == {REFUSED: ["0 0", "1 1", "2 2"], CUT: ["too long: 65,537 bytes"], EMPTY: ["blank"]}


def test_the_tokenizer_command_reports_skipped_samples(tmp_path, capsys):
    shard = write_tar(tmp_path / "a.tar", [("0.txt", b"a dog"), ("1.txt", b" "), ("2.txt", b"caf\xe9")])
    assert data(["tokenizer", shard, "--vocab-size", "20", "--out", str(tmp_path / "tokenizer.json")]) == 0
    output = new_output(capsys)
    assert "on 1 caption\n" in output
    assert f"1 skipped sample that cannot be used:\n    {shard}/2: the caption is not UTF-8" in output
    assert f"1 sample with an empty caption:\n    {shard}/1" in output
    blank = write_tar(tmp_path / "b.tar", [("0.txt", b" ")])
    assert exit_cleanly(lambda: data(["tokenizer", blank, "--vocab-size", "20", "--out", f"{blank}.json"])) == 2
    assert "none of their captions contains a word" in new_output(capsys) and not os.path.exists(f"{blank}.json")
