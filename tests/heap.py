"""The native heap, which neither torch's counters nor Python's see, and the memory that the process really has."""

import ctypes
from pathlib import Path

import pytest


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in [*"abcd", "mapped", *"fg", "in_use", *"ij"])


try:
    _mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    _mallinfo.restype = _Info
except (OSError, AttributeError):
    _mallinfo = None


def in_use() -> int:
    """Bytes that are allocated and not freed."""
    if _mallinfo is None:
        pytest.skip("no mallinfo2 of glibc 2.33")
    info = _mallinfo()
    return info.in_use + info.mapped


def resident() -> int:
    """Bytes of physical memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])
