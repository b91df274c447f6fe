"""`--device` of train, sample, evaluate and encode: auto, cpu, cuda, or one GPU of several, cuda:N."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.numbers import Checked, WrongNumber

if TYPE_CHECKING:
    import torch

METAVAR = "{auto,cpu,cuda,cuda:N}"
MEANING = "where to compute; auto takes the GPU where there is one, cuda:1 the second one"
HELP = f"{MEANING} (default: auto)"


@dataclass(frozen=True)
class DeviceName(Checked):
    """Checks the name of a device, not whether it is there: as the numbers of `jobs/numbers.py` are checked."""

    def __call__(self, value: Any) -> str:
        """``value``; raises WrongNumber where it names no device."""
        if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
            raise WrongNumber(f"must be auto, cpu, cuda or cuda:N, not {value!r}")
        return value


DEVICE = DeviceName()


def claim_device(name: str) -> torch.device:
    """The device of a name, made the current one of this process where it is a GPU with a number.

    Raises:
        UserError: it is not there, or several processes would share it.
    """
    import torch

    DEVICE.checked("--device", name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: PyTorch finds no GPU here (python -m pvdm_fast.info says why); choose auto or cpu"
        )
    if device.index is not None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"--device {name}: several processes take a GPU each; choose --device cuda")
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from cuda:0")
        torch.cuda.set_device(device)
    return device
