"""Linear probe: a linear classifier on the frozen encoder's pooled features, trained as in the official code. Each step
encodes random crops.

Shapes: S samples of a step on this rank, D encoder width, H heads of a stack (here, H = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.checkpoint.resuming import SAMPLING, Rules
from m3ae_fast.config import POOLINGS
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.data import lay_out
from m3ae_fast.engine.fragments import Fragments, cut
from m3ae_fast.engine.interface import Read
from m3ae_fast.engine.optimizer import Kinds
from m3ae_fast.evaluation.job import Job
from m3ae_fast.evaluation.labelled_task import ClassLosses, LabelledTask, open_training
from m3ae_fast.evaluation.task_features import encode
from m3ae_fast.evaluation.tasks import Linear
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import Stack, logits
from m3ae_fast.heads.modules import LinearHeads
from m3ae_fast.heads.stacked_optimizers import LARS
from m3ae_fast.heads.training_defaults import sentence
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import encoding
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.training.trainer import Trainer

RULES = Rules(
    same=("task.weights", "model.*", "task.classes", "run.seed", "encode.pool", "train.global_batch", *SAMPLING)
)
_EVALUATIONS = 100  # maximum number of evaluations without train.eval_every


class ProbeEngine:
    """An engine that trains a head on the features of a frozen encoder; `engine.interface.Engine` describes its
    methods.

    The statistics of BatchNorm are those of a whole step, as in the official code; see `Stack`.
    """

    model: nn.Module

    def __init__(self, heads: LinearHeads, config: EvaluationConfig, ranks: Ranks, encoder: MultimodalEncoder) -> None:
        """Create the engine. `heads`: a stack of one head; `encoder`: the frozen encoder."""
        self.before_update: Callable[[], None] = lambda: None
        self.kinds: Kinds = {name: ("momentum",) for name, _ in heads.named_parameters()}
        self.model, self.ranks, self.encoder, self.encode = heads, ranks, encoder, config.encode
        self.lars = LARS(heads.parameters(), weight_decay=config.optim.weight_decay)
        self.stack = Stack(heads, self.lars, torch.ones(1, device=ranks.device), ranks)

    def step(self, batches: Sequence, counts: float, lr: float) -> tuple[list[ClassLosses], Tensor]:
        with encoding(self.encoder, self.encode.precision, self.ranks.device):
            features_SD = torch.cat([self.encoder.pooled(batch, self.encode.fixed_pool) for batch in batches])
        labels_S = torch.cat([batch.labels for batch in batches])
        self.before_update()  # must precede the forward pass, which already changes the statistics of BatchNorm
        if counts == 0:  # no sample could be read
            zero = features_SD.new_zeros(())
            return [ClassLosses(zero, zero)], zero
        loss_H, right_H = self.stack.step(features_SD, labels_S, round(counts * self.ranks.world), lr)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return [ClassLosses(loss_H[0], right_H[0])], norm

    def fragments(self) -> Fragments:
        return cut(self._tensors(), self.ranks.rank, self.ranks.world)

    def load_state(self, step: int, read: Read) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(read(name, 0, tensor.numel()).view_as(tensor))

    def _tensors(self) -> dict[str, Tensor]:
        buffers = {name: self.lars.state[p]["momentum_buffer"] for name, p in self.model.named_parameters()}
        return {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()} | {
            f"momentum/{name}": buffer for name, buffer in buffers.items()
        }


@dataclass(kw_only=True)
class ProbingTask(LabelledTask):
    """The task of training a linear classifier on frozen features."""

    heads: LinearHeads  # a stack of one head
    val: FeatureBank

    def first_line(self, trainer: Trainer) -> str:
        task = f"linear probe of {self.job.encode_config.fixed_pool} features, {len(self.job.classes)} classes, "
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
    heads = LinearHeads(width, len(job.classes), [run.seed], ranks).to(ranks.device)
    engine = ProbeEngine(heads, job.config.model_copy(update={"encode": features}), ranks, job.model)
    weights = weights_digest(job.model.state_dict())
    sections = {
        "encode": features.model_dump(mode="json"),
        "task": {"model": job.options.model, "weights": weights, "classes": list(job.classes)},
    }
    layout = lay_out(job.config.data, start.train.sizes, start.share.global_batch)
    task = ProbingTask(job=job, start=start, heads=heads, val=held_out)
    return task, task.trainer(engine, layout, sections, RULES, "a lower optim.peak_lr")


def run(job: Job[Linear]) -> dict[str, Any] | None:
    """Run the task and return its result; None if it was stopped before its end."""
    job.heartbeats.watch_over(job.config.run)
    task, trainer = set_up(job)
    if (result := task.complete(trainer, len(task.val.keys))) is None:
        return None
    return result | {"skipped": result["skipped"] + len(task.val.skipped)}
