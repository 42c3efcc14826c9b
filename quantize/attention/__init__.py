"""Which layers run quantised attention."""
