"""The denoiser's pass of a sampling step as a CUDA graph, so that the GPU gets all its launches at once.

Not yet run on a GPU. Tests check which calls are made, and that replaying them gives the same latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pvdm_fast.diffusion.guidance import predict_noise
from pvdm_fast.errors import UserError

if TYPE_CHECKING:
    from pvdm_fast.models import Denoiser

WARM_UP_PASSES = 3  # before capturing: they compile kernels, and make library handles and workspaces


@dataclass(frozen=True)
class _Captured:
    """A graph with the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    latent: Tensor
    times: Tensor
    condition: Tensor | None
    labels: Tensor | None
    predicted: Tensor


class GraphedPrediction:
    """`predict_noise` of one denoiser, captured once per shape of its arguments, then replayed.

    The denoiser must stay in place and in eval mode. A captured graph keeps the memory of its activations.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def __call__(
        self,
        denoiser: Denoiser,
        latent: Tensor,
        timestep: int,
        condition: Tensor | None = None,
        guidance: float = 0.0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Like `predict_noise`, without gradients. You may keep the result."""
        kinds = (None if condition is None else condition.dtype, labels is None)
        key = (denoiser, tuple(latent.shape), latent.dtype, *kinds, guidance)
        with torch.no_grad():
            if key not in self._captured:
                with torch.cuda.device(latent.device):
                    self._captured[key] = self._capture(denoiser, latent, condition, guidance, labels)
            captured = self._captured[key]
            captured.latent.copy_(latent)
            captured.times.fill_(timestep)
            if captured.condition is not None and condition is not None:
                captured.condition.copy_(condition)
            if captured.labels is not None and labels is not None:
                captured.labels.copy_(labels)
            captured.graph.replay()
            return captured.predicted.clone()

    @staticmethod
    def _capture(
        denoiser: Denoiser, latent: Tensor, condition: Tensor | None, guidance: float, labels: Tensor | None
    ) -> _Captured:
        static = latent.clone()
        times = torch.zeros(len(latent), dtype=torch.long, device=latent.device)
        kept = None if condition is None else condition.clone()
        classes = None if labels is None else labels.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_PASSES):
                predict_noise(denoiser, static, times, kept, guidance, classes)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            predicted = predict_noise(denoiser, static, times, kept, guidance, classes)
        return _Captured(graph, static, times, kept, classes, predicted)


def graphed_prediction(denoiser: Denoiser) -> GraphedPrediction:
    """A `GraphedPrediction` of the denoiser.

    Raises:
        UserError: the denoiser isn't on a CUDA GPU.
    """
    device = next(denoiser.parameters()).device
    if device.type != "cuda":
        raise UserError(
            f"CUDA graphs need a CUDA GPU, but the denoiser is on {device}: sample without --cuda-graph (cuda_graph)"
        )
    return GraphedPrediction()
