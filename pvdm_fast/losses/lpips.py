"""LPIPS, the learned perceptual distance of images (Zhang et al., 2018, arXiv 1801.03924), version 0.1 with VGG16.

The formula is short and is written out here. The package `lpips` has it too, but importing it needs a torchvision that
matches PyTorch, and its model either downloads weights or starts from random ones. So this takes only the file with the
calibrated heads from it, without importing it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.checksums import sha256
from pvdm_fast.models.release import read_state_dict

TORCHVISION = "torchvision"
MINIMUM_SIZE = 16  # VGG16 halves four times before its last features

# VGG16's layers up to the last features, in torchvision's order: widths of convolutions, and 0 for a 2 x 2 maximum.
_LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
_FEATURES = (3, 8, 15, 22, 29)  # the activations before each maximum, and the last ones
_WIDTHS = (64, 128, 256, 512, 512)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's statistics, for images in [-1, 1]

_BACKBONE_NAME = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_HEAD_NAME = re.compile(r"lin(\d)\.model\.\d\.weight")

State = dict[str, Tensor]


class LPIPS(nn.Module):
    """The distance of images. It is frozen: all weights come from files, and none is trained.

    Args:
        state: the tensors of the backbone and the heads. Backbone layers have torchvision's names or those of the
            package `lpips`, heads those of `lpips`. Other tensors are ignored.

    Raises:
        UserError: a tensor is missing, or has another shape than VGG16's.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _LAYERS:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        for index, width in enumerate(_WIDTHS):
            self.register_buffer(f"head{index}", torch.zeros(1, width, 1, 1))
        self._fill({**_backbone(state), **_heads(state)})
        self.requires_grad_(False).eval()

    def _fill(self, tensors: State) -> None:
        for name, own in self.state_dict().items():
            if name in ("shift", "scale"):
                continue
            if name not in tensors:
                raise UserError(f"the LPIPS weights lack {name}: expected VGG16's convolutions and the five heads")
            if tensors[name].shape != own.shape:
                raise UserError(
                    f"the LPIPS weights' {name} is of shape {tuple(tensors[name].shape)}, but VGG16 has "
                    f"{tuple(own.shape)}: name a file made for VGG16"
                )
            own.copy_(tensors[name])

    def fingerprint(self) -> str:
        """SHA-256 of the weights themselves. It is the same for every file that holds them."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """The distance of each image from its target.

        Args:
            image: (B, 3, H, W) in [-1, 1], H and W at least 16. Differentiable.
            target: the same shape. It is treated as a constant.

        Returns:
            (B,), float32. It isn't negative if the heads aren't. Under autocast the convolutions run in 16 bits. The
            normalisation and the sums stay in float32, because its 1e-10 would be 0 in float16.

        Raises:
            ValueError: the shapes differ or are too small.
        """
        if image.shape != target.shape or image.dim() != 4 or min(image.shape[2:]) < MINIMUM_SIZE:
            raise ValueError(
                f"image and target must be (B, 3, H, W) of one shape with H and W at least {MINIMUM_SIZE}, but are "
                f"{tuple(image.shape)} and {tuple(target.shape)}."
            )
        with torch.no_grad():
            wanted = self._normalised_features(target)
        distance = image.new_zeros(len(image), dtype=torch.float32)
        for index, (have, want) in enumerate(zip(self._normalised_features(image), wanted, strict=True)):
            head = self.get_buffer(f"head{index}")
            distance = distance + (head * (have - want).square()).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _normalised_features(self, image: Tensor) -> list[Tensor]:
        """Five maps of feature vectors. Their length is 1, or 0 where nothing was active."""
        x = (image - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _FEATURES:
                vectors = x.float()
                # vector_norm, because the gradient of a square root of a sum of squares is NaN at 0
                found.append(vectors / (torch.linalg.vector_norm(vectors, dim=1, keepdim=True) + 1e-10))
        return found


def _backbone(state: Mapping[str, Tensor]) -> State:
    found = {}
    for name, tensor in state.items():
        if match := _BACKBONE_NAME.fullmatch(name):
            found[f"features.{match[1]}.{match[2]}"] = tensor
    return found


def _heads(state: Mapping[str, Tensor]) -> State:
    return {f"head{match[1]}": tensor for name, tensor in state.items() if (match := _HEAD_NAME.fullmatch(name))}


def load_lpips(source: str) -> tuple[LPIPS, str]:
    """LPIPS from a weights file, or with torchvision's VGG16.

    Args:
        source: a file of tensors (.pth or .safetensors, nothing in it is ever executed). Either VGG16's by
            torchvision's names (`vgg16-397923af.pth`), or those of the package `lpips`, including heads. Or the word
            "torchvision" for torchvision's own weights, which it downloads on first use. If the file has no heads, they
            come from the installed package `lpips`.

    Returns:
        The network, and a line that says where its weights come from, with each file's SHA-256.

    Raises:
        UserError: the file is missing, unreadable or belongs to another network. Or torchvision or the heads are
            missing.
    """
    if source == TORCHVISION:
        state, described = _torchvision_vgg16(), "VGG16 from torchvision"
    else:
        path = Path(source)
        if not path.is_file():
            raise UserError(
                f"there is no file {source} for --lpips-weights: name VGG16's weights "
                f"(https://download.pytorch.org/models/vgg16-397923af.pth), or give the word {TORCHVISION} where that "
                "is installed"
            )
        state, described = read_state_dict(path), f"VGG16 from {source} (SHA-256 {sha256(path)})"
        if not _backbone(state):
            raise UserError(f"{source} holds no VGG16: expected tensors such as features.0.weight")
    if _heads(state):
        return LPIPS(state), described
    heads = _packaged_heads()
    if heads is None:
        raise UserError(
            f"the heads of LPIPS are neither in {source} nor installed: pip install --no-deps lpips, or name a file "
            "that holds the whole state dict of lpips.LPIPS(net='vgg')"
        )
    return LPIPS({**state, **read_state_dict(heads)}), f"{described}, heads from {heads} (SHA-256 {sha256(heads)})"


def _torchvision_vgg16() -> State:
    try:
        from torchvision.models import VGG16_Weights
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another PyTorch
        raise UserError(
            f"--lpips-weights {TORCHVISION} needs torchvision in the build that matches PyTorch {torch.__version__} "
            f"({str(error).splitlines()[0]}): pip install torchvision, or name a file with VGG16's weights "
            "(https://download.pytorch.org/models/vgg16-397923af.pth)"
        ) from error
    try:
        return dict(VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:  # RuntimeError: wrong hash
        raise UserError(
            f"torchvision could not download VGG16 ({error}): fetch "
            "https://download.pytorch.org/models/vgg16-397923af.pth and name the file with --lpips-weights"
        ) from error


def _packaged_heads() -> Path | None:
    """The file of heads in the installed package `lpips`, which isn't imported."""
    spec = find_spec("lpips")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "weights" / "v0.1" / "vgg.pth"
        if path.is_file():
            return path
    return None
