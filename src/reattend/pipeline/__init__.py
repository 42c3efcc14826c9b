"""plan, apply and verify: recipes run over checkpoints."""
