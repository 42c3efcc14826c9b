"""Texts: read them, cut them into token windows, and tell whether two of them overlap."""
