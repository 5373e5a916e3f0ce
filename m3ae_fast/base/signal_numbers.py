"""The signals that ask a run to save and stop."""

from __future__ import annotations

import signal

# SLURM can announce the end of a job's time limit with SIGUSR1; SIGHUP is sent when a terminal closes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
