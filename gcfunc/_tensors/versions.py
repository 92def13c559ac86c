"""What some of the supported versions of torch lack, and is worked round there alone.

A test for each says which versions these are. What every version lacks is worked round where it
matters; docs/versions.md lists all.
"""

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""The version that is installed, such as ``(2, 14)``."""

LOSES_0D_FLOAT64 = TORCH < (2, 14)
"""On the CPU, Inductor loses in-place writes to 0-d float64 tensors."""

COUNTS_RECOMPILES_TOGETHER = TORCH < (2, 13)
"""torch.compile has no ``isolate_recompiles``."""

LISTS_ATTRIBUTES = TORCH >= (2, 12)
"""Dynamo can trace ``list(vars(module))``."""

TRACES_THREADS_TOGETHER = TORCH < (2, 14)
"""While one thread compiles, torch refuses calls of compiled functions in all others."""

CONFIGURES_THREADS_TOGETHER = TORCH < (2, 12)
"""torch's configuration is patched for all threads at once."""
