"""The fewest likeliest tokens that together have enough: top-k and top-p without a sort of the vocabulary.

All that is needed of the order is where the kept tokens end. The bits of a positive number, read as an integer, are in the
numbers' own order, so a histogram over the leading bits says in which bucket that is: all that is larger is kept, all that
is smaller is dropped, and only the bucket's own members, a few in a hundred, need to be sorted. Sums are in fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Of an fp32 in fp64 the bits from here on, exponent and 3 of the mantissa, are its bucket; 2^-149 has the lowest above 0.
_SHIFT = 49
_LOWEST, _HIGHEST = (1023 - 149) << 3, 1023 << 3
# A row of fewer tokens is sorted as it is; its histogram would be longer.
_FEW = 1 << 14


def keep_likeliest(probs: Tensor, enough: float, by_mass: bool) -> Tensor:
    """Set all but the fewest largest probabilities that are enough to 0. Of equal ones the first are kept.

    Args:
        probs: (B, V) fp32 from 0 to 1.
        enough: by mass a share of the row's sum, else a number of tokens.

    Returns:
        (B, V) fp32.
    """
    values = probs.double()
    masses = values if by_mass else torch.ones_like(values)
    # fp64 sums are rounded: what has enough but for that has enough.
    missing = (
        values.sum(1, keepdim=True) * enough * (1 - 1e-12) if by_mass else values.new_full((len(probs), 1), enough)
    )
    if probs.shape[1] < _FEW:
        return probs.masked_fill(_surplus(values, masses, missing), 0.0)

    bucket = values.view(torch.int64) >> _SHIFT
    histogram = masses.new_zeros(len(probs), _HIGHEST + 1).scatter_add_(1, bucket, masses)[:, _LOWEST:]
    above = F.pad(histogram.flip(1).cumsum(1).flip(1), (0, 1))  # of each bucket and all that are higher
    last = (
        (above[:, :-1] >= missing).sum(1, keepdim=True).sub_(1).clamp_(min=0)
    )  # the highest from which on it is enough
    missing = missing - above.gather(1, last + 1)
    last += _LOWEST
    kept = probs * (bucket >= last)
    row, column = (bucket == last).nonzero(as_tuple=True)
    turn = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # among the members of a row
    members, of_members = values.new_zeros(2, len(probs), int(turn.max()) + 1)
    members[row, turn] = values[row, column]
    of_members[row, turn] = masses[row, column]
    surplus = _surplus(members, of_members, missing)[row, turn]
    kept[row[surplus], column[surplus]] = 0.0
    return kept


def _surplus(values: Tensor, masses: Tensor, enough: Tensor) -> Tensor:
    """Which of the values (B, C) are beyond the fewest largest whose masses are enough (B, 1): (B, C) bool."""
    order = values.argsort(dim=1, descending=True, stable=True)
    masses = masses.gather(1, order)
    beyond = masses.cumsum(1) - masses >= enough
    return torch.empty_like(beyond).scatter_(1, order, beyond)
