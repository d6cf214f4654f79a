"""Top-k and top-p without sorting the vocabulary.

A histogram over the leading bits tells in which bucket the threshold lies; only that bucket's members, one in a hundred or
so, are sorted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.top_p import keep, surplus

# A bucket's members share the exponent and the leading 5 bits of the mantissa; 1.0 is in the highest bucket.
_SHIFT = 18
_NUM_BUCKETS = (127 << 5) + 1
# For a row of fewer tokens sorting is faster than a histogram.
_FEW = 1 << 11


@keep.on("cpu")
def by_histogram(probs: Tensor, needed: Tensor, by_mass: bool) -> Tensor:
    if probs.shape[1] < _FEW:
        return NotImplemented
    is_nan = probs[:, 0].isnan()  # then the whole row is NaN
    if is_nan.any():
        probs = probs.masked_fill(is_nan[:, None], 1.0)
    values = probs.double()
    masses = values if by_mass else torch.ones_like(values)
    bucket = (probs.contiguous().view(torch.int32) >> _SHIFT).long()
    histogram = masses.new_zeros(len(probs), _NUM_BUCKETS).scatter_add_(1, bucket, masses)
    above = F.pad(histogram.flip(1).cumsum(1).flip(1), (0, 1))  # of each bucket and all that are higher
    last = (above[:, :-1] >= needed).sum(1, keepdim=True).sub_(1).clamp_(min=0)  # the highest that leaves enough
    needed = needed - above.gather(1, last + 1)
    # In place, so that the comparison yields floats: with booleans both passes take twice as long.
    kept = probs.clone().ge_((last << _SHIFT).int().view(torch.float32)).mul_(probs)
    row, column = _where(bucket == last)
    if not len(row):  # fewer tokens than asked for have any probability
        return kept
    turn = torch.arange(len(row)) - torch.searchsorted(row, row)  # a member's number within its row
    members, of_members = values.new_zeros(2, len(probs), int(turn.max()) + 1)
    members[row, turn] = values[row, column]
    of_members[row, turn] = masses[row, column]
    beyond = surplus(members, of_members, needed)[row, turn]
    kept[row[beyond], column[beyond]] = 0.0
    return kept


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns where a mask (B, V) bool is true, eight elements at a time: few of them are."""
    if mask.shape[1] % 8:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    row, word = mask.view(torch.int64).nonzero(as_tuple=True)
    among, byte = mask.unflatten(1, (-1, 8))[row, word].nonzero(as_tuple=True)
    return row[among], word[among] * 8 + byte
