"""Shards whose samples were counted in advance."""

import gzip
import json
import threading
import tracemalloc
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.shards import main
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, manifest, open_corpus
from m3ae_fast.data.manifest import KINDS, UNREAD, CountedShards, join, read, rows_of, write
from m3ae_fast.data.order import Order
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_names import expand
from m3ae_fast.process.ranks import Ranks
from tests.helpers.shards import members, write_tar
from tests.helpers.threads import map_threads


@pytest.fixture
def remote(tmp_path):
    """Return (pattern of commands that print shards, function that returns the shards downloaded so far)."""
    (tmp_path / "far").mkdir()
    for i in range(6):
        kind = ("paired", "image", "text")[i % 3]
        write_tar(tmp_path / f"far/{i}.tar", members(range(i * 10, i * 10 + 3 + i), kind))
    log = tmp_path / "fetched"
    log.touch()
    pattern = f"pipe:n={{0..5}}; echo $n >> {log}; cat {tmp_path}/far/$n.tar"
    return pattern, lambda: Counter(log.read_text().split())


def make(tmp_path, *options, out="m.npy", cache="maker"):
    path = str(tmp_path / out)
    assert main(["table", *options, "--out", path, "--cache-dir", str(tmp_path / cache)]) == 0
    return path


def keys(loader):
    return [key.rpartition("/")[2] for batch in loader for key in batch.keys]


def test_a_run_reads_the_same_samples_with_and_without_a_manifest(load, store, tmp_path, remote):
    pattern, fetched = remote
    path = make(tmp_path, pattern)
    counted = [SourceConfig(shards=path)]
    before = fetched()
    found = open_corpus(counted, ShardStore(tmp_path / "0"))
    assert fetched() == before  # opening reads no shard
    indexed = open_corpus([SourceConfig(shards=pattern)], ShardStore(tmp_path / "1"))
    one, other = found.sources[0], indexed.sources[0]
    assert one.modalities == other.modalities == ["paired", "image", "text"] * 2
    assert list(one.sizes) == list(other.sizes) == [3, 4, 5, 6, 7, 8]
    assert [shard.shard for shard in one.shards] == [shard.shard for shard in other.shards]
    assert [shard.summary.size for shard in one.shards] == [shard.summary.size for shard in other.shards]
    assert (one.has_images, one.has_captions) == (other.has_images, other.has_captions) == (True, True)
    expected = keys(load([SourceConfig(shards=pattern)], micro_batch=11, steps=6, config={"lanes": 1}))
    (tmp_path / "fetched").write_text("")
    for copy in (store.cache_dir / "shards").iterdir():
        copy.unlink()
    loader = load(counted, micro_batch=11, steps=6, config={"lanes": 1, "shuffle_shards": 128})
    assert keys(loader) == expected and len(expected) == 66
    assert before and set(fetched().values()) == {1}


