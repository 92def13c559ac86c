"""A formula on one tensor in one launch: what hooks do to each gradient while backward runs."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from gcfunc._rows import fit
from gcfunc._rows.launch import compiled_in, kernels_of, on_device
from gcfunc._rows.layout import BYTES, Problem, shape_of
from gcfunc._rows.program import Formula, program_of


def on_rows(formula: Formula, g: Tensor) -> Tensor | None:
    """What a formula makes of a tensor, row by row; ``None`` where there is no kernel for it.

    There is none in a graph that torch.compile traces, as Inductor fuses the formula with what
    stands around it.
    """
    if (
        torch.compiler.is_compiling()
        or not fit.is_for(g.device)
        or g.device in _BROKEN
        or type(g) is not Tensor
        or g.is_neg()
        or not g.numel()
        or not fit.in_rows([g])
        or _is_traced()
    ):
        return None
    program = program_of(formula, g.dtype, 1, (), alone=True)
    if program is None:
        return None
    problem = Problem(g.numel(), g.numel() // g.shape[0])
    new = torch.empty_strided(g.size(), g.stride(), dtype=g.dtype, device=g.device)
    most = BYTES // g.itemsize
    even = problem.row % most == 0 and (g.data_ptr() | new.data_ptr()) % BYTES == 0
    shape = shape_of(problem.row, most if even else 1)
    grid = (-(-problem.rows // shape.rows),)
    constants = _constants(shape, g.dtype)
    try:
        whole, long = kernels_of(program)
        kernel = long if shape.long else whole
        with on_device(g.device):
            kernel[grid](g, new, problem.row, problem.numel, **constants)
    except Exception as error:
        # No compiler for C, say. What was two operations before is so again.
        _BROKEN.add(g.device)
        warnings.warn(f"Triton's kernels do not start on {g.device}: {error}", stacklevel=2)
        return None
    return new


_BROKEN: set[torch.device] = set()
"""Where a kernel did not start."""


def _is_traced() -> bool:
    """Whether something takes down the operations of torch, of which the kernel is none."""
    # Private: torch has no public way to ask for its dispatch modes.
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or is_in_torch_dispatch_mode()


_constants = lru_cache(maxsize=256)(compiled_in)
