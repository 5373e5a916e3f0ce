"""Linear probe: a linear classifier on the frozen encoder's pooled features, trained as in the official code.

With --cache-features, every sample is encoded once, without augmentation, and several learning rates are tried before
the run. Otherwise, random crops are encoded in each step.

Shapes: N training samples, S samples of a step, D encoder width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint.resuming import SAMPLING, Rules
from m3ae_fast.config.evaluation import LinearProbeConfig
from m3ae_fast.data import lay_out
from m3ae_fast.data.labels import Classes
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation import expected_duration
from m3ae_fast.evaluation.classifier import Classifier, ClassifierConfig
from m3ae_fast.evaluation.default_hyperparameters import chosen, sentence, with_defaults
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.fit_heads import HeadsInTraining, logits
from m3ae_fast.evaluation.heads import LinearHeads, LinearProbeHead
from m3ae_fast.evaluation.job import WARNINGS, Job, PartialResult
from m3ae_fast.evaluation.labelled_task import LabelledTask, make_trainer, open_training
from m3ae_fast.evaluation.learning_rates import table
from m3ae_fast.evaluation.linear_probe_engine import ProbeEngine
from m3ae_fast.evaluation.probes import Setting, head_warnings, linear_recipe, partial_predictions, train_heads
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.training.trainer import Trainer

_LAYER = 0  # key of the features, of which there is only one kind
RULES = Rules(same=("task.weights", "task.classes", "run.seed", "encode.pool", "linear.global_batch", *SAMPLING))
_EVALUATIONS = 100  # maximum number of evaluations without linear.eval_every


@dataclass(kw_only=True)
class ProbingTask(LabelledTask):
    """The task of training a linear classifier on frozen features."""

    settings: LinearProbeConfig
    heads: LinearHeads  # a stack of one head
    val: FeatureBank

    def first_line(self, trainer: Trainer) -> str:
        task = f"linear probe of {self.job.config.encode.pool} features, {len(self.classes)} classes, "
        return task + sentence(self.settings, trainer.schedule, trainer.step)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether an evaluation is due. A resumed run does not repeat the evaluation at its first step."""
        schedule, step = trainer.schedule, trainer.step
        every = self.settings.eval_every or max(schedule.steps_per_epoch, schedule.total_steps // _EVALUATIONS)
        return step > trainer.start and step % every == 0

    def length_is_open(self) -> bool:
        given = self.job.config.linear
        return given.epochs is None and given.steps is None

    def shorter(self, trainer: Trainer, steps: float) -> str:
        return "--cache-features, which encodes each image once"

    def conclude(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate on all held-out samples, and log and return the accuracies."""
        trainer.stop_if_diverged()
        trainer.heartbeats.mark(f"evaluating after step {trainer.step}")
        return self.evaluated(trainer, self.val.predictions(logits(self.heads.eval(), self.val)))

    def save_classifier(self, trainer: Trainer) -> None:
        _save_classifier(self.job, self.heads.head(0), self.classes)


def _save_classifier(job: Job, head: LinearProbeHead, classes: Classes) -> None:
    pool = job.config.encode.pool
    config = ClassifierConfig(
        model=job.model.config, head="linear", pool=pool, modality=job.modality, classes=list(classes)
    )

    def save() -> None:
        classifier = Classifier(config)
        classifier.load_backbone(job.model.cpu())
        classifier.head.load_state_dict(head.state_dict())
        classifier.save_pretrained(job.out)

    job.ranks.on_main(save)


def set_up(job: Job) -> tuple[ProbingTask, Trainer]:
    """Open the data and the checkpoint, encode the held-out samples, and return the task and its trainer. Raises
    UserError if something is missing or does not fit."""
    ranks, run, encode = job.ranks, job.config.run, job.config.encode
    start = open_training(job, job.config.linear)
    held_out = job.encode(start.val, "encoding val")
    heads = LinearHeads(job.model.config.emb_dim, len(start.classes), [run.seed], ranks).to(ranks.device)
    engine = ProbeEngine(heads, start.settings, ranks, job.model, encode)
    weights = weights_digest(job.model.state_dict())
    sections = {
        "encode": encode.model_dump(mode="json"),
        "task": {"model": job.options.model, "weights": weights, "classes": list(start.classes)},
    }
    layout = lay_out(job.config.data, start.train.sizes, start.share.global_batch)
    task = ProbingTask(job=job, settings=start.settings, classes=start.classes, heads=heads, val=held_out)
    return task, make_trainer(job, start, task, engine, layout, sections, RULES, "a lower linear.peak_lr")


def run(job: Job) -> dict[str, Any] | None:
    """Run the task and return its result; None if it was stopped before its end."""
    if job.options.cache_features:
        return run_cached(job)
    job.heartbeats.watch_over(job.config.run)
    task, trainer = set_up(job)
    if (result := task.complete(trainer, len(task.val.keys))) is None:
        return None
    return result | {"skipped": result["skipped"] + len(task.val.skipped), "rates": []}


def run_cached(job: Job) -> dict[str, Any]:
    """Run the task on cached features and return its result. The training takes so little time that there are no
    checkpoints."""
    if job.options.resume != "no":
        raise UserError("--resume: a probe of cached features has no checkpoints and starts over; leave it out")
    job.keep_if_stopped(lambda: PartialResult("the samples are being encoded", {}, {}))
    train_corpus, val, classes = job.open_labelled()
    ranks, config, live = job.ranks, job.config, HeadsInTraining()
    model = job.model.config
    setting = Setting(config, len(classes), model.num_heads, config.run.seed, ranks, job.heartbeats, live=live)
    expected = expected_duration.seconds("linear", train_corpus.samples, (model.emb_dim,), setting)
    whole = job.time_left(train_corpus.samples + val.samples, expected, shorter=lambda _: "a lower linear.steps")
    bank, held_out = (
        job.encode(corpus, title, whole, corpus.samples)
        for corpus, title in ((train_corpus, "encoding train"), (val, "encoding val"))
    )
    settings = with_defaults(config.linear, len(bank.keys), {})
    recipe = linear_recipe(len(bank.keys), setting)
    schedule = Schedule(settings, settings, len(bank.keys))
    job.say(f"linear probe of {config.encode.pool} features, {len(classes)} classes, {sentence(settings, schedule, 0)}")

    def partial_result() -> PartialResult:
        found, where = partial_predictions(live, {_LAYER: bank}, {_LAYER: held_out}, recipe)
        if not found:
            return PartialResult("no step has been taken", {}, {})
        return PartialResult(where, found[_LAYER].accuracies(), found[_LAYER].columns(classes))

    job.keep_if_stopped(partial_result)
    with whole.aside(expected):
        trained = train_heads({_LAYER: bank}, recipe, setting)[_LAYER]
    if trained.tried:
        chosen_rate = table(trained.tried, trained.peak_lr)
        job.say(f"linear.peak_lr, accuracy on a held-out tenth of the training samples: {chosen_rate}")
    predictions = held_out.predictions(logits(trained.heads, held_out))
    _save_classifier(job, trained.linear(), classes)
    job.keep(predictions.columns(classes))
    found = head_warnings(trained, recipe)
    for warning in found:
        job.say(f"note: {warning}")
    return predictions.accuracies() | {
        "classes": len(classes),
        "steps": recipe.steps,
        "train_samples": len(bank.keys),
        "val_samples": len(held_out.keys),
        "skipped": len(bank.skipped) + len(held_out.skipped),
        "recipe": chosen(settings.model_copy(update={"peak_lr": trained.peak_lr})),
        WARNINGS: found,
        "rates": [tried._asdict() for tried in trained.tried],
    }
