"""Linear probe: a linear classifier on the frozen encoder's pooled features, as the official code trains it.

With --cache-features every sample is encoded once, as in evaluation; otherwise its crops are encoded as they are drawn.

Shapes: N training samples, S samples of a step, D encoder width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from m3ae_fast.config.transfer import ProbeConfig
from m3ae_fast.data import BadSamples, Corpus, Data, Layout, Preparation, Share, fingerprint, train_loader
from m3ae_fast.data.labels import Classes
from m3ae_fast.data.order import permutation
from m3ae_fast.encoding import UNMASKED, Features, require_tokenizer
from m3ae_fast.engine import checkpoint, resuming
from m3ae_fast.engine.feed import feed
from m3ae_fast.engine.garbage import GarbageCollection
from m3ae_fast.engine.loop import restore
from m3ae_fast.engine.loss_watch import LossWatch
from m3ae_fast.engine.run_log import RunLog
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.hardware import pins_memory
from m3ae_fast.transfer.classifier import Classifier, ClassifierConfig
from m3ae_fast.transfer.heads import LinearProbeHead
from m3ae_fast.transfer.job import Job
from m3ae_fast.transfer.labelled_loop import LabelledLoop
from m3ae_fast.transfer.metrics import best_classes, shares_of_correct
from m3ae_fast.transfer.probe_engine import EncodedBatch, ProbeEngine

_SMALL = 100_000  # samples


@dataclass(kw_only=True)
class Probing(LabelledLoop):
    """A linear probe's run."""

    head: LinearProbeHead
    val: Features
    classes: Classes

    def remedy(self) -> str:
        return "a lower probe.peak_lr"

    def evaluate(self) -> dict[str, float]:
        """Accuracies on all held-out samples, which are logged too."""
        self.stop_if_not_finite()
        self.pulse.mark(f"evaluating after step {self.step}")
        self.head.eval()
        with torch.no_grad():
            self.best_NK = best_classes(self.head(self.val.features_ND.to(self.ranks.device))).cpu()
        assert self.val.labels_N is not None
        self.labels_N = self.val.labels_N
        values = shares_of_correct(self.best_NK, self.labels_N)
        if self.log:
            self.log.log(self.step, {f"val_{name}": value for name, value in values.items()})
        return values


@dataclass(frozen=True)
class CachedSteps:
    """Steps of a shuffled stream over features: an epoch is a permutation of all samples, and a step may span two."""

    features: Features
    steps: range
    batch: int  # samples of a step
    seed: int

    def __iter__(self) -> Iterator[EncodedBatch]:
        samples = len(self.features.keys)
        orders: dict[int, Any] = {}
        for step in self.steps:
            rows = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                epoch, place = divmod(position, samples)
                if epoch not in orders:
                    orders = {epoch: permutation(samples, self.seed, epoch)}
                rows.append(int(orders[epoch][place]))
            assert self.features.labels_N is not None
            keys = [self.features.keys[row] for row in rows]
            yield EncodedBatch(keys, self.features.features_ND[rows], self.features.labels_N[rows])


