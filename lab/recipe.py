"""Experiment: are the default batch size, length and learning rate of a classifier good choices for the number of
samples?

python -m lab.labelled fashion data/labelled/fashion       # also: emoji-twitter .../twitter, emoji-google .../google
python -m lab.recipe data/labelled --out runs/recipe
python -m lab.recipe data/labelled --minutes 20 --tasks finetune  # starts no trial after 20 minutes; to resume, run it
                                                                  # again

Linear probes and fine-tuning are run with the defaults (m3ae_fast/evaluation/default_hyperparameters.py), with one
third and three times the default learning rate, and with half and twice the default number of steps. Linear probes are
also run with the learning rate that they select themselves. The datasets are clip art, emoji and Fashion-MNIST. The
encoder is an MAE that was trained on the same images; probes are also run on random weights. table.md is written to
--out. Completed trials are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab.markdown import table
from lab.study import measure, shards
from lab.study.statistics import Seeds, accuracy, difference
from lab.trials import machine, perform_all
from m3ae_fast import train
from m3ae_fast.base.atomic_file import atomic_write, write_text_atomically
from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.config.evaluation import EvaluationConfig, evaluation_config
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.fit_heads import logits
from m3ae_fast.evaluation.probes import Setting, linear_recipe, train_heads
from m3ae_fast.process.session import Session, joined_program
from m3ae_fast.weights.open_model import RANDOM, open_model

CLIPART = Path("data/openclipart")
TRAIN, VALIDATION, TEST = "train", "validation", "test"
VALIDATED = 8  # outside the test set, one sample out of this number is used to choose the rule
SIDE = 36  # maximum side of an image in pixels
MODEL = {
    "size": None, "emb_dim": 128, "depth": 2, "num_heads": 4, "dec_emb_dim": 64, "dec_depth": 1, "dec_num_heads": 2,
    "image_size": 28, "patch_size": 7, "vocab_size": 0, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.35, 0.35, 0.35],
}  # fmt: skip
VARIANTS = {  # learning rate and length as multiples of the defaults
    "rule": (1, 1), "rate / 3": (1 / 3, 1), "rate x 3": (3, 1), "steps / 2": (1, 0.5), "steps x 2": (1, 2),
}  # fmt: skip
TRIED = "tried"  # variant in which the probe chooses the learning rate
ENCODERS = ("mae", "random")
ALL = 0  # denotes all samples
PROBES = {  # number of seeds by dataset and number of samples
    "drawings": {ALL: 3},
    "emoji": {1_000: 3, ALL: 3},
    "clothes": {1_000: 3, 5_000: 3, 20_000: 1, 50_000: 1},
}
TUNINGS = {  # variants by dataset and number of samples, with one seed, because fine-tuning takes a long time
    "clothes": {1_000: (*VARIANTS,)},
    "drawings": {ALL: (*VARIANTS,)},
    "emoji": {ALL: (*VARIANTS,)},
}


class Trial(NamedTuple):
    """The training of a classifier."""

    task: str
    data: str
    encoder: str
    samples: int
    seed: int  # random seed of the classifier and of the choice of samples
    variant: str

    @property
    def name(self) -> str:
        return "-".join(str(part).replace(" ", "").replace("/", "over") for part in self)


def plan(tasks: Sequence[str]) -> list[Trial]:
    """Return the trials, with the longest ones last."""
    trials = []
    for data, sizes in PROBES.items():
        for encoder in ENCODERS:
            for samples, seeds in sizes.items():
                for seed in range(seeds):
                    variants = [name for name in VARIANTS if seed == 0 or "steps" not in name]
                    trials += [Trial("linear", data, encoder, samples, seed, name) for name in (*variants, TRIED)]
    for data, tuned in TUNINGS.items():
        for samples, variants in tuned.items():
            trials += [Trial("finetune", data, "mae", samples, 0, variant) for variant in variants]
    return sorted((trial for trial in trials if trial.task in tasks), key=_passes)


def _passes(trial: Trial) -> float:
    """Return the approximate cost of a trial. For fine-tuning, it is the number of samples that are processed; for a
    probe, it is a hundredth of this number."""
    samples = trial.samples or 2_000
    recipe = OFFICIAL[trial.task].scaled(samples)
    length = recipe.epochs * VARIANTS.get(trial.variant, (1, 3))[1]
    return samples * length / (1 if trial.task == "finetune" else 100)


class Picture(NamedTuple):
    """A labelled image."""

    key: str
    unit: str  # images with the same unit, such as an emoji, are in the same part
    category: str
    image: bytes


def pictures(data: Path) -> Iterator[tuple[str, Picture]]:
    """Yield each image with its dataset and part, such as "clothes-test". Raises UserError if a dataset has no
    shards."""
    for part, split in ((TRAIN, "train"), (TEST, "val")):
        for sample in shards.read(data / "fashion", (split,)):
            key = f"clothes-{part}-{sample.key}"
            yield f"clothes-{part}", Picture(key, key, sample.about["name"], sample.image)
        for sample in shards.read(CLIPART, (split,)):
            key = f"drawings-{part}-{sample.key}"
            if sample.about["label"] >= 0:
                yield f"drawings-{part}", Picture(key, key, sample.about["category"], sample.image)
    for vendor in shards.VENDORS:
        for sample in shards.read(data / vendor, ("train", "val")):
            if shards.is_plain(sample):
                unit = sample.about["emoji"]
                part = TRAIN if shards.part_of(unit) else TEST
                yield f"emoji-{part}", Picture(f"{vendor}-{unit}", unit, sample.about["category"], sample.image)


def prepare(data: Path, folder: Path) -> None:
    """Write SET-PART.tar and labels.json to `folder`, unless they exist. Raises UserError as `pictures` does."""
    if (folder / shards.LABELS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Picture]] = {}
    for name, picture in pictures(data):
        if name.endswith(TRAIN) and drawn("validation", picture.unit) % VALIDATED == 0:
            name = name.removesuffix(TRAIN) + VALIDATION
        parts.setdefault(name, []).append(picture)
    labels: dict[str, dict[str, Any]] = {}
    for name, own in parts.items():
        data_set = name.rpartition("-")[0]
        classes = sorted({picture.category for picture in parts[f"{data_set}-{TRAIN}"]})
        own = [picture for picture in own if picture.category in classes]
        labels |= {each.key: {"emoji": each.unit, "class": classes.index(each.category)} for each in own}
        samples = [(p.key, shards.scaled(p.image, SIDE), labels[p.key]["class"]) for p in own]
        shards.write_labelled(folder / f"{name}.tar", samples)
    write_text_atomically(folder / shards.LABELS, json.dumps(labels) + "\n")


def drawn(seed: Any, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "big")


class Laboratory:
    """A folder in which the classifiers of a plan are trained. It stores which samples each classifier classifies
    correctly."""

    def __init__(self, out: Path, steps: int) -> None:
        """Set the folder, and the number of training steps of each MAE."""
        self.out, self.steps = out, steps
        self.labels = json.loads((out / "shards" / shards.LABELS).read_text(encoding="utf-8"))
        self._encoded: dict[str, tuple[FeatureBank, FeatureBank]] = {}

    def shard(self, data: str, part: str) -> Path:
        return self.out / "shards" / f"{data}-{part}.tar"

    def result(self, trial: Trial) -> Path:
        return self.out / "results" / f"{trial.name}.json"

    def perform(self, trial: Trial) -> bool:
        """Train a classifier and store which held-out samples it classifies correctly. Return False if the training was
        stopped."""
        if not self._trained(trial.data):
            return False
        started = time.process_time()
        run = str(self.out / trial.data)
        model = run if trial.encoder == "mae" else f"{RANDOM}{run}"
        found = self._linear(trial, model) if trial.task == "linear" else self._finetune(trial, model)
        if found is None:
            return False
        self.result(trial).parent.mkdir(exist_ok=True)
        seconds = {"cpu_s": round(time.process_time() - started, 1)}
        write_text_atomically(self.result(trial), json.dumps({**trial._asdict(), **seconds, **found}) + "\n")
        return True

    def _trained(self, data: str) -> bool:
        """Train an MAE on the images of a dataset, unless this has been done. Return False if the training was
        stopped."""
        run = self.out / data
        if (run / "checkpoints" / f"step-{self.steps:08}").exists():
            return True
        config = {
            "run": {"dir": str(run)},
            "model": MODEL,
            "data": {"train": [{"shards": str(self.shard(data, TRAIN))}], "crop_scale": [0.5, 1.0], "workers": 0},
            "optim": {"peak_lr": 4e-3, "warmup_epochs": 1, "clip_grad": 1.0},
            "train": {
                "global_batch": 128, "steps": self.steps, "log_every": 500, "save_every": 1_000_000, "pictures": 0,
                "compile": False,
            },
            "deepspeed": None,
        }  # fmt: skip
        settings = self.out / f"{data}.json"
        write_text_atomically(settings, json.dumps(config, indent=1))
        train.main(["--config", str(settings), "--resume", "auto"])
        return (run / "checkpoints" / f"step-{self.steps:08}").exists()

    def _settings(self, trial: Trial, samples: int) -> dict[str, Any]:
        """Return the default settings with the changes of the variant."""
        rate, length = VARIANTS.get(trial.variant, (1, 1))
        recipe = OFFICIAL[trial.task].scaled(samples)
        return {"epochs": length * recipe.epochs, "peak_lr": float(f"{rate * recipe.peak_lr:.3g}")}

    def _linear(self, trial: Trial, model: str) -> dict[str, Any]:
        with joined_program() as session:
            bank, held_out = self._features(trial, model, session)
            drawn = {*self._chosen(trial, bank.keys)}
            bank = bank.rows([row for row, key in enumerate(bank.keys) if key in drawn])
            settings = self._settings(trial, len(bank.keys))
            assert bank.labels_N is not None and held_out.labels_N is not None
            classes = 1 + max(each["class"] for each in (self.labels[key] for key in held_out.keys + bank.keys))
            given = settings if trial.variant != TRIED else settings | {"peak_lr": None}
            setting = Setting(
                self._config({"linear": given}), classes, 1, trial.seed, session.ranks, session.heartbeats
            )
            trained = train_heads({0: bank}, linear_recipe(len(bank.keys), setting), setting)[0]
            settings["peak_lr"] = trained.peak_lr
            right_N = logits(trained.heads, held_out).argmax(1) == held_out.labels_N
        correct = dict(zip(held_out.keys, right_N.int().tolist()))
        return {"train_samples": len(bank.keys), "settings": settings, "correct": correct}

    def _features(self, trial: Trial, model: str, session: Session) -> tuple[FeatureBank, FeatureBank]:
        """Return the labelled features of the training images and of all other images. Features are cached."""
        saved = self.out / f"{trial.data}-{trial.encoder}.pt"
        if model not in self._encoded and saved.exists():
            self._encoded[model] = torch.load(saved, weights_only=False)  # the file was written by this program
        if model not in self._encoded:
            encode = measure.encoder(open_model(model, text=False).eval(), self._config({}), session)
            found = []
            for parts in ((TRAIN,), (VALIDATION, TEST)):
                features = encode([self.shard(trial.data, part) for part in parts], False, False)
                labels_N = torch.tensor([self.labels[key]["class"] for key in features.keys])
                found.append(replace(features, labels_N=labels_N))
            self._encoded[model] = (found[0], found[1])
            with atomic_write(saved) as partial:
                torch.save(self._encoded[model], partial)
        return self._encoded[model]

    def _config(self, sections: dict[str, Any]) -> EvaluationConfig:
        unused = {"train": [{"shards": "-"}]}  # required by the config
        encode = {"encode": {"batch": 256}}
        return evaluation_config({"run": {"dir": str(self.out)}, "data": unused} | encode | sections, [])

    def _chosen(self, trial: Trial, keys: Sequence[str]) -> list[str]:
        """Return the keys of the samples on which a trial is trained."""
        return sorted(keys, key=lambda key: drawn(trial.seed, key))[: trial.samples or len(keys)]

    def _finetune(self, trial: Trial, model: str) -> dict[str, Any] | None:
        """Fine-tune an encoder and return the result; None if the training was stopped."""
        with tarfile.open(self.shard(trial.data, TRAIN)) as tar:
            images = {m.name.removesuffix(".jpg"): m for m in tar if m.name.endswith(".jpg")}
            keys = self._chosen(trial, [*images])
            samples = [(key, tar.extractfile(images[key]).read(), self.labels[key]["class"]) for key in keys]
        shards.write_labelled(shard := self.out / "drawn.tar", samples)
        settings = self._settings(trial, len(keys))
        held_out = [self.shard(trial.data, part) for part in (VALIDATION, TEST)]
        named = {f"finetune.{key}": value for key, value in settings.items()}
        correct = measure.finetune(model, shard, held_out, self.out / "tuned" / trial.name, named)
        return None if correct is None else {"train_samples": len(keys), "settings": settings, "correct": correct}

    def tables(self, tasks: Sequence[str], part: str) -> str:
        """Return a Markdown table for each task. It contains the accuracy with the defaults, and for each variant the
        difference from this accuracy in points."""
        tested = {key for data in PROBES for key in keys(self.shard(data, part))}
        text = []
        for task in tasks:
            found: dict[tuple[str, str, int], dict[str, dict[int, dict[str, float]]]] = {}
            samples: dict[tuple[str, str, int], int] = {}
            for trial in plan([task]):
                if self.result(trial).exists():
                    result = json.loads(self.result(trial).read_text(encoding="utf-8"))
                    correct = {key: value for key, value in result["correct"].items() if key in tested}
                    row = (trial.data, trial.encoder, trial.samples)
                    samples[row] = result["train_samples"]
                    found.setdefault(row, {}).setdefault(trial.variant, {})[trial.seed] = correct
            variants = [name for name in (*VARIANTS, TRIED) if any(name in each for each in found.values())]
            head = [task, "encoder", "samples", "batch size, epochs, learning rate", *variants]
            lines = []
            for row, each in found.items():
                recipe = OFFICIAL[task].scaled(samples[row])
                settings = f"{recipe.global_batch}, {recipe.epochs}, {recipe.peak_lr:g}"
                cells = [self._cell(name, each) for name in variants]
                lines.append([row[0], row[1], f"{samples[row]:,}", settings, *cells])
            text.append(table(head, lines, left=2))
        return "\n\n".join(text)

    def _cell(self, variant: str, found: dict[str, Seeds]) -> str:
        if variant not in found or "rule" not in found:
            return "-"
        if variant == "rule":
            whole = accuracy(found["rule"], self.labels)
            return f"{whole.percent()} ({whole.seeds})"
        apart = difference(found[variant], found["rule"], self.labels)
        if apart is None:
            return "-"
        fewer = "" if apart.seeds == len(found["rule"]) else f" ({apart.seeds})"
        return apart.percent("+") + fewer


def keys(shard: Path) -> list[str]:
    """Return the keys of the samples in a shard."""
    with tarfile.open(shard) as tar:
        return [name.removesuffix(".cls") for name in tar.getnames() if name.endswith(".cls")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder with fashion, twitter and google, written by lab.labelled"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="output folder (default: runs/recipe)")
    parser.add_argument(
        "--tasks", nargs="+", choices=OFFICIAL, default=[*OFFICIAL], help="tasks to run (default: both)"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="start no trial after N minutes")
    parser.add_argument(
        "--steps", type=int, default=400, metavar="N", help="number of training steps of each MAE (default: 400)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    prepare(args.data, args.out / "shards")
    laboratory = Laboratory(args.out, args.steps)
    if not perform_all(plan(args.tasks), laboratory, args.minutes):
        return 1
    parts = {part: laboratory.tables(args.tasks, part) for part in (TEST, VALIDATION)}
    text = "\n\n".join([machine(), *(f"On {part} samples:\n\n{tables}" for part, tables in parts.items())])
    write_text_atomically(args.out / "table.md", text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
