"""What the model is made of: linear layers, norms, the embedding, the fused head of the losses. Import from here.

cross_entropy.py is for losses that are linear in the log-probabilities, logprob.py for the others. Both go over the
tokens by chunks.py and do to each chunk of logits what rows.py does: in Triton on a GPU, in C on a CPU, in plain PyTorch
where neither is to be had. causal.py is attention's, decode.py and likeliest.py are the sampler's; these are imported from
there.
"""

from nanoredi.kernels.cross_entropy import weighted_cross_entropy
from nanoredi.kernels.embedding import embedding
from nanoredi.kernels.logprob import linear_logprob
from nanoredi.kernels.norm import rms_norm
from nanoredi.kernels.pointwise import rotate
from nanoredi.kernels.products import PRODUCTS, gated_linear, linear, packed

__all__ = [
    "PRODUCTS",
    "embedding",
    "gated_linear",
    "linear",
    "linear_logprob",
    "packed",
    "rms_norm",
    "rotate",
    "weighted_cross_entropy",
]
