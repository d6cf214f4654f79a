"""What exists only to be fast on a GPU, beside the kernels of the loss and of the sampler, which are the method's own. Importing
it registers all of it with kernels/dispatch.py; nothing else imports it, and without it the plain versions run."""

from nanoredi.kernels.dispatch import triton

if triton is not None:
    from nanoredi.cuda import graphs, pointwise  # noqa: F401
