"""What was asked for, and the protocol of every number: all that another group must know to compare."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pvdm_fast
from pvdm_fast.analysis.machine import cpu_name, installed_version
from pvdm_fast.backends import choice
from pvdm_fast.data import ClipDataset
from pvdm_fast.data.clips import SYNTHETIC
from pvdm_fast.errors import UserError
from pvdm_fast.evaluation import clip_network, features
from pvdm_fast.evaluation.clips import RESIZING, SPLITS
from pvdm_fast.evaluation.distances import FEWEST, LEVEL, REPLICATES
from pvdm_fast.evaluation.features import Networks
from pvdm_fast.evaluation.passes import MAX_PSNR, SHOWN
from pvdm_fast.evaluation.scene_judge import WEIGHTS
from pvdm_fast.evaluation.scenes import CLEAR, FASTEST, PLACE_ERROR, SLOWEST, SURE
from pvdm_fast.evaluation.subject import Subject
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.checksums import sha256
from pvdm_fast.jobs.devices import DEVICE
from pvdm_fast.jobs.processes import Processes

METRICS = {
    "psnr": f"of each clip, all its frames and colours together, values not rounded to 8 bits, {MAX_PSNR:.0f} dB at "
    "most; averaged over clips",
    "ssim": "of each frame and colour: Gaussian window of 11 pixels, sigma 1.5, inside the frame; K1 0.01, K2 0.03; "
    "values not rounded to 8 bits; averaged over frames, colours and clips",
    "frechet_distance": "|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features in float64; covariances divide by the "
    "number of clips, as in StyleGAN-V and cd-fvd; called FVD only for the I3D network of StyleGAN-V",
    "pvdm_fast_features": "distances in the features of the network that pvdm_fast ships, which compare with no FVD: "
    "Fréchet distance less its bias by the bootstrap, and kernel distance (unbiased, (x·y / D + 1)^3); "
    f"{LEVEL:.0%} basic bootstrap intervals from {REPLICATES} resamples of the clips of both sides; none of fewer than "
    f"{FEWEST} clips",
    "kinds_right": "share of the original's objects, in all frames, that the scene judge gives the same name in the "
    f"reconstruction; only clearly visible ones count, of which it sees {CLEAR:.0%} or more",
    "named": f"share of samples whose one or two objects are each of one known kind, with a confidence of {SURE}, in "
    "all frames of the first clip in which they are clearly visible, and never vanish or appear in plain sight; "
    "second_named: in the first two clips",
    "of_class": "share of clearly visible objects in all frames of the first two clips whose kind is the class that "
    "was asked for, as the scene judge sees it",
    "path": "share of samples whose objects never vanish or appear in plain sight, make no step longer than "
    f"{FASTEST} x stride + {PLACE_ERROR} and no four in a row shorter than {SLOWEST / 2} x stride on average, in short "
    "sides of the frame, in the first clip; second_path: in the first two clips",
    "scene_frechet_distance": "the same distance of the scene judge's features of first clips: mean over frames, and "
    "root mean square of the change from frame to frame",
}
DEFAULT_SAMPLES, DEFAULT_LENGTHS = 128, (16, 64)  # without a named network: a wait of minutes for small models
PUBLISHED_LENGTHS = (16, 128)
PACKAGES = ("torch", "triton", "diffusers", "numpy", "av")
RANGES = {  # of a request's numbers, as it is made in Python
    "clips": numbers.VIDEOS,
    "samples": numbers.CLIPS_OR_NONE,
    "frames": numbers.FRAMES,
    "stride": numbers.STRIDE,
    "fold": numbers.FOLD,
    "seed": numbers.SEED,
    "steps": numbers.SAMPLING_STEPS,
    "eta": numbers.ETA,
    "guidance": numbers.GUIDANCE,
    "batch_size": numbers.BATCH,
    "workers": numbers.WORKERS,
    "threads": numbers.THREADS,
    "save_every": numbers.VIDEOS,
    "shown": numbers.SHOWN,
    "nearest_among": numbers.CLIPS_OR_NONE,
}


@dataclass(frozen=True)
class Request:
    """The options of the command line. Without ``frames`` it takes the default lengths."""

    run: Path
    data: str
    split: str = "test"
    clips: int = 2048
    samples: int | None = None
    frames: tuple[int, ...] = ()
    stride: int = 1
    fold: int = 1
    seed: int = 0
    features: Path | None = None
    features_sha256: str | None = None
    scheduler: str = "auto"
    steps: int | None = None
    eta: float = numbers.DEFAULT_ETA
    guidance: float | None = None
    batch_size: int = 8
    workers: int = 0
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None
    save_every: int = 64
    shown: int = SHOWN
    nearest_among: int = 2048

    def __post_init__(self) -> None:
        if not self.frames:
            object.__setattr__(self, "frames", PUBLISHED_LENGTHS if self.features else DEFAULT_LENGTHS)
        for name, number in RANGES.items():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if name == "frames":
                object.__setattr__(self, name, tuple(number.checked(option, item) for item in value))
            elif value is not None:
                object.__setattr__(self, name, number.checked(option, value))
        for name, known in (("split", SPLITS), ("dtype", ("auto", "fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        numbers.check_eta(self.scheduler, self.eta)
        DEVICE.checked("--device", self.device)
        if len(set(self.frames)) < len(self.frames):
            raise UserError(f"--frames must be different numbers, not {list(self.frames)}")
        if (self.features is None) != (self.features_sha256 is None):
            raise UserError(
                "--features and --features-sha256 go together: a Fréchet distance means something only for a "
                f"network that is known to the bit; for example {features.HOW_TO_GET}"
            )


@dataclass(frozen=True)
class Protocol:
    """The parts of the protocol as plain values. `identity` says what decides the values of a pass."""

    data: dict[str, Any]
    model: dict[str, Any]
    sampling: dict[str, Any]
    features: dict[str, Any] | None
    pvdm_fast_features: dict[str, Any]
    judge: dict[str, Any] | None
    environment: dict[str, Any]

    def identity(self, *parts: str, **more: Any) -> dict[str, Any]:
        """The named parts and the versions. If one of them changes, statistics aren't added to earlier ones."""
        software = {key: self.environment[key] for key in ("versions", "device", "backends")}
        return {**{part: getattr(self, part) for part in parts}, **more, "software": software}

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "metrics": METRICS}


