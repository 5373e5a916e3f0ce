"""Features of a dataset by a frozen encoder, heads that are trained on them, and their predictions."""
