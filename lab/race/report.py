"""Results of the experiment as tables and a plot: the factor by which an arm reduces the cost of reaching the
baseline's accuracy.

Shapes: R bootstrap replicates, N tested samples.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.table import END, START, rewrite
from lab.markdown import table
from lab.race.plan import ARMS, BASELINE, FAST, PIXELS, RANDOM_WEIGHTS, USUAL
from lab.race.run import TESTS
from lab.study.measure import Labels
from lab.trials import machine
from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.errors import UserError

JSON, PLOT, PAGE, ANSWERS = "race.json", "race.png", "README.md", "answers.json.xz"
DATA = {"clothes": "Fashion-MNIST", "emoji": "emoji"}  # names in tables and plots
BASELINES = (BASELINE, USUAL)  # at each cost, the better of the two baselines counts
COSTS = {"flops": "FLOPs", "seconds": "seconds", "samples": "samples"}
SELECTING = ("lengths", "target", "tried")  # sections of settings.json that only determine which trials are run
REPLICATES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
LEGEND = {  # other arms keep their names
    BASELINE: "baseline, tuned at 300 steps",
    FAST: "fast recipe: cross-attention, a third predicted, Muon",
}
# colours of the arms without a fixed colour; red and grey are left out
COLOURS = [plt.get_cmap("tab20")(number) for number in range(20) if number not in (6, 14, 15)]
COLOURS += [plt.get_cmap("tab20b")(number) for number in (0, 4, 8)]
AXES = {"flops": (1e12, "executed TFLOP"), "seconds": (1, "CPU seconds of training")}  # divisor and label
Row = dict[str, Any]


class Factor(NamedTuple):
    """The ratio of the baseline's cost to an arm's cost at equal accuracy, and its 95 % interval."""

    mean: float  # geometric mean over seeds
    low: float
    high: float
    seeds: int
    # ">" or "<" if the accuracy for any seed is above or below all accuracies of the baseline; otherwise ""
    beyond: str


def interpolated(accuracy: float, costs: Sequence[float], accuracies: Sequence[float]) -> tuple[float, str]:
    """Return the logarithm of the cost at which an accuracy is reached, interpolated linearly between runs of different
    lengths, and an empty string. If all runs are less accurate, return the logarithm of the cost of the longest run,
    and ">". If all runs are more accurate, return the logarithm of the cost of the shortest run, and "<". `costs` must
    be ascending. If a run is less accurate than a cheaper run, the accuracy of the cheaper run is used."""
    reached = np.maximum.accumulate(accuracies)
    beyond = ">" if accuracy > reached[-1] else "<" if accuracy < reached[0] else ""
    return float(np.interp(accuracy, reached, np.log(costs))), beyond


class Weights:
    """Bootstrap weights of the tested samples, which are the same for all runs. In row 0, all weights are 1."""

    def __init__(self, labels: Labels) -> None:
        units = sorted({each["emoji"] for each in labels.values()})
        self._place = {unit: place for place, unit in enumerate(units)}
        self._labels = labels
        rng = np.random.default_rng(0)
        self._drawn = rng.poisson(1.0, (REPLICATES + 1, len(units))).astype(np.float32)
        self._drawn[0] = 1
        # weights of the samples of each test by the samples' keys, for reuse: most runs have the same test samples
        self._of_test: dict[tuple[str, ...], np.ndarray] = {}
        self._known: dict[int, tuple[dict[str, float], np.ndarray]] = {}  # results of `accuracies`, for reuse

    def accuracies(self, correct: dict[str, float]) -> np.ndarray:
        """Return the accuracy of each replicate, [R + 1]. Images that belong together count as one sample."""
        if id(correct) in self._known:
            return self._known[id(correct)][1]
        if (keys := tuple(correct)) not in self._of_test:
            self._of_test[keys] = self._drawn[:, [self._place[self._labels[key]["emoji"]] for key in keys]]
        weights_RN = self._of_test[keys]
        found_R = weights_RN @ np.array([*correct.values()], np.float32) / np.maximum(weights_RN.sum(1), 1)
        self._known[id(correct)] = correct, found_R  # a reference to the dictionary keeps its id valid
        return found_R


def factor(arm: Sequence[Row], ladder: Sequence[Row], test: str, cost: str, weights: Weights) -> Factor | None:
    """Return the factor of an arm. The bootstrap is paired: a replicate has the same samples and seeds for all runs.
    Return None if no seed has at least two runs of the baseline, or if the accuracy is above all runs of the baseline
    for one seed and below all of them for another.

    Args:
        arm: runs of the arm, one for each seed.
        ladder: runs of the baseline with several lengths.
        test: name of the test.
        cost: name of the cost, see COSTS.
        weights: bootstrap weights.
    """
    logs, beyond = [], set()
    for row in arm:
        own = [each for each in ladder if each["trial"]["seed"] == row["trial"]["seed"]]
        own.sort(key=lambda each: each["cost"][cost])
        if len(own) < 2:
            continue
        costs = [each["cost"][cost] for each in own]
        ends_R = np.stack([weights.accuracies(each["correct"][test]) for each in own], 1)
        reached_R = weights.accuracies(row["correct"][test])
        found = [interpolated(accuracy, costs, ends) for accuracy, ends in zip(reached_R, ends_R)]
        beyond |= {found[0][1]} - {""}
        logs.append(np.array([log for log, _ in found]) - np.log(row["cost"][cost]))
    if not logs or len(beyond) > 1:
        return None
    mean, low, high = np.exp(_mean_and_interval(np.stack(logs)))
    return Factor(float(mean), float(low), float(high), len(logs), "".join(beyond))


def _mean_and_interval(values_SR: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over seeds of the first column, and the 95 % interval of this mean over the bootstrap replicates
    in the other columns. Each replicate draws S seeds from the S seeds, with replacement."""
    drawn = np.random.default_rng(1).integers(len(values_SR), size=(REPLICATES, len(values_SR)))
    means = [values_SR[seeds, replicate + 1].mean() for replicate, seeds in enumerate(drawn)]
    low, high = np.percentile(means, INTERVAL)
    return float(values_SR[:, 0].mean()), float(low), float(high)


