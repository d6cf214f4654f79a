"""The operations that the model consists of: its layers, and the losses fused with the output head. Import from here.

cross_entropy.py is for losses that are linear in the log-probabilities, logprob.py for the others; logits.py has what
both do to a chunk of logits. layers.py has the layers; the sampler uses paged_attention.py and top_p.py. dispatch.py
chooses the version of an operation for a device.
"""

from nanoredi.kernels.cross_entropy import weighted_cross_entropy
from nanoredi.kernels.layers import embedding, linear, mlp, qkv, rms_norm, swiglu
from nanoredi.kernels.logprob import linear_logprob

__all__ = ["embedding", "linear", "linear_logprob", "mlp", "qkv", "rms_norm", "swiglu", "weighted_cross_entropy"]
