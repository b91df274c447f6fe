"""What ``--data`` names, whatever it is: clips from it, and its classes."""

from __future__ import annotations

from pathlib import Path

from pvdm_fast.data.clips import (
    SYNTHETIC,
    ClipDataset,
    ClipSpec,
    FolderClips,
    ShardClips,
    SyntheticClips,
    is_long_enough,
)
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.latents import LatentClips, is_latents, read_labels
from pvdm_fast.data.layouts import Video, find_videos, list_videos
from pvdm_fast.data.shards import find_samples, list_shards
from pvdm_fast.data.watch import READ_TIMEOUT


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
) -> ClipDataset:
    """Clips from ``"synthetic:shapes"``, a folder (layout detected, see `pvdm_fast.data.layouts`) or one file.

    webdataset shards are named by a pattern (``shards/{0000..0099}.tar``) or their folder.

    A folder that ``python -m pvdm_fast.encode`` wrote gives latents: `pvdm_fast.data.latents.LatentClips`.

    ``stride`` is the step between the frames of a clip. ``flip`` mirrors half of the training clips. The test split
    holds other videos, cropped at the centre and never mirrored. Raises `DataError` when no video can be used;
    one clip is read to find out. A file that takes longer than ``read_timeout`` seconds (0: no limit) is skipped; see
    `pvdm_fast.data.watch` for what that can interrupt. ``centred``: training clips too are cropped at the centre
    and not mirrored.
    """
    spec = ClipSpec(frames, height, width, stride, split, seed, flip, read_timeout, centred)
    if str(source).startswith("synthetic:"):
        if str(source) != SYNTHETIC:
            raise DataError(f'no built-in data "{source}": there is "{SYNTHETIC}"')
        return SyntheticClips(spec)
    root = Path(source)
    if is_latents(root):
        return LatentClips(root, spec)

    def usable(video: Video) -> bool:
        return is_long_enough(video, spec)

    shards = list_shards(source)
    if shards:
        dataset: FolderClips = ShardClips(root, find_samples(shards, split, usable), spec)
    else:
        dataset = FolderClips(root, find_videos(root, split, usable), spec)
    dataset[0]
    return dataset


def find_classes(root: Path) -> list[str]:
    """The classes of all videos below ``root``, both splits, in alphabetical order, as UCF-101 numbers them; or those
    of its cached latents.

    Raises `DataError` unless every video is named as in UCF-101.
    """
    labels = set(read_labels(root)) if is_latents(root) else {video.label for video in list_videos(root)}
    if not labels or None in labels:
        raise DataError(f"no classes in {root}: they are read from names as in UCF-101, v_<Class>_g01_c01.avi")
    return sorted((label for label in labels if label), key=lambda label: (label.casefold(), label))
