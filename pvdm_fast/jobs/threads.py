"""How many CPU threads a command computes with: what the user said, or what the job's own pace shows to be quickest.

OpenMP's threads wait for each other by spinning. On a machine that nobody else uses this is the quickest way. Beside
another busy process one thread has no core, the others spin away the time that it needs, and two threads can be seven
times slower than one. So a job's units of work (a training step, a denoising step, a batch) are timed, and other
numbers of threads are tried for a few units: at the start, when the pace changes, and now and then.

Spinning less instead (GOMP_SPINCOUNT, OMP_WAIT_POLICY) lost 5 to 27 % of a quiet machine's pace, measured on two cores
with the tiny autoencoder's training steps.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

T = TypeVar("T")
_Plan = Generator[None, float, T]  # gets the seconds of each unit

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which users choose for PyTorch; torchrun sets the first
WARM_UP = 3  # units that aren't looked at: first calls make what later ones keep
UNITS = 5  # that a pace is the median of
LONG = 1.0  # seconds: of units that take longer, two are enough
HOPELESS = 5  # times the present pace: a first unit that takes longer is the last
STARVED = 0.8  # part of the cores' time: threads that spin use all of it, unless other programs have it
GAIN = 0.1  # by which another number must be quicker: less is weather
CHANGE = 1.5  # ratio by which the pace changes when something has happened to the machine
AT_ONCE = 3.0  # seconds that the first look may be expected to cost; a dearer one has to be earned, or starved for
SELDOM, SOON = 20.0, 1.0  # seconds between looks: at a steady pace, and when it has changed
EARNED, IN_NEED = 40, 10  # a look's cost is at most this part of the time since the last; when the pace has changed


class Pace:
    """The number of threads for one kind of work, chosen by how long its units take.

    Its clock is the units' own time, so that nothing but their lengths decides.

    Args:
        most: threads to begin with; there are never more.

    Attributes:
        threads: for the next unit. chosen: what the last look found quickest, None before it.
        known: seconds of a unit by number of threads, as last measured.
    """

    def __init__(self, most: int) -> None:
        self.most = self.threads = most
        self.chosen: int | None = None
        self.known: dict[int, float] = {}
        self.spent, self.units, self.starved = 0.0, 0, False
        self._plan = self._watch()
        next(self._plan)

    def took(self, seconds: float, cpu: float) -> None:
        """A unit was computed with `threads`, in CPU seconds of all of them; that is the number for the next."""
        self.spent, self.units = self.spent + seconds, self.units + 1
        self.starved = cpu < STARVED * self.threads * seconds
        self._plan.send(seconds)

    def _watch(self) -> _Plan[None]:
        """Look for the best number, wait until another look is due, and so on."""
        while self.units < WARM_UP and self.spent < LONG:
            yield
        pace = yield from self._measure()
        cost = 3 * pace  # at worst half of the threads take twice the time: it shows in three units
        if cost > AT_ONCE and not self.starved:
            pace = yield from self._wait(pace, EARNED * cost, IN_NEED * cost)
        while True:
            began, first = self.spent, self.units
            pace = yield from self._look(pace)
            self.chosen, cost = self.threads, max(0.0, self.spent - began - (self.units - first) * pace)
            pace = yield from self._wait(pace, max(SELDOM, EARNED * cost), max(SOON, IN_NEED * cost))

    def _wait(self, settled: float, seldom: float, soon: float) -> _Plan[float]:
        """Until it is time for a look, sooner if the pace is no longer ``settled``; returns the pace that there is."""
        recent: deque[float] = deque(maxlen=UNITS)
        began = self.spent
        while True:
            recent.append((yield))
            if _enough(recent):
                pace = self.known[self.threads] = statistics.median(recent)
                changed = not settled / CHANGE < pace < settled * CHANGE
                if self.spent - began >= (soon if changed else seldom):
                    return pace

    def _look(self, pace: float) -> _Plan[float]:
        """Try fewer threads, or else more, as long as that is quicker; returns the best pace."""
        for direction in (self._fewer, self._more):
            moved = False
            while (other := direction()) != self.threads:
                before, self.threads = self.threads, other
                found = yield  # makes what later units with this number keep
                if found < HOPELESS * pace:
                    found = yield from self._measure(given_up=1.5 * pace)
                if found > pace * (1 - GAIN):
                    self.threads = before
                    break
                pace, moved = found, True
            if moved:
                break
        return pace

    def _measure(self, given_up: float = LONG) -> _Plan[float]:
        """The median of the next units; of two where both take longer than ``given_up``."""
        seen: list[float] = []
        while not _enough(seen, min(given_up, LONG)):
            seen.append((yield))
        found = self.known[self.threads] = statistics.median(seen)
        return found

    def _fewer(self) -> int:
        return (self.threads + 1) // 2

    def _more(self) -> int:
        return min(self.most, 2 * self.threads)


def _enough(seen: Collection[float], long: float = LONG) -> bool:
    """Never one unit alone: a laptop may have slept in it."""
    return len(seen) == UNITS or (len(seen) >= 2 and min(seen) > long)


class Chooser:
    """The paces of a job's kinds of work; says once if fewer threads than there are do it."""

    def __init__(self, most: int, say: Callable[[str], object]) -> None:
        self.most, self.say, self.said = most, say, False
        self.paces: dict[str, Pace] = {}

    @contextmanager
    def unit(self, kind: str) -> Iterator[None]:
        if kind not in self.paces:
            self.paces[kind] = Pace(self.most)
        pace = self.paces[kind]
        with _number(pace.threads):
            start, cpu = time.perf_counter(), time.process_time()
            yield
            pace.took(time.perf_counter() - start, time.process_time() - cpu)
        if not self.said and pace.chosen not in (None, self.most):
            self.said = True
            times = " and ".join(f"{1000 * pace.known[n]:.0f} ms with {n}" for n in (pace.chosen, self.most))
            self.say(
                f"threads: {pace.chosen} of {self.most} are quickest now (a {kind} takes {times}); the choice follows "
                "the pace, --threads N fixes it"
            )


_chooser: Chooser | None = None


def unit(kind: str) -> AbstractContextManager[None]:
    """Put around one unit of a job's work, all of whose units are alike, with a name such as "training step".

    Inside `chosen` it is timed and gets the threads that are best for its kind; elsewhere nothing happens.
    """
    return nullcontext() if _chooser is None else _chooser.unit(kind)


@contextmanager
def chosen(number: int | None, device: str) -> Iterator[None]:
    """While the block runs, PyTorch computes with ``number`` threads; or with what `unit` finds best.

    The choice is PyTorch's own where the environment says how many, for a job of several processes (they wait for each
    other), and where the work is a GPU's. Afterwards the number is as it was.

    Args:
        number: of threads; None: what is best.
        device: "cpu", or what takes a GPU where there is one: "auto", "cuda", "cuda:1".
    """
    global _chooser
    import torch

    if number is not None:
        with _number(number):
            yield
        return
    most = torch.get_num_threads()
    told = any(os.environ.get(name) for name in VARIABLES) or os.environ.get("WORLD_SIZE", "") not in ("", "1")
    if most == 1 or told or (device != "cpu" and torch.cuda.is_available()):
        yield
        return
    before, _chooser = _chooser, Chooser(most, _say)
    try:
        yield
    finally:
        _chooser = before


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)  # above a bar, if there is one


@contextmanager
def _number(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
