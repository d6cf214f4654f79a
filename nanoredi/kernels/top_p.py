"""The fewest likeliest tokens that together have enough: top-k and top-p without a sort of the vocabulary.

All that is needed of the order is where the kept tokens end: the largest threshold such that what is at or above it is
enough. Of positive numbers the bits, read as an integer, are in the same order, so it can be looked for among integers.

The Triton kernel gives a row to one program. It finds the threshold's 30 bits three at a time, each time by going over
the row once and adding up what is at or above each of seven candidates. The plain version makes a histogram over the
leading bits, which says in which bucket the threshold lies, and sorts that bucket's members alone, one in a hundred or so.
Sums are in fp64, in both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.kernels.dispatch import runs_triton, tl, triton

# A bucket has the exponent and the leading 5 bits of the mantissa in common; that of 1.0 is the highest.
_SHIFT = 18
_NUM_BUCKETS = (127 << 5) + 1
# A row of fewer tokens is sorted as it is, which takes less than a histogram.
_FEW = 1 << 11
# Of a program. A thread has one load of 16 bytes on its way, so what hides the memory's latency is their number; larger
# blocks do not fit into the registers.
_BLOCK, _WARPS = 2048, 16


def keep_likeliest(probs: Tensor, enough: float, by_mass: bool) -> Tensor:
    """Set all but the fewest largest probabilities that are enough to 0. Of equal ones the first are kept.

    Args:
        probs: (B, V) fp32 from 0 to 1.
        enough: by mass a share of the row's sum, else a number of tokens.

    Returns:
        (B, V) fp32.
    """
    if by_mass:
        # fp64 sums are rounded: what has enough but for that has enough.
        missing = probs.sum(1, keepdim=True, dtype=torch.float64) * (enough * (1 - 1e-12))
    else:
        missing = probs.new_full((len(probs), 1), enough, dtype=torch.float64)
    return (triton_keep if runs_triton(probs) else plain_keep)(probs, missing, by_mass)


def plain_keep(probs: Tensor, missing: Tensor, by_mass: bool) -> Tensor:
    """keep_likeliest's work, of what is missing (B, 1) fp64 in each row."""
    values = probs.double()
    masses = values if by_mass else torch.ones_like(values)
    if probs.shape[1] < _FEW:
        return probs.masked_fill(_surplus(values, masses, missing), 0.0)

    bucket = (probs.contiguous().view(torch.int32) >> _SHIFT).long()
    histogram = masses.new_zeros(len(probs), _NUM_BUCKETS).scatter_add_(1, bucket, masses)
    above = F.pad(histogram.flip(1).cumsum(1).flip(1), (0, 1))  # of each bucket and all that are higher
    last = (above[:, :-1] >= missing).sum(1, keepdim=True).sub_(1).clamp_(min=0)  # the highest that leaves enough
    missing = missing - above.gather(1, last + 1)
    # In place, so that the comparison gives numbers: with truth values both passes take twice as long.
    kept = probs.clone().ge_((last << _SHIFT).int().view(torch.float32)).mul_(probs)
    row, column = _where(bucket == last)
    if not len(row):  # there are fewer tokens of any probability than are asked for
        return kept
    turn = torch.arange(len(row)) - torch.searchsorted(row, row)  # among the members of a row
    members, of_members = values.new_zeros(2, len(probs), int(turn.max()) + 1)
    members[row, turn] = values[row, column]
    of_members[row, turn] = masses[row, column]
    surplus = _surplus(members, of_members, missing)[row, turn]
    kept[row[surplus], column[surplus]] = 0.0
    return kept


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns where a mask (B, V) bool is true. Where few are, most of its time goes into the others, so
    these are passed over eight at a time."""
    if mask.shape[1] % 8:
        return mask.nonzero(as_tuple=True)
    row, word = mask.view(torch.int64).nonzero(as_tuple=True)
    among, byte = mask.unflatten(1, (-1, 8))[row, word].nonzero(as_tuple=True)
    return row[among], word[among] * 8 + byte


def _surplus(values: Tensor, masses: Tensor, enough: Tensor) -> Tensor:
    """Which of the values (B, C) are beyond the fewest largest whose masses are enough (B, 1): (B, C) bool."""
    order = values.argsort(dim=1, descending=True, stable=True)
    masses = masses.gather(1, order)
    beyond = masses.cumsum(1) - masses >= enough
    return torch.empty_like(beyond).scatter_(1, order, beyond)


def triton_keep(probs: Tensor, missing: Tensor, by_mass: bool) -> Tensor:
    """The same in Triton. It asks the device for nothing, so a graph can hold it."""
    probs, kept = probs.contiguous(), torch.empty_like(probs)
    _keep_kernel[(len(probs),)](probs, kept, missing, probs.shape[1], BY_MASS=by_mass, BLOCK=_BLOCK, num_warps=_WARPS)
    return kept


if triton is not None:

    @triton.jit
    def _reach(sums, mass, bits, candidate, BLOCK: tl.constexpr):
        """sums (BLOCK,) fp64, with the masses added whose bits are at or above a candidate."""
        # A factor and not a choice between two fp64: of 1.0 and 0.0 only one word differs.
        one, zero = tl.full((BLOCK,), 1.0, tl.float64), tl.full((BLOCK,), 0.0, tl.float64)
        return sums + mass * tl.where(bits >= candidate, one, zero)

    @triton.jit
    def _keep_kernel(probs, kept, missings, V, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * V
        missing = tl.load(missings + tl.program_id(0))
        threshold = tl.full((), 0, tl.int32)
        for part in range(10):
            shift = 27 - 3 * part
            # Each thread adds up its own elements; a sum over all in every iteration would make them wait for each other.
            s1 = tl.zeros((BLOCK,), tl.float64)
            s2, s3, s4, s5, s6, s7 = s1, s1, s1, s1, s1, s1
            for v0 in range(0, V, BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                p = tl.load(probs + start + v, mask=v < V, other=-1.0)
                mass = (p if BY_MASS else tl.full((BLOCK,), 1.0, tl.float32)).to(tl.float64)
                bits = p.to(tl.int32, bitcast=True)  # of -1, which stands for what is beyond the row: below all others
                s1 = _reach(s1, mass, bits, threshold + (1 << shift), BLOCK)
                s2 = _reach(s2, mass, bits, threshold + (2 << shift), BLOCK)
                s3 = _reach(s3, mass, bits, threshold + (3 << shift), BLOCK)
                s4 = _reach(s4, mass, bits, threshold + (4 << shift), BLOCK)
                s5 = _reach(s5, mass, bits, threshold + (5 << shift), BLOCK)
                s6 = _reach(s6, mass, bits, threshold + (6 << shift), BLOCK)
                s7 = _reach(s7, mass, bits, threshold + (7 << shift), BLOCK)
            digit = (tl.sum(s1, 0) >= missing).to(tl.int32) + (tl.sum(s2, 0) >= missing).to(tl.int32)
            digit += (tl.sum(s3, 0) >= missing).to(tl.int32) + (tl.sum(s4, 0) >= missing).to(tl.int32)
            digit += (tl.sum(s5, 0) >= missing).to(tl.int32) + (tl.sum(s6, 0) >= missing).to(tl.int32)
            digit += (tl.sum(s7, 0) >= missing).to(tl.int32)
            threshold += digit << shift
        value = threshold.to(tl.float32, bitcast=True).to(tl.float64) if BY_MASS else 1.0
        sums = tl.zeros((BLOCK,), tl.float64)
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            p = tl.load(probs + start + v, mask=v < V, other=-1.0)
            mass = (p if BY_MASS else tl.full((BLOCK,), 1.0, tl.float32)).to(tl.float64)
            sums = _reach(sums, mass, p.to(tl.int32, bitcast=True), threshold + 1, BLOCK)
        above = tl.sum(sums, 0)
        # Of those that equal the threshold so many, from the left, as are still missing.
        num_equal = tl.full((), 0, tl.int32)
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            p = tl.load(probs + start + v, mask=v < V, other=-1.0)
            bits = p.to(tl.int32, bitcast=True)
            equal = (bits == threshold).to(tl.int32)
            before = num_equal + tl.cumsum(equal, 0) - equal
            keep = (bits > threshold) | ((equal > 0) & (before.to(tl.float64) * value < missing - above))
            tl.store(kept + start + v, tl.where(keep, p, 0.0), mask=v < V)
            num_equal += tl.sum(equal, 0)
