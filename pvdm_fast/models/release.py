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
_PREFIXES = ("module.", "model.", "diffusion_model.")
_WRAPPERS = ("ema", "state_dict", "model")  # entries that hold a state dict; the averaged weights first
_SHOWN = 5
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CONFIG_BYTES = 16 << 20  # the names of a denoiser's classes are in it
LAYER_COUNTS = ("depth", "projection_depth", "num_res_blocks", "channel_mult", "attention_resolutions")
MAX_TENSORS = 10_000  # `base` has 1,100


class CheckpointError(UserError, ValueError):
    """A file that is not a state dict of the release, or not of the asked-for kind."""


def read_state_dict(source: str | Path | StateDict) -> dict[str, Tensor]:
    """The tensors of a `.pth` (or `.safetensors`) file, or of a mapping, by their original names.

    A state dict inside one of the entries `ema`, `state_dict` or `model` is found, in this order. Only tensors are
    read. A pickle that would run code is refused, and so are tensors that are larger than their file.

    Raises:
        CheckpointError: the file is missing, unreadable, would run code, or holds something else than tensors.
    """
    return _read(source)[0]


def _read(source: str | Path | StateDict) -> tuple[dict[str, Tensor], str]:
    """`read_state_dict`, and the entry of the file that it was found in ("" where it is the whole)."""
    if isinstance(source, Mapping):
        values: Any = source
        name = "the state dict"
    else:
        name = str(source)
        values = _read_file(Path(source))
    found = _find_state(values)
    if found is None:
        keys = ", ".join(str(key) for key in [*values][:_SHOWN]) if isinstance(values, Mapping) else ""
        raise CheckpointError(
            f"{name} doesn't hold a state dict: expected a mapping of names to floating tensors, itself or in one of "
            f"{', '.join(_WRAPPERS)}; found {keys or f'a {type(values).__name__}'}."
        )
    values, entry = found
    if len(values) > MAX_TENSORS:
        raise CheckpointError(f"{name} holds {len(values)} tensors, but no model here has more than {MAX_TENSORS}.")
    return dict(values), entry


def _find_state(values: Any, depth: int = 2) -> tuple[StateDict, str] | None:
    if not isinstance(values, Mapping) or not values:
        return None
    if all(_is_plain(name, value) for name, value in values.items()):
        return values, ""
    for entry in _WRAPPERS if depth else ():
        inner = _find_state(values.get(entry), depth - 1)
        if inner is not None:
            return inner[0], ".".join(filter(None, (entry, inner[1])))
    return None


def _is_plain(name: Any, value: Any) -> bool:
    """A named, dense tensor of real numbers. Others would be converted silently, or fail only when copied."""
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


def is_saved(folder: Path) -> bool:
    """Whether a model was saved in this folder."""
    return (folder / CONFIG).is_file()


