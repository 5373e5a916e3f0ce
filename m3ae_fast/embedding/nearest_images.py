"""The images of a folder that are most similar to an image.

Shapes: N images, D width of the features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m3ae_fast.base.atomic_file import require_writable
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import prepare_image
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.arguments import accepts
from m3ae_fast.drawing.figures import Cell, draw_sheet, levels
from m3ae_fast.embedding.features import embed, images_in
from m3ae_fast.embedding.neighbours_options import NeighboursOptions
from m3ae_fast.evaluation.image_features import input_of_files
from m3ae_fast.evaluation.library_features import open_fixed_features
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.launchers import is_first_rank
from m3ae_fast.weights.model_name import is_network
from m3ae_fast.weights.open_model import load_model

_COLUMNS = 6  # images in a row of the figure


class Neighbour(NamedTuple):
    """An image of the folder, and its similarity to the given image."""

    path: str
    similarity: float  # cosine similarity of the centred features, from -1 to 1


@accepts(NeighboursOptions)
def neighbours(
    model: str | os.PathLike[str], image: str | os.PathLike[str], folder: str | os.PathLike[str], **options: Any
) -> list[Neighbour]:
    """Return the images of a folder that are most similar to an image, the most similar first. The mean of the features
    over the folder is subtracted first, because what is common to all images does not distinguish them.

    Args:
        model: the name of a model (see `NeighboursOptions.model`).
        image: path of the image.
        folder: folder whose images are searched, including those in sub-folders. The image itself is left out.
        options: the fields of `NeighboursOptions`.

    Raises:
        UserError: the model, the image or an option cannot be used, or the folder contains no other image.
    """
    given = NeighboursOptions(model=model, image=image, folder=folder, **options)
    if not os.path.isdir(given.folder):
        raise UserError(f"{given.folder}: is not a folder; specify a folder of images")
    paths = [path for path in images_in(given.folder) if not _same(path, given.image)]
    if not paths:
        raise UserError(f"{given.folder}: contains no images other than {given.image}")
    if given.out is not None and is_first_rank():
        require_writable(given.out)
    opened: MultimodalEncoder
    if is_network(given.model):
        opened = load_model(given.model)
    else:
        opened = open_fixed_features(given.model, input_of_files([given.image, *paths]))
    _checked(given.image, opened.config)
    found = embed(opened, [given.image, *paths], overrides=given.all_overrides, device=given.device)
    keys, features_ND = found["keys"].tolist(), torch.from_numpy(found["features"]).double()
    nearest = most_similar(keys[1:], features_ND[0], features_ND[1:], given.pictures)
    if given.out is not None and is_first_rank():
        _draw(given.out, given.image, nearest, opened.config)
    return nearest


def most_similar(keys: Sequence[str], query_D: torch.Tensor, features_ND: torch.Tensor, count: int) -> list[Neighbour]:
    """Return the `count` rows of `features_ND` with the highest cosine similarity to `query_D`, after the mean of all
    rows has been subtracted."""
    mean_D = features_ND.mean(0)
    similarity_N = torch.nn.functional.cosine_similarity(features_ND - mean_D, (query_D - mean_D)[None])
    best = similarity_N.sort(descending=True, stable=True)
    order = zip(best.indices[:count].tolist(), best.values[:count].tolist())
    return [Neighbour(keys[number], similarity) for number, similarity in order]


def _same(path: str, other: str) -> bool:
    return os.path.exists(other) and os.path.samefile(path, other)


def _checked(image: str, config: ModelConfig) -> None:
    """Raise UserError if an image cannot be read; `embed` would leave it out."""
    try:
        prepare_image(image, config)
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith(image) else f"{image}: {error}") from None


def _draw(out: Path, image: str, found: Sequence[Neighbour], config: ModelConfig) -> None:
    def cell(path: str, text: str) -> Cell:
        return Cell(levels(prepare_image(path, config), config), text)

    cells = [cell(path, f"{similarity:.2f} {os.path.basename(path)}") for path, similarity in found]
    rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    draw_sheet(out, [[cell(image, os.path.basename(image))], *rows])
