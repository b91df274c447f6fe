"""PVDM, made fast: triplane kernels and the thin video diffusion model on top of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvdm_fast import _operations

if TYPE_CHECKING:
    from pvdm_fast.backends import use_backend
    from pvdm_fast.diffusion.pipeline import PVDMPipeline
    from pvdm_fast.layout import TriplaneLayout
    from pvdm_fast.nn import TriplaneAttention

__version__ = "0.1.0"
__all__ = ["PVDMPipeline", "TriplaneAttention", "TriplaneLayout", "__version__", "use_backend"]

_HOME = {
    "PVDMPipeline": "pvdm_fast.diffusion.pipeline",
    "TriplaneAttention": "pvdm_fast.nn",
    "TriplaneLayout": "pvdm_fast.layout",
    "use_backend": "pvdm_fast.backends",
}


_operations.register_when_used()


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import pvdm_fast` stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'pvdm_fast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
