"""Probes of the tasks knn, logistic and attentive: a grid of layers, poolings, numbers of training samples per class,
and random draws of these samples. Without options of the grid, a task has one probe. The images are encoded only once,
unless heads are trained online.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.wording import counted
from m3ae_fast.config import FOR_TEXTS, POOLINGS, Pool
from m3ae_fast.config.arguments import chosen_layers
from m3ae_fast.data import Corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_accuracies
from m3ae_fast.evaluation.baseline_results import (
    LOGISTIC,
    MODEL,
    TOGETHER,
    WARNINGS,
    accuracy_entries,
    chosen_entries,
    measured,
)
from m3ae_fast.evaluation.image_features import FixedFeatures
from m3ae_fast.evaluation.job import Encoded, Job, summary
from m3ae_fast.evaluation.multilabel import list_metrics
from m3ae_fast.evaluation.task_features import by_type, encode_by_each, possible_pools
from m3ae_fast.evaluation.tasks import DRAWS, WithGrid
from m3ae_fast.heads.attentive_online import passes, predict_online
from m3ae_fast.heads.encoding import key_digest
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType, layers_of, missing_in_host_memory
from m3ae_fast.heads.predictions import ListPredictions, Predictions, stacked
from m3ae_fast.heads.probes import predict
from m3ae_fast.heads.recipe import ATTENTIVE, Recipe
from m3ae_fast.heads.standard_error import ERROR
from m3ae_fast.weights.model_name import HOG, IMAGE_FEATURES

ATTENTION = "attention"  # display name of the pooling of patch tokens by an attentive probe


class Case(NamedTuple):
    """A configuration of the grid."""

    layer: int
    pool: Pool | None
    shots: int | None  # number of training samples per class; None: all samples

    def name(self, pools: bool) -> str:
        """Return the display name. `pools`: whether the grid has several poolings."""
        return (
            f"layer {self.layer}"
            + (f", {self.pool or ATTENTION}" if pools else "")
            + ("" if self.shots is None else f", {self.shots} shots")
        )


def main_case(cases: Sequence[Case]) -> Case:
    """Return the case to which the main accuracies of a result belong: the last layer with the first pooling and the
    largest number of shots. `cases`: all cases of a grid, in their order."""
    return [case for case in cases if case.pool == cases[0].pool][-1]


Made = list[tuple[Case, int, Predictions]]  # for each probe: its case, the number of its draw, and its predictions


class Probed(NamedTuple):
    """The result of the probes of a task."""

    entries: dict[str, Any]  # entries of result.json
    predictions: Predictions  # predictions of the main case for the first draw
    encoded: Encoded | None  # the features of the model; None if the heads were trained online


def run_probes(job: Job[WithGrid]) -> Probed:
    """Train and evaluate all probes of the task and of its baselines, and write the predictions. Every rank must call
    it.

    Without options of the grid, there is one probe of the last layer. If `encode.pool` is null, `best_type` chooses the
    pooling for this probe and for each baseline. The baselines of a grid have the layer, the pooling and the training
    samples of the main case. Baselines use k-NN if the task does, and otherwise logistic regression.

    Raises:
        UserError: a layer does not exist, a class has too few samples, the memory is too small, or an option does not
            support lists of labels; also as in `Job.open_labelled` and `encode_types`.
    """
    options, task = job.options, job.options.name()
    types = _types(job)
    train, val, classes = job.open_labelled()
    streams = task == ATTENTIVE and not options.shots and trains_online(job, layers_of(types), [train, val])
    if train.lists is not None and (options.shots or streams):
        change = "leave out shots" if options.shots else "add --set attentive.online=false"
        raise UserError(f"labels {options.labels}: lists support neither shots nor online training; {change}")
    if not streams:
        _print_plan(job, types, train)
    encoded = _encoded(job, types, (train, val), streams)
    own = encoded.pop(MODEL, None)
    if own is None:
        made = _streamed(job, types, (train, val), classes)
        # `made` contains only readable samples
        samples = {"train_samples": train.samples, "val_samples": len(made[0][2].keys)}
    else:
        banks = [next(iter(part.values())) for part in (own.train, own.val)]
        if options.shots:
            few_shot(banks[0], max(options.shots), 0, classes)  # reports too many shots before any training
        made, numbers = [], list[int | None](options.shots) or [None]
        for shots in numbers:
            part = _predictions(job, task, own, shots, classes)
            made += part
            if options.is_grid:
                _print_accuracies(job, part)
        samples = {"train_samples": len(banks[0].keys), "val_samples": len(banks[1].keys)}
        samples["skipped"] = sum(len(bank.skipped) for bank in banks)
    main = main_case([*dict.fromkeys(case for case, _, _ in made)])
    probe = "knn" if task == "knn" else "logistic"
    found = {MODEL: [each for case, _, each in made if case == main]}
    for name, other in encoded.items():
        found[name] = [each for _, _, each in _predictions(job, probe, other, main.shots, classes)]
    entries = accuracy_entries(found, "" if probe == task else LOGISTIC) | {"classes": len(classes)} | samples
    entries[WARNINGS], model = _warnings(made), found[MODEL][0]
    if isinstance(model, ListPredictions):
        more = list_metrics(model, classes, entries)
        entries |= more | {WARNINGS: [*entries[WARNINGS], *more.get(WARNINGS, ())]}
    if options.is_grid:
        rows = _rows(made)
        entries |= {"draws": len(found[MODEL]), "results": rows}
        job.keep(stacked(((each, case._asdict() | {"draw": draw}) for case, draw, each in made), classes))
        job.pictures.append(lambda: _draw(job, rows))
    else:
        job.keep(model.columns(classes))
    return Probed(entries, model, own)


def _types(job: Job[WithGrid]) -> list[FeatureType]:
    """Return the types of features of the probes or, if the pooling will be chosen, the candidates. Raises UserError if
    an option cannot be used with another option or with the model."""
    options, config = job.options, job.model.config
    if options.pools and "pool" in job.config.encode.model_fields_set:
        raise UserError("pools replaces encode.pool; leave out one of the two")
    of_images = [pool for pool in options.pools if POOLINGS[pool].needs_images]
    if job.modality == "text" and of_images:
        raise UserError(f"pools {of_images[0]}: needs images, but captions are encoded; use {FOR_TEXTS}")
    pools: list[Pool | None] = [*options.pools]
    if options.name() == ATTENTIVE:
        pools = [None, *pools]
    elif not pools:
        pools = [job.encode_config.fixed_pool] if options.is_grid else [*possible_pools(job)]
    return [FeatureType(layer, pool) for layer in chosen_layers(options.layers, config.depth) for pool in pools]


def _print_plan(job: Job[WithGrid], types: Sequence[FeatureType], train: Corpus) -> None:
    options, layers = job.options, layers_of(types)
    probes = (len(types) if options.is_grid else 1) * (len(options.shots) * DRAWS or 1)
    job.print(
        f"{options.name()} probe{f' at {len(layers)} of {job.model.config.depth} layers' if options.layers else ''}, "
        + _pooled(options)
        + (f"{', '.join(map(str, options.shots))} training samples per class, out of " if options.shots else "all ")
        + f"{train.samples:,} training samples: {counted(probes, 'probe')}"
    )


def _pooled(options: WithGrid) -> str:
    """Return a description of the pooled features that --pools selects; "" without --pools."""
    linear = "linear probes of " if options.name() == ATTENTIVE else ""
    return f"{linear}{' and '.join(options.pools)} features, " if options.pools else ""


def _encoded(
    job: Job[WithGrid], types: Sequence[FeatureType], corpora: tuple[Corpus, Corpus], streams: bool
) -> dict[str, Encoded]:
    """Return the features of the model and of its baselines. The keys are MODEL and the names of the baselines. Without
    options of the grid, there may also be TOGETHER.

    Args:
        job: the job. `job.shared` may already contain the features of a task without options of the grid.
        types: result of `_types`.
        corpora: the training and the held-out samples.
        streams: whether heads are trained online on the model, whose features are then not computed here.
    """
    is_grid = job.options.is_grid
    if (shared := job.shared).encoded and not is_grid:
        job.warnings += shared.warnings
        return dict(shared.encoded)
    warned = len(job.warnings)
    baselines = job.open_baselines()
    models = {**({} if streams else {MODEL: job.model}), **baselines}
    if not models:
        return {}
    main = FeatureType(types[-1].layer, types[0].pool or job.encode_config.fixed_pool)
    wanted = dict.fromkeys(models, [main] if is_grid else types)
    wanted |= {name: [FeatureType(1, main.pool)] for name, each in models.items() if isinstance(each, FixedFeatures)}
    if not streams:
        wanted[MODEL] = types
    titles = [f"{'baselines: ' * streams}encoding {part}" for part in ("train", "val")]
    shorter = _shorter(job, layers_of(types))
    found = {
        name: by_type(job, models[name], banks, choose=not is_grid)
        for name, banks in encode_by_each(job, models, wanted, dict(zip(titles, corpora)), shorter=shorter).items()
    }
    if len(types) > 1 and not is_grid:
        pools = [f"{name}: {kind.pool}" for name, each in found.items() if each.is_network for kind in each.train]
        job.print(f"pooling, chosen on held-out training samples: {', '.join(pools)}")
    if not is_grid:
        if {MODEL, IMAGE_FEATURES[HOG]} <= found.keys():
            _add_together(job, found)
        shared.encoded, shared.warnings = dict(found), job.warnings[warned:]
    return found


def _add_together(job: Job[WithGrid], found: dict[str, Encoded]) -> None:
    """Add the features of the model and HOG together, as TOGETHER, to those of `_encoded`, which have one type. If they
    fit neither into memory nor on the disk, they are left out with a warning. Every rank must call it."""
    model, hog = found[MODEL], found[IMAGE_FEATURES[HOG]]
    ((kind, train),), ((_, hog_train),) = model.train.items(), hog.train.items()
    ((_, val),), ((_, hog_val),) = model.val.items(), hog.val.items()
    if kind.is_tokens:
        return
    try:
        both = [own.beside(other, job.out) for own, other in ((train, hog_train), (val, hog_val))]
        found[TOGETHER] = Encoded({kind: both[0]}, {kind: both[1]})
    except UserError as error:
        job.warn(f"the result is written without {TOGETHER}: {error}")


def _predictions(job: Job[WithGrid], probe: str, encoded: Encoded, shots: int | None, classes: Classes) -> Made:
    """Return the predictions of probes for the held-out samples, for all types of features and all draws. `shots`:
    number of training samples per class; None: all samples are used, once."""
    made: Made = []
    for draw in range(1 if shots is None else DRAWS):
        banks = {
            kind: bank if shots is None else few_shot(bank, shots, draw, classes)
            for kind, bank in encoded.train.items()
        }
        samples, heads = len(next(iter(banks.values())).keys), job.model.config.num_heads
        recipe = Recipe.of(probe, job.config, classes=len(classes), samples=samples, encoder_heads=heads)
        found = predict(banks, encoded.val, recipe, job.ranks, job.heartbeats, encoded.tried)
        for kind, own in found.items():
            if encoded.is_network and kind.pool:
                own = replace(own, chosen={**own.chosen, "pool": kind.pool})
            if job.options.is_grid:
                own = replace(own, classifier=None)  # many classifiers may need much memory
            made.append((Case(*kind, shots), draw, own))
    return made


def _streamed(
    job: Job[WithGrid], types: Sequence[FeatureType], corpora: tuple[Corpus, Corpus], classes: Classes
) -> Made:
    """Return the predictions of heads that are trained without storing patch tokens, as `_predictions` does."""
    (train, val), model = corpora, job.model.config
    recipe = Recipe.of(
        ATTENTIVE, job.config, classes=len(classes), samples=train.samples, encoder_heads=model.num_heads
    )
    whole = job.pace(
        passes(recipe, train, val),
        shorter=lambda fraction: f"--set attentive.steps={max(int(recipe.steps * fraction), 1)}",
    )
    job.print(
        f"attentive probe at {len(layers_of(types))} of {model.depth} layers, online, "
        f"{_pooled(job.options)}{train.samples:,} training samples, batch {recipe.batch}, {recipe.steps:,} steps, "
        f"learning rates: {', '.join(map(str, recipe.rates))}"
    )
    found = predict_online(job.model, corpora, types, recipe, job.config, job.ranks, job.heartbeats, whole)
    return [(Case(*kind, None), 0, own) for kind, own in found.items()]


def _has_pools(made: Made) -> bool:
    """Return whether there are several poolings."""
    return len({case.pool for case, _, _ in made}) > 1


def _rows(made: Made) -> list[dict[str, Any]]:
    """Return one row per case, with its accuracies and the hyper-parameters that were selected."""
    trials: dict[Case, list[Predictions]] = {}
    for case, _, predictions in made:
        trials.setdefault(case, []).append(predictions)
    return [case._asdict() | measured(own) | chosen_entries(own) for case, own in trials.items()]


def _print_accuracies(job: Job, made: Made) -> None:
    for row in _rows(made):
        case = Case(*(row.pop(name) for name in Case._fields))
        job.print(f"{case.name(_has_pools(made))}: {summary(row)}")


def _warnings(made: Made) -> list[str]:
    """Return the warnings about all predictions, each with its case."""
    pools = _has_pools(made)
    return [
        f"{case.name(pools)}{'' if case.shots is None else f', draw {draw + 1}'}: {text}"
        for case, draw, predictions in made
        for text in predictions.warnings
    ]


def _shorter(job: Job[WithGrid], layers: Sequence[int]) -> list[str]:
    """Return options that shorten the task."""
    ways = ["fewer --train shards"]
    if job.options.name() == ATTENTIVE and job.config.attentive.peak_lr is None:
        ways = ["--set attentive.peak_lr=1e-3, so that only one learning rate is tried"]
    if job.options.shots:
        ways.append("fewer --shots")
    if len(layers) > 1:
        ways.append("fewer --layers")
    if len(job.options.pools) > 1:
        ways.append("fewer --pools")
    return ways


def trains_online(job: Job, layers: Sequence[int], corpora: Sequence[Corpus], name: str = "") -> bool:
    """Return whether attentive probes at these layers are trained online, without storing patch tokens. The setting
    `attentive.online` determines this; if it is null, the probes are trained online if the tokens do not fit into
    memory. Print the required memory unless the setting is true. Every rank must call this function; the result is the
    same on all ranks. `name`: prefix of the printed line."""
    model, ranks, online = job.model.config, job.ranks, job.config.attentive.online
    samples = sum(corpus.samples for corpus in corpora)
    needed = 2 * samples * len(layers) * model.most_patches * model.emb_dim  # float16
    lacking = missing_in_host_memory(needed / ranks.world, len(ranks.of_node))
    lacking = next(filter(None, ranks.gather(lacking)), "")
    what = f"{name}the patch tokens of {samples:,} samples at {counted(len(layers), 'layer')}"
    if online is None and lacking:
        job.print(f"{what} do not fit into memory ({lacking}): each step encodes a batch and discards its tokens")
        return True
    if not online:
        place = f" and are written to a file, because memory is too small ({lacking})" if lacking else ""
        job.print(f"{what} need {needed / 1e9:.3g} GB of memory{place}")
    return bool(online)


def few_shot(bank: FeatureBank, shots: int, draw: int, classes: Classes) -> FeatureBank:
    """Return a bank with `shots` samples of each class. The samples are selected by a hash of the draw number and their
    keys. The samples for a smaller number of shots are a subset of the samples for a larger number. Raises UserError if
    a class has too few samples."""
    labels = bank.labels.tolist()
    order = sorted(range(len(labels)), key=lambda row: key_digest(bank.keys[row], f"{draw}/"))
    taken: dict[int, list[int]] = {number: [] for number in range(len(classes))}
    for row in order:
        if len(taken[labels[row]]) < shots:
            taken[labels[row]].append(row)
    for number, rows in taken.items():
        if len(rows) < shots:
            found = counted(len(rows), "training sample")
            raise UserError(f"shots {shots}: the class {classes[number]} has only {found}")
    return bank.rows(sorted(row for rows in taken.values() for row in rows))


def _draw(job: Job, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the accuracy, or the mAP, by layer, with a line for each pooling and number of shots; for a single layer,
    plot the accuracy by number of shots."""
    layers, pools = ({row[name] for row in rows} for name in ("layer", "pool"))
    metric = next(name for name in ("top1", "map") if name in rows[0])
    x, line = ("layer", "shots") if len(layers) > 1 else ("shots", "layer")
    if len({row[x] for row in rows}) == 1:
        return
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        name = f"layer {row[line]}" if line == "layer" else f"{row[line]} shots" if row[line] else "all samples"
        name = f"{row['pool'] or ATTENTION}, {name}" if len(pools) > 1 else name
        points.setdefault(name, []).append((row[x], row[metric], row.get(f"{metric}{ERROR}", 0.0)))
    titles = {"layer": ("depth.png", "layer"), "shots": ("shots.png", "number of training samples per class")}
    draw_accuracies(job.out / titles[x][0], points, titles[x][1], metric)
