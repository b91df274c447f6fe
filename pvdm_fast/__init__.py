"""PVDM, made fast: triplane kernels and the thin video diffusion model on top of them."""

from __future__ import annotations

from pvdm_fast import _starting  # noqa: F401  (first: from here on a Ctrl-C is one line)

# isort: split
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
# Where the rest lives, for people who look for it here.
_ELSEWHERE = {
    "pvdm_fast.ops": (
        "ProjectionLayer",
        "add_layer_norm",
        "attention_block",
        "axial_attention",
        "feed_forward_block",
        "fuses_attention_block",
        "fuses_feed_forward_block",
        "fuses_projection",
        "fuses_space_attention_heads",
        "fuses_time_attention_block",
        "geglu",
        "plane_conv",
        "plane_norm",
        "plane_resample",
        "segment_attention",
        "space_attention_heads",
        "time_attention_block",
        "triplane_expand",
        "triplane_project",
        "triplane_slice",
    ),
    "pvdm_fast.models": (
        "Autoencoder",
        "AutoencoderOutput",
        "Denoiser",
        "DenoiserOutput",
        "EncoderOutput",
    ),
    "pvdm_fast.nn": (
        "AxialTransformer",
        "PlaneAttention",
        "PlaneConv",
        "PlaneNorm",
        "PlaneProjection",
        "ResidualBlock",
    ),
    "pvdm_fast.layout": ("PlaneLayout",),
    "pvdm_fast.errors": (
        "BackendError",
        "UserError",
    ),
    "pvdm_fast.models.release": (
        "load_release_autoencoder",
        "load_release_denoiser",
        "to_release",
    ),
    "pvdm_fast.diffusion.schedulers": ("make_scheduler",),
    "pvdm_fast.diffusion.sampling": (
        "sample_video",
        "stream_video",
    ),
}


_operations.register_when_used()


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import pvdm_fast` stays quick."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    for module, names in _ELSEWHERE.items():
        if name in names:  # not an AttributeError, because `from pvdm_fast import ...` would hide its message
            raise ImportError(f"{name} lives in {module}: from {module} import {name}")
    raise AttributeError(f"module 'pvdm_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
