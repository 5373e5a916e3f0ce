"""Recognises captions, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def captions_of(value: Any) -> list[str]:
    """Return the captions of a value: of a text one, of a list of texts those that are not blank, of None and NaN none.
    Raises ValueError where it is something else, or bytes that are not UTF-8."""
    if _is_none(value):
        return []
    if isinstance(value, (str, bytes)):
        return [_text(value)]
    if isinstance(value, np.ndarray):
        value = np.atleast_1d(value).tolist()
    if not isinstance(value, Sequence):
        raise ValueError(f"is {_kind(value)}, not text or a list of texts")
    for item in value:
        if not isinstance(item, (str, bytes)) and not _is_none(item):
            raise ValueError(f"is a list with {_kind(item)} in it, not text or a list of texts")
    texts = [_text(item) for item in value if not _is_none(item)]
    return [text for text in texts if text.strip()]


def count_samples(value: Any) -> int:
    """Return how many samples a row with these captions gives: at least one, also where they are refused."""
    try:
        return max(1, len(captions_of(value)))
    except ValueError:
        return 1


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _text(value: str | bytes) -> str:
    """Raise ValueError where it is no Unicode."""
    try:
        return value.encode().decode() if isinstance(value, str) else value.decode()
    except UnicodeError:
        raise ValueError("is not UTF-8") from None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} ({str(value)[:60]!r})"
