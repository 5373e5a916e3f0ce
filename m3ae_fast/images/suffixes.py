"""Which files count as images, by their suffixes."""

from __future__ import annotations

# if a sample of a shard has several images, the one whose suffix comes first is used
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "npy")
MASK_SUFFIX = "mask.png"
_ENDS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


def is_image(path: str) -> bool:
    """Return whether a file counts as an image; its suffix may be in upper or lower case."""
    return path.lower().endswith(_ENDS)


def listed_suffixes() -> str:
    """Return the suffixes of images, for messages."""
    return ", ".join(IMAGE_SUFFIXES)
