"""`python -m benchmarks.scaling`: time and memory of training passes against frames, resolution and batch.

Channels and depth are those of the small models (the patch is 8 pixels, as at full size), so that two cores can run the
largest sizes. The memory of a run is found first by running shapes only. Above the memory bound the run is left out,
and only its memory is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine, plots, rows
from benchmarks.cases import all_cases
from benchmarks.measure import alternate, check_agreement, record_backends
from benchmarks.memory import Weight, weigh
from benchmarks.registry import Case, Setting

PATCH = 8
FRAMES, RESOLUTIONS, BATCHES = (8, 16, 32, 64, 128), (64, 128, 256, 512), (1, 2, 4, 8)
CENTRE = {"frames": 16, "resolution": 128, "batch": 1}
NETWORKS = {"autoencoder": "autoencoder", "denoiser": "denoiser"}


@dataclass(frozen=True)
class Point:
    """One size: `axis` varies, everything else is at the centre."""

    axis: str
    value: int

    def sizes(self) -> dict[str, int]:
        return {**CENTRE, self.axis: self.value}

    def setting(self) -> Setting:
        sizes = self.sizes()
        frames, side = sizes["frames"], sizes["resolution"]
        autoencoder = {"frames": frames, "height": side, "width": side, "patch_size": PATCH}
        denoiser = {"time": frames, "height": side // PATCH, "width": side // PATCH}
        return Setting(
            "small",
            batch=sizes["batch"],
            autoencoder_overrides=tuple(autoencoder.items()),
            denoiser_overrides=tuple(denoiser.items()),
        )


def points() -> Iterator[Point]:
    for axis, values in (("frames", FRAMES), ("resolution", RESOLUTIONS), ("batch", BATCHES)):
        for value in values:
            yield Point(axis, value)


def measure_point(
    case: Case, point: Point, *, bound: int, longest: float, rounds: int, slowness: Mapping[str, float]
) -> dict[str, Any]:
    """One row: seconds of the runners that fit in `bound` bytes and, by `slowness` (seconds per peak byte), in
    `longest`.

    Agreement is checked wherever ours and eager both run.
    """
    setting = point.setting()
    weights = weigh(case, setting, "both", without=["sdpa"])
    seconds: dict[str, float] = {}
    served: dict[str, str] = {}
    names = [
        name
        for name in ("ours", "eager")
        if weights[name].peak <= bound and weights[name].peak * slowness.get(name, 0.0) <= longest
    ]
    if names:
        prepared = case.prepare(setting)
        prepared.runners = {name: runner for name, runner in prepared.runners.items() if name in names}
        with record_backends() as served:
            if len(names) == 2:
                check_agreement(prepared, case.kind)
            else:
                _seed(prepared.runners)
            timings = alternate(prepared.runners, "both", setting.device, rounds=rounds)
        seconds = {name: timings.median(name) for name in names}
    return _row(case, point, weights, seconds, served, bound)


def _seed(runners: Mapping[str, Any]) -> None:
    for runner in runners.values():
        runner.gradients = [torch.ones_like(result) for result in runner.infer()]


def _row(
    case: Case,
    point: Point,
    weights: Mapping[str, Weight],
    seconds: Mapping[str, float],
    served: Mapping[str, str],
    bound: int,
) -> dict[str, Any]:
    return {
        "time": machine.now(),
        "network": case.name,
        "size": "small",
        "axis": point.axis,
        "value": point.value,
        **point.sizes(),
        "seconds": dict(seconds),
        "saved": {name: weight.saved for name, weight in weights.items()},
        "peak": {name: weight.peak for name, weight in weights.items()},
        "bound": bound,
        "backends": dict(served),
        "machine": machine.facts(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--network", choices=list(NETWORKS), help="only this one")
    parser.add_argument("--axis", choices=list(CENTRE), help="only this axis")
    parser.add_argument("--bound", type=float, default=8.0, help="GiB that a run may need")
    parser.add_argument("--longest", type=float, default=120.0, help="seconds that a pass may take, by estimate")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds; 0: weigh memory only")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    target = rows.scaling_path("cpu")
    for name in NETWORKS if options.network is None else [options.network]:
        slowness: dict[str, float] = {}
        found = []
        for point in points():
            if options.axis not in (None, point.axis):
                continue
            row = measure_point(
                all_cases()[name],
                point,
                bound=int(options.bound * 2**30) if options.rounds else 0,
                longest=options.longest,
                rounds=options.rounds,
                slowness=slowness,
            )
            for runner, taken in row["seconds"].items():
                slowness[runner] = max(slowness.get(runner, 0.0), taken / row["peak"][runner])
            rows.append(row, target)
            found.append(row)
            memory = {runner: rows.mebibytes(size) for runner, size in row["saved"].items()}
            print(f"{name} {point.axis} {point.value}: seconds {row['seconds']}, saved {memory}", flush=True)
        print(f"drawn: {plots.scaling(found, plots.IMAGES / f'scaling-{name}.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
