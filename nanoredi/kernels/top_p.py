"""Top-k and top-p: keep the fewest likeliest tokens whose number, or whose probability, is enough.

Only the threshold is needed, not the order: the largest value such that what is at or above it is enough. Plain PyTorch
sorts, which is slow on a GPU. The bits of positive floats, read as integers, have the same order as the floats, so the
kernel searches for the threshold among integers.

A program of the Triton kernel takes a row. It finds the threshold's 30 bits three at a time: each time it goes over the
row once and adds up what is at or above each of seven candidates. Sums are in fp64.
"""

import torch
from torch import Tensor

from nanoredi.kernels.dispatch import operation, tl, triton

# Elements and warps of a program. A thread has one load of 16 bytes in flight, so it takes many threads to hide the
# memory's latency; larger blocks do not fit into the registers.
_BLOCK, _WARPS = 2048, 16


def keep_likeliest(probs: Tensor, enough: float, by_mass: bool) -> Tensor:
    """Set all probabilities to 0 but the fewest largest ones that are enough. Of equal ones the first are kept.

    Args:
        probs: (B, V) fp32 from 0 to 1. The result of a row with NaN is undefined.
        enough: if by_mass a share of the row's sum, else a number of tokens.

    Returns:
        (B, V) fp32.
    """
    if by_mass:
        # Less by the rounding error of fp64 sums.
        needed = probs.sum(1, keepdim=True, dtype=torch.float64) * (enough * (1 - 1e-12))
    else:
        needed = probs.new_full((len(probs), 1), enough, dtype=torch.float64)
    return keep(probs, needed, by_mass)


@operation
def keep(probs: Tensor, needed: Tensor, by_mass: bool) -> Tensor:
    """keep_likeliest, given the mass or the number of tokens that each row needs: (B, 1) fp64."""
    values = probs.double()
    return probs.masked_fill(surplus(values, values if by_mass else torch.ones_like(values), needed), 0.0)


def surplus(values: Tensor, masses: Tensor, enough: Tensor) -> Tensor:
    """Which values (B, C) are not among the fewest largest whose masses (B, C) add up to enough (B, 1): (B, C) bool."""
    order = values.argsort(dim=1, descending=True, stable=True)
    masses = masses.gather(1, order)
    beyond = masses.cumsum(1) - masses >= enough
    return torch.empty_like(beyond).scatter_(1, order, beyond)


if triton is not None:

    @keep.on("cuda")
    def _launch(probs, needed, by_mass):
        """This never waits for the device, so a CUDA graph can capture it."""
        probs, kept = probs.contiguous(), torch.empty_like(probs)
        _keep_kernel[(len(probs),)](
            probs, kept, needed, probs.shape[1], BY_MASS=by_mass, BLOCK=_BLOCK, num_warps=_WARPS
        )
        return kept

    @triton.jit
    def _reach(sums, mass, bits, candidate, BLOCK: tl.constexpr):
        """sums (BLOCK,) fp64, plus the masses whose bits are at or above a candidate."""
        # Multiplying by 1.0 or 0.0 is cheaper than selecting between two fp64: the constants differ in one word only.
        one, zero = tl.full((BLOCK,), 1.0, tl.float64), tl.full((BLOCK,), 0.0, tl.float64)
        return sums + mass * tl.where(bits >= candidate, one, zero)

    @triton.jit
    def _keep_kernel(probs, kept, neededs, V, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * V
        needed = tl.load(neededs + tl.program_id(0))
        threshold = tl.full((), 0, tl.int32)
        for part in range(10):
            shift = 27 - 3 * part
            # Each thread adds up its own elements; a reduction in every iteration would make threads wait.
            s1 = tl.zeros((BLOCK,), tl.float64)
            s2, s3, s4, s5, s6, s7 = s1, s1, s1, s1, s1, s1
            for v0 in range(0, V, BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                p = tl.load(probs + start + v, mask=v < V, other=-1.0)
                mass = (p if BY_MASS else tl.full((BLOCK,), 1.0, tl.float32)).to(tl.float64)
                bits = p.to(tl.int32, bitcast=True)  # those of -1, the padding, are below all others
                s1 = _reach(s1, mass, bits, threshold + (1 << shift), BLOCK)
                s2 = _reach(s2, mass, bits, threshold + (2 << shift), BLOCK)
                s3 = _reach(s3, mass, bits, threshold + (3 << shift), BLOCK)
                s4 = _reach(s4, mass, bits, threshold + (4 << shift), BLOCK)
                s5 = _reach(s5, mass, bits, threshold + (5 << shift), BLOCK)
                s6 = _reach(s6, mass, bits, threshold + (6 << shift), BLOCK)
                s7 = _reach(s7, mass, bits, threshold + (7 << shift), BLOCK)
            digit = (tl.sum(s1, 0) >= needed).to(tl.int32) + (tl.sum(s2, 0) >= needed).to(tl.int32)
            digit += (tl.sum(s3, 0) >= needed).to(tl.int32) + (tl.sum(s4, 0) >= needed).to(tl.int32)
            digit += (tl.sum(s5, 0) >= needed).to(tl.int32) + (tl.sum(s6, 0) >= needed).to(tl.int32)
            digit += (tl.sum(s7, 0) >= needed).to(tl.int32)
            threshold += digit << shift
        value = threshold.to(tl.float32, bitcast=True).to(tl.float64) if BY_MASS else 1.0
        sums = tl.zeros((BLOCK,), tl.float64)
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            p = tl.load(probs + start + v, mask=v < V, other=-1.0)
            mass = (p if BY_MASS else tl.full((BLOCK,), 1.0, tl.float32)).to(tl.float64)
            sums = _reach(sums, mass, p.to(tl.int32, bitcast=True), threshold + 1, BLOCK)
        above = tl.sum(sums, 0)
        # Of those equal to the threshold, keep as many as are still needed, from the left.
        num_equal = tl.full((), 0, tl.int32)
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            p = tl.load(probs + start + v, mask=v < V, other=-1.0)
            bits = p.to(tl.int32, bitcast=True)
            equal = (bits == threshold).to(tl.int32)
            before = num_equal + tl.cumsum(equal, 0) - equal
            keep = (bits > threshold) | ((equal > 0) & (before.to(tl.float64) * value < needed - above))
            tl.store(kept + start + v, tl.where(keep, p, 0.0), mask=v < V)
            num_equal += tl.sum(equal, 0)
