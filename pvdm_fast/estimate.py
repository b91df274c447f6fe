"""``python -m pvdm_fast.estimate``: memory and arithmetic of a training step, and how long training takes here, or on a
named GPU.

For memory and arithmetic the step's own code runs on shapes alone. Nothing is allocated or computed, so a laptop can
estimate what fits no machine. For the time some steps are measured (`pvdm_fast.training.pace`), if they fit. With
--gpu it is computed: FLOPs over a share of the card's peak.

- saved for backward: the distinct tensors that autograd keeps. Weights don't count, but their 16-bit copies do.
- at work: gradients and tensors of the passes, at the moment when most are alive.
- peak: the same plus what stays between steps (weights, optimizer, averaged weights, the frozen autoencoder).
- FLOPs: those of all products of a step, including recomputation. A multiply-add is 2.
- checkpoint: weights, both moments of the optimizer, and for diffusion the averaged weights.

Not counted: scratch memory inside kernels, fragmentation in the allocator, the program itself (about 0.6 GiB with
PyTorch on a CPU, 0.5 to 1 GiB for a CUDA context), the autoencoder's adversarial phase, and what a distillation's
teacher and critic compute (what stands of them is counted).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command
from pvdm_fast.jobs.environment import plain_torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pvdm_fast.training.config import TrainConfig
    from pvdm_fast.training.pace import Pace

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes, and FLOPs of one optimizer step.

    batch: clips per forward pass. averaged: the EMA's weights. frozen: the autoencoder that the diffusion stage encodes
    with. Its share of `flops` is `frozen_flops`. teaching: a distillation's teacher, and its critic with its moments.
    at_work: includes gradients.
    """

    stage: str
    batch: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averaged: int
    frozen: int
    teaching: int
    saved: int
    at_work: int
    flops: int
    frozen_flops: int
    checkpoint: int

    @property
    def standing(self) -> int:
        """Bytes that stay between steps."""
        return self.weights + self.optimizer + self.averaged + self.frozen + self.teaching

    @property
    def peak(self) -> int:
        return self.standing + max(self.at_work, self.gradients)

    def table(self) -> str:
        parts = ("weights", "gradients", "optimizer", "averaged", "frozen", "teaching", "saved", "at_work", "peak")
        names = {
            "averaged": "averaged weights",
            "frozen": "frozen autoencoder",
            "teaching": "teacher and critic",
            "saved": "saved for backward",
            "at_work": "at work, at most",
        }
        rows = [
            (names.get(part, part), f"{getattr(self, part) / GIB:.3f} GiB")
            for part in (*parts, "checkpoint")
            if getattr(self, part)
        ]
        rows.append(("FLOPs a step", f"{self.flops / 1e12:.4g} T"))
        if self.frozen_flops:
            rows.append(("of these, encoding", f"{self.frozen_flops / 1e12:.4g} T"))
        title = f"{self.stage}, {self.parameters / 1e6:.1f} M parameters, batch {self.batch}"
        return "\n".join([title, *(f"  {name:<20} {value:>14}" for name, value in rows)])


def _in_16_bits(config: TrainConfig) -> bool:
    """Whether the step computes in bf16: as asked for, and with "auto" as training would on this machine."""
    import torch

    from pvdm_fast.backends.precision import choose_precision

    if config.mixed_precision == "fp16":
        raise UserError("--mixed-precision must be auto, no or bf16 here: fp16 weighs the same as bf16")
    if config.mixed_precision != "auto":
        return config.mixed_precision == "bf16"
    return choose_precision("auto", _device(config)).dtype == torch.bfloat16


