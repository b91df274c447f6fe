"""Checkpoints are complete or absent, the newest good ones are kept, and damage is found."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import clean_up, whole_file, whole_folder
from pvdm_fast.training import checkpoint


def save(folder: Path, step: int, stage: str = "autoencoder") -> Path:
    return checkpoint.save(folder, stage, step, {"step": step, "values": torch.arange(step)})


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_the_newest_two_are_kept_across_stages(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save(tmp_path, step)
    assert names(tmp_path) == ["autoencoder-step-0000002", "autoencoder-step-0000030"]
    save(tmp_path, 5, "diffusion")
    assert names(tmp_path) == ["autoencoder-step-0000030", "diffusion-step-0000005"]
    newest, passed_over = checkpoint.newest_good(tmp_path)
    assert newest is not None
    assert (newest.stage_name, newest.step, passed_over) == ("diffusion", 5, [])
    assert torch.equal(checkpoint.load(newest)["values"], torch.arange(5))


@pytest.mark.parametrize("harm", ["shorter", "changed", "empty", "gone", "note", "another's note", "no note"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    state = path / checkpoint.STATE
    data = bytearray(state.read_bytes())
    if harm == "shorter":
        state.write_bytes(data[:-10])
    elif harm == "changed":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif harm == "empty":
        state.write_bytes(b"")
    elif harm == "gone":
        state.unlink()
    elif harm == "another's note":
        (path / checkpoint.NOTE).write_bytes((tmp_path / "autoencoder-step-0000001" / checkpoint.NOTE).read_bytes())
    elif harm == "no note":
        (path / checkpoint.NOTE).unlink()
    else:
        (path / checkpoint.NOTE).write_text("{")
    newest, passed_over = checkpoint.newest_good(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert len(passed_over) == 1
    assert str(path) in passed_over[0]


def test_where_none_is_good_training_does_not_start_again(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / checkpoint.STATE).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is good .*0000002 is passed over: its size.*0000001"):
        checkpoint.newest_good(tmp_path)


def test_a_damaged_later_one_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        path = save(tmp_path, step)
    (path / checkpoint.STATE).write_bytes(b"")
    save(tmp_path, 3)
    save(tmp_path, 4)
    assert [item.step for item in checkpoint.found(tmp_path)] == [3, 4, 9]
    newest, (sentence,) = checkpoint.newest_good(tmp_path)
    assert newest is not None and newest.step == 4 and "0000009 is passed over" in sentence
    save(tmp_path, 10)
    assert [item.step for item in checkpoint.found(tmp_path)] == [9, 10]


def test_what_a_killed_process_left_is_put_in_order(tmp_path: Path) -> None:
    for name in (".writing-old-model", ".writing-old-other", "other", ".writing-other", ".writing-gone-last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    for name in (".writing-results.json", ".samples.mp4.123.tmp", "kept.json"):
        (tmp_path / name).write_text("half")
    clean_up(tmp_path)
    assert names(tmp_path) == ["kept.json", "model", "other"]
    assert (tmp_path / "model" / "file").read_text() == ".writing-old-model"
    assert (tmp_path / "other" / "file").read_text() == "other"


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".writing-autoencoder-step-0000010").mkdir()
    (tmp_path / ".writing-autoencoder-step-0000010" / checkpoint.NOTE).write_text("{}")
    assert checkpoint.found(tmp_path) == []
    assert checkpoint.newest_good(tmp_path) == (None, [])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_failed_write_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*the last good one is .*0000002"):
        save(tmp_path, 3)
    assert names(tmp_path) == ["autoencoder-step-0000001", "autoencoder-step-0000002"]
    assert checkpoint.newest_good(tmp_path)[0] is not None


def test_a_bug_in_the_state_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a tensor that cannot be saved")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a tensor"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_random_states_return() -> None:
    import random

    states = checkpoint.random_states()
    first = torch.rand(3), random.random()
    checkpoint.restore_random_states(states)
    assert torch.equal(first[0], torch.rand(3))
    assert first[1] == random.random()


def fail_half_way(file: Path) -> None:
    file.write_text("half")
    raise FileNotFoundError


def test_whole_folder_replaces_only_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "model"
    for text in ("old", "new"):
        with whole_folder(place) as temporary:
            (temporary / "file").write_text(text)
            if text == "new":
                assert (place / "file").read_text() == "old"
    assert (place / "file").read_text() == "new"
    with pytest.raises(FileNotFoundError), whole_folder(place) as temporary:
        fail_half_way(temporary / "file")
    assert (place / "file").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_whole_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(place) as temporary:
        fail_half_way(temporary)
    assert names(tmp_path) == ["file"]
    assert place.read_text() == "old"
