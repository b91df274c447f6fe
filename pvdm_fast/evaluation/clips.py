"""The clips that are evaluated: numbered draws of a split, or of both splits together, read ahead by workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from pvdm_fast.data import Batch, ClipDataset, Item, collate, open_dataset
from pvdm_fast.data.draws import epoch_order
from pvdm_fast.data.loader import ClipLoader

SPLITS = ("test", "train", "all")
RESIZING = "torch's bicubic, antialiased, in 8 bits, of the largest crop of the clip's aspect"


class BothSplits(ClipDataset):
    """Every video of the test and the train split once in each epoch, in an order seeded by (seed, epoch)."""

    def __init__(self, test: ClipDataset, train: ClipDataset) -> None:
        self.test, self.train, self.spec = test, train, test.spec
        self.description = f"{test.description}; {train.description}"

    def __len__(self) -> int:
        return len(self.test) + len(self.train)

    def __getitem__(self, draw: int) -> Item:
        epoch, position = divmod(draw, len(self))
        place = int(epoch_order(len(self), self.spec.seed, epoch)[position])
        if place < len(self.test):
            return self.test[epoch * len(self.test) + place]
        return self.train[epoch * len(self.train) + place - len(self.test)]


def open_clips(
    source: str | Path, split: str, *, frames: int, size: tuple[int, int], stride: int, seed: int
) -> ClipDataset:
    """The clips of a split ("test", "train" or "all"), never mirrored; raises DataError where there are none."""

    def open_split(name: str) -> ClipDataset:
        height, width = size
        return open_dataset(
            source, frames=frames, height=height, width=width, stride=stride, split=name, seed=seed, flip=False
        )

    return BothSplits(open_split("test"), open_split("train")) if split == "all" else open_split(split)


def read_batches(dataset: ClipDataset, batches: Sequence[Sequence[int]], workers: int) -> Iterator[Batch]:
    """These batches of draws, in order, read ahead by so many worker processes; raises DataError where one dies."""
    if not batches:
        return
    yield from ClipLoader(
        DataLoader(
            dataset,  # type: ignore[arg-type]  # typed as the dataset of items, not of batches
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else iterating would draw from the global random state
        )
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
