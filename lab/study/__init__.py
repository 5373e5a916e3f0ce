"""The paper's study at a small scale: the effect of text on the representation of a masked autoencoder."""
