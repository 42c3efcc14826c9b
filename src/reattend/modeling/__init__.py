"""Converted checkpoints as running models."""
