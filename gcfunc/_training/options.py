"""What a training step may be told."""

import math
from numbers import Real
from typing import Any

import torch


def require_options(clip_norm: Any, accumulate: Any, autocast: Any) -> None:
    """Raise TypeError or ValueError for a wrong option."""
    if clip_norm is not None:
        if isinstance(clip_norm, bool) or not isinstance(clip_norm, Real):
            raise TypeError(f"clip_norm must be None or a number, got {clip_norm!r}")
        if not 0 < float(clip_norm) < math.inf:
            raise ValueError(f"clip_norm must be a finite number > 0, got {clip_norm}")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int):
        raise TypeError(f"accumulate must be an integer, got {accumulate!r}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast!r}")