def test_changed_gzipped_shards_are_counted_again(tmp_path, store):
    """Local files are compared by size and modification time. Remote shards are identified by name only."""
    plain = tmp_path / "plain.tar"
    for count in (3, 5):
        write_tar(plain, members(range(count)))
        (tmp_path / "0.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
        names = str(tmp_path / "*.tar.gz")
        together(1, 1, lambda ranks, _, names=names: manifest.prepare(names, store, ranks))
        (source,) = open_corpus([SourceConfig(shards=names)], store).sources
        assert isinstance(source.shards, CountedShards) and list(source.sizes) == [count]


def test_joined_manifests_keep_shard_names_of_different_lengths():
    names = ["a.tar", "a-longer-name.tar", "mid.tar"]
    parts = [rows_of([name], [(number, 10 * number, 1)]) for number, name in enumerate(names)]
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        rows = join([parts[number] for number in order])
        assert rows.tolist() == [(names[number].encode(), number, 10 * number, 1) for number in order]


def test_a_manifest_written_by_a_run_is_used_only_for_the_same_shards_in_the_same_order(store):
    a, b = "s3://bucket/a.tar", "s3://bucket/b.tar"
    lists = ([a, b], [b, a], [a], [a, b, b])
    assert len({manifest.cached(names, store) for names in lists}) == len(lists)
    assert manifest.cached(lists[0], store) == manifest.cached(list(lists[0]), store)


def test_sample_counts_of_img2dataset_are_accepted(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", members(range(4 + i)))
        (tmp_path / f"{i}_stats.json").write_text(json.dumps({"count": 99, "successes": 4 + i}))
    shards = [str(tmp_path / f"{i}.tar") for i in range(3)]
    rows = read(make(tmp_path, *shards, "--stats"))
    assert rows[["name", "samples", "kind"]].tolist() == [
        (name.encode(), 4 + i, KINDS.index("paired")) for i, name in enumerate(shards)
    ]
    assert len(list(tmp_path.glob("*.index"))) == 1  # only the shard that determined the kind is indexed
    (tmp_path / "1_stats.json").write_text("{}")
    with pytest.raises(UserError, match="successes: must be a number of samples, but is None"):
        make(tmp_path, *shards, "--stats")
    with pytest.raises(UserError, match="--stats can be used only with --out"):
        main(["table", *shards, "--stats"])


def test_a_shard_with_another_number_of_samples_does_not_change_the_order(load, tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", members(range(i * 10, i * 10 + 5))) for i in range(3)]
    path = make(tmp_path, *paths)
    before = keys(load([SourceConfig(shards=path)], micro_batch=15, steps=1))
    write_tar(paths[0], members(range(3)))  # two fewer samples
    write_tar(paths[1], members(range(10, 19)))  # four more samples
    (batch,) = load([SourceConfig(shards=path)], micro_batch=15, steps=1)
    assert keys([batch]) == [key for key in before if key not in ("00003", "00004")]
    assert [skipped.reason for skipped in batch.skipped] == [
        "the shard has only 3 samples, but its manifest states 5"
    ] * 2
    assert {skipped.shard for skipped in batch.skipped} == {paths[0]}


def test_incomplete_shards_are_named(tmp_path, capsys):
    whole = write_tar(tmp_path / "0.tar", members(range(4)))
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:6000])
    path = make(tmp_path, whole, str(tmp_path / "1.tar"))
    out = capsys.readouterr().out
    assert f"note: {tmp_path}/1.tar: the tar has no end mark" in out and "; 2 of its samples are counted" in out
    assert out.endswith("2 shards with 6 samples; 0 shards unreadable\n")
    make(tmp_path, path, out="again.npy")
    assert f"note: {path}: the tar has no tar header" in capsys.readouterr().out


def test_files_that_are_not_manifests_are_refused(tmp_path, store):
    bad, other = tmp_path / "bad.npy", tmp_path / "other.npy"
    bad.write_bytes(b"\x93NUMPY junk")
    np.save(other, np.arange(3))
    for path, words in (
        (bad, "is damaged"),
        (other, "is a .npy file but not a manifest"),
        (tmp_path / "none.npy", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            open_corpus([SourceConfig(shards=str(path))], store)
    with pytest.raises(UserError, match="mixes manifests and tar files"):
        open_corpus([SourceConfig(shards=[str(other), "x.tar"])], store)
    rows = rows_of(["x.tar"], [(1, 0, 0)])
    rows["name"] = b"\xff.tar"
    write(bad, rows)
    with pytest.raises(UserError, match="the name of a shard is not UTF-8"):
        open_corpus([SourceConfig(shards=str(bad))], store)
    write(bad, rows_of(["x.tar"], [(3, 0, UNREAD)]))
    with pytest.raises(UserError, match=r"is damaged .*unread but has samples"):
        open_corpus([SourceConfig(shards=str(bad))], store)
    write(bad, rows_of(["x.tar"], [((1 << 32) - 1, 0, 0)]))
    with pytest.raises(UserError, match="states 4,294,967,295 samples for one shard; the maximum is 67,108,864"):
        open_corpus([SourceConfig(shards=str(bad))], store)
    write(bad, rows_of(["x.tar"], [(0, 0, 0)]))
    with pytest.raises(UserError, match="contain no samples"):
        open_corpus([SourceConfig(shards=str(bad))], store)


def together(world, nodes, work):
    """Run `work(ranks, node)` in `world` threads, and return the result or the error message of each. The threads of a
    node are given the same number `node`, so that they can share a store."""
    barrier, box = threading.Barrier(world, timeout=60), [None] * world

    def run(rank):
        def gather(value):
            box[rank] = value
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        each = world // nodes
        ranks = SimpleNamespace(rank=rank, world=world, local_rank=rank % each, is_main=rank == 0, gather=gather)
        ranks.together = partial(Ranks.together, ranks)
        try:
            return work(ranks, rank // each)
        except UserError as error:
            return str(error)

    return map_threads(run, range(world))


def test_nodes_count_samples_together_and_each_stores_the_manifest(tmp_path, remote):
    pattern, fetched = remote
    stores = [ShardStore(tmp_path / f"node{n}") for n in range(2)]
    work = lambda ranks, node: manifest.prepare(pattern, stores[node], ranks)  # noqa: E731
    for _ in range(2):  # the second call counts nothing
        assert together(4, 2, work) == [None] * 4
        assert fetched() == {str(i): 1 for i in range(6)}
    for store in stores:
        corpus = open_corpus([SourceConfig(shards=pattern)], store)
        assert list(corpus.sources[0].sizes) == [3, 4, 5, 6, 7, 8] and not corpus.damaged
    assert sum(fetched().values()) == 6
    (lost,) = (stores[1].cache_dir / "manifests").iterdir()
    lost.unlink()  # one node has lost it, and all nodes count again
    assert together(4, 2, work) == [None] * 4 and lost.exists()


def test_a_rank_counts_the_samples_of_the_shards_of_its_lanes(tmp_path, monkeypatch):
    """In the second source of a run, each rank counts the shards that its lanes own."""
    store, counted = ShardStore(tmp_path), {}
    names = [f"pipe:cat {i}.tar" for i in range(12)]

    def count(own, *_):
        counted[threading.get_ident()] = {names.index(name) for name in own}
        return rows_of(own, [(10, 0, 0)] * len(own)), []

    monkeypatch.setattr(manifest, "count", count)
    together(4, 4, lambda ranks, _: manifest.prepare(names, store, ranks, key=(5, 1)))
    order = Order([[10] * 5, [10] * 12], None, 1, 5, lanes=4)
    owned = [set(order._lane(lane).sources[1].pieces.shards.tolist()) for lane in range(4)]
    assert sorted(map(sorted, counted.values())) == sorted(map(sorted, owned)) and len(set.union(*owned)) == 12


@pytest.mark.parametrize("samples", [2, 9])
def test_a_counted_shard_has_the_modality_of_the_manifest(store, samples):
    rows = rows_of(["a.tar"] * len(KINDS), [(samples, 7, kind) for kind in range(len(KINDS))])
    for shard, kind in zip(CountedShards(rows, store), KINDS):
        assert (shard.summary.modality, shard.summary.samples, shard.summary.size) == (kind, samples, 7)


@pytest.mark.parametrize("case", ["another", "damaged"])
def test_nodes_whose_manifests_differ_count_again(tmp_path, remote, case):
    """The nodes have counted the samples in separate runs, between which a shard has changed."""
    pattern, fetched = remote
    stores = [ShardStore(tmp_path / f"node{n}") for n in range(2)]
    for number, store in enumerate(stores):
        together(1, 1, lambda ranks, _, store=store: manifest.prepare(pattern, store, ranks))
        if number == 0:
            write_tar(tmp_path / "far/5.tar", members(range(50, 52), "text"))
    paths = [manifest.cached(expand(pattern), store) for store in stores]
    assert [read(path)["samples"].tolist() for path in paths] == [[3, 4, 5, 6, 7, last] for last in (8, 2)]
    if case == "damaged":
        paths[1].write_bytes(b"half a manifest")
    before = fetched()
    work = lambda ranks, node: manifest.prepare(pattern, stores[node], ranks)  # noqa: E731
    assert together(4, 2, work) == [None] * 4
    first, second = (read(path) for path in paths)
    assert first.tolist() == second.tolist() and first["samples"].sum() in (27, 33)
    assert fetched() == before  # both nodes have cached all shards


def test_shards_are_counted_in_advance_if_only_the_last_of_them_is_remote(tmp_path, remote):
    store, local = ShardStore(tmp_path / "node"), write_tar(tmp_path / "local.tar", members(range(3)))
    names = [local, f"pipe:cat {tmp_path}/far/5.tar"]
    together(1, 1, lambda ranks, _: manifest.prepare(names, store, ranks))
    assert read(manifest.cached(names, store))["samples"].tolist() == [3, 8]


def test_an_error_on_one_rank_is_raised_on_all(tmp_path, remote):
    pattern, _ = remote
    stores = [ShardStore(tmp_path / f"node{n}") for n in range(2)]
    (stores[1].cache_dir / "manifests").write_text("in the way")
    found = together(4, 2, lambda ranks, node: manifest.prepare(pattern, stores[node], ranks))
    assert len(set(found)) == 1 and "manifests" in found[0]


def test_a_shard_that_could_not_be_counted_is_reported_and_counted_later(tmp_path, remote, monkeypatch):
    monkeypatch.setattr("m3ae_fast.data.shard_store.retry_after", lambda *_: 0.0)
    pattern, _ = remote
    far = tmp_path / "far/2.tar"
    far.rename(tmp_path / "away")
    store = ShardStore(tmp_path / "node")
    prepare = lambda: together(1, 1, lambda ranks, _: manifest.prepare(pattern, store, ranks))  # noqa: E731
    assert prepare() == [None]
    corpus = open_corpus([SourceConfig(shards=pattern)], store)
    assert corpus.samples == 28 and corpus.counted == [(1, 6)] and "cannot be read" in str(corpus.damaged[0])
    with pytest.raises(UserError, match="1 of 6 shards cannot be read"):
        corpus.require(0.1)
    (tmp_path / "away").rename(far)
    assert prepare() == [None]
    assert open_corpus([SourceConfig(shards=pattern)], store).samples == 33


def test_the_reason_why_no_shard_can_be_counted_is_reported_on_all_ranks_and_nothing_is_stored(
    tmp_path, remote, monkeypatch
):
    monkeypatch.setattr("m3ae_fast.data.shard_store.retry_after", lambda *_: 0.0)
    pattern, _ = remote
    (tmp_path / "far").rename(tmp_path / "away")
    stores = [ShardStore(tmp_path / f"node{n}") for n in range(2)]
    work = lambda ranks, node: manifest.prepare(pattern, stores[node], ranks)  # noqa: E731
    for message in together(4, 2, work):
        assert "cannot be read (" in message and message.endswith("; the same applies to 5 others")
    assert not any((store.cache_dir / "manifests").exists() for store in stores)
    (tmp_path / "away").rename(tmp_path / "far")
    assert together(4, 2, work) == [None] * 4


def test_a_manifest_of_two_billion_samples_uses_little_memory(tmp_path, store):
    """The manifest, order and reader of 231,349 shards take less than 50 MB of a process's private memory."""
    names = [f"s3://bucket/laion2b/{i:06d}.tar" for i in range(231_349)]
    path = tmp_path / "laion2b.npy"
    write(path, rows_of(names, [(9000, 0, KINDS.index("paired"))] * len(names)))
    assert path.stat().st_size < 12e6
    del names
    tracemalloc.start()
    try:
        (source,) = open_corpus([SourceConfig(shards=str(path))], store).sources
        order, reader = Order([source.sizes], None, 2, 42, lanes=64), Reader(source, store)
        place = order.locate(10**9)
        shard, _ = reader.find(place.sample)
        assert source.shards[shard].shard == f"s3://bucket/laion2b/{shard:06d}.tar"
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert int(source.sizes.sum()) == 231_349 * 9000 and UNREAD == 4
