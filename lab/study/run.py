"""A study's jobs, done by the public programs, each once: its result on disk says that it is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lab.study.plan import Encoder, Job, m3ae
from m3ae_fast import train
from m3ae_fast.run import checkpoint
from m3ae_fast.run.run_log import read_metrics
from m3ae_fast.transfer import __main__ as transfer
from m3ae_fast.transfer.job import RESULT_FILE

SETTINGS = Path(__file__).with_name("settings.json")


class Stopped(Exception):
    """Somebody asked a program to stop before its end."""


@dataclass(frozen=True)
class Study:
    """Where everything is."""

    out: Path  # holds a folder per encoder, and in it one per task
    settings: dict[str, Any]  # `train`: a config; `transfer`: sections of transfer's
    train: str  # shards
    val: str
    nameless: str  # training shards whose captions name no class
    labels: str

    @property
    def common(self) -> Encoder:
        train = self.settings["train"]
        return m3ae(train["model"]["emb_dim"], train["train"]["steps"])

    def done(self, job: Job) -> bool:
        if job.task is None:
            return any(checkpoint.step_of(p) == job.encoder.steps for p in checkpoint.saved_steps(self._run(job)))
        return (self._result(job) / RESULT_FILE).exists()

    def perform(self, job: Job) -> None:
        """Do what `job` lacks.

        Raises:
            UserError: a program cannot do it.
            Stopped: it was asked to stop.
        """
        if job.task is None:
            self.out.mkdir(parents=True, exist_ok=True)
            config = self.out / f"{job.encoder.name}.json"
            config.write_text(json.dumps(self._config(job.encoder), indent=1), encoding="utf-8")
            train.main(["--config", str(config), "--resume", "auto"])
        else:
            transfer.main(self._task_arguments(job))
        if not self.done(job):
            raise Stopped

    def results(self, jobs: list[Job]) -> dict[str, Any]:
        """Return what is done: `encoders`, with held-out losses and speed; `rows`, an encoder and its accuracy each."""
        done = [job for job in jobs if self.done(job)]
        return {
            "encoders": [asdict(job.encoder) | self._training(job) for job in done if job.task is None],
            "rows": [asdict(job.encoder) | self._test(job) for job in done if job.task],
        }

    def _training(self, job: Job) -> dict[str, float]:
        values = read_metrics(self._run(job))
        last = next(line for line in reversed(values) if "val_image_loss" in line)
        speed = median(line["samples_per_s"] for line in values if "samples_per_s" in line)
        return {name: value for name, value in last.items() if name != "step"} | {"samples_per_s": speed}

    def _test(self, job: Job) -> dict[str, Any]:
        found = json.loads((self._result(job) / RESULT_FILE).read_text(encoding="utf-8"))
        return {name: found.get(name) for name in ("task", "top1", "top5", "seconds")}

    def _run(self, job: Job) -> Path:
        return self.out / job.encoder.name

    def _result(self, job: Job) -> Path:
        return self.out / f"{job.encoder.name}-{job.task}"

    def _config(self, encoder: Encoder) -> dict[str, Any]:
        config = json.loads(json.dumps(self.settings["train"]))
        text = encoder.text_ratio is not None
        kept = {} if encoder.caption_fraction == 1 else {"caption_fraction": encoder.caption_fraction}
        modality = {"modality": "auto" if text else "image"}
        shards = self.nameless if encoder.captions == "nameless" else self.train
        config["run"] = {"dir": str(self.out / encoder.name), "seed": encoder.seed}
        heads = config["model"]["num_heads"] * encoder.width // config["model"]["emb_dim"]  # of the same size
        config["model"] |= {"emb_dim": encoder.width, "num_heads": max(1, heads)}
        config["data"] |= {"train": [{"shards": shards, **modality, **kept}], "val": [{"shards": self.val, **modality}]}
        config["train"] |= {"steps": encoder.steps}
        if text:
            config["masking"] = {"text_ratio": encoder.text_ratio}
        else:
            config["model"] |= {"vocab_size": 0}
            config["data"] |= {"tokenizer": None}
        return config

    def _task_arguments(self, job: Job) -> list[str]:
        encoder = job.encoder
        model = str(self._run(job))
        if encoder.objective == "random":  # of the sizes of any encoder that is as wide
            common = asdict(self.common) | {"width": encoder.width}
            model = f"random:{self.out / Encoder(**common).name}"
        overrides = {"run.seed": encoder.seed} | dict(flat(self.settings["transfer"]))
        sets = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        arguments = [str(job.task), model, "--train", self.train, "--val", self.val, "--labels", self.labels]
        arguments += ["--out", str(self._result(job)), *(part for each in sets for part in ("--set", each))]
        return arguments + {"linear": ["--cache-features"], "finetune": ["--resume", "auto"]}.get(str(job.task), [])


def flat(sections: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings as `section.key`, value."""
    for key, value in sections.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
