"""Datasets of clips. ``dataset[draw]`` depends on the draw number alone, for any draw >= 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, get_args

import numpy as np
import torch

from pvdm_fast.data.draws import BELOW_THE_MIDDLE, View, Window, draw_window, epoch_order, generator
from pvdm_fast.data.errors import DataError, UnreadableVideo
from pvdm_fast.data.frame_folders import list_frames, read_picture
from pvdm_fast.data.layouts import FIRST_FOLD, FOLDS, Found
from pvdm_fast.data.listing import Video
from pvdm_fast.data.shapes import RECIPE, draw_scene
from pvdm_fast.data.shards import Sample, read_video, shard_order
from pvdm_fast.data.transforms import Resize, fit, to_float, to_pixels
from pvdm_fast.data.video_reader import IndexCache, IndexMismatch, Source, counted_index, packet_index, read_frames
from pvdm_fast.data.watch import TooSlow, reading
from pvdm_fast.jobs.reading import READ_TIMEOUT

SYNTHETIC = "synthetic:shapes"
SYNTHETIC_LENGTH = {"train": 4096, "test": 256}
NAMED_FAILURES = 5

Crop = Literal["random", "centre"]
Skipped = list[tuple[str, str]]
State = tuple[int, int, int] | None  # of a file, see _state


class Item(TypedDict):
    """One clip: pixels, where it comes from, its class, and files that were skipped.

    ``video`` is float32 (3, frames, height, width) in [-1, 1], or uint8 pixels from `ClipDataset.read`. Of cached
    latents it is float32 (windows, D, N), see `LatentClips`. ``name`` holds file and start frame, ``label`` the name of
    its class, and ``skipped`` the files that were skipped, with reasons.
    """

    video: torch.Tensor
    name: str
    label: str | None
    skipped: Skipped


class Batch(TypedDict):
    """Clips of one size.

    ``video`` is float32 (B, 3, frames, height, width) in [-1, 1], or uint8 pixels if the loader was asked for them. Of
    cached latents it is (B, windows, D, N).
    """

    video: torch.Tensor
    names: list[str]
    labels: list[str | None]
    skipped: Skipped


@dataclass(frozen=True)
class ClipSpec:
    """The size of clips, the step between their frames, and how they are drawn.

    ``crop``: where training clips are cut out; the release's "centre" rounds down, that of the test split up.
    ``resize``: see `pvdm_fast.data.transforms.fit`. ``pad_short``: a video of at least half the frames gives black ones
    and then half of them. ``fold``: of UCF-101. Rendered scenes need neither cropping, resizing nor padding.
    """

    frames: int
    height: int
    width: int
    stride: int = 1
    split: str = "train"
    seed: int = 0
    flip: bool = False
    read_timeout: float = READ_TIMEOUT
    centred: bool = False
    crop: Crop = "random"
    resize: Resize = "bicubic"
    pad_short: bool = False
    fold: int = FIRST_FOLD

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "stride"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.split not in SYNTHETIC_LENGTH:
            raise DataError(f'no split "{self.split}": choose "train" or "test"')
        if self.read_timeout < 0:
            raise DataError(f"read_timeout must be at least 0 seconds, got {self.read_timeout:g}")
        for name, known in (("crop", get_args(Crop)), ("resize", get_args(Resize)), ("fold", FOLDS)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")

    @property
    def shortest(self) -> int:
        """How many frames a video must have."""
        return self.frames // 2 if self.pad_short else self.frames

    def draw_view(self, rng: np.random.Generator) -> View:
        """Which part of its frames a clip shows, and whether it is mirrored."""
        drawn = self.split == "train" and not self.centred
        view = View.draw(rng, flip=self.flip) if drawn else View()
        return replace(view, down=BELOW_THE_MIDDLE, right=BELOW_THE_MIDDLE) if self.crop == "centre" else view


class ClipDataset(torch.utils.data.Dataset[Item], ABC):
    """Clips by draw number. ``len`` is the number of videos: one epoch. Later draws continue with the next epoch.

    ``description`` says what was found: the layout, how many videos, the split. ``left_out`` says what else is there.
    """

    spec: ClipSpec
    description: str
    left_out: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, draw: int) -> Item: ...

    def read(self, draw: int) -> Item:
        """The clip as it travels from a worker. Pixels are 8-bit, a quarter of the bytes.

        `pvdm_fast.data.transforms.to_float` turns it into ``dataset[draw]``.
        """
        return self[draw]

    def set_aside(self, file: str, reason: str) -> None:
        """Skip a file from now on, as if it had been found unreadable for ``reason``."""


class PixelClips(ClipDataset):
    """Clips whose `read` gives 8-bit pixels."""

    @abstractmethod
    def read(self, draw: int) -> Item: ...

    def __getitem__(self, draw: int) -> Item:
        item = self.read(draw)
        return {**item, "video": to_float(item["video"])}


class FolderClips(PixelClips):
    """Clips from videos on disk.

    A permutation seeded by (seed, epoch) picks the video. (seed, draw) picks window, crop and mirroring. If a video
    can't give a clip, the item records it, and the next video of the permutation takes its place. If it can give no
    clip at all (it can't be opened, or is too short), it isn't opened again until it changes on the disk.
    """

    def __init__(self, root: Path, found: Found, spec: ClipSpec) -> None:
        self.root, self.videos, self.description, self.spec = root, found.videos, found.description, spec
        self.left_out = found.left_out
        self._indices = IndexCache()
        self._set_aside: dict[str, str] = {}
        self._unusable: dict[str, tuple[State, str]] = {}

    def set_aside(self, file: str, reason: str) -> None:
        self._set_aside[file] = reason

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, draw: int) -> Item:
        if draw < 0:
            raise IndexError(f"draw numbers begin at 0, got {draw}")
        epoch, position = divmod(draw, len(self))
        order = self._order(epoch)
        skipped: Skipped = []
        for turn in range(len(self)):
            video = self.videos[order[(position + turn) % len(self)]]
            if reason := self._known_reason(video):
                skipped.append((video.place, reason))
                continue
            try:
                with reading(video.place, self.spec.read_timeout):
                    window, frames, label = self._clip(video, draw)
            except UnreadableVideo as error:
                if isinstance(error, TooSlow):
                    self.set_aside(video.place, str(error))
                elif isinstance(error, UnusableVideo):
                    self._unusable[video.place] = (_state(video.path), str(error))
                skipped.append((video.place, str(error)))
                continue
            name = f"{video.name}@{window.start}"
            frames = [np.zeros_like(frames[0])] * (self.spec.frames - len(frames)) + frames  # none unless padded
            return {"video": to_pixels(frames), "name": name, "label": label, "skipped": skipped}
        raise DataError(_none_usable(self.root, self.description, skipped))

    def _known_reason(self, video: Video) -> str | None:
        """Why a video is skipped without opening it, or None."""
        if video.place in self._set_aside:
            return self._set_aside[video.place]
        state, reason = self._unusable.get(video.place, (None, None))
        return reason if reason is not None and state == _state(video.path) else None

    def _order(self, epoch: int) -> np.ndarray:
        """The order in which the videos are visited in an epoch."""
        return epoch_order(len(self), self.spec.seed, epoch)

    def _source(self, video: Video) -> tuple[Source, str | None]:
        """A video file, or its contents, and the name of its class."""
        return video.path, video.label

    def _clip(self, video: Video, draw: int) -> tuple[Window, list[np.ndarray], str | None]:
        spec = self.spec
        rng = generator("clip", spec.seed, draw)
        view = spec.draw_view(rng)
        place = rng.bit_generator.state

        def choose(total: int) -> Window:
            rng.bit_generator.state = place  # the same choice, however often the length must be found
            return draw_window(total, spec.frames if total >= spec.frames else spec.shortest, spec.stride, rng)

        def each(frame: np.ndarray) -> np.ndarray:
            return fit(frame, spec.height, spec.width, view, spec.resize)

        if video.is_folder:
            with _every_window():
                pictures = list_frames(video.path)
                window = choose(len(pictures))
            return window, [each(read_picture(pictures[number])) for number in window.indices], video.label
        with _every_window():
            source, label = self._source(video)
        return *self._file_clip(video.place, source, choose, each), label

    def _file_clip(
        self, place: str, source: Source, choose: Callable[[int], Window], each: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[Window, list[np.ndarray]]:
        """A clip by the packets' time stamps, or by counting decoded frames if those mislead."""
        for build in (packet_index, counted_index):
            with _every_window():
                index = self._indices.get(place, source, build)
                window = choose(index.frames)
            try:
                return window, read_frames(source, index, window.indices, each)
            except IndexMismatch:
                continue
        raise UnusableVideo("gives different frames each time it is decoded")


class ShardClips(FolderClips):
    """Clips from the videos of webdataset shards (`pvdm_fast.data.shards`). Neighbouring draws read few shards."""

    def __init__(self, root: Path, found: Found, spec: ClipSpec) -> None:
        super().__init__(root, found, spec)
        self._sizes = tuple(Counter(video.path for video in found.videos).values())

    def _order(self, epoch: int) -> np.ndarray:
        return shard_order(self._sizes, self.spec.seed, epoch)

    def _source(self, video: Video) -> tuple[Source, str | None]:
        assert isinstance(video, Sample)
        return read_video(video)


class SyntheticClips(PixelClips):
    """Moving shapes rendered on the fly: a new scene for every training draw, 256 fixed scenes for the test
    split."""

    def __init__(self, spec: ClipSpec) -> None:
        self.spec = spec
        self.description = f"{SYNTHETIC}, recipe {RECIPE}: {len(self)} rendered clips an epoch, {spec.split} split"

    def __len__(self) -> int:
        return SYNTHETIC_LENGTH[self.spec.split]

    def read(self, draw: int) -> Item:
        if draw < 0:
            raise IndexError(f"draw numbers begin at 0, got {draw}")
        spec = self.spec
        number = draw if spec.split == "train" else draw % len(self)
        rng = generator(SYNTHETIC, spec.split, spec.seed, number)
        scene = draw_scene(rng, spec.width / spec.height)
        mirrored = spec.flip and spec.split == "train" and bool(rng.random() < 0.5)
        frames = scene.render(spec.frames, spec.height, spec.width, spec.stride)
        video = to_pixels(frames[:, :, ::-1] if mirrored else frames)
        return {"video": video, "name": f"{SYNTHETIC}/{spec.split}/{number}", "label": scene.label, "skipped": []}


def collate(items: Sequence[Item]) -> Batch:
    """Joins items of one size into a batch."""
    return {
        "video": torch.stack([item["video"] for item in items]),
        "names": [item["name"] for item in items],
        "labels": [item["label"] for item in items],
        "skipped": [entry for item in items for entry in item["skipped"]],
    }


def is_long_enough(video: Video, spec: ClipSpec) -> bool:
    """Whether a video has enough frames for a clip, as far as this can be told without decoding."""
    try:
        with reading(video.place, spec.read_timeout):
            if video.is_folder:
                return len(list_frames(video.path)) >= spec.shortest
            source = read_video(video)[0] if isinstance(video, Sample) else video.path
            return packet_index(source).frames >= spec.shortest
    except UnreadableVideo:
        return False


def _state(path: Path) -> State:
    """What changes with a file or folder: size, and times of its content and its permissions. None if it doesn't
    exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class UnusableVideo(UnreadableVideo):
    """A video that can't give any clip, whatever the window."""


@contextmanager
def _every_window() -> Iterator[None]:
    """Errors in the block mean that no window can be read, unless the cause may pass."""
    try:
        yield
    except UnreadableVideo as error:
        if error.passing or isinstance(error, TooSlow):
            raise
        raise UnusableVideo(str(error)) from error


def _none_usable(root: Path, description: str, skipped: Skipped) -> str:
    named = "; ".join(f"{path}: {reason}" for path, reason in skipped[:NAMED_FAILURES])
    more = len(skipped) - NAMED_FAILURES
    return f"no usable video in {root} ({description}). Tried: {named}" + (f"; and {more} more" if more > 0 else "")
