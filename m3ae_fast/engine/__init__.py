"""Optimiser steps: torch or DeepSpeed with ZeRO, learning rate, evaluation."""
