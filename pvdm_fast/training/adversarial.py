"""The autoencoder's second phase: the perceptual loss, and discriminators that are trained against it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pvdm_fast.data.transforms import to_float
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.share import Share
from pvdm_fast.jobs.transfer import to_device
from pvdm_fast.losses.lpips import LPIPS, MINIMUM_SIZE, load_lpips
from pvdm_fast.losses.patchgan import Discriminators, frames_of
from pvdm_fast.losses.psnr import psnr
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.hyperparameters import AdversarialOptions
from pvdm_fast.training.second_model import KnownGradient, SecondModel
from pvdm_fast.training.stages import WHOLE, AutoencoderStage, Classes, Labelled

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.models import Autoencoder

LPIPS_WEIGHT, FEATURE_WEIGHT = 4.0, 4.0
BETAS = (0.5, 0.9)
CLIP_NORM = 1.0  # of each discriminator's gradient
LARGEST_WEIGHT = 1e4  # of the adaptive weight, as in VQGAN


def wants_second_phase(config: TrainConfig) -> bool:
    return config.lpips_weights is not None or config.adversarial.start is not None


def check_second_phase(config: TrainConfig, height: int, width: int, accelerator: Accelerator) -> list[tuple[str, str]]:
    """What the second phase will do, in lines of (label, text), before anything is written.

    Raises:
        UserError: options that exclude each other, LPIPS weights that are missing or wrong, or batch statistics over
            several processes on a CPU, where PyTorch cannot share them.
    """
    options, lines = config.adversarial, []
    if config.lpips_weights is not None:
        if min(height, width) < MINIMUM_SIZE:
            raise UserError(
                f"--lpips-weights needs frames of at least {MINIMUM_SIZE} x {MINIMUM_SIZE} pixels, not {height}x{width}"
            )
        lines.append(("perceptual", load_lpips(config.lpips_weights)[1]))
    if options.start is not None:
        if options.start >= config.autoencoder.steps:
            raise UserError(
                f"--adversarial-start {options.start} is never reached in {config.autoencoder.steps} steps: raise "
                "--autoencoder-steps, or start earlier"
            )
        if config.fsdp and options.adaptive:
            raise UserError(
                "--fsdp cuts the last layer, whose gradient the adaptive weight needs: choose --no-adversarial-adaptive"
            )
        if options.r1 > 0 and options.norm == "batch":
            raise UserError(
                "--adversarial-r1 needs --adversarial-norm spectral or none: batch statistics tie the clips of a batch "
                "together, and the penalty is on each one's gradient"
            )
        if options.norm == "batch" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
            raise UserError(
                "--adversarial-norm batch works in several processes only on GPUs (its statistics are of the global "
                "batch): choose --adversarial-norm spectral"
            )
        lines.append(("adversarial", f"from step {options.start} on"))
    return lines


class Adversary(SecondModel):
    """The discriminators, see `SecondModel`."""

    nets: Discriminators

    def __init__(self, options: AdversarialOptions, seed: int) -> None:
        self.options = options
        with torch.random.fork_rng(devices=[]):  # so that the run's other random numbers don't depend on them
            torch.manual_seed(seed)
            nets = Discriminators(options.channels, options.norm)
        settings: dict[str, Any] = {"lr": options.learning_rate, "betas": BETAS, "fused": True}
        super().__init__(nets, lambda nets: torch.optim.AdamW(nets.parameters(), **settings))

    def prepare(self, accelerator: Accelerator) -> None:
        """As of `SecondModel`. All processes share their batch statistics."""
        if self.options.norm == "batch" and accelerator.num_processes > 1:
            self.nets = nn.SyncBatchNorm.convert_sync_batchnorm(self.nets)
        super().prepare(accelerator)

    def judge(self, real: Tensor, fake: Tensor, frames: Tensor, share: float) -> dict[str, Tensor]:
        """Add ``share`` of a batch's gradients. Returns what to record."""
        with self.accelerator.autocast():
            terms = self.prepared(real, fake, frames, self.options.r1)
        self.backward(terms.loss * share)
        values = {"d_loss": terms.loss.detach(), "d_real": terms.real, "d_fake": terms.fake}
        return values | ({"r1": terms.penalty} if self.options.r1 > 0 else {})


