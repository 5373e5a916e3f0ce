"""Evaluation of a model with one of the tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard, overload

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import keep_freed_memory
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config import engine_libraries
from m3ae_fast.config.evaluation import EvaluationConfig, evaluation_config
from m3ae_fast.evaluation.baseline_results import (
    BASELINES,
    MODEL,
    TOGETHER,
    UNTRAINED,
    WARNINGS,
    WITH_HOG,
    baseline_name,
    differences,
)
from m3ae_fast.evaluation.class_metrics import class_metrics, draw_class_metrics
from m3ae_fast.evaluation.image_features import available, input_config, open_image_features
from m3ae_fast.evaluation.job import (
    RESULT_FILE,
    Job,
    SharedFeatures,
    refuse_existing,
    show_result,
    summary,
    write_result,
)
from m3ae_fast.evaluation.library_features import open_fixed_features
from m3ae_fast.evaluation.model_images import set_images
from m3ae_fast.evaluation.tasks import (
    Compare,
    Modality,
    OneModel,
    Ood,
    Robustness,
    Segment,
    Task,
    WithBaselines,
    WithModality,
    WithResume,
    WithTraining,
    named_task,
)
from m3ae_fast.heads.classifier import CONFIG_FILE, OF_LISTS, Classifier, read_config
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.how_to_resume import AGAIN, effect_of_resuming, resumed_by
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.session import Session, joined_program
from m3ae_fast.training.run_lock import RunFolder
from m3ae_fast.weights.model_name import IMAGE_FEATURES, PIXELS
from m3ae_fast.weights.open_model import open_model, untrained


@overload
def evaluate(
    task: Task, *, session: Session | None = None, shared: SharedFeatures | None = None
) -> dict[str, Any] | None: ...


@overload
def evaluate(
    task: str,
    model: str | os.PathLike[str] | Sequence[str],
    *,
    session: Session | None = None,
    shared: SharedFeatures | None = None,
    **options: Any,
) -> dict[str, Any] | None: ...


def evaluate(
    task: str | Task,
    model: Any = None,
    *,
    session: Session | None = None,
    shared: SharedFeatures | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Evaluate a model with a task, and write the result, predictions and figures to a folder.

    Args:
        task: the name of a task, such as "knn". In place of a name and options, a task with its options may be passed:
            `evaluate(Knn(model=..., train=..., val=..., out=...))`. The classes of the tasks, whose fields are the
            options, are in `m3ae_fast.evaluation.tasks`.
        model: name of the model; for compare, one or several names.
        session: session of a program that continues after the evaluation; its device is used. None: this process joins
            the ranks that were started with it.
        shared: features that knn and logistic share: pass the same object to both, with the same `session`, model,
            samples and settings, so that the samples are encoded only once. None: the task encodes them.
        options: the options of the task, as on the command line: `train`, `val`, `out`, ...

    Returns:
        The content of result.json; None if the task was stopped before its end.

    Raises:
        UserError: the model, the shards or an option cannot be used, or `out` contains a result.
    """
    given = options if model is None else options | {"model": model}
    if isinstance(task, Task) and given:
        raise UserError(f"{next(iter(given))}: pass it to {type(task).__name__}(...), not to evaluate")
    chosen = task if isinstance(task, Task) else named_task(task, **given)
    if session is not None:
        return _perform(chosen, session, shared or SharedFeatures(), is_last=False)
    with _resumed(chosen), joined_program(chosen.device) as own:
        return _perform(chosen, own, SharedFeatures(), is_last=True)
    return None  # stopped


def _resumed(task: Task) -> AbstractContextManager[None]:
    """Return a context in which messages state what happens if a task that has ended early is started again."""
    if isinstance(task, WithResume):
        return nullcontext()
    return resumed_by(AGAIN, "continues" if isinstance(task, Compare) else "starts over")


def _is_classifier(options: Task) -> TypeGuard[OneModel]:
    """Return whether the model has to be opened as a classifier."""
    return isinstance(options, Robustness) or (
        isinstance(options, Ood) and (Path(options.model) / CONFIG_FILE).is_file()
    )


def _modality(options: Task) -> Modality:
    """Return the modality of the encoder's input. Raises UserError if the option differs from the modality of the
    classifier, or if the classifier was trained on lists of labels."""
    given = options.modality if isinstance(options, WithModality) else None
    if not _is_classifier(options):
        return given or "image"
    classifier = read_config(options.model)
    if classifier.head == OF_LISTS:
        raise UserError(
            f"{options.model}: the classifier was trained on lists of labels, but {options.name()} needs one that was "
            "trained on single labels"
        )
    own = classifier.modality
    if given not in (None, own):
        raise UserError(f"modality {given}: the classifier {options.model} was trained with {own}; leave it out")
    return own


