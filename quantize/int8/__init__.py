"""LLM.int8()-style weights: symmetric codes per output channel."""
