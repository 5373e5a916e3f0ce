"""Comparison of models with each other and with baselines (random weights, and features without a network) by several
probes of frozen features on the same samples, with significance tests.

Shapes: N held-out samples, D trials with different seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.pace import Pace
from m3ae_fast.base.parquet import read_parquet, write_parquet
from m3ae_fast.base.wording import counted
from m3ae_fast.data import Corpus
from m3ae_fast.data.fingerprint import written
from m3ae_fast.data.labels import Classes
from m3ae_fast.drawing.figures import draw_comparison
from m3ae_fast.evaluation.baseline_results import LARGEST, UNTRAINED, warning
from m3ae_fast.evaluation.class_metrics import accuracy_by_class
from m3ae_fast.evaluation.image_features import FixedFeatures, available, input_config, open_image_features
from m3ae_fast.evaluation.job import Encoded, Job, summary
from m3ae_fast.evaluation.library_features import LibraryFeatures, open_library_features
from m3ae_fast.evaluation.model_images import set_images
from m3ae_fast.evaluation.probe_grid import trains_online
from m3ae_fast.evaluation.significance import LEVEL, Difference, difference, mean_accuracy
from m3ae_fast.evaluation.stored_features import SUFFIX, StoredFeatures, open_features
from m3ae_fast.evaluation.task_features import by_type, possible_pools
from m3ae_fast.evaluation.tasks import Compare
from m3ae_fast.heads.attentive_online import passes, predict_online
from m3ae_fast.heads.encoding import PassMonitor, corpus_batches, encode_types
from m3ae_fast.heads.feature_bank import FeatureType
from m3ae_fast.heads.predictions import Predictions, largest_share, stacked
from m3ae_fast.heads.probes import predict
from m3ae_fast.heads.recipe import ATTENTIVE, Recipe
from m3ae_fast.heads.standard_error import ERROR
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.pretrained import weights_digest
from m3ae_fast.weights.model_name import IMAGE_FEATURES, LIBRARIES, RANDOM
from m3ae_fast.weights.open_model import open_model

_BASELINES = (UNTRAINED, *IMAGE_FEATURES.values())
_TOKENS = 196  # number of patches of a ViT for 224 px
_DECODING = 0.1  # approximate cost of reading an image, relative to encoding it with the largest model
TABLE_FILE = "comparison.md"
_TRIALS = "trials"  # sub-folder of the output folder for the predictions of each probe and seed until all are complete


@dataclass
class ComparedPredictions:
    """The predictions of each model and probe, by seed."""

    classes: Classes
    trials: dict[tuple[str, str], dict[int, Predictions]] = field(default_factory=dict)

    def add(self, model: str, probe: str, seed: int, predictions: Predictions) -> None:
        """Add the predictions of a model's probe that was trained with this seed."""
        self.trials.setdefault((model, probe), {})[seed] = predictions

    def correct(self, model: str, probe: str) -> np.ndarray:
        """Return whether each sample was classified correctly in each trial, bool [D, N]."""
        return np.stack([each.correct_N.numpy() for each in self.trials[model, probe].values()])

    def _clusters(self) -> np.ndarray:
        """Return the cluster of each held-out sample, int64 [N]."""
        return next(iter(next(iter(self.trials.values())).values())).clusters_N

    def result(self) -> dict[str, Any]:
        """Return the contents of result.json."""
        rows = [{"model": model, "probe": probe, **self.accuracy(model, probe)} for model, probe in self.trials]
        tests = [
            {"probe": probe, "first": first, "second": second, **test.entries()}
            for probe, first, second, test in self.tests()
        ]
        labels = self._labels().tolist()
        return {"rows": rows, "tests": tests, "chance": largest_share(labels), "val_samples": len(labels)}

    def _labels(self) -> Tensor:
        """Return the class ids of the held-out samples, [N]."""
        return next(iter(next(iter(self.trials.values())).values())).labels_N

    def accuracy(self, model: str, probe: str) -> dict[str, float]:
        """Return the mean accuracy over seeds, its standard error, the balanced accuracy, and the number of trials."""
        correct_DN = self.correct(model, probe)
        top1, error = mean_accuracy(correct_DN, self._clusters())
        by_class = accuracy_by_class(self._labels().numpy(), correct_DN.mean(0))
        balanced = sum(row["accuracy"] for row in by_class) / len(by_class)
        return {"top1": top1, f"top1{ERROR}": error, "balanced_accuracy": balanced, "trials": len(correct_DN)}

    def tests(self) -> Iterator[tuple[str, str, str, Difference]]:
        """Yield (probe, first, second, test) for each probe and each pair of models, and for each model and the
        baseline that always predicts the largest class. `first` comes after `second` in the list of models, which
        begins with this baseline."""
        for probe in dict.fromkeys(probe for _, probe in self.trials):
            models = [LARGEST, *(model for model, own in self.trials if own == probe)]
            for second, first in combinations(models, 2):
                yield (
                    probe,
                    first,
                    second,
                    difference(self._right(first, probe), self._right(second, probe), self._clusters()),
                )

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Yield (probe, warning) for each model that is not significantly better than always predicting the largest
        class, or than another baseline."""
        worse: dict[tuple[str, str], dict[str, float]] = {}
        for probe, first, second, test in self.tests():
            is_baseline = second == LARGEST or (second in _BASELINES and first not in _BASELINES)
            if is_baseline and not test.is_better:
                worse.setdefault((first, probe), {})[second] = float(self._right(second, probe).mean())
        for (model, probe), others in worse.items():
            yield probe, warning("top-1 accuracy", self.accuracy(model, probe)["top1"], others, model)

    def _right(self, model: str, probe: str) -> np.ndarray:
        """Return, for each sample, the fraction of seeds with which it is classified correctly, [N]."""
        if model != LARGEST:
            return self.correct(model, probe).mean(0)
        labels_N = self._labels()
        return (labels_N == labels_N.bincount().argmax()).numpy()

    def columns(self) -> dict[str, list[Any]]:
        """Return all predictions as the columns of a table."""
        parts = (
            (predictions, {"model": model, "probe": probe, "seed": seed})
            for (model, probe), trials in self.trials.items()
            for seed, predictions in trials.items()
        )
        return stacked(parts, self.classes)

    def page(self) -> str:
        """Return the table and the tests as Markdown."""
        models, probes = (list(dict.fromkeys(names)) for names in zip(*self.trials))
        result = self.result()
        lines = [f"| top-1 accuracy, % | {' | '.join(probes)} |", "|---|" + "--:|" * len(probes)]
        for model in models:
            cells = [
                with_error(self.accuracy(model, probe)) if (model, probe) in self.trials else "-" for probe in probes
            ]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines += [
            "",
            f"± is the standard error over {result['val_samples']:,} held-out samples and the seeds; the largest class "
            f"has {100 * result['chance']:.1f} % of the samples.",
            "",
        ]
        for probe, first, second, test in self.tests():
            lines.append(f"- {probe}: {test.words(first, second)}")
        lines += [f"- warning: {probe}: {words}" for probe, words in self.warnings()]
        return "\n".join(
            [
                *lines,
                "",
                f"The tests are not corrected for multiple comparisons: at level {LEVEL:g}, about one in twenty "
                "tests between equally good models reports a difference.",
                "",
            ]
        )


@dataclass(frozen=True)
class ComputeCost:
    """The work that the comparison requires for a model."""

    cost: float  # cost of encoding a sample, proportional to FLOPs
    seeded_weights: bool  # whether the weights depend on the seed
    trials: dict[tuple[int, str], Path]  # files of the predictions, by seed and probe
    missing: list[tuple[int, str]]  # seeds and probes for which the predictions have to be computed

    @property
    def passes(self) -> int:
        """Return the number of passes over the images."""
        seeds = {seed for seed, _ in self.missing}
        return len(seeds) if self.seeded_weights else min(len(seeds), 1)


def with_error(accuracy: Mapping[str, Any]) -> str:
    """Return the top-1 accuracy and its standard error in percent, as text."""
    return f"{100 * accuracy['top1']:.1f} ± {100 * accuracy[f'top1{ERROR}']:.1f}"


def run(job: Job[Compare]) -> dict[str, Any]:
    """Run the task and return its result. Raises UserError if a model cannot be opened, or if the memory is too
    small."""
    options, seeds = job.options, range(job.config.run.seed, job.config.run.seed + job.options.seeds)
    own, missing = job.ranks.broadcast(available)
    if {*options.probes} == {ATTENTIVE}:
        own, missing = [], ""
    names = model_names(options.model, own)
    # report mistakes before any work
    shapes, digests, channels = dict[str, Shape](), dict[str, str](), dict[str, int]()
    others = {name: model for name, model in names.items() if is_features(model)}
    if others and {*options.probes} == {ATTENTIVE}:
        raise UserError(
            f"{next(iter(others.values()))}: has no patch tokens, which attentive probes need; add knn or logistic to "
            "--probes"
        )
    for name, model in names.items():
        if model not in own and name not in others:
            opened = open_model(model, text=False)
            digest = f"{weights_digest(opened.state_dict())} {opened.config.pool}"
            shapes[name], digests[name] = _shape(job, opened), digest
            channels[name] = opened.config.channels
    if missing:
        job.warn(missing)
    train, val, classes = job.open_labelled()
    for name, number in channels.items():
        if name not in _BASELINES:
            job.warn_of_colours(train, number, name)
    features: dict[str, FixedFeatures] = {**open_image_features(own, job.config.data, job.ranks)}
    for name, each in _opened(job, others, (train, val)).items():
        features[names[name]], digests[name] = each, each.digest
    decoding = _DECODING * max([shape.cost for shape in shapes.values()], default=1.0)
    shapes |= {name: _shape(job, features[model], decoding) for name, model in names.items() if model in features}
    found = ComparedPredictions(classes)
    same = _identity(job, (train, val), classes)
    work = {
        name: _work(job, shapes[name], model, f"{same} {digests.get(name, model)}", seeds)
        for name, model in names.items()
    }
    whole = job.pace(
        (train.samples + val.samples) * sum(each.cost * each.passes for each in work.values()),
        shorter=lambda _: _shorter(job),
    )
    job.print(
        f"compare: {', '.join(names)}; probes: {', '.join(options.probes)}; "
        f"{counted(len(seeds), 'seed')}; {len(names)} models encode "
        f"{train.samples + val.samples:,} images each (random weights: once per seed)"
    )
    if complete := sum(len(each.trials) - len(each.missing) for each in work.values()):
        probes = "1 probe was" if complete == 1 else f"{complete} probes were"
        job.print(f"{probes} completed by an earlier call, whose predictions are used")
    for done, (name, model) in enumerate(names.items(), 1):
        _measure(job, found, (work[name], whole), name, features.get(model, model), (train, val))
        job.print(f"{done} of {len(names)} models done{whole.describe_left()}")
    job.keep(found.columns())
    job.ranks.on_main(lambda: rmtree(job.out / _TRIALS))
    page = found.page()
    job.ranks.on_main(lambda: write_text_atomically(job.out / TABLE_FILE, page))
    job.print(page)
    result = found.result()
    job.pictures.append(lambda: draw_comparison(job.out / "comparison.png", result["rows"], result["chance"]))
    return result | {"classes": len(classes), "train_samples": train.samples}


class Shape(NamedTuple):
    """Properties of a model that determine its work."""

    cost: float  # cost of encoding a sample, proportional to FLOPs
    probes: tuple[str, ...]  # probes that can use its features


def _shape(job: Job[Compare], encoder: MultimodalEncoder, decoding: float = 0.0) -> Shape:
    """Return the properties of a model. `decoding`: cost of reading an image, which is counted only for
    `FixedFeatures`."""
    c, probes = encoder.config, tuple(job.options.probes)
    if isinstance(encoder, FixedFeatures):
        if isinstance(encoder, LibraryFeatures):
            # a block has 12 D^2 weights, and the network is assumed to have as many tokens as a ViT
            decoding += encoder.parameters_of_network / 12 * _TOKENS
        pooled = tuple(probe for probe in probes if probe != ATTENTIVE)
        return Shape(decoding, pooled)
    return Shape(float(c.depth * c.emb_dim**2 * c.most_patches), probes)


def _identity(job: Job, corpora: Sequence[Corpus], classes: Classes) -> str:
    """Return a description of everything that determines the predictions besides the model, the probe and the seed: the
    settings, the samples and their labels."""
    config = job.config.model_dump(mode="json", exclude={"run": {"dir"}, "data": {"workers"}})
    shards = [(each.shard, each.summary.size) for part in corpora for source in part.sources for each in source.shards]
    labels = [source.labels.tolist() for part in corpora for source in part.sources if source.labels is not None]
    return json.dumps([config, shards, [written(part) for part in corpora], labels, list(classes)], sort_keys=True)


def _work(job: Job, shape: Shape, model: str, identity: str, seeds: Sequence[int]) -> ComputeCost:
    """Return the work that a model requires. Predictions that an interrupted call has computed are not computed again.
    `identity`: the description that `_identity` returns, followed by text that identifies the model's
    weights."""
    seeded, trials = model.startswith(RANDOM), dict[tuple[int, str], Path]()
    for number, seed in enumerate(seeds):
        for probe in shape.probes:
            if number == 0 or seeded or probe == ATTENTIVE:
                digest = hashlib.sha256(f"{identity} {seeded} {probe} {seed}".encode()).hexdigest()
                trials[seed, probe] = job.out / _TRIALS / f"{digest[:32]}.parquet"
    missing = job.ranks.broadcast(lambda: [trial for trial, path in trials.items() if not path.exists()])
    return ComputeCost(shape.cost, seeded, trials, missing)


def _shorter(job: Job[Compare]) -> str:
    """Return a suggestion of options that shorten the comparison."""
    probes, seeds = job.options.probes, job.options.seeds
    ways = []
    if "attentive" in probes and len(probes) > 1:
        others = ",".join(probe for probe in probes if probe != "attentive")
        ways.append(f"--probes {others}")
    if seeds > 1:
        ways.append("--seeds 1")
    return " or ".join([*ways, "fewer --train shards"])


def model_names(models: Sequence[str], image_features: Sequence[str]) -> dict[str, str]:
    """Return the compared models by display name. The first ones are the baselines: the network of the first M3AE with
    random weights, if there is an M3AE, and `image_features`. Raises UserError if a model is given twice, or if one of
    IMAGE_FEATURES is given."""
    if len({*models}) < len(models):
        raise UserError("MODEL: the same model is given twice; specify each model only once")
    if given := [model for model in models if model in IMAGE_FEATURES]:
        raise UserError(f"{given[0]}: compare always includes this baseline; leave it out")
    short = [model if model.startswith(LIBRARIES) else Path(model).name for model in models]
    first = next((model.removeprefix(RANDOM) for model in models if not is_features(model)), None)
    baselines = ({} if first is None else {UNTRAINED: f"{RANDOM}{first}"}) | {
        IMAGE_FEATURES[name]: name for name in image_features
    }
    unique = len({*short, *baselines}) == len(models) + len(baselines)
    return baselines | dict(zip(short if unique else models, models))


def _opened(
    job: Job, others: Mapping[str, str], corpora: tuple[Corpus, Corpus]
) -> dict[str, StoredFeatures | LibraryFeatures]:
    """Return the features of other programs by display name. `others`: their names on the command line by display name;
    each is an .npz file, or a model of timm or transformers. Every rank must call this function. Raises UserError as
    `open_features` and `open_library_features` do."""
    if not others:
        return {}
    reading, allowed = job.ranks.broadcast(lambda: input_config(job.config.data)), job.config.data.max_bad_fraction
    return {
        name: job.ranks.main_first(partial(open_library_features, model, reading))
        if model.startswith(LIBRARIES)
        else job.ranks.together(partial(open_features, model, reading, corpora, allowed))
        for name, model in others.items()
    }


def is_features(model: str) -> bool:
    """Return whether the name of a model denotes features of another program: an .npz file, or a model of timm or
    transformers."""
    return model.startswith(LIBRARIES) or model.endswith(SUFFIX)


def _measure(
    job: Job,
    found: ComparedPredictions,
    planned: tuple[ComputeCost, Pace],
    name: str,
    model: str | FixedFeatures,
    corpora: tuple[Corpus, Corpus],
) -> None:
    """Encode the samples with a model, and add the predictions of each probe and seed to `found`. If the weights depend
    on the seed, the samples are encoded once per seed. Complete predictions are read from their files.

    The probes of different seeds are not trained in one pass, because a seed determines the order of the samples as
    well as the initial weights. With the same order for all seeds, the standard error over seeds would be too small.
    """
    work, whole = planned
    encoded = Encoded({}, {})
    encoded_with: int | None = None  # seed of the weights with which the samples were last encoded
    for (seed, probe), path in work.trials.items():
        if (seed, probe) not in work.missing:
            columns = job.ranks.broadcast(partial(read_parquet, path))
            found.add(name, probe, seed, Predictions.read(columns, found.classes))
            continue
        if encoded_with is None or (work.seeded_weights and seed != encoded_with):
            opened = open_model(model, text=False, seed=seed) if isinstance(model, str) else model
            encoded, encoded_with = _encoded(job, opened, name, corpora, planned), seed
        about = f"{name}, {probe}, seed {seed}"
        tokens, banks = FeatureType(opened.config.depth, None), encoded.train
        kind = tokens if probe == ATTENTIVE else next(kind for kind in banks if not kind.is_tokens)
        samples = len(banks[kind].keys) if kind in banks else corpora[0].samples
        more: dict[str, Any] = {"classes": len(found.classes), "encoder_heads": opened.config.num_heads, "seed": seed}
        recipe = Recipe.of(probe, job.config, samples=samples, **more)
        if kind in banks:
            parts = {kind: banks[kind]}, {kind: encoded.val[kind]}
            predictions = predict(*parts, recipe, job.ranks, job.heartbeats, encoded.tried)[kind]
        else:
            left = Pace(passes(recipe, *corpora))
            where = job.config, job.ranks, job.heartbeats
            predictions = predict_online(opened, corpora, [kind], recipe, *where, left)[kind]
        for text in predictions.warnings:
            job.print(f"note: {about}: {text}")
        found.add(name, probe, seed, predictions)
        job.ranks.on_main(partial(write_parquet, path, predictions.columns(found.classes)))
        job.print(f"{about}: {summary(predictions.accuracies())}{whole.describe_left()}")


def _encoded(
    job: Job, model: MultimodalEncoder, name: str, corpora: tuple[Corpus, Corpus], planned: tuple[ComputeCost, Pace]
) -> Encoded:
    """Move a model to the ranks' device, encode the samples with it in one pass, and return the features that the
    missing probes read. The pooled features have one pooling; see `possible_pools`. Patch tokens are left out if their
    probe will be trained online."""
    work, left = planned
    if not isinstance(model, FixedFeatures):
        set_images(model, job.config.model)
    own = replace(job, model=model.to(job.ranks.device).eval())
    depth, probes = model.config.depth, {probe for _, probe in work.missing}
    types = [FeatureType(depth, pool) for pool in possible_pools(own)] if probes != {ATTENTIVE} else []
    if ATTENTIVE in probes and not trains_online(own, [depth], corpora, f"{name}: "):
        types.append(FeatureType(depth, None))
    if not types:
        return Encoded({}, {})
    banks = []
    for corpus, title in zip(corpora, ("train", "val")):
        monitor = PassMonitor(f"{name}: {title}", job.heartbeats, whole=left, part=work.cost * corpus.samples)
        batches = corpus_batches(model, corpus, job.config.data, own.encode_config, job.ranks)
        banks += encode_types([model], [types], batches, own.encode_config, job.ranks, monitor, folder=job.out)
    if isinstance(model, StoredFeatures):
        model.check_complete(job.ranks)
    found = by_type(own, model, banks)
    if len(found.train) < len(types):
        pool = next(kind.pool for kind in found.train if kind.pool)
        job.print(f"{name}: {pool} features, chosen on held-out training samples")
    return found
