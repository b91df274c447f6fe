"""Every hyper-parameter of a training run with its help text, its range, and whether it may change on resuming."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.devices import DeviceName
from pvdm_fast.jobs.numbers import Number, real, whole

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
    cached_clips: int = option(
        0,
        "videos' clips of 2T frames to encode once, before the stage, which then repeats these until its end; "
        "0: encode new ones in each step",
        number=whole(0, 1_000_000_000),
        resumable=True,
    )
    class_conditional: bool | None = option(
        None, "learn the classes of the clips too: the kinds of rendered scenes, or those that UCF-101's names give"
    )
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
        numbers.DEFAULT_STEPS,
        "denoising steps that sampling takes by itself",
        number=numbers.SAMPLING_STEPS,
        resumable=True,
    )
    sampling_scheduler: str = option(
        "auto",
        "scheduler that sampling takes by itself, a name as for pvdm_fast.sample; auto: ddim, or unipc for a flow",
        metavar="NAME",
        resumable=True,
    )
    sampling_guidance: float | None = option(
        None,
        "weight of the classifier-free guidance that sampling takes by itself",
        number=numbers.GUIDANCE,
        resumable=True,
    )


@dataclass
class DistillationOptions:
    """Distillation of a flow into few steps."""

    steps: int | None = option(
        None,
        "learn to sample in N steps what the flow of --init-from samples in many (python -m pvdm_fast.distill); none: "
        "train the flow itself",
        number=whole(1, 100),
    )
    method: Literal["distribution", "path"] = option(
        "distribution",
        "distribution: the student's samples are to be distributed as the teacher's (Yin et al. 2024); path: its steps "
        "are to end where the teacher's path does (PeRFlow, Yan et al. 2024)",
    )
    solver_steps: int = option(
        8,
        "path: the teacher's steps from noise to latent, two passes each (Heun's method), shared out among the "
        "student's",
        number=whole(1, 1000),
        resumable=True,
    )
    guidance: float | None = option(
        None,
        "weight of the classifier-free guidance that the student learns along; none: the one that its teacher is "
        "sampled with",
        number=numbers.GUIDANCE,
    )
