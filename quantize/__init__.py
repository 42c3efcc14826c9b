"""Transforms that change how numbers are stored or multiplied."""
