"""All that is compared, by the names that results and tables have for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.peers import steps, third_party

FUSED = "torch fused, no GC"
"""The baseline, :func:`benchmarks.peers.steps.fastest_torch`."""

CANDIDATES: dict[str, Callable[..., steps.Peer]] = {
    "gcfunc packed": partial(steps.ours, gc="gc", packed=True, donate=True),
    "gcfunc": partial(steps.ours, gc="gc", packed=False, donate=True),
    "gcfunc drop-in": steps.drop_in,
    "gcfunc packed, and packing": partial(
        steps.ours, gc="gc", packed=True, donate=True, packing=True
    ),
    "gcfunc packed, no GC": partial(steps.ours, gc=None, packed=True, donate=True),
    "torch fused + loop": partial(steps.torch_optim, fused=True, loop=True),
    "torch foreach + loop": partial(steps.torch_optim, foreach=True, loop=True),
    "torch for-loop + loop": partial(steps.torch_optim, foreach=False, loop=True),
    "torch foreach, no GC": partial(steps.torch_optim, foreach=True, loop=False),
    "torch for-loop, no GC": partial(steps.torch_optim, foreach=False, loop=False),
    "torch compiled, no GC": partial(steps.compiled_torch, loop=False),
    "torch compiled + loop": partial(steps.compiled_torch, loop=True),
    "pytorch_optimizer GC + torch fused": third_party.pytorch_optimizer_gc,
    "pytorch_optimizer": third_party.pytorch_optimizer,
    "optax": third_party.optax,
    "optimi, no GC": third_party.optimi,
    "reference loop": steps.reference,
}
