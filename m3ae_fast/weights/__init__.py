"""Folders of weights: written, read, described, and exchanged with the Hugging Face hub."""
