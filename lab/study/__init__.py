"""The paper's study at a small size: what text gives a masked autoencoder's representation."""
