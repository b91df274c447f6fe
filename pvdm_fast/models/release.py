"""The authors' release's state dicts, both ways. Our models hold the release's names, so values go over bit for bit."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.checksums import find_damage
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser

StateDict = Mapping[str, Tensor]
Model = TypeVar("Model", Autoencoder, Denoiser)
_PREFIXES = ("module.", "diffusion_model.")
_SHOWN = 5


class CheckpointError(UserError, ValueError):
    """A file that is not a state dict of the release, or not of the asked-for kind."""


def read_state_dict(source: str | Path | StateDict) -> dict[str, Tensor]:
    """The tensors of a `.pth` (or `.safetensors`) file, or of a mapping, by their names as they stand there.

    Only tensors are read: a pickle that would run code is refused.

    Raises:
        CheckpointError: the file is missing, unreadable, would run code, or holds something else than tensors.
    """
    if isinstance(source, Mapping):
        values: Any = source
        name = "the state dict"
    else:
        name = str(source)
        values = _read_file(Path(source))
    if not isinstance(values, Mapping) or not values or not all(_is_plain(k, v) for k, v in values.items()):
        raise CheckpointError(f"{name} doesn't hold a state dict: expected a mapping of names to floating tensors.")
    return dict(values)


def _is_plain(name: Any, value: Any) -> bool:
    """A named, dense tensor of real numbers; others would be converted in silence, or fail only when copied."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and dense and value.is_floating_point() and value.dtype.itemsize > 1


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give the path of a release checkpoint (.pth).")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # of a damaged file: safetensors' own, ValueError, KeyError, OverflowError, ...
            raise CheckpointError(f"{path} is not a readable safetensors file: {_reason(error)}.") from error
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is not a file of tensors only (it may be damaged, or try to run code when "
            f"loaded). Save the model's state_dict() with torch.save."
        ) from error
    except Exception as error:  # a damaged pickle can make its reader raise anything
        raise CheckpointError(f"{path} can't be read as a PyTorch file: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _check_archive(path: Path) -> None:
    """The checksums of a file of torch.save, which torch.load does not look at.

    Raises:
        CheckpointError: the file is no archive, is damaged, or would grow when unpacked (torch.save packs nothing).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = None if packed else archive.testzip()
    except Exception as error:  # of a damaged archive: BadZipFile, struct.error, ValueError, OverflowError, ...
        raise CheckpointError(
            f"{path} can't be read as a PyTorch file: it is damaged, or older than PyTorch 1.6 (load it there and save "
            f"it again with torch.save): {_reason(error)}"
        ) from error
    if packed:
        raise CheckpointError(f"{path} was refused: parts of it are compressed, as torch.save never writes them.")
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of its part {damaged} is wrong. Copy or fetch it again."
        )


def load_model(kind: type[Model], folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A model folder of ours: ``kind.from_pretrained``, with the checksums that training wrote compared where they are
    there, and every tensor taken from the file and none left to chance.

    Raises:
        CheckpointError: a file is missing or damaged, or holds another model.
    """
    if problem := find_damage(folder):
        raise CheckpointError(
            f"{folder} is damaged: {problem}. Copy it again; or, where it was changed on purpose, remove its "
            "checksums.json."
        )
    loader: Any = kind
    try:
        model, found = loader.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    except Exception as error:  # of a damaged file: the errors of diffusers, JSON, safetensors and the model itself
        raise CheckpointError(f"{folder} can't be read as a {kind.__name__}: {_reason(error)}") from error
    problems = [name for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[what]]
    if problems:
        raise CheckpointError(
            f"{folder} is damaged or of another model: {_differences('wrong tensors', map(str, problems))}."
        )
    return cast(Model, model)


def _strip(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


class _ReleaseState:
    """A release state dict with the prefixes of its names taken off; remembers the names as they stood."""

    def __init__(self, source: str | Path | StateDict) -> None:
        found = read_state_dict(source)
        self.original_names = {_strip(name): name for name in found}
        self.tensors = {_strip(name): tensor for name, tensor in found.items()}

    def shape(self, name: str) -> torch.Size:
        if name not in self.tensors:
            raise CheckpointError(f"The state dict lacks {name}: it is not of this kind. {self._first_keys()}")
        return self.tensors[name].shape

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... begin a name."""
        number = 0
        while any(name.startswith(pattern.format(number)) for name in self.tensors):
            number += 1
        return number

    def _first_keys(self) -> str:
        return f"It begins with {', '.join(list(self.tensors)[:_SHOWN])}."

    def fill(self, model: nn.Module) -> None:
        """Copy all tensors into `model`.

        Raises:
            CheckpointError: names or shapes differ; a release's buffers may be missing, nothing else.
        """
        expected = model.state_dict()
        optional = {name for name, _ in model.named_buffers()}
        problems = [
            _differences("missing", (n for n in expected if n not in self.tensors and n not in optional)),
            _differences("not known here", (n for n in self.tensors if n not in expected)),
            _differences(
                "of another shape",
                (
                    f"{n} (file {tuple(t.shape)}, model {tuple(expected[n].shape)})"
                    for n, t in self.tensors.items()
                    if n in expected and t.shape != expected[n].shape
                ),
            ),
        ]
        if any(problems):
            listed = "; ".join(filter(None, problems))
            raise CheckpointError(f"The state dict doesn't fit a {type(model).__name__} of these sizes: {listed}.")
        model.load_state_dict(self.tensors, strict=False, assign=False)
        model.release_names = self.original_names  # type: ignore[assignment]


def _differences(what: str, names: Iterable[str]) -> str:
    listed = list(names)
    if not listed:
        return ""
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{what}: {', '.join(listed[:_SHOWN])}{more}"


def load_release_autoencoder(
    source: str | Path | StateDict, *, frames: int = 16, resolution: int = 256, num_heads: int = 8
) -> Autoencoder:
    """The release's `ViTAutoencoder` from its state dict, in float32.

    Channels, depths, patch size and latent channels follow from the shapes of its tensors.

    Args:
        source: the path of a checkpoint, or its state dict; a prefix `module.` is taken off.
        frames: T. resolution: height and width in pixels. Both must be what the tensors were made for.
        num_heads: of the TimeSformer layers (the shapes don't tell).

    Raises:
        CheckpointError: the file can't be read, or doesn't fit; the first differing keys are named.
    """
    state = _ReleaseState(source)
    channels = state.shape("encoder.to_patch_embedding.weight")[0]
    inner = state.shape("encoder.layers.0.0.fn.to_qkv.weight")[0] // 3
    model = _build(
        Autoencoder,
        frames=frames,
        height=resolution,
        width=resolution,
        patch_size=state.shape("to_pixel.1.weight")[-1],
        channels=channels,
        depth=state.count("encoder.layers.{}."),
        num_heads=num_heads,
        head_dim=inner // num_heads,
        latent_channels=state.shape("pre_xy.weight")[0],
        projection_depth=state.count("xy_quant_attn.layers.{}."),
        projection_hidden=state.shape("xy_quant_attn.layers.0.1.fn.net.0.weight")[0],
    )
    state.fill(model)
    return model


def load_release_denoiser(
    source: str | Path | StateDict,
    *,
    layout: TriplaneLayout = TriplaneLayout(16, 32, 32),  # noqa: B008 (frozen)
    num_heads: int = 8,
) -> Denoiser:
    """The release's `UNetModel` (with cond_model) from its state dict, in float32.

    Widths, levels, blocks and attention resolutions follow from the names and shapes of its tensors.

    Args:
        source: the path of a checkpoint, or its state dict; prefixes `module.` and `diffusion_model.` are taken off.
        layout: of the latent (the weights don't tell; the release always has 16 x 32 x 32).
        num_heads: of every attention (the shapes don't tell).

    Raises:
        CheckpointError: the file can't be read, or doesn't fit; the first differing keys are named.
    """
    state = _ReleaseState(source)
    model_channels = state.shape("input_blocks.0.0.weight")[0]
    outputs = state.count("output_blocks.{}.")
    # The first output block that ends in a second residual block is the last of its level: its index is the number
    # of residual blocks a level. Without one there is a single level.
    ups = [
        i for i in range(outputs) if any(f"output_blocks.{i}.{j}.in_layers.0.weight" in state.tensors for j in (1, 2))
    ]
    blocks = ups[0] if ups else max(outputs - 1, 1)
    levels = max(outputs // (blocks + 1), 1)
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    model = _build(
        Denoiser,
        time=layout.time,
        height=layout.height,
        width=layout.width,
        latent_channels=state.shape("out.2.weight")[0],
        model_channels=model_channels,
        channel_mult=[state.shape(f"input_blocks.{i}.0.in_layers.2.weight")[0] // model_channels for i in firsts],
        num_res_blocks=blocks,
        attention_resolutions=[
            2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state.tensors
        ],
        num_heads=num_heads,
    )
    state.fill(model)
    return model


def _build(kind: type[Any], **config: Any) -> Any:
    try:
        return kind(**config)
    except ValueError as error:
        raise CheckpointError(f"No {kind.__name__} has the sizes of this state dict, {config}: {error}") from error


def to_release(model: Autoencoder | Denoiser) -> dict[str, Tensor]:
    """The release's state dict of a model, its buffers included; loadable by the release's own code.

    A model that came from `load_release_*` gives back the names it was loaded with, bit for bit.

    Raises:
        CheckpointError: a denoiser with learned positions, the prediction v or classes: the release has none of them.
    """
    config = model.config
    if config.get("positions") or config.get("prediction", "noise") != "noise" or config.get("num_classes"):
        raise CheckpointError(
            "The release has no denoiser with learned positions, the prediction v or classes: train one with "
            'positions=False, prediction="noise" and num_classes=None.'
        )
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names: dict[str, str] | None = getattr(model, "release_names", None)
    if names is None:
        return state
    return {original: state[name] for name, original in names.items()}
