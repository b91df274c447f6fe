"""The samplers: diffusers' schedulers, set up for PVDM's noise schedule or for rectified flow."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pvdm_fast.diffusion.flow import sampling_times
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.numbers import ETA, SAMPLING_STEPS
from pvdm_fast.models.noise_schedule import BETA_END, BETA_START, TRAIN_STEPS, NoiseSchedule

if TYPE_CHECKING:
    from pvdm_fast.models import Denoiser

# By what the denoiser predicts; the first is what "auto" means.
OF_NOISE = ("ddim", "ddpm", "dpm++", "unipc")
OF_FLOW = ("unipc", "dpm++", "euler", "heun", "stochastic")
SCHEDULER_NAMES = tuple(dict.fromkeys(OF_NOISE + OF_FLOW))

# Of diffusers' solvers for a flow: the logarithm of 1 - level must be finite.
FIRST_LEVEL = 1 - 1e-4

_BETAS: dict[str, Any] = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
}


def release_times(steps: int) -> list[int]:
    """The release's sampling times, largest first, ending with -1: linspace(-1, 999, steps + 1), truncated."""
    steps = SAMPLING_STEPS.checked("the number of sampling steps", steps)
    return torch.linspace(-1, TRAIN_STEPS - 1, steps + 1).int().flip(0).tolist()


class _ReleaseLevels:
    """The release's noise levels in a diffusers scheduler, rounded once from float64.

    diffusers multiplies them in float32, and is off by 9.9e-6 at the end. ValueError if a configuration has other
    levels.
    """

    def _take_levels(self) -> None:
        config: Any = self.config  # type: ignore[attr-defined]
        if any(config[name] != value for name, value in _BETAS.items()):
            raise ValueError(f"{type(self).__name__} has the noise levels of {_BETAS} and no others.")
        schedule = NoiseSchedule.create()
        self.betas, self.alphas, self.alphas_cumprod = schedule.betas, 1 - schedule.betas, schedule.alphas_cumprod


class _ReleaseSolverLevels(_ReleaseLevels):
    """The same for diffusers' solvers, including what they derive from the levels."""

    def _take_levels(self) -> None:
        super()._take_levels()
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5


class ReleaseDDIMScheduler(_ReleaseLevels, DDIMScheduler):
    """DDIM on the release's times, also if the number of steps doesn't divide 1000.

    diffusers takes equal strides. The release goes from each of its times to the next. At time -1 the clean prediction
    itself is returned.
    """

    @functools.wraps(DDIMScheduler.__init__)  # type: ignore[misc]  # its arguments are what a configuration can hold
    def __init__(self, *arguments: Any, **options: Any) -> None:
        DDIMScheduler.__init__(self, *arguments, **options)
        self._take_levels()
        self._levels: list[float] = self.alphas_cumprod.tolist()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Fix the times to visit. Raises UserError if there are more steps than noise levels."""
        times = release_times(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(times[:-1], device=device)
        self._next_time = dict(itertools.pairwise(times))

    def next_time(self, timestep: int) -> int:
        """The time after ``timestep``, or -1 at the end."""
        try:
            return self._next_time[int(timestep)]
        except KeyError:
            raise UserError(
                f"{int(timestep)} isn't one of this scheduler's times: take them from its timesteps"
            ) from None

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 1.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from ``timestep`` to the next time. Arguments as in diffusers, but eta is 1 by default."""
        eta = ETA.checked("eta", eta)
        next_time = self.next_time(timestep)
        level = self._levels[int(timestep)]
        clean = ((sample - (1 - level) ** 0.5 * model_output) / level**0.5).clamp(-1, 1)
        if use_clipped_model_output:
            model_output = (sample - level**0.5 * clean) / (1 - level) ** 0.5
        previous = clean
        if next_time >= 0:
            next_level = self._levels[next_time]
            sigma = eta * ((1 - level / next_level) * (1 - next_level) / (1 - level)) ** 0.5
            if sigma**2 > 1 - next_level:
                raise UserError(f"eta {eta} adds more noise than the level after step {timestep} has: 1 is DDPM's")
            previous = next_level**0.5 * clean + (1 - next_level - sigma**2) ** 0.5 * model_output
            if eta > 0:
                if variance_noise is None:
                    variance_noise = randn_tensor(
                        sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                    )
                previous = previous + sigma * variance_noise
        if not return_dict:
            return previous, clean
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=clean)


