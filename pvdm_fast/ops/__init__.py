"""The operations, differentiable and registered as `torch.ops.pvdm_fast.<op>`; backends plug in behind them."""

from pvdm_fast.ops.add_layer_norm import add_layer_norm
from pvdm_fast.ops.attention_block import attention_block, fuses_attention_block
from pvdm_fast.ops.axial_attention import axial_attention
from pvdm_fast.ops.feed_forward_block import feed_forward_block, fuses_feed_forward_block
from pvdm_fast.ops.geglu import geglu
from pvdm_fast.ops.plane_conv import plane_conv
from pvdm_fast.ops.plane_norm import plane_norm
from pvdm_fast.ops.plane_resample import plane_resample
from pvdm_fast.ops.segment_attention import segment_attention
from pvdm_fast.ops.space_attention_heads import fuses_space_attention_heads, space_attention_heads
from pvdm_fast.ops.time_attention_block import fuses_time_attention_block, time_attention_block
from pvdm_fast.ops.triplane_expand import triplane_expand
from pvdm_fast.ops.triplane_project import ProjectionLayer, fuses_projection, triplane_project
from pvdm_fast.ops.triplane_slice import triplane_slice

__all__ = [
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
]
