"""The operations that have a CPU version."""

import torch

from nanoredi import kernels
from nanoredi.kernels import adamw, dispatch, layers, logits, paged_attention, top_p
from nanoredi.model.attention import causal_attention

OWN = [kernels.weighted_cross_entropy, kernels.linear_logprob, adamw.update_square, causal_attention]
OWN += [logits.logprobs_, paged_attention.paged_decode, top_p.keep]


def test_every_operation_and_hook():
    dispatch.drop_gradient(torch.nn.Parameter(torch.ones(1)))  # the first CPU tensor imports nanoredi.cpu
    hooks = {dispatch.prepare_for_training, dispatch.prepare_for_sampling, dispatch.drop_gradient, dispatch.after_step}
    of_layers = {op for op in vars(layers).values() if isinstance(op, dispatch.operation)}
    assert len(of_layers) == 10
    of_layers -= {layers.swiglu, layers.qkv}  # swiglu is for a GPU's joined products; qkv calls others that have one
    assert all("cpu" in op.faster for op in {*OWN, *hooks, *of_layers})
