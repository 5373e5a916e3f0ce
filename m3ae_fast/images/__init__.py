"""Bytes of an image file -> pixels of the size and value range that the model sees."""
