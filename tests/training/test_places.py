"""Working folders, odd names, models saved over a run's own: a run continues with what it started with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training.small import SMALL, assert_refused, steps

from pvdm_fast.data import write_video
from pvdm_fast.data.shapes import draw_scene
from pvdm_fast.diffusion.pipeline import PVDMPipeline
from pvdm_fast.errors import UserError
from pvdm_fast.evaluation.report import write_report
from pvdm_fast.jobs.checksums import NAME, find_damage
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.sample import main as sample
from pvdm_fast.train import main
from pvdm_fast.training.config import make_config, with_absolute_places
from pvdm_fast.training.run_folder import RunFolder


def films(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        write_video(folder / f"{number}.mp4", draw_scene(np.random.default_rng(number), 1.5).render(12, 16, 16))


@pytest.mark.slow
def test_a_run_resumes_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    films(tmp_path / "here" / "films", 4)
    films(tmp_path / "there" / "films", 6)
    monkeypatch.chdir(tmp_path / "here")
    assert main([*SMALL, *steps(1), "--data", "films", "--run", "../run", "--stage", "autoencoder"]) == 0
    assert RunFolder(tmp_path / "run").read_config().data == str(tmp_path / "here" / "films")
    monkeypatch.chdir(tmp_path / "there")
    capsys.readouterr()
    assert main(["--resume", "../run", "--stage", "all"]) == 0
    assert "of 4 in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_names_its_data_by_a_relative_path_is_asked_for_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In runs of earlier versions: a folder with that name here may hold other data."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("data: synthetic:shapes", "data: films"))
    assert main(["--resume", str(run)]) == 2
    assert "as films: give the whole path with --data" in capsys.readouterr().err
    assert main(["--resume", str(run), "--data", "synthetic:shapes"]) == 0


def test_which_options_are_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"data": "a", "autoencoder_from": "../b", "lpips_weights": "c.pth", "seed": 3}
    expected = {
        "data": f"{tmp_path}/a",
        "autoencoder_from": f"{tmp_path.parent}/b",
        "lpips_weights": f"{tmp_path}/c.pth",
    }
    assert with_absolute_places(given) == {**expected, "seed": 3}
    others = {"data": "synthetic:shapes", "autoencoder_from": None, "lpips_weights": "torchvision"}
    assert with_absolute_places(others) == others
    assert make_config(with_absolute_places({})).data == "synthetic:shapes"


@pytest.mark.slow
def test_names_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would take them for a protocol."""
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, *steps(1), "--run", "lr:0.001"]) == 0
    assert (tmp_path / "lr:0.001" / "samples.mp4").is_file()
    assert main(["--resume", "lr:0.001"]) == 0
    assert sample(["lr:0.001", "--out", "a:b.mp4", "--steps", "1", "--clips", "1", "--device", "cpu"]) == 0
    assert (tmp_path / "a:b.mp4").stat().st_size > 0


def test_a_run_folder_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its models could be written, but not read."""
    run = tmp_path / os.fsdecode(b"caf\xe9")
    assert main([*SMALL, *steps(1), "--run", str(run)]) == 2
    assert "name must be UTF-8" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("autoencoder", Autoencoder), ("denoiser", Denoiser)])
def test_a_model_saved_over_the_run_s_own(
    name: str, kind: type, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    model = kind.from_pretrained(run / name)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(run / name)
    assert find_damage(run / name) is None and (run / name / NAME).is_file()
    arguments = [str(run), "--out", str(tmp_path / "o.npy"), "--steps", "1", "--clips", "1", "--device", "cpu"]
    arguments.append("--overwrite")
    assert sample(arguments) == 0
    model.save_pretrained(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / NAME).exists()
    file = next((run / name).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert sample(arguments) == 2
    assert "where it was changed on purpose, remove its checksums.json" in capsys.readouterr().err


def test_diffusers_options_of_loading_a_run(finished: Path, tmp_path: Path) -> None:
    PVDMPipeline.from_pretrained(finished).save_pretrained(tmp_path / "pipeline")
    for folder in (finished, tmp_path / "pipeline"):
        assert PVDMPipeline.from_pretrained(folder, local_files_only=True).denoiser.dtype == torch.float32
        assert PVDMPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16
    assert PVDMPipeline.from_pretrained(finished, dtype=torch.bfloat16).autoencoder.dtype == torch.bfloat16
    each = PVDMPipeline.from_pretrained(finished, torch_dtype={"denoiser": torch.bfloat16})
    assert (each.denoiser.dtype, each.autoencoder.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match=r"loaded without device_map, variant: save the pipeline"):
        PVDMPipeline.from_pretrained(finished, variant="fp16", device_map="balanced")
    for dtype in (torch.int8, "half"):
        with pytest.raises(UserError, match="torch_dtype must be one of PyTorch's floating dtypes"):
            PVDMPipeline.from_pretrained(finished, torch_dtype=dtype)


@pytest.mark.slow
def test_fp16_on_a_cpu_is_float32_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *steps(1), "--mixed-precision", "fp16", "--stage", "autoencoder", "--run", str(run)]) == 0
    output = capsys.readouterr().out
    assert output.count("--mixed-precision fp16: it is for GPUs, so float32 is used instead\n") == 1
    (precision,) = [line for line in output.splitlines() if line.startswith("precision")]
    assert precision == "precision  float32: it is for GPUs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diffusion-channel-mult", "2"], "channel_mult [2] must begin with 1"),
        (["--diffusion-channel-mult", "2", "1"], "channel_mult [2, 1] must begin with 1"),
        (["--diffusion-model-channels", "50"], "model_channels 50 must be a multiple of 32, the groups"),
        (["--diffusion-num-heads", "3"], "num_heads 3 divide the channels of every level, which are [32]"),
        (["--diffusion-channel-mult", "1", "1", "1"], "4"),
        (["--autoencoder-head-dim", "6"], "The width of a head must be a multiple of 4"),
    ],
)
def test_both_models_are_checked_before_the_first_trains(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(arguments, message, tmp_path / "run", capsys)


def test_a_report_names_files_that_are_not_utf8(finished: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    results = {
        "reconstruction": {"clips": 1, "frames": 4, "psnr": None, "ssim": None},
        "generation": {}, "missing": [], "caveats": [], "unreadable_files": {name: "is no video"},
    }  # fmt: skip
    document = {"results": results, "protocol": {"sampling": {}}, "run": str(finished)}
    write_report(tmp_path / "report.html", document, {}, [])
    assert "caf\\xe9.mp4: is no video" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads(json.dumps(name)) == name
