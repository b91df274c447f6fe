"""Memory of the process, on Linux."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_freed_memory() -> None:
    """Ask the C library to keep the memory that tensors on the CPU free, for the next ones.

    By default glibc hands it back to the system, which gives it out again page by page, zeroed: about 1400 pages, a
    tenth of the time, in each step of the tiny autoencoder. Blocks of over 32 MB (glibc's limit) still go back. Other
    C libraries have no such setting, and nothing is changed there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
