"""The row kernel as two operators of torch, so that it is one call in a graph of torch.compile.

``gcfunc::step_rows_`` writes over params and slots, ``gcfunc::step_rows`` makes new ones. The
program goes along as text: a graph that is loaded from a cache in another process has all it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gcfunc._rows.launch import Launcher
from gcfunc._rows.layout import Problem

_NAMESPACE = "gcfunc"
_ARGUMENTS = "Tensor[] grads, Tensor[] scalars, str program, SymInt[] widths"
_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
# A CUDA graph would replay the copy of a table whose memory is given back.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe)
_library.define(
    f"step_rows_(Tensor(a!)[] params, Tensor(b!)[] slots, {_ARGUMENTS}) -> ()",
    tags=_TAGS,
)
_library.define(
    f"step_rows(Tensor[] params, Tensor[] slots, {_ARGUMENTS}) -> Tensor[]",
    tags=_TAGS,
)


def _step_rows_(params: Sequence[Tensor], slots: Sequence[Tensor], *rest: Any) -> None:
    _launch([*params, *slots], [*params, *slots], *rest)


def _step_rows(params: Sequence[Tensor], slots: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    new = _like(params, slots)
    _launch([*params, *slots], new, *rest)
    return new


def _like(params: Sequence[Tensor], slots: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
        for t in (*params, *slots)
    ]


def _launch(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    grads: Sequence[Tensor],
    scalars: Sequence[Tensor],
    program: str,
    widths: Sequence[int],
) -> None:
    """``old`` and ``new`` are params, and then each slot's."""
    n = len(grads)
    problems = tuple(Problem(g.numel(), w or None) for g, w in zip(grads, widths, strict=True))
    launcher = _launcher(program, problems, grads[0].dtype, grads[0].device)
    at = [[t.data_ptr() for t in tensors] for tensors in (old, new)]
    own, into = ([tuple(a[i : i + n]) for i in range(0, len(a), n)] for a in at)
    columns = (own[0], tuple(g.data_ptr() for g in grads), *own[1:], *into)
    launcher.prepared(columns, scalars)()


@lru_cache(maxsize=16)
def _launcher(
    program: str, problems: tuple[Problem, ...], dtype: torch.dtype, device: torch.device
) -> Launcher:
    return Launcher(program, problems, dtype, device)


for _key in ("CUDA", "CPU"):
    _library.impl("step_rows_", _step_rows_, _key)
    _library.impl("step_rows", _step_rows, _key)
torch.library.register_fake(f"{_NAMESPACE}::step_rows_", lambda *arguments: None, lib=_library)
torch.library.register_fake(
    f"{_NAMESPACE}::step_rows", lambda params, slots, *rest: _like(params, slots), lib=_library
)
