"""Full or read-only disks, and clocks that jump: one sentence, nothing lost, and the run can continue."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training.lives import live
from training.small import SMALL, losses, same_weights, steps
from training.test_kills import assert_whole

from pvdm_fast.train import main
from pvdm_fast.training.run_folder import RunFolder

SHORT = [*SMALL, *steps(4), "--save-every", "2"]


def assert_one_sentence(output: str) -> None:
    assert "Traceback" not in output, output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert live("train", [*SHORT, "--run", str(run)], run).code == 0
    return run


def fill_and_resume(limits: list[int], folder: Path, whole: Path) -> int:
    """Trains with a limit on file sizes, then without. Returns how many limits stopped the first run."""
    stopped = 0
    for limit in limits:
        run = folder / f"run{limit}"
        ended = live("train", [*SHORT, "--run", str(run)], run, file_limit=limit)
        assert ended.code in (0, 2), (limit, ended.output)
        if ended.code:
            stopped += 1
            assert_one_sentence(ended.output)
        assert_whole(run)
        begun = (run / "config.yaml").exists()
        ended = live("train", ["--resume", str(run)] if begun else [*SHORT, "--run", str(run)], run)
        assert ended.code == 0, (limit, ended.output)
        assert same_weights(run, whole, "denoiser")
    return stopped


def sizes(whole: Path) -> list[int]:
    """One byte less than every file of a run, and half of it, so that each file is once the first that doesn't
    fit."""
    found = {item.stat().st_size for item in whole.rglob("*") if item.is_file()}
    return sorted({size - 1 for size in found} | {size // 2 for size in found})


@pytest.mark.slow
def test_files_that_cannot_grow(whole: Path, tmp_path: Path) -> None:
    """EFBIG instead of a full disk's ENOSPC: at a model's weights, which are about the largest file after a
    checkpoint."""
    (weights,) = (whole / "denoiser").glob("*.safetensors")
    assert fill_and_resume([weights.stat().st_size - 1], tmp_path, whole) == 1


@pytest.mark.exhaustive
def test_every_file_once_too_large(whole: Path, tmp_path: Path) -> None:
    limits = sizes(whole)
    stopped = fill_and_resume(limits, tmp_path, whole)
    print(f"{len(limits)} limits, {stopped} of them stopped the run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory. `mount -o remount` changes it."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place]).returncode:
        pytest.skip("only root can mount a small disk: run as root")
    yield place
    subprocess.run(["umount", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


@pytest.mark.exhaustive
def test_a_disk_that_is_full_at_every_size(small_disk: Path, whole: Path) -> None:
    used = sum(item.stat().st_size for item in whole.rglob("*") if item.is_file())
    stopped, record = 0, whole.parent / "small-disk"
    for kilobytes in range(64, 2 * used // 1024, max(64, used // 1024 // 12)):
        run = small_disk / "run"
        subprocess.run(["rm", "-rf", run], check=True)
        remount(small_disk, f"size={kilobytes}k")
        ended = live("train", [*SHORT, "--run", str(run)], run, record=record)
        assert ended.code in (0, 2), (kilobytes, ended.output)
        if ended.code:
            stopped += 1
            assert_one_sentence(ended.output)
        assert_whole(run)
        remount(small_disk, "size=64m")
        begun = (run / "config.yaml").exists()
        arguments = ["--resume", str(run)] if begun else [*SHORT, "--run", str(run)]
        ended = live("train", arguments, run, record=record)
        assert ended.code == 0, (kilobytes, ended.output)
        assert same_weights(run, whole, "denoiser")
    print(f"{stopped} sizes of a disk stopped the run")
    assert stopped >= 10


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_disk / "run"
    assert main([*SHORT, "--stage", "autoencoder", "--run", str(run)]) == 0
    capsys.readouterr()
    remount(small_disk, "ro")
    try:
        assert main(["--resume", str(run), "--stage", "diffusion"]) == 2
        assert_one_sentence(capsys.readouterr().err)
        assert main([*SHORT, "--run", str(small_disk / "other")]) == 2
        assert_one_sentence(capsys.readouterr().err)
    finally:
        remount(small_disk, "rw")
    assert main(["--resume", str(run), "--stage", "diffusion"]) == 0


@pytest.mark.slow
def test_a_clock_that_jumps(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock runs backwards by days, and file times with it. Only steps decide what is newest."""
    calls = []

    def jumping() -> float:
        calls.append(None)
        return 1.7e9 + (-1) ** len(calls) * 1e6 * len(calls)

    monkeypatch.setattr(time, "time", jumping)
    run = tmp_path / "run"
    assert main([*SHORT, "--stage", "autoencoder", "--autoencoder-steps", "3", "--run", str(run)]) == 0
    (run / "results.json").unlink()
    for age, item in enumerate(sorted((run / "checkpoints").rglob("*"), reverse=True)):
        os.utime(item, (2e9 + 1e6 * age, 2e9 + 1e6 * age))  # the oldest step gets the latest time
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert main(["--resume", str(run), "--stage", "all", "--autoencoder-steps", "4"]) == 0
    for stage in ("autoencoder", "diffusion"):
        assert losses(run, stage) == losses(whole, stage)
    assert same_weights(run, whole, "denoiser")


def test_runs_started_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "19700101-000000")
    folders = [RunFolder.create(None).path for _ in range(3)]
    assert [folder.name for folder in folders] == ["19700101-000000", "19700101-000000-2", "19700101-000000-3"]
