"""The authors' release's state dicts, both ways. Our models hold the release's names, so values go over bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.archives import first_line, load_archive
from pvdm_fast.jobs.checksums import find_damage
from pvdm_fast.jobs.reading import UnreadableFile, file_clock, open_regular, read_json_object
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser

StateDict = Mapping[str, Tensor]
Model = TypeVar("Model", Autoencoder, Denoiser)
_PREFIXES = ("module.", "diffusion_model.")
_SHOWN = 5
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CONFIG_BYTES = 16 << 20  # the names of a denoiser's classes are in it
LAYER_COUNTS = ("depth", "projection_depth", "num_res_blocks", "channel_mult", "attention_resolutions")
MAX_TENSORS = 10_000  # `base` has 1,100


class CheckpointError(UserError, ValueError):
    """A file that is not a state dict of the release, or not of the asked-for kind."""


def read_state_dict(source: str | Path | StateDict) -> dict[str, Tensor]:
    """The tensors of a `.pth` (or `.safetensors`) file, or of a mapping, by their names as they stand there.

    Only tensors are read: a pickle that would run code is refused, as are tensors that are larger than their file.

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
    if len(values) > MAX_TENSORS:
        raise CheckpointError(f"{name} holds {len(values)} tensors, but no model here has more than {MAX_TENSORS}.")
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
            with file_clock(path):
                return load_file(path)
        except Exception as error:  # of a damaged file: safetensors' own, ValueError, KeyError, OverflowError, ...
            raise CheckpointError(f"{path} is not a readable safetensors file: {first_line(error)}.") from error
    try:
        return load_archive(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from error
    except UnreadableFile as reason:
        raise CheckpointError(f"{path} {reason}.") from reason


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
        with file_clock(folder / WEIGHTS):
            _check_folder(kind, folder)
            model, found = loader.from_pretrained(
                folder, torch_dtype=dtype, output_loading_info=True, use_safetensors=True
            )
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file: the errors of diffusers, JSON, safetensors and the model itself
        raise CheckpointError(f"{folder} can't be read as a {kind.__name__}: {first_line(error)}") from error
    problems = [name for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[what]]
    if problems:
        raise CheckpointError(
            f"{folder} is damaged or of another model: {_differences('wrong tensors', map(str, problems))}."
        )
    return cast(Model, model)


def _check_folder(kind: type[Any], folder: Path) -> None:
    """Compare the sizes in config.json with the tensors of the weights' file, whose list is read and nothing else, so
    that a config.json with a billion layers is refused before a model of it is begun."""
    from safetensors import safe_open

    try:
        config = read_json_object(folder / CONFIG, CONFIG_BYTES)
    except (OSError, UnreadableFile) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder / CONFIG} {reason}.") from error
    with open_regular(folder / WEIGHTS):
        pass
    with safe_open(folder / WEIGHTS, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if len(shapes) > MAX_TENSORS:
        raise CheckpointError(f"{folder / WEIGHTS} lists {len(shapes)} tensors, more than the {MAX_TENSORS} allowed.")
    for name in LAYER_COUNTS:
        value = config.get(name)
        layers = len(value) if isinstance(value, list) else value
        if isinstance(layers, int) and layers > len(shapes):
            raise CheckpointError(
                f"{folder / CONFIG} says {name} {layers}, but {WEIGHTS} holds {len(shapes)} tensors: it is damaged, or "
                "of another model."
            )
    with torch.device("meta"):
        expected = kind.from_config(config).state_dict()
    _check_shapes(expected, shapes, set(), f"{folder} is damaged or of another model")


def _check_shapes(
    expected: StateDict, shapes: Mapping[str, tuple[int, ...]], optional: set[str], otherwise: str
) -> None:
    """Raises CheckpointError, ``otherwise`` and the differences, unless names and shapes are the model's."""
    problems = [
        _differences("missing", (n for n in expected if n not in shapes and n not in optional)),
        _differences("not known here", (n for n in shapes if n not in expected)),
        _differences(
            "of another shape",
            (
                f"{n} (file {shape}, model {tuple(expected[n].shape)})"
                for n, shape in shapes.items()
                if n in expected and shape != tuple(expected[n].shape)
            ),
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{otherwise}: {'; '.join(filter(None, problems))}.")


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
        begins, ends = pattern.split("{}")
        rests = (name.removeprefix(begins).partition(ends)[0] for name in self.tensors if name.startswith(begins))
        found = set(rests)
        number = 0
        while str(number) in found:
            number += 1
        return number

    def _first_keys(self) -> str:
        return f"It begins with {', '.join(list(self.tensors)[:_SHOWN])}."

    def build(self, kind: type[Any], **config: Any) -> Any:
        """A model of these sizes with the release's tensors in it.

        Raises:
            CheckpointError: names or shapes differ; a release's buffers may be missing, nothing else. Found out before
                memory is taken: sizes are read from single tensors, and could be far larger than the file.
        """
        with torch.device("meta"):
            empty = _build(kind, **config)
        optional = {name for name, _ in empty.named_buffers()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        otherwise = f"The state dict doesn't fit a {kind.__name__} of these sizes"
        _check_shapes(empty.state_dict(), shapes, optional, otherwise)
        model = _build(kind, **config)
        model.load_state_dict(self.tensors, strict=False, assign=False)
        model.release_names = self.original_names
        return model


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
    model: Autoencoder = state.build(
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
    model: Denoiser = state.build(
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
