"""Linear probe: a linear classifier on the frozen encoder's pooled features, trained as in the official code. Each step
encodes random crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3ae_fast.checkpoint.resuming import SAMPLING, Rules
from m3ae_fast.config import POOLINGS
from m3ae_fast.data import lay_out
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import LabelledTask, make_trainer, open_training
from m3ae_fast.evaluation.linear_probe_engine import ProbeEngine
from m3ae_fast.evaluation.task_features import encode
from m3ae_fast.evaluation.tasks import Linear
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.length_and_rate import sentence
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.training.trainer import Trainer

RULES = Rules(
    same=("task.weights", "model.*", "task.classes", "run.seed", "encode.pool", "train.global_batch", *SAMPLING)
)
_EVALUATIONS = 100  # maximum number of evaluations without train.eval_every


@dataclass(kw_only=True)
class ProbingTask(LabelledTask):
    """The task of training a linear classifier on frozen features."""

    heads: LinearHeads  # a stack of one head
    val: FeatureBank

    def first_line(self, trainer: Trainer) -> str:
        task = f"linear probe of {self.job.encode_config.fixed_pool} features, {len(self.classes)} classes, "
        return task + sentence(trainer.schedule, trainer.step)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether an evaluation is due. A resumed run does not repeat the evaluation at its first step."""
        schedule, step = trainer.schedule, trainer.step
        every = trainer.config.train.eval_every or max(schedule.steps_per_epoch, schedule.total_steps // _EVALUATIONS)
        return step > trainer.start and step % every == 0

    def shorter(self, trainer: Trainer, steps: float) -> str:
        return "the task logistic, which encodes each image once"

    def conclude(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate on all held-out samples, and log and return the accuracies."""
        trainer.stop_if_diverged()
        trainer.heartbeats.mark(f"evaluating after step {trainer.step}")
        return self.evaluated(trainer, self.val.predictions(logits(self.heads.eval(), self.val)))

    def save_classifier(self, trainer: Trainer) -> None:
        self.job.save_probe("linear", self.heads.head(0), self.job.encode_config.fixed_pool)


def set_up(job: Job[Linear]) -> tuple[ProbingTask, Trainer]:
    """Open the data and the checkpoint, encode the held-out samples, and return the task and its trainer. Raises
    UserError if the data or the checkpoint cannot be used."""
    ranks, run, features = job.ranks, job.config.run, job.encode_config
    start = open_training(job)
    held_out = encode(job, start.val, "encoding val")
    width = POOLINGS[features.fixed_pool].vectors * job.model.config.emb_dim
    heads = LinearHeads(width, len(start.classes), [run.seed], ranks).to(ranks.device)
    engine = ProbeEngine(heads, job.config.model_copy(update={"encode": features}), ranks, job.model)
    weights = weights_digest(job.model.state_dict())
    sections = {
        "encode": features.model_dump(mode="json"),
        "task": {"model": job.options.model, "weights": weights, "classes": list(start.classes)},
    }
    layout = lay_out(job.config.data, start.train.sizes, start.share.global_batch)
    task = ProbingTask(
        job=job,
        corpora=(start.train, start.val),
        classes=start.classes,
        length_is_open=start.length_is_open,
        heads=heads,
        val=held_out,
    )
    return task, make_trainer(job, start, task, engine, layout, sections, RULES, "a lower optim.peak_lr")


def run(job: Job[Linear]) -> dict[str, Any] | None:
    """Run the task and return its result; None if it was stopped before its end."""
    job.heartbeats.watch_over(job.config.run)
    task, trainer = set_up(job)
    if (result := task.complete(trainer, len(task.val.keys))) is None:
        return None
    return result | {"skipped": result["skipped"] + len(task.val.skipped)}
