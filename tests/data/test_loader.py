import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from m3ae_fast.base.bad_samples import BadSamples, Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.randomness import RandomStreams
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import MaskingConfig, SourceConfig
from m3ae_fast.data import ShardStore, batches_ahead, open_corpus
from m3ae_fast.data.dataset import Samples
from m3ae_fast.data.loader import samples_of
from m3ae_fast.data.shard_store import ATTEMPTS
from m3ae_fast.images.crops import centre_crop, random_crop
from m3ae_fast.images.decoding import decode_image
from m3ae_fast.images.patch_grid import Native
from m3ae_fast.process import workers as loader_workers
from m3ae_fast.process.failure_messages import explain
from m3ae_fast.process.workers import Loader, default_workers
from m3ae_fast.shards.sources.caption_table import ImagesMissing
from tests.helpers import threads
from tests.helpers.shards import WORDS, caption, members, picture, write_tar


@pytest.fixture
def paired(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"paired-{i}.tar", members(range(i * 7, i * 7 + 5 + i)))
    return str(tmp_path / "paired-*.tar")  # 18 samples


def test_only_shards_that_are_copied_need_a_fetcher(load, paired, tmp_path):
    assert load(f"pipe:cat {tmp_path}/paired-0.tar").companion is not None
    assert load(paired).companion is None


def content(batch):
    """Return (key, the model's input) for each sample of a batch."""
    found = []
    for i, key in enumerate(batch.keys):
        encoder, decoder = (
            (s.cu_seqlens[i].item(), s.cu_seqlens[i + 1].item()) for s in (batch.encoder, batch.decoder)
        )
        image = batch.images[i].numpy().tobytes() if len(batch.images) == len(batch.keys) else None
        tokens = batch.token_ids[slice(*encoder)].tolist()
        rows = batch.encoder_table_ids[slice(*encoder)].tolist()
        found.append((key, (image, tokens, rows, batch.mask_ids[slice(*decoder)].tolist())))
    return found


def stream(loader):
    """Return the concatenated contents of all batches of a loader."""
    return [item for batch in loader for item in content(batch)]


def by_step(load, shards, steps, *, world=1, accumulation=1, micro_batch, config=None, start=0, **more):
    """Return the sorted samples of all ranks for each step."""
    options = {"world": world, "accumulation": accumulation, "micro_batch": micro_batch, "config": config, **more}
    ranks = [load(shards, rank=r, start_step=start, steps=steps, **options) for r in range(world)]
    turns = [[item for batch in batches for item in content(batch)] for batches in zip(*ranks, strict=True)]
    return [sorted(chain(*turns[i : i + accumulation])) for i in range(0, len(turns), accumulation)]


def test_the_sample_stream_does_not_depend_on_world_size_accumulation_or_workers(load, paired):
    reference = by_step(load, paired, 4, micro_batch=12)
    assert [len(step) for step in reference] == [12] * 4
    for world, accumulation in ((2, 1), (1, 3), (2, 3), (4, 1), (12, 1)):
        micro_batch = 12 // world // accumulation
        assert by_step(load, paired, 4, world=world, accumulation=accumulation, micro_batch=micro_batch) == reference
    for world, accumulation in ((5, 1), (7, 2), (8, 3)):  # the ranks' parts differ by one sample, or some are empty
        options = {"world": world, "accumulation": accumulation, "global_batch": 12}
        assert by_step(load, paired, 4, micro_batch=1, **options) == reference
    for workers in (1, 2):
        assert by_step(load, paired, 4, micro_batch=12, config={"workers": workers}) == reference


def test_the_length_of_a_loader_is_its_number_of_micro_batches(load, paired):
    loader = load(paired, steps=2, accumulation=3, micro_batch=2)
    assert len(list(loader)) == len(loader) == 6


def test_a_resumed_loader_continues_at_the_same_position(load, paired):
    whole = by_step(load, paired, 9, micro_batch=5)
    for start in (1, 4, 8):
        assert by_step(load, paired, 9, micro_batch=5, start=start) == whole[start:]
    assert by_step(load, paired, 9, micro_batch=5, start=9) == []


def test_every_epoch_shows_each_sample_once_and_differently(load, paired):
    batches = stream(load(paired, micro_batch=6, steps=6))
    first, second = dict(batches[:18]), dict(batches[18:])
    assert len(first) == 18
    assert first.keys() == second.keys()
    assert [key for key, _ in batches[:18]] != [key for key, _ in batches[18:]]
    assert all(first[key][0] != second[key][0] for key in first)
    assert sum(first[key][3] != second[key][3] for key in first) > 12


def test_seeds_change_order_crops_and_masks(load, paired):
    one, other = (stream(load(paired, micro_batch=6, steps=3, seed=seed)) for seed in (1, 2))
    assert [key for key, _ in one] != [key for key, _ in other]
    one, other = dict(one), dict(other)
    assert all(one[key][0] != other[key][0] for key in one)
    assert dict(stream(load(paired, micro_batch=6, steps=3, seed=1))) == one


