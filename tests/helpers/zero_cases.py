"""Steps of many engines, one after another in the same process, on one to three ranks: run by test_engine_parity.py and
other tests.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.zero_cases CASES FILE

CASES: matrix, unclipped, configs, uneven, muon, hog or features, with the teachers of TEACHERS next to FILE.
Writes one line of JSON per case to FILE: its name, and (loss, gradient norm) of every step.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from m3ae_fast.base.hardware import dtype_of
from m3ae_fast.batch import Sample, draw_mask, pack
from m3ae_fast.batch.packed import LossCounts
from m3ae_fast.config import Config, load_config, parse
from m3ae_fast.data.rank_share import MicroBatches, split_batch
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.parameter_groups import optimizer_groups
from m3ae_fast.model import M3AE
from m3ae_fast.process.ranks import Ranks, join_ranks
from m3ae_fast.training.teacher import open_teacher, with_target_width

STEPS, BATCH, LR = 3, 16, 1e-2
TINY = {
    "size": None, "emb_dim": 32, "depth": 2, "num_heads": 4, "dec_emb_dim": 32, "dec_depth": 2, "dec_num_heads": 4,
    "image_size": 16, "patch_size": 4, "text_length": 8, "vocab_size": 64,
}  # fmt: skip
SMALL_BUCKET = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}  # the model has about 70,000 weights
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
TEACHERS = "teacher", "timm:test_vit=vit.safetensors", "timm:test_resnet=cnn.safetensors"
Case = tuple[str, Config]


def config_of(
    world: int,
    stage: int | None,
    accumulation: int,
    precision: str,
    zero: dict[str, Any],
    clip_grad: float | None = 1.0,
    resize: str = "square",
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    **section: Any,
) -> Config:
    data = {
        "model": TINY | {"resize": resize} | (model or {}),
        "loss": loss or {},
        "data": {"train": [{"shards": "none.tar"}]},
        "optim": {"clip_grad": clip_grad} | (optim or {}),
        "train": {
            "steps": STEPS,
            "global_batch": BATCH,
            "micro_batch": -(-BATCH // world // accumulation),
            "precision": precision,
        },
        "deepspeed": None if stage is None else {"zero_optimization": {"stage": stage} | zero, **section},
    }
    return parse(Config, data, "case")


def matrix(world: int) -> Iterator[Case]:
    """Yield cases for each stage and precision. In float32 on several ranks, there is a case for each combination of
    bucket size and accumulation; otherwise, both are varied together."""
    for precision, stage in itertools.product(("fp32", "bf16"), (None, 0, 1, 2, 3)):
        ways = [({}, 1), (SMALL_BUCKET, 2)]
        if precision == "fp32" and world > 1:
            ways += [({}, 2), (SMALL_BUCKET, 1)]
        for zero, accumulation in ways if stage else [({}, 1), ({}, 2)]:
            way = f" bucket={'small' if zero else 'default'}" if stage else ""
            name = f"{precision} stage={stage}{way} accumulation={accumulation}"
            yield name, config_of(world, stage, accumulation, precision, zero)


def unclipped(world: int) -> Iterator[Case]:
    """Yield cases without clipping, one case with clipping for comparison, and cases with layer-wise learning rates."""
    yield "plain", config_of(world, None, 1, "fp32", {})
    for name, stage in (("plain", None), ("stage=0", 0), ("stage=2", 2)):
        yield f"{name} unclipped", config_of(world, stage, 1, "fp32", {}, clip_grad=None)
    layers: dict[str, Any] = {"model": {"init_from": "unused"}, "optim": {"layer_decay": 0.5}}
    for stage in (None, 0, 1, 2, 3):
        yield f"stage={stage} layer decay", config_of(world, stage, 1, "fp32", SMALL_BUCKET if stage else {}, **layers)


def uneven(world: int) -> Iterator[Case]:
    """Yield cases with batches that cannot be split evenly over ranks, with and without accumulation, and with native
    images."""
    for stage, accumulation in itertools.product((None, 0, 1, 2, 3), (1, 2)):
        name = f"stage={stage} accumulation={accumulation}"
        yield name, config_of(world, stage, accumulation, "fp32", SMALL_BUCKET if stage else {}, resize="native")


def muon(world: int) -> Iterator[Case]:
    """Yield cases with Muon at the supported stages, with a decoder whose keys and values are one weight."""
    options: dict[str, Any] = {"model": {"dec_attention": "cross"}, "optim": {"name": "muon"}}
    for precision, stage in itertools.product(("fp32", "bf16"), (None, 0, 1, 2)):
        zero = SMALL_BUCKET if stage else {}
        yield f"{precision} stage={stage}", config_of(world, stage, 2, precision, zero, **options)


def hog(world: int) -> Iterator[Case]:
    """Yield cases whose image targets are histograms of oriented gradients."""
    for stage in (None, 0, 1, 2, 3):
        zero = SMALL_BUCKET if stage else {}
        yield f"stage={stage}", config_of(world, stage, 2, "fp32", zero, model={"image_targets": "hog"})


def features(world: int) -> Iterator[Case]:
    """Yield cases whose image targets are features of a teacher: an own model, a ViT and a CNN of timm."""
    for teacher, stage in itertools.product(TEACHERS, (None, 0, 1, 2, 3)):
        zero, loss = SMALL_BUCKET if stage else {}, {"teacher": teacher}
        config = config_of(world, stage, 2, "fp32", zero, model={"image_targets": "features"}, loss=loss)
        yield teacher, with_target_width(config, open_teacher(config))


def configs(world: int) -> Iterator[Case]:
    """Yield the shipped configs in the precision of a GPU with small sizes, each also with plain torch. Configs that
    differ only in data, learning rate and length are equal here, because the engine does not depend on these."""
    for path in CONFIGS:
        whole = load_config(path)
        model = TINY | {"vocab_size": 64 if whole.model.vocab_size else 0}
        parts = 2 if whole.train.micro_batch else 1
        train = whole.train.model_dump(mode="json") | {"global_batch": BATCH, "micro_batch": BATCH // world // parts}
        train |= {"epochs": None, "steps": STEPS}
        made = whole.model_dump(mode="json") | {"model": model, "train": train | {"precision": "bf16"}}
        made |= {"run": {}, "data": {"train": [{"shards": "none.tar"}]}}
        made["optim"] |= {"clip_grad": 1.0, "peak_lr": LR, "warmup_epochs": 0}
        if made["deepspeed"]:
            made["deepspeed"]["zero_optimization"] |= SMALL_BUCKET
        yield path.name, parse(Config, made, path.name)
        plain = made | {"deepspeed": None, "train": made["train"] | {"compile": False, "micro_batch": None}}
        yield f"{path.name} plain", parse(Config, plain, path.name)


def samples(step: int, text: bool, native: bool = False, shared: bool = False) -> list[Sample]:
    """Return samples with captions of all lengths, an image without a caption, and a caption without an image, so that
    counts differ between ranks. With `native`, images have one to four rows of patches. With `shared`, two samples have
    the image of the sample before, which is always in the same micro-batch."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for i in range(BATCH):
        sample = Sample(key=f"{step}/{i}")
        if i != 5 or not text:
            rows = 1 + i % 4 if native else 4
            sample.image = torch.randint(0, 256, (3, 4 * rows, 16), dtype=torch.uint8, generator=generator)
            sample.image_mask = draw_mask(4 * rows, 0.75, generator)
        if shared and i in (1, 11):
            sample.image, sample.same_image = made[-1].image, True
        if i != 2 and text:
            sample.tokens = torch.randint(0, 64, (i % 9,), generator=generator)
            sample.text_mask = draw_mask(len(sample.tokens), 0.5, generator)
        made.append(sample)
    return made


