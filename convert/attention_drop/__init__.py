"""Layers without attention."""
