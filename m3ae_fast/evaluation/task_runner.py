"""Evaluation of a model with one of the tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from m3ae_fast.base.environment import Device
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import keep_freed_memory
from m3ae_fast.config import POOLS, Overrides, Pool, override_list
from m3ae_fast.config.evaluation import EvaluationConfig, Uses, evaluation_config
from m3ae_fast.evaluation.baselines import BASELINES, MODEL, UNTRAINED, WARNINGS, baseline_name, differences
from m3ae_fast.evaluation.class_metrics import class_metrics, draw_class_metrics
from m3ae_fast.evaluation.classifier import CONFIG_FILE, Classifier, read_config
from m3ae_fast.evaluation.image_features import available, open_image_features
from m3ae_fast.evaluation.job import (
    RESULT_FILE,
    Job,
    SharedFeatures,
    refuse_existing,
    show_result,
    summary,
    write_result,
)
from m3ae_fast.evaluation.tasks import PROBE_NAMES, TASKS, Modality, Options, require_for
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.session import Session, joined_program
from m3ae_fast.training.run_lock import RunFolder
from m3ae_fast.weights.model_name import IMAGE_FEATURES, PIXELS
from m3ae_fast.weights.open_model import open_model, set_images, untrained


def evaluate(
    task: str,
    model: str | os.PathLike[str] | Sequence[str],
    *,
    val: str | Sequence[str],
    out: str | os.PathLike[str],
    train: str | Sequence[str] = (),
    labels: str = "cls",
    modality: Modality | None = None,
    resume: str = "no",
    layers: Literal["all"] | str | int | Sequence[int] | None = None,
    pools: str | Sequence[Pool] = (),
    shots: int | Sequence[int] = (),
    probes: str | Sequence[str] = PROBE_NAMES,
    seeds: int = 3,
    baselines: bool = True,
    ood: Mapping[str, str | Sequence[str]] | None = None,
    overrides: Overrides = (),
    device: Device | None = None,
    session: Session | None = None,
    shared: SharedFeatures | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model with a task, and write the result, predictions and figures to a folder.

    Args:
        task: "knn", "logistic", "linear", "attentive", "finetune", "segment", "robustness", "ood"
            or "compare"; see `TASKS`.
        model: name of a model; see `model_name.MODEL_HELP`. For robustness, the folder of a classifier; ood also
            accepts one. For compare, one or several models.
        val: held-out shards: paths, brace patterns, globs, URLs or pipe: commands.
        out: folder for the result, which must not contain a result.
        train: shards of training samples; not used by robustness.
        labels: source of the labels: "cls", or "json." and the name of a field. For knn and logistic without layers,
            pools and shots, the field may contain lists of labels.
        modality: input of the encoder: "image", "text" or "paired"; None: the modality of the classifier or of the
            task, otherwise "image".
        resume: for linear and finetune: "auto", "no" or the path of a checkpoint or run folder.
        layers: for knn, logistic and attentive: "all" or numbers of encoder blocks, from 1; None: the last block.
        pools: for knn and logistic: "all" or poolings; empty: the pooling in encode.pool. For
            attentive: poolings on whose features linear classifiers are trained in the same steps; empty: none.
        shots: for knn, logistic and attentive: numbers of training samples per class; empty: all samples.
        probes: for compare: the probes to use.
        seeds: for compare: number of random seeds of each probe and of random weights.
        baselines: for knn, logistic, linear, attentive, segment and finetune: whether the baselines are
            evaluated too. They are left out in any case if `model` is one of them, or if the encoder sees captions.
        ood: for ood: shards of out-of-distribution samples by the name of their set.
        overrides: overrides of settings (`--set` of the command), which docs/evaluation-config.md lists:
            "section.key=value", a list of such texts, or a dict such as {"knn.k": 10}.
        device: "cpu" or "cuda" (one GPU per rank); None: a GPU if there is one, otherwise the CPU.
        session: session of a program that continues after the evaluation; its device is used. None: this process joins
            the ranks that were started with it.
        shared: for knn and logistic, with `session`: an object that is passed to both, with the same model, samples and
            settings, so that the samples are encoded only once. None: the task encodes them.

    Returns:
        The content of result.json; None if the task was stopped before its end.

    Raises:
        UserError: the model, the shards or an option cannot be used, or `out` contains a result.
    """
    if not isinstance(ood, Mapping | None):
        raise UserError('ood: must be a dict of shards by the name of their set, such as {"other": "other-*.tar"}')
    options = Options(
        task=task,
        models=_names(model, "model"),
        val=_names(val, "val"),
        train=_names(train, "train"),
        labels=labels,
        modality=modality,
        resume=resume,
        layers=layers if layers is None or isinstance(layers, str) else ",".join(map(str, _items(layers))),
        pools=POOLS if pools == "all" else tuple(dict.fromkeys(_items(pools))),
        shots=tuple(sorted({*_items(shots)})),
        probes=tuple(dict.fromkeys(_items(probes))),
        seeds=seeds,
        baselines=baselines,
        ood={name: _names(shards, "ood") for name, shards in (ood or {}).items()},
    )
    given = override_list(overrides)
    if session is not None:
        return _perform(options, Path(out), given, session, shared or SharedFeatures(), is_last=False)
    with joined_program(device) as own:
        return _perform(options, Path(out), given, own, SharedFeatures(), is_last=True)
    return None  # stopped


