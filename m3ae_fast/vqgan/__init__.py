"""The frozen VQGAN whose token ids may be what masked patches are predicted as."""
