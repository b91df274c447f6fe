"""The clips for evaluation: numbered draws of one split or of both, read ahead by workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pvdm_fast.data import Batch, ClipDataset, DataError, Item, open_dataset
from pvdm_fast.data.draws import epoch_order
from pvdm_fast.data.latents import is_latents
from pvdm_fast.data.loader import ClipLoader

SPLITS = ("test", "train", "all")
RESIZING = "torch's bicubic, antialiased, in 8 bits, of the largest crop of the clip's aspect"


class BothSplits(ClipDataset):
    """Every video of both splits once per epoch, in an order seeded by (seed, epoch)."""

    def __init__(self, test: ClipDataset, train: ClipDataset) -> None:
        self.test, self.train, self.spec = test, train, test.spec
        self.description = f"{test.description}; {train.description}"
        self.left_out = test.left_out

    def __len__(self) -> int:
        return len(self.test) + len(self.train)

    def set_aside(self, file: str, reason: str) -> None:
        self.test.set_aside(file, reason)
        self.train.set_aside(file, reason)

    def _place(self, draw: int) -> tuple[ClipDataset, int]:
        epoch, position = divmod(draw, len(self))
        place = int(epoch_order(len(self), self.spec.seed, epoch)[position])
        if place < len(self.test):
            return self.test, epoch * len(self.test) + place
        return self.train, epoch * len(self.train) + place - len(self.test)

    def read(self, draw: int) -> Item:
        split, number = self._place(draw)
        return split.read(number)

    def __getitem__(self, draw: int) -> Item:
        split, number = self._place(draw)
        return split[number]


def open_clips(
    source: str | Path, split: str, *, frames: int, size: tuple[int, int], stride: int, seed: int, fold: int = 1
) -> ClipDataset:
    """The clips of a split ("test", "train" or "all"), cropped at the centre and never mirrored.

    Raises:
        DataError: there are no clips, or the source holds latents.
    """
    if is_latents(Path(source)):
        raise DataError(f"{source} holds latents: name the videos they were made of with --data")

    def open_split(name: str) -> ClipDataset:
        height, width = size
        return open_dataset(
            source,
            frames=frames,
            height=height,
            width=width,
            stride=stride,
            split=name,
            seed=seed,
            centred=True,
            fold=fold,
        )

    return BothSplits(open_split("test"), open_split("train")) if split == "all" else open_split(split)


def read_batches(dataset: ClipDataset, batches: Sequence[Sequence[int]], workers: int) -> Iterator[Batch]:
    """These batches of draws, in order, read ahead by `workers` processes. Raises DataError if one dies."""
    if batches:
        yield from ClipLoader(dataset, [list(batch) for batch in batches], workers=workers)
