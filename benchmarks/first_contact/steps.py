"""The parts that go through whole steps: of a sampler, as a CUDA graph; and of training, both networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import eager, eager_autoencoder
from benchmarks.first_contact.context import Context, LeftOut, Wrong
from benchmarks.registry import Setting, random_state
from pvdm_fast.analysis.agreement import THRICE, replayed, told
from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.diffusion.noise import diffusion_loss
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.noise_schedule import NoiseSchedule

GUIDANCE = 1.0
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
SAME_LOSS = 0.02  # relative: a loss of bf16 networks, summed over some thousand values each rounded to 4e-3


def sampler_step(context: Context) -> None:
    """The denoiser's guided pass of one clip: launched kernel by kernel, and replayed as a CUDA graph."""
    setting = Setting(context.size, torch.bfloat16, context.device)
    model = _filled(Denoiser(**setting.denoiser), setting).bfloat16().eval()
    latent = setting.draw(1, setting.denoiser["latent_channels"], setting.layout.num_tokens)
    condition = setting.draw(*latent.shape, seed=1).tanh().bfloat16()

    def step(predict: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return predict(model, latent, 500, condition, GUIDANCE)

    ways: dict[str, Callable[[], object]] = {"launched": lambda: step(guided_prediction)}
    ways["launched"]()  # compiles
    if context.device != "cuda":
        context.keep(median=_medians(ways, context, context.left() / 2))
        raise LeftOut("a CUDA graph needs a card; the pass itself was measured here.")
    before = torch.cuda.memory_allocated()
    errors, graphed = replayed(model, latent, condition, GUIDANCE)
    ways["graph"] = lambda: step(graphed)
    context.keep(
        shape=list(latent.shape), errors=errors, allowed=THRICE["bfloat16"],
        graph_memory=torch.cuda.memory_allocated() - before, median=_medians(ways, context, context.left() / 2),
    )  # fmt: skip
    if graphed.refused:  # it went on without a graph
        raise Wrong("no graph could be made: the output of this part says why.")
    if not all(error <= THRICE["bfloat16"] for error in errors):
        raise Wrong(f"the graph computes something else: relative errors {errors} at three times.")


def _filled(model: Any, setting: Setting) -> Any:
    """The model on its device with random weights throughout: none is zero, so none of the work is for nothing."""
    model.to(setting.device)
    model.load_state_dict(
        {name: value for name, value in random_state(model, setting).items() if name in dict(model.named_parameters())},
        strict=False,
    )
    return model


def _medians(ways: Mapping[str, Callable[[], object]], context: Context, seconds: float) -> dict[str, float]:
    """Seconds of each, median of alternating rounds by the host's clock, the launches of the host included."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    stop = time.monotonic() + seconds
    for index in range(LEAST_ROUNDS if context.dry else MOST_ROUNDS):
        if index >= LEAST_ROUNDS and time.monotonic() > stop:
            break
        for name, run in ways.items():
            context.synchronize()
            start = time.perf_counter()
            run()
            context.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def training_step(context: Context) -> None:
    """Forward, backward and AdamW of both networks: weights in float32, products in bf16 by autocast."""
    makers: dict[str, Callable[[Setting, int, bool], Callable[[], float]]]
    makers = {"denoiser": _denoiser_step, "autoencoder": _autoencoder_step}
    for name, make in context.while_time(list(makers.items()), lambda item: item[0]):
        for clips in (4, 1) if context.device == "cuda" and not context.dry else (1,):
            try:
                row = _trained(context, make, clips)
            except torch.OutOfMemoryError as problem:
                context.add("too_large", {"network": name, "clips": clips, "problem": told(problem)})
                torch.cuda.empty_cache()
                continue
            context.add("rows", {"network": name, "clips": clips, **row})
            print(f"{name}, {clips} clips: {row['median']}", flush=True)
            break
    for row in context.found.get("rows", []):
        ours, eager_loss = row["loss"]["ours"], row["loss"]["sdpa"]
        if not abs(ours - eager_loss) <= SAME_LOSS * abs(eager_loss):
            raise Wrong(f"{row['network']}: the first loss is {ours:.5f}, that of plain PyTorch {eager_loss:.5f}.")


def _trained(context: Context, make: Callable[[Setting, int, bool], Callable[[], float]], clips: int) -> dict[str, Any]:
    """The first loss, seconds a step and peak memory, ours and of the release's way with SDPA; one after the other."""
    setting = Setting(context.size, torch.float32, context.device)
    found: dict[str, dict[str, float]] = {"loss": {}, "median": {}, "memory": {}}
    seconds = context.left() / 10
    for name in ("ours", "sdpa"):
        if context.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = make(setting, clips, name == "ours")
        found["loss"][name] = step()
        step()  # the optimizer has its state now
        found["median"] |= _medians({name: step}, context, seconds)
        if context.device == "cuda":
            found["memory"][name] = torch.cuda.max_memory_allocated()
        del step
    return dict(found)


def _step(model: nn.Module, loss: Callable[[], Tensor], device: str) -> Callable[[], float]:
    """One training step, which returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def _denoiser_step(setting: Setting, clips: int, ours: bool) -> Callable[[], float]:
    config = setting.denoiser
    model = _filled(Denoiser(**config) if ours else eager.EagerDenoiser(**config, variant=eager.SDPA), setting)
    shape = (clips, config["latent_channels"], setting.layout.num_tokens)
    target, condition, noise = (setting.draw(*shape, seed=seed) for seed in range(3))
    times = torch.linspace(0, 999, clips, device=setting.device).long()
    schedule = NoiseSchedule.create(torch.device(setting.device))

    def predict(noisy: Tensor, moments: Tensor, condition: Tensor) -> Any:
        return model(noisy, moments, condition=condition) if ours else _Predicted(model(noisy, moments, condition))

    return _step(
        model.train(), lambda: diffusion_loss(predict, schedule, target, condition, noise, times), setting.device
    )


class _Predicted:
    """What a denoiser of the eager computation returns, as ours does."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


def _autoencoder_step(setting: Setting, clips: int, ours: bool) -> Callable[[], float]:
    config = setting.autoencoder
    kind = Autoencoder(**config) if ours else eager_autoencoder.EagerAutoencoder(**config, variant=eager.SDPA)
    model = _filled(kind, setting).train()
    video = setting.draw(clips, 3, config["frames"], config["height"], config["width"]).tanh()

    def loss() -> Tensor:
        result = model(video)
        return F.l1_loss((result.sample if ours else result).float(), video)

    return _step(model, loss, setting.device)
