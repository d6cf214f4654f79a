"""The rows of an optimiser step, their distribution over ranks and micro-batches, and packing these into tensors.

A packed batch is its sequences concatenated, without padding. A step's rows depend only on the seed and the step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoredi.data.sequences import SIDES, Sequence


class PackedBatch(NamedTuple):
    """N packed input tokens of S sequences and their targets; the fields are Qwen2.loss's arguments, and shares. rows
    and max_seqlen are computed here, on the CPU, to avoid waiting for the device."""

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, counted from 0 in each sequence
    cu_seqlens: Tensor  # (S+1,) int32, where each sequence begins and the last one ends
    targets: Tensor  # (N,) int64, the next token
    weights: Tensor  # (N,) fp32, of the target's log-probability in the loss; 0 where nothing is learned
    rows: Tensor  # (R,) int64, the positions where something is learned
    shares: Tensor  # (2, N) fp32, of the target's log-probability in the step's means of chosen and of rejected traces
    max_seqlen: int  # the longest sequence

    def to(self, device: torch.device) -> "PackedBatch":
        *tensors, max_seqlen = self
        if device.type == "cuda":
            tensors = [t.pin_memory() for t in tensors]  # otherwise the copy waits for the device
        return PackedBatch(*(t.to(device, non_blocking=True) for t in tensors), max_seqlen)


def pack(sequences: list[Sequence]) -> PackedBatch:
    """Pack sequences; one of n tokens gives n - 1 inputs (Sequence.num_inputs)."""

    def joined(parts: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(parts)))

    lengths = [s.num_inputs for s in sequences]
    return PackedBatch(
        input_ids=joined(s.tokens[:-1] for s in sequences).long(),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        targets=joined(s.tokens[1:] for s in sequences).long(),
        weights=joined(s.learned[1:] * np.float32(s.weight) for s in sequences),
        rows=joined(s.learned[1:] for s in sequences).nonzero().squeeze(1),
        shares=torch.stack(
            [joined(s.learned[1:] * np.float32(s.share * (s.side == side)) for s in sequences) for side in SIDES]
        ),
        max_seqlen=max(lengths),
    )


def num_steps(num_rows: int, batch_size: int, epochs: int, max_steps: int) -> int:
    """The number of optimiser steps of a run. An epoch's last step takes the rows that are left: none is skipped."""
    steps = epochs * -(-num_rows // batch_size)
    return min(steps, max_steps) if max_steps else steps


def step_rows(step: int, num_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of an optimiser step, both counted from 0: a slice of the epoch's shuffle."""
    epoch, i = divmod(step, -(-num_rows // batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(num_rows)
    return order[i * batch_size : (i + 1) * batch_size]


def divide(lengths: list[int], costs: list[float], world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Distribute sequences over micro-batches, the same number for each rank, so that the ranks' costs are similar.

    The most expensive sequences are assigned first, each to the cheapest micro-batch that has room for it, with as few
    micro-batches as keep all within max_tokens (a longer sequence goes alone). Then each rank gets one micro-batch per
    round. A round's micro-batches have similar costs, since under FSDP the ranks wait for each other; its more
    expensive ones go to the ranks with the lowest cost so far.

    Args:
        lengths: tokens of each sequence.
        costs: of each sequence, in any unit (Qwen2Config.flops).
        max_tokens: budget of a micro-batch.

    Returns:
        [rank][micro-batch] -> indices into lengths; an empty micro-batch if there are too few sequences.
    """
    num_bins = world_size * max(1, -(-sum(lengths) // (max_tokens * world_size)))
    while (bins := _fill(lengths, costs, num_bins, max_tokens)) is None:
        num_bins += world_size
    bins.sort(key=lambda b: -sum(costs[i] for i in b))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    spent = [0.0] * world_size
    for start in range(0, num_bins, world_size):
        cheapest_first = sorted(range(world_size), key=spent.__getitem__)
        for rank, b in zip(cheapest_first, bins[start : start + world_size]):
            ranks[rank].append(b)
            spent[rank] += sum(costs[i] for i in b)
    return ranks


def _fill(lengths: list[int], costs: list[float], num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """The sequences in num_bins micro-batches; None if they do not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, spent = [0] * num_bins, [0.0] * num_bins
    for i in sorted(range(len(lengths)), key=lambda i: -costs[i]):
        with_room = [b for b in range(num_bins) if not bins[b] or tokens[b] + lengths[i] <= max_tokens]
        if not with_room:
            return None
        cheapest = min(with_room, key=spent.__getitem__)
        bins[cheapest].append(i)
        tokens[cheapest] += lengths[i]
        spent[cheapest] += costs[i]
    return bins
