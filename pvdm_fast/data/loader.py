"""Endless batches of clips from worker processes, beginning at any draw."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch.utils.data import DataLoader, Sampler

from pvdm_fast.data.clips import Batch, ClipDataset, collate
from pvdm_fast.data.errors import DataError


class DrawBatches(Sampler[list[int]]):
    """Draw numbers of one rank's batches, without end.

    All ranks together read ``start_draw``, ``start_draw + 1``, ... in global batches of ``batch_size * world``; within
    each, a rank takes every ``world``-th draw.
    """

    def __init__(self, batch_size: int, start_draw: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or start_draw < 0 or not 0 <= rank < world:
            raise ValueError(
                f"expected batch_size >= 1, start_draw >= 0 and 0 <= rank < world, "
                f"got {batch_size}, {start_draw}, {rank}, {world}"
            )
        self.batch_size, self.start_draw, self.rank, self.world = batch_size, start_draw, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        step = self.batch_size * self.world
        first = self.start_draw
        while True:
            yield list(range(first + self.rank, first + step, self.world))
            first += step


class ClipLoader:
    """Iterates over batches without end; each ``iter`` begins again at ``start_draw``. Made by :func:`make_loader`."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._batches()
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # A death shows as torch's RuntimeError or, when a batch was on its way, as a broken connection. Errors
            # raised inside a worker come with "Caught ..." and pass.
            if self._loader.num_workers == 0 or str(error).startswith("Caught "):
                raise
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a data worker died ({error}). Often it was killed for lack of memory: use fewer workers, or 0 to "
                "load the data in the training process"
            ) from error

    def _batches(self) -> Iterator[Batch]:
        """The loader's batches, without the SIGCHLD handler that torch installs.

        That one raises wherever the process happens to be, in the middle of a training step for example. Without it,
        a death shows here within five seconds of asking for the next batch.
        """
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._loader)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        yield from batches


def make_loader(
    dataset: ClipDataset,
    *,
    batch_size: int,
    start_draw: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> ClipLoader:
    """Endless batches of draws ``start_draw``, ``start_draw + 1``, ...; the same ones for any number of workers.

    ``rank`` and ``world`` share each global batch of ``batch_size * world`` clips among processes: the next draw to
    resume from is ``start_draw + batch_size * world * batches``. Neither the loader nor the workers touch the global
    random states. A worker's death raises :class:`DataError`.
    """
    return ClipLoader(
        DataLoader(
            dataset,  # type: ignore[arg-type]  # typed as the dataset of items, not of batches
            batch_sampler=DrawBatches(batch_size, start_draw, rank, world),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # else iterating would draw from the global random state
        )
    )


def _prepare_worker(worker: int) -> None:
    """One thread a worker; a Ctrl-C or SIGTERM sent to the whole group is the training process's to answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _survive_once)


def _survive_once(number: int, frame: FrameType | None) -> None:
    """Let the next such signal end the process, so that a stuck worker can still be stopped."""
    signal.signal(number, signal.SIG_DFL)