def _device(config: TrainConfig) -> str:
    import torch

    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def estimate(config: TrainConfig, stage: str) -> Estimate:
    """Run a training step of a stage on shapes alone.

    Raises:
        UserError: sizes that do not fit.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pvdm_fast.analysis.flops import FlopCount
    from pvdm_fast.analysis.memory import LiveMemory, saved_bytes
    from pvdm_fast.training.optimizer import state_bytes

    low = _in_16_bits(config)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        model, frozen, encode, step = _step(config, stage)
        parameters = list(model.parameters())
        saved = saved_bytes(lambda: [step()], parameters)
        with LiveMemory() as live, FlopCount() as count:
            gradients = torch.autograd.grad(step(), parameters, allow_unused=True)
        del gradients
        with FlopCount() as encoding:
            encode()
    weights = _bytes(model)
    trained = sum(parameter.nbytes for parameter in parameters)
    moments = state_bytes(config.optimizer, model)
    averaged = trained if stage == "diffusion" else 0
    distils = stage == "diffusion" and config.distillation.steps is not None
    critic = weights + moments if distils and config.distillation.method == "distribution" else 0
    options = getattr(config, stage)
    return Estimate(
        stage=stage,
        batch=options.batch_size,
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=weights,
        gradients=trained,
        optimizer=moments,
        averaged=averaged,
        frozen=_bytes(frozen) if frozen is not None else 0,
        teaching=critic + (weights if distils else 0),
        saved=saved,
        at_work=live.peak,
        flops=count.total * options.accumulate,
        frozen_flops=encoding.total * options.accumulate,
        checkpoint=weights + moments + averaged + critic,
    )


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _step(
    config: TrainConfig, stage: str
) -> tuple[Any, nn.Module | None, Callable[[], Tensor | None], Callable[[], Tensor]]:
    """The trained model, the one that it builds on, what that one computes, and a forward pass with its loss.

    Diffusion: clips have a condition with the configuration's probability. So that share of the batch, rounded up, has
    one. Where the condition is drawn per batch, it is the larger step, in which all have one.
    """
    import torch

    from pvdm_fast.diffusion.noise import diffusion_loss
    from pvdm_fast.models.noise_schedule import NoiseSchedule
    from pvdm_fast.training.building import make_autoencoder, make_denoiser
    from pvdm_fast.training.stages import AutoencoderStage

    autoencoder: Any = make_autoencoder(config)
    options: Any = getattr(config, stage)
    batch, video = options.batch_size, autoencoder.config
    clips = torch.empty(batch, 3, video.frames, video.height, video.width)
    if stage == "autoencoder":
        if options.checkpointing:
            autoencoder.enable_gradient_checkpointing()
        trained = AutoencoderStage(config, autoencoder)
        return autoencoder, None, lambda: None, lambda: trained.loss(autoencoder, clips, torch.Generator())
    denoiser: Any = make_denoiser(config, autoencoder)
    if options.checkpointing:
        denoiser.enable_gradient_checkpointing()
    autoencoder.eval().requires_grad_(False)
    schedule = NoiseSchedule.create()
    share = options.conditional_probability
    if options.condition_per == "batch" and share > 0:
        share = 1.0
    conditions = -(-int(1000 * batch * share) // 1000)
    windows = torch.empty(batch + conditions, *clips.shape[1:])

    @torch.no_grad()
    def encode() -> Tensor:
        latent: Tensor = autoencoder.encode(windows).latent.float()
        return latent

    def step() -> Tensor:
        target = encode()[:batch]
        timestep = torch.zeros(batch, dtype=torch.long)
        prediction = str(denoiser.config.prediction)
        noise, condition = torch.empty_like(target), torch.zeros_like(target)
        with torch.autocast("cpu", enabled=False) if options.float32 else nullcontext():
            return diffusion_loss(denoiser, schedule, target, condition, noise, timestep, prediction)

    return denoiser, autoencoder, encode, step


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs import numbers
    from pvdm_fast.jobs.arguments import Parser
    from pvdm_fast.jobs.cards import CARDS, UTILISATION
    from pvdm_fast.training.config import OPTIONS, PRESETS

    parser = Parser(
        prog="python -m pvdm_fast.estimate",
        description="Predicts the memory, the FLOPs and the checkpoint size of training. Then it measures some steps "
        "and says how long training takes on this machine. With --gpu it computes how long it takes on one such card.",
    )
    parser.add_argument("--preset", default="tiny", metavar="{" + ",".join(PRESETS) + "}", help="sizes (default: tiny)")
    parser.add_argument("--stage", default="all", metavar="{autoencoder,diffusion,all}", help="(default: all)")
    parser.add_argument(
        "--batch-size", type=numbers.BATCH, metavar="N", help="clips a forward pass (default: the preset's)"
    )
    for name in ("frames", "height", "width"):
        metadata = OPTIONS[f"video.{name}"].metadata
        parser.add_argument(f"--{name}", type=metadata["number"], metavar="N", help=metadata["help"])
    parser.add_argument(
        "--mixed-precision",
        metavar="{auto,no,bf16}",
        help="(default: what training with the preset would compute in on this machine)",
    )
    parser.add_argument("--optimizer", metavar="{adamw,adamw8bit,muon}", help="(default: the preset's)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument(
        "--measure",
        type=numbers.SECONDS,
        metavar="SECONDS",
        help="for how long to measure steps of each stage, one at least; 0 measures none (default: 20)",
    )
    parser.add_argument(
        "--gpu",
        metavar="{" + ",".join(CARDS) + "}",
        help=f"compute the time on one such card, in bf16 at {UTILISATION:.0%}% of its peak, and measure nothing",
    )
    parser.add_argument("--json", action="store_true", help="print bytes, FLOPs and seconds as JSON")
    return parser


def configure(options: argparse.Namespace) -> TrainConfig:
    """The training configuration of the command line. Raises UserError for a value that doesn't fit."""
    import torch

    from pvdm_fast.backends.precision import choose_precision
    from pvdm_fast.training.config import STAGES, make_config

    _check_card(options)
    changes: dict[str, Any] = {
        "preset": options.preset,
        "stage": options.stage,
    }
    asked = {name: getattr(options, name) for name in ("mixed_precision", "optimizer")}
    changes |= {name: value for name, value in asked.items() if value is not None}
    changes |= {f"video.{name}": getattr(options, name) for name in ("frames", "height", "width")}
    for stage in STAGES:
        changes[f"{stage}.checkpointing"] = options.checkpointing
        if options.batch_size is not None:
            changes[f"{stage}.batch_size"] = options.batch_size
    config = make_config(changes)
    if options.gpu is not None:
        config.mixed_precision = "bf16"
    elif options.mixed_precision is None:
        chosen = choose_precision(config.mixed_precision, _device(config))
        config.mixed_precision = "no" if chosen.dtype == torch.float32 else "bf16"  # fp16 weighs the same
    return config


