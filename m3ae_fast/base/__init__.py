"""Foundations that all other packages use: errors, files, progress, random numbers, the environment, the hardware."""
