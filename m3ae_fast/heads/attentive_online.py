"""Online training of attentive probes, without storing patch tokens: each step encodes a batch and discards its tokens,
so that memory use does not grow with the dataset.

Shapes: S samples of a batch on this rank, L patches, D width, K layers, or pairs of a layer and a pooling, F types of
features, H heads of a type, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from m3ae_fast.base.hardware import pins_memory
from m3ae_fast.base.pace import Pace
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus, Preparation, Share, lay_out, train_loader
from m3ae_fast.heads.encoding import PassMonitor, Reduce, encode_corpus, key_digest
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import HeadBatch, Heads, Input, fit_heads, losses, verdicts
from m3ae_fast.heads.hyperparameter_choice import Trial, best
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.probes import (
    Features,
    FeatureTypes,
    Recipe,
    Setting,
    Trained,
    head_warnings,
    new_stack,
)
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import encoding
from m3ae_fast.process.ranks import Node, Ranks

_HELD_OUT = 0.1  # fraction of the training samples that is held out to choose the learning rate
_DIGEST = 1 << 64


def is_held_out(key: str) -> bool:
    """Return whether a training sample belongs to the tenth that is held out to choose the learning rate. A hash of its
    key decides this."""
    return int.from_bytes(key_digest(key)[:8], "big") < _HELD_OUT * _DIGEST


@dataclass(frozen=True)
class EncodedSteps:
    """The steps of training on patch tokens. Each batch is encoded when it is needed, and its tokens are then
    discarded."""

    loader: Iterable[PackedBatch]
    accumulation: int  # number of batches per step
    model: MultimodalEncoder
    config: EncodeConfig
    types: FeatureTypes
    ranks: Ranks
    trying: bool  # whether several learning rates are tried; samples for which `is_held_out` is true are then left out

    def __iter__(self) -> Iterator[HeadBatch]:
        loader = iter(self.loader)
        while batches := [*islice(loader, self.accumulation)]:
            parts = [self._encoded(batch.to(self.ranks.device, non_blocking=True)) for batch in batches]
            pooled_SKD, tokens_SKLD, labels_S = (torch.cat(each) for each in zip(*parts))
            samples = int(self.ranks.sum([len(labels_S)])[0])
            yield HeadBatch(self.types.inputs(pooled_SKD, tokens_SKLD), labels_S, samples)

    def _encoded(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pooled features, the patch tokens and the labels of a batch."""
        assert batch.labels is not None
        layers, pools = self.types.layers, self.types.pools or [self.config.fixed_pool]
        with encoding(self.model, self.config.precision, self.ranks.device):
            pooled_SKD, tokens_SKLD = self.model.pooled_and_patches(batch, layers, pools)
        tokens_SKLD = tokens_SKLD.half()  # the precision in which a bank stores tokens
        if not self.trying:
            return pooled_SKD, tokens_SKLD, batch.labels
        kept = [row for row, key in enumerate(batch.keys) if not is_held_out(key)]
        return pooled_SKD[kept], tokens_SKLD[kept], batch.labels[kept]


