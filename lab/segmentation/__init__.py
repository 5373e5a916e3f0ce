"""Segmentation of drawings on other drawings, with exact masks: what pre-training adds to the features of patches."""
