"""What is read besides the command line: a launcher's variables, and the calling program's PyTorch defaults.

Of the environment variables that torchrun and accelerate set, only these have an effect:

- RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: the processes of the job and where they meet.
- TORCHELASTIC_MAX_RESTARTS: whether torchrun starts the job again after a failure.

Accelerate's own settings (ACCELERATE_..., FSDP_... and so on) have no effect: precision, accumulation and sharding are
options of the command. The same holds for MPI's counts of processes, and for MPLBACKEND. Accelerate's variables that
ask for another way to train (DeepSpeed, accelerate's FSDP, Megatron-LM) are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pvdm_fast.errors import UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What else accelerate reads: its own settings and MPI's counts of processes.
WITHOUT_EFFECT = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "PMI_", "OMPI_COMM_", "MV2_COMM_")
FOR_DRAWING = "MPLBACKEND"  # a notebook sets it for what it starts; Matplotlib fails at names it doesn't know
REFUSED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")


@dataclass(frozen=True)
class Place:
    """This process's number in the job and on its machine, and how many there are.

    ``launched``: whether a launcher said where they meet. If not, this is the only process.
    """

    rank: int
    world: int
    local_rank: int
    launched: bool


def place_in_job(*, meeting: bool = True) -> Place:
    """The place that the launcher's variables give this process. Without them it is alone.

    Args:
        meeting: whether the processes have to find each other.

    Raises:
        UserError: the variables don't fit together.
    """
    world = _number("WORLD_SIZE")
    rank, local_rank = _number("RANK") or 0, _number("LOCAL_RANK") or 0
    if world is None and (rank or local_rank):
        name, value = ("RANK", rank) if rank else ("LOCAL_RANK", local_rank)
        raise UserError(f"{name} is {value}, but WORLD_SIZE is not set: {_remedy()}")
    world = 1 if world is None else world
    if not 0 <= rank < world or not 0 <= local_rank < world:
        raise UserError(
            f"RANK is {rank} and LOCAL_RANK {local_rank}, but both must be from 0 to WORLD_SIZE - 1, which is "
            f"{world - 1}: {_remedy()}"
        )
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    if meeting and world > 1 and missing:
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: {_remedy()}")
    if os.environ.get("MASTER_PORT"):
        _number("MASTER_PORT")
    return Place(rank, world, local_rank, launched=not missing)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise UserError(f"the environment variable {name} must be a whole number, not {value[:40]!r}: {_remedy()}")
    return int(value)


def _remedy() -> str:
    return "start the processes with torchrun or accelerate launch, or unset these environment variables"


def rank_name() -> str:
    """This process's number for messages, whatever the variable holds."""
    return os.environ.get("RANK") or "0"


def starts_again() -> bool:
    """Whether torchrun will start the job again after a failure, with the same command line."""
    return (_number("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


@contextmanager
def only_the_launcher() -> Iterator[None]:
    """In the block, accelerate sees the launcher's variables (if a launcher set them), and no settings.

    Raises:
        UserError: the variables don't fit together, or ask for what is not supported.
    """
    place = place_in_job()
    for name in REFUSED:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1", "yes"):
            raise UserError(
                f"ACCELERATE_USE_{name} is set, but accelerate's {name} is not supported: start with --multi_gpu or "
                "torchrun, shard with --fsdp, and unset this variable"
            )
    hidden = {name: value for name, value in os.environ.items() if name.startswith((*WITHOUT_EFFECT, FOR_DRAWING))}
    if not place.launched:
        hidden |= {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """New tensors are float32 and on the CPU, whatever the calling program made the default."""
    import torch

    # Not torch.get_default_device: in PyTorch 2.9 it fails where the default was taken back with None.
    dtype, device = torch.get_default_dtype(), torch.empty(0).device
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)


@contextmanager
def plain_torch() -> Iterator[None]:
    """PyTorch's own defaults, and gradients, whatever the calling program set."""
    import torch

    with plain_defaults(), torch.inference_mode(False), torch.enable_grad():
        yield
