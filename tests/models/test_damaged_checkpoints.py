"""Damaged and malicious checkpoints give the saved tensors or one sentence. Nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models.damage import damaged
from safetensors.torch import save_file
from torch import Tensor

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.checksums import write_checksums
from pvdm_fast.models import Autoencoder, Denoiser, release
from pvdm_fast.models.release import CheckpointError
from pvdm_fast.training import checkpoint

FEW, MANY = 25, 600  # damaged files of each of five kinds
LONGEST = 10  # seconds that a reader may take: a thousand times the usual
SIZES: dict[str, Any] = dict(
    frames=2, height=8, width=8, patch_size=4, channels=8, depth=1, num_heads=1, head_dim=8, projection_depth=1,
    projection_hidden=8,
)  # fmt: skip
UNET: dict[str, Any] = dict(
    time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=2
)
State = dict[str, Tensor]


@contextmanager
def time_limit() -> Iterator[None]:
    """A reader that hangs fails the test."""

    def stop(*_: object) -> None:
        raise AssertionError(f"a reader took more than {LONGEST} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def assert_sentence(error: Exception) -> None:
    assert isinstance(error, UserError), repr(error)
    assert 20 < len(str(error)) < 2000 and "\n" not in str(error), str(error)


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_form(first: State, second: State) -> bool:
    """Names, shapes and dtypes."""
    return first.keys() == second.keys() and all(
        (first[name].shape, first[name].dtype) == (second[name].shape, second[name].dtype) for name in first
    )


def outcome(read: Callable[[], State], right: Callable[[State], bool]) -> str:
    """ "read" or "refused". Anything else is a failure."""
    with time_limit():
        try:
            state = read()
        except UserError as error:
            assert_sentence(error)
            return "refused"
    assert right(state), "other tensors than were saved"
    return "read"


def rezipped(content: bytes, generator: random.Random) -> bytes:
    """A torch.save archive with a damaged pickle but correct checksums, as from deliberate damage."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for entry in source.infolist():
            data = source.read(entry)
            archive.writestr(entry.filename, damaged(data, generator) if entry.filename.endswith(".pkl") else data)
    return target.getvalue()


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(**SIZES)


def fuzz_archives(folder: Path, number: int, change: Callable[[bytes, random.Random], bytes]) -> dict[str, int]:
    state, path, generator = autoencoder().state_dict(), folder / "model.pth", random.Random(number)
    torch.save(state, path)
    whole, counts = path.read_bytes(), {"read": 0, "refused": 0}
    # a deliberately damaged pickle can name any tensors: it must load as it stands or be refused
    right = (lambda found: same(found, state)) if change is damaged else (lambda found: True)
    for _ in range(number):
        path.write_bytes(change(whole, generator))
        counts[outcome(lambda: release.read_state_dict(path), right)] += 1
        if change is rezipped:
            counts[outcome(lambda: release.load_release_autoencoder(path).state_dict(), right)] += 0
    return counts


def fuzz_safetensors(folder: Path, number: int) -> dict[str, int]:
    """The format has no checksum, so values can change unnoticed. Names, shapes and dtypes of the model can't."""
    torch.manual_seed(0)
    model = Denoiser(**UNET)
    state, path, generator = model.state_dict(), folder / "model.safetensors", random.Random(number)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    whole, counts = path.read_bytes(), {"read": 0, "refused": 0}
    header = 8 + int.from_bytes(whole[:8], "little")
    for index in range(number):
        part = whole[:header] if index % 2 else whole
        path.write_bytes(damaged(part, generator) + whole[len(part) :])
        counts[
            outcome(
                lambda: release.load_release_denoiser(path, layout=model.layout, num_heads=2).state_dict(),
                lambda found: same_form(found, state),
            )
        ] += 1
    return counts


def fuzz_model_folders(folder: Path, number: int) -> dict[str, int]:
    """With checksums nothing passes. Without them values can change, but a missing tensor is never initialised
    randomly."""
    model, generator, counts = autoencoder(), random.Random(number), {"read": 0, "refused": 0}
    state = model.state_dict()
    model.save_pretrained(folder)
    write_checksums(folder)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    sums = folder / "checksums.json"
    for index in range(number):
        path = generator.choice(list(files))
        path.write_bytes(damaged(files[path][:6000], generator) + files[path][6000:])
        watched = index % 2 == 0
        if not watched:
            sums.unlink()
        right = same if watched else (lambda first, second: first.keys() == second.keys())
        read = lambda: release.load_model(Autoencoder, folder).state_dict()  # noqa: E731
        counts[outcome(read, lambda found, right=right: right(found, state))] += 1  # type: ignore[misc]
        path.write_bytes(files[path])
        sums.write_bytes(files[sums])
    return counts


