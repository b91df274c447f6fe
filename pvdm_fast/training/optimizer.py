"""The optimizer of a stage: AdamW with its moments in float32, or in 8 bits by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pvdm_fast.errors import UserError

if TYPE_CHECKING:
    from pvdm_fast.training.config import StageOptions

LEAST_8BIT = 4096  # elements: bitsandbytes keeps the moments of smaller parameters in float32
BLOCK = 256  # elements that share a scale in float32


def optimizer_settings(options: StageOptions) -> dict[str, Any]:
    """AdamW's arguments of a stage's options."""
    return dict(lr=options.learning_rate, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], options: StageOptions) -> torch.optim.Optimizer:
    """AdamW with a stage's learning rate, betas and weight decay.

    Args:
        name: "adamw" (fused), or "adamw8bit" with moments in blocks of 8 bits (Dettmers et al. 2022), on CPUs and GPUs.

    Raises:
        UserError: bitsandbytes, which "adamw8bit" needs, isn't installed.
    """
    settings = optimizer_settings(options)
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    optimizer: torch.optim.Optimizer = adamw8bit()(parameters, min_8bit_size=LEAST_8BIT, **settings)
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


def state_bytes(name: str, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of both moments of all parameters, which are float32."""
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if name == "adamw8bit" and count >= LEAST_8BIT:
            total += 2 * (count + 4 * -(-count // BLOCK))
        else:
            total += 2 * 4 * count
    return total
