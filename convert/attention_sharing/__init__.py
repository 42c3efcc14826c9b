"""Layers that attend with the queries and keys of an earlier one."""
