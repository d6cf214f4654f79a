"""The losses: SFT and REDI as the weight of each token's log-probability, DPO and SimPO as functions of a pair's.

SFT and REDI are linear in the per-token log-probabilities: loss = sum_t w_t * logp_t, with weights known before the
forward pass. Hence kernels/cross_entropy.py can finish the gradient inside forward, and the result cannot depend on
how an optimiser step is cut into micro-batches and ranks: every weight is divided by what the whole step holds.

DPO, SimPO and REDI with weighted negatives are not linear. They want both log-probabilities of a pair at once, from
kernels/logprob.py, so a pair's two sequences stay in one micro-batch. They too are means over the step's pairs.

The formulas come first; below them, units() weighs an optimiser step by its objective, and pair_losses() is what the
objectives that want pairs make of a micro-batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.sequences import SIDES, Sequence

# What must share a micro-batch: a pair where the objective wants pairs, else a sequence alone.
Unit = tuple[Sequence, ...]


def sft(num_learned: list[int], row_weights: list[float] | None = None) -> list[float]:
    """SFT, the mean of -log p over all learned tokens of the optimiser step: each sequence's w_t = -1 / sum_i |y_i|.

    Args:
        num_learned: |y_i|, the number of learned tokens of each sequence of the step.
        row_weights: c_i, where rows have weights of their own: w_t = -c_i / sum_i |y_i|, so that a trace of a negative
            weight is unlearned.
    """
    total = sum(num_learned)
    return [-weight / total for weight in row_weights or [1.0] * len(num_learned)]


def redi(
    num_chosen: list[int], num_rejected: list[int], alpha: float, chosen_weight: float = 1.0
) -> tuple[list[float], list[float]]:
    """REDI (arXiv 2505.24850, stage 2), the mean over the step's P pairs (x, y_w, y_l) of

        -log p(y_w|x) / |y_w| + alpha * log p(y_l|x) / |y_l|

    so w_t = -1 / (P |y_w|) in each chosen trace and alpha / (P |y_l|) in each rejected one. There is no reference model and
    no KL term; alpha < 1 is what keeps it from collapse. With alpha 0 it is SFT on the chosen traces, each trace
    counting the same.

    Args:
        num_chosen, num_rejected: |y_w| and |y_l| of each pair of the step.
        alpha: weight of the incorrect traces.
        chosen_weight: of the correct ones, which the paper has at 1.
    """
    pairs = len(num_chosen)
    return [-chosen_weight / (pairs * n) for n in num_chosen], [alpha / (pairs * n) for n in num_rejected]


def weighted_redi(
    chosen: Tensor, rejected: Tensor, alpha: float, neg_weight_gamma: float, chosen_weight: float = 1.0
) -> Tensor:
    """REDI with the option of the authors' code to learn less from negatives that are unlikely already; pairs' losses (p,):

        -m_w + alpha * exp(gamma * m_l) * m_l        m = log p(y|x) / |y|

    As there, the gradient goes through the weight: alpha * exp(gamma * m_l) * (1 + gamma * m_l) per unit of m_l. So it
    is not only smaller the less likely the negative is; at m_l = -1/gamma it is 0, and beyond it turns round: a
    negative is pushed down no further than 1/gamma nats a token. gamma 0 is REDI.

    Args:
        chosen, rejected: (p,) m_w and m_l.
        alpha, chosen_weight: as in redi.
        neg_weight_gamma: gamma.
    """
    return -chosen_weight * chosen + alpha * (neg_weight_gamma * rejected).exp() * rejected


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7), the losses (p,) of some pairs:

        -log sigmoid(beta * (r_w - r_l))        r = log p(y|x) - log p_ref(y|x)

    where log p(y|x) is the sum over the trace's tokens, and the reference is the model that training started from.

    Args:
        chosen, rejected: (p,) r_w and r_l.
        beta: how strongly the reference holds the model back; the smaller, the further it may go.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6), the losses (p,) of some pairs:

        -log sigmoid(beta * (m_w - m_l) - gamma)        m = log p(y|x) / |y|

    with no reference: what is compared is the mean log-probability a token.

    Args:
        chosen, rejected: (p,) m_w and m_l.
        beta: scale of the difference.
        gamma: by how much it should be positive.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def wants_pairs(config: SftConfig | RediConfig) -> bool:
    """Whether the loss is not linear in the log-probabilities, so that it takes a pair at once."""
    if isinstance(config, SftConfig) or config.objective == "sft":
        return False
    return config.objective != "redi" or bool(config.alpha and config.neg_weight_gamma)


def units(config: SftConfig | RediConfig, rows: list[tuple[Sequence, ...]]) -> list[Unit]:
    """The rows of an optimiser step as its units, each sequence with its weight and its share.

    Args:
        rows: of the whole step, as TokenData.row gives them.

    Returns:
        Pairs where the objective wants them. Else sequences, first the chosen and then the rejected ones. Those of weight 0
        teach nothing and are left out; REDI's chosen ones stay, since their log-probability tells of a collapse, and of SFT one.
    """
    if isinstance(config, SftConfig) or config.objective == "sft":
        traces = [row[0] for row in rows]
        weights = sft([s.num_learned for s in traces], [s.row_weight for s in traces])
        kept = [(s, w) for s, w in zip(traces, weights) if w] or [(traces[0], 0.0)]
        tokens = {side: sum(s.num_learned for s, _ in kept if s.side == side) for side in SIDES}
        return [(s._replace(weight=w, share=1 / tokens[s.side]),) for s, w in kept]
    chosen, rejected = ([s._replace(share=1 / (len(rows) * s.num_learned)) for s in side] for side in zip(*rows))
    if wants_pairs(config):
        return list(zip(chosen, rejected))
    counts = [[s.num_learned for s in side] for side in (chosen, rejected)]
    weights = redi(*counts, config.alpha, config.chosen_weight)
    weighed = [(s, w * s.row_weight) for s, w in zip(chosen + rejected, weights[0] + weights[1])]
    return [(s._replace(weight=w),) for s, w in weighed if w or s.side == "chosen"]


def sequence_logps(sequences: list[Sequence], token_logps: Tensor) -> list[Tensor]:
    """log p(y|x) of each packed sequence, () fp32 each: the sum over its learned tokens of token_logps (N,), which is 0
    elsewhere."""
    return [part.sum() for part in token_logps.split([s.num_inputs for s in sequences])]


def pair_losses(config: RediConfig, pairs: list[Unit], token_logps: Tensor) -> Tensor:
    """The losses (p,) fp32 of a micro-batch's p pairs, packed one after the other; differentiable in token_logps (N,)
    fp32, which is 0 where nothing is learned."""
    sequences = [s for pair in pairs for s in pair]
    logps = sequence_logps(sequences, token_logps)
    if config.objective == "dpo":
        ratios = [logp - s.reference for logp, s in zip(logps, sequences)]
        return dpo(*torch.stack(ratios).view(-1, 2).unbind(1), config.beta)
    # A row's weight is 1 but where REDI's correct traces have another.
    means = torch.stack([logp / s.num_learned * s.row_weight for logp, s in zip(logps, sequences)])
    means = means.view(-1, 2).unbind(1)
    if config.objective == "simpo":
        return simpo(*means, config.beta, config.gamma)
    return weighted_redi(*means, config.alpha, config.neg_weight_gamma, config.chosen_weight)
