"""What serving engines load, so that portable models need no code from their repository. See docs/serving.md."""
