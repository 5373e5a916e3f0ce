"""The frozen VQGAN whose token ids may be the targets of masked patches."""