def test_the_global_random_generator_is_not_used(load, paired):
    for config in ({"workers": 0}, {"workers": 1}):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        stream(load(paired, steps=2, config=config))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "failure, explanation",
    [
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
            "/dev/shm is full",
        ),
        (RuntimeError("cannot be pickled"), None),
        (MemoryError(), "a loader worker is out of memory"),
    ],
    ids=repr,
)
def test_a_batch_that_a_worker_cannot_send_ends_the_loader(load, paired, failure, explanation):
    """In a plain torch DataLoader, the thread of the queue drops such a batch, and the loader waits forever. In this
    test, the worker cannot move the batch to shared memory."""

    def refuse(storage):
        raise failure

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ForkingPickler._extra_reducers, torch.UntypedStorage, refuse)
        with pytest.raises(type(failure), match="DataLoader worker") as error:
            next(iter(load(paired, steps=20, config={"workers": 1})))
    assert explanation in str(explain(error.value)) if explanation else explain(error.value) is None
    assert "in refuse" in str(error.value) and str(failure) in str(error.value)  # the message contains the traceback


def test_a_worker_without_memory_to_report_its_error_exits(load, paired, monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(loader_workers, "ExceptionWrapper", refuse)
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.UntypedStorage, refuse)
    with pytest.raises(RuntimeError, match="DataLoader worker") as error:
        next(iter(load(paired, steps=20, config={"workers": 1})))
    assert "a loader worker ended unexpectedly; its output may show the reason" in str(explain(error.value))


@pytest.mark.parametrize("count", [1, 2])
def test_an_exception_in_a_worker_keeps_its_type_message_and_traceback(load, paired, monkeypatch, count):
    def broken(self, positions):
        return {}[f"position {positions}"]

    monkeypatch.setattr(Samples, "__getitems__", broken)
    with pytest.raises(KeyError) as error:
        next(iter(load(paired, steps=20, config={"workers": count})))
    assert explain(error.value) is None  # the error is a bug, so its traceback is shown
    assert "KeyError: 'position " in str(error.value) and "in broken" in str(error.value)


def test_a_user_error_in_a_worker_is_reported_in_one_line(load, paired, monkeypatch):
    def refuse(self, positions):
        raise ImagesMissing("captions.csv: has no column x:\n name another one")

    monkeypatch.setattr(Samples, "__getitems__", refuse)
    for count in (0, 1):
        with pytest.raises(UserError) as error:
            next(iter(load(paired, steps=20, config={"workers": count})))
        assert str(error.value) == "captions.csv: has no column x:\n name another one"


def test_only_a_worker_ended_by_a_signal_is_reported_as_killed(load, paired, monkeypatch):
    for end, message in (
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed"),
        (lambda: os._exit(3), "ended un"),
    ):
        monkeypatch.setattr(Samples, "__getitems__", lambda self, positions, end=end: end())
        with pytest.raises(RuntimeError, match="DataLoader worker") as error:
            next(iter(load(paired, steps=20, config={"workers": 1})))
        assert f"a loader worker {message}" in str(explain(error.value))


def test_no_two_uses_of_a_sample_share_random_numbers(load, paired, monkeypatch):
    """The crop, the masks, the predicted patches and tokens, the transform and the forward pass of each view in each
    epoch have separate seeds."""
    seeds, seed_of = [], RandomStreams.seed
    monkeypatch.setattr(RandomStreams, "seed", lambda *key: seeds.append(seed_of(*key)) or seeds[-1])
    masking = MaskingConfig(image_predicted=0.5, text_predicted=0.5)
    loader = load(paired, micro_batch=6, steps=12, config={"repeats": 2}, masking=masking)
    loader.dataset.preparation = replace(loader.dataset.preparation, transform=lambda image, seed: image)
    assert sum(len(batch.keys) for batch in loader) == 72
    assert len(seeds) == len(set(seeds)) == 6 * 72


def test_samples_are_found_by_key_in_shards_after_text_only_shards(load, tmp_path):
    texts = write_tar(tmp_path / "a.tar", [*members(range(3), "text"), *members(range(3, 5))])
    wanted = write_tar(tmp_path / "b.tar", members(range(5, 9)))
    samples = load([texts, wanted]).dataset
    corpus = open_corpus([SourceConfig(shards=[texts, wanted])], ShardStore())
    keys = [f"{wanted}/{number:05d}" for number in (6, 8)] + [f"{texts}/00004"]
    found = samples_of(corpus, samples.preparation, keys)
    assert {key: sample.key for key, sample in found.items()} == {key: key for key in keys}
    for key in keys:
        assert torch.equal(found[key].image, centre_crop(decode_image(picture(int(key[-5:])), 3), 32))


