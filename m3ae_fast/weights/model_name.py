"""Names of models on the command line. This module does not import torch, so that `--help` is fast."""

from m3ae_fast.base.errors import UserError

TIMM = "timm:"  # prefix of the name of a timm model
TRANSFORMERS = "transformers:"  # prefix of the name of a model of transformers
LIBRARIES = (TIMM, TRANSFORMERS)  # prefixes of the names of vision models of other libraries
LOCAL_DIR = "local-dir:"  # prefix of the path of a folder that timm has written
TIMM_SOURCES = (LOCAL_DIR, "hf-hub:")  # timm's own prefixes, which follow "timm:"
RANDOM = "random:"  # with this prefix, the name of a model denotes the same network with random weights
PIXELS, HISTOGRAM, HOG = "pixels", "histogram", "hog"
# display names of the features that are computed from the images without a network, by name on the command line
IMAGE_FEATURES = {PIXELS: "downscaled pixels", HISTOGRAM: "colour histogram", HOG: "HOG"}
MODEL_HELP = (
    "a run folder (its last checkpoint is used, with the averaged weights if train.ema is set), a checkpoint, an "
    "export folder, a name on the Hub, or random:MODEL for the same network with random weights"
)
LIBRARY_HELP = (
    "timm:NAME for a timm model, timm:NAME=FILE for its weights in a file, or transformers:NAME for a model of "
    "transformers; NAME@SIDE is for images of SIDE x SIDE pixels"
)
FEATURES_HELP = (  # what `compare` also accepts
    f"an .npz file of features (keys, features and, optionally, shards, as written by embed), or {LIBRARY_HELP}"
)
CLASSIFIER_HELP = "the OUT folder of a logistic, linear or finetune task"

_LARGEST = 4096  # maximum side of the images in pixels


def is_network(model: str) -> bool:
    """Return whether a name denotes an M3AE, which has layers, poolings and patch tokens. The result is False for
    models of other libraries and for features without a network, which have one vector for each image."""
    return model not in IMAGE_FEATURES and not model.startswith(LIBRARIES)


def split_side(own: str, where: str) -> tuple[str, int | None]:
    """Split NAME@SIDE into NAME and SIDE, which is None for a NAME alone. Raises UserError, whose message begins with
    `where`, if the side is not a possible size of images."""
    before, _, size = own.rpartition("@")
    if not before or not size.isdecimal():
        return own, None
    if not 0 < int(size) <= _LARGEST:
        raise UserError(f"{where}: the size of the images, {int(size)} pixels, must be from 1 to {_LARGEST:,}")
    return before, int(size)
