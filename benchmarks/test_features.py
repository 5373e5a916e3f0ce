"""Benchmarks of `m3ae-fast embed`, compared with a loop over batches in memory and with timm's ViT in a loop over a
DataLoader, and of `M3AE.encode` by precision."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import results
from benchmarks.shards import make_jpegs, make_shards
from m3ae_fast.base.hardware import fast_precision, keep_freed_memory
from m3ae_fast.config import DataConfig, LossConfig, ModelConfig, SourceConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import ShardStore, Share, open_corpus
from m3ae_fast.evaluation.embedding import embed
from m3ae_fast.evaluation.encoding import encode_corpus, encoding_loader
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks

SAMPLES, BATCH, ROUNDS = 32, 16, 3
FILES, WORKERS = 128, (0, 1)
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
            "encode, fp32": lambda: model.encode(images, batch_size=BATCH, precision="fp32"),
            f"encode, auto ({fast})": lambda: model.encode(images, batch_size=BATCH),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(1 + ROUNDS):
            for name, work in ways.items():
                start = time.perf_counter()
                work()
                if repetition:  # the first round is a warm-up
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


class _Folder(Dataset):
    """A dataset of the images in a folder, which are opened by PIL and transformed by timm's evaluation transform."""

    def __init__(self, folder: Path, transform: Callable) -> None:
        self.files, self.transform = sorted(folder.iterdir()), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.files[number]) as image:
            return self.transform(image.convert("RGB"))


def test_folder_of_jpegs(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    make_jpegs(folder, FILES, (400, 500))
    keep_freed_memory()
    torch.manual_seed(0)
    model = M3AE(ModelConfig(size="small", image_size=224, vocab_size=0), LossConfig()).eval()
    vit = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=vit), is_training=False)
    fast = fast_precision(torch.device("cpu"))

    @torch.no_grad()
    def by_hand(workers: int) -> None:
        loader = DataLoader(_Folder(folder, transform), BATCH, num_workers=workers)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast == "bf16"):
            torch.cat([vit(images) for images in loader])

    def ours(workers: int) -> None:
        embed(model, str(folder), overrides=[f"data.workers={workers}", f"encode.batch={BATCH}"])

    ways: dict[str, Callable[[int], None]] = {f"timm and a DataLoader, {fast}": by_hand, f"embed, {fast}": ours}
    rows: list[results.Row] = []
    for workers in WORKERS:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(1 + ROUNDS):
            for name, work in ways.items():
                start = time.perf_counter()
                work(workers)
                if repetition:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - start)
        timm_loop = next(iter(seconds.values()))
        for name, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(timm_loop, own))
            speed = FILES / statistics.median(own)
            rows.append({"workers": workers, "what": name, "images/s": speed, "relative to timm": ratio})
    results.write("folder", "Features of a folder of JPEGs of 500 x 400 pixels, small encoder, 224 px", rows)
    assert all(row["relative to timm"] > LEAST for row in rows)
