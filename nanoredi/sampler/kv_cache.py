"""The keys and values of all rows, in pages of one pool, and attention over them.

Row b's token t lies in page page_table[b, t // page_size], at t % page_size. pages.py says which pages those are;
here are the tensors. As in attention.py a forward pass is given an `attend` that every block calls; it writes the new
tokens' keys and values into the pool and attends to all that their rows have there.
"""

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.paged_attention import paged_decode
from nanoredi.model.attention import Attend


class PagedCache:
    """A pool of pages.

    Attributes:
        keys, values: (L, P+1, K, page, E). The last page is for what nobody wants: the rows that only fill a batch up.
        token_by_token: whether a prompt's tokens attend as if each were decoded. It is the same then, bit for bit, in
            whatever pieces they come; on a CPU it takes no longer.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_pages, self.page_size = num_pages, page_size
        self.token_by_token = device.type == "cpu"
        shape = num_layers, num_pages + 1, num_kv_heads, page_size, head_dim
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages."""
        source, target = (upload(np.array(pages), self.keys.device) for pages in (sources, targets))
        for pool in (self.keys, self.values):
            pool[:, target] = pool[:, source]

    def prefill(self, pieces: Sequence[tuple[list[int], int, int]]) -> tuple[Attend, Tensor]:
        """Attention of pieces of rows, packed one after the other.

        Args:
            pieces: (the row's pages, start, end): its tokens from start to end. Those before are in the cache, or in an
                earlier piece.

        Returns:
            What attends, and the pieces' positions (N,) int64. Tokens after those of the pieces, which only fill a batch up,
            get zeros.
        """
        device = self.keys.device
        sizes = [end - start for _, start, end in pieces]
        positions = np.concatenate([np.arange(start, end) for _, start, end in pieces])
        if self.token_by_token:
            table = np.zeros((len(pieces), max(len(pages) for pages, _, _ in pieces)), dtype=np.int64)
            for line, (pages, _, _) in zip(table, pieces):
                line[: len(pages)] = pages
            positions = upload(positions, device)
            return self.decode(upload(table.repeat(sizes, axis=0), device), positions), positions
        pages = np.concatenate([np.array(pages)[np.arange(s, e) // self.page_size] for pages, s, e in pieces])
        positions = upload(positions, device)
        places = self._places(upload(pages, device), positions)
        rows = [upload(np.array(pages[: -(-end // self.page_size)]), device) for pages, _, end in pieces]
        # A token sees its row up to itself; where all of the row is in the piece, that is what is_causal says.
        masks = [_mask(n, end, device) if start else None for n, (_, start, end) in zip(sizes, pieces)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, places, k, v)
            out = []
            for part, row, mask, (_, _, end) in zip(q.split(sizes), rows, masks, pieces):
                # (1, K, end, E), heads first.
                keys, values = (
                    pool[layer][row].transpose(0, 1).flatten(1, 2)[None, :, :end] for pool in (self.keys, self.values)
                )
                heads = part.transpose(0, 1)[None]
                x = F.scaled_dot_product_attention(heads, keys, values, mask, is_causal=mask is None, enable_gqa=True)
                out.append(x[0].transpose(0, 1))
            return torch.cat(out)

        return _of_first(len(positions), attend), positions

    def decode(self, page_table: Tensor, lengths: Tensor) -> Attend:
        """Attention of one new token a row, which it also writes at the row's end. Tokens after those of the rows get zeros,
        as in prefill.

        Args:
            page_table: (B, C) int64, each row's pages, then anything.
            lengths: (B,) int64, tokens already in each row.
        """
        pages = page_table.gather(1, lengths[:, None] // self.page_size).squeeze(1)
        places, new_lengths = self._places(pages, lengths), lengths + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, places, k, v)
            return paged_decode(q, self.keys[layer], self.values[layer], page_table, new_lengths)

        return _of_first(len(lengths), attend)

    def _places(self, pages: Tensor, positions: Tensor) -> Tensor:
        """Where the keys of tokens (N,) at these positions of their rows go, in a layer's pool seen as (P * K * page, E):
        (N*K,) int64."""
        num_heads = self.keys.shape[2]
        heads = pages[:, None] * num_heads + torch.arange(num_heads, device=pages.device)
        return (heads * self.page_size + positions[:, None] % self.page_size).flatten()

    def _write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[layer].view(-1, k.shape[2]).index_copy_(0, places, k.flatten(0, 1))
        self.values[layer].view(-1, v.shape[2]).index_copy_(0, places, v.flatten(0, 1))


def bytes_a_page(num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
    return 2 * num_layers * num_kv_heads * head_dim * page_size * dtype.itemsize


def _of_first(num_tokens: int, attend: Attend) -> Attend:
    """The same for the first num_tokens; those after them get zeros."""

    def attend_first(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(layer, *(x[:num_tokens] for x in (q, k, v)))
        return F.pad(out, (0, 0, 0, 0, 0, len(q) - num_tokens)) if len(q) > num_tokens else out

    return attend_first


def _mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Of the last tokens of a row: each sees all up to itself."""
    if device.type == "cpu":
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    # For a kernel that makes no mask. Its module takes long to import, which a CPU need not wait for.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_queries, num_keys)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty memory: masked values still meet a weight of 0, and 0 * NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Fresh from the system: a page of memory is taken when it is first written, so a large pool costs nothing until it is
    # used. numpy's zeros would be so, too, but in pieces of 2 MB, of which each layer would hardly use the outermost ones.
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
