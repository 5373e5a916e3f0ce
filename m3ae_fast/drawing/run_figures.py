"""Figures of a run or of an exported model: reconstructions and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.atomic_file import require_writable
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import MODEL_FILE, TOKENIZER_FILE
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.config import Config, SourceConfig, parse
from m3ae_fast.config.arguments import accepts, chosen_layers
from m3ae_fast.data import Corpus, Preparation, ShardStore, eval_samples, open_corpus, open_tokenizer
from m3ae_fast.data.untrusted_sources import require_harmless
from m3ae_fast.drawing.attention import draw_attention, draw_patch_attention
from m3ae_fast.drawing.options import AttentionOptions, DrawOptions, ReconstructionsOptions
from m3ae_fast.drawing.reconstructions import can_draw, draw_run
from m3ae_fast.model.pretrained import Pretrained, is_encoder, read_pretrained
from m3ae_fast.weights.open_model import is_run, open_model

_SEARCHED = 2000  # maximum number of samples that are searched for a word


class _Source(NamedTuple):
    """A model, and the samples that are shown in a figure."""

    weights: Callable[[], dict[str, Tensor]]  # reads the model's weights
    config: Config
    corpus: Corpus
    figure: Path  # the file to write


@accepts(ReconstructionsOptions)
def reconstructions(run: str | Path, **options: Any) -> Path:
    """Plot samples, their masked input and the model's reconstruction, and return the path of the figure.

    Args:
        run: a run folder (its last checkpoint), a checkpoint, or an export, which requires `val` and `out`.
        options: the fields of `ReconstructionsOptions`.

    Raises:
        UserError: there is no checkpoint and no export, the export cannot reconstruct images, an argument is invalid,
            no sample can be used, or the figure cannot be written.
    """
    given = ReconstructionsOptions(run=run, **options)
    source = _open(given, "reconstructions.png")
    weights = source.weights()
    if is_encoder(weights):
        raise UserError(f"{run}: contains no decoder, so it cannot reconstruct images")
    if not can_draw(source.config.model):
        raise UserError(f"{run}: predicts features of a teacher, which cannot be drawn; use m3ae-fast draw attention")
    tokenizer = open_tokenizer(source.config.data, source.config.model)
    shown = source.config, weights, source.corpus, tokenizer, source.figure, given.pictures, [*given.ratios]
    if not draw_run(*shown, source=str(run)):
        raise UserError("none of the samples can be used; m3ae-fast shards stats SHARDS prints the reasons")
    return source.figure


@accepts(AttentionOptions)
def attention(run: str | Path, **options: Any) -> Path:
    """Plot the attention of tokens over the patches, or of a patch over the words, and return the path of the figure.

    Args:
        run: as in `reconstructions`.
        options: the fields of `AttentionOptions`.

    Raises:
        UserError: the checkpoint, the word, the patch or a block does not exist, an argument is invalid, or the figure
            cannot be written.
    """
    given = AttentionOptions(run=run, **options)
    source = _open(given, "attention.png")
    config, path = source.config, source.figure
    blocks, channels = (
        [layer - 1 for layer in chosen_layers(given.layers, config.model.depth)],
        config.data.show_channels,
    )
    if given.patch is not None and max(given.patch) >= (side := config.model.longest_side):
        raise UserError(f"patch {given.patch[0]},{given.patch[1]}: must be from 0,0 to {side - 1},{side - 1}")
    text = bool(config.model.vocab_size) or given.patch is not None
    model = open_model(str(run), text=text, tokenizer=config.data.tokenizer).eval()
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, config.run.seed)
    samples = eval_samples(source.corpus, preparation, _SEARCHED if given.word else given.pictures)
    if given.patch is not None:
        draw_patch_attention(model, samples, path, given.pictures, given.patch, blocks, channels)
    else:
        draw_attention(model, samples, path, given.pictures, given.word, blocks, channels)
    return path


def _open(given: DrawOptions, default: str) -> _Source:
    """Open a run's checkpoint or an export, and the samples. `default`: name of the figure in the folder `run` if there
    is no `out`. Raises UserError if opening the samples requires `trust`, if `val` or `out` is missing for an export,
    or if the figure cannot be written."""
    run, folder, shards = given.run, Path(given.run), given.val
    if not is_run(folder) and (folder / MODEL_FILE).is_file():
        if not shards or given.out is None:
            raise UserError(f"{run}: is an exported model: specify samples with --val, and the figure with --out")
        require_writable(given.out)
        found = read_pretrained(folder)
        config = _config_of_export(found, folder, shards)
        corpus = open_corpus(config.data.train, ShardStore(), progress=True)
        return _Source(lambda: found.state, config, corpus, given.out)
    path = checkpoint.locate(folder)
    figure = given.out or folder / default
    require_writable(figure)
    config = parse(Config, checkpoint.read_info(path).config, f"checkpoint {path}")
    sources, store = _shown(config, shards, given.trust, f"checkpoint {path}")
    # the last weights and not their moving average, because the logged losses are computed with the last weights
    corpus = open_corpus(sources, store, progress=True)
    return _Source(lambda: checkpoint.read_weights(path, average=False), config, corpus, figure)


def _config_of_export(found: Pretrained, folder: Path, shards: Sequence[str]) -> Config:
    """Return the config of a run with default settings that has the model and the tokenizer of an export. Raises
    UserError if the model predicts ids of an image tokenizer, because an export does not contain this tokenizer."""
    if found.config.image_targets == "vqgan":
        raise UserError(f"{folder}: predicts ids of an image tokenizer, which is not part of an export; draw its run")
    data: dict[str, Any] = {"train": [{"shards": list(shards)}]}
    if found.tokenizer is not None:
        data["tokenizer"] = str(folder / TOKENIZER_FILE)
    model = found.config.model_dump(mode="json", exclude={"init_from"})
    loss: dict[str, Any] = {"norm_pix": bool(found.norm_pix)}
    if found.config.image_targets == "features":
        loss["teacher"] = "not part of an export"  # figures do not need the teacher
    content = {"model": model, "loss": loss, "data": data, "train": {"steps": 1}}
    return parse(Config, content, str(folder))


def _shown(config: Config, shards: Sequence[str], trust: bool, where: str) -> tuple[list[SourceConfig], ShardStore]:
    sources = config.data.val or config.data.train
    if shards:
        return [sources[0].model_copy(update={"shards": list(shards), "caption_fraction": 1.0})], ShardStore()
    if not trust:
        require_harmless(sources, config.data.cache_dir, where)
    return sources, ShardStore(config.data.cache_dir, config.data.cache_gb)
