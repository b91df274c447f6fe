"""docs/from_the_release.md is true: its commands run, with small random checkpoints in the release's form."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pvdm_fast import convert, evaluate, sample, train
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import to_release

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_the_release.md").read_text(encoding="utf-8")
MAINS: dict[str, Callable[[list[str]], int]] = {"convert": convert.main, "sample": sample.main, "train": train.main}
LESS = {
    "sample": ["--clips", "1", "--steps", "1", "--device", "cpu"],
    "train": shlex.split(
        "--autoencoder-steps 1 --diffusion-steps 1 --autoencoder-batch-size 1 --diffusion-batch-size 1 --workers 0 "
        "--held-out-clips 1 --diffusion-sampling-steps 1 --diffusion-cached-clips 0 --device cpu"
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ae.pth and unet.pth; 8 heads, as the release has."""
    torch.manual_seed(0)
    sizes = dict(frames=2, height=8, width=16, patch_size=4, channels=16, depth=1, head_dim=4, projection_depth=1)
    autoencoder = Autoencoder(**sizes)
    torch.save(to_release(autoencoder), tmp_path / "ae.pth")
    layout = dict(time=2, height=2, width=4)
    denoiser = Denoiser(**layout, model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1])
    torch.save({f"diffusion_model.{n}": t for n, t in to_release(denoiser).items()}, tmp_path / "unet.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run(here: Path) -> None:
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert [line[2] for line in lines] == [f"pvdm_fast.{name}" for name in ("convert", "sample", "train", "convert")]
    for _, _, module, *arguments in lines:
        name = module.partition(".")[2]
        words = ["synthetic:shapes" if word == "FOLDER" else word for word in arguments]
        assert MAINS[name]([*words, *LESS.get(name, [])]) == 0
    clips = ["--data", "synthetic:shapes", "--clips", "1", "--samples", "0", "--device", "cpu"]
    assert evaluate.main(["runs/release", *clips]) == 0
    assert (here / "release.mp4").stat().st_size > 0
    assert (here / "runs" / "tuned" / "samples.mp4").stat().st_size > 0
    for name in ("ae", "unet"):
        first, again = (torch.load(here / f"{stem}.pth", weights_only=True) for stem in (name, f"{name}_again"))
        assert list(first) == list(again)
        assert all(torch.equal(first[key], again[key]) for key in first)
