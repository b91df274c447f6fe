"""How often a training step waits for the device: once, after the backward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import replace_streams
from torch import Tensor
from training.small import SMALL, steps

from pvdm_fast.analysis.recorder import Recorder, name_of
from pvdm_fast.errors import UserError
from pvdm_fast.jobs import transfer
from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.models import ranges
from pvdm_fast.train import main
from pvdm_fast.training.feed import Feed
from pvdm_fast.training.trainer import Trainer

# What PyTorch answers on a GPU only after everything before has been computed.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")


class Waits(Recorder):
    """Notes the operations whose result the host would have to wait for. Masks as indices are such, too."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        name = name_of(function)
        indices = arguments[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        masked = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if name in WAITING or masked:
            self.log.append(name)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """For each step, in order: what it waited for, "read" where results came to the host, and copies to the device."""
    steps: list[list[str]] = []
    step, values, to = Trainer.train_step, transfer.Reading.values, Tensor.to

    def train_step(self: Trainer, batches: list[Any]) -> dict[str, Any]:
        steps.append([])
        with Waits(steps[-1]):
            return step(self, batches)

    def read(self: transfer.Reading) -> list[float]:
        steps[-1].append("read")
        return values(self)

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device", args[0] if args else None)
        where = sys._getframe(1).f_globals["__name__"]  # PyTorch's own ask, too, where all is on one device
        if steps and isinstance(device, torch.device) and where.startswith("pvdm_fast"):
            steps[-1].append(f"copied by {where}")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(transfer.Reading, "values", read)
    monkeypatch.setattr(Tensor, "to", moved)
    monkeypatch.setattr(ranges, "_seen", lambda tensor: False)  # as on a GPU: values are not looked at
    return steps


@pytest.mark.parametrize(
    "options",
    [
        ["--stage", "autoencoder", "--autoencoder-latent-noise", "0.1", "--autoencoder-accumulate", "2"],
        ["--stage", "autoencoder", "--adversarial-start", "0", "--adversarial-channels", "8"],
        ["--stage", "diffusion", "--diffusion-conditional-probability", "0.5", "--diffusion-accumulate", "2"],
    ],
    ids=["autoencoder", "adversarial", "diffusion"],
)
def test_a_step_waits_once(
    options: list[str], finished: Path, tmp_path: Path, log: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "diffusion" in options:
        options = [*options, "--autoencoder-from", str(finished)]
    sent: list[int] = []
    for owner in ("pvdm_fast.training.stages", "pvdm_fast.training.adversarial"):
        monkeypatch.setattr(f"{owner}.to_device", lambda tensors, device: sent.append(len(tensors)) or list(tensors))
    scores = {"psnr": 0.0, "held_out_loss": 0.0}
    monkeypatch.setattr(Trainer, "score", lambda self: self.progress.scores.update(scores))
    monkeypatch.setattr("pvdm_fast.training.session.show", lambda trainer: None)
    assert main([*SMALL, *steps(3), *options, "--run", str(tmp_path / "run")]) == 0
    assert log == [["read"]] * 3
    assert len(sent) == 3 * (2 if "--autoencoder-accumulate" in options or "--diffusion-accumulate" in options else 1)
    assert min(sent) >= 1


def test_the_counter_counts() -> None:
    """Else the test above could not fail."""
    found: list[str] = []
    x = torch.arange(4.0)
    with Waits(found):
        x.sum().item()
        x[x > 1]
        x[x > 1] = torch.zeros(2)
        bool((x > 1).any())
    assert found == ["_local_scalar_dense", "index", "index_put_", "_local_scalar_dense"] or "nonzero" in found
    assert len(found) >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
def test_what_is_packed_is_unpacked(dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 3), (torch.rand(5) < 0.5).to(dtype), torch.randint(9, (1, 2, 2)), torch.empty(0)]
    tensors.append(torch.randn(4, 6).t()[::2])  # of any strides
    found = transfer.unpack(transfer.pack(tensors), tensors)
    for tensor, view in zip(tensors, found, strict=True):
        assert torch.equal(tensor, view) and tensor.dtype == view.dtype
        assert view.data_ptr() % transfer.ALIGNMENT == 0
    same = transfer.to_device(tensors, torch.device("cpu"))
    assert all(a is b for a, b in zip(same, tensors, strict=True))


def test_draws_cross_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU: here one without memory, which says what arrives where."""
    copies: list[tuple[Any, ...]] = []
    to = Tensor.to

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copies.append((self.dtype, args, kwargs))
        return to(self, *args, **kwargs)

    pack = transfer.pack
    monkeypatch.setattr(transfer, "pack", lambda tensors, pinned: pinned and pack(tensors))
    monkeypatch.setattr(Tensor, "to", moved)
    noise, steps = transfer.to_device([torch.randn(2, 4), torch.randint(9, (2,))], torch.device("meta"))
    assert copies == [(torch.uint8, (torch.device("meta"),), {"non_blocking": True})]
    assert (noise.shape, noise.dtype, steps.shape, steps.dtype) == ((2, 4), torch.float32, (2,), torch.int64)
    assert noise.device.type == steps.device.type == "meta"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda's streams replaced, and tensors that are copied there noted; gives the log."""
    log = replace_streams(monkeypatch)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: log.append(f"copied {self}") or self)
    return log


class Alone:
    """The processes of a job: one."""

    class share:
        world = 1


def clips(values: list[float]) -> Iterator[Any]:
    for value in values:
        yield {"video": torch.tensor(value), "names": [str(value)], "labels": [None], "skipped": {}}
    raise UserError("the data gave out")


def test_the_next_clips_come_on_a_stream_of_their_own(streams: list[str]) -> None:
    """While the step computes; a stream that uses them waits, and holds their memory."""
    source = Feed(clips([1.0, 2.0]), 1, torch.device("cuda"), StopRequest(Alone()))  # type: ignore[arg-type]
    copy, use = ["on aside", "copied {}", "off aside"], ["current waits for aside", "kept for current"]
    assert source.take()[0]["names"] == ["1.0"]
    assert streams == [line.format("1.0") for line in (*copy, *use)]
    streams.clear()
    source.read_ahead()
    source.read_ahead()
    assert streams == [line.format("2.0") for line in copy]
    streams.clear()
    assert source.take()[0]["names"] == ["2.0"]
    assert streams == use
    source.read_ahead()  # what goes wrong is for the step that needs it
    with pytest.raises(UserError, match="the data gave out"):
        source.take()


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    left = [1.0]
    source = Feed(clips(left), 1, torch.device("cpu"), StopRequest(Alone()))  # type: ignore[arg-type]
    source.read_ahead()
    left[0] = 3.0  # what is read from here on
    assert source.take()[0]["video"] == 3.0
