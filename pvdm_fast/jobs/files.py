"""Files that are complete or absent: written next to their place, flushed to the disk, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.arguments import did_you_mean

TEMPORARY = ".writing-"
ASIDE = f"{TEMPORARY}old-"


def expect_folder(path: Path, remedy: str = "") -> None:
    """Raises UserError where there is no folder ``path``. It names the neighbour spelt alike, and the remedy."""
    if path.is_dir():
        return
    try:
        there = sorted(item.name for item in path.parent.iterdir() if item.is_dir())
    except OSError:
        there = []
    raise UserError(f"there is no folder {path}{did_you_mean(path.name, there)}{remedy}")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk. Raises OSError if it can't."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_as_usual(path: Path) -> None:
    """Give a file the rights that the umask allows new files: safetensors gives its own to nobody but their owner."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder, which becomes ``path`` when the block ends. An older ``path`` stays until then.

    Whatever goes wrong inside, ``path`` is untouched and the temporary folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for item in sorted(temporary.rglob("*")):
            flush(item)
        flush(temporary)
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder. It is renamed first, so that it is never seen half removed under its name."""
    gone = path.parent / f"{TEMPORARY}gone-{path.name}"
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _replace(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = path.parent / f"{ASIDE}{path.name}"
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, worker: str, option: str) -> Iterator[None]:
    """Keep out other processes that lock this file. The kernel releases the lock when this process dies, for any
    reason.

    Args:
        path: a file in the folder to protect. It is created, and left behind.
        worker: what works there, and ``option`` the option that names another folder: for the message.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the folder {path.parent}: {error.strerror}") from error
    with file:
        try:
            # Not flock: data workers would inherit the lock, and they outlive a killed process by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"another {worker} ({file.read()}) is at work in {path.parent}: wait until it ends, stop it, or name "
                f"another folder with {option}"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to a temporary file, which becomes ``path`` when the block ends without an error."""
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file's contents. ``path`` is the old file or the whole new one."""
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)


def clean_up(folder: Path) -> None:
    """Clean up a folder after a process was killed while writing to it. No other process may be writing there.

    What was moved aside comes back if its successor didn't get into place. Everything else that is unfinished is
    removed, including the video writer's temporary files.
    """
    for old in folder.rglob(f"{ASIDE}*"):
        place = old.with_name(old.name.removeprefix(ASIDE))
        if not place.exists():
            old.rename(place)
    for begun in [*folder.rglob(f"{TEMPORARY}*"), *folder.rglob(".*.tmp")]:
        if begun.is_dir():
            shutil.rmtree(begun, ignore_errors=True)
        else:
            begun.unlink(missing_ok=True)
