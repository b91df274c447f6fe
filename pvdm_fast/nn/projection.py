"""The transformer that collapses one axis of the lattice, leaving a plane."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import PLANE_NAMES, PlaneLayout, TriplaneLayout
from pvdm_fast.nn import checkpointing, planes
from pvdm_fast.nn.axial_transformer import PreNorm
from pvdm_fast.nn.linear import Linear, linear
from pvdm_fast.nn.plain import POINTWISE_2D, is_plain, readable, weight_of, weights_of
from pvdm_fast.nn.recomputed import Normed, Sequences, attention, feed_forward, values_of
from pvdm_fast.ops.derivatives import autocasts

HEADS = 4


@readable
class SequenceAttention(nn.Module):
    """Multi-head attention inside each sequence: 4 heads of C / 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_width = channels // 8
        self.inner = HEADS * self.head_width
        self.to_qkv = Linear(channels, 3 * self.inner, bias=False)
        self.to_out = nn.ModuleDict({"0": Linear(self.inner, channels)})

    def forward(self, x: Normed | Tensor, first_only: bool) -> Tensor:
        """x: (S, L, C) -> (S, L, C). With `first_only`, (S, 1, C): only element 0 is a query."""
        values = values_of(x)
        sequences, length, _ = values.shape
        if first_only:
            query, kv = self._query_of_first(values)
            query = query.reshape(sequences, 1, 1, 1, HEADS, self.head_width)
            kv = kv.unflatten(-1, (2, HEADS, self.head_width))[:, :, None, None]
            attended = ops.axial_attention(kv, "time", query=query)
        else:
            attended = attention(x, self.to_qkv, HEADS, Sequences(sequences, length, 1, "time"))
        return self.to_out["0"](attended.view(sequences, -1, self.inner))

    def _query_of_first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(S, L, C) -> the query of element 0 (S, 1, C / 2), keys and values of all (S, L, C)."""
        weight = weight_of(self.to_qkv, Linear)
        if weight is None:
            qkv = self.to_qkv(x)
            return qkv[:, :1, : self.inner], qkv[..., self.inner :]
        return linear(x[:, :1], weight[: self.inner]), linear(x, weight[self.inner :])


@readable
class FeedForward(nn.Module):
    """Linear C -> hidden, GELU, linear hidden -> C."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": Linear(channels, hidden), "3": Linear(hidden, channels)})

    def forward(self, x: Normed | Tensor) -> Tensor:
        return feed_forward(x, self.net["0"], self.net["3"], "gelu")


@readable
class PlaneProjection(nn.Module):
    """Pre-norm transformer layers over sequences. Only element 0 is kept. (The release: 4 layers, hidden 512.)

    Only element 0 of the last layer is read, so its query, output projection and feed-forward run only for that.

    Attributes:
        gradient_checkpointing: if set, each layer saves only its input for the backward pass, which recomputes it.
    """

    def __init__(self, channels: int, depth: int = 4, hidden: int = 512) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(
                f"The projection's heads are channels / 8 wide: {channels} channels must be a multiple of 8."
            )
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PreNorm(channels, SequenceAttention(channels)), PreNorm(channels, FeedForward(channels, hidden))]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, sites, L, C) -> (B, sites, C)."""
        batch, sites = x.shape[:2]
        x = x.flatten(0, 1)
        branch: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, branch = checkpointing.run(self, _run_layer, layer, x, branch, index == len(self.layers) - 1)
        return (x if branch is None else x + branch)[:, 0].unflatten(0, (batch, sites))

    def latents(
        self,
        lattice: Tensor,
        layout: TriplaneLayout,
        plane: str,
        token: Tensor,
        positions: Tensor,
        to_latent: nn.Module,
    ) -> Tensor:
        """The latents of a plane: the sequences of `ops.triplane_slice`, this, a 1 x 1 convolution and tanh.

        In one operation (`ops.triplane_project`) where a kernel serves it and all layers are plain.

        Args:
            lattice: (B, T H W, C). token: (C). positions: (L + 1, C). to_latent: nn.Conv2d of 1 x 1, C -> D.

        Returns:
            (B, sites, D).
        """
        fused = self._plain_layers(lattice, layout, plane, to_latent)
        if fused is not None:
            layers, weight, bias, eps = fused
            return ops.triplane_project(
                lattice, layout, plane, token, positions, layers, weight, bias, heads=HEADS, eps=eps
            )
        kept = self(ops.triplane_slice(lattice, layout, plane, token, positions))
        sizes = layout.planes[PLANE_NAMES.index(plane)]
        return planes.pointwise(to_latent, kept, PlaneLayout((sizes,))).tanh()

    def _plain_layers(
        self, lattice: Tensor, layout: TriplaneLayout, plane: str, to_latent: nn.Module
    ) -> tuple[list[ops.ProjectionLayer], Tensor, Tensor, float] | None:
        """The layers, the latent's weight and bias, and eps, for one operation; None where there is none for them, or a
        layer isn't plain."""
        if not is_plain(self, PlaneProjection):
            return None
        latent = weights_of(to_latent, nn.Conv2d, POINTWISE_2D)
        # Asked with one weight: collecting those of four layers takes 65 us, for nothing where no kernel serves.
        if latent is None or not ops.fuses_projection(lattice, latent[0], layout, plane):
            return None
        layers = [_weights_of_layer(layer) for layer in self.layers]
        found = [layer for layer in layers if layer is not None]
        if not found or len(found) < len(layers):
            return None
        steps: list[Any] = [step for layer in self.layers for step in cast(nn.ModuleList, layer)]
        eps = {step.norm.eps for step in steps}
        dtypes = {tensor.dtype for layer in found for tensor in (*layer, *latent) if tensor.dim() > 1}
        if len(eps) > 1 or not (autocasts(lattice.device.type) or dtypes == {lattice.dtype}):
            return None
        weight, bias = latent
        return found, weight.flatten(1), bias, eps.pop()


def _weights_of_layer(layer: Any) -> ops.ProjectionLayer | None:
    """All parameters of a layer; None where a part of it isn't plain."""
    attention, feed_forward = layer
    parts = ((attention, PreNorm), (attention.fn, SequenceAttention), (feed_forward, PreNorm))
    if not all(is_plain(*part) for part in (*parts, (feed_forward.fn, FeedForward))):
        return None
    norm1, norm2 = (weights_of(step.norm, nn.LayerNorm) for step in (attention, feed_forward))
    qkv = weight_of(attention.fn.to_qkv, Linear)
    linears = (attention.fn.to_out["0"], feed_forward.fn.net["0"], feed_forward.fn.net["3"])
    out, up, down = (weights_of(one, Linear) for one in linears)
    if norm1 is None or norm2 is None or qkv is None or out is None or up is None or down is None:
        return None
    return ops.ProjectionLayer(*norm1, qkv, *out, *norm2, *up, *down)


def _run_layer(layer: nn.ModuleList, x: Tensor, branch: Tensor | None, last: bool) -> tuple[Tensor, Tensor]:
    """Runs one layer, the last one for element 0 only. Returns the stream, and what is still to be added to it."""
    attention, feed_forward = layer
    x, branch = attention(x, branch, last)
    return feed_forward(x[:, :1] if last else x, branch)