def set_up(job: Job) -> Probing:
    """Open the data, encode what stays the same, find the checkpoint to continue from.

    Raises:
        UserError: something is missing, or does not fit something else.
    """
    ranks, run, config = job.ranks, job.config.run, job.config.probe
    cached = job.args.cache_features
    found = ranks.told(lambda: resuming.find(run.dir, job.args.resume))
    share = split_batch(config, ranks.world, ranks.rank)
    train, val, classes = job.open_labelled()
    if train.has_captions:
        require_tokenizer(job.model)
    held_out = job.encode(val, "encoding val")
    bank = job.encode(train, "encoding train") if cached else None
    schedule = Schedule(config, config, len(bank.keys) if bank else train.samples)

    torch.manual_seed(run.seed)
    head = LinearProbeHead(job.model.config.emb_dim, len(classes)).to(ranks.device)
    engine = ProbeEngine(head, config, ranks, None if cached else job.model, job.config.encode)
    sections = {
        "run": run.model_dump(mode="json"),
        "probe": config.model_dump(mode="json"),
        "encode": job.config.encode.model_dump(mode="json"),
        "data": job.config.data.model_dump(mode="json"),
        "task": {"model": job.args.model, "cache_features": cached, "classes": list(classes)},
    }
    step, info = 0, ranks.told(lambda: checkpoint.read_info(found)) if found else None
    layout, _ = resuming.layout_of(info, job.config.data, train, config.global_batch)
    if found:
        same = [("task", key) for key in sections["task"]] + [("run", "seed"), ("encode", "pool")]
        same += [("probe", "global_batch")]
        step = restore(engine, found, ranks, sections, same)
    steps = range(step, schedule.total_steps)
    return Probing(
        run=run,
        loop=config,
        sections=sections,
        ranks=ranks,
        pulse=job.pulse,
        folder=job.folder,
        log=RunLog(run.dir, step, schedule.total_steps, run.loggers, sections) if ranks.is_main else None,
        share=Share(config.global_batch) if cached else share,
        schedule=schedule,
        engine=engine,
        train_loader=_crops(job, train, share, steps, layout)
        if bank is None
        else CachedSteps(bank, steps, config.global_batch, run.seed),
        watch=LossWatch(),
        bad=BadSamples(job.config.data.max_bad_fraction, train.samples),
        stream=fingerprint(Data(train, val, job.model.tokenizer), layout),
        start=step,
        step=step,
        head=head,
        val=held_out,
        classes=classes,
    )


def _crops(job: Job, train: Corpus, share: Share, steps: range, layout: Layout) -> Any:
    preparation = Preparation(job.model.geometry, UNMASKED, job.model.tokenizer, job.config.run.seed)
    pin = pins_memory(job.ranks.device)
    return train_loader(job.config.data, train, preparation, share, steps, layout=layout, pin_memory=pin)


def run(job: Job) -> dict[str, Any] | None:
    """None where the run was stopped before its end."""
    stop = job.stop
    job.pulse.timeout = job.config.run.stall_timeout
    loop = set_up(job)
    stop.listen()
    schedule = loop.schedule
    with loop.log or nullcontext(), loop.saving, GarbageCollection() as garbage:
        if loop.log:
            loop.log.say(_describe(job, loop))
        for fed in feed(loop.batches(), loop.share.accumulation, job.ranks.device, partial(loop.begin_agreement, stop)):
            samples = loop.agree(fed)
            if samples is None:
                break
            loop.log_step(*loop.take_step(fed, samples))
            if loop.step < schedule.total_steps and loop.step % _every(loop) == 0:
                loop.evaluate()
            loop.save_if_due()
            garbage.after_step(loop.step)
        loop.finish(stop)
        if loop.step < schedule.total_steps:
            return None
        result = loop.evaluate()
    job.ranks.on_main(lambda: _save_classifier(job, loop))
    loop.draw(loop.classes)
    return result | {
        "classes": len(loop.classes),
        "steps": loop.step,
        "train_samples": schedule.samples,
        "val_samples": len(loop.val.keys),
        "skipped": loop.bad.bad + len(loop.val.skipped),
    }


def _describe(job: Job, loop: Probing) -> str:
    """The lines a run begins with."""
    config, samples = job.config.probe, loop.schedule.samples
    lines = (
        f"linear probe of {job.config.encode.pool} features, {samples:,} samples, {len(loop.classes)} classes, batch "
        f"{config.global_batch}, steps {loop.step} to {loop.schedule.total_steps}"
    )
    if samples < _SMALL and config.peak_lr == ProbeConfig().peak_lr:
        lines += (
            f"\nprobe.peak_lr {config.peak_lr:g} is the published one, for 1.3 million samples; so few may need "
            "probe.peak_lr=30 with probe.global_batch=256"
        )
    return lines


def _every(loop: Probing) -> int:
    return loop.loop.eval_every or loop.schedule.steps_per_epoch


def _save_classifier(job: Job, loop: Probing) -> None:
    """Write encoder and head into the run's folder."""
    config = ClassifierConfig(
        model=job.model.config,
        head="linear",
        pool=job.config.encode.pool,
        modality=job.args.modality,
        classes=list(loop.classes),
    )
    classifier = Classifier(config)
    classifier.load_backbone(job.model.cpu())
    classifier.head.load_state_dict(loop.head.state_dict())
    classifier.save_pretrained(loop.run.dir)
