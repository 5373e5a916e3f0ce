"""Access to the Hugging Face Hub: a quick check that it responds, and the download and upload of folders with weights,
whose names have the form owner/name."""

from __future__ import annotations

import re
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.output_folder import FILES

PATIENCE = 12.0  # seconds to wait for a response; the library itself would retry for over a minute


def hub_answers(name: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Return whether the Hub responds to a request for `name`. A response that `name` does not exist counts too."""
    answers: SimpleQueue[bool] = SimpleQueue()

    def ask() -> None:
        try:
            huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
        except (HfHubHTTPError, HFValidationError):
            answers.put(True)
        except Exception:  # any error of the library's HTTP client
            answers.put(False)
        else:
            answers.put(True)

    # The request's timeout applies to each IP address of the Hub, and does not cover the DNS look-up.
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PATIENCE)
    except Empty:
        return False


def is_hub_name(name: str) -> bool:
    """Return whether a string has the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def find_folder(source: str | Path) -> Path:
    """Return `source` if it is an existing path; otherwise download the model of that name from the Hub and return its
    folder. Raises UserError if `source` is neither a path nor a model on the Hub, or if the Hub does not respond and
    there is no copy from an earlier download."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_name(str(source)):
        raise UserError(
            f"{source}: no such file or folder; specify an export, a model on the Hub as owner/name, or, where timm "
            "models are accepted, timm:NAME"
        )
    try:
        cached, files = not hub_answers(str(source)), list(FILES)
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=files, local_files_only=cached))
    except Exception as error:  # errors of the library, its HTTP client or the disk
        raise UserError(f"{source}: no such file or folder, and {_reason(error)}") from None


def push_folder(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload a folder as the model `name`, which is created if it does not exist, and return its address. Raises
    UserError if the user is not logged in, the name is taken or invalid, or the Hub does not respond."""
    if huggingface_hub.get_token() is None:
        raise UserError(f"{name}: uploading requires a Hub token; run `hf auth login`, or set HF_TOKEN")
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload M3AE")
        return str(url)
    except Exception as error:
        raise UserError(f"{name}: cannot be uploaded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such model, or it is private: run `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub does not respond, and there is no copy from an earlier download"
    text = " ".join(str(error).split())[:200]
    if isinstance(error, HFValidationError):
        return f"the Hub does not allow this name ({text})"
    return (
        f"the Hub refuses the request ({text})"
        if isinstance(error, HfHubHTTPError)
        else f"the Hub cannot be reached ({text})"
    )
