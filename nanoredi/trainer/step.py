"""An optimiser step: its units dealt to ranks and micro-batches, gradients added up, clipped, and applied.

Nothing here waits for the device: the figures of a step stay there until a line of the log is due. Only with --offload
a step ends on the host.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nanoredi.config import RediConfig, SftConfig
from nanoredi.data.batch import divide, pack
from nanoredi.kernels.dispatch import after_step
from nanoredi.model.qwen2 import Qwen2
from nanoredi.objectives import Unit, pair_losses, wants_pairs
from nanoredi.trainer.distributed import World
from nanoredi.trainer.optimizer import AdamW, gradient_square


def train_step(
    model: Qwen2, optimizer: AdamW, units: list[Unit], config: SftConfig | RediConfig, world: World
) -> tuple[Tensor, int, float]:
    """One optimiser step of all ranks' units (objectives.units); skipped where its loss or gradient is not finite.

    Returns:
        Where the gradients are: chosen and rejected log-prob, gradient norm, update norm, loss (not all finite where the step
        was skipped), chosen and rejected entropy (7,); the tokens that went through; and their floating-point operations.
    """
    lengths = [sum(s.num_inputs for s in unit) for unit in units]
    costs = [sum(model.config.flops(s.num_inputs, s.num_learned) for s in unit) for unit in units]
    micro_batches = divide(lengths, costs, world.size, config.max_tokens_per_micro_batch)[world.rank]
    totals = torch.zeros(5, device=world.device)
    for i, indices in enumerate(micro_batches):
        if isinstance(model, FSDPModule):  # gradients add up on each rank; ranks exchange them once a step
            model.set_requires_gradient_sync(i == len(micro_batches) - 1)
        mine = [units[j] for j in indices] or [_idle(units)]
        totals += forward_backward(model, mine, len(units), config, world.device)
    # With several copies of the weights, every shard is there as often as there are copies.
    copies = world.size // (config.shard_size or world.size)
    square = gradient_square(model) / copies
    sums = torch.stack((square, *totals.to(square.device)))
    dist.all_reduce(sums)
    square, chosen, rejected, loss, *entropies = sums
    norm, skip = square.sqrt(), (~sums[:4].isfinite().all()).float()
    optimizer.step(norm, config.clip, skip)
    num_parameters = sum(p.numel() for p in optimizer.parameters)
    after_step(optimizer.num_steps[0], len(micro_batches), num_parameters, model.compute_dtype)
    update = optimizer.update_square() / copies
    dist.all_reduce(update)
    update = torch.where(skip.bool(), 0.0, update.sqrt())
    return torch.stack((chosen, rejected, norm, update, loss, *entropies)), sum(lengths), sum(costs)


def forward_backward(
    model: Qwen2, units: list[Unit], num_units: int, config: SftConfig | RediConfig, device: torch.device
) -> Tensor:
    """A micro-batch's units forward and backward; its gradients are added to the parameters'. The losses of pairs are a
    mean over the num_units of the whole step.

    Returns:
        What it adds to the step's mean chosen and rejected log-prob, to its loss, and to its mean chosen and rejected
        entropy: (5,), on the device.
    """
    batch = pack([s for unit in units for s in unit]).to(device)
    entropies = torch.zeros_like(batch.weights)
    if wants_pairs(config) and len(batch.rows):
        token_logps = model.logprobs(batch.targets, batch.rows, *batch[:3], batch.max_seqlen, entropies=entropies)
        loss = pair_losses(config, units, token_logps).sum() / num_units
    else:
        loss, token_logps = model.loss(*batch[:6], batch.max_seqlen, entropies)
    loss.backward()
    logps, entropies = ((batch.shares * x).sum(1) for x in (token_logps.detach(), entropies))
    return torch.stack((*logps, loss.detach(), *entropies))


def _idle(units: list[Unit]) -> Unit:
    """What a rank with nothing to do computes, since it takes part in every collective: a short sequence that teaches
    nothing."""
    shortest = min((s for unit in units for s in unit), key=lambda s: len(s.tokens))
    return (shortest._replace(learned=np.zeros_like(shortest.learned), weight=0.0),)
