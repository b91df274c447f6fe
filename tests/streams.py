"""What stands in for CUDA's streams on a CPU: a log of what happens on which of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class Stream:
    """A stream that notes what it waits for."""

    log: list[str]

    def __init__(self, device: object = None, name: str = "aside") -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        Stream.log.append(f"{self.name} waits for {other.name}")


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    Stream.log.append(f"on {stream.name}")
    yield
    Stream.log.append(f"off {stream.name}")


def replace_streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces torch.cuda's streams, and gives their log."""
    Stream.log = []
    current = Stream(name="current")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    return Stream.log
