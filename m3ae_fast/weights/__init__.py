"""Import and export of weights, and opening of models."""
