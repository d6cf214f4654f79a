"""The size of AdamW's update of a parameter."""

from torch import Tensor

from nanoredi.kernels.dispatch import operation


@operation
def update_square(
    new: Tensor, mean: Tensor, mean_square: Tensor, rate: Tensor, correction: Tensor, eps: float, decayed: float
) -> Tensor:
    """The squared length () fp32 of a step, derived from its result, so that no copy of the old weights is kept:

        old - new = rate * mean / (sqrt(mean_square / correction) + eps) + decayed * old

    Args:
        new, mean, mean_square: a parameter after the step, and its moments; of one shape.
        rate, correction: () fp32; rate includes the mean's bias correction.
    """
    step = (mean_square / correction).sqrt_().add_(eps).reciprocal_().mul_(mean).mul_(rate)
    # new = (1 - decayed) * old - step, hence old - new = (step + decayed * new) / (1 - decayed).
    return step.add_(new, alpha=decayed).div_(1 - decayed).square_().sum()
