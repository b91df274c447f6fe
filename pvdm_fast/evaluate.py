"""``python -m pvdm_fast.evaluate RUN``: how well a trained run reconstructs and generates, and by which protocol."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pvdm_fast.jobs.allocator import keep_freed_memory
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    from pvdm_fast.evaluation.protocol import Request


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs import devices, numbers
    from pvdm_fast.jobs.arguments import THREADS_HELP, Parser

    parser = Parser(
        prog="python -m pvdm_fast.evaluate",
        description="Measures PSNR and SSIM of reconstructions and, with a feature network, the Fréchet video distance "
        "of reconstructions and samples. Of rendered scenes it also says whether objects keep their names and paths. "
        "Writes evaluation.json and report.html. The same command continues an evaluation that was interrupted. "
        "Several processes share the work: torchrun --nproc-per-node 8 -m pvdm_fast.evaluate ...",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("run", type=Path, help="the folder that training left, with autoencoder/ and denoiser/")
    add("--data", metavar="DIR", help="as for training (default: what the run was trained on)")
    add("--split", metavar="{test,train,all}", help="which clips (default: test, the held-out ones)")
    add("--clips", type=numbers.VIDEOS, metavar="N", help="number of real clips (default: 2048)")
    add(
        "--samples",
        type=numbers.whole(0, 10_000_000),
        metavar="N",
        help="number of samples, 0 for none (default: as many as clips with --features; without, at most 256 of "
        "rendered scenes and 8 of other videos)",
    )
    add(
        "--frames",
        type=numbers.FRAMES,
        nargs="+",
        metavar="N",
        help="lengths at which samples are compared (default: 16 128)",
    )
    add("--stride", type=numbers.STRIDE, metavar="N", help="step between a real clip's frames (default: the run's)")
    add("--seed", type=numbers.SEED, metavar="N", help="seed of clips and samples (default: 0)")
    add("--features", type=Path, metavar="FILE", help="feature network: i3d_torchscript.pt of StyleGAN-V")
    add("--features-sha256", metavar="HASH", help="the hash that this file must have")
    add("--scheduler", metavar="NAME", help="sampler, as for pvdm_fast.sample (default: ddim)")
    add("--steps", type=numbers.SAMPLING_STEPS, metavar="N", help=f"denoising steps (default: {numbers.DEFAULT_STEPS})")
    add("--eta", type=numbers.ETA, metavar="X", help="ddim: share of new noise (default: 1)")
    add(
        "--guidance",
        type=numbers.GUIDANCE,
        metavar="W",
        help="how strongly a clip follows the one before (default: 0)",
    )
    add("--batch-size", type=numbers.BATCH, metavar="N", help="clips per batch, part of the protocol (default: 8)")
    add("--workers", type=numbers.WORKERS, metavar="N", help="processes that read clips (default: 0)")
    add("--threads", type=numbers.THREADS, metavar="N", help=THREADS_HELP)
    add("--device", type=devices.DEVICE, metavar=devices.METAVAR, help=devices.HELP)
    add(
        "--dtype",
        metavar="{auto,fp32,bf16}",
        help="of weights and activations (default: auto, bf16 on a GPU that multiplies it, else fp32)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: RUN/evaluation)")
    add("--save-every", type=numbers.VIDEOS, metavar="N", help="clips per process between saves (default: 64)")
    return parser


def parse(arguments: Sequence[str] | None = None) -> Request:
    """Read the command line. Data and stride default to the run's.

    Raises:
        UserError: an unknown option, a value out of range, or a run that doesn't say what it was trained on.
    """
    given = vars(make_parser().parse_args(arguments))
    from pvdm_fast.errors import UserError
    from pvdm_fast.evaluation.protocol import Request
    from pvdm_fast.training.run_folder import RunFolder

    run = RunFolder(given["run"])
    if run.config.is_file():
        config = run.read_config()
        given = {"data": config.data, "stride": config.video.stride, **given}
    if "data" not in given:
        raise UserError(f"name the clips with --data: {run.path} has no config.yaml that says what it was trained on")
    if "frames" in given:
        given["frames"] = tuple(given["frames"])
    return Request(**given)


def run_evaluation(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the scores."""
    request = parse(arguments)
    from pvdm_fast.errors import printable
    from pvdm_fast.evaluation.report import score_rows
    from pvdm_fast.evaluation.session import evaluate

    results, folder = evaluate(request)
    if results is None:  # another process writes and prints
        return
    rows = score_rows(results)
    width = max(len(name) for name, _, _ in rows)
    print("\n".join(f"{name:<{width}}  {value:>18}  {of}" for name, value, of in rows))
    for line in (*results["missing"], *results["caveats"]):
        print(printable(f"- {line}"))
    print(printable(f"written: {folder / 'evaluation.json'} and {folder / 'report.html'}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 (a user's error), 130 or 143 (stopped)."""
    keep_freed_memory()
    return run_command(lambda: run_evaluation(arguments), "take a smaller --batch-size, or --dtype bf16")


if __name__ == "__main__":
    sys.exit(main())
