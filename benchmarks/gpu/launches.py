"""What a step sends to the device, by torch's profiler."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.harness import attempts

SHOWN = 8
"""Kernels that are named."""
REPLAYS = ("cudaGraphLaunch", "cuGraphLaunch")


def of(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Kernels, copies and fills of one step, and graphs that it replays.

    In rehearsal, operators of the CPU stand for them.
    """
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            step()
            if device != "cpu":
                torch.cuda.synchronize()
    except Exception as error:
        # Machines may refuse to be profiled; the times hold all the same.
        return {"launches": None, "unprofiled": attempts.described(error)}
    events = profile.events()
    # What is annotated, such as the step of torch.optim, is shown on the device's line as well.
    there = [e for e in events if e.device_type.name == device.upper()]
    names = [e.name for e in there if not e.is_user_annotation]
    most = collections.Counter(name[:80] for name in names).most_common(SHOWN)
    replays = sum(e.name.startswith(REPLAYS) for e in events)
    return {"launches": len(names), "kernels": dict(most), "replays": replays}
