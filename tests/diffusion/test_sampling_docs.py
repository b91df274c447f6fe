"""docs/sampling.md is true: its commands and its Python run, with small models instead of a trained run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import samplers
from pvdm_fast.data import write_video
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.sample import main
from pvdm_fast.training.options import parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")
LESS = ["--steps", "1", "--clips", "1"]
SIZES: dict[str, Any] = dict(
    model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=1, attention_resolutions=[]
)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(module: str) -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"python -m pvdm_fast.{module} ")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as training leaves it, with classes. The working folder holds clip.mp4."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        frames=16, height=16, width=16, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8, projection_depth=1
    )
    autoencoder.save_pretrained(tmp_path / "run/autoencoder")
    names = ["Archery", "Biking"]
    Denoiser(time=16, height=2, width=2, num_classes=2, class_names=names, **SIZES).save_pretrained(
        tmp_path / "run/denoiser"
    )
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", np.zeros((20, 20, 30, 3), np.uint8))
    return tmp_path / "run"


def test_commands_run(run: Path) -> None:
    found = commands("sample")
    assert len(found) == 7
    for arguments in found:
        less = [*LESS, "--frames", "40"] if "--frames" in arguments else LESS
        assert main([str(run) if word == "RUN" else word for word in arguments] + less) == 0
        assert Path(arguments[-1]).stat().st_size > 0
    assert Path("samples/seed-0-clip-000000.mp4").is_file()
    assert len(list(Path("pictures/seed-0-clip-000000").glob("*.png"))) == 16
    (training,) = commands("train")
    assert parse(training).changes["diffusion.class_conditional"] is True


def test_python_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(
        "imageio_ffmpeg", reason="diffusers exports through imageio: pip install imageio imageio-ffmpeg"
    )
    names: dict[str, Any] = {"RUN": str(run)}
    for block in blocks("python"):
        exec(compile(block, "sampling.md", "exec"), names)
    assert names["frames"].shape == (1, 128, 16, 16, 3)
    assert len(names["later"]) == 2
    sizes = re.findall(r"torch.Size\(\[1, 3, (\d+), 16, 16\]\)", capsys.readouterr().out)
    assert sizes == ["16", "16", "8"]


def test_the_table_of_samplers_is_measured(run: Path) -> None:
    """With the reference's number of steps, a deterministic sampler is the reference. The table names every
    sampler."""
    autoencoder = Autoencoder.from_pretrained(run / "autoencoder").eval()
    denoiser = Denoiser.from_pretrained(run / "denoiser").eval()
    torch.nn.init.normal_(denoiser.out["2"].weight, std=0.1)
    rows = samplers.measure(autoencoder, denoiser, clips=1, reference_steps=8, steps=(2, 8))
    by_name = {(row.sampler, row.steps): row for row in rows}
    assert by_name["DDIM, eta 0", 8].psnr == float("inf")
    assert 0 < by_name["DDIM, eta 0", 2].psnr < 100
    assert by_name["DDIM, eta 1", 8].psnr < 100
    assert all(row.seconds > 0 for row in rows)
    lines = samplers.table(rows)
    assert len(lines) == 2 + len(samplers.SAMPLERS)
    page = samplers.DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| {sampler.label} |" in page for sampler in samplers.SAMPLERS), "the page holds the table"
