"""A lower bound of sampling's time: its matrix products, or on a GPU reading the weights and the cache in use."""

import time
from collections.abc import Callable

import numpy as np
import torch

from nanoredi.kernels import linear
from nanoredi.kernels.dispatch import prepare_for_sampling
from nanoredi.model.config import Qwen2Config
from nanoredi.sampler.scheduler import Request

ON_GPU = torch.cuda.is_available()


def allowance(c: Qwen2Config, requests: list[Request], dtype: torch.dtype) -> float:
    """Seconds of all decode steps' matrix products, or on a GPU of reading weights and cache; without prefill."""
    kv_size = c.num_key_value_heads * c.head_dim
    shapes = [(c.hidden_size + 2 * kv_size, c.hidden_size), (c.hidden_size, c.hidden_size)]
    shapes += [(2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
    ends = np.array([request.max_tokens for request in requests])
    rows = [int((ends > step).sum()) for step in range(ends.max())]
    if ON_GPU:
        weights = c.num_hidden_layers * sum(a * b for a, b in shapes) + c.vocab_size * c.hidden_size
        prompts = np.array([len(request.prompt) for request in requests])
        live = sum(int((prompts[ends > step] + step).sum()) for step in range(ends.max()))
        # If not all rows fit at once, there are more steps, which read the weights again; this is not counted.
        values = len(rows) * weights + live * 2 * c.num_hidden_layers * kv_size
        return values * dtype.itemsize / _bandwidth()
    matrices = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(8)]  # more than a cache holds
    head = torch.randn(c.vocab_size, c.hidden_size).to(dtype)
    points = [b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if b < 2 * len(requests)]
    seconds = [_product_seconds(b, matrices, head, c.num_hidden_layers) for b in points]
    return float(np.interp(rows, points, seconds).sum())


def _product_seconds(rows: int, matrices: list[list[torch.Tensor]], head: torch.Tensor, num_layers: int) -> float:
    """Seconds of a decode step's matrix products, in all blocks and the head."""
    inputs = {size: torch.randn(rows, size).to(head.dtype) for size in {w.shape[1] for w in matrices[0]}}

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    def fastest(weights: list[torch.Tensor]) -> float:
        # x W^T, its transpose, or the sampler's own product, whichever is fastest.
        ways = [
            (weights, lambda x, w: x @ w.T),
            (weights, lambda x, w: w @ x.T),
            ([prepare_for_sampling(w, True) for w in weights], linear),
        ]
        with torch.no_grad():
            return min(best(lambda: [way(inputs[w.shape[1]], w) for w in ws]) for ws, way in ways)

    return fastest([w for block in matrices for w in block]) * num_layers / len(matrices) + fastest([head])


def _bandwidth() -> float:
    """Bytes a second that the device reads, measured by summing 4 GiB."""
    x = torch.ones(1 << 30, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    x.sum()
    begin.record()
    for _ in range(10):
        x.sum()
    end.record()
    end.synchronize()
    num_bytes = x.numel() * x.element_size()
    del x
    torch.cuda.empty_cache()  # so that the measured processes can use the memory
    return 10 * num_bytes / (begin.elapsed_time(end) / 1e3)
