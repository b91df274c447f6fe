"""`python -m benchmarks.soak --minutes 30`: trains both stages on small videos for a fixed time, watched from outside.

It reads memory (RSS), CPU time and step of the training process every few seconds. The warm-up doesn't count: it is the
first fifth of a stage, and lasts until checkpoint and preview have come twice (the first preview takes 25 MiB, once).
After that a straight line is fitted to the memory. From end to end it may rise by at most twice the scatter around it,
or by 1 % of the memory. CPU time per step in the last quarter must be within 10 % of the first quarter's. It is CPU
time because a busy machine changes how long a step takes, but not what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pvdm_fast.data import write_video
from pvdm_fast.data.crossing import die_with_parent
from pvdm_fast.data.shapes import draw_scene
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command

STAGES = ("autoencoder", "diffusion")
WARM_UP = 0.2  # share of a stage's time
PREVIEW_EVERY = 250  # steps; checkpoints too
FLAT, STEADY = 0.01, 0.10
FILMS = 24
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
ENDLESS = "1000000000"
SCHEDULE = ["--autoencoder-schedule", "constant", "--diffusion-schedule", "constant"]


@dataclass(frozen=True)
class Sample:
    """Seconds since the start, bytes of memory, CPU seconds, step."""

    seconds: float
    memory: int
    cpu: float
    step: int


@dataclass(frozen=True)
class Judgement:
    """What a stage's samples show after the warm-up, in MiB, minutes and milliseconds.

    rise: of the fitted line from end to end. scatter: the standard deviation around it.
    """

    minutes: float
    samples: int
    steps: int
    memory: float
    rise: float
    scatter: float
    cpu_a_step_first: float
    cpu_a_step_last: float

    @property
    def flat(self) -> bool:
        return self.rise <= max(2 * self.scatter, FLAT * self.memory)

    @property
    def steady(self) -> bool:
        return abs(self.cpu_a_step_last / self.cpu_a_step_first - 1) <= STEADY

    def line(self, stage: str) -> str:
        flat, steady = "flat" if self.flat else "NOT FLAT", "steady" if self.steady else "NOT STEADY"
        return (
            f"{stage}: {self.minutes:.1f} min, {self.steps} steps, {self.samples} samples; memory {self.memory:.1f} "
            f"MiB, rises by {self.rise:+.2f} MiB (scatter {self.scatter:.2f}): {flat}; CPU time a step "
            f"{self.cpu_a_step_first:.2f} ms in the first quarter, {self.cpu_a_step_last:.2f} ms in the last: {steady}"
        )


def judge(samples: Sequence[Sample], settled: int = 0) -> Judgement:
    """Drop the warm-up, which lasts until after step `settled`. Fit the line and compare the quarters.

    Raises:
        UserError: there are too few samples or steps.
    """
    begin = samples[0].seconds + WARM_UP * (samples[-1].seconds - samples[0].seconds) if samples else 0
    kept = [sample for sample in samples if sample.seconds >= begin and sample.step > settled]
    quarter = len(kept) // 4
    if quarter < 2 or kept[quarter].step == kept[0].step or kept[-1].step == kept[-1 - quarter].step:
        raise UserError("the soak was too short to judge: give it more --minutes or a smaller --every")
    times = np.array([sample.seconds for sample in kept])
    memory = np.array([sample.memory for sample in kept]) / 2**20
    slope, height = np.polyfit(times, memory, 1)

    def cpu_a_step(first: Sample, last: Sample) -> float:
        return 1000 * (last.cpu - first.cpu) / (last.step - first.step)

    return Judgement(
        minutes=float(times[-1] - times[0]) / 60,
        samples=len(kept),
        steps=kept[-1].step - kept[0].step,
        memory=float(memory.mean()),
        rise=float(slope * (times[-1] - times[0])),
        scatter=float((memory - slope * times - height).std()),
        cpu_a_step_first=cpu_a_step(kept[0], kept[quarter]),
        cpu_a_step_last=cpu_a_step(kept[-1 - quarter], kept[-1]),
    )


def take_sample(process: int, metrics: Path, start: float) -> Sample | None:
    """None before the first step is recorded. Steps recorded during this call count for the next sample."""
    step = last_step(metrics)
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / TICK
    return None if step is None else Sample(time.monotonic() - start, pages * PAGE, cpu, step)


def last_step(metrics: Path) -> int | None:
    """The step in the last complete line of a run's records."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        whole = file.read().split(b"\n")[:-1]
    return int(json.loads(whole[-1])["step"]) if whole else None


