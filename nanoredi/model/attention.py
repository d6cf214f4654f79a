"""Causal attention with grouped queries over packed sequences (training, scoring).

A forward pass is given an object that every block calls with its queries, keys and values. This file has the one for
training; kv_cache.py has those over a key-value cache, so the model is the same code in training and in sampling. The
letters for shapes are those of qwen2.py.
"""

import inspect
from collections.abc import Callable
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.dispatch import operation
from nanoredi.kernels.layers import rotate

# attend(layer, q (N, H, E), k (N, K, E), v (N, K, E)) -> (N, H, E); given rope as a fifth, it rotates q and k first.
Attend = Callable[..., Tensor]
Rope = tuple[Tensor, Tensor]  # cos and sin, for layers.rotate

# The torch operations whose results activation checkpointing keeps: they are no larger than a block's input, and
# attention is the most expensive part of a block to recompute.
ATTENTION = {
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
}


class PackedAttention:
    """Each token attends to itself and to the earlier tokens of its own sequence."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int | None = None):
        """cu_seqlens (S+1,) int32: where each sequence begins; without max_seqlen the host asks the device for it."""
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen or int(cu_seqlens.diff().max())

    @cached_property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None = None) -> Tensor:
        if rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return causal_attention(q, k, v, self)


@operation
def causal_attention(q: Tensor, k: Tensor, v: Tensor, sequences: PackedAttention) -> Tensor:
    """q (N, H, E), k (N, K, E), v (N, K, E) -> (N, H, E), one sequence at a time."""
    # Heads first: (1, H or K, n, E).
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(sequences.lengths, dim=2) for x in (q, k, v)))
    grouped = q.shape[1] != k.shape[1]
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in parts]
    return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)


@causal_attention.on("cuda")
def _flash(q: Tensor, k: Tensor, v: Tensor, sequences: PackedAttention) -> Tensor:
    """In half precision one variable-length kernel takes all sequences; it needs a head size divisible by 8."""
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        cu, longest = sequences.cu_seqlens, sequences.max_seqlen
        return varlen_attn()(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
    # In fp32 the only kernel whose memory is linear in n does not take grouped queries.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return causal_attention.plain(q, k, v, sequences)


@cache
def varlen_attn() -> Callable[..., Any]:
    """torch's variable-length flash attention with grouped queries. Imported on first use: that takes over a second."""
    from torch.nn.attention import varlen

    flash_attention()
    # torch 2.11 accepts grouped queries by default; later releases need enable_gqa.
    has_option = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return partial(varlen.varlen_attn, enable_gqa=True) if has_option else varlen.varlen_attn


@cache
def flash_attention() -> str:
    """Choose this process's half-precision attention kernel, and name it: FlashAttention-3 (arXiv 2407.08608) on a
    Hopper where its package is installed and torch (2.12 or later) supports it, else torch's FlashAttention-2."""
    from torch.nn import attention

    activate = getattr(attention, "activate_flash_attention_impl", None)
    if not (activate and find_spec("flash_attn_interface") and torch.cuda.get_device_capability()[0] == 9):
        return "FlashAttention-2"
    try:
        activate("FA3")
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # it was built for another torch
        return f"FlashAttention-2, since 3 cannot be loaded: {error}"
    return "FlashAttention-3"