def test_an_evaluation_reads_every_sample_once(load, paired):
    def evaluate(world, **options):
        ranks = [load(paired, train=False, rank=r, world=world, micro_batch=4, **options) for r in range(world)]
        return [item for batches in zip(*ranks, strict=True) for batch in batches for item in content(batch)]

    reference = evaluate(1)
    assert [key.rpartition("/")[2] for key, _ in reference] == [
        f"{i * 7 + n:05d}" for i in range(3) for n in range(5 + i)
    ]
    assert evaluate(1) == reference
    for world in (2, 3, 7):
        assert evaluate(world) == reference
    assert evaluate(2, samples=9) == evaluate(1, samples=9) == reference[::2]
    for number, (_, (image, *_)) in zip((0, 1, 2), reference):
        assert image == centre_crop(decode_image(picture(number), 3), 32).numpy().tobytes()


def test_captions_are_tokenised_into_the_batch(load, paired):
    loader = load(paired, train=False, micro_batch=18, masking=MaskingConfig(image_ratio=0.5, text_ratio=0.0))
    tokenizer = loader.dataset.preparation.tokenizer
    numbers = [i * 7 + n for i in range(3) for n in range(5 + i)]
    for number, (_, (_, tokens, _, _)) in zip(numbers, stream(loader), strict=True):
        assert [t for t in tokens if t >= 0] == tokenizer.encode(caption(number)).tolist()


def test_the_limit_of_open_files_is_raised_for_many_prefetched_batches(load, paired, monkeypatch):
    monkeypatch.setattr(batches_ahead, "PREFETCH", 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, hard))
    try:
        batches = list(load(paired, micro_batch=2, steps=20, config={"workers": 1}))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(batches) == 20


def test_workers_start_if_the_path_of_the_temporary_folder_is_long(load, paired, tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 25)  # the paths of sockets in this folder would be too long
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    assert len(list(load(paired, micro_batch=2, steps=3, config={"workers": 1}))) == 3
    assert tempfile.gettempdir() == str(folder)


def test_a_deleted_loader_keeps_no_shard_open(load, paired):
    """A run creates a loader for each figure that it draws, so shards that stayed open would accumulate."""

    def shards_open() -> int:
        paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        open_now = {os.readlink(path) for path in paths if os.path.exists(path)}
        return sum(os.path.basename(path).startswith("paired") and path.endswith(".tar") for path in open_now)

    loader = load(paired, micro_batch=9, train=False)
    before = shards_open()
    assert list(loader) and shards_open() == before + 3
    del loader
    assert shards_open() == before


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_masks_follow_the_settings_of_the_config(load, paired, per):
    masking = MaskingConfig(image_ratio=0.75, text_ratio=0.5, per=per)
    batches = list(load(paired, micro_batch=9, steps=4, masking=masking))
    visible = [[tuple(r for r in rows if 0 < r <= 16) for _, (_, _, rows, _) in content(batch)] for batch in batches]
    assert all(len(rows) == 4 for step in visible for rows in step)
    assert [len(set(step)) for step in visible] == [1] * 4 if per == "batch" else min(map(len, map(set, visible))) > 6
    assert len({step[0] for step in visible}) > 2
    # As in the official code, the mask is sampled for all positions of the text, and truncated to the length of the
    # caption.
    for batch in batches:
        for key, (_, _, rows, mask_ids) in content(batch):
            length = len(load(paired).dataset.preparation.tokenizer.encode(caption(int(key[-5:]))))
            seen, masked = sum(r > 16 for r in rows), sum(m == 1 for m in mask_ids)
            assert seen + masked == length
            assert seen <= 4


def test_training_predicts_a_fraction_of_the_masked_tokens_and_evaluations_predict_all(load, paired):
    """Each modality has its own fraction."""
    masking = MaskingConfig(image_ratio=0.75, text_ratio=0.75, image_predicted=0.25, text_predicted=0.5)
    for train in (True, False):
        loader = load(paired, micro_batch=9, steps=2, masking=masking, train=train)
        for key, (_, _, rows, mask_ids) in stream(loader):
            words = len(loader.dataset.preparation.tokenizer.encode(caption(int(key[-5:]))))
            masked = words - sum(row > 16 for row in rows)
            images, texts = (3, max(round(0.5 * masked), min(masked, 1))) if train else (12, masked)
            assert (mask_ids.count(0), mask_ids.count(1)) == (images, texts) and words > 1


def test_samples_that_share_a_mask_select_the_predicted_tokens_separately(load, paired):
    """Each sample selects some of its masked patches. It selects the same positions in the list of its masked
    patches, whether it has a mask of its own or shares one."""
    selected = {}
    for per in ("sample", "batch"):
        masking = MaskingConfig(image_predicted=0.25, per=per)
        dataset = load(paired, micro_batch=9, masking=masking).dataset
        samples = [dataset[position] for position in range(9)]
        assert (len({tuple(sample.image_mask.tolist()) for sample in samples}) == 1) == (per == "batch")
        selected[per] = [tuple(sample.image_predicted[sample.image_mask].tolist()) for sample in samples]
    assert selected["batch"] == selected["sample"] and len({*selected["batch"]}) > 6


