"""The optimizer of a stage: AdamW with its moments in float32, or in 8 bits by bitsandbytes; or Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pvdm_fast.backends.precision import cpu_multiplies_bfloat16
from pvdm_fast.errors import UserError

if TYPE_CHECKING:
    from pvdm_fast.training.hyperparameters import StageOptions

LEAST_8BIT = 4096  # elements: bitsandbytes keeps the moments of smaller parameters in float32
BLOCK = 256  # elements that share a scale in float32
LEAST_SIDE = 32  # of a matrix that Muon turns: layers at the ends of a network and tables of vectors are left to AdamW
MOMENTUM = 0.95
STACKED = 1 << 24  # elements that Muon turns together: 32 MiB in bfloat16

Turned = tuple[Tensor, Tensor, dict[str, Any]]
"""A parameter, its gradient, and its group of the optimizer."""


def optimizer_settings(options: StageOptions) -> dict[str, Any]:
    """AdamW's arguments of a stage's options."""
    return dict(lr=options.learning_rate, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the hidden layers' matrices, AdamW for all other parameters.

    Each step of a matrix is the nearest orthogonal matrix to its averaged gradient, so that all its directions are
    learned at the same pace. A convolution's weight (out, in, rows, columns) counts as a matrix (out, in rows columns),
    which `torch.optim.Muon` doesn't take. Steps are as large as AdamW's (Liu et al. 2025, "Muon is scalable"), so that
    learning rate and weight decay mean the same for both.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        matrices = list(hidden_matrices(model))
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        groups = [{"params": matrices, "turned": True}, {"params": rest, "turned": False}]
        super().__init__([group for group in groups if group["params"]], fused=True, **settings)
        # A fused AdamW takes the loss scale off by itself and passes over infinite gradients. The steps of matrices
        # don't, so the scaler has to, as it does for every other optimizer.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        matrices = [(p, group) for group in self.param_groups if group["turned"] for p in group["params"]]
        gradients = [(p, p.grad, group) for p, group in matrices if p.grad is not None]
        for parameter, _, _ in gradients:
            parameter.grad = None  # AdamW passes over these
        loss = super().step(closure)
        for parameter, gradient, _ in gradients:
            parameter.grad = gradient
        for alike in _alike(gradients):
            parameters, group = [parameter for parameter, _, _ in alike], alike[0][2]
            updates = orthogonal(torch.stack(self._averaged(alike)))
            size = 0.2 * max(updates.shape[1:]) ** 0.5  # the root mean square of AdamW's steps
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            steps = [update.view_as(parameter) for update, parameter in zip(updates, parameters, strict=True)]
            torch._foreach_add_(parameters, steps, alpha=-group["lr"] * size)
        return loss

    def _averaged(self, alike: list[Turned]) -> list[Tensor]:
        """The gradients with Nesterov's momentum, as matrices."""
        for parameter, gradient, _ in alike:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
                state["momentum"] = torch.zeros_like(gradient)
            state["step"] += 1
        momenta = [self.state[parameter]["momentum"] for parameter, _, _ in alike]
        gradients = [gradient for _, gradient, _ in alike]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return [average.flatten(1) for average in torch._foreach_lerp(gradients, momenta, MOMENTUM)]


def hidden_matrices(model: nn.Module) -> Iterable[nn.Parameter]:
    """The weights that Muon turns: of linear layers and convolutions with at least LEAST_SIDE inputs and outputs."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2 or isinstance(module, nn.Embedding):
            continue
        if min(weight.flatten(1).shape) >= LEAST_SIDE:
            yield weight


def _alike(gradients: list[Turned]) -> Iterator[list[Turned]]:
    """Matrices of one shape together, as many as a stack may hold: fewer and larger products."""
    by_shape: dict[tuple[torch.Size, torch.device], list[Turned]] = {}
    for item in gradients:
        by_shape.setdefault((item[0].flatten(1).shape, item[0].device), []).append(item)
    for (shape, _), items in by_shape.items():
        most = max(1, STACKED // shape.numel())
        yield from (items[first : first + most] for first in range(0, len(items), most))


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V' of each matrix U S V' of a stack (n, rows, columns), by five steps of Jordan's Newton-Schulz
    iteration.

    Their singular values end between 0.7 and 1.2. In bfloat16 where products are quick in it, as its author does.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT) / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    x = x.bfloat16() if matrices.device.type == "cuda" or cpu_multiplies_bfloat16() else x
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.mT).to(matrices.dtype)


def make_optimizer(name: str, model: nn.Module, options: StageOptions) -> torch.optim.Optimizer:
    """The optimizer of a model's parameters with a stage's learning rate, betas and weight decay.

    Args:
        name: "adamw" (fused), "muon" (`Muon`), or "adamw8bit": AdamW with moments in blocks of 8 bits (Dettmers et al.
            2022), on CPUs and GPUs.

    Raises:
        UserError: bitsandbytes, which "adamw8bit" needs, isn't installed.
    """
    settings = optimizer_settings(options)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    if name == "muon":
        return Muon(model, **settings)
    optimizer: torch.optim.Optimizer = adamw8bit()(model.parameters(), min_8bit_size=LEAST_8BIT, **settings)
    return optimizer


def adamw8bit() -> Any:
    """The class of "adamw8bit"; raises UserError where bitsandbytes, which it is of, cannot be imported."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "--optimizer adamw8bit needs bitsandbytes, which is not installed: pip install 'pvdm-fast[8bit]', or take "
            "--optimizer adamw"
        ) from error
    return AdamW8bit


def state_bytes(name: str, model: nn.Module) -> int:
    """Bytes of the moments of all parameters, which are float32."""
    one = {id(parameter) for parameter in hidden_matrices(model)} if name == "muon" else set()
    total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if name == "adamw8bit" and count >= LEAST_8BIT:
            total += 2 * (count + 4 * -(-count // BLOCK))
        else:
            total += 4 * count * (1 if id(parameter) in one else 2)
    return total
