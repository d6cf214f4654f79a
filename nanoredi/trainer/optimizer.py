"""AdamW, with the gradient's clip, steps that are not taken and the size of an update; and the learning rate's schedule.

All of it works on the ranks' own shards and never waits for the device: whether a step is taken at all is a number on
the device, which the fused AdamW reads there.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanoredi.cpu.masters import drop_gradients
from nanoredi.kernels.pointwise import call_pointwise, runs_pointwise
from nanoredi.trainer.distributed import local

BETAS, EPS = (0.9, 0.999), 1e-8  # the paper's
# Of a parameter, worked on at once on a CPU: they stay in its cache.
_CPU_ELEMENTS = 1 << 18
_PIECE = 1 << 14  # and whose squares C sums up


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
        grads = [local(p.grad).mul_(scale) for p in self.parameters]
        adamw(
            *([local(x) for x in xs] for xs in (self.parameters, grads, self.exp_avg, self.exp_avg_sq)),
            [],
            self.num_steps,
            fused=True,
            found_inf=skip,  # what it knows from torch.amp
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=EPS,
            maximize=False,
        )
        drop_gradients(self.parameters)

    @torch.no_grad()
    def update_square(self) -> Tensor:
        """The squared length of the last step, over this rank's shards: () fp32.

        Worked out again from the moments, so that no copy of the weights is kept:
        old - new = lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * old).
        """
        squares, decayed = [], self.lr * self.weight_decay
        for p, m, v, t in zip(self.parameters, self.exp_avg, self.exp_avg_sq, self.num_steps):
            tensors = [local(x) for x in (p, m, v)]
            rate, correction = self.lr / (1 - BETAS[0] ** t), 1 - BETAS[1] ** t
            if runs_pointwise(tensors[0]) and all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
                squares.append(_square_in_c(*tensors, rate, correction, decayed))
                continue
            tensors = [x.flatten() for x in tensors]
            size = _CPU_ELEMENTS if p.is_cpu else max(1, len(tensors[0]))
            for new, mean, mean_square in zip(*(x.split(size) for x in tensors)):
                step = (mean_square / correction).sqrt_().add_(EPS).reciprocal_().mul_(mean).mul_(rate)
                # new = (1 - decayed) * old - step, hence old - new = (step + decayed * new) / (1 - decayed).
                step.add_(new, alpha=decayed)
                squares.append(step.div_(1 - decayed).square_().sum())
        return torch.stack(squares).sum()


def _square_in_c(
    new: Tensor, mean: Tensor, mean_square: Tensor, rate: Tensor, correction: Tensor, decayed: float
) -> Tensor:
    squares = torch.empty(-(-new.numel() // _PIECE))
    factors = rate.item(), correction.item(), EPS, decayed
    call_pointwise("update_square", new, mean, mean_square, squares, new.numel(), _PIECE, *factors)
    return squares.sum()


def gradient_square(model: nn.Module) -> Tensor:
    """The squared length of the gradient, of this rank's shards: () fp32."""
    return torch.nn.utils.get_total_norm([local(p.grad) for p in model.parameters()]).square()


def schedule(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate at a step, counted from 0: linear up over warmup * total steps, linear down
    to 0."""
    # differs from the original: no step has the rate 0; its first one has.
    rising = math.ceil(warmup * total)
    return min((step + 1) / rising if rising else 1.0, (total - step) / max(1, total - rising))
