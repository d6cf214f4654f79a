"""What exists only to be fast on a GPU, apart from the Triton kernels of the loss and of the sampler (kernels/).
Only kernels/dispatch.py imports it, where it registers itself; without it the plain versions run."""

from nanoredi.kernels.dispatch import triton

if triton is not None:
    from nanoredi.cuda import graphs, pointwise  # noqa: F401
