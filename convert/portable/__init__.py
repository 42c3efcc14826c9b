"""The portable model as a target: what its config says of a source, and the code that goes along."""
