"""Benchmarks of `m3ae-fast embed`, compared with a simple loop over batches in memory, and of `M3AE.encode` by
precision."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import results
from benchmarks.shards import make_shards
from m3ae_fast.base.hardware import fast_precision, keep_freed_memory
from m3ae_fast.config import DataConfig, LossConfig, ModelConfig, SourceConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import ShardStore, Share, open_corpus
from m3ae_fast.evaluation.encoding import encode_corpus, encoding_loader
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks

SAMPLES, BATCH, ROUNDS = 32, 16, 3
FASTER = 1.8  # minimum speed-up of bf16 over fp32 if the machine supports bf16
LEAST = 0.8  # minimum speed relative to the loop, because images are also read, decoded, cropped and packed


def test_features(tmp_path):
    make_shards(tmp_path, 1, SAMPLES, (256, 320), vocab=64, words=(1, 1))
    data = DataConfig(train=[SourceConfig(shards=f"{tmp_path}/0.tar", modality="image")], workers=0)
    corpus = open_corpus(data.train, ShardStore(None))
    keep_freed_memory()
    torch.manual_seed(0)
    model = M3AE(ModelConfig(size="small", image_size=224, vocab_size=0), LossConfig()).eval()
    cpu = torch.device("cpu")
    ready = list(encoding_loader(model, corpus, data, Share(BATCH), cpu))
    images = [image for batch in ready for image in batch.images]
    fast = fast_precision(cpu)

    @torch.no_grad()
    def by_hand() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast == "bf16"):
            torch.cat([model.pooled(batch) for batch in ready])

    with join_ranks() as ranks:
        config = EncodeConfig(batch=BATCH)
        ways: dict[str, Callable[[], object]] = {
            f"hand-written loop over batches in memory, {fast}": by_hand,
            "features of a shard": lambda: encode_corpus(model, corpus, data, config, ranks),
            "encode, fp32": lambda: model.encode(images, batch=BATCH, precision="fp32"),
            f"encode, auto ({fast})": lambda: model.encode(images, batch=BATCH),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + ROUNDS):
            for name, work in ways.items():
                start = time.perf_counter()
                work()
                if turn:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    loop, *_ = seconds.values()
    ratios = {name: statistics.median(a / b for a, b in zip(loop, own)) for name, own in seconds.items()}
    rows: list[results.Row] = [
        {"what": name, "samples/s": SAMPLES / statistics.median(own), "relative to the hand-written loop": ratios[name]}
        for name, own in seconds.items()
    ]
    results.write("features", "Features of the small encoder, 224 px, images of 256 x 320 pixels", rows)
    assert ratios["features of a shard"] > LEAST
    if fast == "bf16":
        assert ratios["encode, auto (bf16)"] > FASTER * ratios["encode, fp32"]
