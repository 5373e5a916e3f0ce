"""Labelled datasets from package registries, as shards. They are large enough to detect significant differences."""
