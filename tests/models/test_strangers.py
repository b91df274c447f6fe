"""Checkpoints that are small but claim to be large, or repeat entries endlessly: refused before they take memory."""

from __future__ import annotations

import json
import os
import resource
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models.test_damaged_checkpoints import SIZES, UNET, autoencoder
from safetensors.torch import load_file, save_file

from pvdm_fast.losses.lpips import load_lpips
from pvdm_fast.models import Autoencoder, Denoiser, release
from pvdm_fast.models.release import CheckpointError
from pvdm_fast.training import checkpoint

MORE = 1 << 30  # bytes of memory; a refusal must take less
SECONDS = 20


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if the block takes a gigabyte more, or too long."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages + MORE, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("shape", [(1 << 40,), (3, 1 << 38)])
def test_a_stride_of_nothing_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(*shape)}, tmp_path / "a.pth")
    with bounded(), pytest.raises(CheckpointError, match="fewer values than that"):
        release.read_state_dict(tmp_path / "a.pth")
    saved = checkpoint.save(tmp_path, "autoencoder", 1, {"x": [torch.zeros(1).expand(*shape)]})
    newest, _ = checkpoint.newest_good(tmp_path)
    assert newest is not None and newest.path == saved
    with bounded(), pytest.raises(checkpoint.UserError):
        checkpoint.load(newest)


def test_one_storage_under_many_names_is_refused(tmp_path: Path) -> None:
    storage = torch.zeros(100_000)
    torch.save({f"w{number}": storage for number in range(3000)}, tmp_path / "a.pth")
    with bounded(), pytest.raises(CheckpointError, match=r"its tensors would take \d+ bytes"):
        release.read_state_dict(tmp_path / "a.pth")


def test_a_storage_that_claims_more_than_its_entry_is_never_read_beyond_the_file(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(64.0)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            # the pickle holds the number of values, 64, and the size as BININT1
            content = content.replace(b"K\x40", b"J\x00\x00\x00\x40") if entry.filename.endswith(".pkl") else content
            target.writestr(entry.filename, content)
    with bounded(), pytest.raises(CheckpointError):
        release.read_state_dict(tmp_path / "b.pth")


def test_a_part_that_is_listed_over_and_over(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(250_000)}, tmp_path / "a.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the duplicate names
        with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            archive.filelist += [largest] * 60_000
            archive._didModify = True  # type: ignore[attr-defined]
    with bounded(), pytest.raises(CheckpointError, match="lists a part twice"):
        release.read_state_dict(tmp_path / "a.pth")


def test_names_by_the_ten_thousand(tmp_path: Path) -> None:
    state = {f"encoder.layers.{number}.0.fn.to_qkv.weight": torch.zeros(1) for number in range(release.MAX_TENSORS + 1)}
    for name in ("a.pth", "a.safetensors"):
        (torch.save if name.endswith("pth") else save_file)(state, tmp_path / name)
        with bounded(), pytest.raises(CheckpointError, match=f"{release.MAX_TENSORS + 1} tensors") as caught:
            release.load_release_autoencoder(tmp_path / name)
        assert len(str(caught.value)) < 500


def test_counting_names_is_quick() -> None:
    state = {f"encoder.layers.{number}.x": torch.zeros(1) for number in range(9_999)}
    started = time.monotonic()
    assert release.ReleaseState(state).count("encoder.layers.{}.") == 9_999
    assert release.ReleaseState({"a.0.x": torch.zeros(1), "a.2.x": torch.zeros(1)}).count("a.{}.") == 1
    assert time.monotonic() - started < 2


def test_sizes_of_one_tensor_are_compared_with_the_others_first(tmp_path: Path) -> None:
    """A wide patch embedding of 800 KB would make a model of terabytes."""
    state = autoencoder().state_dict()
    state["encoder.to_patch_embedding.weight"] = torch.zeros(200_000, 1)
    with bounded(), pytest.raises(CheckpointError, match="doesn't fit"):
        release.load_release_autoencoder(state, frames=2, resolution=8, num_heads=1)


DEEP = 10**7


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Autoencoder, {"depth": DEEP}),
        (Autoencoder, {"projection_depth": DEEP}),
        (Autoencoder, {"channels": DEEP}),
        (Autoencoder, {"frames": DEEP}),
        (Autoencoder, {"height": 4 * DEEP, "width": 4 * DEEP}),
        (Autoencoder, {"depth": "x"}),
        (Denoiser, {"num_res_blocks": DEEP}),
        (Denoiser, {"channel_mult": [1] * 10_000}),
        (Denoiser, {"channel_mult": [DEEP]}),
        (Denoiser, {"model_channels": 32 * DEEP}),
        (Denoiser, {"num_classes": DEEP}),
        (Denoiser, {"time": DEEP, "height": DEEP}),
    ],
)
def test_sizes_in_config_are_compared_with_the_weights(
    kind: type[Autoencoder] | type[Denoiser], change: dict[str, object], tmp_path: Path
) -> None:
    (autoencoder() if kind is Autoencoder else Denoiser(**UNET)).save_pretrained(tmp_path)
    release.load_model(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with bounded(), pytest.raises(CheckpointError) as caught:
        release.load_model(kind, tmp_path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_pipes_in_a_model_folder(name: str, tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with bounded(), pytest.raises(CheckpointError, match="is not a file"):
        release.load_model(Autoencoder, tmp_path)


def test_a_pickle_in_place_of_the_weights_is_not_looked_for(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        release.load_model(Autoencoder, tmp_path)
    assert SIZES["depth"] == 1


def test_weights_of_lpips_are_read_by_the_same_reader(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pth")
    with bounded(), pytest.raises(CheckpointError, match="fewer values"):
        load_lpips(str(tmp_path / "a.pth"))
