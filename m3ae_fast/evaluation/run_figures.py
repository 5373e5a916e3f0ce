"""Figures of a run or of an exported model: reconstructions and attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import MODEL_FILE, TOKENIZER_FILE
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.config import Config, ModelConfig, SourceConfig, parse
from m3ae_fast.data import Corpus, Preparation, ShardStore, eval_samples, open_corpus, open_tokenizer
from m3ae_fast.data.untrusted_sources import require_harmless
from m3ae_fast.drawing.attention import draw_attention, draw_patch_attention
from m3ae_fast.drawing.reconstructions import can_draw, draw_run
from m3ae_fast.model.pretrained import Pretrained, is_encoder, read_pretrained
from m3ae_fast.weights.open_model import is_run, open_model

PICTURES = 12  # default number of samples in a figure
_SEARCHED = 2000  # maximum number of samples that are searched for a word


class _Source(NamedTuple):
    """A model, and the samples that are shown in figures."""

    weights: Callable[[], dict[str, Tensor]]  # reads the model's weights
    config: Config
    corpus: Corpus


def reconstructions(
    run: str | Path,
    out: str | Path | None = None,
    *,
    pictures: int = PICTURES,
    ratios: Sequence[float] = (),
    shards: Sequence[str] = (),
    trust: bool = False,
) -> Path:
    """Plot samples, their masked input and the model's reconstruction, and return the path of the figure.

    Args:
        run: a run folder (its last checkpoint), a checkpoint, or an export, which requires `shards` and `out`.
        out: .png file to write; None: reconstructions.png in `run`.
        pictures: number of samples.
        ratios: mask ratios of the image; empty: the mask ratio of the run. For an export, the masks are those of a run
            with the default settings.
        shards: shards of the samples; empty: the shards in the run's data.val or, without it, data.train.
        trust: whether to open all shards named in the run's config, including `pipe:` shards, which execute commands.

    Raises:
        UserError: there is no checkpoint and no export, the export cannot reconstruct images, an argument is invalid,
            or no sample can be used.
    """
    _check_pictures(pictures)
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise UserError(f"--ratios {' '.join(map('{:g}'.format, ratios))}: must be from 0 to 1")
    source = _open(run, out, shards, trust)
    weights = source.weights()
    if is_encoder(weights):
        raise UserError(f"{run}: contains no decoder, so it cannot reconstruct images")
    if not can_draw(source.config.model):
        raise UserError(f"{run}: predicts features of a teacher, which cannot be drawn; use m3ae-fast draw attention")
    tokenizer = open_tokenizer(source.config.data, source.config.model)
    path = _path(run, out, "reconstructions")
    if not draw_run(source.config, weights, source.corpus, tokenizer, path, pictures, list(ratios)):
        raise UserError("none of the samples can be used; m3ae-fast shards stats SHARDS prints the reasons")
    return path


def attention(
    run: str | Path,
    out: str | Path | None = None,
    *,
    pictures: int = PICTURES,
    word: str | None = None,
    patch: str | tuple[int, int] | None = None,
    layer: int | None = None,
    shards: Sequence[str] = (),
    trust: bool = False,
) -> Path:
    """Plot the attention of tokens over the patches, or of a patch over the words, and return the path of the figure.

    Args:
        run, out, pictures, shards, trust: as in `reconstructions`.
        word: word whose attention is shown; None: the first words of each caption.
        patch: row and column, from 0, of a patch whose attention over the words is shown instead; None: no patch.
        layer: number of the encoder block, from 1; None: the last one.

    Raises:
        UserError: the checkpoint, word, patch or layer does not exist.
    """
    _check_pictures(pictures)
    if word is not None and patch is not None:
        raise UserError("--word and --patch draw different figures; use only one of them")
    source = _open(run, out, shards, trust)
    config, path = source.config, _path(run, out, "attention")
    block, place = block_of(config.model, layer), _patch(patch, config.model)
    text = bool(config.model.vocab_size) or place is not None
    model = open_model(str(run), text=text, tokenizer=config.data.tokenizer).eval()
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, config.run.seed)
    samples = eval_samples(source.corpus, preparation, _SEARCHED if word else pictures)
    if place:
        draw_patch_attention(model, samples, path, pictures, place, block, config.data.show_channels)
    else:
        draw_attention(model, samples, path, pictures, word, block, config.data.show_channels)
    return path


def _open(run: str | Path, out: str | Path | None, shards: Sequence[str], trust: bool) -> _Source:
    """Open a run's checkpoint and its samples, or the samples in `shards`; or open an export and the samples in
    `shards`. Raises UserError if opening the samples requires `trust`, or if an export has no `shards` or no `out`."""
    folder = Path(run)
    if not is_run(folder) and (folder / MODEL_FILE).is_file():
        if not shards or out is None:
            raise UserError(f"{run}: is an exported model: specify samples with --val, and the figure with --out")
        found = read_pretrained(folder)
        config = _config_of_export(found, folder, shards)
        return _Source(lambda: found.state, config, open_corpus(config.data.train, ShardStore(), progress=True))
    path = checkpoint.locate(folder)
    config = parse(Config, checkpoint.read_info(path).config, f"checkpoint {path}")
    sources, store = _shown(config, shards, trust, f"checkpoint {path}")
    # the last weights and not their moving average, because the logged losses are computed with the last weights
    return _Source(
        lambda: checkpoint.read_weights(path, average=False), config, open_corpus(sources, store, progress=True)
    )


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
        loss["teacher"] = "not part of an export"  # figures do not need it
    content = {"model": model, "loss": loss, "data": data, "train": {"steps": 1}}
    return parse(Config, content, str(folder))


def _shown(config: Config, shards: Sequence[str], trust: bool, where: str) -> tuple[list[SourceConfig], ShardStore]:
    sources = config.data.val or config.data.train
    if shards:
        return [sources[0].model_copy(update={"shards": list(shards), "caption_fraction": 1.0})], ShardStore()
    if not trust:
        require_harmless(sources, config.data.cache_dir, where)
    return sources, ShardStore(config.data.cache_dir, config.data.cache_gb)


def _path(run: str | Path, out: str | Path | None, name: str) -> Path:
    return Path(run) / f"{name}.png" if out is None else Path(out)


def _check_pictures(pictures: int) -> None:
    if pictures < 1:
        raise UserError(f"--pictures {pictures}: must be 1 or more")


def block_of(model: ModelConfig, layer: int | None) -> int:
    """Return the number of an encoder block, from 0, for a number from 1; None: the last block. Raises UserError if the
    model has no such block."""
    if layer is not None and not 1 <= layer <= model.depth:
        raise UserError(f"--layer {layer}: must be from 1 to {model.depth}")
    return (layer or model.depth) - 1


def _patch(given: str | tuple[int, int] | None, model: ModelConfig) -> tuple[int, int] | None:
    """Return the row and the column of the requested patch, from 0. Raises UserError if the model has no such patch."""
    if given is None:
        return None
    side, text = model.longest_side, given if isinstance(given, str) else ",".join(map(str, given))
    found = re.fullmatch(r"(\d{1,5}),(\d{1,5})", text)
    if not found or max(place := (int(found[1]), int(found[2]))) >= side:
        raise UserError(f"--patch {text}: must be ROW,COLUMN, from 0,0 to {side - 1},{side - 1}")
    return place
