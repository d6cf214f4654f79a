"""The log-probabilities of a file's traces under a model, and the entropies of its predictions, computed by all ranks
without gradients: DPO's reference, and the watched pairs.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nanoredi.common.progress import progress
from nanoredi.data.batch import divide, pack
from nanoredi.data.sequences import TokenData
from nanoredi.model.qwen2 import Qwen2
from nanoredi.objectives import sequence_logps
from nanoredi.trainer.distributed import World

_CHUNK = 128  # rows divided among the ranks at once


@torch.no_grad()
def trace_sums(model: Qwen2, data: TokenData, max_tokens: int, world: World, label: str = "") -> Tensor:
    """Sums over every trace's tokens, of the log-probs and of the entropies: (2, rows, sides) fp32, on every rank.

    Args:
        model: sharded over the ranks, or whole on each.
        max_tokens: of a micro-batch; a longer row is one by itself.
        label: of the progress bar; empty: there is none.
    """
    totals = torch.zeros(2, len(data), len(data.sides), device=world.device)
    done = progress(None, label, len(data), "rows", disable=world.rank > 0 or not label)
    for start in range(0, len(data), _CHUNK):
        rows = [data.row(i) for i in range(start, min(start + _CHUNK, len(data)))]
        lengths = [sum(s.num_inputs for s in row) for row in rows]
        costs = [sum(model.config.flops(s.num_inputs, s.num_learned) for s in row) for row in rows]
        for indices in divide(lengths, costs, world.size, max_tokens)[world.rank]:
            # A rank without a row computes one all the same, because it takes part in every collective.
            sequences = [s for j in indices or [0] for s in rows[j]]
            b = pack(sequences).to(world.device)
            entropies = torch.zeros_like(b.weights)
            packed = b.input_ids, b.position_ids, b.cu_seqlens
            logps = model.logprobs(b.targets, b.rows, entropies, *packed, b.max_seqlen)
            if indices:
                for total, of_tokens in zip(totals, (logps, entropies)):
                    sums = torch.stack(sequence_logps(sequences, of_tokens))
                    total[[start + j for j in indices]] = sums.view(-1, len(data.sides))
        done.update(len(rows))
    done.close()
    # Some weights stay gathered after a forward until its backward, which never comes; the optimiser needs the shards.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    dist.all_reduce(totals)
    return totals


def means_a_token(model: Qwen2, data: TokenData, max_tokens: int, world: World) -> Tensor:
    """Per side, the means over rows of log p(y|x) / |y| and of the mean entropy a token: (2, sides) fp32."""
    lengths = torch.tensor([[s.num_learned for s in data.row(i)] for i in range(len(data))])
    return (trace_sums(model, data, max_tokens, world) / lengths.to(world.device)).mean(1)
