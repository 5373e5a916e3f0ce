"""Sizes of images from their headers, and the distribution of native images over the ranks of a node by size."""

import io
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.config import DataConfig, MaskingConfig, ModelConfig, SourceConfig
from m3ae_fast.data import Preparation, ShardStore, Share, open_corpus, train_loader
from m3ae_fast.data.image_sizes import measured
from m3ae_fast.data.rank_share import balanced
from m3ae_fast.images.decoding import MAX_PIXELS, size_of
from m3ae_fast.process.ranks import Node
from tests.helpers.image_formats import CASES, RGB
from tests.helpers.shards import picture, write_tar

SIDES = [(8 * rows, 8 * columns) for rows in range(1, 9) for columns in (1, 2, 4, 8)]  # height and width


_ODD = b"\x93NUMPY\x01\x00\xd0\x00" + b"[" * 200 + b" " * 8  # a header for which NumPy's parser raises an unusual error


@pytest.fixture
def shard(tmp_path):
    """Return the path of a shard of images of many sizes, with a broken image and a text without an image."""
    files = [(f"{n}.png", picture(n, size[::-1], fmt="PNG")) for n, size in enumerate(SIDES)]
    return Path(write_tar(tmp_path / "train.tar", [*files, ("broken.png", b"no image"), ("text.txt", b"a cat")]))


def open_images(shards):
    return open_corpus([SourceConfig(shards=str(shards), modality="image")], ShardStore(None))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fmt} {case.stored}")
def test_the_size_of_an_image_is_read_from_its_header(case):
    if case.refused is None:
        height, width = size_of(case.make())
        assert sorted((height, width)) == sorted(RGB.shape[:2] if case.pixels is None else case.pixels.shape[:2])


def test_stored_image_sizes_are_used_until_the_shard_changes(shard, monkeypatch):
    (source,) = measured(open_images(shard)).sources
    assert source.image_sizes.tolist() == [*map(list, SIDES), [0, 0], [0, 0]]
    kept = shard.with_name("train.tar.sizes.index")
    with monkeypatch.context() as patch:
        patch.setattr("m3ae_fast.data.image_sizes.size_of", None)  # no header is read again
        assert np.array_equal(measured(open_images(shard)).sources[0].image_sizes, source.image_sizes)
    damage = (lambda: os.truncate(kept, 100), lambda: np.savez(kept.open("wb"), a=1), lambda: kept.write_bytes(_ODD))
    for make in (*damage, lambda: (kept.unlink(), os.mkfifo(kept))):
        make()
        assert np.array_equal(measured(open_images(shard)).sources[0].image_sizes, source.image_sizes)
    rows = np.load(kept)
    np.save(kept.open("wb"), np.where(rows == 64, -1, rows))  # an impossible size
    assert np.array_equal(measured(open_images(shard)).sources[0].image_sizes, source.image_sizes)
    write_tar(shard, [("one.png", picture(0, (24, 16), fmt="PNG"))])
    assert measured(open_images(shard)).sources[0].image_sizes.tolist() == [[16, 24]]
    assert len(open_images(f"{shard.parent}/*").sources[0].shards) == 1  # the file with the sizes is not a shard
    before = shard.stat()
    write_tar(shard, [("one.png", picture(0, (40, 8), fmt="PNG"))])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert shard.stat().st_size == before.st_size and measured(open_images(shard)).sources[0].image_sizes.tolist() == [
        [8, 40]
    ]


def test_each_source_has_the_image_sizes_of_its_shards(tmp_path):
    sizes = {"a": [(8, 16)], "b": [(24, 8), (16, 32)], "c": [(40, 8)]}  # width and height
    for name, own in sizes.items():
        write_tar(tmp_path / f"{name}.tar", [(f"{i}.png", picture(i, size, fmt="PNG")) for i, size in enumerate(own)])
    sources = [
        SourceConfig(shards=shards, modality="image") for shards in (f"{tmp_path}/{{a,b}}.tar", f"{tmp_path}/c.tar")
    ]
    first, second = measured(open_corpus(sources, ShardStore(None))).sources
    assert first.image_sizes.tolist() == [[16, 8], [8, 24], [32, 16]] and second.image_sizes.tolist() == [[8, 40]]


