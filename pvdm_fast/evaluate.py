"""``python -m pvdm_fast.evaluate RUN [RUN ...]``: how well trained runs reconstruct and generate, by which protocol."""

from __future__ import annotations

import argparse
import os
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
        description="Measures PSNR and SSIM of reconstructions, and Fréchet and kernel distances of reconstructions "
        "and samples in features of our own, with intervals; with a network that you name also FVD. Of rendered scenes "
        "it also says whether objects keep their names and paths. Writes evaluation.json and report.html. The same "
        "command continues an evaluation that was interrupted. Several processes share the work: "
        "torchrun --nproc-per-node 8 -m pvdm_fast.evaluate ...",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    text = "the folder that training left, with autoencoder/ and denoiser/; several are compared on one page"
    add("run", type=Path, nargs="+", help=text)
    add("--data", metavar="DIR", help="as for training (default: what the run was trained on)")
    add("--split", metavar="{test,train,all}", help="which clips (default: test, the held-out ones)")
    add("--clips", type=numbers.VIDEOS, metavar="N", help="number of real clips (default: 2048)")
    add(
        "--samples",
        type=numbers.CLIPS_OR_NONE,
        metavar="N",
        help="number of samples, 0 for none (default: as many as clips with --features, otherwise at most 128)",
    )
    add(
        "--frames",
        type=numbers.FRAMES,
        nargs="+",
        metavar="N",
        help="lengths at which samples are compared (default: 16 128 with --features, otherwise 16 64)",
    )
    add("--stride", type=numbers.STRIDE, metavar="N", help="step between a real clip's frames (default: the run's)")
    add("--fold", type=numbers.FOLD, metavar="N", help="which of UCF-101's three pairs of lists (default: the run's)")
    add("--seed", type=numbers.SEED, metavar="N", help="seed of clips and samples (default: 0)")
    add("--features", type=Path, metavar="FILE", help="feature network: i3d_torchscript.pt of StyleGAN-V")
    add("--features-sha256", metavar="HASH", help="the hash that this file must have")
    add("--scheduler", metavar="NAME", help="sampler, as for pvdm_fast.sample (default: auto)")
    add(
        "--steps",
        type=numbers.SAMPLING_STEPS,
        metavar="N",
        help=f"denoising steps (default: the run's, else {numbers.DEFAULT_STEPS}, or as many as it was distilled for)",
    )
    add("--eta", type=numbers.ETA, metavar="X", help="ddim: share of new noise (default: 1)")
    add(
        "--guidance",
        type=numbers.GUIDANCE,
        metavar="W",
        help="how strongly a clip follows the one before, and its class (default: the run's, else 0)",
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
    add("--shown", type=numbers.SHOWN, metavar="N", help="clips and samples that the page shows (default: 8)")
    add(
        "--nearest-among",
        type=numbers.CLIPS_OR_NONE,
        metavar="N",
        help="training clips among which the nearest to each shown sample is looked for, 0: none (default: 2048)",
    )
    add("--save-every", type=numbers.VIDEOS, metavar="N", help="clips per process between saves (default: 64)")
    return parser


def parse(arguments: Sequence[str] | None = None) -> list[Request]:
    """Read the command line: a request for each run. Data, stride and fold default to the run's.

    Raises:
        UserError: an unknown option, a value out of range, a run that doesn't say what it was trained on, or runs whose
            scores couldn't be compared.
    """
    given = vars(make_parser().parse_args(arguments))
    from pvdm_fast.errors import UserError
    from pvdm_fast.evaluation.comparing import names
    from pvdm_fast.evaluation.protocol import Request
    from pvdm_fast.jobs.files import expect_folder
    from pvdm_fast.training.run_folder import RunFolder

    if "frames" in given:
        given["frames"] = tuple(given["frames"])
    runs = given.pop("run")
    labels, requests = names(runs), []
    for label, path in zip(labels, runs, strict=True):
        expect_folder(path)
        run, options = RunFolder(path), dict(given)
        if run.config.is_file():
            config = run.read_config()
            options = {"data": config.data, "stride": config.video.stride, "fold": config.video.fold, **given}
        if "data" not in options:
            raise UserError(
                f"name the clips with --data: {run.path} has no config.yaml that says what it was trained on"
            )
        if len(runs) > 1 and "out" in given:
            options["out"] = given["out"] / label
        requests.append(Request(run=path, **options))
    for option in ("data", "stride", "fold"):
        found = {getattr(request, option) for request in requests}
        if len(found) > 1:
            raise UserError(
                f"runs are compared on the same clips, and theirs are not: name them with --{option}, "
                f"not {' and '.join(map(str, sorted(found)))}"
            )
    return requests


def run_evaluation(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the scores."""
    requests = parse(arguments)
    from pvdm_fast.errors import printable
    from pvdm_fast.evaluation.comparing import write_comparison
    from pvdm_fast.evaluation.report import score_rows
    from pvdm_fast.evaluation.session import evaluate

    found, folders = [], []
    for request in requests:
        results, folder = evaluate(request)
        folders.append(folder)
        if results is not None:
            found.append(results)
    if not found:  # another process writes and prints
        return
    rows: Sequence[tuple[str, ...]] = score_rows(found[0])
    pages = [folder / "report.html" for folder in folders]
    if len(requests) > 1:
        place = Path(os.path.commonpath(folders)) if requests[0].out is not None else folders[0]
        pages.append(place / "comparison.html")
        rows = write_comparison(pages[-1], [request.run for request in requests], folders)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        middle = (f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        print("  ".join([f"{row[0]:<{widths[0]}}", *middle, row[-1]]))
    for request, results in zip(requests, found, strict=True):
        where = f"{request.run}: " if len(requests) > 1 else ""
        for line in (*results["missing"], *results["caveats"]):
            print(printable(f"- {where}{line}"))
    written = [str(folder / "evaluation.json") for folder in folders] + list(map(str, pages))
    print(printable(f"written: {', '.join(written[:-1])} and {written[-1]}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 (a user's error), 130 or 143 (stopped)."""
    keep_freed_memory()
    return run_command(lambda: run_evaluation(arguments), "take a smaller --batch-size, or --dtype bf16")


if __name__ == "__main__":
    sys.exit(main())
