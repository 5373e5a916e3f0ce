"""Execution of the study: encoders are trained by the public program and tested. Results on disk determine which
encoders are complete."""

from __future__ import annotations

import json
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.study import measure
from lab.study.measure import EncoderResults, Measuring, Split
from lab.study.plan import Encoder, central, m3ae
from lab.study.shards import FOLDS, LABELS, PARTS, TEST, VENDORS
from m3ae_fast import checkpoint, train
from m3ae_fast.base.atomic_file import write_text_atomically
from m3ae_fast.config.evaluation import EvaluationConfig, evaluation_config
from m3ae_fast.process.session import joined_program
from m3ae_fast.training.metrics_log import read_metrics
from m3ae_fast.weights.open_model import RANDOM, open_model

SETTINGS = Path(__file__).with_name("settings.json")
CLIP_ART = Path("data/openclipart")  # out of distribution for all encoders


class Stopped(Exception):
    """Raised if a program was stopped before its end."""


@dataclass(frozen=True)
class Study:
    """Paths and settings of the study."""

    out: Path  # contains a folder and a result per encoder
    shards: Path  # see `lab.study.shards.prepare`
    settings: dict[str, Any]  # `train`: a config; `transfer`: sections of the settings for evaluation
    validation: bool = False  # whether the held-out samples are those for choosing settings

    @property
    def common(self) -> Encoder:
        train = self.settings["train"]
        return m3ae(train["model"]["emb_dim"], train["train"]["steps"])

    def result(self, encoder: Encoder) -> Path:
        return self.out / f"{encoder.name}.result.json"

    def done(self, encoder: Encoder) -> bool:
        return self.result(encoder).exists()

    def perform(self, encoder: Encoder) -> None:
        """Train and test an encoder.

        Raises:
            UserError: the encoder cannot be trained or tested.
            Stopped: the training was stopped.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        run, started = self.out / encoder.name, time.process_time()
        if encoder.trained:
            config = self.out / f"{encoder.name}.json"
            config.write_text(json.dumps(self._config(encoder), indent=1), encoding="utf-8")
            train.main(["--config", str(config), "--resume", "auto"])
            if not any(checkpoint.step_of(path) == encoder.steps for path in checkpoint.saved_steps(run)):
                raise Stopped
        trained = time.process_time()
        found = self._measure(encoder)
        times = {"train_cpu_s": trained - started, "measure_cpu_s": time.process_time() - trained}
        losses = self._losses(run) if encoder.trained else {}
        whole = {"encoder": asdict(encoder), "losses": losses, **times, "numbers": measure.numbers_of(found)}
        write_text_atomically(self.result(encoder), json.dumps(whole | {"correct": found.correct}) + "\n")

    def adopt(self, found: list[dict[str, Any]]) -> None:
        """Add results of an earlier call that are not in `out`."""
        self.out.mkdir(parents=True, exist_ok=True)
        for row in found:
            if not self.done(encoder := Encoder(**row["encoder"])):
                write_text_atomically(self.result(encoder), json.dumps(row) + "\n")

    def results(self, encoders: list[Encoder]) -> list[dict[str, Any]]:
        """Return the results of all complete encoders."""
        return [json.loads(self.result(each).read_text(encoding="utf-8")) for each in encoders if self.done(each)]

    def _measure(self, encoder: Encoder) -> EncoderResults:
        labels = json.loads((self.shards / LABELS).read_text(encoding="utf-8"))
        split, model = split_of(self.shards, encoder.seed, self.validation), self.settings["train"]["model"]
        if encoder.objective == "captions":
            return measure.captions_alone(split, labels, self._captions())
        heads = self._heads(encoder.width)
        with joined_program() as session:
            config = evaluation_of(self.shards, self.out, encoder.seed, self.settings["transfer"])
            if encoder.objective == "pixels":
                encode = measure.pixels(self.settings["pixels_side"], model["image_mean"], model["image_std"])
            else:
                name = str(self.out / encoder.name)
                if encoder.objective == "random":  # the network has the sizes of a trained encoder
                    name = f"{RANDOM}{self.out / m3ae(encoder.width, self.common.steps, encoder.seed).name}"
                text = encoder.objective == "m3ae"
                encode = measure.encoder(open_model(name, text=text, seed=encoder.seed).eval(), config, session)
            measuring = Measuring(encode, split, labels, config, heads, session)
            if encoder.images == "clothes":
                measuring.clothes()
                return measuring.found
            every = central(encoder, self.common.width, self.common.steps)
            bank, held_out = measuring.emoji(attentive=every and encoder.objective != "pixels")
            if encoder.objective == "m3ae":
                measuring.retrieval()
            if every:
                measuring.out_of_distribution(bank, held_out, {"clothes": measuring.clothes()})
            return measuring.found

    def _captions(self) -> dict[str, str]:
        """Return the captions of the emoji by key."""
        found = {}
        for path in sorted(self.shards.glob("emoji-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                        found[member.name.removesuffix(".txt")] = file.read().decode()
        return found

    def _losses(self, run: Path) -> dict[str, float]:
        last = next(line for line in reversed(read_metrics(run)) if "val_image_loss" in line)
        return {name: last[name] for name in measure.LOSSES if name in last}

    def _heads(self, width: int) -> int:
        model = self.settings["train"]["model"]
        return max(1, model["num_heads"] * width // model["emb_dim"])  # keeps the head dimension

    def _config(self, encoder: Encoder) -> dict[str, Any]:
        config = json.loads(json.dumps(self.settings["train"]))
        split, text = split_of(self.shards, encoder.seed, self.validation), encoder.text_ratio is not None
        kept = {} if encoder.caption_fraction == 1 else {"caption_fraction": encoder.caption_fraction}
        modality = {"modality": "auto" if text else "image"}
        if encoder.images == "clothes":
            train, val = clothes_to_train_on(self.shards), split.clothes[1]
        else:
            train, val = ([path for own in part.values() for path in own] for part in (split.train, split.test))
        config["run"] = {"dir": str(self.out / encoder.name), "seed": encoder.seed}
        config["model"] |= {"emb_dim": encoder.width, "num_heads": self._heads(encoder.width)}
        config["data"] |= {
            "train": [{"shards": [str(path) for path in train], **modality, **kept}],
            "val": [{"shards": [str(path) for path in val], **modality}],
        }
        config["train"] |= {"steps": encoder.steps}
        if text:
            config["masking"] = {"text_ratio": encoder.text_ratio}
        else:
            config["model"] |= {"vocab_size": 0}
            config["data"] |= {"tokenizer": None}
        return config


def split_of(shards: Path, seed: int, validation: bool) -> Split:
    """Return the shards for a seed. With `validation`, the shards for choosing settings replace the test shards."""
    held = FOLDS if validation else seed % FOLDS
    others = [part for part in range(PARTS) if part != held]
    train, test = (
        {vendor: [shards / f"emoji-{vendor}-{part}.tar" for part in parts] for vendor in VENDORS}
        for parts in (others, [held])
    )
    clothes = tuple([shards / f"fashion-{name}.tar"] for name in ("probe", "validation" if validation else TEST))
    out_of_distribution = {"clothes": clothes[1], "clip_art": sorted(CLIP_ART.glob("val-*.tar"))}
    return Split(train, test, (clothes[0], clothes[1]), out_of_distribution)


def clothes_to_train_on(shards: Path) -> list[Path]:
    """Return the shards of clothes for pre-training, which include those on which probes are trained."""
    return [shards / "fashion-probe.tar", shards / "fashion-images.tar"]


def evaluation_of(shards: Path, out: Path, seed: int, sections: dict[str, Any]) -> EvaluationConfig:
    """Return the settings of the probes."""
    # required by the config; the shards that are read are those of the split
    named = [str(shards / f"fashion-{TEST}.tar")]
    given = {"run": {"dir": str(out), "seed": seed}, "data": {"train": [{"shards": named}]}}
    return evaluation_config(given | sections, [])
