"""Progress bars in terminals, and occasional lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from pvdm_fast.errors import printable

QUIET_SECONDS = 30.0


class _Bar(tqdm):
    """With the time spent and left in days, where it is days: tqdm counts hours."""

    @property
    def format_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = super().format_dict
        done, elapsed = facts["n"] - facts["initial"], facts["elapsed"]
        rate = facts["rate"] or (done / elapsed if elapsed else 0)
        left = duration((facts["total"] - facts["n"]) / rate) if rate else "?"
        return {**facts, "spent": duration(elapsed), "left": left}


def duration(seconds: float) -> str:
    """Seconds as "05:59" or "3:05:59"; from a day on as "2 d 3 h"."""
    days, rest = divmod(int(seconds), 86_400)
    return f"{days} d {rest // 3600} h" if days else tqdm.format_interval(rest)


class LogLines(_Bar):
    """A bar for output that isn't a terminal: whole lines, one every half minute at most, and one at the end."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        print(self, file=self.fp, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """Lines that were printed stay."""

    def refresh(self, nolock: bool = False, lock_args: tuple[Any, ...] | None = None) -> Any:
        """A line when its time has come, not after each of `say`, which alone passes ``nolock``."""
        return None if nolock else super().refresh(lock_args=lock_args)

    def close(self) -> None:
        ends, self.sp = self.leave and not self.disable, None  # tqdm's own last line has carriage returns
        super().close()
        if ends:
            self.display()


def make_bar(
    label: str, total: int, *, done: int = 0, unit: str = "step", keep: bool = True, shown: bool = True
) -> tqdm[Any]:
    """A bar on stderr. If that isn't a terminal, it is a line every half minute.

    The time left is by the pace of the last ten lines or so.
    """
    terminal = sys.stderr.isatty()
    bar = "|{bar}| " if terminal else ""
    return (_Bar if terminal else LogLines)(
        total=total,
        disable=not shown,
        initial=done,
        desc=label,
        unit=unit,
        leave=keep,
        dynamic_ncols=terminal,
        delay=0 if terminal else QUIET_SECONDS,
        mininterval=0.3 if terminal else QUIET_SECONDS,
        miniters=1,  # else tqdm waits for as many steps as came in that time before: a job that slows down goes silent
        smoothing=0.1 if terminal else 0.3,  # of the pace between two lines
        bar_format="{desc} {percentage:3.0f}% " + bar + "{n_fmt}/{total_fmt} [{spent}, {left} left{postfix}]",
    )


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line above the bars, by default on stdout."""
    with tqdm.external_write_mode(file=file or sys.stdout):
        print(printable(line), file=file or sys.stdout, flush=True)


class StepBar:
    """The bar of a training stage: smoothed loss, clips a second, time left."""

    def __init__(self, label: str, steps: int, done: int, *, shown: bool = True) -> None:
        self.shown = shown
        self.bar = make_bar(label, steps, done=done, shown=shown)
        self.loss: float | None = None
        self.seconds: float | None = None  # a clip

    def advance(self, record: dict[str, Any], clips: int) -> None:
        """One more step of so many clips, from its record in metrics.jsonl.

        Seconds are smoothed, not clips a second: where steps come by fits and starts, as on a busy machine, the mean
        of their speeds is far above the speed of them all.
        """
        if not self.shown:
            return
        loss = record["loss"]
        if loss is None:
            names = ", ".join(record["clips"])
            say(f"step {record['step']} left out: {record['skipped']}; clips: {names}", sys.stderr)
        else:
            self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        seconds = record["seconds"] / clips
        self.seconds = seconds if self.seconds is None else 0.95 * self.seconds + 0.05 * seconds
        loss_text = "none yet" if self.loss is None else f"{self.loss:.4f}"
        self.bar.set_postfix_str(f"loss {loss_text}, {1 / max(self.seconds, 1e-9):.1f} clips/s", refresh=False)
        self.bar.update(1)

    def __enter__(self) -> StepBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
