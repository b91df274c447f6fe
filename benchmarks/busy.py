"""`python -m benchmarks.busy`: steps a second of the default training job beside other busy processes.

Three runs of `python -m pvdm_fast.train` wait, stopped by SIGSTOP, and are let run in turn, some seconds each: with all
threads (PyTorch's own choice), with one, and with what the job chooses by itself. First nobody else is at work, then
one busy process for every second core, then one for every core. Busy processes compute without end, at the job's own
nice level and in its session: fair competitors. What others on the machine do meanwhile is in the row.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine, rows
from benchmarks.report import write_section
from pvdm_fast.data.crossing import die_with_parent
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command
from pvdm_fast.jobs.threads import VARIABLES

if TYPE_CHECKING:
    from typing_extensions import Self

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "busy.md"
TICK = os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))
SETTINGS = {"all threads": ["--threads", str(CORES)], "one thread": ["--threads", "1"], "ours": []}
ENDLESS = ["--save-every", "1000000000", "--preview-every", "1000000000"]
READY = 3  # steps after which a run has made what later steps keep
PATIENCE = 300.0  # seconds to wait for a run's steps


class Stoppable:
    """A process of ours that is stopped until it is let run."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=environment,
                preexec_fn=partial(die_with_parent, os.getpid()),  # stopped children of a dead parent would run on
            )

    @property
    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


class Job(Stoppable):
    """A training run that goes on until it is killed."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str]) -> None:
        self.run, self.log = folder / name, folder / f"{name}.log"
        command = [sys.executable, "-m", "pvdm_fast.train", "--run", str(self.run), *ENDLESS, *arguments]
        super().__init__(command, self.log)

        self._seconds: list[float] = []
        self._read = 0  # bytes of the records

    def seconds(self) -> list[float]:
        """Of every step so far; only lines that came since the last time are read, and whole ones."""
        metrics = self.run / "metrics.jsonl"
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(self._read)
                lines = file.read().split(b"\n")[:-1]
            self._read += sum(len(line) + 1 for line in lines)
            self._seconds += [json.loads(line)["seconds"] for line in lines]
        return self._seconds

    def wait_for(self, steps: int) -> list[float]:
        """The seconds of every step, as soon as there are so many.

        Raises:
            UserError: training ended before, or took longer than `PATIENCE`.
        """
        deadline = time.monotonic() + PATIENCE
        while len(taken := self.seconds()) < steps:
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self.log.read_text()[-2000:]
                raise UserError(f"training came to {len(taken)} steps and not to {steps}:\n{log}")
            time.sleep(0.1)
        return taken

    def pace(self, settle: float, seconds: float) -> float:
        """Steps a second, after some seconds to settle; the step in which the run was let go doesn't count."""
        with self.running():
            time.sleep(settle)
            before = len(self.seconds()) + 1
            time.sleep(seconds)
            taken = self.wait_for(before + READY)[before:]
        return len(taken) / sum(taken)


def measure(job: Job, hogs: Sequence[Stoppable], options: argparse.Namespace) -> dict[str, float]:
    """Pace of the job, its CPU time a second, and "others": cores that programs used which are neither the job nor the
    busy processes."""
    with ExitStack() as running:
        for hog in hogs:
            running.enter_context(hog.running())
        started, mine, busy = time.monotonic(), job.cpu, machine.busy_time()
        known = sum(hog.cpu for hog in hogs)
        pace = job.pace(options.settle, options.seconds)
        wall = time.monotonic() - started
        mine, known = job.cpu - mine, sum(hog.cpu for hog in hogs) - known
        others = (machine.busy_time() - busy - mine - known) / wall
    return {"pace": pace, "cpu": mine / wall, "others": max(0.0, others)}


