"""Which videos of a folder belong to a split. The layout is detected, never configured.

These are tried in order:

1. The official lists of UCF-101, ``trainlist01.txt`` and ``testlist01.txt`` (02, 03 for the other two folds), in the
   folder, one level up, or in ``ucfTrainTestlist`` in either. They apply to the videos that they name.
2. Folders named as splits side by side, at any depth and in any case: ``train`` and ``test``, ``val`` or the like.
3. A hash of the names. For videos named like ``v_<Class>_g01_c01.avi``, a hash of class and group.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pvdm_fast.data.draws import is_held_out
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.frame_folders import IMAGE_SUFFIXES
from pvdm_fast.data.listing import NAMED, VIDEO_SUFFIXES, Listing, Video, counted, list_folder
from pvdm_fast.jobs.reading import UnreadableFile, read_text

SPLITS = ("train", "test")
FOLDS = (1, 2, 3)  # of UCF-101
FIRST_FOLD = FOLDS[0]
LIST_BYTES = 64 << 20
# "val", "Training_set", "sky_test", "train_256": a split's name, and what commonly surrounds it.
_SPLIT_NAME = re.compile(
    r"(?:(?:sky|kinetics\d*|k[467]00|ucf(?:101)?|videos?|clips?|frames?)[_\- ]?)?"
    r"(?:(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?)"
    r"|(?P<val>val(?:id(?:ation)?)?|eval(?:uation)?|dev|held[_\- ]?out))"
    r"(?:[_\- ]?(?:set|split|videos?|clips?|frames?|data))?(?:[_\- ]?\d+(?:x\d+)?p?)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Found:
    """The videos of one split in natural order of their names, a sentence about them, and what else is there."""

    videos: list[Video]
    description: str
    left_out: str = ""


def find_videos(
    root: Path, split: str, usable: Callable[[Video], bool] = lambda video: True, fold: int = FIRST_FOLD
) -> Found:
    """The videos of a split ("train" or "test"). If there are none, raises `DataError` that says what was looked for.

    ``usable`` tells whether a video can give clips. It is called for only a few, to make sure that a split by hash
    holds out a usable one. ``fold`` says which of UCF-101's three pairs of lists; another one than the first must be
    there.
    """
    if split not in SPLITS:
        raise DataError(f'no split "{split}": choose "train" or "test"')
    if not root.exists():
        raise DataError(f"no such file or folder: {root}")
    if root.is_file():
        check_fold(fold, root)
        return Found([Video(root, root.name, False)], f"one video file, {root.name}, in both splits")
    if not root.is_dir():
        raise DataError(f"{root} is a pipe or a device: name a folder of videos, or a file")
    listing = list_folder(root)
    if not listing.videos:
        raise DataError(
            f"no videos in {root}: looked, at any depth, for video files ({_suffixes(VIDEO_SUFFIXES)}) and for folders "
            f"of frames ({_suffixes(IMAGE_SUFFIXES)}), laid out freely, as UCF-101 (<Class>/v_<Class>_g01_c01.avi), or "
            f"as SkyTimelapse and Kinetics (train/ and test/ or val/){_found_instead(listing)}"
        )
    found = _split_by_lists(root, listing.videos, split, fold)
    if found is None:
        check_fold(fold, root)
        found = _split_by_folders(listing.videos, split) or _split_by_hash(listing.videos, split, usable)
    return replace(found, description=found.description + listing.unread_note(), left_out=listing.left_out())


def check_fold(fold: int, source: str | Path) -> None:
    """Raises `DataError` for another fold than the first, of data that UCF-101's lists don't split."""
    if fold != FIRST_FOLD:
        raise DataError(
            f"there is no fold {fold} of {source}: folds are UCF-101's, by its lists {_list_name('train', fold)} and "
            f"{_list_name('test', fold)} beside the videos or in ucfTrainTestlist/; put them there, or take --fold 1"
        )


def find_all(root: Path) -> list[Video]:
    """The videos of both splits."""
    return list({video: None for split in SPLITS for video in find_videos(root, split).videos})


def _found_instead(listing: Listing) -> str:
    there = listing.left_out()
    return (f"; there: {there}" if there else "") + listing.unread_note()


def _suffixes(suffixes: frozenset[str]) -> str:
    return " ".join(sorted(suffixes))


def _kind(videos: list[Video]) -> str:
    if videos[0].is_folder:
        return "folder of frame folders"
    return "UCF-101 layout" if all(video.ucf_name for video in videos) else "folder of videos"


def _split_by_hash(videos: list[Video], split: str, usable: Callable[[Video], bool]) -> Found:
    """Holds out about a tenth. Clips cut from one UCF-101 recording stay together, whatever lies next to them."""
    matches = [None if video.is_folder else video.ucf_name for video in videos]
    keys = [
        f"{match['label']}/{match['group']}" if match else video.name
        for match, video in zip(matches, videos, strict=True)
    ]
    of_what = "class and group; no trainlist01.txt, testlist01.txt found" if any(matches) else "the names"
    if len(set(keys)) == 1:
        return Found(videos, f"{_kind(videos)}: {counted(len(videos))}, in both splits")
    held_out = is_held_out(keys, lambda number: usable(videos[number]))
    chosen = [video for video, test in zip(videos, held_out, strict=True) if test == (split == "test")]
    return Found(
        chosen,
        f"{_kind(videos)}: {counted(len(chosen))} of {len(videos)} in the {split} split (by a hash of {of_what})",
    )


def _role(folder: str) -> str | None:
    """ "train", "test" or "val" for the name of a split's folder."""
    match = _SPLIT_NAME.fullmatch(folder)
    return match.lastgroup if match else None


