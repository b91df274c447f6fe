"""The README is true: its Python runs and its commands parse."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from pvdm_fast.training.options import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(module: str) -> list[list[str]]:
    """The arguments of each `python -m pvdm_fast.<module>` line in a block."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith(f"python -m pvdm_fast.{module} ")]


def test_two_commands_come_first() -> None:
    """CI runs the first two bash blocks; each is one line."""
    first, second = blocks("bash")
    assert first == "pip install -e . && python -m pvdm_fast.train\n"
    assert second == 'pip install -e ".[test]" && pytest -n auto --dist loadfile\n'
    assert README.index(second) < 2500, "the commands belong on the first screen"


def test_python_runs() -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})


def test_train_commands_parse() -> None:
    found = commands("train")
    assert len(found) == 3
    for arguments in found:
        parse(arguments)


@pytest.mark.parametrize("module", ["sample", "evaluate", "estimate"])
def test_other_commands_parse(module: str) -> None:
    found = commands(module)
    assert found
    for arguments in found:
        import_module(f"pvdm_fast.{module}").make_parser().parse_args(arguments)


def test_at_most_five_environment_variables() -> None:
    sources = [
        *(ROOT / "pvdm_fast").rglob("*.py"),
        ROOT / "setup.py",
        ROOT / "build_tools.py",
        *ROOT.glob("csrc/**/*.cpp"),
    ]
    used = {name for path in sources for name in re.findall(r"PVDM_FAST_[A-Z_]+", path.read_text(encoding="utf-8"))}
    documented = set(re.findall(r"`(PVDM_FAST_[A-Z_]+)`", README))
    assert used == documented
    assert len(documented) <= 5
