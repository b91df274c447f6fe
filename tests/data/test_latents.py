"""Cached latents: complete or absent, the same whoever writes them, and as good to train on as the videos."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comparison import assert_close
from safetensors import safe_open

from pvdm_fast import encode
from pvdm_fast.data import DataError, collate, open_dataset
from pvdm_fast.data.latents import fingerprint
from pvdm_fast.diffusion.noise import joint_batch, joint_latents, window_starts
from pvdm_fast.jobs.share import Share
from pvdm_fast.models import Autoencoder
from pvdm_fast.training import encoding

SIZES = dict(frames=4, height=16, width=16, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8)
CLIP = {"frames": 8, "height": 16, "width": 16}
OPTIONS = ["--clips", "10", "--shard-clips", "4", "--batch-size", "3", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    Autoencoder(**SIZES).save_pretrained(path)
    return path


def run(data: Path | str, out: Path, autoencoder: Path, *more: str) -> int:
    return encode.main([str(data), str(out), "--autoencoder", str(autoencoder), *OPTIONS, *more])


@pytest.fixture(scope="module")
def encoded(video_folder: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips, with every window that training draws from."""
    out = tmp_path_factory.mktemp("latents") / "out"
    assert run(video_folder, out, autoencoder, "--windows", "5", "--flip") == 0
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_draw_of_the_latents_is_that_draw_of_the_videos(encoded: Path, video_folder: Path, autoencoder: Path) -> None:
    model = Autoencoder.from_pretrained(autoencoder)
    for split, count in (("train", 10), ("test", 1)):
        cached = open_dataset(encoded, **CLIP, split=split, flip=True)
        videos = open_dataset(video_folder, **CLIP, split=split, flip=True)
        assert len(cached) == count
        for draw in range(count):
            item, clip = cached[draw], videos[draw]
            assert (item["name"], item["label"]) == (clip["name"], clip["label"])
            assert item["video"].dtype == torch.float32 and item["video"].shape[0] == 5
            for window, start in enumerate(window_starts(4, 5)):
                with torch.no_grad():
                    latent = model.encode(clip["video"][None, :, start : start + 4]).latent[0]
                assert_close(item["video"][window], latent, 1e-5)


def test_later_epochs_are_other_orders_of_the_same(encoded: Path) -> None:
    dataset = open_dataset(encoded, **CLIP, flip=True)
    epochs = [[dataset[epoch * 10 + place]["video"] for place in range(10)] for epoch in range(3)]
    keys = [[clip.sum().item() for clip in epoch] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
    assert keys[0] != keys[1] != keys[2]


def test_the_index_says_what_the_latents_are(encoded: Path, autoencoder: Path) -> None:
    index = json.loads((encoded / "index.json").read_text())
    assert index["settings"]["autoencoder"] == fingerprint(Autoencoder.from_pretrained(autoencoder))
    assert [shard["clips"] for shard in index["shards"]] == [4, 4, 2, 1]
    parts = []
    for shard in index["shards"]:
        with safe_open(encoded / shard["file"], "pt") as file:
            parts.append(file.get_tensor("latents"))
    values = torch.cat(parts).double().transpose(0, 2).flatten(1)
    assert index["statistics"]["mean"] == pytest.approx(values.mean(1).tolist(), rel=1e-4, abs=1e-6)
    assert index["statistics"]["standard_deviation"] == pytest.approx(values.std(1, correction=0).tolist(), rel=1e-4)
    assert index["statistics"]["maximum"] == pytest.approx(values.amax(1).tolist(), rel=1e-4)


def test_classes_go_with_the_latents(video_folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["Archery_g01", "Archery_g02", "Bowling_g01", "Bowling_g02"]):
        shutil.copy(video_folder / "a.mp4", tmp_path / f"v_{name}_c0{number}.mp4")
    out = tmp_path / "out"
    assert run(tmp_path, out, autoencoder) == 0
    dataset = open_dataset(out, **CLIP)
    batch = collate([dataset[draw] for draw in range(10)])
    assert batch["labels"] == [name.split("_")[1] for name in batch["names"]]
    assert json.loads((out / "index.json").read_text())["labels"] == sorted(set(batch["labels"]))


def test_with_all_windows_the_training_batch_is_the_same(encoded: Path, video_folder: Path, autoencoder: Path) -> None:
    model = Autoencoder.from_pretrained(autoencoder)
    latents, videos = (
        torch.stack([dataset[draw]["video"] for draw in range(10)])
        for dataset in (open_dataset(place, **CLIP, flip=True) for place in (encoded, video_folder))
    )
    with torch.no_grad():
        expected = joint_batch(videos, lambda clip: model.encode(clip).latent, 0.5, torch.Generator().manual_seed(3))
    found = joint_latents(latents, 4, 0.5, torch.Generator().manual_seed(3))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_with_two_windows_conditions_are_the_same_and_targets_the_nearest() -> None:
    """The latents are the numbers of their first frames."""
    latents = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1).expand(400, 2, 1, 3)
    target, condition = joint_latents(latents + 1, 4, 0.3, torch.Generator().manual_seed(0))
    conditional = condition[:, 0, 0] > 0
    assert 0.2 < conditional.float().mean() < 0.4
    assert (condition[conditional] == 1).all() and (target[conditional] == 5).all()
    assert not condition[~conditional].any()
    assert 0.3 < (target[~conditional] == 1).float().mean() < 0.8
    assert window_starts(16, 2) == [0, 16]
    assert window_starts(4, 5) == [0, 1, 2, 3, 4]


