"""Online training of attentive probes, without storing patch tokens: each step encodes a batch and discards its tokens,
so that memory use does not grow with the dataset.

Shapes: S samples of a batch on this rank, L patches, D width, K layers (for pooled features: pairs of a layer and a
pooling), F types of features, H heads of a type, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from m3ae_fast.base.hardware import pins_memory
from m3ae_fast.base.pace import Pace
from m3ae_fast.base.progress import track
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import POOLINGS
from m3ae_fast.config.evaluation import EncodeConfig, EvaluationConfig
from m3ae_fast.data import Corpus, Preparation, Share, train_loader
from m3ae_fast.heads.encoding import PassMonitor, Reduce, corpus_batches, encode_types, key_digest
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType, layers_of, pools_of, select
from m3ae_fast.heads.fit_heads import HeadBatch, Heads, fit_heads, losses, verdicts
from m3ae_fast.heads.hyperparameter_choice import Trial, best
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.probes import Trained, new_stack, with_training
from m3ae_fast.heads.recipe import Recipe
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import encoding
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks

_HELD_OUT = 0.1  # fraction of the training samples that is held out to choose the learning rate
_DIGEST = 1 << 64


def is_held_out(key: str) -> bool:
    """Return whether a training sample belongs to the tenth that is held out to choose the learning rate. This depends
    only on a hash of the sample's key."""
    return int.from_bytes(key_digest(key)[:8], "big") < _HELD_OUT * _DIGEST


def streamed_steps(
    loader: Iterable[PackedBatch],
    accumulation: int,
    model: MultimodalEncoder,
    config: EncodeConfig,
    types: Sequence[FeatureType],
    ranks: Ranks,
    trying: bool,
) -> Iterator[HeadBatch]:
    """Yield this rank's part of each training step. Each batch is encoded when it is needed, and its features are then
    discarded.

    Args:
        loader: this rank's batches.
        accumulation: number of batches per step.
        model, config, ranks: as in `encode_types`.
        types: the types of features.
        trying: whether several learning rates are tried. If so, the samples for which `is_held_out` is true are left
            out.
    """
    batches = iter(loader)
    while step := [*islice(batches, accumulation)]:
        parts = [_encoded(batch.to(ranks.device, non_blocking=True), model, config, types, trying) for batch in step]
        pooled_SKD, tokens_SKLD, labels_S = (torch.cat(each) for each in zip(*parts))
        samples = int(ranks.sum([len(labels_S)])[0])
        yield HeadBatch(_inputs(types, pooled_SKD, tokens_SKLD), labels_S, samples)


