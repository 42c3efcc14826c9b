"""What reattend knows of each model family, and a model described by it."""
