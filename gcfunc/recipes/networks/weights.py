"""Pretrained weights from a file."""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gcfunc.recipes.errors import UsageError

_SHOWN = 3
_COUNT = "num_batches_tracked"


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Have a model start from a file, which must fit it, except in the classifier's shape.

    Args:
        model: Overwritten once the whole file was found to fit, and otherwise left as it was.
        path: A state dict, as ``torch.save(model.state_dict(), path)`` writes it. It is read
            without executing what it may hold besides tensors.

    Returns:
        The names of what was not loaded: those of the classifier, if the file's is for other
        classes.

    Raises:
        UsageError: No such file, not a state dict, or one of another network.
    """
    found, own = _read(path), model.state_dict()
    classifier = _classifier(model)
    # Files from before torch 0.4.1, torchvision's first weights among them, have no such counts.
    optional = {name for name in own if name.rpartition(".")[2] == _COUNT}
    differing = {name for name in own.keys() & found.keys() if own[name].shape != found[name].shape}
    fresh = classifier if differing & classifier else set()
    wrong = [
        _listed("missing", own.keys() - found.keys() - optional),
        _listed("unexpected", found.keys() - own.keys()),
        _listed(
            "of another shape",
            {f"{n} ({_shape(found[n])}, not {_shape(own[n])})" for n in differing - classifier},
        ),
    ]
    if any(wrong):
        raise UsageError(f"{path} does not fit the network: {'; '.join(filter(None, wrong))}")
    model.load_state_dict({n: t for n, t in found.items() if n not in fresh}, strict=False)
    return sorted(fresh)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    # What torch raises where a file is no archive of its, is cut off, or holds other objects.
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a file of weights written by torch.save") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UsageError(f"{path} is not a state dict: names with a tensor each")
    return found


def _classifier(model: nn.Module) -> set[str]:
    """The names of the last linear layer's tensors."""
    *_, last = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {f"{last}.weight", f"{last}.bias"}


def _listed(what: str, names: Collection[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(sorted(names)[:_SHOWN])}{more}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
