"""What a folder is taken for, and who belongs to which split. Detection goes by names: the files here are empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvdm_fast.data.errors import DataError
from pvdm_fast.data.layouts import find_videos

UCF = [
    f"{label}/v_{label}_g{group:02}_c{clip:02}.avi"
    for label in ("Archery", "Bowling")
    for group in range(1, 9)
    for clip in (1, 2)
]
LISTED = {"trainlist01.txt": UCF[4:28], "testlist01.txt": UCF[:4]}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path, split: str) -> list[str]:
    return [video.name for video in find_videos(root, split).videos]


def write_lists(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, listed in LISTED.items():
        numbered = name.startswith("train")
        (folder / name).write_text("".join(f"{entry} 1\r\n" if numbered else f"{entry}\n" for entry in listed) + "\n")


@pytest.mark.parametrize("place", ["UCF-101", "UCF-101/ucfTrainTestlist", ".", "ucfTrainTestlist"])
def test_ucf101_with_its_split_files(tmp_path: Path, place: str) -> None:
    root = tmp_path / "UCF-101"
    touch(root, *UCF)
    write_lists(tmp_path / place)
    assert names(root, "train") == LISTED["trainlist01.txt"]
    assert names(root, "test") == LISTED["testlist01.txt"]
    found = find_videos(root, "train")
    assert "UCF-101" in found.description
    assert "24 videos of 32" in found.description


def test_ucf101_given_the_folder_above(tmp_path: Path) -> None:
    touch(tmp_path / "UCF-101", *UCF)
    write_lists(tmp_path / "ucfTrainTestlist")
    assert names(tmp_path, "test") == [f"UCF-101/{name}" for name in LISTED["testlist01.txt"]]


def test_ucf101_says_how_many_listed_videos_are_missing(tmp_path: Path) -> None:
    touch(tmp_path, *UCF[2:])
    write_lists(tmp_path)
    assert "2 listed but not there" in find_videos(tmp_path, "test").description
    (tmp_path / "testlist01.txt").write_text("Archery/v_Archery_g99_c01.avi\n")
    with pytest.raises(DataError, match="none of the 1 videos listed"):
        find_videos(tmp_path, "test")


def test_ucf101_without_split_files_keeps_groups_together(tmp_path: Path) -> None:
    touch(tmp_path, *UCF)
    train, test = names(tmp_path, "train"), names(tmp_path, "test")
    assert sorted(train + test) == sorted(UCF)
    assert not {name.rsplit("_", 1)[0] for name in train} & {name.rsplit("_", 1)[0] for name in test}
    assert "no trainlist01.txt" in find_videos(tmp_path, "train").description


def test_sky_timelapse(tmp_path: Path) -> None:
    for split, count in (("sky_train", 3), ("sky_test", 1)):
        for number in range(count):
            touch(tmp_path, *(f"{split}/film{number}/film{number}_1/{frame:05}.jpg" for frame in range(4)))
    assert names(tmp_path, "train") == [f"sky_train/film{number}/film{number}_1" for number in range(3)]
    assert names(tmp_path, "test") == ["sky_test/film0/film0_1"]
    assert "SkyTimelapse layout: 3 videos in the train split (sky_train/)" in find_videos(tmp_path, "train").description


def test_train_and_test_folders_of_videos(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "train/x/b.mp4", "test/c.mp4")
    assert names(tmp_path, "train") == ["train/a.mp4", "train/x/b.mp4"]
    assert names(tmp_path, "test") == ["test/c.mp4"]


def test_a_lone_train_folder_is_split_by_hash(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{number}.mp4" for number in range(5)))
    assert len(names(tmp_path, "train")) + len(names(tmp_path, "test")) == 5
    assert names(tmp_path, "test")


def test_videos_anywhere_below_and_hidden_ones_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "b10.mp4", "b9.MKV", "deep/er/c.webm", ".hidden.mp4", ".git/d.mp4", "__MACOSX/e.mp4", "notes.txt")
    touch(tmp_path, "deep/cover.jpg")
    found = names(tmp_path, "train") + names(tmp_path, "test")
    assert sorted(found) == ["b10.mp4", "b9.MKV", "deep/er/c.webm"]
    assert "folder of videos" in find_videos(tmp_path, "train").description


def test_frame_folders_and_a_single_one(tmp_path: Path) -> None:
    touch(tmp_path / "many", *(f"clip{clip}/{frame}.png" for clip in (10, 9) for frame in range(3)))
    assert sorted(names(tmp_path / "many", "train") + names(tmp_path / "many", "test")) == ["clip10", "clip9"]
    assert "frame folders" in find_videos(tmp_path / "many", "test").description
    one = tmp_path / "many" / "clip9"
    assert names(one, "train") == names(one, "test") == ["clip9"]
    assert find_videos(one, "train").videos[0].path == one


def test_a_link_that_leads_back_ends(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert names(tmp_path, "train") == ["a/x.mp4"]


def test_one_video_is_in_both_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    assert names(tmp_path, "train") == names(tmp_path, "test") == ["a.mp4"]
    assert names(tmp_path / "a.mp4", "train") == ["a.mp4"]
    assert "both splits" in find_videos(tmp_path, "test").description


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(DataError, match=r"no videos in .*\.mp4.*\.png.*UCF-101.*SkyTimelapse") as error:
        find_videos(tmp_path, "train")
    assert str(tmp_path) in str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere"):
        find_videos(tmp_path / "nowhere", "train")


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='"train" or "test"'):
        find_videos(tmp_path, "validation")
