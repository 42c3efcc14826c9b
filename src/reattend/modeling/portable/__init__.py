"""The portable models: code that is copied into an output and runs there with transformers alone."""
