"""Models of which every part has an effect."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def randomised(model: nn.Module) -> Any:
    """Random numbers where a new model has zeros, the same each time."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model
