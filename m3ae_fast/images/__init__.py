"""Image decoding: from the bytes of an image file to pixels of the model's size and value range."""
