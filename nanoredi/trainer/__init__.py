"""The training loop of both stages and what it needs: ranks, optimiser, state, log, guards."""

from nanoredi.trainer.loop import train
from nanoredi.trainer.step import train_step

__all__ = ["train", "train_step"]
