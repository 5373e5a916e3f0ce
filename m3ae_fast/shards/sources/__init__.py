"""Sources of shards: folders, HDF5 files, Hugging Face datasets, tables of captions."""
