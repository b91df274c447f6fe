"""What is evaluated: the models of a run, and what its folder says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdm_fast.backends.precision import choose_precision
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.checksums import sha256
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder, Denoiser


@dataclass(frozen=True)
class Subject:
    """A run's models in eval mode. ``denoiser`` is None if only the autoencoder was trained."""

    run: RunFolder
    autoencoder: Autoencoder
    denoiser: Denoiser | None
    config: TrainConfig | None

    @property
    def frames(self) -> int:
        return int(self.autoencoder.config["frames"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.autoencoder.config["height"]), int(self.autoencoder.config["width"])

    @property
    def fps(self) -> float:
        """Frames per second of the shown videos."""
        return 8.0 if self.config is None else self.config.video.fps

    def facts(self) -> dict[str, Any]:
        """The models as part of the protocol: hashes of their weights, sizes, dtype, and whether they are
        averaged."""
        facts: dict[str, Any] = {"autoencoder": model_facts(self.autoencoder, self.run.autoencoder)}
        if self.denoiser is not None:
            ema = None if self.config is None else {"decay": self.config.diffusion.ema_decay}
            facts["denoiser"] = {**model_facts(self.denoiser, self.run.denoiser), "ema": ema or "not known"}
        return facts

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """A video (B, 3, T, H, W) through the autoencoder: float32 on its device."""
        video = video.to(self.autoencoder.device, self.autoencoder.dtype)
        return self.autoencoder.decode(self.autoencoder.encode(video).latent).sample.float()


def load_subject(run: Path, device: torch.device, dtype: str) -> Subject:
    """The models of a run on a device, in "fp32", "bf16" or what "auto" chooses; raises UserError where there is no
    autoencoder, or one of the models is damaged."""
    from pvdm_fast.models import Autoencoder, Denoiser
    from pvdm_fast.models.release import is_saved, load_model

    folder = RunFolder(run)
    if not is_saved(folder.autoencoder):
        raise UserError(f"there is no trained autoencoder in {folder.autoencoder}: name the folder of a run")
    compute = choose_precision(dtype, device).dtype
    denoiser = None
    if is_saved(folder.denoiser):
        denoiser = load_model(Denoiser, folder.denoiser, compute).to(device).eval()
    return Subject(
        folder,
        load_model(Autoencoder, folder.autoencoder, compute).to(device).eval(),
        denoiser,
        folder.read_config() if folder.config.is_file() else None,
    )


def model_facts(model: Any, folder: Path) -> dict[str, Any]:
    """What a model loaded from a folder is: hashes of its weights, its sizes, its dtype."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {
        "sha256": {path.name: sha256(path) for path in files},
        "config": {key: value for key, value in model.config.items() if not key.startswith("_")},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
