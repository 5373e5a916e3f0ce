"""One self-contained HTML page of a run: verdict, diagnostics, results, curves, figures, config and versions."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import read_metrics
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.drawing.curves import LEARNING, RUNNING, Chart, draw_charts
from m3ae_fast.drawing.reconstructions import GIVEN_AWAY
from m3ae_fast.evaluation.baseline_results import (
    BASELINES,
    UNTRAINED,
    WARNINGS,
    WITH_HOG,
    baseline_models,
    baseline_name,
    differences,
    is_baseline,
)
from m3ae_fast.evaluation.compare_results import verdicts
from m3ae_fast.heads.standard_error import ERROR, standard_error
from m3ae_fast.training.diagnostics import Diagnostic, Metrics, diagnose, verdict
from m3ae_fast.training.run_state import status
from m3ae_fast.weights.model_name import HOG, IMAGE_FEATURES, RANDOM

REPORT_FILE = "report.html"
_SIZES = ("k", "inverse_strength", "classes", "steps", "draws", "seconds", "skipped", "train_samples", "val_samples")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin-top: 1.6rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid #8884; } .faint { color: #888; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
.charts img { background: #fff; border-radius: 4px; width: 100%; }
img.wide { background: #fff; max-width: 100%; } pre { overflow-x: auto; }
"""


def write_report(run: Path, out: Path, results: Sequence[Path] = (), others: Sequence[Path] = ()) -> None:
    """Write a report of a run as an HTML page.

    Args:
        run: the run folder.
        out: the HTML file to write.
        results: folders with further results of evaluations.
        others: folders of other runs, whose curves and results are shown for comparison.

    Raises:
        UserError: a folder does not exist, a run has no metrics, a file is damaged, or `out` cannot be written.
    """
    runs = {str(folder): read_metrics(folder) for folder in (run, *others)}
    found = read_results([run, *others, *results])
    saved = checkpoint.saved_steps(run)
    info = checkpoint.read_info(saved[-1]) if saved else None
    name = escape(run.resolve().name)
    parts = [f"<h1>{name}</h1>", *(_head(Path(folder), metrics, len(runs) > 1) for folder, metrics in runs.items())]
    if found:
        parts += [_results_table(found), *_verdicts(found), *_per_class(found)]
    parts.append(_numbers(runs[str(run)], info))
    parts.append(_section("Curves", _charts(LEARNING, runs), is_open=True))
    for kind in ("reconstructions", "attention"):
        if png := _png(run / f"{kind}.png"):
            parts.append(_section(kind.capitalize(), _about(kind, info) + _image(png, "wide"), is_open=True))
    for path, result in found:
        for picture in sorted(path.parent.glob("*.png")):
            title = f"{result.get('task', '?')} ({path.parent.name}): {picture.stem.replace('_', ' ')}"
            if png := _png(picture):
                parts.append(_section(title, _image(png, "wide")))
    parts.append(_section("Speed and optimiser", _charts(RUNNING, runs)))
    if info:
        parts.append(_section("Config", f"<pre>{escape(json.dumps(info.config, indent=2))}</pre>"))
        parts.append(_section("Versions", _table([[escape(k), escape(v)] for k, v in info.versions.items()])))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n'
    write_text_atomically(out, page + "</html>\n")


