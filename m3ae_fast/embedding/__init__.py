"""Features of shards and images as arrays or tables, and the images with similar features: `embed` and `neighbours`."""
