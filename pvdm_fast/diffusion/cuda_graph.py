"""The denoiser's pass of a sampling step as a CUDA graph, so that the GPU gets all its launches at once.

Taken by itself on a GPU. Not yet run on one: what is tested is which calls are made, that replaying them gives the same
latents, and what happens where capturing fails or a replay gives something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pvdm_fast.diffusion.guidance import guided_prediction, times_of
from pvdm_fast.errors import UserError
from pvdm_fast.nn import joined
from pvdm_fast.ops.derivatives import autocast_dtype

if TYPE_CHECKING:
    from pvdm_fast.models import Denoiser

log = logging.getLogger("pvdm_fast")

WARM_UP_PASSES = 3  # before capturing: kernels are compiled, library handles and workspaces made
FEWEST_STEPS = 10  # from which capturing, which costs four passes, is worth it
# How far the first replay may be from the pass that was not captured, as a share of its largest value: libraries may
# choose other algorithms while capturing. A graph that reads freed or stale memory is off by about 1.
ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-6}


@dataclass(frozen=True)
class _Captured:
    """A graph with the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    latent: Tensor
    times: Tensor
    condition: Tensor | None
    labels: Tensor | None
    predicted: Tensor
    read: list[joined.Joined]

    def __call__(self, latent: Tensor, timestep: float, condition: Tensor | None, labels: Tensor | None) -> Tensor:
        """The prediction for these arguments, in memory of its own."""
        self.latent.copy_(latent)
        self.times.fill_(timestep)
        if self.condition is not None and condition is not None:
            self.condition.copy_(condition)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        joined.renew(self.read)
        self.graph.replay()
        return self.predicted.clone()


class GraphDiffers(RuntimeError):
    """The first replay of a graph did not give what the pass gives that was not captured."""


class GraphedPrediction:
    """`guided_prediction` of one denoiser, captured once per shape of its arguments, then replayed.

    The first replay is compared with a pass that was not captured. Where capturing fails, or the two differ, a warning
    says why and all further passes are ordinary ones.

    The denoiser must stay where it is, in eval mode. A captured graph keeps the memory of its activations for itself.

    Args:
        required: raise instead of going on without a graph.
    """

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.refused = False
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def __call__(
        self,
        denoiser: Denoiser,
        latent: Tensor,
        timestep: float,
        condition: Tensor | None = None,
        guidance: float = 0.0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """As `guided_prediction`, without gradients; the result is the caller's to keep.

        Raises:
            UserError: a graph is required, and capturing failed.
        """
        if self.refused:
            return guided_prediction(denoiser, latent, timestep, condition, guidance, labels)
        kinds = (None if condition is None else condition.dtype, labels is None, autocast_dtype("cuda"))
        inference = torch.is_inference_mode_enabled()  # what is made inside can't be written to outside
        key = (denoiser, tuple(latent.shape), latent.dtype, type(timestep), *kinds, guidance, inference)
        with torch.no_grad():
            if key in self._captured:
                return self._captured[key](latent, timestep, condition, labels)
            try:
                with torch.cuda.device(latent.device):
                    self._captured[key] = made = _capture(denoiser, latent, timestep, condition, guidance, labels)
                return made.predicted.clone()
            except RuntimeError as error:  # what CUDA and the allocator raise
                self._refuse(error)
        # Here, since an error keeps the memory of what failed. If the graph was not to blame, the pass says so itself.
        return guided_prediction(denoiser, latent, timestep, condition, guidance, labels)

    def _refuse(self, error: RuntimeError) -> None:
        reason = " ".join(str(error).split())[:200]
        if self.required:
            raise UserError(f"no CUDA graph could be made ({reason}): sample without --cuda-graph") from error
        self.refused = True
        self._captured.clear()
        log.warning("sampling without CUDA graphs: %s", reason)


def _capture(
    denoiser: Denoiser,
    latent: Tensor,
    timestep: float,
    condition: Tensor | None,
    guidance: float,
    labels: Tensor | None,
) -> _Captured:
    """A graph that has been replayed once; raises GraphDiffers where that gave something else than the pass itself."""
    static = latent.clone()
    times = times_of(timestep, len(latent), latent.device)
    kept = None if condition is None else condition.clone()
    classes = None if labels is None else labels.clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with _without_cached_casts():
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_PASSES):
                expected = guided_prediction(denoiser, static, times, kept, guidance, classes)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on, such as the one that pins the trainer's next batches: only this one is watched.
        with joined.read_by_a_graph() as read, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            predicted = guided_prediction(denoiser, static, times, kept, guidance, classes)
    graph.replay()
    if reason := difference(predicted, expected):
        raise GraphDiffers(reason)
    return _Captured(graph, static, times, kept, classes, predicted, read)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast, where it is on, without its cache: a graph would go on reading weights that are freed with it."""
    dtype = autocast_dtype("cuda")
    if dtype is None:
        yield
        return
    with torch.autocast("cuda", dtype, cache_enabled=False):
        yield


def difference(graphed: Tensor, expected: Tensor) -> str | None:
    """How the first step of a graph differs from the ungraphed one; None where it doesn't. Waits for both."""
    if not torch.equal(graphed.isfinite(), expected.isfinite()):
        return "its first step is not finite where the ungraphed one is, or the other way round"
    made, wanted = (torch.nan_to_num(tensor.double(), 0.0, 0.0, 0.0) for tensor in (graphed, expected))
    largest, worst = float(wanted.abs().max()), float((made - wanted).abs().max())
    if worst <= ALLOWED[expected.dtype] * largest:
        return None
    return f"its first step is {worst:.3g} off the ungraphed one, whose largest value is {largest:.3g}"


def choose_prediction(denoiser: Denoiser, wanted: bool | None, steps: int) -> Callable[..., Tensor]:
    """What runs the denoiser in sampling: `guided_prediction`, or its CUDA graphs.

    Args:
        wanted: True: by graphs; False: not; None: by graphs on a GPU, where there are steps enough to be worth it.
        steps: how many denoising steps there will be for each graph that would be captured.

    Raises:
        UserError: graphs are wanted, and the denoiser is on no CUDA GPU or cut among processes.
    """
    parameters = list(denoiser.parameters())
    device = parameters[0].device
    lack = None
    if device.type != "cuda":
        lack = f"CUDA graphs need a CUDA GPU, but the denoiser is on {device}"
    elif any(type(parameter).__name__ == "DTensor" for parameter in parameters):  # importing it takes a while
        lack = "CUDA graphs need a whole denoiser, but this one is cut among processes"
    if wanted and lack:
        raise UserError(f"{lack}: sample without --cuda-graph (cuda_graph)")
    if wanted or (wanted is None and lack is None and steps >= FEWEST_STEPS):
        return GraphedPrediction(required=bool(wanted))
    return guided_prediction
