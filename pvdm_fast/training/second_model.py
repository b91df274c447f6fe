"""A model that is trained beside a stage's own, in turns or in the same steps, with an optimizer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

SETTINGS = ("lr", "betas", "weight_decay")
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class SecondModel:
    """The model, its optimizer and, for float16, its loss scale."""

    def __init__(self, nets: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.nets, self.make_optimizer = nets, make_optimizer

    def prepare(self, accelerator: Accelerator) -> None:
        """Move and wrap the model. With data parallelism its gradients are averaged."""
        self.accelerator = accelerator
        self.nets.to(accelerator.device)
        self.prepared: nn.Module = accelerator.prepare_model(self.nets)
        self.optimizer = self.make_optimizer(self.nets)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.scaler is not None)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        self.scaler.scale(loss).backward()

    def clip(self, longest: float, *parts: nn.Module) -> Tensor:
        """Scale down the gradients of each part that are longer than that; their norm before, of all together."""
        self.scaler.unscale_(self.optimizer)
        norms = [nn.utils.clip_grad_norm_(part.parameters(), longest) for part in parts or (self.nets,)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def step(self, norm: float) -> None:
        """One optimizer step with the clipped gradients, left out where their ``norm`` is not finite."""
        if math.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def abandon(self) -> None:
        """Leave a step out whose gradients have been clipped."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # as it was: else the next clipping would be refused

    def state(self) -> dict[str, Any]:
        return {
            "nets": self.nets.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The settings of the optimizer stay those of now."""
        settings = [{name: group[name] for name in SETTINGS} for group in self.optimizer.param_groups]
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class KnownGradient(torch.autograd.Function):
    """The value of a loss whose gradient at ``sample`` is already known."""

    @staticmethod
    def forward(sample: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient_output * gradient, None, None
