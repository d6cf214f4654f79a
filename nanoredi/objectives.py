"""The losses: SFT and REDI as the weight of each token's log-probability, DPO and SimPO as functions of a pair's.

SFT and REDI are linear in the per-token log-probabilities: loss = sum_t w_t * logp_t, with weights known before the
forward pass. Hence kernels/cross_entropy.py can finish the gradient inside forward, and the result cannot depend on
how an optimiser step is cut into micro-batches and ranks: every weight is divided by what the whole step holds.

DPO, SimPO and REDI with weighted negatives are not linear. They want both log-probabilities of a pair at once, from
kernels/logprob.py, so a pair's two sequences stay in one micro-batch. They too are means over the step's pairs.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


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


def weighted_redi(chosen: Tensor, rejected: Tensor, alpha: float, neg_weight_gamma: float) -> Tensor:
    """REDI with the option of the authors' code to learn less from negatives that are unlikely already:

        -m_w + alpha * exp(gamma * m_l) * m_l        m = log p(y|x) / |y|

    As there, the gradient goes through the weight: alpha * exp(gamma * m_l) * (1 + gamma * m_l) per unit of m_l. So it
    is not only smaller the less likely the negative is; at m_l = -1/gamma it is 0, and beyond it turns round: a
    negative is pushed down no further than 1/gamma nats a token. gamma 0 is REDI.

    Args:
        chosen, rejected: (p,) m_w and m_l of some pairs.
        alpha: weight of the incorrect traces.
        neg_weight_gamma: gamma.

    Returns:
        The pairs' losses (p,).
    """
    return -chosen + alpha * (neg_weight_gamma * rejected).exp() * rejected


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7):

        -log sigmoid(beta * (r_w - r_l))        r = log p(y|x) - log p_ref(y|x)

    where log p(y|x) is the sum over the trace's tokens, and the reference is the model that training started from.

    Args:
        chosen, rejected: (p,) r_w and r_l of some pairs.
        beta: how strongly the reference holds the model back; the smaller, the further it may go.

    Returns:
        The pairs' losses (p,).
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6):

        -log sigmoid(beta * (m_w - m_l) - gamma)        m = log p(y|x) / |y|

    with no reference: what is compared is the mean log-probability a token.

    Args:
        chosen, rejected: (p,) m_w and m_l of some pairs.
        beta: scale of the difference.
        gamma: by how much it should be positive.

    Returns:
        The pairs' losses (p,).
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
