"""Softmax that is stretched and clipped, so that heads can look at nothing."""
