"""webdataset shards, written by the library and read by draw number, in any number of processes, from any draw."""

from __future__ import annotations

import builtins
import itertools
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data import films

from pvdm_fast.data import ClipDataset, DataError, make_loader, open_dataset
from pvdm_fast.data.clips import ShardClips
from pvdm_fast.data.shards import shard_order

wds = pytest.importorskip("webdataset", reason="needs webdataset: pip install webdataset")
SIZE = {"frames": 4, "height": 16, "width": 16}
VIDEOS = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty videos with a class each, four per shard, as the library writes them."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(VIDEOS):
        films.encode(folder / f"{number:02d}.mp4", films.frames(12, seed=number))
    with wds.ShardWriter(str(folder / "%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(VIDEOS):
            path = folder / f"{number:02d}.mp4"
            sample = {"__key__": f"clip{number:02d}", "mp4": path.read_bytes(), "cls": number % 3, "txt": "a square"}
            writer.write(sample)
            path.unlink()
    return folder


@pytest.fixture
def dataset(shards: Path) -> ClipDataset:
    return open_dataset(shards, **SIZE)


def videos(names: list[str]) -> list[str]:
    return [name.split("@")[0] for name in names]


def test_a_folder_and_a_pattern_are_the_same(shards: Path, dataset: ClipDataset) -> None:
    pattern = open_dataset(f"{shards}/{{0000..0004}}.tar", **SIZE)
    assert dataset.description == pattern.description
    assert f"webdataset: 5 shards, {len(dataset)} of {VIDEOS} videos in the train split" in dataset.description
    assert all(torch.equal(dataset[draw]["video"], pattern[draw]["video"]) for draw in range(8))
    one = open_dataset(shards / "0003.tar", **SIZE)
    assert {name.split("/")[0] for name in (one[draw]["name"] for draw in range(4))} == {"0003.tar"}


def test_clips_are_those_of_the_library(shards: Path, tmp_path: Path) -> None:
    """Each clip has the frames of the file that webdataset itself gives for its key."""
    dataset = open_dataset(shards, frames=4, height=48, width=64)
    samples = {s["__key__"]: s for s in wds.WebDataset([str(p) for p in sorted(shards.iterdir())], shardshuffle=False)}
    assert len(samples) == VIDEOS
    for draw in range(len(dataset)):
        item = dataset[draw]
        place, start = item["name"].split("@")
        sample = samples[place.split("/")[1].removesuffix(".mp4")]
        assert item["label"] == sample["cls"].decode()
        (tmp_path / "a.mp4").write_bytes(sample["mp4"])
        film = np.stack(films.decode_all(tmp_path / "a.mp4"))
        pixels = ((item["video"] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        assert (pixels == film[int(start) : int(start) + 4]).all()


def test_an_epoch_visits_each_video_and_both_splits_hold_all(shards: Path, dataset: ClipDataset) -> None:
    count = len(dataset)
    epochs = [videos([dataset[epoch * count + place]["name"] for place in range(count)]) for epoch in range(3)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    test = open_dataset(shards, **SIZE, split="test")
    held_out = set(videos([test[draw]["name"] for draw in range(len(test))]))
    assert held_out.isdisjoint(epochs[0]) and len(held_out) + count == VIDEOS


def test_the_order_stays_near() -> None:
    """At any time at most sixteen shards are begun and unfinished."""
    sizes = tuple(np.random.default_rng(0).integers(1, 9, 50).tolist())
    order = shard_order(sizes, 0, 0)
    assert sorted(order) == list(range(sum(sizes)))
    visited = np.repeat(np.arange(50), sizes)[order]
    spans = [np.flatnonzero(visited == shard)[[0, -1]] for shard in range(50)]
    assert max(sum(first <= place <= last for first, last in spans) for place in range(len(order))) <= 16


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 1)])
def test_after_resuming_no_clip_is_repeated_or_left_out(dataset: ClipDataset, world: int, workers: int) -> None:
    """Six clips per step: two steps of one process, then the rest of an epoch with other processes and workers."""
    whole = [dataset[draw]["name"] for draw in range(30)]
    found = [name for batch in itertools.islice(make_loader(dataset, batch_size=6), 2) for name in batch["names"]]
    loaders = [
        make_loader(dataset, batch_size=6 // world, start_draw=12, rank=rank, world=world, workers=workers)
        for rank in range(world)
    ]
    for batches in itertools.islice(zip(*loaders, strict=True), 3):
        found += [name for names in zip(*(batch["names"] for batch in batches), strict=True) for name in names]
    assert found == whole
    assert max(Counter(videos(found[: len(dataset)])).values()) == 1


def test_a_damaged_video_is_skipped_and_a_damaged_shard_is_named(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "%d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(6):
            video = films.encode(tmp_path / "a.mp4", films.frames(12, seed=number)).read_bytes()
            writer.write({"__key__": str(number), "mp4": b"no video" if number > 2 else video})
    (tmp_path / "a.mp4").unlink()
    dataset = open_dataset(tmp_path, **SIZE)
    assert isinstance(dataset, ShardClips)
    damaged = {video.place for video in dataset.videos if video.path.name == "1.tar"}
    assert damaged and all(re.fullmatch(rf"{tmp_path}/1\.tar/[345]\.mp4", place) for place in damaged)
    assert {path for draw in range(len(dataset)) for path, _ in dataset[draw]["skipped"]} == damaged
    os.truncate(tmp_path / "1.tar", 3000)
    with pytest.raises(DataError, match=r"1\.tar cannot be read.*fetch it again"):
        open_dataset(tmp_path, **SIZE)


def test_what_cannot_be_shards(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of the 7 shards of .* are not there, first .*0005\.tar"):
        open_dataset(f"{shards}/{{0000..0006}}.tar", **SIZE)
    with pytest.raises(DataError, match=r"shards must be files.*mount the bucket"):
        open_dataset("https://example.org/{0000..0006}.tar", **SIZE)
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "txt": "no video here"})
    with pytest.raises(DataError, match="no sample of the 1 shards"):
        open_dataset(tmp_path, **SIZE)


def test_without_the_library(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: object) -> object:
        if name.split(".")[0] == "webdataset":
            raise ImportError(name)
        return original(name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"need the package webdataset: pip install 'pvdm-fast\[webdataset\]'"):
        open_dataset(shards, **SIZE)
