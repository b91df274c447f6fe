"""Endless batches of clips from worker processes. You can start at any draw, and it goes on when a worker dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pvdm_fast.data.clips import Batch, ClipDataset, Item, collate
from pvdm_fast.data.crossing import POLL_SECONDS, Guarded, Patience, cannot_start, die_with_parent, shared_batch
from pvdm_fast.data.errors import DataError
from pvdm_fast.data.transforms import to_float
from pvdm_fast.data.watch import CRASHED, Notes, begin_notes, too_slow
from pvdm_fast.errors import printable
from pvdm_fast.jobs.signals import ENDING, in_main_thread

ENDING_SECONDS = 10.0
RESTARTS = 3  # in a row, without a batch in between


class DrawBatches(Sampler[list[int]]):
    """The draw numbers of one rank's batches, without end.

    All ranks together read ``start_draw``, ``start_draw + 1``, ... in global batches of ``batch_size * world``. Of
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


@dataclass
class _Crew:
    """The workers of one DataLoader, and their notes."""

    notes: Notes
    processes: list[BaseProcess] = field(default_factory=list)

    def dead(self, seconds: float) -> list[tuple[int, int, str | None]]:
        """(process id, exit code, file being read) of each worker that has ended. A negative code is a signal's number.

        Waits up to ``seconds`` for the first.
        """
        ending = wait([process.sentinel for process in self.processes], seconds)
        for process in self.processes:
            if process.sentinel in ending:  # its sentinel closes a while before it has ended
                process.join(seconds)
        ended = [(process.pid or 0, process.exitcode) for process in self.processes]
        return [(pid, code, self.notes.file_of(pid)) for pid, code in ended if code is not None]

    def end(self) -> None:
        """Kill the other workers: they may wait forever for a lock that a dead one held."""
        for process in self.processes:
            process.kill()
            process.join()


class ClipLoader:
    """Iterates over the batches of the given draws. Each ``iter`` starts again. See `make_loader`."""

    def __init__(
        self,
        dataset: ClipDataset,
        batches: Iterable[list[int]],
        *,
        workers: int = 0,
        pin_memory: bool = False,
        pixels: bool = False,
    ) -> None:
        self.dataset, self.batches, self.workers = dataset, batches, workers
        self.pin_memory, self.pixels = pin_memory, pixels

    def __iter__(self) -> Iterator[Batch]:
        done = restarts = 0
        killed: set[str] = set()
        while True:
            crew = self._crew()
            try:
                for batch in self._read(done, crew):
                    yield batch if self.pixels else {**batch, "video": to_float(batch["video"])}
                    done += 1
                    restarts = 0
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                # A worker's death shows as PyTorch's RuntimeError. If a batch was being sent, it shows as a broken
                # connection, and that comes a while before the process has ended, above all if it writes its memory to
                # a file.
                deaths = crew.dead(0 if isinstance(error, RuntimeError) else ENDING_SECONDS) if self.workers else []
                if not deaths:
                    raise
                sentences = [self._judge(*death, killed) for death in deaths]
                restarts += 1
                if restarts > RESTARTS:
                    raise DataError(
                        f"{'; '.join(sentences)}; this was the {restarts}th time in a row. Use fewer workers if "
                        "memory is short, or 0 to load the data in the training process"
                    ) from error
            finally:
                crew.end()
            for sentence in sentences:
                print(printable(f"{sentence}; its batches are read again"), file=sys.stderr, flush=True)

    def _crew(self) -> _Crew:
        try:
            return _Crew(Notes(self.workers))
        except RuntimeError as error:  # no shared memory at all
            raise cannot_start(self.workers, error) from error

    def _judge(self, pid: int, code: int, file: str | None, killed: set[str]) -> str:
        """What to say about a worker's death. Skips the file that is to blame from now on."""
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if file is None:
            return f"a data worker died (process {pid}, {ended}), not while reading a file"
        while_reading = f"a data worker died (process {pid}, {ended}) while reading {file}"
        if code == -signal.SIGALRM:
            reason = too_slow(self.dataset.spec.read_timeout)
        elif code == -signal.SIGKILL and file not in killed:
            killed.add(file)
            return f"{while_reading}, often for lack of memory: use fewer workers if it happens again"
        else:
            reason = f"{CRASHED} ({ended})"
        self.dataset.set_aside(file, reason)
        return f"{while_reading}: it {reason}, and is left out from now on"

    def _read(self, done: int, crew: _Crew) -> Iterator[Batch]:
        """The batches after the first ``done``, without the SIGCHLD handler that PyTorch installs.

        That handler raises wherever the process is, for example in the middle of a training step. Without it, a
        worker's death shows here within five seconds after the next batch is asked for.
        """
        # to the kernel the parent is a thread, and threads may end early
        dies_with = os.getpid() if in_main_thread() else None
        loader: DataLoader[Any] = DataLoader(
            Guarded(self.dataset) if self.workers else _Travelling(self.dataset),
            batch_sampler=_From(self.batches, done),
            num_workers=self.workers,
            collate_fn=shared_batch if self.workers else collate,
            pin_memory=self.pin_memory,
            timeout=POLL_SECONDS if self.workers else 0,
            worker_init_fn=partial(_prepare_worker, crew.notes, dies_with),
            generator=torch.Generator(),  # otherwise iterating would draw from the global random state
        )
        before, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
        try:
            batches = iter(loader)
        except OSError as error:  # no more processes, files or memory
            raise cannot_start(self.workers, error) from error
        crew.processes = [process for process in multiprocessing.active_children() if process not in others]
        if in_main_thread() and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        patience = Patience(crew.notes)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                patience.check()
                continue
            if isinstance(batch, DataError):
                raise batch
            yield batch
            patience = Patience(crew.notes)