def _config(options: Task, modality: Modality) -> EvaluationConfig:
    val = [{"shards": list(options.val), "modality": modality}]
    train = [{"shards": list(options.train), "modality": modality}] if isinstance(options, WithTraining) else val
    given: dict[str, Any] = {"run": {"dir": str(options.out)}, "data": {"train": train, "val": val}}
    return evaluation_config(given, options.all_overrides, options.name(), options.uses_now)


def _open(
    options: Task, modality: Modality, config: EvaluationConfig, ranks: Ranks
) -> MultimodalEncoder | Classifier | None:
    """Return the model in evaluation mode, on the CPU; None if the task opens models itself."""
    if not isinstance(options, OneModel):
        return None
    if options.is_image_features:
        reading = ranks.broadcast(lambda: input_config(config.data))
        return ranks.main_first(lambda: open_fixed_features(options.model, reading))
    model: MultimodalEncoder | Classifier
    if _is_classifier(options):
        model = Classifier.from_pretrained(options.model)
    else:
        text = modality != "image"
        model = open_model(options.model, text=text, tokenizer=config.data.tokenizer, seed=config.run.seed)
    set_images(model.backbone if isinstance(model, Classifier) else model, config.model)
    return model.eval()


def _open_baselines(job: Job) -> dict[str, MultimodalEncoder]:
    """Return the baselines of the job's model by display name, in evaluation mode, on the ranks' device. The random
    weights are those of `random:MODEL` with the same `run.seed`. A baseline whose library is missing is left out with a
    warning. Every rank must call this function."""
    model, config, ranks = job.model, job.config, job.ranks
    random = untrained(model.config, model.loss_config, config.run.seed).to(ranks.device).eval()
    if isinstance(job.options, Segment):  # PIXELS are the only features without a network that describe patches
        grid = model.config.image_size, model.config.patch_size
        found = open_image_features([PIXELS], config.data, ranks, *grid)
    else:
        names, missing = ranks.broadcast(available)
        if missing:
            job.warn(missing)
        found = open_image_features(names, config.data, ranks)
    return {UNTRAINED: random} | {IMAGE_FEATURES[name]: each for name, each in found.items()}


def _perform(options: Task, session: Session, shared: SharedFeatures, *, is_last: bool) -> dict[str, Any] | None:
    """Run the task, write its result and return it; return None if it was stopped. `shared`: see `evaluate`; `is_last`:
    whether the program ends after this task. Raises UserError if the task cannot be run (`out` then contains no
    result), or if figures cannot be written."""
    ranks, task = session.ranks, options.name()
    if is_last:
        session.stop.advice = f"{AGAIN} starts over" if isinstance(options, WithResume) else effect_of_resuming()
    ranks.require_same(dict(options))
    ranks.on_main(options.require)
    one_model = options if isinstance(options, OneModel) else None
    if one_model and one_model.is_image_features and ranks.is_main and Path(one_model.model).exists():
        print(f"note: {one_model.model} is the baseline; the folder of this name is ./{one_model.model}", flush=True)
    modality = ranks.broadcast(lambda: _modality(options))
    config = ranks.broadcast(lambda: _config(options, modality))
    ranks.on_main(lambda: require_libraries(engine_libraries(config, ranks.world)))
    ranks.on_main(lambda: refuse_existing(config.run.dir))
    started = time.perf_counter()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    model = _open(options, modality, config, ranks)
    model = model and model.to(ranks.device)
    with ranks.on_main(lambda: RunFolder(config.run.dir)) or nullcontext() as folder:
        job = Job(options, modality, config, session, folder, model, shared=shared)
        if isinstance(options, WithBaselines) and options.evaluates_baselines(modality):
            job.open_baselines = partial(_open_baselines, job)
        result: dict[str, Any] | None = import_module(f"m3ae_fast.evaluation.{task}").run(job)
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
        job.print(f"{task}: {summary(result)}")
        if "verdict" in result:
            job.print(f"{task}: {result['verdict']}")
        apart = differences(result)
        for name, each in result.get(BASELINES, {}).items():
            words = f"; {apart[name].words(MODEL, name)}" if name in apart else ""
            job.print(f"{task}: {baseline_name(name, each)}: {summary(each)}{words}")
        if together := result.get(WITH_HOG):
            job.print(f"{task}: {'; '.join([f'{TOGETHER}: {summary(together)}', *together['verdicts']])}")
        for text in found:  # the warnings of the job have already been printed
            job.print(f"warning: {text}")
        ranks.on_main(lambda: _draw(job, result))
        return result


def _draw(job: Job, result: dict[str, Any]) -> None:
    """Write the figures of the job, and TensorBoard's event files. Raises UserError if a file cannot be written; the
    result is complete without these files."""
    try:
        for draw in job.pictures:
            draw()
        show_result(job.out, result)
    except (OSError, UserError) as error:
        complete = f"{job.out / RESULT_FILE} is complete; only figures are missing"
        raise UserError(f"{error}; {complete}") from None