NATIVE = Native(patch_size=8, least=1, most=16, longest=8, positions="absolute")


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_masks_of_native_images_follow_the_settings_of_the_config(load, tmp_path, per):
    """Each image is masked with the mask ratio. An image of 32 x 32 pixels and every caption have the same masks as in
    a model with only this image size. With one mask per batch, all images of the same size have the same mask."""
    sizes = [(32, 32), (64, 16), (40, 24), (16, 16)]
    pictures = ((f"{i:05d}.png", picture(i, sizes[i % 4], fmt="PNG")) for i in range(12))
    files = [file for i, own in enumerate(pictures) for file in (own, (f"{i:05d}.txt", caption(i).encode()))]
    path = write_tar(tmp_path / "mixed.tar", files)
    options = {"masking": MaskingConfig(image_ratio=0.75, text_ratio=0.5, per=per), "micro_batch": 12, "train": False}
    native, square = (dict(stream(load(path, native=size, **options))) for size in (NATIVE, None))
    by_size = {}
    for number, (key, (_, tokens, _, masked)) in enumerate(native.items()):
        width, height = sizes[number % 4]
        patches = width * height // 64
        assert masked.count(0) == patches - patches // 4
        assert [token for token in tokens if token >= 0] == [token for token in square[key][1] if token >= 0]
        by_size.setdefault(patches if patches < 16 else (width, height), set()).add(tuple(masked[: 1 + patches]))
        if number % 4 == 0:
            assert masked == square[key][3]
    assert all((len(masks) == 1) == (per == "batch") for masks in by_size.values())


def test_native_images_do_not_depend_on_ranks_workers_or_interruptions(load, paired):
    options = {"native": NATIVE, "config": {"crop_scale": (0.3, 1.0)}}
    whole = by_step(load, paired, 4, micro_batch=6, **options)
    assert by_step(load, paired, 4, micro_batch=3, world=2, **options) == whole
    parts = by_step(load, paired, 4, micro_batch=2, world=1, accumulation=3, start=2, **options)
    assert parts == whole[2:]
    assert len({len(rows) for step in whole for _, (_, _, rows, _) in step}) > 3


def test_a_batch_may_contain_samples_of_sources_of_all_modalities(load, tmp_path):
    write_tar(tmp_path / "p.tar", members(range(10)))
    write_tar(tmp_path / "i.tar", members(range(10, 16), "image"))
    write_tar(tmp_path / "t.tar", members(range(16, 20), "text"))
    sources = [SourceConfig(shards=str(tmp_path / f"{name}.tar")) for name in "pit"]
    for one in (sources, [SourceConfig(shards=str(tmp_path / "*.tar"))]):
        (batch,) = load(one, micro_batch=20, steps=1)
        assert not batch.skipped
        assert sorted(int(key[-5:]) for key in batch.keys) == list(range(20))
        assert batch.counts == (16, 14)
    weighted = [source.model_copy(update={"weight": weight}) for source, weight in zip(sources, (1, 2, 1))]
    keys = [key for batch in load(weighted, micro_batch=10, steps=8) for key in batch.keys]
    # in proportion to the weights
    assert [sum(f"/{name}.tar/" in key for key in keys) for name in "pit"] == [20, 40, 20]


def test_sources_with_the_same_samples_use_different_random_numbers(load, tmp_path):
    sources = [SourceConfig(shards=write_tar(tmp_path / f"{name}.tar", members(range(6)))) for name in "ab"]
    seen = dict(stream(load(sources, micro_batch=12, steps=1)))
    for number in range(6):
        first, second = (seen[f"{tmp_path}/{name}.tar/{number:05d}"] for name in "ab")
        assert first[0] != second[0]


def test_a_source_has_a_loss_weight_in_addition_to_its_sampling_weight(load, tmp_path):
    sources = [SourceConfig(shards=write_tar(tmp_path / f"{n}.tar", members(range(4)))) for n in "ab"]
    (plain,) = load(sources, micro_batch=8, train=False)
    sources[1] = sources[1].model_copy(update={"loss_weight": 0.25})
    (weighted,) = load(sources, micro_batch=8, train=False)
    for name in ("image_row_weight", "text_row_weight"):
        one, other = getattr(plain, name), getattr(weighted, name)
        factors = (other / one)[one > 0]  # the other rows are padding, with which the shapes of batches repeat
        assert factors.unique_consecutive().tolist() == [1.0, 0.25]
    assert torch.equal(plain.text_row_mean_weight, weighted.text_row_mean_weight)
    assert torch.equal(plain.text_row_mean_weight, plain.text_row_weight)
    assert plain.counts == weighted.counts == (8, 8)


