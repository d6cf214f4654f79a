"""Packing, the order of the rows, and their distribution over ranks and micro-batches."""

import numpy as np
import pytest
import torch

from nanoredi.data.batch import divide, num_steps, pack, step_rows
from nanoredi.data.sequences import Sequence


def test_pack():
    batch = pack(
        [
            Sequence(np.array([5, 6, 7, 8]), np.array([False, False, True, True]), "chosen", weight=-0.5, share=0.5),
            Sequence(np.array([1, 2]), np.array([False, True]), "rejected", weight=0.25, share=0.125),
        ]
    )
    assert batch.input_ids.tolist() == [5, 6, 7, 1]
    assert batch.targets.tolist() == [6, 7, 8, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.weights.tolist() == [0, -0.5, -0.5, 0.25]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.shares.tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0, 0.125]]
    assert batch.max_seqlen == 3
    assert batch.weights.dtype == torch.float32 and batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("rows, batch_size, epochs", [(10, 4, 1), (12, 4, 2), (3, 8, 2)])
def test_every_epoch_sees_every_row_once_in_a_different_order(rows, batch_size, epochs):
    total = num_steps(rows, batch_size, epochs, max_steps=0)
    steps = [step_rows(i, rows, batch_size, seed=1).tolist() for i in range(total)]
    per_epoch = total // epochs
    orders = [sum(steps[e * per_epoch : (e + 1) * per_epoch], []) for e in range(epochs)]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert len({tuple(order) for order in orders}) == epochs
    assert steps == [step_rows(i, rows, batch_size, seed=1).tolist() for i in range(total)]


def test_max_steps():
    assert num_steps(100, 10, 5, max_steps=7) == 7
    assert num_steps(100, 10, 1, max_steps=70) == 10


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [50, 300, 10_000])
def test_divide_distributes_everything_evenly_within_the_budget(world_size, max_tokens):
    lengths = np.random.default_rng(0).integers(10, 120, 64).tolist()
    costs = [n + n * n / 100 for n in lengths]
    places = divide(lengths, costs, world_size, max_tokens)
    assert len(places) == world_size and len({len(p) for p in places}) == 1
    assert sorted(i for rank in places for micro in rank for i in micro) == list(range(64))
    for rank in places:
        for micro in rank:
            assert sum(lengths[i] for i in micro) <= max_tokens or len(micro) == 1
    if max_tokens >= 300:
        spent = [sum(costs[i] for micro in rank for i in micro) for rank in places]
        assert max(spent) <= 1.05 * sum(costs) / world_size


def test_divide_with_fewer_sequences_than_ranks_leaves_micro_batches_empty():
    assert sorted(divide([5, 9], [5, 9], 4, 100)) == [[[]], [[]], [[0]], [[1]]]
