"""Rows in, packed batches out: raw traces, the chat template, token sequences, an optimiser step's micro-batches."""

from nanoredi.data.sequences import load_pairs, load_sft

__all__ = ["load_pairs", "load_sft"]
