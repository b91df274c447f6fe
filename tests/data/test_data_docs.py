"""The commands of docs/data.md run as they stand, with small data and models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from data import films

from pvdm_fast import encode, train

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SIZES = shlex.split("""
    --frames 4 --height 16 --width 16 --autoencoder-patch-size 8 --autoencoder-channels 16 --autoencoder-depth 1
    --autoencoder-num-heads 1 --autoencoder-head-dim 8 --autoencoder-batch-size 2 --autoencoder-steps 1
""")
DENOISER = shlex.split("""
    --diffusion-model-channels 32 --diffusion-channel-mult 1 --diffusion-num-res-blocks 1 --diffusion-num-heads 2
    --diffusion-attention-resolutions 1 --diffusion-batch-size 2 --diffusion-sampling-steps 1 --diffusion-steps 1
    --frames 4 --height 16 --width 16
""")
QUICK = ["--held-out-clips", "2", "--workers", "0", "--device", "cpu"]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(module: str) -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"python -m pvdm_fast.{module} ")]


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wds = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    Path("shards").mkdir()
    for number in range(4):
        video = films.encode(Path("videos") / f"{number}.mp4", films.frames(12, 16, 16, seed=number))
        with wds.TarWriter(f"shards/{number:04d}.tar") as writer:
            writer.write({"__key__": str(number), "mp4": video.read_bytes()})
    assert train.main([*SIZES, *QUICK, "--stage", "autoencoder", "--data", "videos", "--run", "run"]) == 0
    (encoding,) = commands("encode")
    assert encode.main([*encoding, "--workers", "0", "--device", "cpu"]) == 0
    latents, pattern, folder = commands("train")
    assert train.main([*latents, *DENOISER, *QUICK, "--run", "a"]) == 0
    assert train.main([*pattern, *SIZES, *QUICK, "--stage", "autoencoder", "--run", "b"]) == 0
    assert pattern[-1] == "shards/{0000..0003}.tar" and folder[-1] == "shards"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small clips, and stopped after two batches."""
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    for number in range(3):
        films.encode(Path("videos") / f"{number}.mp4", films.frames(40, seed=number))
    (example,) = blocks("python")
    assert "batch_size=8" in example and "workers=2" in example
    example = example.replace("batch_size=8", "batch_size=2").replace("workers=2", "workers=0")
    found: dict[str, object] = {}
    exec(example.rstrip() + "\n    break\n", found)
    batch = found["batch"]
    assert isinstance(batch, dict) and batch["video"].shape == (2, 3, 16, 64, 64)
    assert batch["labels"] == [None, None] and np.isfinite(batch["video"].numpy()).all()