def test_processes_share_a_global_batch() -> None:
    latents = torch.randn(6, 3, 1, 5)
    whole = joint_latents(latents, 4, 0.5, torch.Generator().manual_seed(1))
    for rank in range(3):
        share = Share(rank, 3)
        part = joint_latents(share.of(latents), 4, 0.5, torch.Generator().manual_seed(1), share)
        assert all(torch.equal(share.of(a), b) for a, b in zip(whole, part, strict=True))


def test_several_processes_write_the_same_files(
    encoded: Path, video_folder: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order. The process that finds every shard writes the index."""
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        assert not (out / "index.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert run(video_folder, out, autoencoder, "--windows", "5", "--flip") == 0
    assert contents(out) == contents(encoded)


@pytest.mark.exhaustive  # starting Python takes eight seconds; the test above does the same in one process
def test_torchrun_starts_them(encoded: Path, video_folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = ["-m", "pvdm_fast.encode", str(video_folder), str(out), "--autoencoder", str(autoencoder), *OPTIONS]
    done = subprocess.run([*launcher, *command, "--windows", "5", "--flip"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(encoded)


@pytest.mark.slow
def test_a_killed_encoding_goes_on(encoded: Path, video_folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the first shard exists, then the same command again."""
    out = tmp_path / "out"
    arguments = [str(video_folder), str(out), "--autoencoder", str(autoencoder), *OPTIONS, "--windows", "5", "--flip"]
    process = subprocess.Popen([sys.executable, "-m", "pvdm_fast.encode", *arguments])
    while not list(out.glob("train-*")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    (out / "index.json").unlink(missing_ok=True)
    (out / "train-00002.safetensors").unlink(missing_ok=True)  # it may or may not exist
    with pytest.raises(DataError, match="not complete: run the same"):
        open_dataset(out, **CLIP)
    (out / ".writing-elsewhere-1-train-00002.safetensors").write_bytes(b"half")
    first = (out / "train-00000.safetensors").stat().st_mtime_ns
    assert encode.main(arguments) == 0
    assert contents(out) == contents(encoded)
    assert (out / "train-00000.safetensors").stat().st_mtime_ns == first, "what was whole is kept"


def test_webdataset_shards_of_latents(encoded: Path, video_folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    """The same clips, readable by the webdataset library alone, and the same bytes each time."""
    wds = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
    for name in ("one", "two"):
        tar = ["--windows", "5", "--flip", "--container", "tar"]
        assert run(video_folder, tmp_path / name, autoencoder, *tar) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    ours, theirs = (open_dataset(place, **CLIP, flip=True) for place in (encoded, tmp_path / "one"))
    for draw in range(25):
        assert torch.equal(ours[draw]["video"], theirs[draw]["video"])
        assert ours[draw]["name"] == theirs[draw]["name"]
    shards = [str(path) for path in sorted((tmp_path / "one").glob("train-*.tar"))]
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert len(shards) == 3 and len(samples) == 10
    for draw, sample in enumerate(samples):
        assert torch.equal(torch.from_numpy(sample["npy"]), ours[draw]["video"])
        assert sample["json"] == {"name": ours[draw]["name"], "label": None}
    os.truncate(tmp_path / "two" / "train-00001.tar", 5000)
    with pytest.raises(DataError, match=r"train-00001\.tar.*encode again"):
        open_dataset(tmp_path / "two", **CLIP, flip=True)[5]


def test_a_damaged_shard_is_found_and_made_again(
    encoded: Path, video_folder: Path, autoencoder: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(encoded, tmp_path / "out")
    shard = out / "train-00001.safetensors"
    os.truncate(shard, 1000)
    dataset = open_dataset(out, **CLIP, flip=True)
    with pytest.raises(DataError, match=r"train-00001.*cannot be read.*encode again"):
        dataset[5]
    assert run(video_folder, out, autoencoder, "--windows", "5", "--flip") == 0
    assert contents(out) == contents(encoded)


def test_a_full_disk_leaves_no_half_shard(
    video_folder: Path,
    autoencoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, *arguments: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding, "save_shard", full)
    assert run(video_folder, tmp_path / "out", autoencoder) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1", "--windows", "5", "--flip"], "made with seed 0, but 1 is asked for"),
        (["--windows", "6"], r"--windows must be from 2 to 5 \(T \+ 1\)"),
        (["--windows", "1"], "--windows must be from 2"),
        (["--shard-clips", "0"], "--shard-clips must be at least 1"),
    ],
)
def test_wrong_requests(
    more: list[str],
    message: str,
    encoded: Path,
    video_folder: Path,
    autoencoder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(video_folder, encoded, autoencoder, *more) == 2
    assert re.search(message, capsys.readouterr().err)


def test_other_clips_than_the_latents_are_refused(encoded: Path) -> None:
    with pytest.raises(DataError, match="with stride 1, but stride 2 is asked for"):
        open_dataset(encoded, **CLIP, stride=2, flip=True)
    with pytest.raises(DataError, match="frames 8, but frames 4"):
        open_dataset(encoded, **{**CLIP, "frames": 4}, flip=True)


def test_the_release_s_clips_are_encoded_and_told_from_others(
    encoded: Path, video_folder: Path, autoencoder: Path, tmp_path: Path
) -> None:
    ways = {"crop": "centre", "resize": "bilinear"}
    assert run(video_folder, tmp_path / "out", autoencoder, *shlex.split("--crop centre --resize bilinear")) == 0
    latents = open_dataset(tmp_path / "out", **CLIP, **ways)
    video = open_dataset(video_folder, **CLIP, **ways)[3]["video"]
    with torch.no_grad():
        assert_close(
            latents[3]["video"][1], Autoencoder.from_pretrained(autoencoder).encode(video[None, :, 4:]).latent[0], 1e-5
        )
    with pytest.raises(DataError, match="with crop centre, but crop random is asked for"):
        open_dataset(tmp_path / "out", **CLIP)
    with pytest.raises(DataError, match="of whole clips: leave out --pad-short"):
        open_dataset(encoded, **CLIP, flip=True, pad_short=True)
    with pytest.raises(DataError, match="with fold 1, but fold 2"):
        open_dataset(encoded, **CLIP, flip=True, fold=2)


def test_latents_are_not_encoded_again(
    encoded: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(encoded, tmp_path / "out", autoencoder, "--flip") == 2
    assert "holds latents already" in capsys.readouterr().err
