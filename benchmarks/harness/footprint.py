"""Memory: how much there is, how much a step takes, and keeping what was taken."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

SHARE = 0.95
"""How much of the available memory may be used."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""


def status(field: str, of: str = "self/status") -> int:
    """A field of this process's memory status, or of another file in /proc, in bytes."""
    text = (Path("/proc") / of).read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found
    return 1024 * int(found[1])


def beyond(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a step takes at its peak beyond what is held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    # Or the temporaries of the steps before would count as held.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def available(device: str) -> int:
    """Bytes that may be used."""
    if device == "cpu":
        return int(SHARE * status("MemAvailable", "meminfo"))
    return int(SHARE * torch.cuda.mem_get_info()[0])


def keep_memory() -> None:
    """Have glibc give nothing back to the system while this process lives.

    Or large temporaries are faulted in again and again, which takes as long as a step that makes
    them, and now and then twice as long.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
