"""A model, or another engine's file, to the rows of a table."""
