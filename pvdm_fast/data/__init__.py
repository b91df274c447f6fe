"""Clips of video for training: folders of videos or frames, UCF-101, SkyTimelapse, and rendered scenes."""

from __future__ import annotations

from pvdm_fast.data.clips import Batch, ClipDataset, Item, collate
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.loader import ClipLoader, make_loader
from pvdm_fast.data.sources import find_classes, open_dataset
from pvdm_fast.data.video_writer import open_video, video_grid, write_video

__all__ = [
    "Batch",
    "ClipDataset",
    "ClipLoader",
    "DataError",
    "Item",
    "collate",
    "find_classes",
    "make_loader",
    "open_dataset",
    "open_video",
    "video_grid",
    "write_video",
]
