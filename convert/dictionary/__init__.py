"""Attention weights of several layers from shared parts and low-rank factors."""
