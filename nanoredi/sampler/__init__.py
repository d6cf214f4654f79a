"""Prompts to completions: continuous batching over a paged key-value cache."""

from nanoredi.sampler.sampler import Sampler

__all__ = ["Sampler"]
