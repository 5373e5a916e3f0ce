"""A source that uses the captions of a fraction of its pairs."""

import hashlib

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import MaskingConfig, SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from tests.data.test_loader import by_step, stream
from tests.data.test_manifest import make
from tests.helpers.shards import caption, members, write_tar

UNMASKED = {"masking": MaskingConfig(image_ratio=0, text_ratio=0)}


@pytest.fixture
def pairs(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"pairs-{i}.tar", members(range(i * 20, i * 20 + 20)))
    return str(tmp_path / "pairs-*.tar")  # 60 samples


def source(shards, fraction, **more):
    return [SourceConfig(shards=shards, caption_fraction=fraction, **more)]


def captions(batches):
    """Return the token ids of samples with a caption, by key without the shard. The text follows the cls token and 16
    patches."""
    found = {}
    for key, (_, tokens, rows, _) in stream(batches):
        if text := [token for token, row in zip(tokens, rows) if row > 16]:
            found[key.rpartition("/")[2]] = text
    return found


@pytest.mark.parametrize("modality", ["auto", "paired", "any"])
def test_caption_fractions_1_and_0_are_bitwise_equal_to_paired_and_image_only_training(load, pairs, modality):
    whole = stream(load([SourceConfig(shards=pairs, modality=modality)], steps=20))
    assert stream(load(source(pairs, 1.0, modality=modality), steps=20)) == whole
    bare = stream(load(source(pairs, 0.0, modality=modality), steps=20, tokenizer=False))
    assert bare == stream(load([SourceConfig(shards=pairs, modality="image")], steps=20, tokenizer=False)) != whole


def test_a_larger_caption_fraction_contains_the_captions_of_a_smaller_one(load, pairs):
    """The kept captions are those with the lowest hashes, regardless of the seed and the epoch."""
    hashes = {f"{i:05d}": hashlib.blake2b(f"{i:05d}".encode(), digest_size=8).hexdigest() for i in range(60)}
    kept = {
        fraction: captions(load(source(pairs, fraction), steps=15, **UNMASKED)).keys()
        for fraction in (0, 0.1, 0.3, 0.7, 1)
    }
    for fraction, keys in kept.items():
        assert keys == set(sorted(hashes, key=hashes.__getitem__)[: len(keys)])
        assert abs(len(keys) / 60 - fraction) < 0.1
        epochs = [
            load(source(pairs, fraction), steps=start + 15, start_step=start, seed=9, **UNMASKED) for start in (0, 15)
        ]
        assert [captions(epoch).keys() for epoch in epochs] == [keys, keys]
    assert 0 < len(kept[0.1]) < len(kept[0.3]) < len(kept[0.7]) < len(kept[1]) == 60


def test_selected_captions_do_not_depend_on_ranks_workers_or_resuming(load, pairs):
    given = source(pairs, 0.5)
    whole = by_step(load, given, 6, micro_batch=12)
    assert by_step(load, given, 6, micro_batch=6, world=2) == whole
    assert by_step(load, given, 6, micro_batch=12, config={"workers": 2}) == whole
    assert by_step(load, given, 6, micro_batch=12, start=4) == whole[4:]


def test_the_caption_fraction_does_not_apply_to_unpaired_text(load, tmp_path, pairs):
    """The unpaired text is in a separate source or in the same shard."""
    text = write_tar(tmp_path / "text.tar", members(range(100, 130), "text"))
    mixed = write_tar(tmp_path / "mixed.tar", [*members(range(200, 220)), *members(range(300, 310), "text")])
    both = [*source(pairs, 0.3), SourceConfig(shards=text)]
    found = captions(load(both, micro_batch=10, steps=27, **UNMASKED))
    kept = captions(load(source(pairs, 0.3), steps=15, **UNMASKED))
    tokenizer = load(pairs).dataset.preparation.tokenizer
    unpaired = {f"{i:05d}": tokenizer.encode(caption(i)).tolist() for i in range(100, 130)}
    assert found == kept | unpaired and 0 < len(kept) < 60
    assert captions(load(source(mixed, 0.0), micro_batch=10, steps=3, **UNMASKED)).keys() == {
        f"{i:05d}" for i in range(300, 310)
    }


def test_a_tokenizer_is_required_only_if_captions_remain(tmp_path, store, pairs):
    assert open_corpus(source(pairs, 0.01), store).has_captions
    assert not open_corpus(source(pairs, 0.0), store).has_captions
    mixed = write_tar(tmp_path / "mixed.tar", [*members(range(2)), *members([3], "text")])
    assert open_corpus(source(mixed, 0.0), store).has_captions


def test_pairs_may_be_in_the_last_of_several_shards(tmp_path, store):
    kinds = {"a": "image", "b": "image", "c": "paired"}
    shards = [write_tar(tmp_path / f"{name}.tar", members(range(3), kind)) for name, kind in kinds.items()]
    assert open_corpus(source(shards, 0.5), store).has_captions
    assert open_corpus(source(shards, 1.0, modality="paired"), store).has_captions


def test_a_caption_fraction_without_pairs_is_refused(tmp_path, store):
    for modality in ("image", "text"):
        with pytest.raises(ValueError, match=f"caption_fraction 0.5 needs pairs, but modality is '{modality}'"):
            source("a.tar", 0.5, modality=modality)
    images = write_tar(tmp_path / "a.tar", members(range(3), "image"))
    for shards in (images, make(tmp_path, images)):
        with pytest.raises(UserError, match="contain no pairs, so caption_fraction has no effect"):
            open_corpus(source(shards, 0.5), store)
    paired = make(tmp_path, write_tar(tmp_path / "b.tar", members(range(3))), out="b.npy")
    assert not open_corpus(source(paired, 0.0), ShardStore(tmp_path / "other")).has_captions