def test_repeated_views_are_cropped_from_one_decoded_image(load, paired, monkeypatch):
    decoded = []

    def count(*arguments):
        decoded.append(1)
        return decode_image(*arguments)

    monkeypatch.setattr("m3ae_fast.data.dataset.decode_image", count)
    once = stream(load(paired, micro_batch=6, steps=6))
    assert len(decoded) == 36
    views = stream(load(paired, micro_batch=6, steps=12, config={"repeats": 2}))
    assert len(decoded) == 36 + 36
    assert sorted(views[::2]) == sorted(once)  # the first view is the same as in a run without repeats
    for (key, first), (same_key, second) in zip(views[::2], views[1::2], strict=True):
        assert key == same_key and first[0] != second[0]  # the crops differ
    # the masks differ
    assert sum(first[2:] != second[2:] for (_, first), (_, second) in zip(views[::2], views[1::2])) > 24


def test_repeated_views_do_not_depend_on_ranks_workers_or_interruptions(load, paired):
    config = {"repeats": 3}
    reference = by_step(load, paired, 4, micro_batch=12, config=config)
    for world, accumulation in ((2, 1), (1, 3), (12, 1)):
        options = {"world": world, "accumulation": accumulation, "micro_batch": 12 // world // accumulation}
        assert by_step(load, paired, 4, config=config, **options) == reference
    assert by_step(load, paired, 4, micro_batch=12, config={**config, "workers": 2}) == reference
    assert by_step(load, paired, 4, micro_batch=12, config=config, start=2) == reference[2:]


def views_of(batches):
    """Return (key, token ids, mask ids, table rows, pixels of the visible patches) of each sample of the batches. A
    caption without an image has no pixels."""
    found = []
    for batch in batches:
        patches = F.unfold(batch.images.float(), 8, stride=8).mT.flatten(0, 1)  # [image * L + patch, pixels]
        pixels = patches[batch.patch_ids.long()].numpy()
        for i, (key, (_, tokens, rows, masks)) in enumerate(content(batch)):
            start, end = batch.encoder.cu_seqlens[i : i + 2].tolist()
            sources = [source for source in batch.encoder_src[start:end].tolist() if source >= 0]
            found.append((key, tokens, masks, rows, pixels[sources].tobytes()))
    return found


def test_views_with_one_crop_differ_only_in_their_masks(load, paired, monkeypatch):
    """The batch contains the crop once. It is the same crop as in a run without repeats."""
    resized = []
    monkeypatch.setattr("m3ae_fast.data.dataset.random_crop", lambda *a: resized.append(1) or random_crop(*a))
    once = list(load(paired, micro_batch=6, steps=6))
    assert len(resized) == 36
    batches = list(load(paired, micro_batch=6, steps=18, config={"repeats": 3}, one_crop=True))
    assert len(resized) == 36 + 36
    for batch in batches:
        assert batch.images.shape[0] == 2 and len(batch.grids) == len(batch.keys) == 6 and batch.counts.image == 6
        assert (batch.patch_ids < 32).all() and (batch.image_patch_ids < 32).all()
    assert sorted(views_of(once)) == sorted(views_of(batches)[::3])
    images = [image for batch in once for image in batch.images]
    assert sorted(i.numpy().tobytes() for i in images) == sorted(i.numpy().tobytes() for b in batches for i in b.images)
    masks = [masks for _, _, masks, _, _ in views_of(batches)]
    assert sum(a != b for a, b in zip(masks[::3], masks[1::3])) > 30 < sum(a != b for a, b in zip(masks, masks[2::3]))


def test_views_with_one_crop_do_not_depend_on_ranks_workers_or_interruptions(load, paired):
    """The views of a sample may be divided over steps, ranks and micro-batches."""

    def steps(world=1, accumulation=1, batch=12, start=0, workers=0):
        options = {"global_batch": batch, "accumulation": accumulation, "config": {"repeats": 5, "workers": workers}}
        ranks = [
            load(paired, world=world, rank=rank, start_step=start, steps=6, one_crop=True, **options)
            for rank in range(world)
        ]
        turns = [views_of(batches) for batches in zip(*ranks, strict=True)]
        return [sorted(chain(*turns[i : i + accumulation])) for i in range(0, len(turns), accumulation)]

    reference = steps()
    assert [len(step) for step in reference] == [12] * 6
    for world, accumulation in ((2, 1), (1, 3), (5, 1), (3, 4), (12, 1)):
        assert steps(world, accumulation) == reference
    assert steps(workers=2) == reference and steps(start=3) == reference[3:]


def test_views_with_one_crop_of_captions_and_of_damaged_images(load, tmp_path):
    """Captions without an image lie between samples with an image. A damaged image is skipped with all its views."""
    damaged = members(range(8, 9))
    damaged = [(name, data[:60] if name.endswith(("jpg", "png")) else data) for name, data in damaged]
    kinds = [members(range(4), "image"), members(range(4, 6), "text"), damaged, members(range(9, 12))]
    path = write_tar(tmp_path / "mixed.tar", list(chain(*kinds)))
    (batch,) = load(path, micro_batch=20, steps=1, config={"repeats": 2}, one_crop=True)
    assert len(batch.skipped) == 2 and len(batch.keys) == 18
    assert (len(batch.images), len(batch.grids), batch.captions) == (7, 14, 10)
    views = views_of([batch])
    (whole,) = load(path, micro_batch=10, steps=1)
    assert sorted(views[::2]) == sorted(views_of([whole]))


def test_image_only_and_text_only_shards_are_read(load, tmp_path):
    images = write_tar(tmp_path / "i.tar", members(range(6), "image"))
    texts = write_tar(tmp_path / "t.tar", members(range(6), "text"))
    (batch,) = load(images, micro_batch=6, steps=1, tokenizer=False)
    assert (len(batch.images), batch.captions, len(batch.text_rows)) == (6, 0, 0)
    (batch,) = load(texts, micro_batch=6, steps=1)
    assert (len(batch.images), batch.counts.image, len(batch.image_rows)) == (0, 0, 0)
    assert batch.captions == 6
    with pytest.raises(UserError, match=r"data\.tokenizer: no tokenizer is set"):
        load(texts, tokenizer=False)
    paired = write_tar(tmp_path / "p.tar", members(range(6)))
    (batch,) = load([SourceConfig(shards=paired, modality="image")], micro_batch=6, steps=1, tokenizer=False)
    assert batch.counts == (6, 0)


def test_a_shard_may_contain_samples_of_different_modalities(load, tmp_path):
    mixed = [*members(range(5)), *members(range(5, 8), "image"), *members(range(8, 10), "text")]
    path = write_tar(tmp_path / "a.tar", mixed)
    for sources in (path, [SourceConfig(shards=path, modality="any")]):
        (batch,) = load(sources, micro_batch=10, steps=1)
        assert not batch.skipped
        assert batch.counts == (8, 7)
    for modality, counts in (("paired", (5, 5)), ("image", (8, 0)), ("text", (0, 7))):
        (batch,) = load([SourceConfig(shards=path, modality=modality)], micro_batch=10, steps=1)
        assert batch.counts == counts and len(batch.skipped) == 10 - max(counts)
    # a sample's crop and masks do not depend on the other samples of the batch
    (batch,) = load([SourceConfig(shards=path, modality="any")], micro_batch=10, train=False)
    alone = write_tar(tmp_path / "b.tar", members(range(5)))
    (pairs,) = load([SourceConfig(shards=alone)], micro_batch=5, train=False)
    assert torch.equal(batch.images[:5], pairs.images)


BAD = {
    "broken": ([("x.jpg", picture(0)[:-300]), ("x.txt", b"a cat")], "damaged"),
    "empty image": ([("x.jpg", b""), ("x.txt", b"a cat")], "empty"),
    "not an image": ([("x.png", b"hello"), ("x.txt", b"a cat")], "not an image"),
    "no caption": ([("x.jpg", picture(0))], "no caption"),
    "no image": ([("x.txt", b"a cat")], "no image"),
    "not utf-8": ([("x.jpg", picture(0)), ("x.txt", b"\xff\xfe\x00a")], "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_skipped_and_named(load, tmp_path, name, workers):
    files, reason = BAD[name]
    path = write_tar(tmp_path / "a.tar", [*members(range(3)), *files, *members(range(4, 8))])
    # A sample without an image or without a caption is invalid in a source of pairs. By default, it would be used with
    # the modality that it has.
    sources = [SourceConfig(shards=path, modality="paired")]
    (batch,) = load(sources, micro_batch=8, steps=1, config={"workers": workers})
    assert sorted(int(key[-5:]) for key in batch.keys) == [0, 1, 2, 4, 5, 6, 7]
    (skipped,) = batch.skipped
    assert (skipped.shard, skipped.key) == (path, "x")
    assert reason in skipped.reason
    assert str(skipped) == f"{path}/x: {skipped.reason}"
    good = dict(stream(load(write_tar(tmp_path / "b.tar", [*members(range(4)), *members(range(4, 8))]), steps=2)))
    for key, sample in content(batch):  # the other samples are the same as without the bad sample
        assert good[key.replace("a.tar", "b.tar")] == sample


@pytest.mark.parametrize("workers", [0, 1])
def test_a_caption_on_which_the_tokenizers_library_panics_is_a_bad_sample(load, tmp_path, tokenizer_file, workers):
    definition = json.loads(Path(tokenizer_file).read_text())
    # this pattern backtracks until the library raises an error
    rule = {"type": "Replace", "pattern": {"Regex": "(?:a|aa)+$"}, "content": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition | {"normalizer": rule}))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), 8)
    text = "a" * 60 + "b"
    files = [*members(range(3)), ("x.jpg", picture(0)), ("x.txt", text.encode()), *members(range(4, 8))]
    path = write_tar(tmp_path / "a.tar", files)
    (batch,) = load(path, micro_batch=8, steps=1, tokenizer=tokenizer, config={"workers": workers})
    assert sorted(int(key[-5:]) for key in batch.keys) == [0, 1, 2, 4, 5, 6, 7]
    (skipped,) = batch.skipped
    assert skipped.key == "x" and skipped.reason.startswith(
        "the tokenizer fails on the caption: the library panics: Onig"
    )
    with pytest.raises(ValueError, match="the text cannot be used: the tokenizer fails"):
        unmasked_sample(0, None, text, SimpleNamespace(), tokenizer)


