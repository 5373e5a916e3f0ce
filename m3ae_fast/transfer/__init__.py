"""What a pre-trained representation is worth: downstream tasks on its features or from its weights."""
