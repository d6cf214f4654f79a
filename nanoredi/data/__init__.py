"""From rows to packed batches: raw traces, chat templates, token sequences, and an optimiser step's micro-batches."""

from nanoredi.data.sequences import load_pairs, load_sft

__all__ = ["load_pairs", "load_sft"]