def levels(options: argparse.Namespace) -> list[int]:
    return options.busy if options.busy is not None else sorted({0, CORES // 2, CORES})


def run(stage: str, options: argparse.Namespace, folder: Path) -> list[rows.Row]:
    """A row for each number of busy processes and setting; rounds start with another setting each."""
    arguments = ["--stage", stage, *(["--autoencoder-from", options.autoencoder] if stage == "diffusion" else [])]
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    with ExitStack() as ending:
        jobs = {name: ending.enter_context(Job(folder, name, [*arguments, *more])) for name, more in SETTINGS.items()}
        for job in jobs.values():
            job.wait_for(READY)
            job.stop()
        hogs = [
            Stoppable([sys.executable, "-c", "while True: pass"], folder / "hog") for _ in range(max(levels(options)))
        ]
        for hog in hogs:
            ending.enter_context(hog).stop()
        for index in range(options.rounds):
            names = list(jobs)[index % len(jobs) :] + list(jobs)[: index % len(jobs)]
            for count in levels(options):
                for name in names:
                    found.setdefault((count, name), []).append(measure(jobs[name], hogs[:count], options))
    return [row(stage, count, name, taken, options) for (count, name), taken in found.items()]


def row(stage: str, count: int, name: str, taken: list[dict[str, float]], options: argparse.Namespace) -> rows.Row:
    """One line of the table: medians over rounds, and what else the machine did."""

    def median(key: str) -> float:
        return round(statistics.median(found[key] for found in taken), 3)

    return {
        "time": machine.now(),
        "stage": stage,
        "busy": count,
        "setting": name,
        "steps_per_second": median("pace"),
        "spread": [round(edge(found["pace"] for found in taken), 3) for edge in (min, max)],
        "cpu": median("cpu"),
        "others": median("others"),
        "load": round(os.getloadavg()[0], 1),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "realtime": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "seconds": options.seconds,
        "rounds": len(taken),
        "machine": machine.facts(),
    }


def newest(stored: Sequence[rows.Row]) -> list[rows.Row]:
    """The last row of each stage, number of busy processes and setting."""
    found = {(row["stage"], row["busy"], row["setting"]): row for row in stored}
    return sorted(found.values(), key=lambda row: (row["stage"], row["busy"], list(SETTINGS).index(row["setting"])))


def table(stored: Sequence[rows.Row]) -> str:
    """Steps a second, and of those of all threads on the quiet machine the share."""
    quiet = {
        row["stage"]: row["steps_per_second"] for row in stored if (row["busy"], row["setting"]) == (0, "all threads")
    }
    lines = [
        "| stage | busy processes | threads | steps a second | spread | of quiet | CPUs used | others | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored:
        share = f"{100 * row['steps_per_second'] / quiet[row['stage']]:.0f} %" if row["stage"] in quiet else "-"
        cells = [row["stage"], row["busy"], row["setting"], f"{row['steps_per_second']:.1f}"]
        cells += ["{:.1f}-{:.1f}".format(*row["spread"]), share, f"{row['cpu']:.2f}", f"{row['others']:.2f}"]
        cells += [f"{row['load']}{', real-time' if row['realtime'] else ''}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def path() -> Path:
    return rows.RESULTS / f"{machine.name('cpu')}.busy.jsonl"


def page() -> str:
    """The tables of every machine."""
    texts = []
    for file in sorted(rows.RESULTS.glob("*.busy.jsonl")):
        stored = newest(rows.read(file))
        known = stored[-1]["machine"]
        commits = " and ".join(sorted({row["machine"]["commit"] for row in stored}))
        title = f"{known['cpu']} (family/model {known['cpu_family']}), {known['threads']} cores, torch {known['torch']}"
        texts.append(f"{title}, commit {commits}, {stored[-1]['time'][:10]}:\n\n{table(stored)}")
    return "\n\n".join(texts)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy",
        description=str(__doc__).splitlines()[0].partition(": ")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--stage", choices=("autoencoder", "diffusion"), default="autoencoder", help="which steps")
    parser.add_argument("--autoencoder", metavar="RUN", help="for --stage diffusion: a run that has one")
    parser.add_argument(
        "--busy", type=int, nargs="+", metavar="N", help="busy processes (default: 0, half the cores, all)"
    )
    parser.add_argument("--settle", type=float, default=5.0, metavar="S", help="seconds before each measurement")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="seconds of each measurement")
    parser.add_argument("--rounds", type=int, default=2, help="alternating rounds; 0: measure nothing")
    parser.add_argument("--no-store", action="store_true", help="show only")
    parser.add_argument("--write-docs", action="store_true", help=f"write the tables of every machine to {PAGE.name}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a user's error."""

    def action() -> None:
        options = make_parser().parse_args(arguments)
        if options.stage == "diffusion" and options.autoencoder is None and options.rounds:
            raise UserError("--stage diffusion needs --autoencoder RUN: a training run whose autoencoder is finished")
        if options.rounds:
            with tempfile.TemporaryDirectory() as folder:
                found = run(options.stage, options, Path(folder))
            print(table(found))
            if not options.no_store:
                for item in found:
                    rows.append(item, path())
        if options.write_docs:
            write_section(PAGE, "busy", page())

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
