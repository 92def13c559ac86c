"""Attributes that a forward writes though they are no parameters and no registered buffers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gcfunc._tensors import trees
from gcfunc._tensors.versions import LISTS_ATTRIBUTES

Held = list[tuple[nn.Module, Sequence[str] | None, Mapping[str, Any]]]
"""For each module the names of all its attributes, if known, and the values of those read."""


class Attributes:
    """What a model holds besides its registered tensors, to be put back after a forward.

    Such as the weights that the old ``weight_norm`` computes, an LSTM's list of its weights, or
    activations kept for later. What ``torch.func`` made is dead when it returns, and torch.compile
    cannot let it out of the graph at all.
    """

    # No context manager: torch 2.11 does not trace one there.

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # torch.compile guards what it reads: a list that grows elsewhere would compile again and
        # again. Some kinds of values, numpy's and sparse ones among them, it cannot read.
        self._traceable = {
            prefix: [name for name, value in vars(module).items() if _is_traceable(value)]
            for prefix, module in model.named_modules()
        }

    def read(self) -> Held:
        """What there is before the forward."""
        held: Held = []
        for prefix, module in self._model.named_modules():
            if torch.compiler.is_compiling():
                names = _names(module) if LISTS_ATTRIBUTES else None
                read: Sequence[str] = self._traceable.get(prefix, ())
            else:
                names, read = _names(module), [*vars(module)]
            held.append((module, names, {name: vars(module).get(name) for name in read}))
        return held


def put_back(held: Held) -> None:
    """Undo what was written since to attributes that hold or held tensors."""
    for module, names, values in held:
        for name, value in values.items():
            own = vars(module).get(name)
            if not _same(own, value) and (_holds_tensors(own) or _holds_tensors(value)):
                setattr(module, name, value)
        if names is None:
            continue
        for name in _names(module):
            if name not in names and _holds_tensors(getattr(module, name)):
                delattr(module, name)


def _names(module: nn.Module) -> list[str]:
    return [*vars(module), *(name for name, _ in module.named_buffers(recurse=False))]


def _is_traceable(value: Any) -> bool:
    if type(value) is tuple:
        return any(isinstance(t, Tensor) for t in value) and all(map(_is_traceable, value))
    if not isinstance(value, Tensor):
        return value is None
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    return plain and not value.is_quantized and not value.is_nested


def _same(one: Any, other: Any) -> bool:
    # Dynamo cannot trace ``is`` for two tuples.
    if type(one) is tuple and type(other) is tuple:
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other


def _holds_tensors(value: Any) -> bool:
    # An LSTM has weak references to its weights, too.
    return any(isinstance(leaf, (Tensor, weakref.ref)) for leaf in trees.leaves_of(value))
