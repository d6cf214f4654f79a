"""The fused head of the loss. Import the functions from here; each file is one kernel beside the plain PyTorch it must
equal."""

from nanoredi.kernels.cross_entropy import weighted_cross_entropy

__all__ = ["weighted_cross_entropy"]