def make_protocol(
    request: Request, subject: Subject, dataset: ClipDataset, networks: Networks, processes: Processes
) -> Protocol:
    """Everything that the results depend on."""
    height, width = subject.size
    data = {
        "source": request.data,
        "description": dataset.description,
        "split": request.split,
        "clips": request.clips,
        "seed": request.seed,
        "stride": request.stride,
        "height": height,
        "width": width,
        "resizing": RESIZING,
        "view": "centre crop, not mirrored",
        "windows": "video by a seeded permutation of the split, again from its start where clips outnumber videos; "
        "window drawn uniformly inside the video; too short videos passed over",
    }
    sampling = {
        "samples": count_samples(request, subject),
        "frames": list(request.frames),
        **{name: getattr(request, name) for name in ("scheduler", "steps", "eta", "guidance", "seed", "batch_size")},
        "noise": "drawn on the CPU, from one generator a sample, seeded by the seed and the sample's number as in "
        "pvdm_fast.sample",
    }
    network_facts, network = None, networks.named
    if network is not None:
        network_facts = {
            "file": network.path.name,
            "sha256": network.sha256,
            "network": "I3D of StyleGAN-V" if network.is_i3d else "not the I3D of StyleGAN-V",
            "input": features.INPUT,
        }
    shipped = {
        "file": clip_network.WEIGHTS.name,
        "sha256": networks.shipped.sha256,
        "input": clip_network.INPUT,
    }
    judge = {"file": WEIGHTS.name, "sha256": sha256(WEIGHTS)} if shows_scenes(request) else None
    return Protocol(data, subject.facts(), sampling, network_facts, shipped, judge, environment(processes))


def count_samples(request: Request, subject: Subject) -> int:
    """How many samples are made. Without a named network fewer, because our distances come with their uncertainty."""
    if subject.denoiser is None:
        return 0
    if request.samples is not None:
        return request.samples
    return request.clips if request.features else min(request.clips, DEFAULT_SAMPLES)


def shows_scenes(request: Request) -> bool:
    """Whether the clips are rendered scenes, so that the scene judge knows what it sees."""
    return request.data == SYNTHETIC


def environment(processes: Processes) -> dict[str, Any]:
    """Machine, versions, and the backend of each operation."""
    kind = processes.device.type
    gpu = torch.cuda.get_device_name(processes.device) if kind == "cuda" else None
    return {
        "versions": {
            "pvdm_fast": pvdm_fast.__version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in PACKAGES},
        },
        "device": gpu or cpu_name(),
        "processes": processes.share.world,
        "threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "system": platform.platform(),
        "backend": choice.requested(),
        "backends": {name: row["auto"] for name, row in choice.report(kind).items()}
        if choice.requested() == "auto"
        else choice.requested(),
    }
