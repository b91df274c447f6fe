"""Every number of every command: its range, and one sentence for anything else, before any work."""

from __future__ import annotations

import datetime
import importlib
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.devices import DEVICE
from pvdm_fast.jobs.numbers import Number, real, whole
from pvdm_fast.training.config import OPTIONS, make_config, read_changes
from pvdm_fast.training.options import flag

COMMANDS = ("sample", "distill", "evaluate", "encode", "estimate", "convert", "info", "selftest", "tune")
WORDS = ("nan", "inf", "-inf", "1e999", "9" * 400, "x", "", "0x10", "None")


def numeric(command: str) -> Iterator[tuple[str, Number]]:
    parser = importlib.import_module(f"pvdm_fast.{command}").make_parser()
    for action in parser._actions:
        checked = action.type in (None, Path, DEVICE) or isinstance(action.type, Number)
        assert checked, f"{command} {action.dest} has no range"
        if isinstance(action.type, Number):
            yield action.option_strings[0], action.type


def numbers_of_training() -> list[tuple[str, Number]]:
    found = []
    for option in OPTIONS.values():
        kind = option.metadata["number"]
        assert isinstance(kind, Number) == (option.kind in (int, float, tuple[int, ...])), option.key
        if isinstance(kind, Number):
            found.append((flag(option), kind))
    return found


ALL = [(command, *found) for command in COMMANDS for found in numeric(command)] + [
    ("train", *found) for found in numbers_of_training()
]


def wrong(kind: Number) -> list[str]:
    """Words that aren't such a number."""
    step = 1 if kind.kind is int else 1e-3
    below, above = kind.minimum - step, kind.maximum * 2 + 1
    fraction = [f"{kind.minimum + 0.5}"] if kind.kind is int else []
    return [*WORDS, f"{below}", "-1e30" if kind.kind is float else f"-{10**30}", f"{above}", *fraction]


def read(command: str, word: str) -> Any:
    """Parse one option of a command line by itself. Required options are asked for later."""
    if command == "train":
        name, _, value = word.partition("=")
        (option,) = (option for option in OPTIONS.values() if flag(option) == name)
        try:
            return option.convert([value] if option.kind == tuple[int, ...] else value)
        except UserError as error:
            raise UserError(str(error).replace(option.key, name, 1)) from None
    return parsers(command).parse_args([word])


@cache
def parsers(command: str) -> Any:
    return importlib.import_module(f"pvdm_fast.{command}").make_parser()


def test_there_are_numbers_to_try() -> None:
    assert len(ALL) > 60
    assert {command for command, _, _ in ALL} == {*COMMANDS, "train"} - {"info", "selftest"}


@pytest.mark.parametrize(("command", "name", "kind"), ALL, ids=[f"{command}{name}" for command, name, _ in ALL])
def test_every_number_is_checked_first(command: str, name: str, kind: Number) -> None:
    assert math.isfinite(kind.minimum) and math.isfinite(kind.maximum)
    for word in wrong(kind):
        with pytest.raises(UserError) as error:
            read(command, f"{name}={word}")
        assert str(error.value).startswith(f"{name} must be "), word
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


FIRST = {command: (command, name) for command, name, _ in ALL}.values()


@pytest.mark.parametrize(("command", "name"), FIRST)
def test_the_commands_say_it_in_one_line(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"pvdm_fast.{command}").main([f"{name}=nan"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name} must be ") and error.count("\n") == 1


@pytest.mark.parametrize(("command", "name", "kind"), ALL, ids=[f"{command}{name}" for command, name, _ in ALL])
def test_both_ends_of_a_range_are_taken(command: str, name: str, kind: Number) -> None:
    for end in (kind.minimum, kind.maximum):
        word = f"{end:.17g}" if kind.kind is float else f"{end}"
        assert kind(word) == end and isinstance(kind(word), kind.kind)
        if command == "train":
            assert read(command, f"{name}={word}") in (end, (end,))


VALUES: list[Any] = [
    *(float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), 1.5, -1, True, False, None, "x", "nan", b"1"),
    *(datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3), [], {}, [[]], [float("nan")], [True], {"a": 1}, ""),
]


@pytest.mark.parametrize("key", list(OPTIONS))
def test_what_yaml_can_hold_is_right_or_refused(key: str) -> None:
    option = OPTIONS[key]
    for value in VALUES:
        try:
            made = option.convert(value)
        except UserError as error:
            message = str(error)
        else:
            message = f"{key} must be "
        assert message.startswith(f"{key} must be "), value
        if message != f"{key} must be ":
            continue
        kind = option.metadata["number"] if isinstance(option.metadata["number"], Number) else None
        for item in made if isinstance(made, tuple) else (made,):
            assert item is None or kind is None or kind.minimum <= item <= kind.maximum, (value, made)
        assert made is None or kind is not None or isinstance(made, (str, bool)), (value, made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("autoencoder: {learning_rate: .inf}", "autoencoder.learning_rate must be a finite number, not inf"),
        ("autoencoder: {steps: .inf}", "autoencoder.steps must be a whole number, not inf"),
        ("seed: 2024-01-02", "seed must be a whole number, not datetime.date(2024, 1, 2)"),
        ("data: 2024-01-02", "data must be text"),
        ("video: {workers: 100000}", "video.workers must be at most 256, not 100000"),
        ("autoencoder: {beta1: 1}", "autoencoder.beta1 must be at most 0.999999999, not 1"),
        ('data: ""', "data must be text"),
    ],
)
def test_mistakes_in_a_config_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        make_config(read_changes(tmp_path / "options.yaml"))
    assert message in str(error.value)


def test_a_bare_no_of_yaml_is_the_word(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("mixed_precision: no\n")
    assert make_config(read_changes(tmp_path / "options.yaml")).mixed_precision == "no"


def test_a_number_by_itself() -> None:
    import numpy as np

    count, share = whole(1, 10), real(0, 1)
    assert [count(value) for value in ("3", 3, 3.0, np.int64(3))] == [3] * 4
    assert share("0.5") == share(np.float32(0.5)) == 0.5 and share(1) == 1.0
    for value in (True, None, 2.5, "2.5", [], 0, 11, "11"):
        with pytest.raises(UserError, match=r"^clips must be "):
            count.checked("clips", value)
    with pytest.raises(ValueError, match="must be a finite number"):
        share("nan")
