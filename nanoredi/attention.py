"""Causal attention with grouped queries: over packed sequences (training, scoring, prefill) and over a key-value cache
(decoding).

Both are objects that a forward pass is given and that every block calls with its queries, keys and values, so the
model is the same code in training and in sampling. The letters for shapes are those of model.py.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

# attend(layer, q (N, H, E), k (N, K, E), v (N, K, E)) -> (N, H, E)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# The operations below, by name, whose results activation checkpointing keeps: they are no larger than a block's input,
# and of all products attention's are the dearest to make again.
KEPT = ("torch_attn::_varlen_attn", "aten::_scaled_dot_product_flash_attention_for_cpu")


@cache
def _varlen_attn() -> Callable[..., Tensor]:
    """torch's variable-length flash attention, of grouped queries. Its module takes over a second to import, which a
    CPU need not wait for."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped queries as they are; later releases want to be told.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if told else varlen_attn


class PackedAttention:
    """Each token attends to itself and to the earlier tokens of its own sequence.

    On a GPU in half precision one variable-length flash kernel takes all sequences; elsewhere they go one after the
    other.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int | None = None):
        """cu_seqlens (S+1,) int32 says where each sequence begins; without max_seqlen the device is asked for it."""
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self._lengths: list[int] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            if self.max_seqlen is None:
                self.max_seqlen = int(self.cu_seqlens.diff().max())
            cu, longest = self.cu_seqlens, self.max_seqlen
            return _varlen_attn()(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
        if not self._lengths:
            self._lengths = self.cu_seqlens.diff().tolist()
        # Heads first, and a sequence at a time: (1, H or K, n, E).
        parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(self._lengths, dim=2) for x in (q, k, v)))
        out = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in parts]
        return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


class KVCache:
    """The keys and values of B rows, each at its own length; the rows being decoded are always the first ones.

    The cache grows with its rows and with the longest of them, by half at a time, so short completions never pay for
    the whole context.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.keys = torch.zeros(num_layers, 0, num_kv_heads, 0, head_dim, dtype=dtype, device=device)  # (L, B, K, T, E)
        self.values = self.keys.clone()

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for num_rows rows of `length` tokens."""
        _, rows, _, room, _ = self.keys.shape
        if num_rows > rows or length > room:
            more_rows = max(num_rows, rows + rows // 2) - rows if num_rows > rows else 0
            more_room = max(length, room + room // 2) - room if length > room else 0
            # Zeros, not empty memory: masked values still meet a probability of 0, and 0 * NaN is NaN.
            grow = (0, 0, 0, more_room, 0, 0, 0, more_rows)
            self.keys, self.values = F.pad(self.keys, grow), F.pad(self.values, grow)

    def move(self, source: int, target: int) -> None:
        """Put row `source` in the place of row `target`."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def prefill(self, first_row: int, cu_seqlens: Tensor, max_seqlen: int) -> Attend:
        """Attention over packed prompts, which also writes prompt s into row first_row + s."""
        packed = PackedAttention(cu_seqlens, max_seqlen)
        lengths = cu_seqlens.diff().long()
        rows = torch.arange(first_row, first_row + len(lengths), device=lengths.device).repeat_interleave(
            lengths
        )  # (N,)
        places = torch.arange(len(rows), device=rows.device) - cu_seqlens[:-1].long().repeat_interleave(lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, rows, :, places] = k
            self.values[layer, rows, :, places] = v
            return packed(layer, q, k, v)

        return attend

    def decode(self, lengths: Tensor, longest: int) -> Attend:
        """Attention of one new token in each of the first B rows, which it also writes at the row's end.

        Args:
            lengths: (B,) int64, tokens already in each row.
            longest: the largest of lengths, known on the CPU.
        """
        num_rows, room = len(lengths), longest + 1
        rows = torch.arange(num_rows, device=lengths.device)
        mask = (torch.arange(room, device=lengths.device) <= lengths[:, None])[:, None, None]  # (B, 1, 1, T)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, rows, :, lengths] = k
            self.values[layer, rows, :, lengths] = v
            keys, values = (
                self.keys[layer, :num_rows, :, :room],
                self.values[layer, :num_rows, :, :room],
            )  # (B, K, T, E)
            # The query heads that share a key-value head go in as that head's queries: nothing is repeated.
            grouped = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H/K, E)
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)

        return attend
