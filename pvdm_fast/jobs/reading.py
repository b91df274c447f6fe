"""Files that may come from strangers: only regular files are opened, with limits on size and time."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

READ_TIMEOUT = 120.0  # seconds for one file; large ones get more, see `allowed_seconds`
SLOWEST = 5_000_000  # bytes a second: a slow network disk
CONFIG_BYTES = 256 << 10  # PyYAML reads about 100 KB a second; our own files have 4 KB
DOCUMENT_BYTES = 256 << 20  # results.json and index.json name every unreadable file
LINE_BYTES = 1 << 20  # of metrics.jsonl, whose longest lines name the clips of a step


class UnreadableFile(ValueError):
    """A file that can't be read as what it should be. The message continues after the file's name."""


class SlowFile(UnreadableFile):
    """A file that took longer than it may."""


def allowed_seconds(size: int) -> float:
    """How long reading a file of so many bytes may take."""
    return READ_TIMEOUT + size / SLOWEST


@contextmanager
def time_limit(seconds: float, expired: Callable[[], Exception]) -> Iterator[None]:
    """Raise ``expired()`` in the block when ``seconds`` are over (0: never), as soon as Python runs.

    Only in the main thread, and only if no other alarm is set.
    """
    if (
        not seconds
        or threading.current_thread() is not threading.main_thread()
        or any(signal.getitimer(signal.ITIMER_REAL))
    ):
        yield
        return
    over: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        over.append(number)
        raise expired()

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception:  # libraries have their own words for it, such as "interrupted system call"
        if over:
            raise expired() from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def file_clock(path: Path) -> Any:
    """A `time_limit` for reading all of ``path``. Raises `SlowFile`."""
    try:
        seconds = allowed_seconds(path.stat().st_size)
    except OSError:
        seconds = READ_TIMEOUT
    return time_limit(seconds, lambda: SlowFile(f"could not be read within {seconds:.0f} s"))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Pipes and devices are refused, because they could block a reader forever.

    Raises:
        UnreadableFile: it is something else than a file. OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile("is not a file but a folder, a pipe or a device")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int = DOCUMENT_BYTES) -> bytes:
    """The contents of a file. If there are more than ``limit`` bytes, raises UnreadableFile before reading."""
    with file_clock(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UnreadableFile(f"has {size} bytes, more than the {limit} that such a file may have")
        return file.read(limit)


def read_text(path: Path, limit: int = DOCUMENT_BYTES) -> str:
    """The UTF-8 text of a file. Raises UnreadableFile and OSError."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise UnreadableFile("is not UTF-8 text") from None


def parse_json(text: str | bytes) -> Any:
    """A JSON document. Any fault in it is an UnreadableFile."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UnreadableFile("is nested too deeply") from None
    except ValueError as error:
        raise UnreadableFile(f"is not valid JSON ({str(error)[:100]})") from None


def read_json(path: Path, limit: int = DOCUMENT_BYTES) -> Any:
    """A JSON file. Raises UnreadableFile and OSError."""
    return parse_json(read_text(path, limit))


def read_json_object(path: Path, limit: int = DOCUMENT_BYTES) -> dict[str, Any]:
    """A JSON file with an object. Raises UnreadableFile and OSError."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise UnreadableFile("does not hold a JSON object")
    return value


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a file with one JSON document per line, one in memory at a time.

    Lines that are damaged, cut off or longer than 1 MiB are left out. Raises UnreadableFile and OSError.
    """
    for line in _lines(path):
        try:
            yield parse_json(line.decode("utf-8", "replace"))
        except UnreadableFile:
            continue


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without those that are too long. The clock is on each piece that is read."""

    def clock() -> Any:
        return time_limit(READ_TIMEOUT, lambda: SlowFile(f"could not be read within {READ_TIMEOUT:.0f} s"))

    with clock():
        file = open_regular(path)
    with file:
        begun, too_long = b"", False
        while True:
            with clock():
                piece = file.read(LINE_BYTES)
            *whole, begun = (begun + piece).split(b"\n")
            if whole and too_long:
                del whole[0]
                too_long = False
            yield from whole
            if not piece:
                break
            if len(begun) > LINE_BYTES:
                begun, too_long = b"", True
        if begun and not too_long:
            yield begun


@cache
def _loader() -> Any:
    import yaml  # here: the networks import this module for their checksums, and need no YAML

    class Loader(yaml.SafeLoader):
        """Plain YAML without aliases. Ten lines of aliases can stand for a billion values."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise UnreadableFile("uses an alias (*name), which is not read: write the value itself")
            return super().compose_node(parent, index)

    return Loader


def read_yaml(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """A YAML (or JSON) file without aliases. Raises UnreadableFile and OSError."""
    import yaml

    text = read_text(path, limit)
    try:
        with file_clock(path):
            return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        raise UnreadableFile(f"is not valid YAML{f' at line {place.line + 1}' if place else ''}") from None
    except RecursionError:
        raise UnreadableFile("is nested too deeply") from None
    except UnreadableFile:
        raise
    except (ValueError, OverflowError) as error:  # dates and numbers that are none
        raise UnreadableFile(f"holds a value that is none ({str(error)[:100]})") from None
