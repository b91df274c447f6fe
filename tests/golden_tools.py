"""Golden values of the authors' release: how weights and inputs are drawn (see golden/README.md), and results."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def draw(seed: int, case: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers for a tensor of a case, by the recipe."""
    state = np.random.RandomState(zlib.crc32(f"{seed}:{case}:{name}".encode()))
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


def draw_parameter(seed: int, case: str, name: str, shape: tuple[int, ...]) -> Tensor:
    r = draw(seed, case, name, shape)
    if len(shape) >= 2:
        return r * (0.9 / np.sqrt(r[0].numel()))
    return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r


@dataclass(frozen=True)
class GoldenCase:
    """`meta`: the metadata. `tensors`: outputs and gradients of the release."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def seed(self) -> int:
        return int(self.meta["seed"])

    def draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return draw(self.seed, self.meta["case"], name, shape)

    def parameters(self) -> dict[str, Tensor]:
        return {
            name: draw_parameter(self.seed, self.meta["case"], name, tuple(shape))
            for name, shape in self.meta["params"].items()
        }

    def input(self, key: str) -> Tensor:
        return self.draw(f"input.{key}", tuple(self.meta["inputs"][key]))


@cache
def load_case(name: str) -> GoldenCase:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        meta = {key: _parsed(text) for key, text in file.metadata().items()}
        return GoldenCase(meta, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
