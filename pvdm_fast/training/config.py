"""Every hyper-parameter of a training run with its help text, and reading and writing config files."""

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
from pvdm_fast.jobs.numbers import Number, real, whole
from pvdm_fast.jobs.reading import UnreadableFile, read_yaml
from pvdm_fast.training.presets import FLOW_OPTIONS, PRESETS, SIZES, preset_sizes

STAGES = ("autoencoder", "diffusion")

WIDTH = whole(1, 65_536)  # of a network's layers
SHARE = real(0, 1)
NORM = real(0, 1e30)
BETA = real(0, 1 - 1e-9)  # AdamW takes no 1


def option(
    default: Any,
    help: str,
    *,
    number: Number | DeviceName | None = None,
    resumable: bool = False,
    may_be_empty: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with its help text, which numbers it takes, and whether it may change on resuming."""
    metadata = {"help": help, "number": number, "metavar": metavar}
    return field(default=default, metadata={**metadata, "resumable": resumable, "may_be_empty": may_be_empty})


@dataclass
class VideoOptions:
    """The clips."""

    frames: int | None = option(
        None, "frames of a clip, T; the diffusion stage reads clips of 2T", number=numbers.CLIP_FRAMES
    )
    height: int | None = option(None, "height of a clip in pixels", number=numbers.SIDE)
    width: int | None = option(None, "width of a clip in pixels", number=numbers.SIDE)
    stride: int = option(1, "take every n-th frame of a video", number=numbers.STRIDE, resumable=True)
    flip: bool = option(False, "mirror half of the training clips left to right", resumable=True)
    crop: Literal["random", "centre"] = option("random", "where training clips are cut out", resumable=True)
    resize: Literal["bicubic", "bilinear"] = option(
        "bicubic", "bicubic: antialiased; bilinear: not antialiased, the release's", resumable=True
    )
    pad_short: bool = option(
        False,
        "diffusion: a video of T to 2T - 1 frames gives T black ones and T of its own, trained without a condition, as "
        "in the release; else it is left out",
        resumable=True,
    )
    fold: int = option(1, "which of UCF-101's three pairs of lists splits the videos", number=numbers.FOLD)
    fps: float = option(8.0, "frames a second of the videos written", number=numbers.FPS, resumable=True)
    workers: int = option(
        2, "processes that read clips ahead; 0 reads in the main process", number=numbers.WORKERS, resumable=True
    )
    read_timeout: float = option(
        120.0,
        "seconds after which a file that cannot be read is left out; 0: no limit",
        number=numbers.SECONDS,
        resumable=True,
    )

    def drawing(self) -> dict[str, Any]:
        """How clips are read, whatever the stage: arguments of `pvdm_fast.data.open_dataset`."""
        return {name: getattr(self, name) for name in ("stride", "flip", "crop", "resize", "fold", "read_timeout")}


@dataclass
class StageOptions:
    """What both stages share."""

    steps: int = option(10_000, "optimizer steps", number=numbers.STEPS, resumable=True)
    batch_size: int = option(8, "clips a forward pass, of all processes together", number=numbers.BATCH, resumable=True)
    accumulate: int = option(
        1,
        "forward passes whose gradients are averaged for one optimizer step",
        number=whole(1, 10_000),
        resumable=True,
    )
    learning_rate: float = option(1e-4, "highest learning rate", number=real(0, 100), resumable=True)
    schedule: Literal["constant", "cosine"] = option(
        "constant", "learning rate after the warm-up; cosine ends near 0", resumable=True
    )
    warmup: int = option(100, "steps of linear warm-up", number=whole(0, 1_000_000_000), resumable=True)
    beta1: float = option(0.9, "AdamW: decay of the gradients' mean", number=BETA, resumable=True)
    beta2: float = option(0.999, "AdamW: decay of the squared gradients' mean", number=BETA, resumable=True)
    weight_decay: float = option(0.01, "AdamW: weight decay", number=real(0, 100), resumable=True)
    clip_norm: float = option(
        1.0, "largest norm of the gradients; larger ones are scaled down; 0: no limit", number=NORM, resumable=True
    )
    checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", resumable=True
    )


@dataclass
class AutoencoderOptions(StageOptions):
    """The autoencoder and its training."""

    patch_size: int | None = option(None, "side of a patch in pixels", number=whole(1, 1024))
    channels: int | None = option(None, "width of the transformers", number=WIDTH)
    depth: int | None = option(None, "layers of the encoder and of the decoder", number=whole(1, 1000))
    num_heads: int | None = option(None, "attention heads", number=numbers.HEADS)
    head_dim: int | None = option(None, "channels of an attention head", number=WIDTH)
    latent_channels: int | None = option(None, "channels of the latent planes", number=WIDTH)
    loss: Literal["l1", "l2"] = option(
        "l1", "l1: 4 times the mean absolute error, the release's; l2: 16 times the mean squared error", resumable=True
    )
    latent_noise: float = option(
        0.0,
        "standard deviation of noise on the latent in training: what is sampled later is never exact",
        number=real(0, 1000),
        resumable=True,
    )
    projection_depth: int | None = option(None, "layers of the projection to planes", number=whole(1, 1000))
    projection_hidden: int | None = option(None, "feed-forward width of the projection to planes", number=WIDTH)


@dataclass
class AdversarialOptions:
    """The autoencoder's adversarial phase."""

    start: int | None = option(
        None,
        "autoencoder step at which discriminators come in; none: never",
        number=whole(0, 1_000_000_000),
        resumable=True,
    )
    weight: float = option(1.0, "weight of what the discriminators say", number=real(0, 1e6), resumable=True)
    adaptive: bool = option(
        True,
        "scale that weight so that its gradient at the last decoder layer is as large as the other losses'",
        resumable=True,
    )
    alternate: bool = option(
        False,
        "take turns, as the release: a step trains the autoencoder, the next the discriminators, on clips of its own",
        resumable=True,
    )
    norm: Literal["batch", "spectral", "none"] = option(
        "batch", "of the discriminators: batch statistics, the release's; or each convolution's singular value"
    )
    r1: float = option(
        0.0,
        "weight of the penalty on the discriminators' gradient; not with --adversarial-norm batch",
        number=real(0, 1e6),
        resumable=True,
    )
    channels: int = option(64, "width of the discriminators", number=WIDTH)
    learning_rate: float = option(
        1e-4, "learning rate of the discriminators, constant", number=real(0, 100), resumable=True
    )


@dataclass
class DiffusionOptions(StageOptions):
    """The denoiser and its training."""

    model_channels: int | None = option(None, "base width of the U-Net", number=WIDTH)
    channel_mult: tuple[int, ...] | None = option(
        None, "width of each level, as multiples of the base width", number=whole(1, 64)
    )
    num_res_blocks: int | None = option(None, "residual blocks a level", number=whole(1, 100))
    attention_resolutions: tuple[int, ...] | None = option(
        None,
        "down-sampling factors at which each plane has attention of its own",
        number=whole(1, 1 << 20),
        may_be_empty=True,
    )
    num_heads: int | None = option(None, "attention heads", number=numbers.HEADS)
    positions: bool | None = option(None, "learned positions of the latent's tokens, which the release doesn't have")
    prediction: Literal["noise", "v", "flow"] | None = option(
        None,
        "what the network puts out: the noise, as the release's; v (Salimans and Ho 2022); or flow, the velocity of "
        "rectified flow (Liu et al. 2023)",
    )
    time_mean: float = option(
        0.0,
        "flow: training times are sigmoid(normal) with this mean; above 0 more of them are near the noise",
        number=real(-10, 10),
        resumable=True,
    )
    time_std: float = option(
        1.0, "flow: standard deviation of that normal distribution", number=real(0, 100), resumable=True
    )
    time_shift: float = option(
        1.0,
        "flow: factor s that moves times t to s t / (1 + (s - 1) t), in training and in sampling; larger clips want "
        "more than 1",
        number=real(0.01, 100),
    )
    normalize_latents: bool = option(
        False, "flow: give the denoiser latents of mean 0 and variance 1, measured by plane and channel on 32 clips"
    )
    loss_weight: Literal["none", "min_snr"] = option(
        "none",
        "of a noise level: none, or min_snr (Hang et al. 2023), which lets clean levels count less; not for flow",
        resumable=True,
    )
    conditional_probability: float = option(
        0.2, "share of the clips trained with the clip before as condition", number=SHARE, resumable=True
    )
    cached_clips: int = option(
        0,
        "videos' clips of 2T frames to encode once, before the stage, which then repeats these until its end; "
        "0: encode new ones in each step",
        number=whole(0, 1_000_000_000),
        resumable=True,
    )
    condition_per: Literal["clip", "batch"] = option(
        "clip",
        "what is drawn with that probability; batch: all clips of a forward pass have a condition, or none has, and "
        "their windows begin at one frame, as in the release",
        resumable=True,
    )
    float32: bool = option(
        False,
        "compute the denoiser in float32 whatever --mixed-precision says; only encoding follows it, as in the release",
        resumable=True,
    )
    class_conditional: bool = option(False, "learn the classes of the videos too; they are read from UCF-101's names")
    class_dropout: float = option(0.1, "share of the clips trained without their class", number=SHARE, resumable=True)
    ema_decay: float = option(
        0.9999,
        "decay of the averaged weights that are saved for sampling; in the n-th update it is (1 + n) / (10 + n), if "
        "that is less",
        number=SHARE,
        resumable=True,
    )
    ema_every: int = option(
        1,
        "steps between updates of the averaged weights; the decay is that of an update",
        number=numbers.STEPS,
        resumable=True,
    )
    sampling_steps: int = option(
        numbers.DEFAULT_STEPS, "denoising steps of the sample videos", number=numbers.SAMPLING_STEPS, resumable=True
    )


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


GROUPS: dict[str, type[Any]] = {
    "video": VideoOptions,
    "autoencoder": AutoencoderOptions,
    "adversarial": AdversarialOptions,
    "diffusion": DiffusionOptions,
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
        values = {key: value for key, value in values.items() if key not in FLOW_OPTIONS}
    for key, value in {**values, **given(changes)}.items():
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, OPTIONS[key].convert(value))
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