def test_a_batch_may_be_empty(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"no") for i in range(4)])
    (batch,) = load(path, micro_batch=4, steps=1, tokenizer=False)
    assert (batch.keys, len(batch.skipped), batch.images.shape) == ([], 4, (0, 3, 32, 32))


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_shard_that_vanishes_is_counted(load, tmp_path, repeats):
    paths = [write_tar(tmp_path / f"{i}.tar", members(range(i * 3, i * 3 + 3))) for i in range(2)]
    loader = load(paths, micro_batch=6 * repeats, steps=1, config={"repeats": repeats})
    (tmp_path / "1.tar").unlink()
    (batch,) = loader
    assert len(batch.keys) == len(batch.skipped) == 3 * repeats
    assert {skipped.shard for skipped in batch.skipped} == {paths[1]}
    assert "cannot be read" in batch.skipped[0].reason


def test_a_failed_download_is_not_retried_for_every_sample(load, tmp_path, store, monkeypatch):
    monkeypatch.setattr("m3ae_fast.data.shard_store.time.sleep", lambda seconds: None)
    path = write_tar(tmp_path / "a.tar", members(range(6)))
    loader = load(f"pipe:echo >> {tmp_path}/tries; cat {path}", micro_batch=6, train=False)
    for file in (*(store.cache_dir / "shards").iterdir(), tmp_path / "a.tar", tmp_path / "tries"):
        file.unlink()
    (batch,) = loader
    assert len(batch.skipped) == 6
    assert len((tmp_path / "tries").read_text()) == ATTEMPTS


