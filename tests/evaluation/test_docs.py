"""The commands of docs/evaluation.md run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from pvdm_fast.evaluate import main, make_parser
from pvdm_fast.evaluation.features import I3D_SHA256

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
COMMANDS = re.findall(r"^(?:python|torchrun --nproc-per-node 8) -m pvdm_fast\.evaluate (.*)$", PAGE.read_text(), re.M)
SMALL = [
    "--clips",
    "2",
    "--samples",
    "2",
    "--frames",
    "2",
    "--steps",
    "1",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--nearest-among",
    "4",
]


def test_there_are_four() -> None:
    assert len(COMMANDS) == 4


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(command: str, run: Path, network: list[str], tmp_path: Path) -> None:
    arguments, folder = shlex.split(command), tmp_path
    make_parser().parse_args(arguments)
    if "--features" in arguments:
        assert arguments[arguments.index("--features-sha256") + 1] == I3D_SHA256
        arguments += network
    here = {"runs/mine": str(run), "videos/": "synthetic:shapes", "runs/other": str(tmp_path / "other")}
    if "runs/other" in arguments:
        shutil.copytree(run, tmp_path / "other")
        folder = tmp_path / run.name
    arguments = [here.get(word, word) for word in arguments]
    assert main([*arguments, *SMALL, "--out", str(tmp_path)]) == 0
    assert (folder / "report.html").is_file() and (folder / "evaluation.json").is_file()
    assert (tmp_path / "comparison.html").is_file() == ("runs/other" in command)