class SecondPhaseStage(AutoencoderStage):
    """Reconstruction judged by pixels, by LPIPS of one random frame of each clip, and by discriminators.

    Each loss is differentiated once, only with respect to the reconstruction. The weighted sum of these gradients goes
    on into the autoencoder. So the adaptive weight costs two products at the last layer.
    """

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder) -> None:
        super().__init__(config, autoencoder)
        self.lpips: LPIPS | None = load_lpips(config.lpips_weights)[0] if config.lpips_weights is not None else None
        options = config.adversarial
        self.alternate = options.alternate
        self.start = math.inf if options.start is None else options.start
        self.adversary = None if options.start is None else Adversary(options, config.seed)
        self.active = self.trains_adversary = False
        self._for_the_adversary: tuple[Tensor, Tensor, Tensor] | None = None
        self._sums: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> None:
        if self.lpips is not None:
            self.lpips.to(device)

    def prepare(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        if self.adversary is not None:
            self.adversary.prepare(accelerator)

    def before_step(self, step: int) -> None:
        self.active = step >= self.start
        together = not self.alternate
        adversarys_turn = self.active and (step - self.start) % 2 == 1
        self.trains_model = together or not adversarys_turn
        self.trains_adversary = self.active and (together or adversarys_turn)
        self._sums = {}
        if self.adversary is not None:
            self.adversary.optimizer.zero_grad(set_to_none=True)

    def loss(
        self,
        model: nn.Module,
        video: Tensor,
        generator: torch.Generator,
        share: Share = WHOLE,
        classes: Classes = None,
    ) -> Tensor:
        video = to_float(video)
        drawn = self.latent_noise(len(video), generator, share)
        drawn.append(share.of(torch.randint(self.clip_frames, (share.world * len(video),), generator=generator)))
        *noise, frames = to_device(drawn, video.device)
        if not self.trains_model:
            return self._adversarys_turn(model, video, noise[0] if noise else None, frames)
        sample = model(video, noise[0] if noise else None).sample.float()
        leaf = sample.detach().requires_grad_()
        value = self._reconstruction_loss(leaf, video, frames)
        gradient = self._gradient(value, leaf)
        if self.adversary is not None and self.active:
            terms = self.adversary.nets.generator_terms(leaf, video, frames)
            judged = terms.hinge + FEATURE_WEIGHT * terms.feature_matching
            its_gradient = self._gradient(judged, leaf)
            weight = self.adversary.options.weight * self._adaptive_weight(sample, gradient, its_gradient)
            value, gradient = value + weight * judged, gradient + weight * its_gradient
            self._add({"g_loss": terms.hinge, "feature_matching": terms.feature_matching, "adversarial_weight": weight})
            if self.trains_adversary:
                self._for_the_adversary = (video, leaf.detach(), frames)
        loss: Tensor = KnownGradient.apply(sample, gradient, value.detach())
        return loss

    @torch.no_grad()
    def _adversarys_turn(self, model: nn.Module, video: Tensor, noise: Tensor | None, frames: Tensor) -> Tensor:
        """Reconstructions for the discriminators alone. The loss is that of pixels and LPIPS, without a gradient."""
        sample = model(video, noise).sample.float()
        self._for_the_adversary = (video, sample, frames)
        return self._reconstruction_loss(sample, video, frames).requires_grad_()  # a leaf: its backward pass is empty

    def _reconstruction_loss(self, sample: Tensor, video: Tensor, frames: Tensor) -> Tensor:
        loss = self.pixel_loss(sample, video)
        self._add({"reconstruction": loss})
        if self.lpips is not None:
            perceptual = self.lpips(frames_of(sample, frames), frames_of(video, frames)).mean()
            self._add({"lpips": perceptual})
            loss = loss + LPIPS_WEIGHT * perceptual
        return loss

    def _gradient(self, value: Tensor, at: Tensor) -> Tensor:
        """The gradient of a loss, computed with the loss scale if there is one: in float16 it would otherwise be 0."""
        scaler = self.accelerator.scaler
        with torch.autocast(at.device.type, enabled=False):
            if scaler is None:
                return torch.autograd.grad(value, at)[0]
            (gradient,) = torch.autograd.grad(scaler.scale(value), at)
        return gradient / scaler.scale(gradient.new_ones(()))  # the scale itself, which nobody waits for

    def _adaptive_weight(self, sample: Tensor, gradient: Tensor, adversarial: Tensor) -> Tensor:
        """VQGAN's (Esser et al., 2021): the norm of the other losses' gradient at the last layer over this one's."""
        assert self.adversary is not None
        if not self.adversary.options.adaptive:
            return sample.new_ones(())
        weight = cast(Tensor, self.model.to_pixel["1"].weight)
        found = []
        with torch.autocast(sample.device.type, enabled=False):
            for at_sample in (gradient, adversarial):
                size = at_sample.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)  # float16 holds it so
                (at_weight,) = torch.autograd.grad(sample, weight, at_sample / size, retain_graph=True)
                found.append(at_weight.float() * size)
        others, own = self.accelerator.reduce(torch.stack(found), "mean").flatten(1).norm(dim=1)
        return (others / (own + 1e-6)).clamp(max=LARGEST_WEIGHT)

    def after_backward(self) -> None:
        if self.adversary is not None and self._for_the_adversary is not None:
            self._add(self.adversary.judge(*self._for_the_adversary, share=1 / self.options.accumulate))
            self._for_the_adversary = None

    def measured(self) -> dict[str, Tensor]:
        found = dict(
            zip(self._sums, torch.stack(list(self._sums.values())).float() / self.options.accumulate, strict=True)
        )
        if self.adversary is not None and self.trains_adversary:
            nets = self.adversary.nets
            found["d_gradient_norm"] = self.adversary.clip(CLIP_NORM, nets.image, nets.clip)
        return found

    def after_step(self, measured: Mapping[str, float]) -> None:
        if self.adversary is not None and self.trains_adversary:
            self.adversary.step(measured["d_gradient_norm"])

    def after_skip(self) -> None:
        if self.adversary is not None and self.trains_adversary:
            self.adversary.abandon()

    def _add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def score(self, batches: Iterable[Labelled]) -> dict[str, float]:
        """``psnr``, and with LPIPS ``lpips``: of each clip's middle frame. Averaged over clips."""
        scores: dict[str, list[Tensor]] = {"psnr": []}
        for video, _ in batches:
            sample = self.model(video).sample
            scores["psnr"].append(psnr(sample, video))
            if self.lpips is not None:
                middle = torch.full((len(video),), self.clip_frames // 2, device=video.device)
                distance = self.lpips(frames_of(sample, middle), frames_of(video, middle))
                scores.setdefault("lpips", []).append(distance)
        return {name: torch.cat(values).mean().item() for name, values in scores.items()}

    def state(self) -> dict[str, Any]:
        return {
            "lpips": self.lpips.fingerprint() if self.lpips is not None else None,
            "adversary": self.adversary.state() if self.adversary is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. A phase that is switched on when resuming starts from the beginning.

        Raises:
            UserError: the LPIPS weights are not those that the run began with.
        """
        before = state.get("lpips")
        if before is not None and self.lpips is not None and before != self.lpips.fingerprint():
            raise UserError("--lpips-weights now holds other weights than the run began with: name the same file")
        if self.adversary is not None and state.get("adversary") is not None:
            self.adversary.restore(state["adversary"])
