"""Clips from folders depend on the draw number alone, have the right content, and survive bad files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data import films
from PIL import Image

from pvdm_fast.data import ClipDataset, DataError, collate, open_dataset
from pvdm_fast.data.clips import FolderClips

SIZE = {"frames": 4, "height": 24, "width": 32}


def as_pixels(video: torch.Tensor) -> np.ndarray:
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def test_items_and_batches(video_folder: Path) -> None:
    dataset = open_dataset(video_folder, **SIZE, flip=True)
    items = [dataset[draw] for draw in range(7)]
    for item in items:
        assert item["video"].shape == (3, 4, 24, 32)
        assert item["video"].dtype == torch.float32
        assert item["video"].is_contiguous()
        assert -1 <= item["video"].min() < item["video"].max() <= 1
        assert item["skipped"] == []
    batch = collate(items)
    assert batch["video"].shape == (7, 3, 4, 24, 32)
    assert batch["names"] == [item["name"] for item in items]
    assert dataset.description.startswith("folder of videos")


def test_a_draw_alone_decides_the_clip(video_folder: Path) -> None:
    first, second = (open_dataset(video_folder, **SIZE, flip=True) for _ in range(2))
    forward = [first[draw] for draw in range(12)]
    backward = [second[draw] for draw in reversed(range(12))][::-1]
    for left, right in zip(forward, backward, strict=True):
        assert left["name"] == right["name"]
        assert torch.equal(left["video"], right["video"])


def test_an_epoch_visits_each_video_and_epochs_differ(video_folder: Path) -> None:
    dataset = open_dataset(video_folder, **SIZE)
    count = len(dataset)
    epochs = [[dataset[epoch * count + place]["name"] for place in range(count)] for epoch in range(3)]
    for epoch in epochs:
        assert len({name.split("@")[0] for name in epoch}) == count
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_another_seed_draws_other_clips(video_folder: Path) -> None:
    left, right = (open_dataset(video_folder, **SIZE, seed=seed) for seed in (0, 1))
    assert [left[draw]["name"] for draw in range(8)] != [right[draw]["name"] for draw in range(8)]


def test_splits_share_no_video(video_folder: Path) -> None:
    parts = [open_dataset(video_folder, **SIZE, split=split) for split in ("train", "test")]
    train, test = ({part[draw]["name"].split("@")[0] for draw in range(len(part))} for part in parts)
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_clip_holds_the_frames_its_name_says(tmp_path: Path, stride: int) -> None:
    film = films.frames(20, 24, 32)
    path = films.encode(tmp_path / "film.mkv", film, "libx264", bframes=2)
    whole = films.decode_all(path)
    dataset = open_dataset(path, **SIZE, stride=stride, split="test")
    for draw in range(6):
        item = dataset[draw]
        start = int(item["name"].split("@")[1])
        assert (as_pixels(item["video"]) == np.stack(whole[start : start + 3 * stride + 1 : stride])).all()


def test_only_training_clips_are_mirrored_and_shifted(tmp_path: Path) -> None:
    film = films.frames(4, 24, 64)
    path = films.encode(tmp_path / "wide.mkv", film)
    whole = np.stack(films.decode_all(path))
    test = open_dataset(path, **SIZE, split="test", flip=True)
    for draw in range(5):
        assert (as_pixels(test[draw]["video"]) == whole[:, :, 16:48]).all()
    train = open_dataset(path, **SIZE, flip=True)
    views = {as_pixels(train[draw]["video"]).tobytes() for draw in range(40)}
    crops = [whole[:, :, left : left + 32] for left in range(33)]
    allowed = {crop.tobytes() for crop in crops} | {np.ascontiguousarray(crop[:, :, ::-1]).tobytes() for crop in crops}
    assert views <= allowed
    assert len(views) > 20
    unmirrored = {as_pixels(open_dataset(path, **SIZE)[draw]["video"]).tobytes() for draw in range(20)}
    assert unmirrored <= {crop.tobytes() for crop in crops}


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 17), (20, 90), (97, 61)])
def test_any_size_from_odd_and_small_videos(tmp_path: Path, height: int, width: int) -> None:
    folder = tmp_path / "odd"
    for number in range(4):
        (folder).mkdir(exist_ok=True)
        picture = films.frames(4, 15, 13)[number] if number else films.frames(1, 15, 13)[0]
        Image.fromarray(picture).save(folder / f"{number}.png")
    item = open_dataset(folder, frames=4, height=height, width=width)[0]
    assert item["video"].shape == (3, 4, height, width)


def test_resizing_keeps_shapes_and_smooths(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:200, :300]
    disc = ((rows - 100) ** 2 + (columns - 150) ** 2 < 60**2) * np.uint8(255)
    checkers = ((rows + columns) % 2 * 255).astype(np.uint8)  # too fine to be visible at a quarter of the size
    for name, plane in (("disc", disc), ("checkers", checkers)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(plane).save(tmp_path / name / f"{number}.png")
    size = {"frames": 2, "height": 50, "width": 50, "split": "test"}
    small = open_dataset(tmp_path / "disc", **size)[0]["video"][0, 0] > 0
    assert small.any(0).sum() == small.any(1).sum() == 30
    assert open_dataset(tmp_path / "checkers", **size)[0]["video"].abs().max() < 0.1


def picture_folder(folder: Path, film: np.ndarray) -> Path:
    folder.mkdir()
    for number, picture in enumerate(film):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(("height", "width"), [(15, 20), (21, 16)])
def test_the_release_s_crop_and_resizing(tmp_path: Path, height: int, width: int) -> None:
    """The square in the middle, its odd pixel below or right, in float32 and not antialiased; then 8 bits."""
    film = films.frames(2, height, width)
    source = picture_folder(tmp_path / "film", film)
    dataset = open_dataset(source, frames=2, height=6, width=6, crop="centre", resize="bilinear")
    side, video = min(height, width), torch.from_numpy(film).permute(0, 3, 1, 2).float()
    top, left = (height - side) // 2, (width - side) // 2
    square = video[:, :, top : top + side, left : left + side]
    expected = torch.nn.functional.interpolate(square, size=6, mode="bilinear", align_corners=False)
    for draw in range(4):
        found = as_pixels(dataset[draw]["video"])
        assert np.abs(found - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.501
    antialiased = as_pixels(open_dataset(source, frames=2, height=6, width=6, crop="centre")[0]["video"])
    assert (antialiased != found).any()
    with pytest.raises(DataError, match="crop must be one of random, centre, got 'left'"):
        open_dataset(source, frames=2, height=6, width=6, crop="left")  # type: ignore[arg-type]


def test_short_videos_are_padded_with_black(tmp_path: Path) -> None:
    film = films.frames(7, 24, 32)
    source = picture_folder(tmp_path / "film", film)
    dataset = open_dataset(source, **{**SIZE, "frames": 8}, pad_short=True)
    starts = set()
    for draw in range(20):
        item = dataset[draw]
        starts.add(start := int(item["name"].split("@")[1]))
        assert (item["video"][:, :4] == -1).all()
        assert (as_pixels(item["video"])[4:] == film[start : start + 4]).all()
    assert starts == {0, 1, 2, 3}
    whole = open_dataset(source, **{**SIZE, "frames": 6}, pad_short=True)[0]
    assert (as_pixels(whole["video"]) == film[int(whole["name"][-1]) :][:6]).all(), "long enough"
    for frames, pad_short, needed in ((8, False, 8), (16, True, 8)):
        with pytest.raises(DataError, match=f"too short: 7 frames, a clip needs {needed}"):
            open_dataset(source, **{**SIZE, "frames": frames}, pad_short=pad_short)


def test_a_short_video_lowers_the_stride_first(tmp_path: Path) -> None:
    path = films.encode(tmp_path / "ten.mkv", films.frames(10, 24, 32))
    whole = films.decode_all(path)
    item = open_dataset(path, **SIZE, stride=8, split="test")[0]
    assert item["name"] == "ten.mkv@0"
    assert (as_pixels(item["video"]) == np.stack(whole[0:10:3])).all()


def bad_files(folder: Path, good: Path) -> list[str]:
    (folder / "text.mp4").write_text("this is no video\n" * 30)
    (folder / "empty.avi").touch()
    (folder / "truncated.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    films.encode(folder / "one frame.mp4", films.frames(1))
    return ["text.mp4", "empty.avi", "truncated.mp4", "one frame.mp4"]


def test_bad_files_are_skipped_and_named_and_good_ones_take_their_place(tmp_path: Path, video_folder: Path) -> None:
    bad = bad_files(tmp_path, video_folder / "a.mp4")
    for number in range(8):
        shutil.copy(video_folder / "a.mp4", tmp_path / f"good{number}.mp4")
    parts = [open_dataset(tmp_path, **SIZE, split=split) for split in ("train", "test")]
    reasons: dict[str, str] = {}
    for part in parts:
        for draw in range(len(part)):
            item = part[draw]
            assert item["name"].startswith("good")
            reasons.update(item["skipped"])
    held = {video.name for part in parts for video in part.videos if isinstance(part, FolderClips)}
    assert {Path(path).name for path in reasons} == set(bad) <= held
    assert reasons[str(tmp_path / "one frame.mp4")] == "too short: 1 frame, a clip needs 4"
    assert "cannot be opened" in reasons[str(tmp_path / "text.mp4")]


def test_nothing_usable_is_an_error_that_names_the_files(tmp_path: Path, video_folder: Path) -> None:
    bad_files(tmp_path, video_folder / "a.mp4")
    with pytest.raises(DataError, match=r"no usable video in .*folder of videos.*Tried: .*: (too short|cannot)"):
        open_dataset(tmp_path, **SIZE)


def test_a_folder_emptied_during_training_is_an_error_not_a_crash(tmp_path: Path, video_folder: Path) -> None:
    shutil.copy(video_folder / "a.mp4", tmp_path / "a.mp4")
    dataset = open_dataset(tmp_path, **SIZE)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DataError, match="no usable video"):
        dataset[3]


def test_videos_whose_time_stamps_mislead_give_clips_too(tmp_path: Path) -> None:
    path = films.encode(tmp_path / "film.avi", films.frames(30, 24, 32), "libx264", bframes=2)
    whole = films.decode_all(path)
    dataset = open_dataset(path, **SIZE, split="test")
    for draw in range(4):
        item = dataset[draw]
        start = int(item["name"].split("@")[1])
        assert item["skipped"] == []
        assert (as_pixels(item["video"]) == np.stack(whole[start : start + 4])).all()


def test_frame_folders_give_the_same_clips_as_their_video(tmp_path: Path) -> None:
    film = films.frames(12, 24, 32)
    for number, picture in enumerate(film):
        (tmp_path / "clip").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "clip" / f"{number}.png")
    item = open_dataset(tmp_path / "clip", **SIZE, split="test")[2]
    start = int(item["name"].split("@")[1])
    assert (as_pixels(item["video"]) == film[start : start + 4]).all()


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"height": 0}, {"width": -1}, {"stride": 0}, {"split": "val"}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        open_dataset("synthetic:shapes", **{**SIZE, **wrong})


def test_draws_begin_at_zero(video_folder: Path) -> None:
    datasets: list[ClipDataset] = [open_dataset(source, **SIZE) for source in (video_folder, "synthetic:shapes")]
    for dataset in datasets:
        with pytest.raises(IndexError, match="begin at 0"):
            dataset[-1]
