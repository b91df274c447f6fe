"""The configuration of a training run: all its options by key, and reading and writing config files."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pvdm_fast.errors import UserError
from pvdm_fast.jobs import devices, numbers
from pvdm_fast.jobs.arguments import did_you_mean
from pvdm_fast.jobs.devices import DEVICE, DeviceName
from pvdm_fast.jobs.numbers import Number, whole
from pvdm_fast.jobs.reading import UnreadableFile, read_yaml
from pvdm_fast.training.hyperparameters import (
    AdversarialOptions,
    AutoencoderOptions,
    DiffusionOptions,
    DistillationOptions,
    VideoOptions,
    option,
)
from pvdm_fast.training.presets import FLOW_OPTIONS, PRESETS, SAMPLING_OPTIONS, SIZES, preset_sizes

STAGES = ("autoencoder", "diffusion")
CLASS_GUIDANCE = 0.5  # of denoisers with classes; docs/notes/tiny_preset.md has what other weights gave


@dataclass
class TrainConfig:
    """A whole training run."""

    preset: Literal["tiny", "small", "base", "release"] = option(
        "tiny", "sizes of the models and matching hyper-parameters; release: all as the authors' release trains"
    )
    stage: Literal["autoencoder", "diffusion", "all"] = option("all", "what to train", resumable=True)
    data: str = option(
        "synthetic:shapes",
        "a folder of videos, of frame folders, UCF-101, SkyTimelapse, or of latents (python -m pvdm_fast.encode)",
        resumable=True,
    )
    autoencoder_from: str | None = option(
        None, "with --stage diffusion: the run, or the model folder, whose autoencoder to use"
    )
    init_from: str | None = option(
        None,
        "start from trained weights: a run, a model folder, or a checkpoint of the authors' release",
        metavar="PLACE",
    )
    lpips_weights: str | None = option(
        None,
        "add the perceptual loss to the autoencoder's: a file with VGG16's weights, or the word torchvision",
        resumable=True,
        metavar="FILE",
    )
    seed: int = option(0, "seed of weights, clips and noise", number=numbers.SEED)
    device: str = option(
        "auto",
        devices.MEANING,
        number=DEVICE,
        resumable=True,
        metavar=devices.METAVAR,
    )
    threads: int | None = option(
        None,
        "CPU threads; none: as many as are quickest, found by the job's pace, unless OMP_NUM_THREADS is set",
        number=numbers.THREADS,
        resumable=True,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "compute in 16 bits where that is safe; auto: bf16 on a GPU that multiplies it (NVIDIA's from sm_80 on), else "
        "no; bf16 falls back to float32 where the units for it are missing",
        resumable=True,
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = option(
        "adamw",
        "adamw8bit: its moments in 8 bits, a quarter of their memory (pip install 'pvdm-fast[8bit]'); muon: orthogonal "
        "steps for matrices (Jordan et al. 2024), AdamW for the rest",
    )
    fsdp: bool = option(
        False, "with several processes: cut weights and optimizer state among them (FSDP2)", resumable=True
    )
    save_every: int = option(1000, "steps between checkpoints", number=numbers.STEPS, resumable=True)
    preview_every: int = option(
        5000, "steps between sample videos and held-out scores", number=numbers.STEPS, resumable=True
    )
    early_stop: int | None = option(
        None,
        "end a stage after N held-out scores without a new best, and keep the best weights; none: take all steps",
        number=whole(1, 1_000_000),
        resumable=True,
    )
    held_out_clips: int = option(16, "held-out clips that are scored", number=whole(1, 1_000_000), resumable=True)
    max_skipped: int = option(
        10,
        "steps in a row whose loss is not finite that are skipped before training stops",
        number=whole(0, 1_000_000_000),
        resumable=True,
    )
    tensorboard: bool = option(
        False, "also write TensorBoard logs (pip install 'pvdm-fast[tensorboard]')", resumable=True
    )
    wandb: bool = option(
        False, "also log to Weights & Biases (pip install 'pvdm-fast[wandb]'); project: WANDB_PROJECT", resumable=True
    )
    video: VideoOptions = field(default_factory=VideoOptions)
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    adversarial: AdversarialOptions = field(default_factory=AdversarialOptions)
    diffusion: DiffusionOptions = field(default_factory=DiffusionOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)


GROUPS: dict[str, type[Any]] = {
    "video": VideoOptions,
    "autoencoder": AutoencoderOptions,
    "adversarial": AdversarialOptions,
    "diffusion": DiffusionOptions,
    "distillation": DistillationOptions,
}


@dataclass(frozen=True)
class Option:
    """One option: ``group`` is "" for those of the run itself; ``kind`` is its type, without None."""

    group: str
    name: str
    kind: Any
    optional: bool
    metadata: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The option's name in a config file, for example ``autoencoder.steps``."""
        return f"{self.group}.{self.name}" if self.group else self.name

    def convert(self, value: Any) -> Any:
        """``value`` (a word of the command line, or what YAML made of it) as this option's type.

        Raises:
            UserError: it is of another type or out of range.
        """
        if value is None and self.optional:
            return None
        choices = get_args(self.kind) if get_origin(self.kind) is Literal else None
        if choices:
            if value is False and "no" in choices:
                return "no"  # what YAML makes of a bare no
            if value not in choices:
                raise UserError(f"{self.key} must be one of {', '.join(choices)}, not {value!r}")
            return value
        if get_origin(self.kind) is tuple:
            if not isinstance(value, (list, tuple)) or (not value and not self.metadata["may_be_empty"]):
                raise UserError(f"{self.key} must be a list of whole numbers, not {value!r}")
            return tuple(self._scalar(item) for item in value)
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        number: Number | DeviceName | None = self.metadata["number"]
        if number is not None:
            return number.checked(self.key, value)
        if not isinstance(value, self.kind) or value == "" or (self.kind is str and "\0" in value):
            expected = {bool: "true or false", str: "text (in quotes where YAML takes it for another thing)"}[self.kind]
            raise UserError(f"{self.key} must be {expected}, not {value!r}")
        return value


