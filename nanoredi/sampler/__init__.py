"""Prompts to completions: continuous batching over a paged key-value cache."""