def _items(given: Any) -> Iterable[Any]:
    """Return the items of an argument for which the command has a comma-separated list: of a sequence, of such a text,
    or a single number."""
    if isinstance(given, str):
        return [item for item in given.split(",") if item]
    return given if isinstance(given, Iterable) else [given]


def _names(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], what: str) -> tuple[str, ...]:
    """Return names as texts. `what`: the name of the argument. Raises UserError if an item is no name."""
    names = (given,) if isinstance(given, str | os.PathLike) or not isinstance(given, Iterable) else tuple(given)
    if odd := next((name for name in names if not isinstance(name, str | os.PathLike)), None):
        raise UserError(
            f"{what}: must be a name or a path, not {type(odd).__name__}"
            + ("; write the model with its method save_pretrained(FOLDER), and pass FOLDER" if what == "model" else "")
        )
    return tuple(os.fspath(name) for name in names)


def _is_classifier(options: Options) -> bool:
    """Return whether the model has to be opened as a classifier."""
    task = TASKS[options.task]
    return task.classifies or (task.may_classify and (Path(options.model) / CONFIG_FILE).is_file())


def _modality(options: Options) -> Modality:
    """Return the modality of the encoder's input. Raises UserError if the option differs from the modality of the
    classifier."""
    given = options.modality
    if not _is_classifier(options):
        return given or TASKS[options.task].modality or "image"
    own = read_config(options.model).modality
    if given not in (None, own):
        raise UserError(f"modality {given}: the classifier {options.model} was trained with {own}; leave it out")
    return own


def _config(options: Options, modality: Modality, out: Path, overrides: Sequence[str]) -> EvaluationConfig:
    task = TASKS[options.task]
    val = [{"shards": list(options.val), "modality": modality}]
    train = [{"shards": list(options.train), "modality": modality}] if task.trains else val
    uses = Uses(("encode", *options.probes)) if task.compares else task.uses
    given: dict[str, Any] = {"run": {"dir": str(out)}, "data": {"train": train, "val": val}}
    return evaluation_config(given, overrides, options.task, uses)


def _require_image_features(options: Options) -> None:
    """Raise UserError if the task does not support features without a network, or one of its options."""
    if not TASKS[options.task].takes_image_features:
        *others, last = (name for name, task in TASKS.items() if task.takes_image_features)
        raise UserError(
            f"{options.model}: {options.task} needs a network; {', '.join(others)} and {last} accept {options.model} "
            f"(a folder of this name is ./{options.model})"
        )
    if options.modality not in (None, "image"):
        raise UserError(f"{options.model}: is computed from images, not from captions; leave out modality")
    if options.layers is not None or options.pools:
        raise UserError(f"{options.model}: has no layers and no poolings; leave out layers and pools")


def _open(
    options: Options, modality: Modality, config: EvaluationConfig, ranks: Ranks
) -> MultimodalEncoder | Classifier | None:
    """Return the model in evaluation mode, on the CPU; None if the task opens models itself."""
    if TASKS[options.task].compares:
        return None
    if options.is_image_features:
        return open_image_features([options.model], config.data, ranks)[options.model]
    model: MultimodalEncoder | Classifier
    if _is_classifier(options):
        model = Classifier.from_pretrained(options.model)
    else:
        text = modality != "image"
        model = open_model(options.model, text=text, tokenizer=config.data.tokenizer, seed=config.run.seed)
    set_images(model.backbone if isinstance(model, Classifier) else model, config.data.image_settings())
    return model.eval()


