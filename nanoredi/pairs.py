"""The objectives that want both log-probabilities of a pair: DPO, SimPO, and REDI with weighted negatives.

SFT and REDI never come here: their tokens' weights are known beforehand (objectives.py), and each of their sequences may
lie in another micro-batch. Of these a pair's two sequences stay together, and the gradient goes back through both.
"""

import torch
from torch import Tensor

from nanoredi import objectives
from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.batch import WeightedSequence


def wants_pairs(config: SftConfig | RediConfig) -> bool:
    """Whether the loss is not linear in the log-probs, so that it takes a pair at once."""
    if isinstance(config, SftConfig) or config.objective == "sft":
        return False
    return config.objective != "redi" or bool(config.alpha and config.neg_weight_gamma)


def sequence_logps(sequences: list[WeightedSequence], token_logps: Tensor) -> list[Tensor]:
    """log p(y|x) of each packed sequence, () fp32 each: the sum over its learned tokens of token_logps (N,), which is 0
    elsewhere."""
    return [part.sum() for part in token_logps.split([len(s.tokens) - 1 for s in sequences])]


def pair_losses(config: RediConfig, sequences: list[WeightedSequence], token_logps: Tensor) -> Tensor:
    """The losses of a micro-batch's pairs.

    Args:
        config: the objective and its parameters.
        sequences: of p pairs: chosen, rejected, chosen, rejected, ...
        token_logps: (N,) fp32 of the packed sequences, 0 where nothing is learned.

    Returns:
        (p,) fp32, differentiable in token_logps.
    """
    logps = sequence_logps(sequences, token_logps)
    if config.objective == "dpo":
        ratios = [logp - s.reference for logp, s in zip(logps, sequences)]
        return objectives.dpo(*_chosen_and_rejected(ratios), config.beta)
    means = _chosen_and_rejected([logp / s.num_learned for logp, s in zip(logps, sequences)])
    if config.objective == "simpo":
        return objectives.simpo(*means, config.beta, config.gamma)
    return objectives.weighted_redi(*means, config.alpha, config.neg_weight_gamma)


def _chosen_and_rejected(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(p,) each."""
    return torch.stack(values[0::2]), torch.stack(values[1::2])
