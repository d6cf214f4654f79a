"""AdamW's surroundings: the gradient's clip, the learning rate's schedule, the size of an update, and a step that is not
taken.

All of it works on the ranks' own shards and never waits for the device: whether a step is taken at all is a number on
the device, which the fused AdamW reads there.
"""

import math

import torch
from torch import Tensor, nn

from nanoredi.distributed import local


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the paper's betas and eps, over all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
    )


def schedule(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate at a step, counted from 0: linear up over warmup * total steps, linear down
    to 0."""
    # differs from the original: no step has the rate 0; its first one has.
    rising = math.ceil(warmup * total)
    return min((step + 1) / rising if rising else 1.0, (total - step) / max(1, total - rising))


def gradient_square(model: nn.Module) -> Tensor:
    """The squared length of the gradient, of this rank's shards: () fp32."""
    return torch.nn.utils.get_total_norm([local(p.grad) for p in model.parameters()]).square()


@torch.no_grad()
def clipped_step(model: nn.Module, optimizer: torch.optim.AdamW, norm: Tensor, longest: float, skip: Tensor) -> None:
    """Scale the gradient down to a length of `longest` if it is longer, take AdamW's step, and drop the gradient.

    Args:
        norm: () the gradient's length, over all ranks.
        skip: () fp32; where it is 1 nothing changes, AdamW's own step count included.
    """
    scale = (longest / (norm + 1e-6)).clamp(max=1.0)
    for p in model.parameters():
        local(p.grad).mul_(scale)
    optimizer.grad_scale, optimizer.found_inf = None, skip  # what the fused AdamW knows from torch.amp
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def update_square(optimizer: torch.optim.AdamW) -> Tensor:
    """The squared length of the step that AdamW took last, over this rank's shards: () fp32.

    Worked out again from the optimizer's state, so that no copy of the weights is kept:
    old - new = lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * old).
    """
    squares = []
    for group in optimizer.param_groups:
        lr, eps, decay, (b1, b2) = group["lr"], group["eps"], group["weight_decay"], group["betas"]
        for p in group["params"]:
            state = optimizer.state[p]
            t = state["step"]
            new, m, v = (local(x) for x in (p, state["exp_avg"], state["exp_avg_sq"]))
            step = (v / (1 - b2**t)).sqrt_().add_(eps).reciprocal_().mul_(m).mul_(lr / (1 - b1**t))
            # new = (1 - lr * decay) * old - step, hence old - new = (step + lr * decay * new) / (1 - lr * decay).
            step.add_(new, alpha=lr * decay)
            squares.append((step / (1 - lr * decay)).square_().sum())
    return torch.stack(squares).sum()
