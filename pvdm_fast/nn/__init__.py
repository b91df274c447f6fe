"""The modules that PVDM's two networks are made of, with the parameter names of the authors' release."""

from pvdm_fast.nn.attention import PlaneAttention, TriplaneAttention
from pvdm_fast.nn.axial_transformer import AxialTransformer
from pvdm_fast.nn.planes import PlaneConv, PlaneNorm
from pvdm_fast.nn.projection import PlaneProjection
from pvdm_fast.nn.residual import ResidualBlock

__all__ = [
    "AxialTransformer",
    "PlaneAttention",
    "PlaneConv",
    "PlaneNorm",
    "PlaneProjection",
    "ResidualBlock",
    "TriplaneAttention",
]
