"""Loaders over small shards."""

import pytest

from m3ae_fast.batch.packing import Geometry
from m3ae_fast.batch.tokenizer import load_tokenizer, train_tokenizer
from m3ae_fast.config import DataConfig, MaskingConfig, SourceConfig
from m3ae_fast.data import Preparation, ShardStore, Share, eval_loader, open_corpus, train_loader
from tests.helpers.shards import caption


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([caption(i) for i in range(40)], 200).save(str(path))
    return str(path)


@pytest.fixture
def load(store, tokenizer_file):
    """Return a function load(shards | [SourceConfig], micro_batch=..., ...), which returns a loader of small images and
    captions. `at`: a store to use instead of the fixture."""

    def build(
        sources,
        *,
        micro_batch=4,
        global_batch=None,
        accumulation=1,
        rank=0,
        world=1,
        seed=0,
        masking=None,
        tokenizer=True,
        config=None,
        start_step=0,
        steps=None,
        train=True,
        samples=None,
        at=None,
        node=None,
        native=None,
        one_crop=False,
    ):
        if not isinstance(sources, list) or isinstance(sources[0], str):
            sources = [SourceConfig(shards=sources)]
        data = DataConfig(train=sources, **{"workers": 0, **(config or {})})
        preparation = Preparation(
            Geometry(image_size=32, patch_size=8, channels=3, text_length=8, native=native),
            masking or MaskingConfig(image_ratio=0.5, text_ratio=0.5),
            load_tokenizer(tokenizer_file, 8) if tokenizer is True else tokenizer or None,
            seed,
            one_crop=one_crop,
        )
        share = Share(global_batch or micro_batch * accumulation * world, accumulation, rank, world)
        corpus = open_corpus(sources, at or store)
        if not train:
            return eval_loader(data, corpus, preparation, share, samples)
        span = range(start_step, 1000 if steps is None else steps)
        return train_loader(data, corpus, preparation, share, span, node=node)

    return build
