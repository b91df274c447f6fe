"""A request made in Python is checked like one from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pvdm_fast.errors import UserError
from pvdm_fast.evaluate import make_parser
from pvdm_fast.evaluation.protocol import DEFAULT_LENGTHS, PUBLISHED_LENGTHS, RANGES, Request


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("end", ["minimum", "maximum"])
def test_numbers_have_ranges(name: str, end: str) -> None:
    number = RANGES[name]
    edge = getattr(number, end)
    beyond = edge - 1 if end == "minimum" else edge + 1

    def wrapped(value: float) -> Any:
        value = number.kind(value)
        return (value,) if name == "frames" else value

    Request(Path("run"), "data", **{name: wrapped(edge)})
    option = f"--{name.replace('_', '-')} must be at (least|most)"
    with pytest.raises(UserError, match=option):
        Request(Path("run"), "data", **{name: wrapped(beyond)})


def test_samples_may_be_left_open() -> None:
    assert Request(Path("run"), "data", samples=None).samples is None


def test_published_protocols_take_longer_samples() -> None:
    """What takes minutes is the default. With a network that is named it is what others publish."""
    network = {"features": Path("i3d"), "features_sha256": "0"}
    assert Request(Path("run"), "data").frames == DEFAULT_LENGTHS == (16, 64)
    assert Request(Path("run"), "data", **network).frames == PUBLISHED_LENGTHS == (16, 128)  # type: ignore[arg-type]
    assert Request(Path("run"), "data", frames=(8,), **network).frames == (8,)  # type: ignore[arg-type]


def test_the_command_line_takes_the_same_numbers() -> None:
    kinds = {action.dest: action.type for action in make_parser()._actions}
    assert {name: kinds[name] for name in RANGES} == RANGES
