"""Grids of probes: several encoder layers and poolings, or few training samples per class. The images are encoded only
once, unless heads are trained online.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.pace import Pace
from m3ae_fast.config import FOR_TEXTS, POOLINGS, Pool
from m3ae_fast.data import Corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_accuracies
from m3ae_fast.evaluation.baselines import LOGISTIC, WARNINGS, Baseline, accuracy_difference, baseline_entries
from m3ae_fast.evaluation.job import Job, summary
from m3ae_fast.evaluation.significance import interval, mean_accuracy
from m3ae_fast.evaluation.tasks import DRAWS, WithGrid
from m3ae_fast.heads.attentive_online import passes, predict_online
from m3ae_fast.heads.encoding import key_digest
from m3ae_fast.heads.feature_bank import FeatureBank, missing_in_host_memory
from m3ae_fast.heads.predictions import Predictions, stacked
from m3ae_fast.heads.probes import (
    PROBES,
    Features,
    FeatureTypes,
    Setting,
    attentive_recipe,
)
from m3ae_fast.heads.standard_error import ERROR

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


@dataclass(frozen=True)
class Encoded:
    """Features of the training and held-out samples. Keys are indices of feature types."""

    bank: dict[int, FeatureBank]
    held_out: dict[int, FeatureBank]
    classes: Classes

    @property
    def samples(self) -> tuple[int, int]:
        """Return the numbers of training samples and held-out samples."""
        return len(next(iter(self.bank.values())).keys), len(next(iter(self.held_out.values())).keys)


class GridPredictions:
    """The predictions of the probes of a grid."""

    def __init__(
        self,
        kinds: Sequence[Features],
        shots: Sequence[int | None],
        draws: int,
        classes: Classes,
        samples: tuple[int, int],
    ) -> None:
        self.kinds, self.draws, self.classes, self.samples = kinds, draws, classes, samples
        self.cases = [Case(*kind, number) for number in shots for kind in kinds]
        self.pools = len({kind.pool for kind in kinds}) > 1  # whether there are several poolings
        self.made: list[tuple[Case, int, Predictions]] = []  # case, draw number, and predictions
        self.warnings: list[str] = []
        self.chosen: dict[Case, dict[str, float]] = {}  # hyper-parameters that were selected; empty for several draws

    def rows(self, made: Sequence[tuple[Case, int, Predictions]]) -> list[dict[str, Any]]:
        """Return one row per case, with its accuracies."""
        cases = dict.fromkeys(case for case, _, _ in made)
        return [
            case._asdict() | _measured([each for other, _, each in made if other == case]) | self.chosen.get(case, {})
            for case in cases
        ]

    def result(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the entries of result.json for these rows."""
        train_samples, val_samples = self.samples
        main = rows[self.cases.index(main_case(self.cases))]
        result = {name: value for name, value in main.items() if name.startswith("top")}
        result |= {"classes": len(self.classes), "train_samples": train_samples, "draws": self.draws}
        return result | {WARNINGS: [*self.warnings], "val_samples": val_samples, "results": rows}

    def main_predictions(self) -> tuple[Case, list[Predictions]]:
        """Return the case to which the main accuracies of the result belong, and its predictions for each draw."""
        case = main_case(self.cases)
        return case, [predictions for other, _, predictions in self.made if other == case]

    def columns(self, made: Sequence[tuple[Case, int, Predictions]]) -> dict[str, list[Any]]:
        """Return these predictions as the columns of a table."""
        parts = ((predictions, case._asdict() | {"draw": draw}) for case, draw, predictions in made)
        return stacked(parts, self.classes)