def load_model(kind: type[Model], folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """Load a model folder of ours with ``kind.from_pretrained``. Checksums that training wrote are compared, and every
    tensor must come from the file, none from a random initialisation.

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
    """Compare the sizes in config.json with the weight file's list of tensors. Only the list is read. So a config.json
    with a billion layers is refused before its model is built."""
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


class ReleaseState:
    """A release state dict without the prefixes of its names. It remembers the original names.

    Args:
        source: the path of a checkpoint, or its state dict.

    Raises:
        CheckpointError: as `read_state_dict`; or two names are the same without their prefixes.
    """

    def __init__(self, source: str | Path | StateDict) -> None:
        found, self.entry = _read(source)
        self.original_names = {_strip(name): name for name in found}
        self.tensors = {_strip(name): tensor for name, tensor in found.items()}
        if len(self.tensors) < len(found):
            raise CheckpointError(
                "The state dict holds several models: some names differ in their prefixes only. Save one of them as a "
                f"state dict of its own. {self._first_keys()}"
            )

    @property
    def kind(self) -> type[Autoencoder] | type[Denoiser]:
        """Which of the two networks it is of; raises CheckpointError where it is of neither."""
        for kind, name in ((Autoencoder, "encoder.to_patch_embedding.weight"), (Denoiser, "input_blocks.0.0.weight")):
            if name in self.tensors:
                return kind
        raise CheckpointError(
            "The state dict is of neither network: it holds neither encoder.to_patch_embedding.weight nor "
            f"input_blocks.0.0.weight. {self._first_keys()}"
        )

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
            CheckpointError: names or shapes differ. Only a release's buffers may be missing. This is checked before
                memory is taken: sizes come from single tensors, and could be far larger than the file.
        """
        with torch.device("meta"):
            empty = _build(kind, **config)
        optional = {name for name, _ in empty.named_buffers()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        otherwise = f"The state dict doesn't fit a {kind.__name__} of these sizes"
        _check_shapes(empty.state_dict(), shapes, optional, otherwise)
        model = _build(kind, **config)
        model.load_state_dict(self.tensors, strict=False, assign=False)
        model.release_form = {
            name: (original, str(self.tensors[name].dtype).removeprefix("torch."))
            for name, original in self.original_names.items()
        }
        return model


def _differences(what: str, names: Iterable[str]) -> str:
    listed = list(names)
    if not listed:
        return ""
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{what}: {', '.join(listed[:_SHOWN])}{more}"


def load_release_autoencoder(
    source: str | Path | StateDict | ReleaseState,
    *,
    frames: int | None = None,
    resolution: int | None = None,
    num_heads: int = 8,
) -> Autoencoder:
    """The release's `ViTAutoencoder` from its state dict, in float32.

    All sizes but one follow from the shapes of its tensors.

    Args:
        source: the path of a checkpoint, or its state dict; prefixes `module.` and `model.` are taken off.
        frames: T. resolution: height and width in pixels. By default what the tensors were made for; others raise.
        num_heads: of the TimeSformer layers (the shapes don't tell).

    Raises:
        CheckpointError: the file can't be read, or doesn't fit; the first differing keys are named.
    """
    state = source if isinstance(source, ReleaseState) else ReleaseState(source)
    channels = state.shape("encoder.to_patch_embedding.weight")[0]
    inner = state.shape("encoder.layers.0.0.fn.to_qkv.weight")[0] // 3
    patch_size = state.shape("to_pixel.1.weight")[-1]
    if inner % num_heads:
        raise CheckpointError(f"The attention is {inner} channels wide, which {num_heads} heads don't divide.")

    def length(plane: str) -> int:
        return int(state.shape(f"{plane}_pos_embedding")[1]) - 1  # the last position is the appended token's

    model: Autoencoder = state.build(
        Autoencoder,
        frames=frames or length("xy"),
        height=resolution or length("yt") * patch_size,
        width=resolution or length("xt") * patch_size,
        patch_size=patch_size,
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
    source: str | Path | StateDict | ReleaseState,
    *,
    layout: TriplaneLayout = TriplaneLayout(16, 32, 32),  # noqa: B008 (frozen)
    num_heads: int = 8,
    num_head_channels: int | None = None,
) -> Denoiser:
    """The release's `UNetModel` (with cond_model) from its state dict, in float32.

    Widths, levels, blocks and attention resolutions follow from the names and shapes of its tensors.

    Args:
        source: the path of a checkpoint, or its state dict; prefixes `module.`, `model.` and `diffusion_model.` are
            taken off.
        layout: of the latent (the weights don't tell; the release always has 16 x 32 x 32).
        num_heads: of every attention (the shapes don't tell).
        num_head_channels: channels of a head, in place of the number of heads, as some configurations have it.

    Raises:
        CheckpointError: the file can't be read, or doesn't fit; the first differing keys are named.
    """
    state = source if isinstance(source, ReleaseState) else ReleaseState(source)
    model_channels, inputs = state.shape("input_blocks.0.0.weight")[:2]
    latent_channels = state.shape("out.2.weight")[0]
    if inputs == latent_channels:
        raise CheckpointError(
            f"This denoiser was trained with cond_model: False (its first convolution takes {inputs} channels, not "
            f"{2 * inputs}), and Denoiser always takes a condition: convert one that was trained with cond_model: True."
        )
    outputs = state.count("output_blocks.{}.")
    # The first output block that ends in a second residual block is the last of its level: its index is the number
    # of residual blocks a level. Without one there is a single level.
    ups = [
        i for i in range(outputs) if any(f"output_blocks.{i}.{j}.in_layers.0.weight" in state.tensors for j in (1, 2))
    ]
    blocks = ups[0] if ups else max(outputs - 1, 1)
    levels = max(outputs // (blocks + 1), 1)
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [state.shape(f"input_blocks.{i}.0.in_layers.2.weight")[0] for i in firsts]
    model: Denoiser = state.build(
        Denoiser,
        time=layout.time,
        height=layout.height,
        width=layout.width,
        latent_channels=latent_channels,
        model_channels=model_channels,
        channel_mult=[width // model_channels for width in widths],
        num_res_blocks=blocks,
        attention_resolutions=[
            2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state.tensors
        ],
        num_heads=num_heads if num_head_channels is None else _heads(widths, num_head_channels),
    )
    return model


def _heads(widths: list[int], channels: int) -> int:
    """The number of heads of ``channels`` each; raises CheckpointError where that isn't one number for all levels."""
    found = {width // channels for width in widths}
    if len(found) > 1 or any(width % channels for width in widths):
        raise CheckpointError(
            f"Heads of {channels} channels give the levels, {widths} channels wide, unequal numbers of heads, and "
            "Denoiser has one number for all: such a checkpoint can't be converted."
        )
    return found.pop()


def _build(kind: type[Any], **config: Any) -> Any:
    try:
        return kind(**config)
    except ValueError as error:
        raise CheckpointError(f"No {kind.__name__} has the sizes of this state dict, {config}: {error}") from error


def to_release(model: Autoencoder | Denoiser) -> dict[str, Tensor]:
    """The release's state dict of a model, including buffers. The release's own code can load it.

    A model that came from `load_release_*` gives back the names and dtypes it was loaded with, bit for bit.

    Raises:
        CheckpointError: the denoiser has learned positions, prediction v or flow, or classes, which the release doesn't
            have.
    """
    config = model.config
    if config.get("positions") or config.get("prediction", "noise") != "noise" or config.get("num_classes"):
        raise CheckpointError(
            "The release has no denoiser with learned positions, the prediction v or flow, or classes: train one with "
            'positions=False, prediction="noise" and num_classes=None.'
        )
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    form: dict[str, tuple[str, str]] | None = getattr(model, "release_form", None)
    if form is None:
        return state
    return {original: state[name].to(getattr(torch, dtype)) for name, (original, dtype) in form.items()}