def fuzz_training_checkpoints(folder: Path, number: int) -> dict[str, int]:
    """Uses the checkpoint before, and says so. The newest one is used only if nothing in it was changed."""
    generator, counts = random.Random(number), {"read": 0, "refused": 0}
    states = {step: {"step": step, "model": {"weight": torch.full((40,), float(step))}} for step in (1, 2)}
    for step, state in states.items():
        path = checkpoint.save(folder, "autoencoder", step, state)
    files = {path / name: (path / name).read_bytes() for name in (checkpoint.STATE, checkpoint.NOTE)}
    for index in range(number):
        target = path / (checkpoint.NOTE if index % 3 == 0 else checkpoint.STATE)
        if index % 20 == 19:
            target.unlink()
        else:
            target.write_bytes(damaged(files[target], generator))
        with time_limit():
            newest, passed_over = checkpoint.newest_good(folder)
            assert newest is not None
            state = checkpoint.load(newest)
        assert torch.equal(state["model"]["weight"], states[newest.step]["model"]["weight"])
        assert [str(path) in sentence for sentence in passed_over] == [True] * (2 - newest.step)
        counts["read" if newest.step == 2 else "refused"] += 1
        target.write_bytes(files[target])
    return counts


KINDS: dict[str, Callable[[Path, int], dict[str, int]]] = {
    "archive": lambda folder, number: fuzz_archives(folder, number, damaged),
    "archive with a damaged pickle": lambda folder, number: fuzz_archives(folder, number, rezipped),
    "safetensors": fuzz_safetensors,
    "model folder": fuzz_model_folders,
    "training checkpoint": fuzz_training_checkpoints,
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    counts = KINDS[kind](tmp_path, FEW)
    assert sum(counts.values()) == FEW and counts["refused"] > FEW // 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(kind: str, tmp_path: Path) -> None:
    counts = KINDS[kind](tmp_path, MANY)
    assert sum(counts.values()) == MANY
    print(f"{kind}: {counts}")


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def plants(proof: Path) -> dict[str, Any]:
    code = f"open({str(proof)!r}, 'w')"
    return {
        "os.system": Call(os.system, f"touch {proof}"),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(open, str(proof), "w"),
        "getattr": Call(getattr, "", "join"),
        "mkdir": Call(os.mkdir, str(proof)),
        "torch.save": Call(torch.save, [], str(proof)),
        "pickle": Call(pickle.loads, pickle.dumps(Call(exec, code))),
    }


@pytest.mark.parametrize("where", ["value", "key", "nested"])
def test_planted_calls_are_not_run(where: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for name, plant in plants(proof).items():
        tensor = torch.zeros(2)
        content = {"value": {"w": plant}, "key": {(plant, 1): tensor}, "nested": {"w": tensor, "x": [[plant]]}}[where]
        for legacy in (False, True):
            path = tmp_path / f"{name}.pth"
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(CheckpointError) as caught:
                release.read_state_dict(path)
            assert_sentence(caught.value)
        saved = checkpoint.save(tmp_path / name, "autoencoder", 1, content)
        newest, _ = checkpoint.newest_good(tmp_path / name)
        assert newest is not None and newest.path == saved, "the checksum is right: only the reader can refuse it"
        with pytest.raises(UserError) as refused:
            checkpoint.load(newest)
        assert_sentence(refused.value)
    assert not proof.exists()


def test_every_bit_of_a_training_checkpoint_is_watched(tmp_path: Path) -> None:
    """One bit flip in every 37th byte of the state, and in every byte of the note."""
    path = checkpoint.save(tmp_path, "autoencoder", 1, {"weight": torch.arange(30)})
    for name, stride in ((checkpoint.STATE, 37), (checkpoint.NOTE, 1)):
        whole = (path / name).read_bytes()
        for place in range(0, len(whole), stride):
            (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"no checkpoint in .* is good"):
                checkpoint.newest_good(tmp_path)
        (path / name).write_bytes(whole)
    assert checkpoint.newest_good(tmp_path)[0] is not None


@pytest.mark.parametrize(
    "note", [b"", b"[]", b"null", b"7", b"[" * 100_000, b'{"stage": "autoencoder", "step": 2}', b"\xff\xfe"]
)
def test_notes_that_are_none(note: bytes, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "autoencoder", 1, {})
    path = checkpoint.save(tmp_path, "autoencoder", 2, {})
    (path / checkpoint.NOTE).write_bytes(note)
    (tmp_path / "autoencoder-step-²").mkdir()
    newest, (sentence,) = checkpoint.newest_good(tmp_path)
    assert newest is not None and newest.step == 1
    assert sentence.endswith(f"its {checkpoint.NOTE} is damaged")


def test_tensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Copied into a model, they would be converted silently."""
    for number, tensor in enumerate(
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2).to_sparse(), torch.ones(2) * 1j)
    ):
        with pytest.raises(CheckpointError, match="floating tensors"):
            release.read_state_dict({"w": tensor})
        torch.save({"w": tensor}, tmp_path / f"{number}.pth")
        with pytest.raises(CheckpointError):
            release.read_state_dict(tmp_path / f"{number}.pth")


def test_an_archive_that_would_grow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(1 << 20))
    with pytest.raises(CheckpointError, match="compressed"):
        release.read_state_dict(path)


def test_a_model_folder_without_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    autoencoder().save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    state = load_file(path)
    del state["xy_token"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match="xy_token"):
        release.load_model(Autoencoder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Autoencoder", "frames": "x"}))
    with pytest.raises(CheckpointError):
        release.load_model(Autoencoder, tmp_path)
