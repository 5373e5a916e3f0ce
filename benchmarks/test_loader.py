"""Benchmarks of the loader alone, with synthetic JPEG shards, and of the fraction of the time that the quickstart waits
for data."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from simplejpeg import decode_jpeg
from torchvision.transforms import v2

from benchmarks import results
from benchmarks.alone import ENVIRONMENT
from benchmarks.shards import make_shards
from m3ae_fast.batch.packing import Geometry
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import DataConfig, MaskingConfig, SourceConfig
from m3ae_fast.data import Preparation, ShardStore, Share, open_corpus, train_loader

ROOT = Path(__file__).parents[1]
IMAGES, BATCH = 512, 64
# (height and width of the stored images, size of the crops, maximum time relative to decoding and cropping alone):
# photographs of a usual size, and images that were stored with a shorter side hardly longer than the crops. The loader
# also reads shards, tokenises, masks and packs, which takes as long for small images as for large ones.
CASES = ((400, 500, 256, 1.25), (256, 320, 256, 1.5), (800, 1000, 512, 1.25), (512, 640, 512, 1.5))
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def write():
    yield
    if ROWS:
        results.write("loader", "Speed of the loader on one core", ROWS)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("height", "width", "size", "most"), CASES)
def test_loader(benchmark, tmp_path, one_thread, height, width, size, most):
    """Time the loader (reading, decoding, augmentation, tokens, masks and packing) on JPEGs of a height and width,
    compared with decoding (simplejpeg) and cropping (torchvision) alone."""
    shards = tmp_path
    make_shards(shards, 2, IMAGES, (height, width), vocab=2048, words=(8, 8))
    data = DataConfig(train=[SourceConfig(shards=f"{shards}/{{0..1}}.tar")], workers=0)
    corpus = open_corpus(data.train, ShardStore(None))
    tokenizer = load_tokenizer(str(shards / "vocab.txt"), 64, 2048)
    preparation = Preparation(Geometry(size, 16, 3, 64), MaskingConfig(), tokenizer, seed=0)
    stream = iter(train_loader(data, corpus, preparation, Share(BATCH), range(1 << 30)))

    with tarfile.open(shards / "0.tar") as tar:
        jpegs = [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith("jpg")]
    jpegs = itertools.cycle(jpegs)
    transform = v2.Compose(
        [v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    )
    seconds: dict[str, list[float]] = {"decoding and cropping alone": [], "this loader": []}

    def alone() -> None:
        start = time.perf_counter()
        for _ in range(BATCH):
            transform(torch.from_numpy(decode_jpeg(next(jpegs))).permute(2, 0, 1))
        seconds["decoding and cropping alone"].append(time.perf_counter() - start)

    def loader() -> None:
        start = time.perf_counter()
        assert len(next(stream).keys) == BATCH
        seconds["this loader"].append(time.perf_counter() - start)

    loader()
    seconds["this loader"].clear()
    benchmark.pedantic(loader, setup=alone, rounds=12)
    for name, times in seconds.items():
        what = f"{name}, {width} x {height} pixels to {size} px"
        ROWS.append({"what": what, "samples/s": BATCH / statistics.median(times), "time waiting for data": None})
    ratio = statistics.median(b / a for a, b in zip(*seconds.values()))
    assert ratio < most, f"the loader takes {ratio:.2f} times as long as decoding and cropping alone"


def test_data_wait(benchmark, tmp_path):
    """Measure the time that the quickstart's steps wait for the next batch, after the start of the run."""
    options = ["train.steps=50", "train.log_every=10", "train.pictures=0", f"run.dir={tmp_path}", "data.val=[]"]
    command = [sys.executable, str(ROOT / "m3ae_fast/train.py"), "--config", "configs/quickstart.json"]
    command += [word for option in options for word in ("--set", option)]
    run = {"cwd": ROOT, "check": True, "capture_output": True, "env": os.environ | ENVIRONMENT}
    benchmark.pedantic(lambda: subprocess.run(command, **run), rounds=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if "data_wait" in line and line["step"] > 10]
    waiting = statistics.median(line["data_wait"] for line in steady)
    speed = statistics.median(line["samples_per_s"] for line in steady)
    ROWS.append({"what": "training of the quickstart", "samples/s": speed, "time waiting for data": f"{waiting:.1%}"})
    assert waiting < 0.02