def run(job: Job[WithGrid]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if a layer does not exist, a class has too few samples, or
    the memory is too small."""
    options, task = job.options, job.options.name()
    if options.pools and "pool" in job.config.encode.model_fields_set:
        raise UserError("pools replaces encode.pool; leave out one of the two")
    of_images = [pool for pool in options.pools if POOLINGS[pool].needs_images]
    if job.modality == "text" and of_images:
        raise UserError(f"pools {of_images[0]}: needs images, but captions are encoded; use {FOR_TEXTS}")
    layers = chosen_layers(options.layers, job.model.config.depth)
    pools: list[Pool | None] = [*options.pools] or [job.encode_config.fixed_pool]
    pools = [None, *options.pools] if PROBES[task].is_attentive else pools
    kinds = [Features(layer, pool) for layer in layers for pool in pools]
    draws = DRAWS if options.shots else 1
    numbers: list[int | None] = [*options.shots] or [None]
    train, val, classes = job.open_labelled()
    if task == "attentive" and not options.shots and trains_online(job, layers, [train, val]):
        return _run_online(job, kinds, (train, val, classes))
    encoding = job.pace(train.samples + val.samples, shorter=lambda _: _shorter(job, layers))
    probes = len(kinds) * len(numbers) * draws
    job.print(
        f"{task} probe{f' at {len(layers)} of {job.model.config.depth} layers' if options.layers else ''}, "
        + _pooled(options)
        + (f"{', '.join(map(str, options.shots))} training samples per class, out of " if options.shots else "all ")
        + f"{train.samples:,} training samples: {probes} probe{'s' * (probes != 1)}"
    )
    encoded = encode_kinds(job, kinds, (train, val, classes), encoding)
    if options.shots:
        few_shot(encoded.bank[0], max(options.shots), 0, classes)  # reports too many shots before any training
    found = GridPredictions(kinds, numbers, draws, classes, encoded.samples)
    for shots in numbers:
        for draw in range(draws):
            made = _predictions(job, found, encoded, shots, draw)
            found.made += [(Case(*kinds[number], shots), draw, own) for number, own in made.items()]
        for row in found.rows([each for each in found.made if each[0].shots == shots]):
            case = Case(*(row.pop(name) for name in Case._fields))
            job.print(f"{case.name(found.pools)}: {summary(row)}")
    return _concluded(job, found, (train, val))


def _run_online(
    job: Job[WithGrid], kinds: Sequence[Features], opened: tuple[Corpus, Corpus, Classes]
) -> dict[str, Any]:
    """Train heads on all types of features without storing patch tokens, and return the result."""
    train, val, classes = opened
    found = GridPredictions(kinds, [None], 1, classes, (train.samples, val.samples))
    setting = _setting(job, found, None, 0)
    recipe = attentive_recipe(train.samples, setting)

    def shorter(fraction: float) -> str:
        return f"--set attentive.steps={max(int(recipe.steps * fraction), 1)}"

    whole = job.pace(passes(recipe, train, val), shorter=shorter)
    job.print(
        f"attentive probe at {len(FeatureTypes(kinds).layers)} of {job.model.config.depth} layers, online, "
        f"{_pooled(job.options)}{train.samples:,} training samples, batch {recipe.batch}, {recipe.steps:,} steps, "
        f"learning rates: {', '.join(map(str, recipe.rates))}"
    )
    made = predict_online(job.model, (train, val), kinds, recipe, setting, job.ranks.node(), whole)
    found.samples = train.samples, len(made[0].keys)  # unreadable samples are not classified
    found.made = [(Case(*kinds[number], None), 0, own) for number, own in made.items()]
    return _concluded(job, found, (train, val))


def _pooled(options: WithGrid) -> str:
    """Return a description of the pooled features that --pools selects; "" without --pools."""
    linear = "linear probes of " if PROBES[options.name()].is_attentive else ""
    return f"{linear}{' and '.join(options.pools)} features, " if options.pools else ""


def _concluded(job: Job[WithGrid], found: GridPredictions, corpora: tuple[Corpus, Corpus]) -> dict[str, Any]:
    """Write the predictions, evaluate the baselines, and return the result. `corpora`: the training and the held-out
    samples."""
    rows, columns = found.rows(found.made), found.columns(found.made)
    result = found.result(rows)
    job.keep(columns)
    job.pictures.append(lambda: _draw(job, rows))
    return result | baseline_entries(_baselines(job, found, corpora))


def _baselines(job: Job[WithGrid], found: GridPredictions, corpora: tuple[Corpus, Corpus]) -> dict[str, Baseline]:
    """Return the results of the baselines by name; empty if the task evaluates no baselines. The baselines have the
    same layer, pooling and training samples as the probe of the main accuracies. They use k-NN if the task does, and
    otherwise logistic regression."""
    case, own = found.main_predictions()
    probe = "knn" if job.options.name() == "knn" else "logistic"
    other = "" if probe == job.options.name() else LOGISTIC
    setting = Setting(
        job.config, len(found.classes), job.model.config.num_heads, job.config.run.seed, job.ranks, job.heartbeats
    )
    baselines = {}
    for name, (bank, held_out) in job.encode_baselines(*corpora, layer=case.layer, pool=case.pool).items():
        trials, chosen = [], list[dict[str, float]]()
        own_setting = setting._replace(chose=partial(_append, chosen))
        for draw in range(found.draws):
            samples = bank if case.shots is None else few_shot(bank, case.shots, draw, found.classes)
            trials.append(PROBES[probe].predict({0: samples}, {0: held_out}, own_setting)[0])
        metrics = {metric: value for metric, value in _measured(trials).items() if metric.startswith("top")}
        only = chosen[0] if len(chosen) == 1 else {}
        baselines[name] = Baseline(metrics, accuracy_difference(own, trials), other, only)
    return baselines


def _append(chosen: list[dict[str, float]], _: int, values: dict[str, float]) -> None:
    chosen.append(values)


def _shorter(job: Job[WithGrid], layers: Sequence[int]) -> str:
    """Return a suggestion of options that shorten the task."""
    ways = ["fewer --train shards"]
    if job.options.name() == "attentive" and job.config.attentive.peak_lr is None:
        ways = ["--set attentive.peak_lr=1e-3, so that only one learning rate is tried"]
    if job.options.shots:
        ways.append("fewer --shots")
    if len(layers) > 1:
        ways.append("fewer --layers")
    if len(job.options.pools) > 1:
        ways.append("fewer --pools")
    return " or ".join(ways)


def chosen_layers(wanted: Literal["all"] | Sequence[int] | None, depth: int) -> list[int]:
    """Return the numbers of the selected encoder blocks, in ascending order. `wanted`: "all", or numbers from 1; None:
    only the last block. Raises UserError if a block does not exist."""
    if wanted is None:
        return [depth]
    if wanted == "all":
        return list(range(1, depth + 1))
    if beyond := [layer for layer in wanted if layer > depth]:
        raise UserError(f"layers {beyond[0]}: must be all, or numbers from 1 to {depth}, such as 1,{depth}")
    return [*wanted]


def encode_kinds(job: Job, kinds: Sequence[Features], opened: tuple[Corpus, Corpus, Classes], whole: Pace) -> Encoded:
    """Return the features of all types from one pass over the images.

    Args:
        job: the job.
        kinds: the feature types.
        opened: result of `Job.open_labelled`.
        whole: pace of the task.
    """
    train, val, classes = opened
    types, parts = FeatureTypes(kinds), []
    for corpus, title in ((train, "encoding train"), (val, "encoding val")):
        more: dict[str, Any] = {"layers": types.layers, "pools": types.pools or None, "patches": types.has_tokens}
        found = job.encode(corpus, title, whole, corpus.samples, **more)
        tokens, pooled = (found.tokens() if types.has_tokens else found), found.pooled()
        banks = (tokens if kind.is_tokens else pooled for kind in kinds)
        parts.append({n: bank.part(*types.place(kind)) for n, (kind, bank) in enumerate(zip(kinds, banks))})
    return Encoded(parts[0], parts[1], classes)


def trains_online(job: Job, layers: Sequence[int], corpora: Sequence[Corpus], name: str = "") -> bool:
    """Return whether attentive probes at these layers are trained online, without storing patch tokens. The setting
    `attentive.online` determines this; if it is null, the probes are trained online if the tokens do not fit into
    memory. Print the required memory. Every rank must call this function; the result is the same on all ranks.
    `name`: prefix of the printed line."""
    model, ranks, online = job.model.config, job.ranks, job.config.attentive.online
    samples = sum(corpus.samples for corpus in corpora)
    needed = 2 * samples * len(layers) * model.most_patches * model.emb_dim  # float16
    lacking = missing_in_host_memory(needed / ranks.world, len(ranks.of_node))
    lacking = next(filter(None, ranks.gather(lacking)), "")
    what = f"{name}the patch tokens of {samples:,} samples at {len(layers)} layer{'s' * (len(layers) != 1)}"
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
            raise UserError(f"shots {shots}: the class {classes[number]} has only {len(rows)} training samples")
    return bank.rows(sorted(row for rows in taken.values() for row in rows))


def _predictions(
    job: Job, found: GridPredictions, encoded: Encoded, shots: int | None, draw: int
) -> dict[int, Predictions]:
    """Return the predictions of the probes for the held-out samples, by index of the feature type."""
    bank = encoded.bank
    if shots is not None:
        bank = {number: few_shot(each, shots, draw, encoded.classes) for number, each in bank.items()}
    return PROBES[job.options.name()].predict(bank, encoded.held_out, _setting(job, found, shots, draw))


def _setting(job: Job, found: GridPredictions, shots: int | None, draw: int) -> Setting:
    heads, seed = job.model.config.num_heads, job.config.run.seed

    def warn(number: int, text: str) -> None:
        name = Case(*found.kinds[number], shots).name(found.pools) + (f", draw {draw + 1}" if shots else "")
        found.warnings.append(f"{name}: {text}")

    def chose(number: int, chosen: dict[str, float]) -> None:
        if found.draws == 1:
            found.chosen[Case(*found.kinds[number], shots)] = chosen

    return Setting(job.config, len(found.classes), heads, seed, job.ranks, job.heartbeats, warn, chose)


def _measured(found: Sequence[Predictions]) -> dict[str, Any]:
    """Return the accuracies with their standard errors. For several draws, return the mean top-1 accuracy with its
    standard error and 95 % confidence interval."""
    if len(found) == 1:
        return found[0].accuracies()
    correct_DN = np.stack([predictions.correct_N.numpy() for predictions in found])
    top1, error = mean_accuracy(correct_DN, found[0].clusters_N)
    low, high = interval([predictions.accuracies()["top1"] for predictions in found])
    return {"top1": top1, f"top1{ERROR}": error, "draws": len(found), "low": max(low, 0.0), "high": min(high, 1.0)}


def _draw(job: Job, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the accuracy by layer, with a line for each pooling and number of shots; for a single layer, plot the
    accuracy by number of shots."""
    layers, pools = ({row[name] for row in rows} for name in ("layer", "pool"))
    x, line = ("layer", "shots") if len(layers) > 1 else ("shots", "layer")
    if len({row[x] for row in rows}) == 1:
        return
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        name = f"layer {row[line]}" if line == "layer" else f"{row[line]} shots" if row[line] else "all samples"
        name = f"{row['pool'] or ATTENTION}, {name}" if len(pools) > 1 else name
        points.setdefault(name, []).append((row[x], row["top1"], row[f"top1{ERROR}"]))
    titles = {"layer": ("depth.png", "layer"), "shots": ("shots.png", "number of training samples per class")}
    draw_accuracies(job.out / titles[x][0], points, titles[x][1])
