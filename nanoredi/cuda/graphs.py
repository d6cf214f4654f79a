"""Decode steps as CUDA graphs: a step of some hundred kernels starts with one call of the host."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanoredi.kernels.dispatch import decode_graphs
from nanoredi.kernels.paged_attention import SPAN


@decode_graphs.on("cuda")
class Graphs:
    """The decode step, a graph for each of a few numbers of rows and lengths of the longest one."""

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
        # For what a graph is captured after.
        self.beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, places: np.ndarray, uniforms: np.ndarray, longest: int) -> Tensor:
        """A step of the rows in these places (B,) int64 by uniforms (B,) fp64, the longest of which has so many tokens: their
        next ones (B or more,) int64, until the next call."""
        padded = self.filled_up(places)
        given = np.stack((padded, np.pad(uniforms, (0, len(padded) - len(places))).view(np.int64)))
        size = len(padded), self.columns(longest)
        if size not in self.captured:
            self.captured[size] = self._capture(*size)
        graph, static, tokens = self.captured[size]
        host = torch.from_numpy(given)
        static.copy_(host.pin_memory() if static.is_cuda else host, non_blocking=True)
        graph.replay()
        return tokens

    def columns(self, longest: int) -> int:
        """Columns of the page table for rows of up to so many tokens: those of 1, 2, 4, ... spans, or all."""
        num_spans = 1 << (-(-longest // SPAN) - 1).bit_length()
        return min(self.num_columns, -(-num_spans * SPAN // self.page_size))

    def filled_up(self, places: np.ndarray) -> np.ndarray:
        """With nobody's place up to the next size that there are graphs for: batch_size alone, or 1, 2, 4, 8, 16, 24, 32, 48, 64,
        96, ..."""
        size = self.batch_size if self.full_size else 1 << (len(places) - 1).bit_length()
        if not self.full_size and size >= 32 and len(places) <= size * 3 // 4:
            size = size * 3 // 4
        return np.pad(places, (0, size - len(places)), constant_values=self.batch_size)

    def _capture(self, num_rows: int, num_columns: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """A graph, where it finds places and (their bits) uniforms (2, B) int64, and where it leaves the tokens."""
        static = torch.full((2, num_rows), self.batch_size, device=self.device)
        given = static[0], static[1].view(torch.float64), num_columns
        # A first run beside the graph compiles the kernels. Both runs move nobody's state alone.
        self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):
            self.advance(*given)
        torch.cuda.current_stream().wait_stream(self.beside)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.captured.values()))[0].pool() if self.captured else None
        with torch.cuda.graph(graph, pool=pool):
            tokens = self.advance(*given)
        return graph, static, tokens
