"""Calibration: tokens through a model one layer at a time, and streamed second moments at named points."""