def _check_card(options: argparse.Namespace) -> None:
    """Raises UserError for an unknown --gpu, and for options that its computed time would pass over."""
    from pvdm_fast.jobs.cards import CARDS

    if options.gpu is None:
        options.measure = 20.0 if options.measure is None else options.measure
        return
    if options.gpu not in CARDS:
        raise UserError(f"--gpu must be one of {', '.join(CARDS)}, not {options.gpu!r}")
    if options.measure:
        raise UserError("--measure takes steps on this machine, and --gpu computes those of another: leave out one")
    if options.mixed_precision == "no":
        raise UserError("--gpu computes the time of bf16: leave out --mixed-precision no")
    options.measure = 0.0


def computed(found: Estimate, config: TrainConfig, gpu: str) -> tuple[float | None, str]:
    """Seconds of a step on one card, and a line that says what the stage takes; None and why where it can't be."""
    from pvdm_fast.jobs.cards import CARDS, UTILISATION
    from pvdm_fast.training.pace import about

    card, steps = CARDS[gpu], getattr(config, found.stage).steps
    seconds = card.seconds(found.flops)
    if found.stage == "diffusion" and config.diffusion.float32:
        return None, f"{found.stage}: it computes in float32, and only the time of bf16 is computed"
    if found.peak > card.memory:
        have, need = card.memory / GIB, found.peak / GIB
        return None, f"{found.stage}: a step needs {need:.1f} GiB, and one {gpu} has {have:.0f} GiB"
    return seconds, (
        f"{found.stage}: {about(steps * seconds)} for {steps} steps on one {gpu} ({seconds:.3g} s a step, computed: "
        f"{UTILISATION:.0%} of its {card.peak / 1e12:.0f} TFLOP/s in bf16)"
    )


def measured(config: TrainConfig, found: Estimate, seconds: float) -> Pace | str | None:
    """The pace of a stage here; why it isn't measured; or None where that isn't asked for."""
    from pvdm_fast.jobs.devices import claim_device
    from pvdm_fast.training.pace import free_bytes, measure

    if seconds == 0:
        return None
    free = free_bytes(claim_device(config.device))
    if found.peak > free:
        there = f"a step needs {found.peak / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free here"
        return f"{found.stage}: the time is not measured, because {there}"
    print(f"measuring steps of the {found.stage} stage ...", file=sys.stderr, flush=True)
    return measure(config, found.stage, seconds)


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse, estimate, measure, print."""
    from pvdm_fast.jobs.environment import only_the_launcher
    from pvdm_fast.training.config import STAGES

    options = make_parser().parse_args(arguments)
    config = configure(options)
    rows: list[dict[str, Any]] = []
    with plain_torch(), only_the_launcher():
        for number, stage in enumerate(STAGES if config.stage == "all" else (config.stage,)):
            found = estimate(config, stage)
            steps = getattr(config, stage).steps
            if not options.json:
                print(("\n" if number else "") + found.table(), flush=True)
            pace = measured(config, found, options.measure)
            if pace is not None and not options.json:
                print(pace if isinstance(pace, str) else pace.line(stage, steps), flush=True)
            seconds = None if pace is None or isinstance(pace, str) else pace.a_step
            if options.gpu is not None:
                seconds, line = computed(found, config, options.gpu)
                if not options.json:
                    print(line, flush=True)
            rows.append({**asdict(found), "peak": found.peak, "steps": steps, "seconds_a_step": seconds})
    if options.json:
        print(json.dumps(rows, indent=2))
    elif len(rows) > 1 and all(row["seconds_a_step"] for row in rows):
        from pvdm_fast.training.pace import about

        total = sum(row["steps"] * row["seconds_a_step"] for row in rows)
        where = "this machine" if options.gpu is None else f"one {options.gpu}"
        print(f"\nboth stages: {about(total)} on {where}, without scores, previews and checkpoints")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
