"""The feature networks of distances: ours, and a TorchScript file of known hash that you name, and how to feed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.errors import UserError
from pvdm_fast.evaluation.clip_network import ClipFeatures
from pvdm_fast.evaluation.scene_judge import SceneJudge
from pvdm_fast.evaluation.tally import Measured
from pvdm_fast.jobs.archives import first_line
from pvdm_fast.jobs.checksums import sha256
from pvdm_fast.jobs.reading import UnreadableFile, file_clock

SIDE = 224
FRAMES_AT_ONCE = 128
I3D_SOURCE = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"
# As published by several projects that use the file. It has 51,235,320 bytes.
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
INPUT = (
    f"8-bit frames, bilinear to {SIDE} x {SIDE} without antialiasing (align_corners=False), scaled to [-1, 1]; "
    "called with rescale=False, resize=False, return_features=True"
)
HOW_TO_GET = (
    f"fetch the I3D network of StyleGAN-V, i3d_torchscript.pt, from {I3D_SOURCE} and add "
    f"--features i3d_torchscript.pt --features-sha256 {I3D_SHA256}"
)


class FeatureNetwork:
    """Features of videos from a TorchScript network with the interface of StyleGAN-V's I3D.

    Args:
        path: the file. Called as ``network(video (B, 3, T, 224, 224) in [-1, 1], rescale=False, resize=False,
            return_features=True)``, it gives (B, D).
        expected: the sha256 that the file must have. Otherwise it isn't opened.
        device: where it computes.

    Raises:
        UserError: the file doesn't exist, has another hash, or isn't TorchScript.
    """

    def __init__(self, path: Path, expected: str, device: torch.device) -> None:
        if not path.is_file():
            raise UserError(f"there is no feature network {path}: {HOW_TO_GET}")
        try:
            self.path, self.sha256, self.device = path, sha256(path), device
        except (OSError, UnreadableFile) as error:
            raise UserError(f"the feature network {path} cannot be read: {error}") from error
        if self.sha256 != expected.lower():
            raise UserError(
                f"the sha256 of {path} is {self.sha256}, not {expected}: it is another file, or an incomplete "
                "download, and is not opened; download it again, or give the hash that its source publishes"
            )
        try:
            with file_clock(path):
                self.network = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:  # a damaged file raises RuntimeError, UnicodeDecodeError, ...
            raise UserError(f"{path} is no TorchScript file: {first_line(error)}") from error

    @property
    def is_i3d(self) -> bool:
        """Whether this is the network of published distances."""
        return self.sha256 == I3D_SHA256

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Features (B, D) float64 on the CPU, of videos (B, 3, T, H, W) in [-1, 1].

        Raises:
            UserError: the network doesn't take clips of this length, or its features aren't finite rows.
        """
        pieces = video.split(max(1, FRAMES_AT_ONCE // video.shape[2]))
        features = torch.cat([self._features(piece.to(self.device)) for piece in pieces]).to("cpu", torch.float64)
        if not features.isfinite().all():
            raise UserError(f"the feature network {self.path} gave values that are not finite")
        return features

    def _features(self, video: Tensor) -> Tensor:
        try:
            features = self.network(prepare(video), rescale=False, resize=False, return_features=True)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"the feature network {self.path} cannot take clips of {video.shape[2]} frames ({reason}): "
                "ask for other lengths with --frames (I3D needs 9 frames at least)"
            ) from error
        if features.ndim != 2 or len(features) != len(video):
            raise UserError(
                f"the feature network {self.path} gave {tuple(features.shape)} for {len(video)} clips, where a row of "
                "features for each was expected"
            )
        return features


@dataclass(frozen=True)
class Networks:
    """Ours, which every evaluation has, the one that you named, if you did, and the judge of rendered scenes."""

    shipped: ClipFeatures
    named: FeatureNetwork | None
    judge: SceneJudge | None = None

    def measure(self, videos: dict[str, Tensor]) -> Measured:
        """Features of videos (B, 3, T, H, W) by name: rows of ours, values of the named network's."""
        values = {} if self.named is None else {name: self.named(video) for name, video in videos.items()}
        return Measured(values, rows={name: self.shipped(video) for name, video in videos.items()})


def prepare(video: Tensor) -> Tensor:
    """Videos (B, 3, T, H, W) in [-1, 1] in the network's form: float32 (B, 3, T, 224, 224) in [-1, 1]."""
    batch, channels, frames = video.shape[:3]
    pixels = video.float().add(1).mul(127.5).round().clamp(0, 255)
    flat = pixels.transpose(1, 2).flatten(0, 1)
    resized = F.interpolate(flat, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (2 * resized / 255 - 1).view(batch, frames, channels, SIDE, SIDE).transpose(1, 2).contiguous()
