"""Opens whatever ``--data`` names: clips, and their classes."""

from __future__ import annotations

from pathlib import Path

from pvdm_fast.data.clips import (
    SYNTHETIC,
    ClipDataset,
    ClipSpec,
    Crop,
    FolderClips,
    ShardClips,
    SyntheticClips,
    is_long_enough,
)
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.latents import LatentClips, is_latents, read_labels
from pvdm_fast.data.layouts import FIRST_FOLD, check_fold, find_all, find_videos
from pvdm_fast.data.listing import Video, list_folder
from pvdm_fast.data.shapes import KINDS
from pvdm_fast.data.shards import find_samples, has_videos, list_shards
from pvdm_fast.data.transforms import Resize
from pvdm_fast.jobs.reading import READ_TIMEOUT


def open_dataset(
    source: str | Path,
    *,
    frames: int,
    height: int,
    width: int,
    stride: int = 1,
    split: str = "train",
    seed: int = 0,
    flip: bool = False,
    read_timeout: float = READ_TIMEOUT,
    centred: bool = False,
    crop: Crop = "random",
    resize: Resize = "bicubic",
    pad_short: bool = False,
    fold: int = FIRST_FOLD,
) -> ClipDataset:
    """Clips from ``"synthetic:shapes"``, a folder (layout detected, see `pvdm_fast.data.layouts`) or one file.

    webdataset shards are named by a pattern (``shards/{0000..0099}.tar``) or their folder.

    A folder that ``python -m pvdm_fast.encode`` wrote gives latents: `pvdm_fast.data.latents.LatentClips`.

    ``stride`` is the step between the frames of a clip. ``flip`` mirrors half of the training clips. The test split
    holds other videos, cropped at the centre and never mirrored. ``centred`` does the same to training clips. The last
    four arguments are the release's ways, see `pvdm_fast.data.clips.ClipSpec`. A file
    that takes longer than ``read_timeout`` seconds (0: no limit) is skipped. `pvdm_fast.data.watch` says what that can
    interrupt. One clip is read to check the data: raises `DataError` if no video can be used.
    """
    spec = ClipSpec(
        frames, height, width, stride, split, seed, flip, read_timeout, centred, crop, resize, pad_short, fold
    )
    if str(source).startswith("synthetic:"):
        if str(source) != SYNTHETIC:
            raise DataError(f'no built-in data "{source}": there is "{SYNTHETIC}"')
        check_fold(fold, source)
        return SyntheticClips(spec)
    root = Path(source)
    if is_latents(root):
        return LatentClips(root, spec)

    def usable(video: Video) -> bool:
        return is_long_enough(video, spec)

    shards = _shards(source)
    if shards:
        check_fold(fold, source)
        dataset: FolderClips = ShardClips(root, find_samples(shards, split, usable), spec)
    else:
        dataset = FolderClips(root, find_videos(root, split, usable, fold), spec)
    dataset.read(0)
    return dataset


def _shards(source: str | Path) -> list[Path] | None:
    """The webdataset shards that the data consists of, or None.

    Archives next to videos, perhaps those that the videos were unpacked from, aren't shards. Raises DataError if both
    could be meant.
    """
    shards, root = list_shards(source), Path(source)
    if not shards or not root.is_dir():
        return shards
    files = [video for video in list_folder(root).videos if not video.is_folder]
    if not files:
        return shards
    try:
        samples = has_videos(shards)
    except DataError:  # damaged, or compressed
        return None
    if not samples:
        return None
    raise DataError(
        f"{root} holds both shards with videos ({len(shards)} .tar files, first {shards[0].name}) and video files "
        f"({len(files)}, first {files[0].name}): move one kind to a folder of its own, or name the shards by a pattern "
        f"such as {root}/{{a,b}}.tar"
    )


def find_classes(root: Path) -> list[str]:
    """The classes of the videos of ``root``, both splits, in alphabetical order, as UCF-101 numbers them. Or the
    classes of its cached latents, or the kinds of rendered scenes.

    Raises `DataError` unless every video is named as in UCF-101.
    """
    labels: set[str]
    if str(root) == SYNTHETIC:
        labels, nameless = set(KINDS), ""
    elif is_latents(root):
        labels = set(read_labels(root))
        nameless = "" if labels else "the latents"
    else:
        videos = find_all(root)
        labels = {video.label for video in videos if video.label is not None}
        nameless = next((video.name for video in videos if video.label is None), "")
    if nameless:
        raise DataError(
            f"no classes in {root}: they are read from names as in UCF-101, v_<Class>_g01_c01.avi, unlike {nameless}"
        )
    return sorted(labels, key=lambda label: (label.casefold(), label))
