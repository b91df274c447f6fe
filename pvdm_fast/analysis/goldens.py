"""Golden values of the authors' release: read from their files, and whole networks held against them.

The files come with the source tree (tests/golden, whose README.md has the recipe), not with an installed package.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pvdm_fast.analysis.comparison import relative_error
from pvdm_fast.backends import use_backend
from pvdm_fast.models import Autoencoder, Denoiser

_ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (_ROOT / "tests" / "golden", _ROOT.parent / "shared" / "golden")
DENOISER_SIZES = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads")
Model = TypeVar("Model", Autoencoder, Denoiser)

# Float32 through some hundred layers: the order of sums alone. 16 bits: at most twice the error of plain PyTorch in the
# same dtype on the same device, which is flash-attention's criterion.
NETWORK = 1e-4
FACTOR_16_BIT = 2.0


def folder() -> Path | None:
    """Where the files are; None where there are none."""
    return next((path for path in FOLDERS if (path / "unet_small.safetensors").is_file()), None)


def draw(seed: int, case: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """The recipe's standard normal numbers for a tensor of a case."""
    state = np.random.RandomState(zlib.crc32(f"{seed}:{case}:{name}".encode()))
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


def draw_parameter(seed: int, case: str, name: str, shape: tuple[int, ...]) -> Tensor:
    r = draw(seed, case, name, shape)
    if len(shape) >= 2:
        return r * (0.9 / np.sqrt(r[0].numel()))
    return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r


@dataclass(frozen=True)
class GoldenCase:
    """`meta`: the metadata; `tensors`: outputs and gradients of the release."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def seed(self) -> int:
        return int(self.meta["seed"])

    def draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return draw(self.seed, self.meta["case"], name, shape)

    def parameters(self) -> dict[str, Tensor]:
        return {
            name: draw_parameter(self.seed, self.meta["case"], name, tuple(shape))
            for name, shape in self.meta["params"].items()
        }

    def input(self, key: str) -> Tensor:
        return self.draw(f"input.{key}", tuple(self.meta["inputs"][key]))


@cache
def load_case(name: str) -> GoldenCase:
    """A case by its file's name without ending.

    Raises:
        FileNotFoundError: this is not a source tree.
    """
    where = folder()
    if where is None:
        raise FileNotFoundError(f"There are no golden values in {' or '.join(map(str, FOLDERS))}: run a source tree.")
    with safe_open(where / f"{name}.safetensors", "pt") as file:
        meta = {key: _parsed(text) for key, text in file.metadata().items()}
        return GoldenCase(meta, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def denoiser() -> Denoiser:
    """The denoiser of the case unet_small, on the CPU in float32."""
    case = load_case("unet_small")
    sizes = {name: case.meta["config"][name] for name in DENOISER_SIZES}
    return _filled(Denoiser(**case.meta["layout"], **sizes), case)


def autoencoder() -> Autoencoder:
    """The autoencoder of the case autoencoder_small, on the CPU in float32."""
    case = load_case("autoencoder_small")
    sizes = case.meta["ddconfig"]
    side = sizes["resolution"]
    return _filled(Autoencoder(frames=sizes["timesteps"], height=side, width=side, channels=sizes["channels"]), case)


def _filled(model: Model, case: GoldenCase) -> Model:
    """The model with the case's parameters, all of them; its buffers stay."""
    parameters = case.parameters()
    assert set(parameters) == set(dict(model.named_parameters()))
    model.load_state_dict(parameters, strict=False)
    return model


def _denoised(model: nn.Module, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    case = load_case("unet_small")
    x = case.input("x").to(device, dtype).requires_grad_()
    condition = case.draw("input.cond", tuple(x.shape)).tanh().to(device, dtype)
    times = torch.tensor(case.meta["t"], device=device)
    with torch.no_grad():
        conditional = model(x, times, condition).sample
    y = model(x, times).sample
    (gradient,) = torch.autograd.grad(y, x, case.draw("grad_output", tuple(y.shape)).to(y))
    return {"output.conditional": conditional, "output.unconditional": y.detach(), "grad.input.x": gradient}


def _reconstructed(model: Any, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    case = load_case("autoencoder_small")
    shape = tuple(case.tensors["grad.input.video"].shape)
    video = case.draw("input.video", shape).tanh().to(device, dtype).requires_grad_()
    latent = model.encode(video).latent
    frames = model.decode(latent).sample.transpose(1, 2).flatten(0, 1)  # the release's form, (B T, 3, H, W)
    (gradient,) = torch.autograd.grad(frames, video, case.draw("grad_output", tuple(frames.shape)).to(frames))
    return {
        "output.latent": latent.detach(),
        "output.reconstruction": frames.detach(),
        "grad.input.video": gradient,
    }


# How each network is built, and what it computes of its case's inputs, by the names of the case's tensors: outputs and
# whole gradients.
NETWORKS: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Tensor]]]] = {
    "unet_small": (denoiser, _denoised),
    "autoencoder_small": (autoencoder, _reconstructed),
}


@dataclass(frozen=True)
class Agreement:
    """How far a network's result is from its golden value, relative in the 2-norm; NaN where it is not finite."""

    what: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


def compare(name: str, device: str, dtype: torch.dtype) -> Iterator[Agreement]:
    """Every result of a network against its golden value, served by whatever backend is asked for now.

    Float32 products must not be rounded to tf32 meanwhile.
    """
    build, run = NETWORKS[name]
    model = build().to(device, dtype)
    found = run(model, device, dtype)
    golden = load_case(name).tensors
    plain = {}
    if dtype != torch.float32:
        with use_backend("reference"):
            plain = run(model, device, dtype)
    for what, tensor in found.items():
        allowed = FACTOR_16_BIT * relative_error(plain[what], golden[what]) if plain else NETWORK
        yield Agreement(f"{name} {what}", relative_error(tensor, golden[what]), allowed)