class _Travelling(Dataset[Item]):
    """A dataset whose clips have the form in which they travel from the workers."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: int) -> Item:
        return self.dataset.read(draw)


class _From(Sampler[list[int]]):
    """Batches of draws, without the first ``done``."""

    def __init__(self, batches: Iterable[list[int]], done: int) -> None:
        self.batches, self.done = batches, done

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batches), self.done, None)


def make_loader(
    dataset: ClipDataset,
    *,
    batch_size: int,
    start_draw: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    pixels: bool = False,
) -> ClipLoader:
    """Endless batches of draws ``start_draw``, ``start_draw + 1``, ... They are the same for any number of workers.

    ``rank`` and ``world`` divide each global batch of ``batch_size * world`` clips among processes. To resume, start at
    draw ``start_draw + batch_size * world * batches``. Neither the loader nor the workers touch the global random
    states.

    With ``pixels`` clips stay uint8, as they come from the workers. Call `pvdm_fast.data.transforms.to_float` on the
    GPU.

    A worker that dies is replaced. The new one reads the interrupted batch again, so no batch is lost or repeated. A
    line on stderr names the process and the file. A file is skipped from then on if it took longer than the dataset's
    ``read_timeout``, crashed its reader, or was being read twice when the system killed the worker. After three
    replacements without a batch, `DataError` is raised.
    """
    batches = DrawBatches(batch_size, start_draw, rank, world)
    return ClipLoader(dataset, batches, workers=workers, pin_memory=pin_memory, pixels=pixels)


def _prepare_worker(notes: Notes, dies_with: int | None, worker: int) -> None:
    """Prepares a worker: one thread, and it leaves signals to the whole process group to the training process.

    It dies with the process ``dies_with``.
    """
    if dies_with is not None:
        die_with_parent(dies_with)
    torch.set_num_threads(1)
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _survive_once)
    sys.excepthook = _unless_left
    begin_notes(notes, worker)


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's thread that hands tensors over prints an error if the training process ends while it takes one. Why that
    ended is said there. A worker's own errors reach it as exceptions."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def _survive_once(number: int, frame: FrameType | None) -> None:
    """Ignores the signal once. The next one ends the process, so a stuck worker can still be stopped."""
    signal.signal(number, signal.SIG_DFL)
