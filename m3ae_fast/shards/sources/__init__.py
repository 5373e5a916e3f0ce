"""What shards can be made of: folders, HDF5 files, data sets of Hugging Face, tables of captions."""
