"""Labelled data that package clients download, as shards: large enough to tell effects from chance."""