def _open_baselines(job: Job) -> dict[str, MultimodalEncoder]:
    """Return the baselines of the job's model by display name, in evaluation mode, on the ranks' device. The random
    weights are those of `random:MODEL` with the same `run.seed`. Every rank must call it. A baseline whose library is
    missing is left out with a warning."""
    model, config, ranks = job.model, job.config, job.ranks
    random = untrained(model.config, model.loss_config, config.run.seed).to(ranks.device).eval()
    if TASKS[job.options.task].has_masks:  # the features of patches are needed, and only pixels have some
        grid = model.config.image_size, model.config.patch_size
        found = open_image_features([PIXELS], config.data, ranks, *grid)
    else:
        names, missing = ranks.broadcast(available)
        if missing:
            job.warn(missing)
        found = open_image_features(names, config.data, ranks)
    return {UNTRAINED: random} | {IMAGE_FEATURES[name]: each for name, each in found.items()}


def _perform(
    options: Options, out: Path, overrides: Sequence[str], session: Session, shared: SharedFeatures, *, is_last: bool
) -> dict[str, Any] | None:
    """Run the task, write its result and return it; return None if it was stopped. `shared`: see `evaluate`; `is_last`:
    whether the program ends after this task. Raises UserError if the task cannot be run; `out` then contains no
    result."""
    ranks, task = session.ranks, options.task
    if is_last:
        continues = "continues" if TASKS[task].compares else "starts over"
        session.stop.advice = f"running the same command again {continues}"
    ranks.require_same({**vars(options), "out": str(out), "overrides": list(overrides)})
    ranks.on_main(lambda: require_for(task, options.shards, options.shots))
    if options.is_image_features:
        _require_image_features(options)
        if ranks.is_main and Path(options.model).exists():
            print(f"note: {options.model} is the baseline; the folder of this name is ./{options.model}", flush=True)
    modality = ranks.broadcast(lambda: _modality(options))
    config = ranks.broadcast(lambda: _config(options, modality, out, overrides))
    ranks.on_main(lambda: refuse_existing(config.run.dir))
    started = time.perf_counter()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    model = _open(options, modality, config, ranks)
    model = model and model.to(ranks.device)
    with ranks.on_main(lambda: RunFolder(config.run.dir)) or nullcontext() as folder:
        job = Job(options, modality, config, session, folder, model, shared=shared)
        if options.evaluates_baselines(modality):
            job.open_baselines = partial(_open_baselines, job)
        result: dict[str, Any] | None = import_module(f"m3ae_fast.evaluation.{options.module}").run(job)
        if result is None:
            return None
        result = job.described(result | {"seconds": round(time.perf_counter() - started, 1)})
        metrics = ranks.broadcast(lambda: class_metrics(job.out, job.classes, job.names, result))
        found = [*result.pop(WARNINGS, ()), *metrics.pop(WARNINGS, ())]
        result |= metrics
        if warnings := [*job.warnings, *found]:
            result[WARNINGS] = warnings
        if "per_class" in metrics:  # present only for tasks with one prediction per sample
            job.pictures.insert(0, lambda: draw_class_metrics(job.out, job.classes, job.names))
        ranks.on_main(lambda: write_result(job.out, result))
        if is_last:
            session.stop.advice = f"the result is in {job.out / RESULT_FILE}"
        for draw in job.pictures:
            ranks.on_main(draw)
        ranks.on_main(lambda: show_result(job.out, result))
        job.print(f"{task}: {summary(result)}")
        if "verdict" in result:
            job.print(f"{task}: {result['verdict']}")
        apart = differences(result)
        for name, each in result.get(BASELINES, {}).items():
            words = f"; {apart[name].words(MODEL, name)}" if name in apart else ""
            job.print(f"{task}: {baseline_name(name, each)}: {summary(each)}{words}")
        for text in found:  # those of the job have been printed
            job.print(f"warning: {text}")
        return result
