"""Optimiser steps with plain torch or with DeepSpeed and ZeRO, learning rates, and losses on held-out samples."""
