"""How a folder is recognised, and which videos belong to which split. Only names count: the files here are empty."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pvdm_fast.data import find_classes, open_dataset
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


def test_ucf101_has_three_folds(tmp_path: Path) -> None:
    touch(tmp_path, *UCF)
    for fold in (1, 2, 3):
        held_out = UCF[4 * fold : 4 * fold + 4]
        listed = {"test": held_out, "train": [name for name in UCF if name not in held_out]}
        for split, found in listed.items():
            (tmp_path / f"{split}list{fold:02}.txt").write_text("\n".join(found))
    for fold in (1, 2, 3):
        found = find_videos(tmp_path, "test", fold=fold)
        assert [video.name for video in found.videos] == UCF[4 * fold : 4 * fold + 4]
        assert f"testlist{fold:02}.txt" in found.description
        assert len(find_videos(tmp_path, "train", fold=fold).videos) == len(UCF) - 4


def test_a_fold_that_the_data_lacks_is_refused(tmp_path: Path) -> None:
    """Nothing else may be taken for it: a fold's test videos are others' training videos."""
    touch(tmp_path, *UCF, "ucfTrainTestlist/notes.txt")
    write_lists(tmp_path / "ucfTrainTestlist")
    for source in (tmp_path, tmp_path / UCF[0], "synthetic:shapes"):
        with pytest.raises(DataError, match=r"no fold 2 of .*trainlist02.txt and testlist02.txt.*or take --fold 1"):
            open_dataset(source, frames=1, height=8, width=8, fold=2)
    with pytest.raises(DataError, match="fold must be one of 1, 2, 3, got 4"):
        open_dataset(tmp_path, frames=1, height=8, width=8, fold=4)


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


PAIRS = [
    ("train", "val"),
    ("Train", "Test"),
    ("training", "validation"),
    ("TRAIN", "valid"),
    ("sky_train", "sky_test"),
    ("train_256", "val_256"),
    ("kinetics400_train", "kinetics400_val"),
    ("train_set", "test-set"),
    ("train", "held_out"),
]


@pytest.mark.parametrize("above", ["", "kinetics/", "a/b/"])
@pytest.mark.parametrize(("train", "held_out"), PAIRS)
def test_folders_named_as_splits(tmp_path: Path, train: str, held_out: str, above: str) -> None:
    touch(tmp_path, *(f"{above}{train}/c{number}/a.mp4" for number in range(3)), f"{above}{held_out}/c0/a.mp4")
    assert names(tmp_path, "train") == [f"{above}{train}/c{number}/a.mp4" for number in range(3)]
    assert names(tmp_path, "test") == [f"{above}{held_out}/c0/a.mp4"]
    for split in ("train", "test"):
        said = find_videos(tmp_path, split).description
        assert f"3 videos in the train split ({above}{train}/)" in said
        assert f"1 video in the test split ({above}{held_out}/)" in said
        assert "hash" not in said


def test_validation_videos_are_in_neither_split_beside_a_test_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "val/b.mp4", "test/c.mp4", "d.mp4")
    assert (names(tmp_path, "train"), names(tmp_path, "test")) == (["train/a.mp4"], ["test/c.mp4"])
    assert "2 videos in neither (elsewhere, val/)" in find_videos(tmp_path, "train").description


def test_classes_that_sound_like_splits_are_none(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"{name}/{n}.mp4" for name in ("train", "bus", "trainers", "testing eggs", "value") for n in "ab")
    )
    assert "by a hash of the names" in find_videos(tmp_path, "train").description
    assert len(names(tmp_path, "train")) + len(names(tmp_path, "test")) == 10


def test_split_folders_of_ucf_come_before_the_hash(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}" for name in UCF[4:]), *(f"test/{name}" for name in UCF[:4]))
    assert names(tmp_path, "test") == [f"test/{name}" for name in UCF[:4]]


def test_a_stray_file_leaves_the_official_lists_in_force(tmp_path: Path) -> None:
    touch(tmp_path, *UCF, "intro.mp4")
    write_lists(tmp_path)
    assert names(tmp_path, "train") == LISTED["trainlist01.txt"]
    said = find_videos(tmp_path, "train").description
    assert "24 videos of 33" in said and "5 other videos in neither list, left out" in said
    assert find_classes(tmp_path) == ["Archery", "Bowling"]


def test_official_lists_name_converted_videos_and_each_once(tmp_path: Path) -> None:
    touch(tmp_path, *(name.replace(".avi", ".mp4") for name in UCF))
    write_lists(tmp_path)
    (tmp_path / "testlist01.txt").write_text(f"{UCF[0]}\n" * 60_000)
    assert names(tmp_path, "test") == [UCF[0].replace(".avi", ".mp4")]


def test_lists_of_other_data_are_not_applied(tmp_path: Path) -> None:
    write_lists(tmp_path)
    touch(tmp_path / "mine", "a.mp4", "b.mp4", "c.mp4")
    assert "by a hash" in find_videos(tmp_path / "mine", "train").description


def test_a_stray_file_leaves_groups_together(tmp_path: Path) -> None:
    touch(tmp_path, *UCF, "intro.mp4")
    train, test = names(tmp_path, "train"), names(tmp_path, "test")
    assert not {name.rsplit("_", 1)[0] for name in train} & {name.rsplit("_", 1)[0] for name in test}
    with pytest.raises(DataError, match=r"unlike intro\.mp4"):
        find_classes(tmp_path)


def test_runs_and_evaluations_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "config.yaml")
    touch(
        tmp_path,
        *(f"runs/1/{name}" for name in ("config.yaml", "trainer.lock", "samples.mp4", "x/clip.mp4", "grid.png")),
    )
    touch(tmp_path, *(f"ev/{name}" for name in ("evaluation.json", "report.html", "statistics/clip-1.mp4")))
    assert sorted(names(tmp_path, "train") + names(tmp_path, "test")) == ["a.mp4", "b.mp4"]
    assert find_videos(tmp_path, "train").left_out == "2 run folders, 1 .yaml file"
    assert names(tmp_path / "runs" / "1" / "x", "train") == ["clip.mp4"], "named by itself it is taken"


def test_what_lies_beside_the_videos_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.txt", "d.txt", "e.json", "thumbs/1.jpg")
    (tmp_path / "f.mp4").symlink_to("nowhere.mp4")
    found = find_videos(tmp_path, "train")
    assert found.left_out == "2 .txt files, 1 .json file, 1 broken link or device and 1 more kinds"


def test_one_stray_video_does_not_hide_the_frame_folders(tmp_path: Path) -> None:
    touch(tmp_path, "preview.mp4", *(f"clip{clip}/{frame}.png" for clip in range(4) for frame in range(3)))
    found = names(tmp_path, "train") + names(tmp_path, "test")
    assert sorted(found) == [f"clip{clip}" for clip in range(4)]
    assert find_videos(tmp_path, "test").left_out == "1 video file"


@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """root can read everything, so the system's answer is faked."""
    touch(tmp_path, "open/a.mp4", "open/b.mp4", "closed/c.mp4")
    scandir, is_file = os.scandir, Path.is_file

    def refuse(path: object, *rest: Any) -> Any:
        if mode == 0 and str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path, *rest)  # type: ignore[call-overload]

    def refuse_file(path: Path) -> bool:
        if mode and path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(Path, "is_file", refuse_file)
    for split in ("train", "test"):
        said = find_videos(tmp_path, split).description
        assert "1 folder could not be listed" in said and "closed (Permission denied)" in said


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe or a device"):
        find_videos(tmp_path / "pipe", "train")
