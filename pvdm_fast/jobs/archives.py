"""Files of torch.save that may come from strangers. Sizes are checked against their bytes before any allocation."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pvdm_fast.jobs.reading import UnreadableFile, file_clock, open_regular

MAX_ENTRIES = 100_000  # `base` has 1,100 tensors, its training state 3,400
MAX_PICKLE = 64 << 20  # bytes: a hundred for each tensor, and every unreadable file by name
SHARED = 2  # tensors may share memory, so that they are more than the file; copied they are at most this many times it


def load_archive(path: Path) -> Any:
    """What torch.save wrote, on the CPU. Only tensors and plain values are read, and nothing is executed.

    Raises:
        UnreadableFile: the file is damaged, older than PyTorch 1.6, would run code, or holds tensors that would be
            larger in memory than the file. OSError: it cannot be opened.
    """
    with file_clock(path):
        _check_entries(path)
        try:
            # Memory-mapped: a storage that claims more bytes than its entry ends with the file, and is never read
            # beyond it.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UnreadableFile(
                "was refused: it is not a file of tensors only (it may be damaged, or try to run code when loaded). "
                "Save the model's state_dict() with torch.save"
            ) from error
        except UnreadableFile:
            raise
        except Exception as error:  # a damaged pickle can make its reader raise anything
            raise UnreadableFile(f"can't be read as a PyTorch file: {first_line(error)}") from error
        check_sizes(found, path.stat().st_size)
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, found)


def first_line(error: Exception) -> str:
    """The first line of an error, or its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def check_sizes(found: Any, size: int) -> None:
    """Raises UnreadableFile for tensors that are larger than their memory, or together than ``size`` bytes of a file:
    with a stride of 0 four bytes can stand for a terabyte, which any copy would fill."""
    total = 0
    for value in tree_flatten(found)[0]:
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            needed = value.numel() * value.itemsize
            if needed > value.untyped_storage().nbytes():
                raise UnreadableFile(f"was refused: a tensor of {tuple(value.shape)} has fewer values than that")
            total += needed
    if total > SHARED * size:
        raise UnreadableFile(f"was refused: its tensors would take {total} bytes, the file has {size}")


def _check_entries(path: Path) -> None:
    """The list of the archive's parts, and their checksums, which torch.load ignores."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_list(entries, path.stat().st_size)
            damaged = archive.testzip()
    except (OSError, UnreadableFile):
        raise
    except Exception as error:  # of a damaged archive: BadZipFile, struct.error, ValueError, OverflowError, ...
        raise UnreadableFile(
            "can't be read as a PyTorch file: it is damaged, or older than PyTorch 1.6 (load it there and save it "
            f"again with torch.save): {first_line(error)}"
        ) from error
    if damaged is not None:
        raise UnreadableFile(f"is damaged: the checksum of its part {damaged} is wrong. Copy or fetch it again")


def _check_list(entries: list[zipfile.ZipInfo], size: int) -> None:
    """torch.save doesn't compress, and lists nothing twice, so the parts must be smaller than the file."""
    if len(entries) > MAX_ENTRIES:
        raise UnreadableFile(f"was refused: it lists {len(entries)} parts, more than {MAX_ENTRIES}")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise UnreadableFile("was refused: parts of it are compressed, as torch.save never writes them")
    names, places = {entry.filename for entry in entries}, {entry.header_offset for entry in entries}
    if min(len(names), len(places)) < len(entries):
        raise UnreadableFile("was refused: it lists a part twice")
    if sum(entry.file_size for entry in entries) > size:
        raise UnreadableFile("was refused: its parts are larger than the file")
    if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE for entry in entries):
        raise UnreadableFile(f"was refused: its list of tensors has more than {MAX_PICKLE} bytes")
