"""The losses: SFT and REDI as weights of the tokens' log-probabilities, DPO and SimPO as functions of a pair's.

SFT and REDI are linear in the per-token log-probabilities: loss = sum_t w_t * logp_t, with weights known before the
forward pass. Hence kernels/cross_entropy.py can finish the gradient inside forward, and the result cannot depend on
how an optimiser step is cut into micro-batches and ranks: every weight is divided by what the whole step holds.

DPO, SimPO and REDI with weighted negatives are not linear. They need both log-probabilities of a pair at once, from
kernels/logprob.py, so a pair's two sequences stay in one micro-batch. They too are means over the step's pairs.

The formulas come first. Below them, units() assigns the weights in an optimiser step, and pair_losses() computes the
losses of a micro-batch of pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoredi.config import RediConfig, StageConfig
from nanoredi.data.sequences import SIDES, Sequence

# Sequences that must share a micro-batch: a pair if the objective needs pairs, otherwise a single sequence.
Unit = tuple[Sequence, ...]


def sft(num_learned: list[int], row_weights: list[float] | None = None) -> list[float]:
    """SFT, the mean of -log p over all learned tokens of the optimiser step: each sequence's w_t = -1 / sum_i |y_i|.

    Args:
        num_learned: |y_i|, the number of learned tokens of each sequence of the step.
        row_weights: c_i, if rows have weights: w_t = -c_i / sum_i |y_i|, so a trace of negative weight is unlearned.
    """
    total = sum(num_learned)
    return [-weight / total for weight in row_weights or [1.0] * len(num_learned)]


def redi(
    num_chosen: list[int], num_rejected: list[int], alpha: float, chosen_weight: float = 1.0
) -> tuple[list[float], list[float]]:
    """REDI (arXiv 2505.24850, stage 2), the mean over the step's P pairs (x, y_w, y_l) of

        -log p(y_w|x) / |y_w| + alpha * log p(y_l|x) / |y_l|

    so w_t = -1 / (P |y_w|) in each chosen trace and alpha / (P |y_l|) in each rejected one. There is no reference model
    and no KL term; alpha < 1 is what prevents a collapse. With alpha 0 it is SFT on the chosen traces, in which each
    trace has the same weight.

    Args:
        num_chosen, num_rejected: |y_w| and |y_l| of each pair of the step.
        alpha: weight of the incorrect traces.
        chosen_weight: weight of the correct traces, 1 in the paper.
    """
    pairs = len(num_chosen)
    return [-chosen_weight / (pairs * n) for n in num_chosen], [alpha / (pairs * n) for n in num_rejected]


def weighted_redi(
    chosen: Tensor, rejected: Tensor, alpha: float, neg_weight_gamma: float, chosen_weight: float = 1.0
) -> Tensor:
    """REDI with the option of the authors' code to learn less from negatives that are already unlikely; losses (p,):

        -m_w + alpha * exp(gamma * m_l) * m_l        m = log p(y|x) / |y|

    As there, the gradient goes through the weight: it is alpha * exp(gamma * m_l) * (1 + gamma * m_l) with respect to
    m_l. So it not only shrinks as the negative becomes less likely: it is 0 at m_l = -1/gamma and changes sign below,
    hence a negative is not pushed below -1/gamma nats per token. gamma 0 is REDI.

    Args:
        chosen, rejected: (p,) m_w and m_l.
        alpha, chosen_weight: as in redi.
        neg_weight_gamma: gamma.
    """
    return -chosen_weight * chosen + alpha * (neg_weight_gamma * rejected).exp() * rejected


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7), the losses (p,) of some pairs:

        -log sigmoid(beta * (r_w - r_l))        r = log p(y|x) - log p_ref(y|x)

    where log p(y|x) is the sum over the trace's tokens, and the reference is the model from which training started.

    Args:
        chosen, rejected: (p,) r_w and r_l.
        beta: how strongly the model is kept near the reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6), the losses (p,) of some pairs:

        -log sigmoid(beta * (m_w - m_l) - gamma)        m = log p(y|x) / |y|

    without a reference: it compares the mean log-probabilities per token.

    Args:
        chosen, rejected: (p,) m_w and m_l.
        beta: scale of the difference.
        gamma: the target margin.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def needs_pairs(config: StageConfig) -> bool:
    """Whether the loss is not linear in the log-probabilities, so it needs both sequences of a pair at once."""
    return config.objective in ("dpo", "simpo") or bool(config.alpha and config.neg_weight_gamma)


def units(config: StageConfig, rows: list[tuple[Sequence, ...]]) -> list[Unit]:
    """The rows of an optimiser step as units, each sequence with its weight and its share.

    Args:
        rows: of the whole step, as returned by TokenData.row.

    Returns:
        Pairs if the objective needs them. Otherwise single sequences, first the chosen and then the rejected ones.
        Those of weight 0 are left out, except REDI's chosen ones, whose log-probability shows a collapse, and one for
        an SFT step of nothing else.
    """
    if config.objective == "sft":
        traces = [row[0] for row in rows]
        weights = sft([s.num_learned for s in traces], [s.row_weight for s in traces])
        weighted = [s._replace(weight=w) for s, w in zip(traces, weights)]
        kept = [s for s in weighted if s.weight] or weighted[:1]
        tokens = {side: sum(s.num_learned for s in kept if s.side == side) for side in SIDES}
        return [(s._replace(share=1 / tokens[s.side]),) for s in kept]
    pairs = [tuple(s._replace(share=1 / (len(rows) * s.num_learned)) for s in row) for row in rows]
    if needs_pairs(config):
        return pairs
    chosen, rejected = zip(*pairs)
    counts = [s.num_learned for s in chosen], [s.num_learned for s in rejected]
    of_chosen, of_rejected = redi(*counts, config.alpha, config.chosen_weight)
    weighted = [s._replace(weight=w * s.row_weight) for s, w in zip(chosen + rejected, of_chosen + of_rejected)]
    return [(s,) for s in weighted if s.weight or s.side == "chosen"]


def sequence_logps(sequences: list[Sequence], token_logps: Tensor) -> list[Tensor]:
    """log p(y|x) of each packed sequence, () fp32 each: the sum of its part of token_logps (N,), which is 0 where
    nothing is learned."""
    return [part.sum() for part in token_logps.split([s.num_inputs for s in sequences])]


def pair_losses(config: RediConfig, pairs: list[Unit], token_logps: Tensor) -> Tensor:
    """The losses (p,) fp32 of a micro-batch's p packed pairs, differentiable with respect to token_logps (N,) fp32,
    which is 0 where nothing is learned."""
    sequences = [s for pair in pairs for s in pair]
    logps = sequence_logps(sequences, token_logps)
    if config.objective == "dpo":
        ratios = torch.stack([logp - s.reference for logp, s in zip(logps, sequences)])
        chosen, rejected = ratios.view(-1, 2).unbind(1)
        return dpo(chosen, rejected, config.beta)
    # Only REDI's correct traces may have a row weight other than 1.
    means = torch.stack([logp / s.num_learned * s.row_weight for logp, s in zip(logps, sequences)])
    chosen, rejected = means.view(-1, 2).unbind(1)
    if config.objective == "simpo":
        return simpo(chosen, rejected, config.beta, config.gamma)
    return weighted_redi(chosen, rejected, config.alpha, config.neg_weight_gamma, config.chosen_weight)
