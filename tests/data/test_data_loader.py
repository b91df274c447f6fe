"""The loader gives the same clips for any number of workers, from any draw on, for any share of ranks."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pvdm_fast.data import Batch, ClipDataset, ClipLoader, DataError, Item, make_loader, open_dataset

SIZE = {"frames": 4, "height": 16, "width": 16}


def take(loader: ClipLoader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


@pytest.fixture
def dataset(video_folder: Path) -> ClipDataset:
    return open_dataset(video_folder, **SIZE, flip=True)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        a["names"] == b["names"] and torch.equal(a["video"], b["video"]) for a, b in zip(left, right, strict=True)
    )


def test_workers_make_no_difference(dataset: ClipDataset) -> None:
    alone = take(make_loader(dataset, batch_size=3), 5)
    assert alone[0]["video"].shape == (3, 3, 4, 16, 16)
    for workers in (1, 2):
        assert same(alone, take(make_loader(dataset, batch_size=3, workers=workers), 5))


def test_resuming_goes_on_where_it_stopped(dataset: ClipDataset) -> None:
    whole = take(make_loader(dataset, batch_size=3), 6)
    assert same(whole[4:], take(make_loader(dataset, batch_size=3, start_draw=12, workers=1), 2))


def test_batches_go_on_beyond_an_epoch(dataset: ClipDataset) -> None:
    batches = take(make_loader(dataset, batch_size=len(dataset) + 1), 3)
    assert [len(batch["names"]) for batch in batches] == [len(dataset) + 1] * 3


def test_ranks_share_each_global_batch(dataset: ClipDataset) -> None:
    whole = take(make_loader(dataset, batch_size=6, start_draw=2), 3)
    parts = [take(make_loader(dataset, batch_size=2, start_draw=2, rank=rank, world=3), 3) for rank in range(3)]
    for together, shares in zip(whole, zip(*parts, strict=True), strict=True):
        for rank, share in enumerate(shares):
            assert torch.equal(together["video"][rank::3], share["video"])


def test_no_random_state_is_touched(dataset: ClipDataset) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for workers in (0, 1):
        take(make_loader(dataset, batch_size=2, workers=workers), 2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


def test_the_process_global_states_do_not_change_clips(dataset: ClipDataset) -> None:
    first = take(make_loader(dataset, batch_size=2), 2)
    torch.manual_seed(5)
    random.seed(5)
    assert same(first, take(make_loader(dataset, batch_size=2), 2))


class Probe(ClipDataset):
    """Reports the worker's state, or does what it is told."""

    def __init__(self, deed: str) -> None:
        self.deed = deed

    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: int) -> Item:
        if self.deed == "die" and draw == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deed == "fail" and draw == 5:
            raise DataError("no usable video in nowhere")
        if self.deed == "mistake":
            raise RuntimeError("a mistake")
        if self.deed == "signals":
            os.kill(os.getpid(), signal.SIGINT)
            if draw < 4:  # the first draw of each worker
                os.kill(os.getpid(), signal.SIGTERM if draw % 2 == 0 else signal.SIGINT)
        return {
            "video": torch.zeros(3, 1, 1, 1),
            "name": str(torch.get_num_threads()),
            "label": None,
            "skipped": [("f", str(draw))],
        }


def test_a_dead_worker_is_a_clear_error() -> None:
    with pytest.raises(DataError, match=r"worker died.*fewer workers"):
        take(make_loader(Probe("die"), batch_size=2, workers=1), 9)


def test_a_death_interrupts_nothing_but_the_wait_for_a_batch() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(make_loader(Probe("die"), batch_size=2, workers=1))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(DataError, match="worker died"):
        list(itertools.islice(batches, 9))


def test_a_mistake_in_a_worker_is_not_taken_for_its_death() -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        take(make_loader(Probe("mistake"), batch_size=2, workers=1), 9)


def test_an_error_in_a_worker_keeps_its_kind() -> None:
    with pytest.raises(DataError, match="no usable video in nowhere"):
        take(make_loader(Probe("fail"), batch_size=2, workers=1), 9)


def test_workers_use_one_thread_and_leave_signals_to_the_trainer() -> None:
    batches = take(make_loader(Probe("signals"), batch_size=2, workers=2), 3)
    assert [name for batch in batches for name in batch["names"]] == ["1"] * 6
    assert batches[1]["skipped"] == [("f", "2"), ("f", "3")]


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"start_draw": -1}, {"rank": 2, "world": 2}, {"rank": -1}, {"world": 0}]
)
def test_impossible_shares_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected batch_size"):
        make_loader(Probe(""), **{"batch_size": 1, **wrong})


class HalfHandedOver(ClipDataset):
    """Its worker's thread that hands tensors over meets what it meets when the training process is gone."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, draw: int) -> Item:
        try:
            raise self.error("of a thread")
        except self.error:
            sys.excepthook(*sys.exc_info())  # as multiprocessing.resource_sharer does
        return {"video": torch.zeros(1), "name": "clip", "label": None, "skipped": []}


@pytest.mark.parametrize(("error", "said"), [(EOFError, False), (ConnectionResetError, False), (ValueError, True)])
def test_a_worker_says_nothing_of_a_training_process_that_ended(
    error: type[BaseException], said: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    take(make_loader(HalfHandedOver(error), batch_size=1, workers=1), 1)
    assert ("of a thread" in capfd.readouterr().err) is said
