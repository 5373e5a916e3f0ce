"""What every other package builds on: errors, files, progress, the environment, the hardware."""
