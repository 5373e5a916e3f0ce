"""Features of the samples of a task, computed by its model and by its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from m3ae_fast.base.pace import Pace
from m3ae_fast.config import Pool
from m3ae_fast.config.poolings import candidates
from m3ae_fast.data import Corpus
from m3ae_fast.evaluation.baseline_results import MODEL
from m3ae_fast.evaluation.image_features import FixedFeatures
from m3ae_fast.evaluation.job import Encoded, Job
from m3ae_fast.heads.encoding import PassMonitor, UnusableSamples, corpus_batches, encode_batches, encode_types
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.pool_choice import best_type
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.stop_request import BY_ANOTHER, StopRequest
from m3ae_fast.process.stoppable_loop import Stopped

_FEWER = "fewer --train shards"


def encode(job: Job, corpus: Corpus, title: str, whole: Pace | None = None) -> FeatureBank:
    """Return the features that the last block of the model computes for all samples, [R, D], with the pooling in the
    settings. `title`: title of the progress display; `whole`: pace of the task, in samples."""
    monitor = PassMonitor(title, job.heartbeats, whole=whole, part=corpus.samples)
    batches = corpus_batches(job.model, corpus, job.config.data, job.encode_config, job.ranks)
    return encode_batches(job.model, batches, job.encode_config, job.ranks, monitor, folder=job.out)


def possible_pools(job: Job) -> list[Pool]:
    """Return the pooling of the model's features or, if `encode.pool` is null and the model is a network, the
    candidates of which `by_type` chooses one."""
    if job.config.encode.pool is None and not isinstance(job.model, FixedFeatures):
        return candidates(job.model.config.emb_dim, is_image=job.modality == "image")
    return [job.encode_config.fixed_pool]


def by_type(job: Job, model: MultimodalEncoder, banks: Sequence[FeatureBank], *, choose: bool = True) -> Encoded:
    """Return a model's features of the training and of the held-out samples by type. Every rank must call it. `banks`:
    the bank of the training samples and that of the held-out samples. `choose`: if there are several poolings, whether
    to return only the one that `best_type` chooses."""
    train, val = banks
    kinds, tried = train.types, None
    if choose and sum(not kind.is_tokens for kind in kinds) > 1:
        best, tried = best_type(train, len(job.classes), job.heartbeats)
        kinds = [kind for kind in kinds if kind == best or kind.is_tokens]
    is_network = not isinstance(model, FixedFeatures)
    return Encoded({kind: train.of(kind) for kind in kinds}, {kind: val.of(kind) for kind in kinds}, is_network, tried)


def encode_by_each(
    job: Job,
    models: Mapping[str, MultimodalEncoder],
    types: Mapping[str, Sequence[FeatureType]],
    corpora: Mapping[str, Corpus],
    *,
    stop: StopRequest | None = None,
    shorter: Sequence[str] = (_FEWER,),
) -> dict[str, tuple[FeatureBank, ...]]:
    """Return the features of each dataset by model, in one pass for all models that have the same input. A baseline is
    left out with a warning if it cannot read a sample that the first model can read, or if `encode_types` raises
    UnusableSamples for it.

    Args:
        job: the job.
        models: the models by name: MODEL and the names of baselines.
        types: the types of features of each model.
        corpora: the datasets, by their titles in the progress display.
        stop: stop requests to check before each batch; None if a stop request ends the program by itself.
        shorter: options that shorten the task.

    Raises:
        Stopped: `stop` is given, and a rank is asked to stop.
        UserError: as `encode_types` does.
    """
    inputs = list(dict.fromkeys(model.geometry for model in models.values()))
    ways = " or ".join([*shorter, *(["--no-baselines"] if {*models} != {MODEL} else [])])
    samples = sum(corpus.samples for corpus in corpora.values())
    whole = job.pace(len(inputs) * samples, shorter=lambda _: ways)
    encode, found = job.encode_config, dict[str, tuple[FeatureBank, ...]]()
    for geometry in inputs:
        same = {name: model for name, model in models.items() if model.geometry == geometry}
        parts = []
        try:
            for title, corpus in corpora.items():
                monitor = PassMonitor(title, job.heartbeats, stop, whole, corpus.samples)
                batches = corpus_batches(next(iter(same.values())), corpus, job.config.data, encode, job.ranks)
                own = [types[name] for name in same]
                parts.append(encode_types([*same.values()], own, batches, encode, job.ranks, monitor, folder=job.out))
        except UnusableSamples as error:
            if MODEL in same:
                raise
            job.warn(f"the result is written without {' and '.join(same)}: {error}")
        else:
            found |= dict(zip(same, zip(*parts)))
    found = _of_common_samples(found)
    for name, banks in list(found.items()):
        first = next(iter(found.values()))
        if lacking := sum(len(each.keys) - len(own.keys) for each, own in zip(first, banks)):
            job.warn(f"the result is written without {name}, which cannot read {lacking:,} of the samples")
            del found[name]
    return found


def _of_common_samples(found: Mapping[str, tuple[FeatureBank, ...]]) -> dict[str, tuple[FeatureBank, ...]]:
    """Return the features without the samples that the first model could not read, because models whose inputs differ
    may read different files."""
    first = next(iter(found.values()), ())

    def common(bank: FeatureBank, reference: FeatureBank) -> FeatureBank:
        if bank.keys == reference.keys:
            return bank
        known = {*reference.keys}
        return bank.rows([row for row, key in enumerate(bank.keys) if key in known])

    return {name: tuple(common(*each) for each in zip(banks, first)) for name, banks in found.items()}


def encode_patches(job: Job, train: Corpus, val: Corpus) -> dict[str, tuple[FeatureBank, FeatureBank]]:
    """Return the patch tokens that the last block of the model, and of each baseline, computes for the training and the
    held-out samples. The keys are MODEL and the names of the baselines."""
    return _of_last_block(job, {MODEL: job.model, **job.open_baselines()}, None, "", (train, val))


def encode_baselines(
    job: Job, train: Corpus, val: Corpus, stop: StopRequest
) -> dict[str, tuple[FeatureBank, FeatureBank]]:
    """Return the features that the last block of each baseline computes for the training and the held-out samples, with
    the pooling in the settings. The result is empty if the task evaluates no baselines. If a rank is asked to stop, the
    result is empty on all ranks, so that the task can still write the result of its training."""
    if not (models := job.open_baselines()):
        return {}
    try:
        return _of_last_block(job, models, job.encode_config.fixed_pool, "baselines: ", (train, val), stop)
    except Stopped:
        job.warn(f"the result is written without baselines: stopped ({stop.reason or BY_ANOTHER})")
        return {}


def _of_last_block(
    job: Job,
    models: Mapping[str, MultimodalEncoder],
    pool: Pool | None,
    prefix: str,
    corpora: tuple[Corpus, Corpus],
    stop: StopRequest | None = None,
) -> dict[str, tuple[FeatureBank, FeatureBank]]:
    """Return the features that the last block of each model computes. `pool`: the pooling; None: patch tokens.
    `prefix`: prefix of the titles in the progress display."""
    last = {name: FeatureType(model.config.depth, pool) for name, model in models.items()}
    named = dict(zip((f"{prefix}encoding train", f"{prefix}encoding val"), corpora))
    found = encode_by_each(job, models, {name: [kind] for name, kind in last.items()}, named, stop=stop)
    return {name: (banks[0].of(last[name]), banks[1].of(last[name])) for name, banks in found.items()}
