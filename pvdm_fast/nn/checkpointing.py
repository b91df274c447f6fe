"""Recomputation of whole blocks in the backward pass, as an option of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from pvdm_fast.nn import copies


def run(block: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments). If block.gradient_checkpointing is set, only the arguments are saved for the backward pass,
    which recomputes the function."""
    if block.gradient_checkpointing and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(copies.carried(function), *arguments, use_reentrant=False)
    return function(*arguments)
