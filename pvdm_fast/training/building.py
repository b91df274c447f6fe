"""From a configuration to the objects that are trained, with one clear sentence if something doesn't fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvdm_fast.backends.precision import announce, choose_precision
from pvdm_fast.data import find_classes
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.devices import claim_device
from pvdm_fast.jobs.files import whole_file
from pvdm_fast.jobs.processes import TIMEOUT, Processes
from pvdm_fast.jobs.reading import read_json
from pvdm_fast.training.adversarial import SecondPhaseStage, wants_second_phase
from pvdm_fast.training.config import OPTIONS, STAGES, TrainConfig, get, make_config
from pvdm_fast.training.distilling import SAMPLERS, DistillationStage
from pvdm_fast.training.initialisation import HEADS, find_autoencoder, find_denoiser, initialise, read_source
from pvdm_fast.training.matching import MatchingStage
from pvdm_fast.training.options import flag
from pvdm_fast.training.presets import (
    AUTOENCODER_SIZES,
    DENOISER_SIZES,
    FLOW_OPTIONS,
    SAMPLING_OPTIONS,
    VIDEO_SIZES,
    autoencoder_sizes,
)
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.sharding import shard
from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.data import ClipDataset
    from pvdm_fast.models import Autoencoder, Denoiser


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, with as many processes as were started; 16 bits only where they serve.

    Raises:
        UserError: the precision, the batch size or the launcher's own settings don't fit.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    device = claim_device(config.device).type
    chosen = choose_precision(config.mixed_precision, device)
    if chosen.refused:  # else the plan says it
        announce(config.mixed_precision, chosen, "--mixed-precision")
    precision = "no" if chosen.dtype == torch.float32 else chosen.name
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=precision,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"accelerate cannot start here with --mixed-precision {precision}: {reason}") from error
    check_processes(config, accelerator)
    return accelerator


def forget_job(accelerator: Accelerator) -> None:
    """Let the next job of this Python process choose its own precision and device, which accelerate keeps otherwise."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def check_processes(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises UserError, in the main process, for what several processes cannot do."""
    processes, kind, problem = accelerator.num_processes, accelerator.distributed_type.value, None
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        problem = f"accelerate's {kind} is not supported: start with --multi_gpu or torchrun, and shard with --fsdp"
    for stage in STAGES if config.stage == "all" else (config.stage,):
        size = getattr(config, stage).batch_size
        if size % processes:
            problem = (
                f"--{stage}-batch-size {size} cannot be shared evenly among {processes} processes: it is the batch of "
                f"all together, so choose a multiple of {processes}, or another number of processes"
            )
    if config.fsdp and config.optimizer == "muon":
        problem = "--fsdp goes with --optimizer adamw or adamw8bit: muon's steps need whole matrices"
    if config.fsdp and config.mixed_precision == "fp16":
        problem = "--fsdp goes with --mixed-precision bf16 or no: the loss scaling of fp16 needs whole gradients"
    if problem is not None:
        Processes(accelerator).fail(UserError(problem))


def make_stage(
    name: str, config: TrainConfig, run: RunFolder, accelerator: Accelerator, *, begins: bool = True
) -> Stage:
    """The stage with freshly initialised weights, sharded with --fsdp; diffusion takes the run's autoencoder.

    Where it ``begins`` and is not about to be restored, its weights are those of --init-from.
    """
    torch.manual_seed(config.seed)
    teacher: Denoiser | None = None
    if name == "autoencoder":
        autoencoder = make_autoencoder(config)
        model: Autoencoder | Denoiser = autoencoder
    else:
        autoencoder = find_autoencoder(run.autoencoder)
        teacher = find_denoiser(run.teacher) if config.distillation.steps else None
        names = None
        if teacher is not None:
            names = teacher.config["class_names"]
        elif config.diffusion.class_conditional:
            names = class_names(config, run, accelerator.is_main_process)
        model = denoiser = make_denoiser(config, autoencoder, names)
    if begins and config.init_from is not None:
        heads = {key: get(config, key) for key in HEADS.values()}
        trained = teacher or read_source(Path(config.init_from), heads, name).of_stage(name)
        if trained is not None:
            initialise(model, trained)
    if getattr(config, name).checkpointing:
        model.enable_gradient_checkpointing()
    if config.fsdp and accelerator.num_processes > 1:
        shard(model, accelerator.device, accelerator.num_processes)
    if teacher is not None:
        kind = MatchingStage if config.distillation.method == "distribution" else DistillationStage
        return kind(config, autoencoder, denoiser, teacher)
    if name == "diffusion":
        return DiffusionStage(config, autoencoder, denoiser)
    return (SecondPhaseStage if wants_second_phase(config) else AutoencoderStage)(config, autoencoder)


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Turns a model's complaint about its sizes into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def _arguments(config: TrainConfig, keys: Sequence[str]) -> dict[str, Any]:
    """A network's arguments from the options that name its sizes; lists are what JSON makes of them."""
    values = {key.partition(".")[2]: get(config, key) for key in keys}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def asks_for_other_sizes(config: TrainConfig, keys: Sequence[str]) -> bool:
    """Whether one of these options isn't as the preset has it."""
    preset = make_config({"preset": config.preset})
    return any(get(config, key) != get(preset, key) for key in keys)


def make_autoencoder(config: TrainConfig) -> Autoencoder:
    """The configuration's autoencoder; raises UserError where sizes don't fit."""
    from pvdm_fast.models import Autoencoder

    with _as_user_error():
        return Autoencoder(**_arguments(config, (*VIDEO_SIZES, *AUTOENCODER_SIZES)))


