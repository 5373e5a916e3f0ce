"""An encoder with a classification head, and its storage in a folder.

Shapes: S samples, D width, K classes.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import read_tensors
from m3ae_fast.base.untrusted_file import read_json
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.config import POOLINGS, ModelConfig, Pool, Section, parse
from m3ae_fast.heads.modules import FineTuneHead, LinearProbeHead
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.pretrained import build
from m3ae_fast.weights.model_name import CLASSIFIER_HELP

MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE = "classifier.safetensors", "classifier.json", "tokenizer.json"
Head = Literal["linear", "logistic", "logistic_of_lists", "finetune"]
OF_LISTS: Head = "logistic_of_lists"
HEADS: dict[Head, type[nn.Module]] = {
    "linear": LinearProbeHead,
    "logistic": LinearProbeHead,
    "logistic_of_lists": LinearProbeHead,
    "finetune": FineTuneHead,
}


class ClassifierConfig(Section):
    """The config of a saved classifier."""

    model: ModelConfig
    """Config of the encoder."""
    head: Head
    """The task that trained the head. logistic_of_lists: the task logistic, with lists of labels. The logits of a
    sample are then those of independent classes, of which any number may be present."""
    pool: Pool
    """Pooling of the features that the head reads."""
    modality: Literal["image", "text", "paired"]
    """Modalities of each sample that are passed to the encoder."""
    classes: list[int | str]
    """Labels by class id."""


def read_config(folder: str | Path) -> ClassifierConfig:
    """Return the config of the classifier saved in `folder`. Raises UserError if there is no classifier."""
    path = Path(folder) / CONFIG_FILE
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a classifier ({error}); specify {CLASSIFIER_HELP}") from None
    return parse(ClassifierConfig, data, str(path))


class Classifier(nn.Module):
    """An encoder with a classification head. `forward(batch)` maps an unmasked batch to logits [S, K]."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MultimodalEncoder(config.model)
        width = POOLINGS[config.pool].vectors * config.model.emb_dim
        self.head = HEADS[config.head](width, len(config.classes))

    def features(self, batch: PackedBatch) -> Tensor:
        """Return the features that the head reads, [S, D] with at least float32 precision, for an unmasked batch on the
        model's device."""
        return self.backbone.pooled(batch, self.config.pool)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the logits, [S, K], for an unmasked batch on the model's device."""
        # with ZeRO in bf16, the weights of the head are bf16, but pooled features are float32
        return self.head(self.features(batch).to(next(self.head.parameters()).dtype))

    def load_backbone(self, model: MultimodalEncoder) -> None:
        """Copy the encoder's weights from a model with the same dimensions, and use its tokenizer."""
        names = self.backbone.state_dict().keys()
        self.backbone.load_state_dict({name: t for name, t in model.state_dict().items() if name in names})
        self.backbone.tokenizer = model.tokenizer

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write classifier.json, classifier.safetensors and, if there is a tokenizer, tokenizer.json to `folder`, which
        is created if it does not exist. `weights`: float32 weights by name that replace those of the module. Raises
        UserError if a file cannot be written; earlier files of these names are then unchanged."""
        folder = Path(folder)
        state = self.state_dict() if weights is None else self.state_dict() | weights
        with ExitStack() as files:  # the files are put in place after all of them have been written
            try:
                if self.backbone.tokenizer is not None:
                    self.backbone.tokenizer.save(files.enter_context(atomic_write(folder / TOKENIZER_FILE)))
                config = files.enter_context(atomic_write(folder / CONFIG_FILE))
                config.write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
                model = files.enter_context(atomic_write(folder / MODEL_FILE))
                save_file({name: t.cpu().contiguous() for name, t in state.items()}, model)
                shutil.copymode(config, model)  # safetensors makes the weights unreadable for other users
            except SafetensorError as error:
                raise UserError(f"{folder / MODEL_FILE}: cannot be written ({error})") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Classifier:
        """Load a classifier written by `save_pretrained`, on the CPU. Raises UserError if a file is missing or
        damaged."""
        folder = Path(folder)
        config = read_config(folder)
        try:
            state = read_tensors(folder / MODEL_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / MODEL_FILE}: cannot be read ({error}); train the classifier again") from None
        model = build(lambda: cls(config), state, str(folder))
        if (folder / TOKENIZER_FILE).exists() and model.config.model.vocab_size:
            sizes = model.config.model
            model.backbone.tokenizer = load_tokenizer(str(folder / TOKENIZER_FILE), sizes.text_length, sizes.vocab_size)
        return model
