"""test_emulation.py runs this under a sanitizer: one kernel of faults.cu, without PyTorch and its threads."""

from __future__ import annotations

import ctypes
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("_faults", sys.argv[1])
assert spec is not None
assert spec.loader is not None
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)


def buffer(size: int) -> int:
    """Zeroed memory from malloc, for any type. The sanitizer knows where it ends."""
    address = int(libc.malloc(size))
    ctypes.memset(address, 0, size)
    return address


fault = sys.argv[2]
if fault != "missing_barrier":
    getattr(faults, fault)(buffer(300 * 4), 0, buffer(4), 300)
if fault in ("none", "missing_barrier"):
    getattr(faults, fault)(buffer(32 * 96 * 2), buffer(32 * 96 * 2), buffer(32 * 32 * 4), 96)
print("done")
