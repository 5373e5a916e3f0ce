"""Shards on network file systems: a table of mounts replaces the table of the machine."""

import os
from itertools import chain
from types import SimpleNamespace

import pytest

from m3ae_fast.config import ModelConfig, SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_store import network_file_system
from m3ae_fast.training.user_warnings import enlarged_images
from tests.data.test_fetcher import epoch
from tests.helpers.shards import members, write_tar

SHARDS, PER = 4, 8


@pytest.fixture
def network_folder(tmp_path, monkeypatch):
    """Return a folder with shards that is reported to be on NFS. All other folders are local."""
    (tmp_path / "far").mkdir()
    mounts = {"/": "ext4", str(tmp_path / "far"): "nfs4"}
    table = lambda all: [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts.items()]  # noqa: E731
    monkeypatch.setattr("psutil.disk_partitions", table)
    for i in range(SHARDS):
        write_tar(tmp_path / f"far/{i}.tar", members(range(i * PER, i * PER + PER), "text"))
    return tmp_path / "far"


def copies(store):
    return {path.name: path.stat().st_ino for path in (store.cache_dir / "shards").iterdir()}


def captions(store, folder):
    (source,) = open_corpus([SourceConfig(shards=str(folder / "*.tar"))], store).sources
    return [Reader(source, store).read(shard, row).caption for shard in range(SHARDS) for row in range(PER)]


@pytest.mark.parametrize(("kind", "is_network"), [
    ("nfs4", True), ("nfs", True), ("lustre", True), ("gpfs", True), ("cifs", True), ("smb3", True), ("ceph", True),
    ("fuse.sshfs", True), ("fuse.gcsfuse", True), ("fuse.fuse-overlayfs", False), ("fuseblk", False), ("ext4", False),
    ("overlay", False), ("tmpfs", False), ("", False),
])  # fmt: skip
def test_network_file_systems_are_recognised(tmp_path, monkeypatch, kind, is_network):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    mounts = [SimpleNamespace(mountpoint=str(tmp_path / "a"), fstype=kind)]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    assert network_file_system(tmp_path / "link/c") == kind * is_network
    assert network_file_system(tmp_path) == ""


def test_shards_on_a_network_file_system_are_read_from_complete_cached_copies(network_folder, store, tmp_path):
    """The headers of shards are read in place, so that counting samples copies no images."""
    corpus = open_corpus([SourceConfig(shards=str(network_folder / "*.tar"))], store)
    assert corpus.samples == SHARDS * PER and not copies(store)
    assert len(list(network_folder.glob("*.index"))) == SHARDS
    expected = captions(ShardStore(network_folder / "cache"), network_folder)
    # this cache is on the same network file system, so copies would not be read faster
    assert not copies(ShardStore(network_folder / "cache"))
    assert captions(store, network_folder) == expected
    assert len(copies(store)) == SHARDS
    # a larger shard, for which the old copy is not used
    write_tar(network_folder / "0.tar", members(range(30), "text"))
    with pytest.raises(OSError, match="differs from the indexed shard"):
        Reader(corpus.sources[0], store).read(0, 0)


def test_a_second_epoch_does_not_read_over_the_network(network_folder, store, load):
    sources = [SourceConfig(shards=str(network_folder / "*.tar"))]
    loader = load(sources, micro_batch=8, steps=2 * SHARDS, config={"lanes": 2})
    steps = epoch([loader])
    first = list(chain.from_iterable(next(steps) for _ in range(SHARDS)))
    before = copies(store)
    for path in network_folder.glob("*.tar"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sorted(chain.from_iterable(steps)) == sorted(first)
    assert copies(store) == before and len(before) == SHARDS


def test_shards_on_a_network_file_system_are_read_directly_if_the_cache_is_full(network_folder, store, load, tmp_path):
    size = (network_folder / "0.tar").stat().st_size
    small = ShardStore(tmp_path / "small", 1.5 * size / 1e9)
    loader = load(
        [SourceConfig(shards=str(network_folder / "*.tar"))], micro_batch=8, steps=SHARDS, config={"lanes": 2}, at=small
    )
    keys = list(chain.from_iterable(batch.keys for batch in loader))
    assert len(set(keys)) == SHARDS * PER and not copies(small)


def test_inspecting_a_few_images_does_not_copy_shards(network_folder, store, tmp_path):
    write_tar(network_folder / "images.tar", members(range(4)))
    corpus = open_corpus([SourceConfig(shards=str(network_folder / "images.tar"))], store)
    model = ModelConfig(size=None, emb_dim=32, depth=1, num_heads=4, image_size=4096, patch_size=16, vocab_size=0)
    assert enlarged_images(SimpleNamespace(model=model), corpus).startswith("images are enlarged: half of 4 inspected")
    assert not copies(store)
    Reader(corpus.sources[0], store).read(0, 0)
    assert len(copies(store)) == 1  # a run reads samples in this way, which does copy the shard