def _options_of(group: str, owner: type) -> Iterator[Option]:
    hints = get_type_hints(owner)
    for item in dataclasses.fields(owner):
        if item.name in GROUPS:
            continue
        kind, optional = hints[item.name], False
        if get_origin(kind) in (Union, types.UnionType):
            optional = True
            kind = next(part for part in get_args(kind) if part is not type(None))
        yield Option(group, item.name, kind, optional, item.metadata)


_OWNERS: dict[str, type[Any]] = {"": TrainConfig, **GROUPS}
OPTIONS: dict[str, Option] = {item.key: item for group, owner in _OWNERS.items() for item in _options_of(group, owner)}


def get(config: TrainConfig, key: str) -> Any:
    """The value of the option ``key``, for example ``autoencoder.steps``."""
    group, _, name = key.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def flatten(nested: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``{"autoencoder": {"steps": 5}}`` as ``{"autoencoder.steps": 5}``. Raises UserError for an unknown name."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if name in GROUPS:
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {name} must hold options, for example {name}: {{steps: 100}}")
            flat.update({f"{name}.{inner}": item for inner, item in value.items()})
        else:
            flat[str(name)] = value
    for key in flat:
        if key not in OPTIONS:
            raise UserError(f"{source}: there is no option {key!r}{did_you_mean(key, OPTIONS)}")
    return flat


# Options that name files, and the values of them that don't.
_PLACES = {"data": "synthetic:", "autoencoder_from": None, "init_from": None, "lpips_weights": "torchvision"}


def with_absolute_places(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options with every path absolute: a run may be resumed from another working folder."""
    made = dict(changes)
    for key, other in _PLACES.items():
        value = made.get(key)
        if isinstance(value, str) and not (other is not None and value.startswith(other)):
            made[key] = os.path.abspath(value)
    return made


def given(changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` without sizes that are None: the preset's, or those of the models that training starts from."""
    return {key: value for key, value in changes.items() if not (value is None and key in SIZES)}


def make_config(changes: Mapping[str, Any]) -> TrainConfig:
    """The preset's configuration with ``changes`` (option key to value) made to it.

    Raises:
        UserError: a value is of the wrong type or out of range.
    """
    config = TrainConfig()
    preset = OPTIONS["preset"].convert(changes.get("preset", config.preset))
    values = {**preset_sizes(preset), **flatten(PRESETS[preset], "preset")}
    if given(changes).get("diffusion.prediction", "flow") != "flow":  # then the preset's choices for a flow go too
        values = {key: value for key, value in values.items() if key not in (*FLOW_OPTIONS, *SAMPLING_OPTIONS)}
    if changes.get("distillation.steps") is not None:  # a student has a way of its own
        values = {key: value for key, value in values.items() if key not in SAMPLING_OPTIONS}
    for key, value in {**values, **given(changes)}.items():
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, OPTIONS[key].convert(value))
    diffusion = config.diffusion
    if diffusion.class_conditional is None:
        diffusion.class_conditional = config.data == TrainConfig.data  # rendered scenes
    if diffusion.sampling_guidance is None:
        guided = diffusion.class_conditional and config.distillation.steps is None
        diffusion.sampling_guidance = CLASS_GUIDANCE if guided else 0.0
    return config


def read_changes(path: Path) -> dict[str, Any]:
    """The options in a YAML (or JSON) config file, by key. Raises UserError if it can't be read."""
    try:
        nested = read_yaml(path)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnreadableFile as reason:
        raise UserError(f"the config file {path} {reason}") from None
    if not isinstance(nested, Mapping):
        raise UserError(f"the config file {path} must hold options, for example 'preset: tiny'")
    return flatten(nested, str(path))


def values_of(config: TrainConfig) -> dict[str, Any]:
    """Every option with its value, as `make_config` takes them."""
    return {key: get(config, key) for key in OPTIONS}


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML that `read_changes` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)
