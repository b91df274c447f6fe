"""The instruction sets that the CPU kernels can use on this machine, and how a test asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pvdm_fast.backends import extensions

ISAS: list[str] = extensions.extension("_cpu").isas() if extensions.availability("cpu") is None else []


@contextmanager
def using(isa: str) -> Iterator[None]:
    """The CPU kernels use `isa` in this block, and the previous set after it."""
    module = extensions.extension("_cpu")
    before = module.isa()
    module.set_isa(isa)
    try:
        yield
    finally:
        module.set_isa(before)
