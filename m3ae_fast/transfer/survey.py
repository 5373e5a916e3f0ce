"""k-NN, linear or attentive probe at several layers, or of few samples of each class, from one pass over the images.

Shapes: N training samples, K layers, S shots, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from m3ae_fast.config import ModelConfig
from m3ae_fast.data import Corpus
from m3ae_fast.data.labels import Classes
from m3ae_fast.encoding import Features, key_digest
from m3ae_fast.errors import UserError
from m3ae_fast.hardware import missing_memory
from m3ae_fast.pictures.figures import draw_accuracies
from m3ae_fast.transfer.job import Job, summary
from m3ae_fast.transfer.predictions import Predictions, stacked
from m3ae_fast.transfer.probe_engine import Setting
from m3ae_fast.transfer.probes import PROBES, Probe
from m3ae_fast.transfer.significance import ERROR, interval, mean_accuracy


class Case(NamedTuple):
    """What is measured once."""

    layer: int
    shots: int | None  # training samples of each class; None: all


@dataclass(frozen=True)
class Encoded:
    """Training and held-out samples, by layer."""

    bank: dict[int, Features]
    held_out: dict[int, Features]
    classes: Classes


def run(job: Job) -> dict[str, Any]:
    """Run the task. Raises UserError if there is no such layer, a class has too few samples, or memory is too small."""
    args, task = job.args, job.args.task
    if getattr(args, "resume", "no") != "no":
        raise UserError("--resume: a probe with --layers or --shots has no checkpoints; leave it out")
    layers = chosen_layers(args.layers, job.model.config.depth)
    encoded = encode_layers(job, PROBES[task], layers)
    if args.shots:
        few_shot(encoded.bank[layers[0]], max(args.shots), 0, encoded.classes)  # too many are told before any probe
    draws = args.draws if args.shots else 1
    cases = [Case(layer, shots) for shots in args.shots or [None] for layer in layers]
    samples = len(encoded.bank[layers[0]].keys)
    job.say(
        f"{task} probe at {len(layers)} of {job.model.config.depth} layers, "
        + (f"{', '.join(map(str, args.shots))} of {samples:,}" if args.shots else f"all {samples:,}")
        + f" training samples{' a class' if args.shots else ''}: {len(cases) * draws} probes"
    )
    rows, table = [], []
    cautions: list[str] = []
    for case in cases:
        found = [_predictions(job, encoded, case, draw, cautions) for draw in range(draws)]
        measured = _measured(found)
        rows.append(case._asdict() | measured)
        table += [(predictions, case._asdict() | {"draw": draw}) for draw, predictions in enumerate(found)]
        job.say(f"{_name(case)}: {summary(measured)}")
    job.keep(stacked(table, encoded.classes))
    for caution in cautions:
        job.say(f"note: {caution}")
    job.pictures.append(lambda: _draw(job, rows))
    last = rows[-1]  # of the last layer, and the most shots
    result = {name: value for name, value in last.items() if name.startswith("top")}
    sizes = {"classes": len(encoded.classes), "train_samples": samples, "draws": draws, "cautions": cautions}
    return result | sizes | {"val_samples": len(encoded.held_out[layers[0]].keys), "results": rows}


def chosen_layers(wanted: str | None, depth: int) -> list[int]:
    """Return numbers of blocks, ascending; None: the last one. Raises UserError if there are no such layers."""
    if wanted is None:
        return [depth]
    if wanted == "all":
        return list(range(1, depth + 1))
    parts = wanted.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= depth for part in parts):
        raise UserError(f"--layers {wanted}: must be all, or numbers from 1 to {depth} with commas, such as 1,{depth}")
    return sorted({int(part) for part in parts})


def encode_layers(job: Job, probe: Probe, layers: Sequence[int]) -> Encoded:
    """Return features, or patch tokens where the probe reads those, after each layer, from one pass over the images."""
    train, val, classes = job.open_labelled()
    if probe.tokens:
        job.say(require_memory(job.model.config, len(layers), [train, val]))
    parts = []
    for corpus, title in ((train, "encoding train"), (val, "encoding val")):
        found = job.encode(corpus, title, layers=layers, patches=probe.tokens)
        found = found.tokens() if probe.tokens else found
        parts.append({number: found.layer(place) for place, number in enumerate(layers)})
    return Encoded(parts[0], parts[1], classes)


def require_memory(model: ModelConfig, layers: int, corpora: Sequence[Corpus]) -> str:
    """Return how much memory the patch tokens take, for the user. Raises UserError where they would not fit."""
    samples = sum(corpus.samples for corpus in corpora)
    needed = 2 * 2 * samples * layers * model.most_patches * model.emb_dim  # of float16, twice while parts are joined
    what = f"the patch tokens of {samples:,} samples at {layers} layer{'s' * (layers != 1)}"
    if lacking := missing_memory(needed, torch.device("cpu")):
        raise UserError(f"{what} do not fit into memory: {lacking}; name fewer samples, or fewer --layers")
    return f"{what} take {needed / 1e9:.3g} GB of memory"


def few_shot(bank: Features, shots: int, draw: int, classes: Classes) -> Features:
    """Return so many samples of each class, in the bank's order, by a hash of the draw and their keys: more shots hold
    the samples of fewer. Raises UserError if a class has too few."""
    labels = bank.labels.tolist()
    order = sorted(range(len(labels)), key=lambda row: key_digest(bank.keys[row], f"{draw}/"))
    taken: dict[int, list[int]] = {number: [] for number in range(len(classes))}
    for row in order:
        if len(taken[labels[row]]) < shots:
            taken[labels[row]].append(row)
    for number, rows in taken.items():
        if len(rows) < shots:
            raise UserError(f"--shots {shots}: the class {classes[number]} has {len(rows)} training samples")
    return bank.rows(sorted(row for rows in taken.values() for row in rows))


def _predictions(job: Job, encoded: Encoded, case: Case, draw: int, cautions: list[str]) -> Predictions:
    bank = encoded.bank[case.layer]
    if case.shots is not None:
        bank = few_shot(bank, case.shots, draw, encoded.classes)
    name = _name(case) + (f", draw {draw + 1}" if case.shots else "")
    heads, seed = job.model.config.num_heads, job.config.run.seed

    def caution(text: str) -> None:
        cautions.append(f"{name}: {text}")

    setting = Setting(job.config, len(encoded.classes), heads, seed, job.ranks, job.pulse, caution)
    return PROBES[job.args.task].predict(bank, encoded.held_out[case.layer], setting)


def _measured(found: Sequence[Predictions]) -> dict[str, Any]:
    """Return accuracies with their errors; of several draws their means, and the 95 % interval of that of top1."""
    if len(found) == 1:
        return found[0].accuracies()
    top1, error = mean_accuracy(np.stack([predictions.correct_N.numpy() for predictions in found]))
    low, high = interval([predictions.accuracies()["top1"] for predictions in found])
    return {"top1": top1, f"top1{ERROR}": error, "draws": len(found), "low": max(low, 0.0), "high": min(high, 1.0)}


def _name(case: Case) -> str:
    return f"layer {case.layer}" + ("" if case.shots is None else f", {case.shots} shots")


def _draw(job: Job, rows: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy by depth, a line for each number of shots; of one layer, accuracy by shots."""
    layers = {row["layer"] for row in rows}
    x, line = ("layer", "shots") if len(layers) > 1 else ("shots", "layer")
    if len({row[x] for row in rows}) == 1:
        return
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        name = "all samples" if row[line] is None else f"{line} {row[line]}"
        points.setdefault(name, []).append((row[x], row["top1"], row[f"top1{ERROR}"]))
    titles = {"layer": ("depth.png", "layer"), "shots": ("shots.png", "training samples of each class")}
    draw_accuracies(job.out / titles[x][0], points, titles[x][1])