def engine_of(ranks: Ranks, config: Config, seed: int = 0) -> ModelEngine:
    torch.manual_seed(seed)
    return build_engine(M3AE(config.model, config.loss), config, ranks)


def build_deepspeed(model: M3AE, config: Config, ranks: Ranks) -> ModelEngine:
    """Build DeepSpeed's engine, even where `build_engine` selects plain torch: on one rank at stages 0 to 2."""
    from m3ae_fast.engine.deepspeed_engine import DeepSpeedEngine  # takes seconds to import

    assert config.deepspeed is not None
    share = split_batch(config.train, ranks.world)
    return DeepSpeedEngine(
        model, optimizer_groups(model, config.optim), config.deepspeed, config.optim, dtype_of(config.train.precision),
        ranks, share, config.train.ema,
    )  # fmt: skip


def deepspeed_engine_of(ranks: Ranks, config: Config, seed: int = 0) -> ModelEngine:
    torch.manual_seed(seed)
    return build_deepspeed(M3AE(config.model, config.loss), config, ranks)


def take(ranks: Ranks, engine: ModelEngine, config: Config, steps: range) -> list[tuple[float, float]]:
    """Take steps, and return the loss and the gradient norm of each, over all ranks."""
    share = split_batch(config.train, ranks.world, ranks.rank)
    geometry, found, teacher = engine.model.geometry, [], open_teacher(config)
    for step in steps:
        native = config.model.resize == "native"
        everything = samples(step, config.model.vocab_size > 0, native, shared=teacher is not None)
        images = sum(sample.image is not None for sample in everything)
        captions = sum(sample.tokens is not None for sample in everything)
        counts = LossCounts(images / ranks.world, captions / ranks.world)
        parts = MicroBatches(range(1), share)
        batches = [pack([everything[position] for position in part], geometry) for part in parts]
        if teacher:
            batches = [teacher.with_targets(batch) for batch in batches]
        losses, norm = engine.step(batches, counts, LR)
        (loss,) = ranks.sum([sum(part.loss.item() for part in losses)])
        found.append((loss / ranks.world, float(norm)))
    return found


def main(argv: list[str] | None = None) -> int:
    which, out = argv or sys.argv[1:]
    logging.disable(logging.WARNING)
    cases = {f.__name__: f for f in (matrix, unclipped, configs, uneven, muon, hog, features)}[which]
    os.chdir(Path(out).parent)
    with join_ranks() as ranks, open(out if ranks.is_main else os.devnull, "w", encoding="utf-8") as file:
        torch.set_num_threads(1)
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, config in cases(ranks.world):
            if (settings := config.model_dump_json()) not in curves:
                curves[settings] = take(ranks, engine_of(ranks, config), config, range(STEPS))
            print(json.dumps([name, curves[settings]]), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
