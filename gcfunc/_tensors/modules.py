"""What is asked of a module and its parameters before either is used."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def require_module(model: Any) -> None:
    """Raise TypeError unless this is a module, made and not only a class."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def require_shape(param: Tensor, name: str) -> None:
    """Raise ValueError for a lazy module's parameter before the first forward."""
    if nn.parameter.is_lazy(param):
        raise ValueError(f"{name} has no shape yet; run the model once")


def flattened_by_fsdp1(params: Mapping[str, Tensor]) -> str | None:
    """What is wrong with parameters that FSDP1 made or flattened, if there are any.

    By private attributes, as FSDP1 has no public way to tell.
    """
    names = [
        repr(name)
        for name, p in params.items()
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
    ]
    if not names:
        return None
    return (
        f"{', '.join(names)}: flattened by FullyShardedDataParallel (FSDP1), so that there are no "
        "rows to centralize; shard with torch.distributed.fsdp.fully_shard (FSDP2)"
    )