def _encoded(
    batch: PackedBatch, model: MultimodalEncoder, config: EncodeConfig, types: Sequence[FeatureType], trying: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pooled features, the patch tokens and the labels of a batch."""
    assert batch.labels is not None
    with encoding(model, config.precision, batch.labels.device):
        pooled_SKD, tokens_SKLD = model.pooled_and_patches(
            batch, layers_of(types), pools_of(types) or [config.fixed_pool]
        )
    tokens_SKLD = tokens_SKLD.half()  # rounded to the precision with which a bank stores tokens
    if not trying:
        return pooled_SKD, tokens_SKLD, batch.labels
    kept = [row for row, key in enumerate(batch.keys) if not is_held_out(key)]
    return pooled_SKD[kept], tokens_SKLD[kept], batch.labels[kept]


def _inputs(types: Sequence[FeatureType], pooled_SKD: Tensor, tokens_SKLD: Tensor) -> dict[FeatureType, Tensor]:
    return {kind: select(kind, types, pooled_SKD, tokens_SKLD) for kind in types}


def predict_online(
    model: MultimodalEncoder,
    corpora: tuple[Corpus, Corpus],
    types: Sequence[FeatureType],
    recipe: Recipe,
    config: EvaluationConfig,
    ranks: Ranks,
    heartbeats: Heartbeats,
    whole: Pace,
) -> dict[FeatureType, Predictions]:
    """Train one probe per type of features, and return the predictions for the held-out samples on every rank, as
    `probes.predict` does. The probes of patch tokens are attentive, and the probes of pooled features are linear. All
    probes are trained in one pass. If several learning rates are tried, a tenth of the training samples is held out,
    and the predictions of a probe are those of the head with the best results on this tenth. Every rank must call it.

    Args:
        model: the encoder, on the device of the ranks.
        corpora: the training and the held-out samples.
        types: types of features on which heads are trained.
        recipe: hyper-parameters of the training.
        config: settings of the encoding and of the data.
        ranks, heartbeats: the ranks, and the heartbeats of this rank.
        whole: pace of the task, whose total is the number returned by `passes`.

    Raises:
        UserError: for the reasons given in `encode_types`, or because a score is not finite.
    """
    train, held_out = corpora
    trying = len(recipe.rates) > 1
    stacks = {kind: new_stack(_shape(kind, model), recipe, recipe.rates, ranks) for kind in types}
    accumulation = max(-(-recipe.batch // (config.encode.batch * ranks.world)), 1)
    loader = train_loader(
        config.data,
        train,
        Preparation(model.geometry, UNMASKED, model.tokenizer, recipe.seed),
        Share(recipe.batch, accumulation, ranks.rank, ranks.world),
        range(recipe.steps),
        node=ranks.node(),
        pin_memory=pins_memory(ranks.device),
    )
    steps = streamed_steps(loader, accumulation, model, config.encode, types, ranks, trying)
    title = "attentive probe, online" + (f", {len(recipe.rates)} rates" if trying else "")
    shown = track(steps, title, recipe.steps, whole=whole, part=float(recipe.steps * recipe.batch))
    right = fit_heads(shown, stacks, recipe.lr, title, ranks, heartbeats)
    heads = {kind: stack.heads for kind, stack in stacks.items()}

    def reduced(corpus: Corpus, title: str, reduce: Reduce) -> FeatureBank:
        """Return a bank with the results of `reduce` for each sample and type of features."""
        monitor = PassMonitor(title, heartbeats, whole=whole, part=corpus.samples)
        encode, folder = config.encode, config.run.dir
        batches = corpus_batches(model, corpus, config.data, encode, ranks)
        (found,) = encode_types([model], [types], batches, encode, ranks, monitor, reduce=reduce, folder=folder)
        return found

    tried: dict[FeatureType, list[Trial]] = {kind: [] for kind in types}
    if trying:
        found = reduced(train, "evaluating learning rates", partial(_judged, types, heads))
        found = found.rows([row for row, key in enumerate(found.keys) if is_held_out(key)])
        tried = {kind: _tried(found.part(at), recipe) for at, kind in enumerate(types)}
    trained = {}
    for kind in types:
        number = tried[kind].index(best(tried[kind])) if trying else 0
        trained[kind] = Trained(heads[kind], right[kind][:, number].tolist(), recipe.rates[number], tried[kind], number)
    logits = reduced(held_out, "encoding val", partial(_logits, types, trained))
    predictions = {kind: logits.predictions(logits.part(at).features_RD) for at, kind in enumerate(types)}
    return {kind: with_training(own, trained[kind], recipe) for kind, own in predictions.items()}


def _shape(kind: FeatureType, model: MultimodalEncoder) -> tuple[int, ...]:
    """Return the shape of one sample's features of the type `kind`: (D,) or (L, D)."""
    width = model.config.emb_dim
    return (model.config.most_patches, width) if kind.pool is None else (POOLINGS[kind.pool].vectors * width,)


def passes(recipe: Recipe, train: Corpus, held_out: Corpus) -> float:
    """Return the number of samples that `predict_online` encodes; a sample is counted each time that it is encoded."""
    return recipe.steps * recipe.batch + train.samples * (len(recipe.rates) > 1) + held_out.samples


def _judged(
    types: Sequence[FeatureType],
    heads: Mapping[FeatureType, Heads],
    labels_S: Tensor,
    pooled_SKD: Tensor,
    tokens_SKLD: Tensor,
) -> Tensor:
    """Return the results of `losses` for each sample and feature type: float32 [S, F, 3, H]. `_tried` sums them over
    the samples."""
    inputs = _inputs(types, pooled_SKD, tokens_SKLD)
    parts = [losses(heads[kind](inputs[kind].float()), labels_S) for kind in types]
    return torch.stack([torch.stack(part, 1) for part in parts], 1)


def _tried(found: FeatureBank, recipe: Recipe) -> list[Trial]:
    totals_3H = found.features_RD.double().sum(0).cpu()
    judged = verdicts(totals_3H, len(found.keys), found.ranks)
    return [Trial(rate, *each) for rate, each in zip(recipe.rates, judged)]


def _logits(
    types: Sequence[FeatureType],
    trained: Mapping[FeatureType, Trained],
    labels_S: Tensor,
    pooled_SKD: Tensor,
    tokens_SKLD: Tensor,
) -> Tensor:
    """Return the logits of the head of each feature type for each sample: float32 [S, F, C]."""
    inputs = _inputs(types, pooled_SKD, tokens_SKLD)
    return torch.stack([trained[kind].heads(inputs[kind].float())[:, trained[kind].number] for kind in types], 1)
