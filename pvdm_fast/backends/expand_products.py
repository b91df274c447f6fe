"""The small matrix products of `triplane_expand`'s backward pass, by the vendor's library, for every device."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pvdm_fast.backends import gemm
from pvdm_fast.layout import TriplaneLayout


def products(sums: Tensor, planes: Tensor, weight: Tensor, layout: TriplaneLayout) -> tuple[Tensor, Tensor, Tensor]:
    """sums: (B, N, C) float32, the gradient summed over each plane's missing axis.

    Returns the gradients of planes, weight and bias, in the dtypes of planes and weight.
    """
    (_, channels, depth), batch = weight.shape, planes.shape[0]
    dplanes = planes.new_empty(batch, layout.num_tokens, depth)
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(3, channels)
    for plane, (start, stop) in enumerate(pairwise(layout.offsets)):
        part = sums[:, start:stop].flatten(0, 1)
        latent = planes[:, start:stop].float().flatten(0, 1)
        matrix = weight[plane].float()
        if part.device.type == "cpu":
            dlatent, dweight[plane] = gemm.linear(part, matrix.t()), gemm.weight_gradient(part, latent)
        else:
            dlatent, dweight[plane] = part @ matrix, part.mT @ latent
        dplanes[:, start:stop] = dlatent.unflatten(0, (batch, stop - start))
        dbias[plane] = part.sum(0)
    return dplanes, dweight, dbias
