"""Gates on the output of attention heads."""
