"""Which videos a folder holds, and which of them belong to a split: the layout is detected, never configured.

Looked for in this order:

1. UCF-101: videos named ``v_<Class>_g01_c01.avi``; split by ``trainlist01.txt`` / ``testlist01.txt`` when they are in
   the folder, one level up, or in ``ucfTrainTestlist`` in either, else by a hash of class and group.
2. SkyTimelapse and alike: folders ``sky_train`` and ``sky_test``, or ``train`` and ``test``.
3. A folder of videos, at any depth.
4. A folder of frame folders, at any depth (or one folder of frames).

3 and 4 are split by a hash of the names. Frame folders are used where no video files are found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pvdm_fast.data.draws import is_held_out
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.frame_folders import IMAGE_SUFFIXES, natural_key

_SUFFIX_LIST = (
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m1v .m2ts .m2v .m4v .mj2 .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts"
    " .mxf .nut .ogg .ogv .rm .rmvb .ts .vob .webm .wmv .y4m .264 .265 .h264 .h265 .hevc"
)
VIDEO_SUFFIXES = frozenset(_SUFFIX_LIST.split())
SPLITS = ("train", "test")
SPLIT_FOLDERS = (("sky_train", "sky_test"), ("train", "test"))
UCF_NAME = re.compile(r"v_(?P<label>\w+)_g(?P<group>\d+)_c\d+$")


@dataclass(frozen=True)
class Video:
    """One video: a file, or a folder of frames. ``name`` is its path below the data folder, with forward slashes."""

    path: Path
    name: str
    is_folder: bool

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return str(self.path)

    @property
    def label(self) -> str | None:
        """The name of its class, where it is named as in UCF-101."""
        match = _ucf_name(self)
        return match["label"] if match else None


@dataclass(frozen=True)
class Found:
    """The videos of one split, in natural order of their names, and a sentence on what they are."""

    videos: list[Video]
    description: str


def find_videos(root: Path, split: str, usable: Callable[[Video], bool] = lambda video: True) -> Found:
    """The videos of a split ("train" or "test"). Raises :class:`DataError`, saying what was looked for, if none.

    ``usable`` tells whether a video can give clips; it is asked of a few only, so that a split by hash holds out one.
    """
    if split not in SPLITS:
        raise DataError(f'no split "{split}": choose "train" or "test"')
    if not root.exists():
        raise DataError(f"no such file or folder: {root}")
    if root.is_file():
        return Found([Video(root, root.name, False)], f"one video file, {root.name}, in both splits")
    videos = list_videos(root)
    if not videos:
        raise DataError(
            f"no videos in {root}: looked, at any depth, for video files ({_suffixes(VIDEO_SUFFIXES)}) and for folders "
            f"of frames ({_suffixes(IMAGE_SUFFIXES)}), laid out freely, as UCF-101 (<Class>/v_<Class>_g01_c01.avi), or "
            "as SkyTimelapse (sky_train/, sky_test/ or train/, test/)"
        )
    return (
        _split_ucf(root, videos, split, usable)
        or _split_by_folder(videos, split)
        or _split_by_hash(videos, [video.name for video in videos], "the names", split, usable)
    )


def list_videos(root: Path) -> list[Video]:
    """All video files below ``root``, or where there are none all folders with pictures, in natural order."""
    files: list[Video] = []
    folders: list[Video] = []
    for folder, names in _walk(root):
        kinds = {Path(name).suffix.lower() for name in names}
        files += [
            Video(folder / name, (folder / name).relative_to(root).as_posix(), False)
            for name in names
            if Path(name).suffix.lower() in VIDEO_SUFFIXES
        ]
        if kinds & IMAGE_SUFFIXES:
            name = folder.relative_to(root).as_posix()
            folders.append(Video(folder, root.name if name == "." else name, True))
    return sorted(files or folders, key=lambda video: (natural_key(video.name), video.name))


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below ``root`` with the names of their ordinary files; hidden ones left out, each real folder once."""
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != "." and name != "__MACOSX")
        here = Path(folder)
        yield here, [name for name in names if name[0] != "." and (here / name).is_file()]


def _suffixes(suffixes: frozenset[str]) -> str:
    return " ".join(sorted(suffixes))


def _kind(videos: list[Video]) -> str:
    if videos[0].is_folder:
        return "folder of frame folders"
    return "UCF-101 layout" if all(_ucf_name(video) for video in videos) else "folder of videos"


def _ucf_name(video: Video) -> re.Match[str] | None:
    return UCF_NAME.match(Path(video.name).stem)


def _count(number: int, what: str = "video") -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _split_by_hash(
    videos: list[Video], keys: list[str], of_what: str, split: str, usable: Callable[[Video], bool]
) -> Found:
    if len(set(keys)) == 1:
        return Found(videos, f"{_kind(videos)}: {_count(len(videos))}, in both splits")
    held_out = is_held_out(keys, lambda number: usable(videos[number]))
    chosen = [video for video, test in zip(videos, held_out, strict=True) if test == (split == "test")]
    return Found(
        chosen,
        f"{_kind(videos)}: {_count(len(chosen))} of {len(videos)} in the {split} split (by a hash of {of_what})",
    )


def _split_by_folder(videos: list[Video], split: str) -> Found | None:
    """The split by folder names, or None unless both folders of a pair hold videos."""
    for pair in SPLIT_FOLDERS:
        parts = {
            which: [video for video in videos if video.name.split("/")[0] == folder]
            for which, folder in zip(SPLITS, pair, strict=True)
        }
        if all(parts.values()):
            layout = "SkyTimelapse layout" if pair[0] == "sky_train" else f"{_kind(videos)} with splits"
            folder = pair[SPLITS.index(split)]
            return Found(parts[split], f"{layout}: {_count(len(parts[split]))} in the {split} split ({folder}/)")
    return None


def _split_ucf(root: Path, videos: list[Video], split: str, usable: Callable[[Video], bool]) -> Found | None:
    """The UCF-101 split, or None unless every file is named as in UCF-101."""
    matches = [_ucf_name(video) for video in videos]
    if videos[0].is_folder or not all(matches):
        return None
    lists = _find_ucf_lists(root)
    if lists is None:
        groups = [f"{match['label']}/{match['group']}" for match in matches if match]
        return _split_by_hash(
            videos, groups, "class and group; no trainlist01.txt, testlist01.txt found", split, usable
        )
    listed = _read_ucf_list(lists / f"{split}list01.txt")
    by_name = {Path(video.name).name: video for video in videos}
    chosen = [by_name[name] for name in listed if name in by_name]
    if not chosen:
        raise DataError(f"none of the {len(listed)} videos listed in {lists / f'{split}list01.txt'} are in {root}")
    missing = len(listed) - len(chosen)
    note = f"; {missing} listed but not there" if missing else ""
    return Found(
        chosen, f"UCF-101 layout: {_count(len(chosen))} of {len(videos)} in the {split} split ({split}list01.txt{note})"
    )


def _find_ucf_lists(root: Path) -> Path | None:
    root = root.absolute()
    for folder in (root, root / "ucfTrainTestlist", root.parent, root.parent / "ucfTrainTestlist"):
        if all((folder / f"{split}list01.txt").is_file() for split in SPLITS):
            return folder
    return None


def _read_ucf_list(path: Path) -> list[str]:
    """File names of a split file, whose lines are ``<Class>/<file>`` with, for training, a class number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the UCF-101 split file {path}: {error}") from error
    return [line.split()[0].rsplit("/", 1)[-1] for line in lines if line.strip()]
