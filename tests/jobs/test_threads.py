"""The number of threads follows the pace: simulated machines with the paces that were measured, then PyTorch's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from pvdm_fast.jobs import threads
from pvdm_fast.jobs.threads import Chooser, Pace, chosen, unit

# Steps a second by number of threads: the tiny autoencoder's training on two cores of a Xeon, nobody else at work, one
# busy process, two of them.
QUIET, ONE, TWO = {2: 18.1, 1: 14.1}, {2: 5.3, 1: 13.6}, {2: 2.4, 1: 8.7}
Machine = Callable[[int, float], float]


def steady(rates: dict[int, float]) -> Machine:
    return lambda number, now: 1 / rates[number]


def rate(pace: Pace, machine: Machine, seconds: float, scatter: float = 0.15, share: float = 0.95) -> float:
    """Units a second over so many seconds of work; the length of a unit scatters as it does on a machine in use."""
    draw = random.Random(0)
    end, before = pace.spent + seconds, pace.units
    start = pace.spent
    while pace.spent < end:
        unit = machine(pace.threads, pace.spent) * draw.lognormvariate(-(scatter**2) / 2, scatter)  # its mean is 1
        pace.took(unit, share * pace.threads * unit)
    return (pace.units - before) / (pace.spent - start)


@pytest.mark.parametrize(
    ("rates", "least"),
    [(QUIET, 0.97 * 18.1), (ONE, 0.9 * 13.6), (ONE, 0.45 * 18.1), (TWO, 0.9 * 8.7), (TWO, 0.45 * 18.1)],
)
@pytest.mark.parametrize("seconds", [60, 600])
def test_the_pace_asked_for(rates: dict[int, float], least: float, seconds: float) -> None:
    """Quiet: 97 % of what all threads reach. Busy: 0.9 of one thread, and 45 % of quiet."""
    assert rate(Pace(2), steady(rates), seconds) >= least


def test_the_choice_follows_the_machine() -> None:
    pace = Pace(2)
    for rates, expected in ((QUIET, 2), (TWO, 1), (QUIET, 2), (ONE, 1), (TWO, 1), (ONE, 1), (QUIET, 2)):
        rate(pace, steady(rates), 90)
        assert pace.chosen == expected


def test_a_machine_that_becomes_busy_costs_seconds() -> None:
    pace = Pace(2)
    rate(pace, steady(QUIET), 100)
    assert rate(pace, steady(TWO), 20) >= 0.8 * 8.7
    assert pace.chosen == 1


def test_many_cores() -> None:
    """Small work on 64 cores: each halving is quicker, down to 8."""
    rates = {64: 3.0, 32: 6.0, 16: 10.0, 8: 14.0, 4: 11.0, 2: 8.0, 1: 5.0}
    pace = Pace(64)
    assert rate(pace, steady(rates), 300) >= 0.9 * 14
    assert pace.chosen == 8
    odd = Pace(3)
    rate(odd, steady({3: 2.0, 2: 4.0, 1: 6.0}), 60)
    assert odd.chosen == 1


def test_long_units_are_not_tried_before_that_is_earned() -> None:
    """Fifty steps of 10 s lose nothing; a training run of them loses at most 3 %."""
    tried: list[int] = []

    def machine(number: int, now: float) -> float:
        tried.append(number)
        return 10.0 * 2 / number

    pace = Pace(2)
    assert rate(pace, machine, 500) == pytest.approx(0.1, rel=0.05)
    assert set(tried) == {2}
    assert rate(pace, machine, 100_000, scatter=0.02) >= 0.97 * 0.1
    assert set(tried) == {1, 2}


def test_a_start_beside_many_others() -> None:
    """Two threads come to half a step a second, which looks like a job of long steps, but for the CPU time it gets."""
    pace = Pace(2)
    rate(pace, steady({2: 0.5, 1: 9.0}), 12, share=0.4)
    assert pace.chosen == 1
    long = Pace(2)
    rate(long, steady({2: 0.5, 1: 9.0}), 12)
    assert long.chosen is None


def test_a_pause_is_not_a_pace() -> None:
    """A laptop that slept, or a stopped job."""
    pace = Pace(2)
    rate(pace, steady(QUIET), 30)
    for _ in range(5):
        pace.took(3600.0, 0.0)
        rate(pace, steady(QUIET), 3)
        assert pace.chosen == 2


def test_a_steady_pace_is_seldom_looked_at() -> None:
    pace = Pace(2)
    numbers = []
    while pace.spent < 600:
        numbers.append(pace.threads)
        pace.took(1 / QUIET[pace.threads], 2 / QUIET[pace.threads])
    tried = sum(number == 1 for number in numbers)
    assert 6 <= tried <= 600 / threads.SELDOM * (1 + threads.UNITS)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine and its environment say."""
    for name in (*threads.VARIABLES, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_number_that_was_asked_for() -> None:
    with chosen(3, "cpu"), unit("step"):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_units_get_their_own_number_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(rates: dict[int, float], kind: str, units: int) -> set[int]:
        used = set()
        for _ in range(units):
            with unit(kind):
                used.add(torch.get_num_threads())
                now[0] += 1 / rates[torch.get_num_threads()]
            assert torch.get_num_threads() == 2
        return used

    with chosen(None, "cpu"):
        assert work(TWO, "training step", 100) == {1, 2}
        assert work(TWO, "training step", 20) == {1}
        assert work(TWO, "denoising step", 3) == {2}  # its pace is another matter
        assert work(TWO, "denoising step", 100) == {1, 2}
        work(QUIET, "training step", 2000)
        assert work(QUIET, "training step", 20) == {2}
        with pytest.raises(KeyError), unit("training step"):
            raise KeyError
    assert work(TWO, "training step", 100) == {2}
    told = capsys.readouterr().err
    assert told.startswith("threads: 1 of 2 are quickest now (a training step takes 115 ms with 1 and 417 ms with 2)")
    assert told.count("\n") == 1 and "--threads" in told


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("reason", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE", "a GPU", "one thread"])
def test_what_is_said_elsewhere_stays(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason.isupper():
        monkeypatch.setenv(reason, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: reason == "a GPU")
    if reason == "one thread":
        torch.set_num_threads(1)
    with chosen(None, "auto"):
        assert threads._chooser is None
    if reason == "a GPU":
        with chosen(None, "cpu"):
            assert isinstance(threads._chooser, Chooser)
    assert threads._chooser is None