def predict_online(
    model: MultimodalEncoder,
    corpora: tuple[Corpus, Corpus],
    kinds: Sequence[Features],
    recipe: Recipe,
    setting: Setting,
    node: Node,
    whole: Pace,
) -> dict[Input, Predictions]:
    """Train one probe per feature type, and return the predictions for the held-out samples on every rank, by index of
    the feature type. The probes of patch tokens are attentive, and the probes of pooled features are linear. All probes
    are trained in one pass. If several learning rates are tried, a tenth of the training samples is held out, and the
    predictions of a probe are those of the head with the best results on this tenth.

    Args:
        model: the encoder, on the device of the ranks.
        corpora: the training and the held-out samples.
        kinds: types of features on which heads are trained.
        recipe: hyper-parameters of the training.
        setting: context of the probes.
        node: the ranks of this node.
        whole: pace of the task, whose total is the number returned by `passes`.

    Raises:
        UserError: as `encode_corpus` does, or a score is not finite.
    """
    train, held_out = corpora
    config, ranks, trying = setting.config, setting.ranks, len(recipe.rates) > 1
    types, places = FeatureTypes(kinds), range(len(kinds))
    stacks = {
        at: new_stack(shape, recipe, recipe.rates, setting) for at, shape in enumerate(types.shapes(model.config))
    }
    accumulation = max(-(-recipe.batch // (config.encode.batch * ranks.world)), 1)
    share = Share(recipe.batch, accumulation, ranks.rank, ranks.world)
    loader = train_loader(
        config.data,
        train,
        Preparation(model.geometry, UNMASKED, model.tokenizer, setting.seed),
        share,
        range(recipe.steps),
        layout=lay_out(config.data, train.sizes, recipe.batch),
        node=node,
        pin_memory=pins_memory(ranks.device),
    )
    steps = EncodedSteps(loader, accumulation, model, config.encode, types, ranks, trying)
    title = "attentive probe, online" + (f", {len(recipe.rates)} rates" if trying else "")
    part = float(recipe.steps * recipe.batch)
    right = fit_heads(steps, stacks, recipe.lr, recipe.steps, title, ranks, setting.heartbeats, whole, part)
    heads = {at: stack.heads for at, stack in stacks.items()}

    def reduced(corpus: Corpus, title: str, reduce: Reduce) -> FeatureBank:
        """Return the results of `reduce` for each sample and type of features."""
        monitor = PassMonitor(title, setting.heartbeats, whole=whole, part=corpus.samples)
        return encode_corpus(
            model,
            corpus,
            config.data,
            config.encode,
            ranks,
            monitor,
            layers=types.layers,
            pools=types.pools or None,
            reduce=reduce,
            folder=config.run.dir,
        )

    tried: dict[Input, list[Trial]] = {at: [] for at in places}
    if trying:
        found = reduced(train, "evaluating learning rates", partial(_judged, types, heads))
        found = found.rows([row for row, key in enumerate(found.keys) if is_held_out(key)])
        tried = {at: _tried(found.part(at), recipe) for at in places}
    trained = {}
    for at in places:
        number = tried[at].index(best(tried[at])) if trying else 0
        rate = recipe.rates[number]
        trained[at] = Trained(heads[at], right[at][:, number].tolist(), rate, tried[at], number)
        for text in head_warnings(trained[at], recipe):
            setting.warn(at, text)
        setting.chose(at, {"peak_lr": rate})
    logits = reduced(held_out, "encoding val", partial(_logits, types, trained))
    return {at: logits.predictions(logits.part(at).features_RD) for at in places}


def passes(recipe: Recipe, train: Corpus, held_out: Corpus) -> float:
    """Return the number of samples that `predict_online` encodes; a sample is counted each time that it is encoded."""
    return recipe.steps * recipe.batch + train.samples * (len(recipe.rates) > 1) + held_out.samples


def _judged(
    types: FeatureTypes, heads: Mapping[Input, Heads], labels_S: Tensor, pooled_SKD: Tensor, tokens_SKLD: Tensor
) -> Tensor:
    """Return the results of `losses` for each sample and feature type, to be summed over samples and passed to
    `verdicts`: float32 [S, F, 3, H]."""
    inputs = types.inputs(pooled_SKD, tokens_SKLD)
    parts = [losses(each(inputs[at].float()), labels_S) for at, each in heads.items()]
    return torch.stack([torch.stack(part, 1) for part in parts], 1)


def _tried(found: FeatureBank, recipe: Recipe) -> list[Trial]:
    totals_3H = found.features_RD.double().sum(0).cpu()
    judged = verdicts(totals_3H, len(found.keys), found.ranks)
    return [Trial(rate, *each) for rate, each in zip(recipe.rates, judged)]


def _logits(
    types: FeatureTypes, trained: Mapping[Input, Trained], labels_S: Tensor, pooled_SKD: Tensor, tokens_SKLD: Tensor
) -> Tensor:
    """Return the logits of the head of each feature type for each sample: float32 [S, F, C]."""
    inputs = types.inputs(pooled_SKD, tokens_SKLD)
    return torch.stack([one.heads(inputs[at].float())[:, one.number] for at, one in trained.items()], 1)
