"""Checkpoints as names and bytes: headers, files, layout, staged output. Knows no transform."""
