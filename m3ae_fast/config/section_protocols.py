"""The sections of a config that the engine and the training loop read."""

from __future__ import annotations

from typing import Protocol

from m3ae_fast.config.settings import DeepSpeedConfig, OptimConfig, RunConfig, TrainConfig


class TrainingSections(Protocol):
    """A config with these sections, such as that of pre-training or of fine-tuning."""

    @property
    def run(self) -> RunConfig:
        """Return the settings of the run folder and the log."""

    @property
    def optim(self) -> OptimConfig:
        """Return the settings of the optimiser."""

    @property
    def train(self) -> TrainConfig:
        """Return the settings of the training loop."""

    @property
    def deepspeed(self) -> DeepSpeedConfig | None:
        """Return the settings of DeepSpeed; None: plain torch."""
