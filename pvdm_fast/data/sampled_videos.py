"""What sampling writes: the videos side by side, one array of all, or a folder with a file for each video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvdm_fast.data.video_writer import Write, arrange, open_frames, open_video, whole_video
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import TEMPORARY, locked, whole_file
from pvdm_fast.jobs.reading import UnreadableFile, read_json_object

FORMATS = ("mp4", "gif", "npy", "png")
LARGEST_GRID = 4096  # pixels: a side that players and their hardware still show


def check_grid(clips: int, height: int, width: int) -> None:
    """Raises UserError if the grid of so many videos is larger than players show."""
    columns = _columns(clips)
    sides = -(-clips // columns) * (height + 2) - 2, columns * (width + 2) - 2
    if max(sides) > LARGEST_GRID:
        raise UserError(
            f"{clips} videos side by side are {sides[0]}x{sides[1]} pixels, more than players show ({LARGEST_GRID} a "
            "side): give --out a folder, with a / at its end, for a file each"
        )


def _columns(clips: int) -> int:
    return max(1, round(clips**0.5))


@contextmanager
def open_grid(path: Path, fps: float, crf: int | None = None) -> Iterator[Callable[[Sequence[np.ndarray]], None]]:
    """A file with all videos side by side. Gives a function that appends the next frames of every video, in batches
    uint8 (B, t, H, W, 3)."""
    with open_video(path, fps, crf) as write:

        def append(batches: Sequence[np.ndarray]) -> None:
            videos = [video for batch in batches for video in batch]
            write(arrange(videos, _columns(len(videos))))

        yield append


@contextmanager
def open_array(path: Path, clips: int, frames: int) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """A numpy file uint8 (clips, frames, height, width, 3). Gives a function that writes ``pixels`` (B, t, H, W, 3) to
    their place: ``append(first clip, first frame, pixels)``.

    It isn't a memory map: a full disk would end the process. Here it is an OSError.
    """
    with whole_video(path) as temporary, temporary.open("wb") as file:
        start = 0

        def append(clip: int, frame: int, pixels: np.ndarray) -> None:
            nonlocal start
            if start == 0:
                shape = (clips, frames, *pixels.shape[2:])
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                start = file.tell()
            for index, video in enumerate(pixels):
                file.seek(start + ((clip + index) * frames + frame) * video[0].size)
                file.write(np.ascontiguousarray(video).data)

        yield append


@dataclass(frozen=True)
class VideoFolder:
    """A folder with a file for each clip, or a folder of pictures for each (png). A job fills it, in several starts.

    A name says which clip it is, by its seed and number. What it is besides stands in sampling.json, and is the same
    for all clips. A file is complete or absent. Other files may lie there too.
    """

    path: Path
    format: str
    fps: float
    crf: int | None = None

    def place(self, seed: int, number: int) -> Path:
        """Where the clip belongs: seed-0-clip-000017.mp4."""
        name = f"seed-{seed}-clip-{number:06}"
        return self.path / (name if self.format == "png" else f"{name}.{self.format}")

    def missing(self, seed: int, clips: range, overwrite: bool) -> list[int]:
        """Which of these clips are to be written, by their places in ``clips``."""
        return [row for row, clip in enumerate(clips) if overwrite or not self.place(seed, clip).exists()]

    @contextmanager
    def claimed(self, facts: dict[str, Any]) -> Iterator[None]:
        """Make the folder, and keep other jobs out of it.

        Args:
            facts: what decides its clips, of plain values. They are written to sampling.json.

        Raises:
            UserError: its clips were made otherwise, another job is at work there, or it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path}: {error.strerror}") from error
        with locked(self.path / ".sampling.lock", "sampler", "--out"):
            self._record(facts)
            for begun in [*self.path.glob(".seed-*.tmp"), *self.path.glob(f"{TEMPORARY}*seed-*")]:
                if begun.is_dir():  # an earlier job was killed at work
                    shutil.rmtree(begun, ignore_errors=True)
                else:
                    begun.unlink(missing_ok=True)
            yield

    def _record(self, facts: dict[str, Any]) -> None:
        place = self.path / "sampling.json"
        facts = json.loads(json.dumps(facts))
        try:
            known = read_json_object(place)
        except FileNotFoundError:
            if any(self.path.glob("seed-*-clip-*")):
                raise UserError(
                    f"{self.path} holds clips but no {place.name} that says how they were made: name another folder "
                    "with --out"
                ) from None
            with whole_file(place) as temporary:
                temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            return
        except UnreadableFile as reason:
            raise UserError(f"{place} {reason}: name another folder with --out") from reason
        if known != facts:
            names = [name for name in {**known, **facts} if known.get(name) != facts.get(name)]
            raise UserError(
                f"the clips in {self.path} were made otherwise ({', '.join(_change(known, facts, n) for n in names)}): "
                "name another folder with --out, or take the same options"
            )

    @contextmanager
    def open(self, seed: int, clips: Sequence[int]) -> Iterator[list[Write]]:
        """Gives a function for each of these clips, that appends frames uint8 (t, H, W, 3) to it. Their files appear
        when the block ends."""
        with ExitStack() as stack:
            yield [stack.enter_context(self._open(self.place(seed, clip))) for clip in clips]

    def _open(self, place: Path) -> Any:
        if self.format == "png":
            return open_frames(place)
        return open_video(place, self.fps, self.crf)


def _change(known: dict[str, Any], facts: dict[str, Any], name: str) -> str:
    before, now = known.get(name), facts.get(name)
    if isinstance(before, dict) or isinstance(now, dict):
        return f"with another {name}"
    return f"{name}: {before}, now {now}"
