"""AdamW, with the gradient's clip, steps that are not taken and the size of an update; and the learning rate's schedule.

All of it works on the ranks' own shards and never waits for the device: whether a step is taken at all is a number on
the device, which the fused AdamW reads there.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanoredi.kernels.adamw import update_square
from nanoredi.kernels.dispatch import drop_gradient
from nanoredi.trainer.distributed import local

BETAS, EPS = (0.9, 0.999), 1e-8  # the paper's


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2).

    torch's function does the arithmetic; its class adds nothing here and imports torch._dynamo, a second and 0.1 GB.

    Attributes:
        lr: the next step's learning rate.
        parameters: the model's.
        exp_avg, exp_avg_sq: their moments m and v, with their shapes, dtypes and shards.
        num_steps: () fp32, once a parameter: the steps taken.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        self.lr, self.weight_decay = lr, weight_decay
        self.parameters = list(model.parameters())
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.num_steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, norm: Tensor, longest: float, skip: Tensor) -> None:
        """Scale the gradient down to a length of `longest` if it is longer, take a step, and drop the gradient.

        Args:
            norm: () the gradient's length, over all ranks.
            skip: () fp32; where it is 1 nothing changes, the count of steps included.
        """
        scale = (longest / (norm + 1e-6)).clamp(max=1.0)
        gradients = [local(p.grad).mul_(scale) for p in self.parameters]
        parameters, means, squares = ([local(x) for x in xs] for xs in (self.parameters, self.exp_avg, self.exp_avg_sq))
        # found_inf is torch.amp's word for a step to be skipped.
        kind: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "found_inf": skip}
        kind |= {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "lr": self.lr, "weight_decay": self.weight_decay}
        adamw(parameters, gradients, means, squares, [], self.num_steps, **kind)
        for p in self.parameters:
            drop_gradient(p)

    @torch.no_grad()
    def update_square(self) -> Tensor:
        """The squared length of the last step, over this rank's shards: () fp32."""
        of_mean, of_square = (1 - beta ** self.num_steps[0] for beta in BETAS)
        rate, decayed = self.lr / of_mean, self.lr * self.weight_decay
        tensors = zip(self.parameters, self.exp_avg, self.exp_avg_sq)
        squares = [update_square(local(p), local(m), local(v), rate, of_square, EPS, decayed) for p, m, v in tensors]
        return torch.stack(squares).sum()


def gradient_square(model: nn.Module) -> Tensor:
    """The squared length of the gradient, of this rank's shards: () fp32."""
    return torch.nn.utils.get_total_norm([local(p.grad) for p in model.parameters()]).square()


def schedule(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate at a step, counted from 0: linear up over warmup * total steps, linear down
    to 0."""
    # differs from the original: no step has the rate 0; its first one has.
    rising = math.ceil(warmup * total)
    return min((step + 1) / rising if rising else 1.0, (total - step) / max(1, total - rising))
