"""What the C library holds of a CPU's memory beyond the tensors in it.

Forward's activations are freed among gradients that stay, and glibc keeps the room in between for later ones. The
largest tensors can have none of it, for anything above 32 MiB is mapped apart; so a training process has its peak where
such a tensor is made while much room is empty. It is given back to the system right before.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from nanoredi.model import Qwen2

_MAPPED_APART = 32 << 20  # bytes; DEFAULT_MMAP_THRESHOLD_MAX of mallopt(3), on 64 bits


def trim_before_peaks(model: Qwen2) -> None:
    """Have free memory given back before the vocabulary's two gradients are made: the head's, which the loss makes after
    the final norm, and the embedding's. Nothing is done for a small vocabulary, whose gradients find room, or where the C
    library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is None or 4 * model.lm_head_weight.numel() < _MAPPED_APART:
        return

    def after_norm(*_: Any) -> None:
        if torch.is_grad_enabled():
            malloc_trim(0)

    def after_embedding(module: nn.Module, ids: Any, embedded: Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(before_embeddings_backward)

    def before_embeddings_backward(gradient: Tensor) -> None:
        malloc_trim(0)

    model.model.norm.register_forward_hook(after_norm)
    model.model.embed_tokens.register_forward_hook(after_embedding)
