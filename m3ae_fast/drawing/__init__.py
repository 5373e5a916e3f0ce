"""Pictures of what a model sees and does."""
