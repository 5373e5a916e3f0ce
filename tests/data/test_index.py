import io
import json
import os
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.shards import main as data_tools
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, index
from m3ae_fast.data.corpus import open_corpus
from m3ae_fast.data.index import MISSING, index_shards
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_names import INDEX_SUFFIX
from m3ae_fast.data.tar import scan_tar
from m3ae_fast.images.suffixes import IMAGE_SUFFIXES
from tests.helpers.shards import caption, members, picture, write_tar

LONG = "folder/" * 30 + "0001.jpg"


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_scan_finds_the_same_members_as_tarfile(tmp_path, fmt):
    names = ["a.jpg", "ünïcode.txt", "x/y.z.json", "empty.txt", "d/" * 40 + "0.jpg", "n" * 96 + ".jpg"]
    names += [LONG, "k" * 180 + ".txt"] if fmt != tarfile.USTAR_FORMAT else []
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=fmt) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty.txt" else 500 + 37 * i
            tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    found, damage = scan_tar(path)
    assert [tuple(m) for m in found] == expected
    assert damage is None


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_named(tmp_path, kind, store):
    """The caption of an image that is a link would silently be a sample of its own."""
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = kind, "0.jpg"
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("0.jpg", "0.txt", link, "1.txt", "2.jpg"):
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            tar.addfile(info)
    found, damage = scan_tar(path)
    assert [member.name for member in found] == ["0.jpg", "0.txt", "1.txt", "2.jpg"]
    assert damage.startswith("contains links or sparse files, such as 1.jpg, which are not read; create it again with")
    corpus = open_corpus([SourceConfig(shards=str(path))], store)
    assert f"{path}: the tar {damage}; 3 of its samples are used" in str(corpus.damaged[0])


