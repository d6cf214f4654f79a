"""An optimiser step: distribute its units over ranks and micro-batches, accumulate gradients, clip, and update.

The host never waits for the device here: a step's metrics stay there until the log needs them. Only with --offload does
a step end on the host.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nanoredi.config import StageConfig
from nanoredi.data.batch import divide, pack
from nanoredi.kernels.dispatch import after_step
from nanoredi.model.qwen2 import Qwen2
from nanoredi.objectives import Unit, needs_pairs, pair_losses
from nanoredi.trainer.distributed import World
from nanoredi.trainer.optimizer import AdamW, gradient_square


def train_step(
    model: Qwen2, optimizer: AdamW, units: list[Unit], config: StageConfig, world: World
) -> tuple[Tensor, int, float]:
    """One optimiser step over the units (objectives.units) of all ranks; skipped if its loss or gradient is not finite.

    Returns:
        Metrics (7,) on the device of the gradients: chosen and rejected log-prob, gradient norm, update norm, loss (not
        all finite if the step was skipped), chosen and rejected entropy; the step's tokens; and its flops.
    """
    lengths = [sum(s.num_inputs for s in unit) for unit in units]
    costs = [sum(model.config.flops(s.num_inputs, s.num_learned) for s in unit) for unit in units]
    micro_batches = divide(lengths, costs, world.size, config.max_tokens_per_micro_batch)[world.rank]
    totals = torch.zeros(5, device=world.device)
    for i, indices in enumerate(micro_batches):
        if isinstance(model, FSDPModule):  # gradients accumulate on each rank and are reduced once a step
            model.set_requires_gradient_sync(i == len(micro_batches) - 1)
        mine = [units[j] for j in indices] or [_idle(units)]
        totals += forward_backward(model, mine, len(units), config, world.device)
    # With several replicas of the weights (HSDP) the sum over all ranks counts every shard once per replica.
    replicas = world.size // (config.shard_size or world.size)
    square = gradient_square(model) / replicas
    sums = torch.stack((square, *totals.to(square.device)))
    dist.all_reduce(sums)
    square, chosen, rejected, loss, *entropies = sums
    norm, skip = square.sqrt(), (~sums[:4].isfinite().all()).float()
    optimizer.step(norm, config.clip, skip)
    num_parameters = sum(p.numel() for p in optimizer.parameters)
    after_step(optimizer.num_steps[0], len(micro_batches), num_parameters, model.compute_dtype)
    update = optimizer.update_square() / replicas
    dist.all_reduce(update)
    update = torch.where(skip.bool(), 0.0, update.sqrt())
    return torch.stack((chosen, rejected, norm, update, loss, *entropies)), sum(lengths), sum(costs)


def forward_backward(
    model: Qwen2, units: list[Unit], num_units: int, config: StageConfig, device: torch.device
) -> Tensor:
    """Forward and backward of a micro-batch; its gradients are added to the parameters'. The losses of pairs are
    averaged over the num_units of the whole step.

    Returns:
        The micro-batch's share of the step's mean chosen and rejected log-prob, its loss, and its mean chosen and
        rejected entropy: (5,), on the device.
    """
    b = pack([s for unit in units for s in unit]).to(device)
    packed = b.input_ids, b.position_ids, b.cu_seqlens
    entropies = torch.zeros_like(b.weights)
    if needs_pairs(config) and len(b.rows):
        logps = model.logprobs(b.targets, b.rows, entropies, *packed, b.max_seqlen)
        loss = pair_losses(config, units, logps).sum() / num_units
    else:
        loss, logps = model.loss(*packed, b.targets, b.weights, b.rows, b.max_seqlen, entropies)
    loss.backward()
    of_logps, of_entropies = ((b.shares * x).sum(1) for x in (logps.detach(), entropies))  # (2,) each
    return torch.stack((*of_logps, loss.detach(), *of_entropies))


def _idle(units: list[Unit]) -> Unit:
    """A short sequence of weight 0, for a rank that has none in this micro-batch but takes part in the collectives."""
    shortest = min((s for unit in units for s in unit), key=lambda s: len(s.tokens))
    return (shortest._replace(learned=shortest.learned & False, weight=0.0),)
