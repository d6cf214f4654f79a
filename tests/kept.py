"""An AdamW that keeps its last step's incoming gradients, which the step itself scales and drops."""

from torch import Tensor, nn

from nanoredi.trainer.optimizer import AdamW


class KeepingAdamW(AdamW):
    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(model, lr, weight_decay)
        self.model, self.grads = model, {}

    def step(self, *args: Tensor | float) -> None:
        for name, p in self.model.named_parameters():
            self.grads[name] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()).cpu()
        super().step(*args)