def soak_stage(stage: str, folder: Path, arguments: Sequence[str], minutes: float, every: float) -> list[Sample]:
    """Train one stage for some minutes in a separate process, then stop it with SIGTERM.

    Raises:
        UserError: training ended by itself, or didn't stop when asked.
    """
    run = folder / stage
    samples: list[Sample] = []
    command = [sys.executable, "-m", "pvdm_fast.train", "--run", str(run), "--stage", stage, *arguments]
    with (folder / f"{stage}.log").open("w") as log:
        dies = partial(die_with_parent, os.getpid())  # it would train on without end
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=dies)
    try:
        start = time.monotonic()
        while time.monotonic() - start < 60 * minutes:
            time.sleep(every)
            if process.poll() is not None:
                raise UserError(f"training ended after {len(samples)} samples, see {folder / f'{stage}.log'}")
            sample = take_sample(process.pid, run / "metrics.jsonl", start)
            samples += [sample] if sample else []
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=600) != 128 + signal.SIGTERM:
            raise UserError(f"training did not stop as asked (code {process.returncode}), see {folder}/{stage}.log")
    finally:
        process.kill()
    return samples


def soak(
    folder: Path, minutes: float, every: float, options: Sequence[str], preview_every: int = PREVIEW_EVERY
) -> dict[str, Judgement]:
    """Half of the time for each stage, on videos written to ``folder``. The samples are stored there as JSON."""
    films = folder / "films"
    films.mkdir(parents=True)
    for number in range(FILMS):
        scene = draw_scene(np.random.default_rng(number), 1.5)
        write_video(films / f"film{number:02d}.mp4", scene.render(32, 32, 32), fps=8)
    recurring = ["--save-every", str(preview_every), "--preview-every", str(preview_every)]
    short = ["--data", str(films), *SCHEDULE, *recurring, *options]
    trained = folder / "first"
    command = [sys.executable, "-m", "pvdm_fast.train", "--run", str(trained), "--stage", "autoencoder", *short]
    if subprocess.run([*command, "--autoencoder-steps", "20"], stdout=subprocess.DEVNULL).returncode:
        raise UserError("the autoencoder that the diffusion stage needs could not be trained")
    judgements = {}
    for stage in STAGES:
        more = ["--autoencoder-from", str(trained)] if stage == "diffusion" else []
        samples = soak_stage(stage, folder, [*short, f"--{stage}-steps", ENDLESS, *more], minutes / 2, every)
        (folder / f"{stage}.json").write_text(json.dumps([asdict(sample) for sample in samples]))
        judgements[stage] = judge(samples, settled=2 * preview_every)
        print(judgements[stage].line(stage), flush=True)
    return judgements


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 (flat and steady), 1 (not), or 2 (a user's error). Options that this command doesn't know go to
    training."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of training, half for each stage")
    parser.add_argument("--every", type=float, default=3, help="seconds between samples")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs and samples (default: a temporary one)")
    options, training = parser.parse_known_args(arguments)
    outcome: dict[str, Judgement] = {}

    def action() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary) / "soak"
            outcome.update(soak(folder, options.minutes, options.every, training))

    code = run_command(action)
    return code or int(not all(judgement.flat and judgement.steady for judgement in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