def test_a_header_may_end_far_after_the_beginning_of_a_file(tmp_path):
    """In a JPEG file, a comment of 60 kB precedes the size."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16)).save(file, "JPEG", comment=bytes(60_000))
    shard = write_tar(tmp_path / "train.tar", [("0.jpg", file.getvalue()), ("1.jpg", picture(1, (16, 8)))])
    assert measured(open_images(shard)).sources[0].image_sizes.tolist() == [[16, 24], [8, 16]]


def test_image_sizes_are_not_read_from_downloaded_shards(shard, monkeypatch):
    corpus = open_images(shard)
    monkeypatch.setattr(corpus.store, "is_staged", lambda _: True)
    assert measured(corpus) is corpus


def test_balancing_equalises_the_cost_of_parts_and_keeps_their_lengths():
    work = np.random.RandomState(0).lognormal(4, 0.5, 8 * 3 * 7 + 1).astype(int).tolist()
    parts = [list(range(start, start + 7)) for start in range(0, 8 * 3 * 7, 7)]
    parts += [[], [8 * 3 * 7]]
    shared = balanced(parts, work.__getitem__)
    assert list(map(len, shared)) == list(map(len, parts))
    assert sorted(chain(*shared)) == sorted(chain(*parts))
    before, after = ([sum(work[p] for p in part) for part in found[:24]] for found in (parts, shared))
    assert np.std(after) < 0.1 * np.std(before)


@pytest.mark.parametrize(("accumulation", "repeats", "most"), [(1, 1, 64), (2, 1, 64), (1, 2, 64), (1, 1, 16)])
def test_images_of_a_step_are_balanced_over_the_ranks_of_a_node_by_size(shard, accumulation, repeats, most):
    """Balancing does not change the samples of a step or of a node. The cost of an image is its number of patches,
    which has a maximum. If samples have several views, which must stay together, nothing is balanced."""
    model = ModelConfig(
        size=None, emb_dim=8, depth=1, num_heads=1, dec_emb_dim=8, dec_depth=1, dec_num_heads=1, image_size=64,
        patch_size=8, text_length=4, vocab_size=0, resize="native", max_patches=most,
    )  # fmt: skip
    config = DataConfig(train=[SourceConfig(shards=str(shard), modality="image")], workers=0, repeats=repeats)
    preparation = Preparation(Geometry.of(model), MaskingConfig(), None, seed=0)

    def load(rank, corpus):
        node = Node("run", [0, 1] if rank < 2 else [2, 3])
        return list(train_loader(config, corpus, preparation, Share(32, accumulation, rank, 4), range(6), node=node))

    def found(corpus):
        """Return the keys and the numbers of patches of each step, by rank."""
        ranks = [load(rank, corpus) for rank in range(4)]
        steps = [[batches[i : i + accumulation] for batches in ranks] for i in range(0, 6 * accumulation, accumulation)]
        keys = [[[k for b in own for k in (*b.keys, *(s.key for s in b.skipped))] for own in step] for step in steps]
        return keys, np.array([[sum(r * c for b in own for r, c in b.grids) for own in step] for step in steps])

    corpus = open_images(shard)
    plain, patches = found(corpus)
    shared, equal = found(measured(corpus))
    if repeats > 1:
        assert shared == plain
        return
    for before, after in zip(plain, shared):
        for node in (slice(0, 2), slice(2, 4)):
            assert sorted(chain(*before[node])) == sorted(chain(*after[node]))
    differences = [abs(found[:, ::2] - found[:, 1::2]).mean() for found in (patches, equal)]
    assert differences[1] < 0.25 * differences[0]


def test_a_file_that_is_not_an_image_has_no_size():
    with pytest.raises(BadSample, match="not an image"):
        size_of(b"nothing")

    def header(*shape):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.getvalue()

    for shape in ((1 << 40, 3), (MAX_PIXELS // 2 + 1, 2), (-5, 8), (0, 8), (7,)):  # headers may contain any numbers
        with pytest.raises(BadSample, match=r"the array has .*, which is not a valid image size"):
            size_of(header(*shape))
    assert size_of(header(MAX_PIXELS // 2, 2, 13)) == (MAX_PIXELS // 2, 2)
