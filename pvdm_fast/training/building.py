"""From a configuration to the objects that are trained, with one clear sentence where something doesn't fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pvdm_fast.data.layouts import find_classes
from pvdm_fast.errors import UserError
from pvdm_fast.precision import bfloat16_serves
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.files import whole_file
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage, Stage, video_size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.models import Autoencoder, Denoiser

AUTOENCODER_SIZES = (
    "patch_size",
    "channels",
    "depth",
    "num_heads",
    "head_dim",
    "latent_channels",
    "projection_depth",
    "projection_hidden",
)
DENOISER_SIZES = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, for one process; bf16 only where it serves. Raises UserError for a precision that doesn't fit."""
    from accelerate import Accelerator

    precision = config.mixed_precision
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    if precision == "bf16" and not bfloat16_serves(device, "--mixed-precision bf16"):
        precision = "no"
    try:
        accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"--mixed-precision {config.mixed_precision} cannot be used here: {error}") from error
    if accelerator.num_processes > 1:
        raise UserError("this trainer runs in one process: start it with python -m pvdm_fast.train")
    return accelerator


def make_stage(name: str, config: TrainConfig, run: RunFolder) -> Stage:
    """The stage with freshly initialised weights; diffusion takes the run's autoencoder."""
    torch.manual_seed(config.seed)
    if name == "autoencoder":
        autoencoder = make_autoencoder(config)
        model: Autoencoder | Denoiser = autoencoder
        stage: Stage = AutoencoderStage(config, autoencoder)
    else:
        autoencoder = load_autoencoder(run.autoencoder)
        model = denoiser = make_denoiser(config, autoencoder, run)
        stage = DiffusionStage(config, autoencoder, denoiser)
    if stage.options.checkpointing:
        model.enable_gradient_checkpointing()
    return stage


@contextmanager
def _as_user_error() -> Iterator[None]:
    """A model's complaint about its sizes is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def make_autoencoder(config: TrainConfig) -> Autoencoder:
    """The preset's autoencoder with the configuration's changes; raises UserError where sizes don't fit."""
    from pvdm_fast.models import Autoencoder

    sizes = {name: getattr(config.video, name) for name in ("frames", "height", "width")}
    sizes |= {name: getattr(config.autoencoder, name) for name in AUTOENCODER_SIZES}
    with _as_user_error():
        return Autoencoder.from_preset(config.preset, **{key: size for key, size in sizes.items() if size is not None})


def make_denoiser(config: TrainConfig, autoencoder: Autoencoder, run: RunFolder | None = None) -> Denoiser:
    """The preset's denoiser for the autoencoder's latents; raises UserError where sizes don't fit or classes lack."""
    from pvdm_fast.models import Denoiser

    sizes = {name: getattr(config.diffusion, name) for name in DENOISER_SIZES}
    layout = autoencoder.layout
    names = class_names(config, run) if config.diffusion.class_conditional else None
    with _as_user_error():
        return Denoiser.from_preset(
            config.preset,
            time=layout.time,
            height=layout.height,
            width=layout.width,
            latent_channels=autoencoder.config["latent_channels"],
            num_classes=None if names is None else len(names),
            class_names=names,
            **{key: size for key, size in sizes.items() if size is not None},
        )


def class_names(config: TrainConfig, run: RunFolder | None) -> list[str]:
    """The classes of the data. A run keeps those it began with, so that their numbers stay when the data moves."""
    kept = None if run is None else run.path / "classes.json"
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    names = find_classes(Path(config.data))
    if kept is not None:
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return names


def load_autoencoder(path: Path) -> Autoencoder:
    """A saved autoencoder; raises UserError where there is none."""
    from pvdm_fast.models import Autoencoder

    if not (path / "config.json").is_file():
        raise UserError(f"there is no autoencoder in {path}: train one first, or name one with --autoencoder-from")
    with _as_user_error():
        return Autoencoder.from_pretrained(path)


def existing_autoencoder(config: TrainConfig, resume: Path | None) -> Autoencoder | None:
    """The autoencoder that --stage diffusion builds on; None where the run trains its own.

    Raises:
        UserError: there is none, or it takes clips of another size than the options say.
    """
    if config.stage != "diffusion":
        if config.autoencoder_from is not None:
            raise UserError("--autoencoder-from goes with --stage diffusion only")
        return None
    if resume is not None:
        return load_autoencoder(resume / "autoencoder")
    if config.autoencoder_from is None:
        raise UserError("--stage diffusion needs a trained autoencoder: name its run with --autoencoder-from")
    place = Path(config.autoencoder_from)
    autoencoder = load_autoencoder(place / "autoencoder" if (place / "autoencoder").is_dir() else place)
    for name, have in zip(("frames", "height", "width"), video_size(autoencoder), strict=True):
        want = getattr(config.video, name)
        if want is not None and want != have:
            raise UserError(f"--{name} is {want}, but the autoencoder in {place} was made for {have}")
    return autoencoder


def empty_autoencoder(config: TrainConfig) -> Autoencoder:
    """The autoencoder without memory for its weights: to check and describe it."""
    with torch.device("meta"):
        return make_autoencoder(config)
