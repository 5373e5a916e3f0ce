"""Linear probe: a linear classifier on the frozen encoder's pooled features, as the official code trains it.

With --cache-features every sample is encoded once, as in evaluation, and several learning rates are tried before the
run; otherwise crops are encoded as they are drawn.

Shapes: N training samples, S samples of a step, D encoder width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from m3ae_fast.base.bad_samples import BadSamples
from m3ae_fast.checkpoint.resuming import SAMPLING, Resume, Rules, require_same
from m3ae_fast.config.evaluation import LinearProbeConfig
from m3ae_fast.data import Data, Share, lay_out
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.engine.schedule import Schedule, split_batch
from m3ae_fast.evaluation.classifier import Classifier, ClassifierConfig
from m3ae_fast.evaluation.default_hyperparameters import sentence, settled
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.heads import LinearProbeHead
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import LabelledTask
from m3ae_fast.evaluation.learning_rates import Tried, choose, edge, table, try_rates
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.probe_engine import CachedSteps, ProbeEngine
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.training.throughput import SampleRate
from m3ae_fast.training.trainer import Trainer

_EVALUATIONS = 100  # of a run, at most


@dataclass(kw_only=True)
class ProbingTask(LabelledTask):
    """Trains a linear classifier on frozen features."""

    settings: LinearProbeConfig
    head: LinearProbeHead
    val: FeatureBank
    tried: list[Tried]  # learning rates; empty if one was given

    def first_line(self, trainer: Trainer) -> str:
        task = f"linear probe of {self.job.config.encode.pool} features, {len(self.classes)} classes, "
        return task + sentence(self.settings, trainer.schedule, trainer.step)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether an evaluation is due; a resumed run repeats none."""
        schedule, step = trainer.schedule, trainer.step
        every = self.settings.eval_every or max(schedule.steps_per_epoch, schedule.total_steps // _EVALUATIONS)
        return step > trainer.start and step % every == 0

    def length_is_open(self) -> bool:
        given = self.job.config.linear
        return given.epochs is None and given.steps is None

    def shorter(self, trainer: Trainer, steps: float) -> str:
        if not self.job.options.cache_features:
            return "--cache-features, which encodes each image once"
        return f"--set linear.steps={max(int(steps), 1)}"

    def cautions(self, trainer: Trainer) -> list[str]:
        return super().cautions(trainer) + edge(self.tried, self.settings.peak_lr)

    def conclude(self, trainer: Trainer) -> dict[str, float]:
        """Return accuracies on all held-out samples, which are logged too."""
        trainer.stop_if_not_finite()
        trainer.pulse.mark(f"evaluating after step {trainer.step}")
        self.head.eval()
        with torch.no_grad():
            scores_NK = self.head(self.val.features_RD.to(trainer.ranks.device))
        return self.evaluated(trainer, Predictions.of(self.val.keys, self.val.labels, scores_NK))

    def save_classifier(self, trainer: Trainer) -> None:
        job = self.job
        pool, classes = job.config.encode.pool, list(self.classes)
        config = ClassifierConfig(
            model=job.model.config, head="linear", pool=pool, modality=job.modality, classes=classes
        )

        def save() -> None:
            classifier = Classifier(config)
            classifier.load_backbone(job.model.cpu())
            classifier.head.load_state_dict(self.head.state_dict())
            classifier.save_pretrained(trainer.run.dir)

        trainer.ranks.on_main(save)


def set_up(job: Job) -> tuple[ProbingTask, Trainer]:
    """Open data and checkpoint, encode what stays the same. Raises UserError where one is missing or does not fit."""
    ranks, run = job.ranks, job.config.run
    cached = job.options.cache_features
    found = Resume(run.dir, job.options.resume, ranks)
    train, val, classes = job.open_labelled()
    if train.has_captions:
        job.model.require_tokenizer()
    held_out = job.encode(val, "encoding val").gathered()
    bank = job.encode(train, "encoding train").gathered() if cached else None
    samples = len(bank.keys) if bank else train.samples
    config = settled(job.config.linear, samples, found.section("linear"))
    share = split_batch(config, ranks.world, ranks.rank)
    tried = [Tried(*each) for each in found.section("rates").get("tried", [])]
    if bank and job.config.linear.peak_lr is None and not found.info:
        tried, rate = _try_rates(job, bank, config, len(classes))
        config = config.model_copy(update={"peak_lr": rate})
    schedule = Schedule(config, config, samples)

    torch.manual_seed(run.seed)
    head = LinearProbeHead(job.model.config.emb_dim, len(classes)).to(ranks.device)
    engine = ProbeEngine(head, config, ranks, None if cached else job.model, job.config.encode)
    sections = {
        "run": run.model_dump(mode="json"),
        "linear": config.model_dump(mode="json"),
        "encode": job.config.encode.model_dump(mode="json"),
        "data": job.config.data.model_dump(mode="json"),
        "task": {
            "model": job.options.model,
            "weights": weights_digest(job.model.state_dict()),
            "cache_features": cached,
            "classes": list(classes),
        },
        "rates": {"tried": tried},
    }
    layout = lay_out(job.config.data, train.sizes, share.global_batch)
    stream = fingerprint(Data(train, val, job.model.tokenizer), layout)
    require_same(ranks, stream, val)
    sampling = () if cached else SAMPLING
    rules = Rules(
        same=(
            "task.weights",
            "task.cache_features",
            "task.classes",
            "run.seed",
            "encode.pool",
            "linear.global_batch",
            *sampling,
        )
    )
    notes = found.restore(engine, sections, stream, rules)
    steps = range(found.step, schedule.total_steps)
    loader = CachedSteps(bank, steps, share.global_batch, run.seed) if bank else None
    task = ProbingTask(job=job, settings=config, notes=notes, classes=classes, head=head, val=held_out, tried=tried)
    return task, Trainer(
        task=task,
        session=job.session,
        folder=job.folder,
        run=run,
        settings=config,
        sections=sections,
        share=Share(share.global_batch) if cached else share,
        schedule=schedule,
        engine=engine,
        train_loader=loader or job.batches(train, share, steps, layout),
        throughput=SampleRate(),
        bad=BadSamples(job.config.data.max_bad_fraction, train.samples),
        stream=stream,
        start=found.step,
        suggested_fix="a lower linear.peak_lr",
    )


def _try_rates(
    job: Job, bank: FeatureBank, config: LinearProbeConfig, classes: int
) -> tuple[list[Tried], float | None]:
    """Return the rates that were tried, as the main rank found them, and the one to take, and print them."""
    own = try_rates(bank, config, classes, job.config.run.seed, job.ranks, job.pulse)
    tried = job.ranks.broadcast(lambda: own)
    if not tried or config.peak_lr is None:
        return tried, config.peak_lr
    rate = choose(tried, config.peak_lr, len(bank.keys) // 10).peak_lr
    job.say(f"linear.peak_lr, accuracy on a held-out tenth of the training samples: {table(tried, rate)}")
    return tried, rate


def run(job: Job) -> dict[str, Any] | None:
    """Return the accuracies; None where the run was stopped before its end."""
    job.pulse.watch_over(job.config.run)
    task, trainer = set_up(job)
    if (result := task.complete(trainer, len(task.val.keys))) is None:
        return None
    rates = [tried._asdict() for tried in task.tried]
    return result | {"skipped": result["skipped"] + len(task.val.skipped), "rates": rates}
