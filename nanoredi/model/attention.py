"""Causal attention with grouped queries over packed sequences (training, scoring).

It is an object that a forward pass is given and that every block calls with its queries, keys and values. kv_cache.py
has the others, over a key-value cache, so the model is the same code in training and in sampling. The letters for
shapes are those of qwen2.py.
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

# attend(layer, q (N, H, E), k (N, K, E), v (N, K, E)) -> (N, H, E); with a fifth argument, rope, it rotates q and k first.
Attend = Callable[..., Tensor]
Rope = tuple[Tensor, Tensor]  # cos and sin, for layers.rotate

# The operations below, by name, whose results activation checkpointing keeps: they are no larger than a block's input,
# and of all products attention's are the most expensive to make again.
ATTENTION = {
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
}


class PackedAttention:
    """Each token attends to itself and to the earlier tokens of its own sequence."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int | None = None):
        """cu_seqlens (S+1,) int32 says where each sequence begins; without max_seqlen the device is asked for it."""
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
    """q (N, H, E), k (N, K, E), v (N, K, E) -> (N, H, E), the sequences one after the other."""
    # Heads first: (1, H or K, n, E).
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(sequences.lengths, dim=2) for x in (q, k, v)))
    grouped = q.shape[1] != k.shape[1]
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in parts]
    return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)


@causal_attention.on("cuda")
def _flash(q: Tensor, k: Tensor, v: Tensor, sequences: PackedAttention) -> Tensor:
    """In half precision one variable-length kernel takes all sequences, of heads whose size is a multiple of 8, as all but
    a toy's are."""
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        cu, longest = sequences.cu_seqlens, sequences.max_seqlen
        return varlen_attn()(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
    # In fp32 the one kernel with memory linear in n knows no grouped queries.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return causal_attention.plain(q, k, v, sequences)


@cache
def varlen_attn() -> Callable[..., Any]:
    """torch's variable-length flash attention, of grouped queries. Its module takes over a second to import, which a
    CPU need not wait for."""
    from torch.nn.attention import varlen

    flash_attention()
    # torch 2.11 takes grouped queries as they are; later releases want to be told.
    told = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return partial(varlen.varlen_attn, enable_gqa=True) if told else varlen.varlen_attn


@cache
def flash_attention() -> str:
    """What attends in half precision on the GPU of this process, in words: FlashAttention-3 (arXiv 2407.08608) on a Hopper
    where its package is installed and torch (2.12 and later) can take it, else torch's own FlashAttention-2."""
    from torch.nn import attention

    activate = getattr(attention, "activate_flash_attention_impl", None)
    if not (activate and find_spec("flash_attn_interface") and torch.cuda.get_device_capability()[0] == 9):
        return "FlashAttention-2"
    try:
        activate("FA3")
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # it was built for another torch
        return f"FlashAttention-2, since 3 cannot be loaded: {error}"
    return "FlashAttention-3"
