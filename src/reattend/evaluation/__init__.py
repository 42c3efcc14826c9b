"""Measurements of a model: perplexity, divergence from a base, agreement."""
