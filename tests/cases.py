"""The case table every property is crossed with."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import gcfunc
from gcfunc import GC, Optimizer
from gcfunc._catalog import CATALOG, Algorithm, Options

Params = dict[str, Tensor]
Build = Callable[[GC | str | None], Optimizer]

GCS: dict[str, GC | None] = {
    "plain": None,
    "gc": GC("gc"),
    "gcc": GC("gcc"),
    "gc2": GC("gc", at="update"),
    "gcc2": GC("gcc", at="update"),
}


def _build(algorithm: Algorithm, options: Options) -> Build:
    return lambda gc: algorithm.make(gc=gc, **options)


# Every algorithm of the library, with every option it has on somewhere.
ALGORITHMS: dict[str, Build] = {
    **{
        f"{name}-{variant}".rstrip("-"): _build(algorithm, options)
        for name, algorithm in CATALOG.items()
        for variant, options in algorithm.variants.items()
    },
    "partition": lambda gc: gcfunc.partition(
        {"decay": gcfunc.adamw(0.01, gc=gc), "rest": gcfunc.sgd(0.1, 0.9)},
        lambda name, tensor: "decay" if tensor.ndim >= 2 else "rest",
    ),
}


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> Params:
    """One weight of each common kind."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv2d.weight": (4, 3, 3, 3),
        "conv1d.weight": (3, 2, 3),
        "depthwise.weight": (4, 1, 3, 3),
        "linear.weight": (5, 6),
        "linear.bias": (5,),
        "gain": (),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def random_like(params: Params, seed: int) -> Params:
    """Gradients: normal numbers with a mean that GC has something to subtract."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (0.5 + torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for name, p in params.items()
    }


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Over all tensors, in float64; NaN if there is one."""
    assert a.keys() == b.keys()
    each = [(a[n].double() - b[n].double()).abs().max() for n in a if a[n].numel()]
    return float(torch.stack(each).max())