def read_results(folders: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return all results below `folders`, each with the path of its result.json. Raises UserError if a folder does not
    exist or a file is damaged."""
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in sorted(folder.rglob("result.json")):
            try:
                result = read_json(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: is damaged ({error}); remove it") from None
            if isinstance(result, dict):
                _check(path, result)
                found[path.resolve()] = result
    return list(found.items())


def _check(path: Path, result: dict[str, Any]) -> None:
    """Raise UserError if entries of a result have other types than those that tasks write, for example because the file
    was edited."""
    own = [(path, result)]
    try:
        _results_table(own), [*_per_class(own)], [each.words("", "") for each in differences(result).values()]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}); remove it") from None


def summary(run: Path, metrics: Metrics) -> tuple[str, list[Diagnostic]]:
    """Return the state and the results of a run in words, and the diagnostics. Raises UserError if a checkpoint is
    damaged."""
    try:
        state = status(run)[1]
    except UserError:  # there is no checkpoint yet, or the folder contains only a copy of the run's log
        state = f"step {metrics[-1]['step']:,}"
    saved = checkpoint.saved_steps(run)
    unusual = diagnose(metrics, checkpoint.read_info(saved[-1]).config if saved else None)
    return _sentence(state, verdict(metrics)), unusual


def _head(run: Path, metrics: Metrics, named: bool) -> str:
    """Return the HTML of a run's summary. `named`: whether to show the name of the run."""
    words, unusual = summary(run, metrics)
    lines = [f"<p>{escape(f'{run}: {words}' if named else words)}</p>"]
    for diagnostic in unusual:
        lines.append(
            f"<p><b>{diagnostic.name}</b>: {escape(diagnostic.what)}. To try: {escape(diagnostic.suggestion)}.</p>"
        )
    if not unusual:
        lines.append('<p class="faint">Nothing unusual.</p>')
    return "\n".join(lines)


def _sentence(*parts: str) -> str:
    text = ". ".join(part[:1].upper() + part[1:] for part in parts if part)
    return f"{text}."


def _numbers(metrics: Metrics, info: checkpoint.Info | None) -> str:
    last: dict[str, Any] = dict(item for values in metrics for item in values.items())
    rows = [["steps", f"{last['step']:,}"]]
    if info:
        rows.append(["samples seen", f"{info.samples:,}"])
    losses = ("loss", "val_image_loss", "val_text_loss", "val_text_accuracy")
    shown = (*losses, "val_knn_top1", "val_knn_largest_class", "samples_per_s", "mfu")
    rows += [[name, _number(last[name])] for name in shown if name in last]
    return _section("Latest values", _table([[escape(name), _cell(value)] for name, value in rows]))


def _results_table(found: list[tuple[Path, dict[str, Any]]]) -> str:
    rows = []
    for path, result in found:
        model = _model(path, result)
        baselines = result.get(BASELINES, {})
        of_models = {model: result} | {
            f"{baseline_name(name, each)} of {model}": each for name, each in baselines.items()
        }
        if WITH_HOG in result:
            of_models[f"{model} with {IMAGE_FEATURES[HOG]}"] = result[WITH_HOG]
        for whose, metrics in of_models.items():
            for name, value in metrics.items():
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if is_number and name not in _SIZES and not (name.startswith("chance") or name.endswith(ERROR)):
                    texts = (str(result.get("task", "?")), whose, name)
                    cells = (_with_error(name, value, metrics), _chance(name, result))
                    rows.append([*map(escape, texts), *map(_cell, cells)])
    return _table(rows, ["task", "model", "metric", "value", "chance level"])


def _model(path: Path, result: dict[str, Any]) -> str:
    """Return the name of a result's model for display."""
    model = str(result.get("model", path.parent.name))
    if model.startswith(RANDOM):
        return f"{UNTRAINED} of {model.removeprefix(RANDOM)}"
    return IMAGE_FEATURES.get(model, model)


def _verdicts(found: list[tuple[Path, dict[str, Any]]]) -> Iterator[str]:
    """Yield HTML paragraphs for each result with a verdict or a warning. They state whether the result differs
    significantly from the baselines of the same task and from always predicting the largest class, and contain the
    warnings."""
    for path, result in found:
        task, model = result.get("task"), str(result.get("model"))
        if not {"verdict", WARNINGS, BASELINES} & result.keys() or is_baseline(model):
            continue
        others = {
            words: other.parent
            for words, baseline in baseline_models(model).items()
            for other, its in found
            if "verdict" in its and (its.get("task"), its.get("model")) == (task, baseline)
        }
        if sentences := verdicts(path.parent, result, model, others):
            yield f"<p>{'<br>'.join(escape(f'{task}: {words}.') for words in sentences)}</p>"
        for warning in result.get(WARNINGS, ()):
            yield f"<p><b>warning</b>: {escape(f'{task} of {model}: {warning}.')}</p>"


def _per_class(found: list[tuple[Path, dict[str, Any]]]) -> Iterator[str]:
    """Yield a collapsed table for each result with metrics of each class. The class with the lowest metric is first."""
    for path, result in found:
        if not isinstance(rows := result.get("per_class"), list) or not rows:
            continue
        measure = next(
            (name for name in ("accuracy", "iou", "average_precision") if all(name in row for row in rows)), None
        )
        if measure is None:
            continue
        counted = "samples" if "samples" in rows[0] else "pixels"
        cells = [
            [escape(str(row.get("name", row["class"]))), _cell(f"{row[counted]:,}"), _cell(f"{row[measure]:.1%}")]
            for row in sorted(rows, key=lambda row: row[measure])
        ]
        title = f"{result.get('task', '?')} ({path.parent.name}): {measure} of each class"
        yield _section(escape(title), _table(cells, ["class", counted, measure]))


def _with_error(name: str, value: float, result: dict[str, Any]) -> str:
    """Return a metric as text, with its standard error if this is known. If the recorded error of a top-1 or top-5
    accuracy is 0, it is replaced by an estimate from the number of samples."""
    error, samples = result.get(f"{name}{ERROR}"), result.get("val_samples")
    if error == 0 and name.startswith("top") and isinstance(samples, int) and samples > 0 and 0 <= value <= 1:
        error = standard_error(value, samples)
    return f"{value:.1%} ± {error:.1%}" if error else _number(value)


def _chance(name: str, result: dict[str, Any]) -> str:
    """Return the chance level of a metric as text: its value for random scores, or for always predicting the largest
    class (or the five largest classes); "" if it is unknown."""
    value = result.get({"top1": "chance"}.get(name, f"chance_{name}"))
    if name == "auroc":
        value = 0.5
    elif name == "balanced_accuracy" and result.get("per_class"):
        value = 1 / len(result["per_class"])
    return f"{value:.1%}" if isinstance(value, float) else ""


def _charts(charts: Sequence[Chart], runs: Mapping[str, Metrics]) -> str:
    drawn = "".join(_image(png, alt=title) for title, png in draw_charts(charts, runs))
    return f'<div class="charts">{drawn}</div>'


def _about(kind: str, info: checkpoint.Info | None) -> str:
    """Return an HTML paragraph that explains a figure of the run; "" if the figure needs no explanation."""
    given_away = info is not None and (info.config.get("loss") or {}).get("norm_pix")
    return f"<p>{escape(' '.join(GIVEN_AWAY))}</p>" if kind == "reconstructions" and given_away else ""


def _section(title: str, content: str, is_open: bool = False) -> str:
    """Return a collapsible section of the page."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else escape(str(value))


def _png(path: Path) -> bytes | None:
    """Return the content of a PNG file; None if the file is missing or does not begin like a PNG, so that a link cannot
    bring another file, such as a private key, into the page."""
    data = path.read_bytes() if path.is_file() else b""
    return data if data.startswith(b"\x89PNG\r\n") else None


def _image(png: bytes, kind: str = "", alt: str = "") -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _cell(number: str) -> str:
    return f'<td class="number">{number}</td>'


def _table(rows: list[list[str]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table>{top}{body}</table>"