def test_a_shard_that_was_temporarily_missing_is_read_again(load, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("m3ae_fast.data.reader.time.monotonic", lambda: clock[0])
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    samples = load(path, train=False).dataset
    os.rename(path, tmp_path / "away")
    assert isinstance(samples[0], Skipped)
    os.rename(tmp_path / "away", path)
    found = []
    for seconds in (1, 58, 2):
        clock[0] += seconds
        found.append(isinstance(samples[0], Skipped))
    assert found == [True, True, False]


def test_signals_are_left_to_the_main_process(load, paired, monkeypatch):
    monkeypatch.setattr(batches_ahead, "PREFETCH", 1)
    before = multiprocessing.active_children()
    batches = iter(load(paired, steps=40, config={"workers": 1}))
    next(batches)
    (worker,) = set(multiprocessing.active_children()).difference(before)
    for name in ("INT", "TERM"):  # Ctrl-C and schedulers send them to all processes, and so also to the worker
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
        assert len(list(islice(batches, 10))) == 10
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_workers_begin_with_signals_blocked(tmp_path):
    """If a worker blocked the signals only after its start, a thread that it had started before would still receive
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def note(worker):
        (tmp_path / "blocked").write_text(
            " ".join(str(int(number)) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        )

    assert len(list(Loader(range(4), num_workers=1, worker_init_fn=note))) == 4
    blocked = set(map(int, (tmp_path / "blocked").read_text().split()))
    assert blocked >= {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_empty_captions_are_accepted(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", picture(0)), ("0.txt", b""), *members([1])])
    (batch,) = load(path, micro_batch=2, steps=1)
    assert not batch.skipped
    assert batch.captions == 2
    assert len(batch.keys) == 2


def test_there_may_be_fewer_shards_than_workers(load, tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(16)))
    loaders = [load(path, rank=r, world=4, micro_batch=4, steps=1, config={"workers": 2}) for r in range(4)]
    keys = [key for loader in loaders for batch in loader for key in batch.keys]
    assert len(set(keys)) == 16


def test_workers_may_be_spawned(load, paired):
    """The dataset is pickled for spawned processes."""
    samples = load(paired, micro_batch=4, steps=1).dataset
    expected = [samples[position] for position in range(4)]
    found = pickle.loads(pickle.dumps(samples)).__getitems__(range(4))
    assert [sample.key for sample in found] == [sample.key for sample in expected]
    assert all(torch.equal(a.image, b.image) and torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected))


def test_a_training_loader_is_infinite(load, paired):
    batches = list(islice(load(paired, micro_batch=7), 10))
    assert [len(batch.keys) for batch in batches] == [7] * 10


def test_loader_can_be_used_again(load, paired):
    for workers in (0, 2):
        loader = load(paired, train=False, config={"workers": workers})
        assert stream(loader) == stream(loader)


def test_the_default_number_of_workers_follows_from_the_cores_per_rank(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    for ranks, workers in (("1", 15), ("2", 7), ("8", 1), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers() == workers


@pytest.mark.parametrize(
    "shard, key, place",
    [
        ("a.tar", "7", "a.tar/7"),
        ("a.tar", "", "a.tar"),
        ("", "folder/a.jpg", "folder/a.jpg"),
        ("in", "a.jpg", "in/a.jpg"),
    ],
)
def test_a_bad_sample_is_named_by_its_place(shard, key, place):
    assert str(Skipped(shard, key, "broken")) == f"{place}: broken"


def test_too_many_bad_samples_end_the_loader():
    counter = BadSamples(0.1, samples=10_000)
    counter.report([Skipped("a.tar", "7", "the image is broken")])
    counter.count(50, 50)  # too few samples for a decision
    counter.count(950, 50)
    assert (counter.seen, counter.bad) == (1000, 100)
    with pytest.raises(
        UserError, match=r"101 of 1001 samples cannot be used, for example a.tar/7: the image is broken"
    ):
        counter.count(1, 1)
    with pytest.raises(UserError):
        BadSamples(0.1, samples=20).count(20, 3)
    BadSamples(1.0, samples=20).count(500, 500)
    with pytest.raises(UserError):
        BadSamples(0.0, samples=20).count(500, 1)


def test_a_short_run_without_a_usable_sample_is_an_error():
    """A run of 16 samples ends before the fraction of bad samples is checked."""
    for fraction, bad in ((0.1, 15), (1.0, 16), (0.1, 0)):
        counter = BadSamples(fraction, samples=10_000)
        counter.count(16, bad)
        counter.finish()
    BadSamples(0.1, samples=10_000).finish()  # a run that took no step
    counter = BadSamples(0.1, samples=10_000)
    counter.count(16, 16)
    with pytest.raises(UserError, match="16 of 16 samples cannot be used"):
        counter.finish()


def test_a_limited_number_of_bad_samples_is_logged(caplog):
    counter = BadSamples(0.1, samples=1000)
    for i in range(50):
        would, before = counter.names_more, len(caplog.messages)
        counter.report([Skipped("a.tar", str(i), "no caption")])
        assert (len(caplog.messages) > before) == would == (i < 20)
    assert caplog.messages[0] == "skipped a.tar/0: no caption"
    assert len(caplog.messages) == 21


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=8),
    fraction=st.sampled_from([0.0, 0.125, 0.5, 1.0]),
    samples=st.integers(1, 200),
)
def test_a_run_stops_in_the_first_step_in_which_enough_samples_show_too_many_bad_ones(steps, fraction, samples):
    counter, seen, bad = BadSamples(fraction, samples), 0, 0
    for good, spoilt in steps:
        seen, bad = seen + good + spoilt, bad + spoilt
        enough = seen >= 100 or seen >= samples
        stops = pytest.raises(UserError) if enough and bad / seen > fraction else nullcontext()
        with stops:
            counter.count(good + spoilt, spoilt)


def test_the_vocabulary_contains_all_words_of_the_captions(load, paired):
    """The captions of the fixtures contain no unknown words. Otherwise, different captions could have equal tokens, and
    the tests above would compare less."""
    tokenizer = load(paired).dataset.preparation.tokenizer
    assert 1 not in tokenizer.encode(" ".join(WORDS))


def test_a_suspended_worker_does_not_prevent_the_program_from_exiting():
    program = """
        import os, signal
        from m3ae_fast.process import workers
        workers._LEAVING_S = 0.5
        loader = workers.Loader(range(100), num_workers=1, worker_init_fn=workers.start_worker, persistent_workers=True)
        batches = iter(loader)
        next(batches)
        os.kill(workers._started[0].pid, signal.SIGSTOP)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_other_threads_are_paused_before_workers_are_forked(monkeypatch):
    begun, left, seen, fork = threading.Event(), [], [], os.fork

    def leave():
        begun.wait()
        time.sleep(0.3)
        left.append(True)

    def forked():
        seen.append(bool(left))
        return fork()

    monkeypatch.setattr("m3ae_fast.process.workers._BEFORE_FORK_S", 1.0)
    monkeypatch.setattr(os, "fork", forked)
    threads.start(leave)
    begun.set()
    assert [*Loader(range(2), num_workers=1, batch_size=None)] == [0, 1] and seen == [True]
