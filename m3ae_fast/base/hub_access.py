"""Asks whether the Hugging Face hub can be reached, within seconds: its library tries for over a minute."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal

PATIENCE = 12.0  # seconds


def hub_answers(name: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Return whether the hub responds to a request for a name, even if only to report that it does not exist."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    answers: SimpleQueue[bool] = SimpleQueue()

    def ask() -> None:
        try:
            huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
        except (HfHubHTTPError, HFValidationError):
            answers.put(True)
        except Exception:  # of the library's HTTP client
            answers.put(False)
        else:
            answers.put(True)

    # the timeout is for each address that the hub's name has, and not for looking the name up
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PATIENCE)
    except Empty:
        return False
