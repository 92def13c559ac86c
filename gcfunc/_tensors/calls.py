"""A module called with tensors that are not its own, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gcfunc._tensors import trees
from gcfunc._tensors.modules import require_module
from gcfunc._tensors.packed import Packed, unpacked

Tensors = dict[str, Tensor]


def functional_call(
    model: nn.Module,
    params_and_buffers: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    r"""Call a module with other parameters and buffers, also where they or modules are shared.

    .. math:: y = f_\theta(x), \qquad \theta_i = \theta'_i \text{ where } \theta' \text{ is given}

    As :func:`torch.func.functional_call`, which ruins a module that the model reaches by two names
    (`pytorch issue 164759 <https://github.com/pytorch/pytorch/issues/164759>`_): it exchanges one
    tensor twice, and puts back what it was given itself. Here each module's tensors are exchanged
    once. ``torch.func.grad`` and ``vmap`` go through it, and :func:`torch.compile` traces it.

    Args:
        model: The module. One thread may call it at a time.
        params_and_buffers: Tensors by name, any of :meth:`torch.nn.Module.named_parameters` and
            :meth:`~torch.nn.Module.named_buffers`; several such dicts, as ``(params, buffers)``;
            or what :func:`gcfunc.pack` made of one. A shared tensor is given under one of its
            names, or the same under several, and stands under all. What is not given is the
            model's own. Buffers are written where the forward writes them; those that it replaces
            are replaced in the dict given, too.
        args: What the module is called with: a tuple, or a single argument.
        kwargs: Keyword arguments for the call.

    Returns:
        What the module returns.

    Raises:
        TypeError: the model is no module, or what is given are no dicts of tensors.
        ValueError: a name is none of the model's or is given twice, or a tensor that the model
            shares is given as two.

    Example:
        >>> import torch, gcfunc
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> twice = torch.nn.Sequential(layer, layer)
        >>> def loss(params, x):
        ...     return gcfunc.functional_call(twice, params, x).sum()
        >>> torch.func.grad(loss)({"0.weight": torch.eye(2)}, torch.tensor([[1.0, 2.0]]))
        {'0.weight': tensor([[2., 4.],
                [2., 4.]])}
        >>> twice[0].weight is twice[1].weight
        True
    """
    require_module(model)
    places = dict(_places(model))
    given = _given(params_and_buffers)
    found = {name: name if name in places else _place(model, name) for name in given}
    unknown = [name for name, place in found.items() if place not in places]
    if unknown:
        # For the words alone.
        trees.require_names([*given], [*({*given} - {*unknown})], "params_and_buffers", "the model")
    chosen: dict[Tensor, str] = {}
    for name, tensor in given.items():
        first = chosen.setdefault(places[found[name]], name)
        if given[first] is not tensor:
            raise ValueError(
                f"params_and_buffers: {first!r} and {name!r} are one tensor of the model, and two "
                "are given; give it under one of its names"
            )
    # With ties, torch would take both names of a place that has two for places of their own.
    exchanged = {place: given[chosen[own]] for place, own in places.items() if own in chosen}
    result = torch.func.functional_call(
        model, exchanged, args, None if kwargs is None else dict(kwargs), tie_weights=False
    )
    for tree in _dicts(params_and_buffers):
        if isinstance(tree, dict):
            for name, tensor in tree.items():
                if exchanged[found[name]] is not tensor:
                    tree[name] = exchanged[found[name]]
    return result


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each attribute of each module that holds a parameter or buffer, once, under one name."""
    for prefix, module in model.named_modules():
        yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)
        yield from module.named_buffers(prefix, recurse=False, remove_duplicate=False)


def _place(model: nn.Module, name: str) -> str:
    """The one name for the place that a name leads to, perhaps by another path; else the name."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return name
    own = next(prefix for prefix, module in model.named_modules() if module is owner)
    return f"{own}.{attribute}" if own else attribute


def _dicts(params_and_buffers: Any) -> Sequence[Any]:
    several = isinstance(params_and_buffers, (list, tuple))
    return params_and_buffers if several else (params_and_buffers,)


def _given(params_and_buffers: Any) -> Tensors:
    given: Tensors = {}
    for tree in _dicts(params_and_buffers):
        if not isinstance(tree, (dict, Packed)):
            raise TypeError(
                "params_and_buffers must be a dict of tensors by name, a packed tree, or several, "
                f"got {type(tree).__name__}"
            )
        for name, tensor in unpacked(tree).items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"params_and_buffers: {name!r} must be a tensor, got {type(tensor).__name__}"
                )
            if name in given:
                raise ValueError(f"params_and_buffers: {name!r} is in two of the dicts")
            given[name] = tensor
    return given
