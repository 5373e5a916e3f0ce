"""Execution of the experiment's runs, which are trained by the public program and tested. Results on disk determine
which runs are complete."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lab.race.plan import PIXELS, USUAL, Trial, frozen, usual
from lab.study import measure
from lab.study.measure import Encode, Measuring
from lab.study.run import Stopped, clothes_to_train_on, evaluation_of, split_of
from lab.study.shards import LABELS, write_labelled
from m3ae_fast import checkpoint, train
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.config import Config, parse
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.config.load import apply_override
from m3ae_fast.engine.memory_estimate import typical_batch
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.session import Session, joined_program
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.training.throughput import newton_schulz_flops
from m3ae_fast.weights.open_model import RANDOM, open_model

SETTINGS = Path(__file__).with_name("settings.json")
BATCH = 128  # samples per step, to which `Trial.steps` refers
TESTS = {  # names of the tests that are used, by dataset
    "clothes": {"clothes_knn": "k-NN", "clothes_linear": "linear"},
    "emoji": {"knn": "k-NN", "linear": "linear", "shift_linear": "linear, other vendor"},
}
FINETUNED = "clothes"  # the dataset on which encoders are fine-tuned
CHOSEN_BY = {"clothes": "clothes_linear", "emoji": "linear"}  # test by which settings are chosen


@dataclass(frozen=True)
class Race:
    """Paths and settings of the experiment."""

    out: Path  # contains a folder and a result per run
    shards: Path  # see `lab.study.shards.prepare`
    settings: dict[str, Any]

    def result(self, trial: Trial) -> Path:
        return self.out / f"{trial.name}.result.json"

    def done(self, trial: Trial) -> bool:
        return self.result(trial).exists()

    def finetuning(self, trial: Trial) -> Path:
        """Return the path of the result of fine-tuning a run's encoder."""
        return self.out / f"{trial.name}.finetuned.json"

    def everything(self) -> list[dict[str, Any]]:
        """Return the results of all complete runs."""
        return self._read("*.result.json")

    def finetuned(self) -> list[dict[str, Any]]:
        """Return the results of all encoders that have been fine-tuned."""
        return self._read("*.finetuned.json")

    def _read(self, pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.out.glob(pattern))]

    def adopt(self, rows: list[dict[str, Any]], finetuned: list[dict[str, Any]]) -> None:
        """Add results of an earlier call that are not in `out`."""
        self.out.mkdir(parents=True, exist_ok=True)
        for found, path_of in ((rows, self.result), (finetuned, self.finetuning)):
            for row in found:
                if not (path := path_of(trial_of(row))).exists():
                    write_text_atomically(path, json.dumps(row) + "\n")

    def accuracy(self, trial: Trial) -> float:
        """Return the accuracy of a complete run in the test by which settings are chosen."""
        row = json.loads(self.result(trial).read_text(encoding="utf-8"))
        return row["numbers"][CHOSEN_BY[trial.data]]

    def perform(self, trial: Trial) -> None:
        """Train and test a run. Raises UserError if that is not possible, and Stopped if the training was stopped."""
        run = self._prepared(trial)
        cost = (
            self._train(trial, run) if trial.trained else {"samples": 0, "flops": 0, "seconds": 0, "whole_seconds": 0}
        )
        correct = self._test(trial, run)
        numbers = {test: fmean(own.values()) for test, own in correct.items()}
        whole = {"trial": asdict(trial), "cost": cost, "numbers": numbers}
        write_text_atomically(self.result(trial), json.dumps(whole | {"correct": correct}) + "\n")

    def finetune(self, trial: Trial) -> None:
        """Fine-tune the encoder of a run on the images of the probes, with the default settings of the program, and
        test the classifier. A run that is not on this machine is trained again. Raises UserError if that is not
        possible, and Stopped if the training was stopped."""
        run = self._prepared(trial)
        if trial.trained:
            self._train(trial, run)
        labels = json.loads((self.shards / LABELS).read_text(encoding="utf-8"))
        probed, tested = split_of(self.shards, trial.seed, trial.validation).clothes
        classes = sorted({each["category"] for key, each in labels.items() if key.startswith("fashion")})
        shards = []
        for part in (*probed, *tested):
            shards.append(self.out / f"labelled-{part.name}")
            if not shards[-1].exists():
                images = measure.images_of(part)
                write_labelled(shards[-1], ((k, image, classes.index(labels[k]["category"])) for k, image in images))
        model = str(run)
        if not trial.trained:  # `evaluate` takes the sizes of a model with random weights from a checkpoint
            shortest = replace(
                trial, arm=USUAL, steps=min(self.settings["lengths"]), tuned=usual(self.settings["tried"])
            )
            self._train(shortest, self._prepared(shortest))
            model = f"{RANDOM}{self.out / shortest.name}"
        settings = {"run.seed": trial.seed}
        settings |= {f"finetune.{key}": value for key, value in self.settings["finetune"].items()}
        correct = measure.finetune(model, shards[0], shards[1:], self.out / f"{trial.name}.finetuned", settings)
        if correct is None:
            raise Stopped
        whole = {"trial": asdict(trial), "numbers": {"finetune": fmean(correct.values())}}
        write_text_atomically(self.finetuning(trial), json.dumps(whole | {"correct": {"finetune": correct}}) + "\n")

    def _prepared(self, trial: Trial) -> Path:
        """Write the config of a run, and return the run's folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        run = self.out / trial.name
        run.with_suffix(".json").write_text(json.dumps(self.config(trial), indent=1), encoding="utf-8")
        return run

    def _train(self, trial: Trial, run: Path) -> dict[str, float]:
        """Train a run, and return its cost. CPU seconds are the CPU time of this process, without its loader workers,
        including that of earlier calls whose checkpoint the run resumes from."""
        config, clock = parse(Config, self.config(trial), trial.name), self.out / f"{trial.name}.seconds"
        steps, seconds = config.train.steps, float(clock.read_text()) if clock.exists() else 0.0

        def complete() -> bool:
            return any(checkpoint.step_of(each) == steps for each in checkpoint.saved_steps(run))

        if not complete():
            started = time.process_time()
            train.main(["--config", str(run.with_suffix(".json")), "--resume", "auto"])
            seconds += time.process_time() - started
            write_text_atomically(clock, f"{seconds:.3f}\n")
        if not complete():
            raise Stopped
        waited = fmean(line["data_wait"] for line in read_metrics(run) if "data_wait" in line)
        samples = steps * config.train.global_batch
        return {"samples": samples, "flops": flops(config), "seconds": seconds * (1 - waited), "whole_seconds": seconds}

    def config(self, trial: Trial) -> dict[str, Any]:
        """Return the config of a run as plain JSON data."""
        config = json.loads(json.dumps(self.settings["train"]))
        for name, section in self.settings["data"][trial.data].items():
            config.setdefault(name, {}).update(section)
        config["model"] |= {"size": None} | self.settings["sizes"][trial.size]
        config["run"] = {"dir": str(self.out / trial.name), "seed": trial.seed}
        split = split_of(self.shards, trial.seed, trial.validation)
        if trial.data == "clothes":
            shards, modality = clothes_to_train_on(self.shards), "image"
        else:  # only one vendor, so that the encoder has not seen the style of the other vendor
            shards, modality = next(iter(split.train.values())), "auto"
        config["data"]["train"] = [{"shards": [str(path) for path in shards], "modality": modality}]
        for setting, value in trial.overrides if trial.trained else ():
            if setting == "model.dec_emb_dim":
                value = round(value * config["model"]["dec_emb_dim"])
            apply_override(config, f"{setting}={json.dumps(value)}")
        batch = config["train"]["global_batch"]
        config["train"]["steps"] = max(trial.steps * BATCH // batch, 1)
        config["optim"]["warmup_epochs"] = 0.1 * trial.steps * BATCH / self._samples(shards)
        return config

    def _samples(self, shards: list[Path]) -> int:
        return sum(len(measure.keys_of(shard)) for shard in shards)

    def _test(self, trial: Trial, run: Path) -> dict[str, dict[str, float]]:
        """Test an encoder, and return whether each sample was classified correctly, by test and key."""
        labels = json.loads((self.shards / LABELS).read_text(encoding="utf-8"))
        split = split_of(self.shards, trial.seed, trial.validation)
        with joined_program() as session:
            config = evaluation_of(self.shards, self.out, trial.seed, self.settings["transfer"])
            encode = self._encode(trial, run, config, session)
            measuring = Measuring(encode, split, labels, config, 1, session)
            if trial.data == "clothes":
                measuring.clothes()
            else:
                measuring.emoji()
        return {test: measuring.found.correct[test] for test in TESTS[trial.data]}

    def _encode(self, trial: Trial, run: Path, config: EvaluationConfig, session: Session) -> Encode:
        model = parse(Config, self.config(trial), trial.name).model
        if trial.arm == PIXELS:
            mean, std = ((value * 3 if len(value) == 1 else value) for value in (model.image_mean, model.image_std))
            return measure.pixels(model.image_size, mean, std)
        if not trial.trained:
            torch.manual_seed(trial.seed)
            return measure.encoder(M3AE(model).eval(), config, session)
        return measure.encoder(open_model(str(run), text=False).eval(), config, session)


def trial_of(row: dict[str, Any]) -> Trial:
    """Return the trial of a result, with JSON's lists converted to tuples."""
    return Trial(
        **row["trial"] | {"tuned": tuple((setting, frozen(value)) for setting, value in row["trial"]["tuned"])}
    )


def flops(config: Config) -> float:
    """Return the FLOPs of a run, forward and backward, including Newton-Schulz iterations, for captions of typical
    length."""
    with torch.device("meta"):
        model = M3AE(config.model, config.loss)
    batch, steps = typical_batch(config, model), config.train.steps or 0
    sample = executed_flops(config.model, batch) / len(batch.keys)
    return steps * (sample * config.train.global_batch + newton_schulz_flops(config, model, world=1))
