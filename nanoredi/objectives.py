"""The losses, as the weight of each token's log-probability.

SFT and REDI are linear in the per-token log-probabilities: loss = sum_t w_t * logp_t, with weights known before the
forward pass. Hence kernels/cross_entropy.py can finish the gradient inside forward, and the result cannot depend on
how an optimiser step is cut into micro-batches and ranks: every weight is divided by what the whole step holds.
"""

from collections.abc import Sequence


def sft(num_learned: Sequence[int]) -> list[float]:
    """SFT, the mean of -log p over all learned tokens of the optimiser step:  w_t = -1 / sum_i |y_i|.

    Args:
        num_learned: |y_i|, the number of learned tokens of each sequence of the step.

    Returns:
        The weight of every learned token of each sequence.
    """
    return [-1.0 / sum(num_learned)] * len(num_learned)


def redi(num_chosen: Sequence[int], num_rejected: Sequence[int], alpha: float) -> tuple[list[float], list[float]]:
    """REDI (arXiv 2505.24850, stage 2), the mean over the step's P pairs (x, y_w, y_l) of

        -log p(y_w|x) / |y_w| + alpha * log p(y_l|x) / |y_l|

    so w_t = -1 / (P |y_w|) on a chosen token and alpha / (P |y_l|) on a rejected one. There is no reference model and
    no KL term; alpha < 1 is what keeps it from collapse. With alpha 0 it is SFT on the chosen traces, each trace
    counting the same.

    Args:
        num_chosen, num_rejected: |y_w| and |y_l| of each pair of the step.
        alpha: weight of the incorrect traces.

    Returns:
        The weight of every learned token of each chosen and each rejected sequence.
    """
    pairs = len(num_chosen)
    return [-1.0 / (pairs * n) for n in num_chosen], [alpha / (pairs * n) for n in num_rejected]
