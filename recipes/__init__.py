"""Recipes: the schema, the table of steps, and the built-in YAML files."""
