"""What a folder holds: its videos, what is left out, and what couldn't be read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pvdm_fast.data.frame_folders import IMAGE_SUFFIXES, natural_key

_SUFFIX_LIST = (
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m1v .m2ts .m2v .m4v .mj2 .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts"
    " .mxf .nut .ogg .ogv .rm .rmvb .ts .vob .webm .wmv .y4m .264 .265 .h264 .h265 .hevc"
)
VIDEO_SUFFIXES = frozenset(_SUFFIX_LIST.split())
UCF_NAME = re.compile(r"v_(?P<label>\w+)_g(?P<group>\d+)_c\d+$")
RUN_FILES = ("metrics.jsonl", "trainer.lock", "results.json", "checkpoints")
NAMED = 3  # how many folders and kinds of files a sentence names


@dataclass(frozen=True)
class Video:
    """One video: a file, or a folder of frames. ``name`` is its path relative to the data folder, with forward
    slashes."""

    path: Path
    name: str
    is_folder: bool

    @property
    def place(self) -> str:
        """Its path, for messages."""
        return str(self.path)

    @property
    def ucf_name(self) -> re.Match[str] | None:
        """Class and group, if it is named as in UCF-101."""
        return UCF_NAME.match(Path(self.name).stem)

    @property
    def label(self) -> str | None:
        """The name of its class, if it is named as in UCF-101."""
        match = self.ucf_name
        return match["label"] if match else None


@dataclass
class Listing:
    """``videos`` in natural order of their names, folders that couldn't be read (with reasons), and the number of
    other things by kind ("run folder", ".txt file")."""

    videos: list[Video] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def unread_note(self) -> str:
        """The end of a sentence about folders that couldn't be read. Empty if there are none."""
        if not self.unread:
            return ""
        named = ", ".join(f"{name} ({reason})" for name, reason in list(self.unread.items())[:NAMED])
        more = f" and {len(self.unread) - NAMED} more" if len(self.unread) > NAMED else ""
        return (
            f"; {counted(len(self.unread), 'folder')} could not be listed, and what they hold is missing: {named}{more}"
        )

    def left_out(self) -> str:
        """What else is there, most frequent first. Empty if there is nothing."""
        kinds = [
            counted(number, kind) for kind, number in sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        ]
        return ", ".join(kinds[:NAMED]) + (f" and {len(kinds) - NAMED} more kinds" if len(kinds) > NAMED else "")


def counted(number: int, what: str = "video") -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def list_folder(root: Path) -> Listing:
    """All video files below ``root``, or all folders of pictures if there are more of those.

    Folders that this package wrote (runs, evaluations) are left out with everything in them, except ``root`` itself.
    """
    listing = Listing()
    files: list[Video] = []
    folders: dict[Video, int] = {}
    for folder, names in _walk(root, listing):
        kinds = Counter(Path(name).suffix.lower() for name in names)
        files += [
            Video(folder / name, (folder / name).relative_to(root).as_posix(), False)
            for name in names
            if Path(name).suffix.lower() in VIDEO_SUFFIXES
        ]
        pictures = sum(number for suffix, number in kinds.items() if suffix in IMAGE_SUFFIXES)
        if pictures:
            name = folder.relative_to(root).as_posix()
            folders[Video(folder, root.name if name == "." else name, True)] = pictures
        for suffix, number in kinds.items():
            if suffix not in IMAGE_SUFFIXES and suffix not in VIDEO_SUFFIXES:
                listing.others[f"{suffix or 'other'} file"] += number
    with_videos = {video.path.parent for video in files}
    films = [video for video, pictures in folders.items() if pictures > 1 and video.path not in with_videos]
    frames = len(films) > len(files)
    chosen = list(folders) if frames or not files else files
    if files and frames:
        listing.others["video file"] += len(files)
    elif files and folders:
        listing.others["picture folder"] += len(folders)
    listing.videos = sorted(chosen, key=lambda video: (natural_key(video.name), video.name))
    return listing


def _walk(root: Path, listing: Listing) -> Iterator[tuple[Path, list[str]]]:
    """Folders below ``root``, and the names of their ordinary files. Leaves out hidden ones, and visits each real
    folder once."""

    def note(place: str | Path, error: OSError) -> None:
        name = os.path.relpath(place, root)
        listing.unread[str(root) if name == "." else name] = error.strerror or str(error)

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=lambda error: note(error.filename, error)):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder above
            subfolders.clear()
            continue
        visited.add(real)
        here = Path(folder)
        if here != root and _is_own(names, subfolders):
            listing.others["run folder"] += 1
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if name[0] != "." and name != "__MACOSX")
        ordinary = []
        try:
            for name in names:
                if name[0] == ".":
                    continue
                if (here / name).is_file():
                    ordinary.append(name)
                else:
                    listing.others["broken link or device"] += 1
        except OSError as error:  # a folder that lists its names but not its files
            note(here, error)
            continue
        yield here, ordinary


def _is_own(names: list[str], subfolders: list[str]) -> bool:
    """Whether a folder is a run or an evaluation. Models made the videos in it."""
    here = {*names, *subfolders}
    run = "config.yaml" in here and not here.isdisjoint(RUN_FILES)
    return run or "evaluation.lock" in here or {"evaluation.json", "report.html"} <= here
