"""AdamW with gradient clipping, skipped steps and the size of an update; and the learning rate's schedule.

Every rank works on its own shards, and the host never waits for the device: whether a step is skipped is a number on
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

    torch's function does the arithmetic. Its class would only add an import of torch._dynamo: a second and 0.1 GB.

    Attributes:
        lr: the next step's learning rate.
        parameters: the model's.
        exp_avg, exp_avg_sq: the moments m and v, shaped and sharded like the parameters.
        num_steps: () fp32 for each parameter: the steps taken.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        self.lr, self.weight_decay = lr, weight_decay
        self.parameters = list(model.parameters())
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.num_steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        """Clip the gradient to a norm of max_norm, take a step, and clear the gradient.

        Args:
            norm: () the gradient's norm over all ranks.
            skip: () fp32; if 1, nothing changes, not even the count of steps.
        """
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = [local(p.grad) for p in self.parameters]
        torch._foreach_mul_(gradients, scale)
        parameters, means, squares = ([local(x) for x in xs] for xs in (self.parameters, self.exp_avg, self.exp_avg_sq))
        # found_inf is how torch.amp has a step skipped.
        options: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "found_inf": skip}
        options |= {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "lr": self.lr, "weight_decay": self.weight_decay}
        adamw(parameters, gradients, means, squares, [], self.num_steps, **options)
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
    """The squared length of the gradient, over this rank's shards: () fp32."""
    return torch.nn.utils.get_total_norm([local(p.grad) for p in model.parameters()]).square()


def schedule(step: int, total: int, warmup: float) -> float:
    """The learning rate of a step, counted from 0, as a share of the peak: linear up over warmup * total steps, then
    linear down to 0."""
    # differs from the original, whose first step has the rate 0: here no step has.
    warmup_steps = math.ceil(warmup * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (total - step) / (total - warmup_steps)
