"""FSDP2: weights, gradients, optimizer state and averaged weights are sharded, but complete in every file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from pvdm_fast.nn import ResidualBlock, TriplaneAttention
from pvdm_fast.nn.axial_transformer import PreNorm

# Modules whose weights are gathered together just before use. Nothing outside reads them.
UNITS = (PreNorm, ResidualBlock, TriplaneAttention)
# Methods that compute without ``forward``.
METHODS = ("encode", "decode")


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Shard a model's parameters among all processes, in place. Every process must hold the same values."""
    mesh = init_device_mesh(device.type, (world,))
    # Nothing in this package writes into what a module returned.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in [*(item for item in model.modules() if isinstance(item, UNITS)), model]:
        # also the model itself, which by default stays whole after a forward pass: between steps all parameters are
        # sharded
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for name in METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, sharing its memory. If a tensor isn't sharded, the tensor itself."""
    return [item.to_local() if isinstance(item, DTensor) else item for item in tensors]


def whole(state: Any, keep: bool) -> Any:
    """A nested state with its sharded tensors made whole, on the CPU, one after another.

    All processes call it. Only those that ``keep`` the result get the tensors.
    """

    def gather(item: DTensor) -> Tensor | None:
        full = item.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(DTensor, gather, state)


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded like ``parameter``. Every process must hold the same values."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)


def of_parts(part: Tensor, parameter: Tensor) -> Tensor:
    """The opposite of `local`, for a tensor sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``load_state_dict`` of a whole state, whether or not the model is sharded."""
    like = model.state_dict()
    model.load_state_dict({name: cut_like(value, like.get(name, value)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``load_state_dict`` of a whole state, whether or not the parameters are sharded."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    cut = {
        index: {
            name: cut_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})


def unsharded(model: nn.Module, main: bool) -> nn.Module | None:
    """The model itself. If it is sharded, a whole copy for the main process and None for the others."""
    if not isinstance(model, FSDPModule):
        return model
    state = whole(model.state_dict(), main)
    if not main:
        return None
    copy = type(model).from_config(model.config)  # type: ignore[attr-defined]  # FSDPModule.__new__: an unsharded one
    copy.load_state_dict(state)
    return copy.eval()
