"""The four names of diffusers that the networks' classes are built on, for images of PyTorch that come without it.

What is measured is ours either way: these only keep a configuration and say a model's dtype and device. Saving and
loading need diffusers itself, and so do its schedulers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.first_contact.context import importable


class Config(dict[str, Any]):
    """A configuration, by attribute too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ConfigMixin:
    """Keeps the arguments of `__init__` as `config`."""

    config: Config


class ModelMixin(nn.Module):
    """A module that says its dtype and device."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class BaseOutput:
    """Of the dataclasses that models return."""


def register_to_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorator of `__init__`: its arguments, with their defaults, become `config`."""
    signature = inspect.signature(init)

    @wraps(init)
    def wrapped(self: Any, *arguments: Any, **options: Any) -> None:
        bound = signature.bind(self, *arguments, **options)
        bound.apply_defaults()
        config = Config(list(bound.arguments.items())[1:])
        object.__setattr__(self, "config", config)  # nn.Module takes attributes only after its own __init__
        init(self, *arguments, **options)

    return wrapped


def stand_in() -> bool:
    """Put these where diffusers would be, unless it is installed. Returns whether they stand in for it now."""
    if importable("diffusers"):
        return False
    names: dict[str, dict[str, Any]] = {
        "diffusers": {"ConfigMixin": ConfigMixin, "ModelMixin": ModelMixin, "__path__": []},
        "diffusers.configuration_utils": {"register_to_config": register_to_config},
        "diffusers.utils": {"BaseOutput": BaseOutput, "__path__": []},
    }
    for name, values in names.items():
        module = ModuleType(name, "Stands in for diffusers, which is not installed.")
        vars(module).update(values, __spec__=ModuleSpec(name, None))  # what looks for a module expects one
        sys.modules[name] = module
    return True