def save(folder: Path, head: dict[str, Any], rows: Sequence[Row], finetuned: Sequence[Row], labels: Labels) -> None:
    """Write the predictions, the numbers, the page and its plot. In README.md, only text between the markers changes.

    Args:
        folder: output folder, which is created if necessary.
        head: `about` (the machine) and `settings`.
        rows: results of all runs, including those for choosing settings.
        finetuned: results of the encoders that were fine-tuned.
        labels: labels of all samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {"settings": head["settings"], "runs": rows, "finetuned": finetuned}
    with atomic_write(folder / ANSWERS) as partial:
        partial.write_bytes(lzma.compress(json.dumps(known).encode()))
    runs, tuned = (
        [{key: value for key, value in row.items() if key != "correct"} for row in part] for part in (rows, finetuned)
    )
    write_text_atomically(folder / JSON, json.dumps(head | {"runs": runs, "finetuned": tuned}, indent=1) + "\n")
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else f"# The race\n\n{START}\n{END}\n"
    page.write_text(rewrite(text, tables(rows, finetuned, head, labels)), encoding="utf-8")
    draw([row for row in rows if not row["trial"]["validation"]], folder / PLOT)


def read_answers(folder: Path, settings: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """Return the results that an earlier call, possibly on another machine, has written to `folder`: the results of
    runs, and the results of fine-tuning their encoders. Raises UserError if they were obtained with other settings,
    except for the settings that select the runs."""
    if not (folder / ANSWERS).exists():
        return [], []
    known = json.loads(lzma.decompress((folder / ANSWERS).read_bytes()))
    if any(known["settings"].get(name) != settings[name] for name in settings if name not in SELECTING):
        raise UserError(f"{folder}: has results of other settings; choose another folder (--out, --results)")
    return known["runs"], known["finetuned"]


def tables(rows: Sequence[Row], finetuned: Sequence[Row], head: dict[str, Any], labels: Labels) -> str:
    """Return Markdown with the tables of all tests, of fine-tuning and of the settings that were tried, and with the
    plot."""
    weights = Weights(labels)
    minutes = sum(row["cost"]["whole_seconds"] for row in rows) / 60
    text = [
        f"{machine(head['about'])}; "
        f"{len(rows)} runs, {minutes:.0f} CPU minutes of training. Accuracies are means over seeds, in %. A factor is "
        "the cost at which the baseline reaches the accuracy of a run, divided by the cost of that run. Factors have "
        "95 % intervals, which cover seeds and samples. A value with > or < is only a bound, because the accuracy is "
        "above or below the accuracies of all runs with which it is compared."
    ]
    tested = [row for row in rows if not row["trial"]["validation"]]
    for data, size in _unique((row["trial"]["data"], row["trial"]["size"]) for row in tested):
        own = [row for row in tested if (row["trial"]["data"], row["trial"]["size"]) == (data, size)]
        ladder = [row for row in own if row["trial"]["arm"] in BASELINES]
        tests = TESTS[data]
        columns = ["steps", "seeds", "TFLOP", "CPU s", *tests.values()]
        columns += [f"{COSTS[cost]} factor, {name}" for cost in COSTS for name in tests.values()]
        cells = []
        for arm, steps in _unique((row["trial"]["arm"], row["trial"]["steps"]) for row in _sorted(own)):
            runs = [row for row in own if (row["trial"]["arm"], row["trial"]["steps"]) == (arm, steps)]
            costs = [np.mean([row["cost"][cost] for row in runs]) for cost in ("flops", "seconds")]
            means = [100 * np.mean([row["numbers"][test] for row in runs]) for test in tests]
            factors = [
                "-" if arm not in ARMS or arm in BASELINES else _shown(factor(runs, ladder, test, cost, weights))
                for cost in COSTS
                for test in tests
            ]
            cell = [arm, f"{steps:,}", f"{len(runs)}", f"{costs[0] / 1e12:.3g}", f"{costs[1]:.0f}"]
            cells.append([*cell, *(f"{mean:.1f}" for mean in means), *factors])
        text += ["", table([f"{DATA[data]}, {size}", *columns], cells)]
        lengths = sorted({row["trial"]["steps"] for row in own if row["trial"]["arm"] == USUAL})
        for length in lengths:
            if length >= min(head["settings"]["target"]["baseline"], lengths[-1]):
                text += _differences(own, length, f"{DATA[data]}, {size}", list(tests), weights)
        text += _shares(own, f"{DATA[data]}, {size}", list(tests), weights)
        of_size = [row for row in finetuned if (row["trial"]["data"], row["trial"]["size"]) == (data, size)]
        text += _finetuned(of_size, f"{DATA[data]}, {size}", weights)
    for data in _unique(row["trial"]["data"] for row in rows if row["trial"]["validation"]):
        chosen = [row for row in rows if row["trial"]["validation"] and row["trial"]["data"] == data]
        names = [setting for setting, _ in chosen[0]["trial"]["tuned"]]
        cells = [_tried(row) for row in sorted(chosen, key=lambda row: row["trial"]["steps"])]
        title = f"{DATA[data]}, settings tried on validation samples"
        text += ["", table([title, "steps", *names, *TESTS[data].values()], cells)]
    return "\n".join(text) + f"\n\n![Accuracy against compute]({PLOT})\n"


def _shares(rows: Sequence[Row], title: str, tests: Sequence[str], weights: Weights) -> list[str]:
    """Return a table of the cost at which the fast recipe reaches the accuracy of each run of the baseline, as a
    fraction of the cost of that run. The target of the protocol refers to this fraction."""
    ladder, cells = [row for row in rows if row["trial"]["arm"] == FAST], []
    baselines = [(row["trial"]["arm"], row["trial"]["steps"]) for row in rows if row["trial"]["arm"] in BASELINES]
    for arm, steps in sorted({*baselines}):
        runs = [row for row in rows if (row["trial"]["arm"], row["trial"]["steps"]) == (arm, steps)]
        found = {(cost, test): factor(runs, ladder, test, cost, weights) for cost in COSTS for test in tests}
        if seeds := {each.seeds for each in found.values() if each}:
            cells.append([f"{arm}, {steps:,}", f"{max(seeds)}", *(_shown(each) for each in found.values())])
    columns = [f"{COSTS[cost]}, {TESTS[rows[0]['trial']['data']][test]}" for cost in COSTS for test in tests]
    head = [
        f"{title}: cost at which `{FAST}` reaches the accuracy of a baseline run, divided by the cost of that run",
        "seeds",
    ]
    return ["", table([*head, *columns], cells)] if cells else []


def _differences(rows: Sequence[Row], length: int, title: str, tests: Sequence[str], weights: Weights) -> list[str]:
    """Return a table that compares the fast recipe's runs of each length with the runs of the baseline with its usual
    settings that have `length` steps: the cost as a fraction, and the difference in accuracy."""
    baselines = [row for row in rows if row["trial"]["arm"] == USUAL and row["trial"]["steps"] == length]
    by_seed = {row["trial"]["seed"]: row for row in baselines}
    fast = [row for row in rows if row["trial"]["arm"] == FAST and row["trial"]["seed"] in by_seed]
    cells = []
    for steps in sorted({row["trial"]["steps"] for row in fast}):
        pairs = [(row, by_seed[row["trial"]["seed"]]) for row in fast if row["trial"]["steps"] == steps]
        cell = [f"{steps:,}", f"{len(pairs)}"]
        cell += [f"{np.mean([own['cost'][cost] / other['cost'][cost] for own, other in pairs]):.2f}" for cost in COSTS]
        for test in tests:
            own_SR, other_SR = (
                np.stack([weights.accuracies(row["correct"][test]) for row in part]) for part in zip(*pairs)
            )
            mean, low, high = _mean_and_interval(100 * (own_SR - other_SR))
            cell.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
        cells.append(cell)
    head = f"{title}: steps of `{FAST}`, compared with {length:,} steps of `{USUAL}`"
    columns = [f"relative {cost}" for cost in COSTS.values()]
    columns += [f"{TESTS[rows[0]['trial']['data']][test]}, difference in points" for test in tests]
    return ["", table([head, "seeds", *columns], cells)] if cells else []


def _finetuned(rows: Sequence[Row], title: str, weights: Weights) -> list[str]:
    """Return a table of the accuracies of fine-tuned encoders, and of their differences from the encoder of the
    baseline with its usual settings that was trained for the longest time, on the same samples and seeds."""
    longest = max((row["trial"]["steps"] for row in rows if row["trial"]["arm"] == USUAL), default=0)
    accuracies = {
        (row["trial"]["arm"], row["trial"]["steps"], row["trial"]["seed"]): 100
        * weights.accuracies(row["correct"]["finetune"])
        for row in rows
    }
    cells = []
    for arm, steps in _unique((row["trial"]["arm"], row["trial"]["steps"]) for row in _sorted(rows)):
        own = {seed: found for (a, s, seed), found in accuracies.items() if (a, s) == (arm, steps)}
        cell = [arm, f"{steps:,}", f"{len(own)}", f"{np.mean([found[0] for found in own.values()]):.1f}"]
        others = {seed: accuracies[key] for seed in own if (key := (USUAL, longest, seed)) in accuracies}
        if others and (arm, steps) != (USUAL, longest):
            apart_SR = np.stack([own[seed] - other for seed, other in others.items()])
            mean, low, high = _mean_and_interval(apart_SR)
            cells.append([*cell, f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"])
        else:
            cells.append([*cell, "-"])
    apart = f"difference from `{USUAL}` after {longest:,} steps, in points"
    head = [f"{title}, fine-tuned", "steps", "seeds", "accuracy, %", apart]
    return ["", table(head, cells)] if cells else []


def _tried(row: Row) -> list[str]:
    trial = row["trial"]
    numbers = [f"{100 * value:.1f}" for value in row["numbers"].values()]
    return [
        f"{trial['size']}, {trial['arm']}",
        f"{trial['steps']:,}",
        *(json.dumps(value) for _, value in trial["tuned"]),
        *numbers,
    ]


def _unique(values: Iterable[Any]) -> list[Any]:
    return [*dict.fromkeys(values)]


def _sorted(rows: Sequence[Row]) -> list[Row]:
    order = [PIXELS, RANDOM_WEIGHTS, *ARMS]
    return sorted(rows, key=lambda row: (order.index(row["trial"]["arm"]), row["trial"]["steps"]))


def _shown(found: Factor | None) -> str:
    if found is None:
        return "-"
    if found.beyond:  # the factor is a bound, so there is no interval
        return f"{found.beyond} {found.mean:.2f}"
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the accuracy of the linear probe against FLOPs and against seconds, with one row of plots for each dataset
    and model size with runs of several lengths. A line connects the means of each arm. Runs are points, and references
    without training are dashed lines."""
    lengths: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        if row["trial"]["arm"] in ARMS:
            lengths.setdefault((row["trial"]["data"], row["trial"]["size"]), set()).add(row["trial"]["steps"])
    kinds = [kind for kind, steps in lengths.items() if len(steps) > 1] or [("clothes", "-")]
    figure, axes = plt.subplots(len(kinds), 2, figsize=(10, 4.2 * len(kinds)), layout="constrained", squeeze=False)
    for (data, size), pair in zip(kinds, axes):
        own = _sorted([row for row in rows if (row["trial"]["data"], row["trial"]["size"]) == (data, size)])
        test = list(TESTS[data])[1]
        for axis, (cost, (unit, label)) in zip(pair, AXES.items()):
            for number, arm in enumerate(_unique(row["trial"]["arm"] for row in own)):
                of_arm = [row for row in own if row["trial"]["arm"] == arm]
                x = np.array([row["cost"][cost] / unit for row in of_arm])
                y = np.array([100 * row["numbers"][test] for row in of_arm])
                if arm not in ARMS:
                    axis.axhline(y.mean(), color="0.5", lw=1, ls="--")
                    axis.annotate(arm, (0.01, y.mean()), xycoords=("axes fraction", "data"), fontsize=8, color="0.3",
                                  xytext=(0, 2), textcoords="offset points")  # fmt: skip
                    continue
                colour = {BASELINE: "0.65", USUAL: "black", FAST: "tab:red"}.get(arm, COLOURS[number % len(COLOURS)])
                steps = [row["trial"]["steps"] for row in of_arm]
                groups = [[place for place, own in enumerate(steps) if own == each] for each in _unique(steps)]
                means = ([values[group].mean() for group in groups] for values in (x, y))
                axis.plot(*means, "-o", color=colour, ms=5, label=LEGEND.get(arm, arm))
                axis.plot(x, y, "o", color=colour, ms=3, alpha=0.4)
            axis.set(xscale="log", xlabel=f"{label}, logarithmic", ylabel="accuracy of the linear probe, %")
            axis.set_title(f"{DATA[data]}, model {size}", fontsize=10)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
            axis.margins(0.06, 0.08)
    if labels := dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()))):
        about = "large points: means over seeds; small points: single runs; dashed lines: without training"
        place = {"loc": "outside lower center", "ncols": 3}
        figure.legend(labels.values(), labels, fontsize=9, frameon=False, title=about, title_fontsize=9, **place)
    figure.savefig(path, dpi=110)
    plt.close(figure)
