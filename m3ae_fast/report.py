"""python -m m3ae_fast.report RUN: one self-contained page of a run, report.html, readable without a server.

It holds the curves of the run's metrics, its reconstructions, the results of tasks (every result.json below the run
folder and below `--results`), config and versions.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3ae_fast.errors import UserError, exit_cleanly
from m3ae_fast.regular_file import read_json
from m3ae_fast.run.run_log import read_metrics
from m3ae_fast.whole_file import whole_file

if TYPE_CHECKING:  # torch is imported by what needs it, not by --help
    from m3ae_fast.run import checkpoint

REPORT_FILE = "report.html"
# title, axis, and (metric, label, colour) of each line of a chart
_TRAIN, _HELD_OUT, _OTHER = "#9db4d3", "#1f4e9c", "#b5651d"
CHARTS = [
    ("Loss", "", [("loss", "training", _TRAIN)]),
    ("Image loss", "", [("image_loss", "training", _TRAIN), ("val_image_loss", "held out", _HELD_OUT)]),
    ("Text loss", "", [("text_loss", "training", _TRAIN), ("val_text_loss", "held out", _HELD_OUT)]),
    ("Text accuracy", "", [("text_accuracy", "training", _TRAIN), ("val_text_accuracy", "held out", _HELD_OUT)]),
    ("k-NN accuracy", "", [("val_knn_top1", "held out", _HELD_OUT)]),
    ("Throughput", "samples/s", [("samples_per_s", "", _OTHER)]),
    ("Utilisation", "of the peak", [("mfu", "reference FLOPs", _OTHER), ("utilisation", "executed FLOPs", _HELD_OUT)]),
    ("Waiting for data", "fraction of the time", [("data_wait", "", _OTHER)]),
    ("Learning rate", "", [("lr", "", _OTHER)]),
    ("Gradient norm", "", [("grad_norm", "", _OTHER)]),
    ("Memory", "GB", [("peak_memory_gb", "peak", _OTHER)]),
]
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid #8884; } .faint { color: #888; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.charts img { background: #fff; border-radius: 4px; width: 100%; }
img.wide { background: #fff; max-width: 100%; } pre { overflow-x: auto; }
"""


def write_report(run: Path, out: Path, results: Sequence[Path] = ()) -> None:
    """Write the page of the run folder `run` to `out`.

    Raises:
        UserError: `run` has no metrics, a file is damaged, or `out` cannot be written.
    """
    from m3ae_fast.run import checkpoint

    metrics = read_metrics(run)
    found = read_results([run, *results])
    info = None
    if saved := checkpoint.saved_steps(run):
        info = checkpoint.read_info(saved[-1])
    parts = [f"<h1>{escape(run.resolve().name)}</h1>", _summary(metrics, info)]
    if found:
        parts += ["<h2>Transfer</h2>", _results_table(found)]
    parts += ["<h2>Curves</h2>", f'<div class="charts">{"".join(_charts(metrics))}</div>']
    for name in ("reconstructions.png", "attention.png", "map.png"):
        if png := _png(run / name):
            parts += [f"<h2>{name.removesuffix('.png').capitalize()}</h2>", _image(png, "wide")]
    for path, result in found:
        for picture in sorted(path.parent.glob("*.png")):
            title = f"{result.get('task', '?')} ({path.parent.name}): {picture.stem.replace('_', ' ')}"
            if png := _png(picture):
                parts += [f"<h2>{escape(title)}</h2>", _image(png, "wide")]
    if info:
        config = escape(json.dumps(info.config, indent=2))
        parts += ["<h2>Config</h2>", f"<details><summary>all settings</summary><pre>{config}</pre></details>"]
        parts += ["<h2>Versions</h2>", _table([[escape(k), escape(v)] for k, v in info.versions.items()])]
    name = f"<title>{escape(run.resolve().name)}</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{name}<style>{_STYLE}</style>'
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")


def read_results(folders: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Read every result.json below `folders`. Raises UserError if one is damaged."""
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
                found[path.resolve()] = result
    return list(found.items())


def _summary(metrics: list[dict[str, Any]], info: checkpoint.Info | None) -> str:
    last: dict[str, Any] = {}
    for values in metrics:
        last |= values
    rows = [["steps", f"{last['step']:,}"]]
    if info:
        rows.append(["samples seen", f"{info.samples:,}"])
    shown = ("loss", "val_image_loss", "val_text_loss", "val_text_accuracy", "val_knn_top1", "samples_per_s", "mfu")
    rows += [[name, _number(last[name])] for name in shown if name in last]
    return _table([[escape(name), f'<td class="number">{value}</td>'] for name, value in rows])


def _results_table(found: list[tuple[Path, dict[str, Any]]]) -> str:
    rows = []
    for path, result in found:
        numbers = {k: v for k, v in result.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        shown = ", ".join(f"{escape(k)} {_number(v)}" for k, v in numbers.items())
        rows.append(
            [escape(str(result.get("task", "?"))), shown, f'<span class="faint">{escape(path.parent.name)}</span>']
        )
    return _table(rows, ["task", "result", "folder"])


def _charts(metrics: list[dict[str, Any]]) -> Iterable[str]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report's charts need matplotlib: pip install matplotlib") from None
    for title, unit, lines in CHARTS:
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for name, label, colour in lines:
            points = [(m["step"], m[name]) for m in metrics if _finite(m.get(name))]
            if points:
                marker = "o" if len(points) < 30 and name.startswith("val_") else ""
                axes.plot(*zip(*points), label=label, color=colour, marker=marker, markersize=3, linewidth=1.4)
        if not axes.lines:
            continue
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160)
        yield _image(picture.getvalue(), alt=title)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else escape(str(value))


def _png(path: Path) -> bytes | None:
    """Return a picture of the run; None for anything else, as where a link leads to a private file."""
    data = path.read_bytes() if path.is_file() else b""
    return data if data.startswith(b"\x89PNG\r\n") else None


def _image(png: bytes, kind: str = "", alt: str = "") -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _table(rows: list[list[str]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table>{top}{body}</table>"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m3ae_fast.report",
        description="One self-contained page of a run: curves, reconstructions, results of tasks, config, versions.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help=f"default: RUN/{REPORT_FILE}")
    parser.add_argument(
        "--results", nargs="+", type=Path, default=[], metavar="DIR", help="folders with result.json outside RUN"
    )
    args = parser.parse_args(argv)
    out = args.out or args.run / REPORT_FILE
    write_report(args.run, out, args.results)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
