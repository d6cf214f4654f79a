"""From rows to packed batches: raw traces, chat templates, token sequences, and the micro-batches of an optimiser step."""

from nanoredi.data.sequences import load_pairs, load_sft

__all__ = ["load_pairs", "load_sft"]