class ReleaseDDPMScheduler(_ReleaseLevels, DDPMScheduler):
    """diffusers' DDPM on the release's times. If the number of steps divides 1000, this is its "trailing"
    spacing."""

    @functools.wraps(DDPMScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        DDPMScheduler.__init__(self, *arguments, **options)
        self._take_levels()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Fix the times to visit. Raises UserError if there are more steps than noise levels."""
        super().set_timesteps(timesteps=release_times(num_inference_steps)[:-1], device=device)
        self.num_inference_steps = num_inference_steps


class ReleaseDPMSolverScheduler(_ReleaseSolverLevels, DPMSolverMultistepScheduler):
    """Diffusers' DPM-Solver++ with the release's noise levels."""

    @functools.wraps(DPMSolverMultistepScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        DPMSolverMultistepScheduler.__init__(self, *arguments, **options)
        self._take_levels()


class ReleaseUniPCScheduler(_ReleaseSolverLevels, UniPCMultistepScheduler):
    """Diffusers' UniPC with the release's noise levels."""

    @functools.wraps(UniPCMultistepScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        UniPCMultistepScheduler.__init__(self, *arguments, **options)
        self._take_levels()


class _FlowLevels:
    """The times of a flow scheduler: even from 1 to 0, then shifted, in each version of diffusers.

    diffusers ends its Euler and Heun with a step of a thousandth, and rounds its solvers' times to whole thousandths.
    """

    _start = 1.0  # the level that the arithmetic takes for pure noise

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Fix the times to visit, 1000 t in float32. Raises UserError if there are more than 1000 steps."""
        steps = SAMPLING_STEPS.checked("the number of sampling steps", num_inference_steps)
        super().set_timesteps(steps, device=device)  # type: ignore[misc]
        config: Any = self.config  # type: ignore[attr-defined]
        levels = sampling_times(steps, config.get("flow_shift", config.get("shift")))[:-1]
        order: int = self.order  # type: ignore[attr-defined]
        levels = levels.repeat_interleave(order)[order - 1 :].float()  # Heun's visits each time but the first twice
        self.timesteps = (TRAIN_STEPS * levels).to(device)
        self.sigmas = torch.cat([levels.clamp(max=self._start), torch.zeros(1)])  # on the CPU: no step waits for a GPU
        self.set_begin_index(0)  # type: ignore[attr-defined]


class FlowEulerScheduler(_FlowLevels, FlowMatchEulerDiscreteScheduler):
    """Euler's method along the path, or with new noise in each step: one pass of the denoiser a step."""


class FlowHeunScheduler(_FlowLevels, FlowMatchHeunDiscreteScheduler):
    """Heun's method, of second order: two passes a step, one in the last."""


class FlowDPMSolverScheduler(_FlowLevels, DPMSolverMultistepScheduler):
    """DPM-Solver++ (2M) on the path's levels."""

    _start = FIRST_LEVEL


class FlowUniPCScheduler(_FlowLevels, UniPCMultistepScheduler):
    """UniPC (order 2) on the path's levels."""

    _start = FIRST_LEVEL


def make_scheduler(name: str = "auto", prediction: str = "noise", time_shift: float = 1.0) -> SchedulerMixin:
    """A scheduler for denoisers of one prediction.

    ddim and ddpm take the predicted noise. dpm++ and unipc take the clean latent. The sampling loop clamps it first,
    because diffusers' solvers can't clamp to a fixed range. Their steps are even in the logarithm of the noise level,
    which brings 10 steps 4 dB nearer to the exact trajectory (docs/results/samplers.md).

    Those of a flow take the velocity, and their steps are even in time. All but "stochastic" follow its path, which
    needs no new noise. "stochastic" goes from the clean prediction back to the next time with new noise (diffusers'
    `stochastic_sampling`). What a barely trained denoiser got wrong is forgotten, but samples vary less than the data.

    Args:
        name: "ddim", "ddpm", "dpm++" or "unipc"; for a flow "unipc", "dpm++", "euler", "heun" or "stochastic"; or
            "auto".
        prediction: the denoiser's: "noise", "v" or "flow".
        time_shift: the denoiser's, for a flow.

    Raises:
        UserError: there is no scheduler of that name, or it doesn't go with this prediction.
    """
    name = scheduler_name(name, prediction)
    if prediction == "flow":
        return _flow_scheduler(name, time_shift)
    if name == "ddim":
        return ReleaseDDIMScheduler(**_BETAS)
    if name == "ddpm":
        return ReleaseDDPMScheduler(**_BETAS, variance_type="fixed_small", clip_sample=True)
    if name == "dpm++":
        return ReleaseDPMSolverScheduler(**_BETAS, prediction_type="sample", use_lu_lambdas=True)
    return ReleaseUniPCScheduler(**_BETAS, prediction_type="sample", use_exponential_sigmas=True)


def _flow_scheduler(name: str, shift: float) -> SchedulerMixin:
    if name in ("euler", "stochastic"):
        return FlowEulerScheduler(shift=shift, stochastic_sampling=name == "stochastic")
    if name == "heun":
        return FlowHeunScheduler(shift=shift)
    solver: Any = FlowDPMSolverScheduler if name == "dpm++" else FlowUniPCScheduler
    return solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def check_name(name: str) -> None:
    """Raises UserError for what no scheduler is called."""
    if name not in ("auto", *SCHEDULER_NAMES):
        raise UserError(f"there is no scheduler called {name!r}: choose auto or one of {', '.join(SCHEDULER_NAMES)}")


def scheduler_name(name: str, prediction: str, called: str = "the scheduler") -> str:
    """The name that "auto" stands for, any other as it is. Raises UserError if it doesn't go with the prediction."""
    check_name(name)
    fitting = OF_FLOW if prediction == "flow" else OF_NOISE
    if name == "auto":
        return fitting[0]
    if name not in fitting:
        raise UserError(
            f"{called} {name} doesn't go with this denoiser, which predicts {prediction}: choose one of "
            f"{', '.join(fitting)}"
        )
    return name


def fitting_name(denoiser: Denoiser, name: str) -> str:
    """The name that "auto" stands for with this denoiser, any other as it is. Raises UserError if it doesn't fit."""
    own = denoiser.config.get("sampling_scheduler", "auto")
    if not _distilled(denoiser):
        return scheduler_name(own if name == "auto" else name, denoiser.config.get("prediction", "noise"))
    check_name(name)
    taught = "euler" if own == "auto" else own
    if name not in ("auto", taught):
        raise UserError(f"this denoiser was distilled for {taught}, not {name}: leave the scheduler out")
    return str(taught)


def _distilled(denoiser: Denoiser) -> bool:
    return denoiser.config.get("distilled_steps") is not None


def scheduler_of(denoiser: Denoiser, scheduler: str | Any) -> Any:
    """A scheduler by name for this denoiser, or the given one.

    Raises:
        UserError: it takes what this denoiser doesn't predict, or noise of another scale.
    """
    config: Any = denoiser.config
    prediction, shift = config.get("prediction", "noise"), config.get("time_shift", 1.0)
    if isinstance(scheduler, str):
        return make_scheduler(fitting_name(denoiser, scheduler), prediction, shift)
    kind = type(scheduler).__name__
    if _distilled(denoiser):
        taught = fitting_name(denoiser, "auto")
        stochastic = bool(scheduler.config.get("stochastic_sampling")) == (taught == "stochastic")
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or not stochastic:
            kind += "" if stochastic else f" with stochastic_sampling={taught != 'stochastic'}"
            raise UserError(f"this denoiser was distilled for {taught}, not {kind}: take the scheduler of scheduler_of")
    if _takes_velocity(scheduler) != (prediction == "flow"):
        raise UserError(
            f"{kind} doesn't go with this denoiser, which predicts {prediction}: choose one of "
            f"{', '.join(OF_FLOW if prediction == 'flow' else OF_NOISE)} of pvdm_fast.diffusion.schedulers.scheduler_of"
        )
    scale = float(getattr(scheduler, "init_noise_sigma", 1))  # those of a flow don't have it
    if scale != 1:
        raise UserError(
            f"{kind} scales its noise by {scale:.3g}, which this model wasn't trained for: take one of "
            "pvdm_fast.diffusion.schedulers.make_scheduler"
        )
    return scheduler


def _takes_velocity(scheduler: Any) -> bool:
    of_flow = isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler))
    return of_flow or scheduler.config.get("prediction_type") == "flow_prediction"