@pytest.mark.parametrize("options", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
@pytest.mark.parametrize("holes", [1, 40])
def test_sparse_files_are_named(tmp_path, options, holes):
    """`holes`: with 40, the map of a file in GNU format has several blocks."""
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a/1.npy", "wb") as file:
        for number in range(holes):
            file.seek(number << 16)
            file.write(b"data")
        file.truncate(holes << 16)
    for name in ("0.jpg", "2.jpg"):
        (tmp_path / "a" / name).write_bytes(b"image")
    write = f"tar --sparse --sort=name --format={options} -cf a.tar -C a 0.jpg 1.npy 2.jpg"
    subprocess.run(write.split(), cwd=tmp_path, check=True)
    found, damage = scan_tar(tmp_path / "a.tar")
    assert [member.name for member in found] == ["0.jpg", "2.jpg"]
    assert "links or sparse files, such as 1.npy, which" in damage


def test_scan_reads_binary_sizes(tmp_path):
    info = tarfile.TarInfo("huge.jpg")
    info.size = 9 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    found, damage = scan_tar(path)
    assert found[0].size == 9 << 30
    assert "ends inside" in damage


def test_a_tar_truncated_after_a_member_lacks_only_its_end_mark(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = 1024  # a multiple of tar's block size, so no padding follows
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf() + bytes(1024))
    found, damage = scan_tar(path)
    assert len(found) == 1 and "no end mark" in damage


def test_a_wrong_header_with_a_valid_checksum_is_handled(tmp_path):
    for size in (b"99999999999\0", b"-0000000001\0", b"0x000000010\0", b"\xff" * 12):
        header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path = tmp_path / "a.tar"
        path.write_bytes(bytes(header) + bytes(2048))
        assert scan_tar(path)[1] is not None


def test_the_readable_part_of_a_truncated_tar_is_used(tmp_path, store):
    files = list(members(range(4)))
    whole = Path(write_tar(tmp_path / "whole.tar", files)).read_bytes()
    offsets = [m.offset for m in scan_tar(tmp_path / "whole.tar")[0]]
    for cut, samples, complete in ((offsets[5] + 3, 3, 5), (offsets[4] - 200, 2, 4), (offsets[4] - 512, 2, 4)):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        (shard,) = index_shards([str(path)], store)
        assert (shard.summary.samples, shard.summary.damage is not None) == (samples, True)
        corpus = open_corpus([SourceConfig(shards=str(path))], store)
        assert [(s.shard, s.key) for s in corpus.damaged] == [(str(path), "")]
        reader = Reader(corpus.sources[0], store)
        for number in range(complete // 2):
            assert reader.read(*reader.find(number)) == (files[2 * number][1], files[2 * number + 1][1].decode())
        if complete % 2:
            with pytest.raises(BadSample, match="ends inside the caption"):
                reader.read(0, samples - 1)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a tar at all " * 1000, os.urandom(4096)])
def test_random_bytes_are_refused_as_a_shard(tmp_path, store, content):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.tar.*no sample"):
        open_corpus([SourceConfig(shards=str(bad))], store)
    good = write_tar(tmp_path / "good.tar", members(range(3)))
    corpus = open_corpus([SourceConfig(shards=[str(bad), good])], store)
    assert corpus.samples == 3
    assert str(bad) in str(corpus.damaged[0])


def test_concatenated_tars_are_detected(tmp_path, store):
    paths = [Path(write_tar(tmp_path / f"{i}.tar", members(range(3)))) for i in range(2)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    (shard,) = index_shards([str(joined)], store)
    assert shard.summary.samples == 3 and "continues after its end mark" in shard.summary.damage
    (shard,) = index_shards([str(paths[0])], store)
    assert shard.summary.damage is None


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_truncated_sidecar_is_rebuilt(tmp_path, store, cut):
    path = write_tar(tmp_path / "a.tar", members(range(300)))
    (shard,) = index_shards([path], store)
    whole = shard.sidecar.read_bytes()
    shard.sidecar.write_bytes(whole[:-cut])
    with pytest.raises(OSError, match=r"a\.tar\.index is damaged .*; delete that file"):
        shard.table()
    reader = Reader(open_corpus([SourceConfig(shards=path)], store).sources[0], store)
    assert reader.read(0, 0).image == picture(0)
    assert shard.sidecar.read_bytes() == whole


def test_one_bad_shard_among_many_is_skipped_and_counted(tmp_path, store, monkeypatch):
    monkeypatch.setattr("m3ae_fast.data.shard_store.ATTEMPTS", 1)
    paths = [write_tar(tmp_path / f"{i}.tar", members(range(3))) for i in range(10)]
    gone = f"pipe:cat {tmp_path}/none.tar"
    corpus = open_corpus([SourceConfig(shards=[*paths[:5], gone, *paths[5:]])], store)
    assert corpus.samples == 30
    assert [(skipped.shard, skipped.reason[:14]) for skipped in corpus.damaged] == [(gone, "cannot be read")]
    corpus.require(0.1)
    with pytest.raises(
        UserError, match=r"1 of 11 shards cannot be read, for example .*none.tar.*data.max_bad_fraction"
    ):
        corpus.require(0.05)


def test_invalid_data_after_valid_members_is_reported(tmp_path, store):
    path = tmp_path / "a.tar"
    write_tar(path, members(range(3)))
    offset = scan_tar(path)[0][4].offset - 512
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = os.urandom(512)
    path.write_bytes(data)
    (shard,) = index_shards([str(path)], store)
    assert shard.summary.samples == 2
    assert f"has no tar header at byte {offset}" in shard.summary.damage


def test_members_are_grouped_into_samples_as_in_webdataset(tmp_path, store):
    names = ["a.jpg", "a.seg.png", "a.txt", "b.x/c.jpg", "b.x/c.TXT", ".hidden.jpg", "d/._e.jpg", "e.JPeG", "f.cls"]
    names += ["__meta__/g.jpg", "dir/h.webp", "dir/h.json", "a.jpg", "noext"]
    path = write_tar(tmp_path / "a.tar", [(name, b"{}") for name in names])
    files = [{"fname": n, "data": n, "__url__": path} for n in names if not n.startswith("__")]
    expected = []
    for sample in group_by_keys(files):
        image = next((sample[s] for s in IMAGE_SUFFIXES if s in sample), None)
        if image or "txt" in sample:
            expected.append((sample["__key__"].encode(), image is not None, "txt" in sample))
    table = index_shards([path], store)[0].table()
    found = [(bytes(r["key"]), r["image_offset"] != MISSING, r["text_offset"] != MISSING) for r in table]
    assert found == expected


def test_captions_are_read_from_json(tmp_path, store):
    contents = [b'{"caption": "a red cat"}', b'{"caption": null}', b"{broken", b'["caption"]', b"[" * 100_000]
    contents.append(b'{"caption": "half a \\ud800 pair"}')
    files = [(f"{i}.{s}", c) for i, content in enumerate(contents) for s, c in (("jpg", picture(i)), ("json", content))]
    files += [("9.jpg", picture(9)), ("9.txt", b"the txt wins"), ("9.json", b'{"caption": "not this"}')]
    corpus = open_corpus([SourceConfig(shards=write_tar(tmp_path / "a.tar", files))], store)
    assert corpus.sources[0].modalities == ["any"]
    reader = Reader(corpus.sources[0], store)
    assert reader.read(0, 0).caption == "a red cat"
    assert reader.read(0, 6).caption == "the txt wins"
    for row in (1, 2, 3, 4, 5):
        assert reader.read(0, row) == (picture(row), None)
    paired = replace(corpus.sources[0], modalities=["paired"])
    for row in (1, 2, 3, 4, 5):
        with pytest.raises(BadSample, match="no caption"):
            Reader(paired, store).read(0, row)


def test_json_without_captions_is_image_only(tmp_path, store):
    files = [(f"{i}.{s}", c) for i in range(3) for s, c in (("jpg", picture(i)), ("json", b'{"width": 3}'))]
    corpus = open_corpus([SourceConfig(shards=write_tar(tmp_path / "a.tar", files))], store)
    assert corpus.sources[0].modalities == ["image"]
    assert not corpus.has_captions


def test_a_sidecar_is_used_until_its_shard_changes(tmp_path, store, monkeypatch):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    assert index_shards([path], store)[0].summary.samples == 3
    assert os.path.exists(path + INDEX_SUFFIX)
    summary = json.loads(Path(path + INDEX_SUFFIX).read_bytes().split(b"\n")[0])
    assert summary["samples"] == summary["images"] == summary["captions"] == summary["paired"] == 3

    with monkeypatch.context() as patch:
        patch.setattr("m3ae_fast.data.index.scan_tar", lambda path: pytest.fail("indexed again"))
        assert index_shards([path], store)[0].summary.samples == 3
    write_tar(path, members(range(5)))
    assert index_shards([path], store)[0].summary.samples == 5
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert index_shards([path], store)[0].summary.mtime_ns == status.st_mtime_ns + 1
    now, table = Path(path + INDEX_SUFFIX).read_bytes().split(b"\n", 1)
    another = json.dumps(json.loads(now) | {"version": index.VERSION - 1, "samples": 4}).encode() + b"\n" + table
    for broken in (b"", b"{}", b"[1]\n", b"\xff\xfe", another):
        with open(path + INDEX_SUFFIX, "wb") as file:
            file.write(broken)
        assert index_shards([path], store)[0].summary.samples == 5


def test_the_index_of_a_read_only_folder_is_written_to_the_cache(tmp_path, store):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    os.mkdir(path + INDEX_SUFFIX)  # blocks the path of the sidecar, even for root
    (shard,) = index_shards([path], store)
    assert shard.sidecar.parent == store.cache_dir / "index"
    assert len(shard.table()) == 3
    assert index_shards([path], store)[0] == shard
    assert not list(tmp_path.glob("a.tar.index.*"))


def test_malicious_keys_are_sanitised(tmp_path, store):
    keys = ["../../etc/passwd", "/abs/path", "new\nline\x1b[31m", "k" * 5000, "[bold]x", "ü" * 100]
    path = write_tar(tmp_path / "a.tar", [(key + ".jpg", picture(1)) for key in keys])
    corpus = open_corpus([SourceConfig(shards=path)], store)
    reader = Reader(corpus.sources[0], store)
    found = [reader.key(0, row) for row in range(corpus.samples)]
    assert found[:2] == keys[:2]
    assert all(key.isprintable() and len(key) <= 128 for key in found)
    assert all(reader.read(0, row).image == picture(1) for row in range(corpus.samples))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar" + INDEX_SUFFIX, "cache"]


def test_modality_can_be_set(tmp_path, store):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    for modality in ("image", "text"):
        corpus = open_corpus([SourceConfig(shards=path, modality=modality)], store)
        raw = Reader(corpus.sources[0], store).read(0, 1)
        assert raw == ((picture(1), None) if modality == "image" else (None, caption(1)))
    images = write_tar(tmp_path / "b.tar", members(range(3), "image"))
    for modality in ("text", "paired"):
        with pytest.raises(UserError, match=f"no sample has the modality '{modality}'"):
            open_corpus([SourceConfig(shards=images, modality=modality)], store)


def test_the_modality_of_a_shard_is_the_common_modality_of_its_samples(tmp_path, store):
    kinds = {"paired": [*members(range(3))], "image": [*members(range(3, 5), "image")], "text": [*members([5], "text")]}
    for name, files in kinds.items():
        corpus = open_corpus([SourceConfig(shards=write_tar(tmp_path / f"{name}.tar", files))], store)
        assert corpus.sources[0].modalities == [name]
        assert corpus.has_captions == (name != "image")
    path = write_tar(tmp_path / "all.tar", [*kinds["text"], *kinds["paired"], *kinds["image"]])
    corpus = open_corpus([SourceConfig(shards=path)], store)
    assert corpus.sources[0].modalities == ["any"] and corpus.has_captions
    found = corpus.sources[0].shards[0].summary
    assert (found.samples, found.images, found.captions, found.paired) == (6, 5, 4, 3)
    unpaired = write_tar(tmp_path / "unpaired.tar", [*kinds["text"], *kinds["image"]])
    with pytest.raises(UserError, match="no sample has the modality 'paired'"):
        open_corpus([SourceConfig(shards=unpaired, modality="paired")], store)


def test_the_number_of_open_shard_files_is_limited(tmp_path, store, monkeypatch):
    monkeypatch.setattr("m3ae_fast.data.reader._OPEN_SHARDS", 2)
    paths = [write_tar(tmp_path / f"{i}.tar", members([i])) for i in range(6)]
    reader = Reader(open_corpus([SourceConfig(shards=paths)], store).sources[0], store)
    before = len(os.listdir("/proc/self/fd"))
    for shard in (0, 1, 2, 3, 4, 5, 0, 3):
        assert reader.read(shard, 0).caption == caption(shard)
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2  # a shard has two open files: the tar and its table


def test_the_least_recently_used_shard_is_closed_first(tmp_path, store, monkeypatch):
    monkeypatch.setattr("m3ae_fast.data.reader._OPEN_SHARDS", 2)
    paths = [write_tar(tmp_path / f"{i}.tar", members([i])) for i in range(3)]
    reader = Reader(open_corpus([SourceConfig(shards=paths)], store).sources[0], store)
    opened, real = [], store.path
    monkeypatch.setattr(ShardStore, "path", lambda _, shard, *size: opened.append(shard) or real(shard, *size))
    for shard in (0, 1, 0, 2, 0, 1):
        reader.read(shard, 0)
    assert opened == [paths[shard] for shard in (0, 1, 2, 1)]


def test_a_shard_is_indexed_by_one_process_while_the_others_wait(tmp_path, store, monkeypatch):
    made, real = [], index.scan_tar

    def scan(path):
        made.append(1)
        time.sleep(0.2)  # during this time, the other threads, which represent processes, find no index
        return real(path)

    monkeypatch.setattr(index, "scan_tar", scan)
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    assert [entry.summary.samples for entry in index.index_shards([path] * 4, store)] == [3] * 4
    assert made == [1]


def test_a_shard_that_changes_while_it_is_used_is_detected(tmp_path, store):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    reader = Reader(open_corpus([SourceConfig(shards=path)], store).sources[0], store)
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match="changed since it was indexed"):
        reader.read(0, 0)


def test_long_captions_are_truncated_at_a_utf8_character(tmp_path, store):
    files = [("a.txt", "ü".encode() * 50_000), ("b.txt", b"x" + "ü".encode() * 50_000), ("c.txt", b"\xff\xfe")]
    # The first 65,536 bytes are kept, of which the invalid byte is the fourth from the end. It is therefore not the
    # beginning of a character that was cut off.
    files += [("d.txt", b"x" * 65_532 + b"\xff" + b"y" * 9)]
    corpus = open_corpus([SourceConfig(shards=write_tar(tmp_path / "a.tar", files))], store)
    reader = Reader(corpus.sources[0], store)
    assert reader.read(0, 0).caption == "ü" * 32768
    assert reader.read(0, 1).caption == "x" + "ü" * 32767
    for row in (2, 3):
        with pytest.raises(BadSample, match="UTF-8"):
            reader.read(0, row)


def test_a_repeated_suffix_starts_a_new_sample(tmp_path, store):
    """Two images with the same key and suffix are two samples, as in WebDataset, and the caption belongs to the second
    one."""
    files = [("a.jpg", picture(1)), ("a.jpg", picture(2)), ("a.txt", b"a cat"), ("b.jpg", picture(3))]
    corpus = open_corpus([SourceConfig(shards=write_tar(tmp_path / "a.tar", files), modality="image")], store)
    reader = Reader(corpus.sources[0], store)
    assert [reader.read(0, row).image for row in range(corpus.samples)] == [picture(1), picture(2), picture(3)]
    table = corpus.sources[0].shards[0].table()
    assert (table["text_offset"] != MISSING).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "suffix, fmt", [("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"), ("TIFF", "TIFF"), ("jp2", "JPEG2000")]
)
def test_images_of_every_suffix_are_read(tmp_path, store, suffix, fmt):
    files = [
        file for i in range(3) for file in ((f"{i}.{suffix}", picture(i, fmt=fmt)), (f"{i}.txt", caption(i).encode()))
    ]
    corpus = open_corpus([SourceConfig(shards=write_tar(tmp_path / "a.tar", files))], store)
    assert corpus.sources[0].modalities == ["paired"] and corpus.ignored == ""
    reader = Reader(corpus.sources[0], store)
    assert [reader.read(0, row).image for row in range(3)] == [picture(i, fmt=fmt) for i in range(3)]


def test_ignored_files_are_named_and_counted(tmp_path, store, capsys):
    files = [("0.jpg", picture(0)), ("0.png", picture(0, fmt="PNG")), ("0.mp4", b"film"), ("1.mp4", b"film")]
    files += [("1.seg.png", b"mask"), ("2.jpg", picture(2)), ("2.json", b"{}"), ("2.cls", b"1"), ("2.MP4", b"film")]
    paths = [write_tar(tmp_path / f"{name}.tar", files) for name in "ab"]
    corpus = open_corpus([SourceConfig(shards=paths)], store)
    assert corpus.ignored == "6 .mp4, 2 .png, 2 .seg.png"
    assert index_shards(paths, store)[0].summary.ignored == {"mp4": 3, "png": 1, "seg.png": 1}
    data_tools(["table", *paths])
    assert "6 .mp4, 2 .png, 2 .seg.png" in " ".join(capsys.readouterr().out.split())
    films = write_tar(tmp_path / "films.tar", [(f"{i}.mp4", b"film") for i in range(3)])
    with pytest.raises(
        UserError,
        match=r"contain no samples \(image suffixes: jpg, .*npy; .* txt, json\); files in the shards: 3 \.mp4$",
    ):
        open_corpus([SourceConfig(shards=films)], store)


def test_a_shard_without_samples_is_named(tmp_path, store):
    """Its files would otherwise silently be missing, because the other shards contain samples."""
    good = write_tar(tmp_path / "good.tar", members(range(3)))
    films = write_tar(tmp_path / "films.tar", [(f"{i}.mp4", b"film") for i in range(3)])
    corpus = open_corpus([SourceConfig(shards=[good, films, write_tar(tmp_path / "none.tar", [])])], store)
    assert corpus.samples == 3
    assert list(map(str, corpus.damaged)) == [
        f"{films}: contains no samples; files in the shard: 3 .mp4",
        f"{tmp_path / 'none.tar'}: contains no samples",
    ]


def test_a_summary_names_at_most_a_few_suffixes(tmp_path, store):
    files = [("a.jpg", picture(0)), *((f"a.{i}{'x' * 500}", b"") for i in range(2000))]
    shard = write_tar(tmp_path / "a.tar", files)
    assert len(index_shards([shard], store)[0].summary.ignored) == 20
    assert index_shards([shard], store)[0].summary.samples == 1
