"""Which calls the networks make: every operation with its shapes, strides and dtypes, found without running them.

The kernels are tuned (`pvdm_fast.tune`) and compiled ahead of time for these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvdm_fast.analysis.recorder import Recorder, own_operation
from pvdm_fast.backends import choice
from pvdm_fast.models.presets import DENOISER, preset

Fill = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values: shape, strides and offset into its storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def make(self, device: torch.device | str, fill: Fill) -> Tensor:
        """Such a tensor on `device`, its whole storage filled by `fill`."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        storage = fill(torch.empty(self.offset + size if 0 not in self.shape else 0, dtype=self.dtype, device=device))
        return storage.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Call:
    """One call of `<op>.<direction>` ("forward" or "backward"), with a TensorSpec in place of each tensor."""

    op: str
    direction: str
    arguments: tuple[Any, ...]

    def with_dtype(self, before: torch.dtype, after: torch.dtype) -> Call:
        """The same call, with the tensors of one dtype changed to another."""

        def change(value: Any) -> Any:
            fits = isinstance(value, TensorSpec) and value.dtype == before
            return TensorSpec(value.shape, value.strides, value.offset, after) if fits else value

        return Call(self.op, self.direction, tuple(change(value) for value in self.arguments))

    def inputs(self, device: torch.device | str, fill: Fill = lambda storage: storage) -> list[Any]:
        """The arguments, with tensors made on `device`."""
        return [a.make(device, fill) if isinstance(a, TensorSpec) else list_of(a) for a in self.arguments]

    def __str__(self) -> str:
        tensors = [a for a in self.arguments if isinstance(a, TensorSpec)]
        shapes = ", ".join("×".join(map(str, t.shape)) for t in tensors[:2])
        return f"{self.op} {self.direction} ({shapes}{', …' if len(tensors) > 2 else ''})"


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _DifferentCalls(Recorder):
    """Collects this package's calls, each distinct one once, in the order of their first use."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if own := own_operation(function):
            *inputs, _backend = arguments
            self.calls[Call(*own, tuple(map(_frozen, inputs)))] = None


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec.of(value)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def calls(
    size: str,
    dtype: torch.dtype,
    batch: int = 1,
    mixed: bool = False,
    denoiser: dict[str, Any] | None = None,
    autoencoder: dict[str, Any] | None = None,
) -> list[Call]:
    """All distinct calls that both networks of a preset make with Triton's kernels: without gradient, then with.

    Then with a gradient and the projection's layers one by one, as on AMD's GPUs and under torch.compile.

    Args:
        size: a preset: "tiny", "small", "base".
        dtype: of weights and activations. With `mixed` it is autocast's dtype, and weights are float32.
        batch: clips.
        denoiser, autoencoder: arguments that replace the preset's.

    Raises:
        ValueError: there is no such preset.
    """
    preset(DENOISER, size, {})
    from pvdm_fast.models import Autoencoder, Denoiser

    recorder, default = _DifferentCalls(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32 if mixed else dtype)
        with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=mixed):
            for network, inputs in (
                (Denoiser.from_preset(size, **(denoiser or {})), _denoiser_inputs),
                (Autoencoder.from_preset(size, **(autoencoder or {})), _autoencoder_inputs),
            ):
                with recorder, _served_by_triton():
                    with torch.no_grad():
                        network(*inputs(network, batch))
                    _forth_and_back(network, inputs(network, batch))
                if isinstance(network, Autoencoder):
                    with recorder, _served_by_triton(but=choice.FUSED_PROJECTION):
                        _forth_and_back(network, inputs(network, batch))
    finally:
        torch.set_default_dtype(default)
    return list(recorder.calls)


def _forth_and_back(network: Any, inputs: tuple[Tensor, ...]) -> None:
    sample = network(*inputs).sample
    torch.autograd.grad(sample, list(network.parameters()), torch.empty_like(sample), allow_unused=True)


@contextmanager
def _served_by_triton(but: tuple[str, ...] = ()) -> Iterator[None]:
    """Networks ask whether a kernel is available before they fuse operations. Answers yes, though Triton may not
    run here, `but` for some operations."""
    before = choice.serves
    choice.serves = lambda backend, op, *_: backend == "triton" and op in choice.SERVED[backend] and op not in but
    try:
        yield
    finally:
        choice.serves = before


def _denoiser_inputs(network: Any, batch: int) -> tuple[Tensor, ...]:
    latent = torch.empty(batch, network.config.latent_channels, network.layout.num_tokens)
    return latent, torch.empty(batch, dtype=torch.long), latent


def _autoencoder_inputs(network: Any, batch: int) -> tuple[Tensor, ...]:
    config = network.config
    return (torch.empty(batch, 3, config.frames, config.height, config.width),)
