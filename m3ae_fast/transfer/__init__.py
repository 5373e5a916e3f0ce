"""What a representation is worth: tasks on a trained model. `python -m m3ae_fast.transfer --help` lists them."""
