"""Pre-train an M3AE.

deepspeed m3ae_fast/train.py --config configs/quickstart.json
deepspeed --num_gpus 8 m3ae_fast/train.py --config configs/large.json --set optim.peak_lr=3e-4
torchrun --nproc-per-node 2 m3ae_fast/train.py --config configs/quickstart.json
python m3ae_fast/train.py --config configs/large.json --dry-run
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

# Threads that wait must not keep a core from the loader or another rank; OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from m3ae_kernels.dispatch import choose_impl
from torch.utils.data import DataLoader

from m3ae_fast.config import Config, load_config
from m3ae_fast.data import BadSamples, CaptionTokenizer, Corpus, ShardStore, build_loader, load_tokenizer, open_corpus
from m3ae_fast.data.order import hash64
from m3ae_fast.dry_run import report
from m3ae_fast.engine import checkpoint, distributed
from m3ae_fast.engine.core import Engine, build_engine
from m3ae_fast.engine.distributed import Ranks
from m3ae_fast.engine.feed import feed
from m3ae_fast.engine.hardware import (
    fast_precision,
    has_compiler,
    out_of_memory,
    peak_flops,
    peak_memory,
    settle_precision,
)
from m3ae_fast.engine.meter import Counts, Meter
from m3ae_fast.engine.metrics import Metrics
from m3ae_fast.engine.optim import learning_rate
from m3ae_fast.engine.profile import TRACE_FILE, profiler
from m3ae_fast.engine.signals import StopRequest
from m3ae_fast.engine.watch import LossWatch
from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.model.attention import attention_backend
from m3ae_fast.model.m3ae import M3AE, Losses
from m3ae_fast.model.packing import PackedBatch
from m3ae_fast.visualise import draw_run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a JSON config, such as configs/quickstart.json"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field: --set train.epochs=20"
    )
    parser.add_argument(
        "--resume",
        default="no",
        metavar="auto|no|PATH",
        help="auto: go on from the last checkpoint in run.dir, or start; no (default): start a new run; "
        "PATH: go on from that checkpoint or run folder",
    )
    parser.add_argument(
        "--profile", action="store_true", help=f"write {TRACE_FILE} into run.dir: a torch profiler trace of some steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the config, print sizes and memory, and leave")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    ranks = distributed.start()
    try:
        config = ranks.from_main(ranks.on_main(lambda: load_config(args.config, args.set)))
        if args.dry_run:
            ranks.on_main(lambda: report(config))
            return 0
        config = ranks.from_main(settle_precision(config, ranks.device))
        return train(config, args.resume, ranks, args.profile)
    except (UserError, MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            error = UserError(
                "out of memory: lower train.micro_batch, set train.activation_checkpointing, raise the ZeRO stage, or "
                "choose a smaller model; --dry-run estimates what a config needs"
            )
        if "DataLoader worker" in str(error):
            error = UserError(
                "a loader worker was killed, perhaps for want of memory: lower data.workers or data.prefetch; "
                "--resume auto goes on from the last checkpoint"
            )
        if not isinstance(error, UserError):
            raise
        if ranks.says("error"):
            raise error from None
        raise SystemExit(2) from None
    finally:
        distributed.stop()


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Corpus
    val: Corpus | None
    tokenizer: CaptionTokenizer | None


def train(config: Config, resume: str, ranks: Ranks, profile: bool = False) -> int:
    """Train to the end, or until somebody asks to stop. Returns the exit code."""
    try:
        choose_impl("auto", ranks.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    stop = StopRequest()
    cfg, run_dir = config.train, config.run.dir
    micro_batch, accumulation = split_batch(config, ranks.world)
    resumed = ranks.from_main(ranks.on_main(lambda: checkpoint.find(run_dir, resume)))
    data = ranks.main_first(lambda: open_data(config, ranks))
    steps_an_epoch = max(data.train.samples // cfg.global_batch, 1)
    total_steps = cfg.steps or max(round(cfg.epochs * steps_an_epoch), 1)
    warmup_steps = min(round(config.optim.warmup_epochs * steps_an_epoch), total_steps)

    torch.manual_seed(config.run.seed)
    model = M3AE(config.model, config.loss)
    model.encoder.checkpointing = model.decoder.checkpointing = cfg.activation_checkpointing
    if cfg.compile:
        if not has_compiler():
            raise UserError("train.compile: needs a C++ compiler; install g++, or set train.compile=false")
        model.encoder.compile_blocks()
        model.decoder.compile_blocks()
    engine = build_engine(model, config, ranks)
    step = restore(engine, resumed, config, ranks) if resumed else 0

    loader = partial(
        build_loader,
        tokenizer=data.tokenizer,
        geometry=model.geometry,
        masking=config.masking,
        seed=config.run.seed,
        rank=ranks.rank,
        world=ranks.world,
        micro_batch=micro_batch,
        pin_memory=ranks.device.type == "cuda",
    )
    stream = loader(config.data, data.train, accumulation=accumulation, start_step=step, steps=total_steps)
    held_out = loader(config.data, data.val, train=False, samples=cfg.eval_samples) if data.val else None

    precision = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    meter = Meter(config, ranks.world * peak_flops(ranks.device, precision))
    watch, bad = LossWatch(), BadSamples(config.data.max_bad_fraction, data.train.samples)
    if ranks.is_main:
        bad.report(data.train.damaged)
    stop.listen()
    with (
        ranks.on_main(lambda: open_run(run_dir, step, total_steps)) or nullcontext() as metrics,
        profiler(run_dir if profile and ranks.is_main else None) as trace,
    ):
        if metrics:
            metrics.say(describe(engine, config, ranks, data, step, total_steps))
            if step >= total_steps:
                metrics.say("nothing is left to do; for more, raise train.epochs or train.steps")
        if held_out and step == 0:
            report_held_out(engine, held_out, step, ranks, metrics)
        for host, batches, waited in feed(stream, accumulation, ranks.device):
            # all that ranks agree on before a step: who asks to stop, and what the losses are means over
            asked, failed, *sums = ranks.sum([stop.asked, watch.failed(), *Counts.of(host, config)])
            if asked or failed:
                break
            counts = Counts(*sums)
            for batch in batches:
                batch.image_count, batch.text_count = counts.images / ranks.world, counts.captions / ranks.world
                bad.report(batch.skipped)
            bad.count(int(counts.samples + counts.bad), int(counts.bad))
            meter.add(counts, waited)

            if config.model.has_dropout:
                torch.manual_seed(hash64(config.run.seed, step, ranks.rank) & 0xFFFFFFFF)
            lr = learning_rate(step, config.optim, cfg.global_batch, warmup_steps, total_steps)
            losses, grad_norm = engine.step(batches, lr)
            step += 1
            watch.add(step, [key for batch in batches for key in batch.keys], losses)

            if trace:
                trace.step()
            if metrics:
                metrics.advance(step)
            due_log, due_eval, due_save = (
                step == total_steps or step % every == 0
                for every in (cfg.log_every, cfg.eval_every or total_steps, cfg.save_every)
            )
            if due_log or step == 1:
                values = mean_losses(losses, ranks)
                if metrics:
                    shared = {"lr": lr, "grad_norm": float(grad_norm), "epoch": step / steps_an_epoch}
                    memory = {"peak_memory_gb": peak_memory(ranks.device) / 1e9, "skipped": bad.bad}
                    metrics.log(step, values | shared | meter.rates() | memory)
            if due_eval or due_save:
                stop_if_not_finite(watch, ranks)
            if due_eval and held_out:
                report_held_out(engine, held_out, step, ranks, metrics)
            if due_save:
                save(engine, step, config, ranks, data, metrics)

        stop_if_not_finite(watch, ranks)
        if step < total_steps:
            save(engine, step, config, ranks, data, metrics)
            if metrics:
                metrics.say(f"stopped at step {step} ({stop.reason or 'asked by another rank'}); --resume auto goes on")
    return 0


def split_batch(config: Config, world: int) -> tuple[int, int]:
    """(micro_batch, accumulation) with global_batch = micro_batch x world x accumulation."""
    total, micro = config.train.global_batch, config.train.micro_batch
    if total % world:
        raise UserError(f"config: train.global_batch {total} does not divide by {world} ranks")
    micro = micro or total // world
    if total % (micro * world):
        raise UserError(
            f"config: train.global_batch {total} does not divide by train.micro_batch {micro} x {world} ranks"
        )
    return micro, total // (micro * world)


def open_data(config: Config, ranks: Ranks) -> Data:
    """Find shards and tokenizer, and check that they fit the model."""
    store = ShardStore(config.data.cache_dir)
    corpus = open_corpus(config.data.train, store, progress=ranks.is_main)
    val = open_corpus(config.data.val, store, progress=ranks.is_main) if config.data.val else None
    if not config.model.vocab_size and any(part.has_captions for part in (corpus, val) if part):
        raise UserError('model.vocab_size is 0, but the shards have captions; set "modality": "image" on their source')
    tokenizer = None
    if config.model.vocab_size and config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.text_length, config.model.vocab_size)
    return Data(corpus, val, tokenizer)


def open_run(run_dir: Path, step: int, total_steps: int) -> Metrics:
    """Take the run folder, and take out of it what an earlier attempt left there beyond `step`."""
    metrics = Metrics(run_dir, step, total_steps)
    for path in checkpoint.set_aside_after(run_dir, step):
        metrics.say(f"the run goes on from step {step}: a later checkpoint is now {path}")
    return metrics


def describe(engine: Engine, config: Config, ranks: Ranks, data: Data, step: int, total_steps: int) -> str:
    """The lines a run begins with."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    model = config.model
    dims = {model.emb_dim // model.num_heads, model.dec_emb_dim // model.dec_num_heads}
    backends = {attention_backend(ranks.device, dtype, dim, model.att_drop > 0) for dim in dims}
    precision = config.train.precision
    if precision == "bf16" and fast_precision(ranks.device) == "fp32":
        precision = "bf16 (fp32 is faster here)"
    kind = "plain torch" if config.deepspeed is None else f"DeepSpeed ZeRO stage {config.zero_stage}"
    return (
        f"M3AE, {parameters:,} parameters, on {ranks.world} x {ranks.device.type}, {precision}, {kind}, "
        f"attention: {' and '.join(sorted(backends))}, optimiser: {engine.optimizer_name}\n"
        f"{data.train.samples:,} samples, batch {config.train.global_batch}, "
        f"steps {step} to {total_steps}, run folder {config.run.dir}"
    )


def mean_losses(losses: list[Losses], ranks: Ranks) -> dict[str, float]:
    """A step's losses over all ranks and micro-batches."""
    names = [field.name for field in dataclasses.fields(Losses)]
    sums = ranks.sum([sum(getattr(part, name).item() for part in losses) for name in names])
    return {name: value / ranks.world for name, value in zip(names, sums)}


def report_held_out(
    engine: Engine, loader: DataLoader[PackedBatch], step: int, ranks: Ranks, metrics: Metrics | None
) -> None:
    """Log the losses on held-out samples: means over all their pictures and captions."""
    sums = [0.0] * 6
    for batch in loader:
        images, captions = batch.image_count, batch.text_count
        part = engine.evaluate(batch.to(ranks.device))
        new = (images, float(part.image_loss) * images, captions)
        new += (float(part.text_loss) * captions, float(part.text_accuracy) * captions, len(batch.skipped))
        sums = [a + b for a, b in zip(sums, new)]
    images, image_loss, captions, text_loss, text_accuracy, skipped = ranks.sum(sums)
    values = {"val_skipped": int(skipped)} if skipped else {}
    if images:
        values["val_image_loss"] = image_loss / images
    if captions:
        values["val_text_loss"] = text_loss / captions
        values["val_text_accuracy"] = text_accuracy / captions
    if metrics:
        metrics.log(step, values)


def stop_if_not_finite(watch: LossWatch, ranks: Ranks) -> None:
    """Raises UserError on all ranks where a step of any rank had a loss that is not finite."""
    for found in ranks.gather(watch.first_bad()):
        if found:
            raise UserError(
                f"{found}. The last good checkpoint is intact: look at these samples, or go on from it with a lower "
                "optim.peak_lr, optim.clip_grad=1.0, or train.precision=fp32"
            )


def save(engine: Engine, step: int, config: Config, ranks: Ranks, data: Data, metrics: Metrics | None) -> None:
    """Checkpoint and pictures. Every rank must call it."""
    state = engine.state()
    seen = step * config.train.global_batch
    info = checkpoint.Info(step, seen, config.run.seed, config.model_dump(mode="json"), checkpoint.versions())

    def write() -> None:
        path = checkpoint.save(config.run.dir, state, info, config.train.keep)
        metrics.say(f"saved {path}")
        if config.train.pictures:
            out = config.run.dir / "reconstructions.png"
            weights, shown = checkpoint.weights(state), data.val or data.train
            draw_run(config, weights, shown, data.tokenizer, out, config.train.pictures)

    ranks.on_main(write)


def restore(engine: Engine, path: Path, config: Config, ranks: Ranks) -> int:
    """Load a checkpoint into the engine. Returns the step to go on from."""
    info = ranks.from_main(ranks.on_main(lambda: checkpoint.read_info(path)))
    checkpoint.check_fits(path, info, config)
    read = ranks.on_main(lambda: checkpoint.open_state(path))
    engine.load_state(info.step, lambda name: ranks.from_main(ranks.on_main(lambda: read(name))))
    return info.step


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
