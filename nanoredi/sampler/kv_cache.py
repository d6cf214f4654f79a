"""The paged key-value cache: the keys and values of all rows, in pages of one pool, and attention over them.

Token t of row b is in page page_table[b, t // page_size], at t % page_size. pages.py allocates the pages; the tensors
are here. As in attention.py a forward pass is given an `attend` that every block calls: it writes the keys and values
of the new tokens into the pool, and lets each attend to itself and to all tokens before it in its row.
"""

import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nanoredi.kernels.paged_attention import paged_decode, write
from nanoredi.model.attention import Attend, Rope, varlen_attn


class PagedCache:
    """A pool of pages.

    Attributes:
        keys, values: (L, P+1, K, page, E), of L layers and P pages. The last page is for padding rows.
        token_by_token: whether prefill runs the decode kernel, a token a row: on a CPU, where that takes no longer, and
            where flash attention cannot read the pages.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device):
        """shape: (L, P, K, page, E)."""
        num_layers, self.num_pages, num_heads, self.page_size, head_dim = shape
        self.token_by_token = device.type == "cpu" or not _reads_pages(dtype, self.page_size, head_dim)
        shape = num_layers, self.num_pages + 1, num_heads, self.page_size, head_dim
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages."""
        source, target = (upload(np.array(pages), self.keys.device) for pages in (sources, targets))
        for pool in (self.keys, self.values):
            pool[:, target] = pool[:, source]

    def prefill(self, chunks: Sequence[tuple[list[int], int, int]], padding: int = 0) -> tuple[Attend, Tensor]:
        """Attention of chunks of prompts, packed one after the other.

        Args:
            chunks: (the row's pages, start, end): its tokens start:end. Those before them are in the cache, or in an
                earlier chunk.
            padding: tokens that follow them and belong to no row.

        Returns:
            The forward pass's `attend`, and the positions (N,) int64 of all these tokens.
        """
        device = self.keys.device
        if padding:
            chunks = [*chunks, ([self.num_pages] * -(-padding // self.page_size), 0, padding)]
        sizes, lengths = [end - start for _, start, end in chunks], [end for _, _, end in chunks]
        table = np.zeros((len(chunks), max(len(pages) for pages, _, _ in chunks)), dtype=np.int64)
        for line, (pages, _, _) in zip(table, chunks):
            line[: len(pages)] = pages
        positions = upload(np.concatenate([np.arange(start, end) for _, start, end in chunks]), device)
        tables = upload(table.repeat(sizes, axis=0), device)
        if self.token_by_token:
            return self.decode(tables, positions), positions
        indices = self._indices(tables, positions)
        ends = np.cumsum([[0, *sizes], [0, *lengths]], axis=1)
        table, ends = (upload(x.astype(np.int32), device) for x in (table, ends))
        return self._attend(indices, paged_prefill, table, ends), positions

    def decode(self, page_table: Tensor, lengths: Tensor) -> Attend:
        """Attention of one new token a row, at the row's end.

        Args:
            page_table: (B, C) int64, each row's pages, then anything.
            lengths: (B,) int64, tokens that each row has in the cache already.
        """
        return self._attend(self._indices(page_table, lengths), paged_decode, page_table, lengths + 1)

    def _attend(self, indices: Tensor, read: Callable[..., Tensor], *rows: Tensor) -> Attend:
        """Write the new keys and values to the pool at these indices, then read the rows' by paged_prefill or _decode."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None = None) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            return read(write(q, k, v, rope, keys, values, indices), keys, values, *rows)

        return attend

    def _indices(self, page_table: Tensor, positions: Tensor) -> Tensor:
        """Where the keys of tokens go, in a layer's pool viewed as (P * K * page, E): (N*K,) int64. Each token is given
        by its position (N,) and its row's pages (N, C)."""
        pages, num_heads = page_table.gather(1, positions[:, None] // self.page_size), self.keys.shape[2]
        heads = pages * num_heads + torch.arange(num_heads, device=pages.device)
        return (heads * self.page_size + positions[:, None] % self.page_size).flatten()


def paged_prefill(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, ends: Tensor) -> Tensor:
    """Attention (N, H, E) of chunks of rows, packed one after the other, each the last tokens that its row has so far:
    one call of torch's flash attention, which reads the pages in place. The order of a row's sums depends on the row
    alone, because rows may not be split (num_splits), nor a single query be taken for a decode step (longest >= 2).

    Args:
        keys, values: (P, K, page, E), one layer's pool, with these tokens written.
        page_table: (S, C) int32, each row's pages, then anything.
        ends: (2, S+1) int32, the cumulative lengths of the chunks, and of the rows as if they were packed.
    """
    # FlashAttention-2 ignores the rows' cumulative lengths; later versions refuse them beside a page table.
    ends_k = None if torch.nn.attention.current_flash_attention_impl() else ends[1]
    longest, paged = max(2, len(q)), {"seqused_k": ends[1].diff(), "block_table": page_table, "num_splits": 1}
    pools, longest_k = (pool.transpose(1, 2) for pool in (keys, values)), page_table.shape[1] * keys.shape[2]
    return varlen_attn()(q, *pools, ends[0], ends_k, longest, longest_k, window_size=(-1, 0), **paged)


def _reads_pages(dtype: torch.dtype, page_size: int, head_dim: int) -> bool:
    """Whether torch's flash attention can read the pages: in half precision, for FlashAttention-2 if the page size is a
    multiple of 256, and since torch 2.13, because that of 2.12 refuses num_splits."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return is_half and not head_dim % 8 and not page_size % 256 and torch.__version__ >= "2.13"


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty memory, because masked values are multiplied by 0, and 0 * NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Anonymous memory is taken when it is first written, 4 kB at a time, so a large pool costs nothing until it is
    # used. Zeros of numpy would be taken 2 MB at a time, of which every layer uses only a part.
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