def _split_by_folders(videos: list[Video], split: str) -> Found | None:
    """The split by folder names. None unless a training folder and a held-out one lie side by side, both with videos.

    If there are both a test and a validation folder, the validation videos belong to neither split.
    """
    folders = [video.name.split("/") if video.is_folder else video.name.split("/")[:-1] for video in videos]
    beside: dict[tuple[str, ...], set[str]] = {}
    for parts in folders:
        for depth, part in enumerate(parts):
            if role := _role(part):
                beside.setdefault(tuple(parts[:depth]), set()).add(role)
    parents = {parent: roles for parent, roles in beside.items() if "train" in roles and len(roles) > 1}
    if not parents:
        return None
    members: dict[str, list[Video]] = {"train": [], "test": [], "": []}
    names: dict[str, dict[str, None]] = {which: {} for which in members}
    for video, parts in zip(videos, folders, strict=True):
        place = next((number for number in range(len(parts)) if tuple(parts[:number]) in parents), None)
        which, name = "", "elsewhere"
        if place is not None:
            name, role = "/".join(parts[: place + 1]) + "/", _role(parts[place])
            if role == "val" and "test" not in parents[tuple(parts[:place])]:
                role = "test"
            which = role if role in SPLITS else ""
        members[which].append(video)
        names[which][name] = None
    is_sky = any(name.rpartition("/")[2].lower().startswith("sky_") for name in (n[:-1] for n in names[split]))
    layout = "SkyTimelapse layout" if is_sky else f"{_kind(videos)} with splits"
    other = SPLITS[1 - SPLITS.index(split)]
    counts = [f"{counted(len(members[which]))} in the {which} split ({_few(names[which])})" for which in (split, other)]
    if members[""]:
        counts.append(f"{counted(len(members['']))} in neither ({_few(names[''])})")
    return Found(members[split], f"{layout}: {'; '.join(counts)}")


def _few(names: dict[str, None]) -> str:
    return ", ".join(list(names)[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _list_name(split: str, fold: int) -> str:
    return f"{split}list{fold:02}.txt"


def _split_by_lists(root: Path, videos: list[Video], split: str, fold: int) -> Found | None:
    """The official split of the videos that UCF-101's lists name. None without lists, or if they name no video
    here."""
    folder = _find_lists(root, fold)
    if folder is None:
        return None
    listed = {which: _read_list(folder / _list_name(which, fold)) for which in SPLITS}
    by_stem: dict[str, list[Video]] = {}
    for video in videos:
        by_stem.setdefault(Path(video.name).stem, []).append(video)
    if by_stem.keys().isdisjoint({*listed["train"], *listed["test"]}) and not any(video.ucf_name for video in videos):
        return None  # the lists belong to other data next to it
    wanted = [name for name in listed[split] if split == "test" or name not in listed["test"]]
    chosen = [video for name in wanted for video in by_stem.get(name, [])]
    if not chosen:
        raise DataError(
            f"none of the {len(wanted)} videos listed in {folder / _list_name(split, fold)} are in {root}: take the "
            "lists away to split by folders or by a hash"
        )
    missing = sum(name not in by_stem for name in wanted)
    either = listed["train"].keys() | listed["test"].keys()
    others = sum(len(found) for name, found in by_stem.items() if name not in either)
    notes = [_list_name(split, fold)]
    if missing:
        notes.append(f"{missing} listed but not there")
    if others:
        notes.append(f"{counted(others, 'other video')} in neither list, left out")
    return Found(
        chosen, f"UCF-101 layout: {counted(len(chosen))} of {len(videos)} in the {split} split ({'; '.join(notes)})"
    )


def _find_lists(root: Path, fold: int) -> Path | None:
    root = root.absolute()
    for folder in (root, root / "ucfTrainTestlist", root.parent, root.parent / "ucfTrainTestlist"):
        if all((folder / _list_name(split, fold)).is_file() for split in SPLITS):
            return folder
    return None


def _read_list(path: Path) -> dict[str, None]:
    """Names of a split file without suffixes, each once, in the file's order.

    Its lines are ``<Class>/<file>``, for training followed by a class number. Suffixes don't count, because the videos
    may have been converted.
    """
    try:
        lines = read_text(path, LIST_BYTES).splitlines()
    except (OSError, UnreadableFile) as error:
        raise DataError(f"cannot read the UCF-101 split file {path}: {error}") from error
    return {Path(line.split()[0].rsplit("/", 1)[-1]).stem: None for line in lines if line.strip()}
