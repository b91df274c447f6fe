"""The walk through all parts: each in a process of its own and under its own clock, the page written after each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.first_contact.child import LEFT_OUT
from benchmarks.first_contact.context import ROOT, Context, read_json
from benchmarks.first_contact.parts import GRACE, PARTS, Part

LAST_LINES = 12  # of a part that failed, for the page
FOR_THE_PAGE = 2.0  # seconds at the end
DONE, LEFT, FAILED, CUT = "done", "left out", "FAILED", "FAILED: out of time"


@dataclass(frozen=True)
class Outcome:
    """How a part ended; lines: the last of its output where it failed, else why it was left out."""

    part: str
    title: str
    status: str
    seconds: float
    lines: list[str]

    @property
    def failed(self) -> bool:
        return self.status not in (DONE, LEFT)


@dataclass(frozen=True)
class Walk:
    """What is walked through: where, on which device, for how long."""

    out: Path
    device: str
    dry: bool
    seconds: float
    parts: Sequence[Part] = PARTS

    def run(self, after_each: Callable[[list[Outcome]], None]) -> list[Outcome]:
        """Every part in turn; `after_each` gets what has ended so far."""
        end, outcomes = time.monotonic() + self.seconds - FOR_THE_PAGE, []
        for index, part in enumerate(self.parts):
            share = (end - time.monotonic()) * part.weight / sum(other.weight for other in self.parts[index:])
            print(f"{part.title}: at most {max(share, 1):.0f} s", flush=True)
            outcomes.append(self.run_part(part, max(share, 1.0)))
            print(f"  {outcomes[-1].status} in {outcomes[-1].seconds:.1f} s", flush=True)
            after_each(outcomes)
        return outcomes

    def run_part(self, part: Part, seconds: float) -> Outcome:
        """One part; killed, with all that it started, if it goes on for longer than its grace."""
        (self.out / f"{part.name}.json").unlink(missing_ok=True)
        log = self.out / f"{part.name}.log"
        command = Context(part.name, self.device, self.dry, self.out, seconds).command(part.name, seconds)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(seconds + GRACE)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        taken = time.monotonic() - started
        return self._outcome(part, code, taken, log.read_text(encoding="utf-8", errors="replace").splitlines())

    def _outcome(self, part: Part, code: int | None, seconds: float, lines: list[str]) -> Outcome:
        found = read_json(self.out / f"{part.name}.json")
        if code == 0:
            return Outcome(part.name, part.title, DONE, seconds, [])
        if code == LEFT_OUT and "left_out" in found:
            return Outcome(part.name, part.title, LEFT, seconds, [found["left_out"]])
        if code is None or code == -signal.SIGALRM:
            return Outcome(part.name, part.title, CUT, seconds, lines[-LAST_LINES:])
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(part.name, part.title, FAILED, seconds, [*lines[-LAST_LINES:], f"({how})"])


def _environment() -> dict[str, str]:
    """Kernels are compiled, not interpreted; output comes as it is printed."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a part and whatever it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def as_rows(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    return [asdict(outcome) for outcome in outcomes]
