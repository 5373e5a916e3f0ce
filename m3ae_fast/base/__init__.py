"""Foundations that all other packages use: errors, files, progress, the environment, the hardware."""
