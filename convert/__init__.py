"""Transforms that change what attention computes or shares (none yet)."""