def make_denoiser(config: TrainConfig, autoencoder: Autoencoder, names: Sequence[str] | None = None) -> Denoiser:
    """The configuration's denoiser for the autoencoder's latents, with classes where their names are given; raises
    UserError where sizes don't fit."""
    from pvdm_fast.models import Denoiser

    _check_attention(config)
    _check_objective(config)
    layout = autoencoder.layout
    with _as_user_error():
        return Denoiser(
            time=layout.time,
            height=layout.height,
            width=layout.width,
            latent_channels=autoencoder.config["latent_channels"],
            num_classes=None if names is None else len(names),
            class_names=names,
            time_shift=config.diffusion.time_shift,
            distilled_steps=config.distillation.steps,
            **_sampling(config),
            **_arguments(config, DENOISER_SIZES),
        )


def _sampling(config: TrainConfig) -> dict[str, Any]:
    """How the denoiser is to be sampled, as its arguments. A student has its method's way."""
    if config.distillation.steps is not None:
        return {"sampling_scheduler": SAMPLERS[config.distillation.method]}
    return {key.rpartition(".")[2]: get(config, key) for key in SAMPLING_OPTIONS}


def _check_attention(config: TrainConfig) -> None:
    """Raises UserError where --diffusion-attention-resolutions names a downsampling factor that no level has."""
    asked = config.diffusion.attention_resolutions
    factors = [2**level for level in range(len(config.diffusion.channel_mult or ()))]
    own = asks_for_other_sizes(config, ["diffusion.attention_resolutions"])
    if asked is not None and own and not set(asked) <= set(factors):
        raise UserError(
            f"--diffusion-attention-resolutions {' '.join(map(str, asked))} must be among the levels' downsampling "
            f"factors, which are {' '.join(map(str, factors))}: one for each number of --diffusion-channel-mult"
        )


def _check_objective(config: TrainConfig) -> None:
    """Raises UserError for options that don't go together, such as what this prediction would pass over."""
    from pvdm_fast.diffusion.schedulers import scheduler_name

    options, usual = config.diffusion, TrainConfig()
    scheduler_name(options.sampling_scheduler, str(options.prediction), "--diffusion-sampling-scheduler")
    if options.prediction == "flow" and options.loss_weight != "none":
        raise UserError(
            f"--diffusion-loss-weight {options.loss_weight} weighs the noise levels of the predictions noise and v, "
            "but flow has none: leave it out, and choose the times with --diffusion-time-mean and --diffusion-time-std"
        )
    for key in FLOW_OPTIONS:
        if options.prediction != "flow" and get(config, key) != get(usual, key):
            raise UserError(
                f"{flag(OPTIONS[key])} goes with --diffusion-prediction flow, not {options.prediction}: "
                "leave it out, or train a flow"
            )


def class_names(config: TrainConfig, run: RunFolder, writes: bool) -> list[str]:
    """The classes of the data. A run keeps its first classes, so that numbers stay the same when the data moves."""
    kept = run.path / "classes.json"
    if kept.exists():
        try:
            found = read_json(kept)
        except (OSError, ValueError) as error:
            raise UserError(f"{kept} cannot be read ({error}): mend it, its order numbers the classes") from error
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise UserError(f"{kept} must hold the names of the classes, in the order of their numbers")
        return found
    names = find_classes(Path(config.data))
    if writes:
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return names


def existing_autoencoder(config: TrainConfig, resume: Path | None) -> Autoencoder | None:
    """The autoencoder that --stage diffusion builds on. None if the run trains its own.

    Raises:
        UserError: there is none, or it has other sizes than the options say.
    """
    if config.stage != "diffusion":
        if config.autoencoder_from is not None:
            raise UserError("--autoencoder-from goes with --stage diffusion only")
        return None
    if resume is None and config.autoencoder_from is None:
        raise UserError("--stage diffusion needs a trained autoencoder: name its run with --autoencoder-from")
    autoencoder = find_autoencoder(Path(resume or str(config.autoencoder_from)))
    for key, have in autoencoder_sizes(autoencoder.config).items():
        if get(config, key) != have:
            raise UserError(f"{key} is {get(config, key)} in config.yaml, but the run's autoencoder has {have}")
    return autoencoder


def check_latents(data: ClipDataset, stages: tuple[str, ...], autoencoder: Autoencoder) -> None:
    """Raises UserError for cached latents that another autoencoder made, or that another stage would need."""
    from pvdm_fast.data.latents import LatentClips, fingerprint

    if not isinstance(data, LatentClips):
        return
    if stages != ("diffusion",):
        raise UserError(f"{data.root} holds cached latents, which serve --stage diffusion only")
    made_by, used = data.settings.autoencoder, fingerprint(autoencoder)
    if made_by != used:
        raise UserError(
            f"the latents in {data.root} were made by another autoencoder ({made_by[:12]}) than the one to be used "
            f"({used[:12]}): encode the clips with this one, or name that one with --autoencoder-from"
        )


def empty_autoencoder(config: TrainConfig) -> Autoencoder:
    """The autoencoder without memory for its weights: to check and describe it."""
    with torch.device("meta"):
        return make_autoencoder(config)


def empty_denoiser(config: TrainConfig, autoencoder: Autoencoder) -> Denoiser:
    """The denoiser in the same way, with the data's classes if it learns them."""
    names = find_classes(Path(config.data)) if config.diffusion.class_conditional else None
    with torch.device("meta"):
        return make_denoiser(config, autoencoder, names)
