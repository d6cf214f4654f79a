"""Decode steps as CUDA graphs: the host starts a step of some hundred kernels with one call."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanoredi.kernels.dispatch import decode_graphs
from nanoredi.kernels.paged_attention import SPAN


@decode_graphs.on("cuda")
class Graphs:
    """The decode step, as a graph for each of a few batch sizes and lengths of the longest row."""

    def __init__(
        self,
        newest: Tensor,
        advance: Callable[[Tensor, Tensor, int], Tensor],
        sizes: tuple[int, int, int],
        full_size: bool,
    ):
        self.device, self.advance, self.full_size = newest.device, advance, full_size
        self.batch_size, self.num_columns, self.page_size = sizes
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        # The stream of the run that comes before a capture.
        self.warm_up = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, slots: np.ndarray, uniforms: np.ndarray, longest: int) -> Tensor:
        """Decode the rows in slots (B,) int64 by uniforms (B,) fp64; longest: the tokens of the longest row. Returns
        their next tokens (B or more,) int64, which the next call overwrites."""
        padded = self.padded(slots)
        inputs = np.stack((padded, np.pad(uniforms, (0, len(padded) - len(slots))).view(np.int64)))
        size = len(padded), self.columns(longest)
        if size not in self.captured:
            self.captured[size] = self._capture(*size)
        graph, static, tokens = self.captured[size]
        host = torch.from_numpy(inputs)
        static.copy_(host.pin_memory() if static.is_cuda else host, non_blocking=True)
        graph.replay()
        return tokens

    def columns(self, longest: int) -> int:
        """Columns of the page table for rows of up to so many tokens: those of 1, 2, 4, ... spans, or all."""
        num_spans = 1 << (-(-longest // SPAN) - 1).bit_length()
        return min(self.num_columns, -(-num_spans * SPAN // self.page_size))

    def padded(self, slots: np.ndarray) -> np.ndarray:
        """The slots, padded to the next batch size that has graphs: batch_size, if every step is to have the full size,
        or one of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..."""
        size = self.batch_size if self.full_size else 1 << (len(slots) - 1).bit_length()
        if not self.full_size and size >= 32 and len(slots) <= size * 3 // 4:
            size = size * 3 // 4
        return np.pad(slots, (0, size - len(slots)), constant_values=self.batch_size)

    def _capture(self, num_rows: int, num_columns: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """A graph, its input (slots and the bits of uniforms, (2, B) int64), and its output, the tokens."""
        static = torch.full((2, num_rows), self.batch_size, device=self.device)
        inputs = static[0], static[1].view(torch.float64), num_columns
        # A first run without a graph compiles the kernels. Both runs change the padding row alone.
        self.warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.warm_up):
            self.advance(*inputs)
        torch.cuda.current_stream().wait_stream(self.warm_up)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.captured.values()))[0].pool() if self.captured else None
        with torch.cuda.graph(graph, pool=pool):
            tokens = self.advance(*inputs)
        return graph, static, tokens
