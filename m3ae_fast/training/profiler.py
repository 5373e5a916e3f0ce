"""--profile: a torch profiler trace of a few steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

# numbers of steps: for compilation and warm-up, for starting the profiler, and for recording
WAIT, WARMUP, ACTIVE = 4, 1, 3
TRACE_FILE = "trace.json.gz"

_log = logging.getLogger(__name__)


def profiler(run_dir: Path | None) -> AbstractContextManager[torch.profiler.profile | None]:
    """Return a context manager that yields a profiler and writes run_dir/trace.json.gz. The profiler's `step()` must be
    called after every step. Without `run_dir`, the context manager yields None."""
    if run_dir is None:
        return nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=lambda profile: _write(profile, run_dir / TRACE_FILE),
        record_shapes=True,
    )


def _write(profile: torch.profiler.profile, path: Path) -> None:
    """Write the trace. If that fails, the run continues without it."""
    try:
        profile.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        _log.warning("--profile: %s cannot be written (%s)", path, error)
        if path.is_file():
            path.unlink()
