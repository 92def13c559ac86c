"""Steps of gcfunc, of torch.optim, and of the reference's algorithms as plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gcfunc
from benchmarks.peers.algorithms import (
    DECAY,
    DROP_INS,
    LR,
    MOMENTUM,
    NEAREST,
    NEAREST_FUSED,
    OURS,
    TORCH,
)

Params = dict[str, Tensor]
Tree = Any


class Peer(NamedTuple):
    """A step to call again and again, and the params it moves."""

    step: Callable[[], object]
    params: Tree


def torch_optim(algorithm: str, params: Params, grads: Params, *, loop: bool, **how: bool) -> Peer:
    """torch.optim's step; with ``loop`` after a Python loop that centralizes the gradients."""
    return _torch_optim(algorithm, params, grads, loop=loop, **how)[0]


def _torch_optim(
    algorithm: str, params: Params, grads: Params, *, loop: bool, **how: bool
) -> tuple[Peer, torch.optim.Optimizer]:
    ps = with_grads(params, grads)
    opt = TORCH[algorithm](ps, **how)

    def centralize_and_step() -> None:
        centralize_by_loop(ps)
        opt.step()

    step = centralize_and_step if loop else opt.step
    return Peer(step, dict(zip(params, ps, strict=True))), opt


def centralize_by_loop(ps: Iterable[Tensor]) -> None:
    """What people write between ``loss.backward()`` and ``optimizer.step()``."""
    for p in ps:
        if p.ndim > 1 and p.grad is not None:
            p.grad.sub_(p.grad.mean(tuple(range(1, p.ndim)), keepdim=True))


def compiled_torch(algorithm: str, params: Params, grads: Params, *, loop: bool) -> Peer:
    """torch.optim's default step under torch.compile, with ``loop`` after centralizing there.

    The learning rate is a tensor, so that a schedule would not compile again. torch then refuses
    foreach, its default on accelerators, unless the step is ``capturable``.
    """
    peer, opt = _torch_optim(algorithm, params, grads, loop=loop)
    for group in opt.param_groups:
        group["lr"] = torch.tensor(LR)
        if "capturable" in group:
            group["capturable"] = group["params"][0].device.type != "cpu"
    return Peer(torch.compile(peer.step), peer.params)


def fastest_torch(algorithm: str, params: Params, grads: Params) -> Peer:
    """torch.optim's fused step without GC, or the nearest."""
    named = NEAREST_FUSED.get(algorithm, algorithm)
    return torch_optim(named, params, grads, loop=False, fused=True)


def foreach_torch(algorithm: str, params: Params, grads: Params) -> Peer:
    """torch.optim's foreach step without GC, or the nearest."""
    return torch_optim(NEAREST.get(algorithm, algorithm), params, grads, loop=False, foreach=True)


def drop_in(algorithm: str, params: Params, grads: Params, *, gc: str | None = "gc") -> Peer:
    """gcfunc's torch.optim class, compiled."""
    ps = with_grads(params, grads)
    opt = DROP_INS[algorithm](ps, gc=gc, compile=True)
    return Peer(opt.step, dict(zip(params, ps, strict=True)))


def with_grads(params: Params, grads: Params) -> list[Tensor]:
    """Copies of the params that hold copies of the gradients, as torch.optim wants them."""
    ps = [p.clone() for p in params.values()]
    for p, g in zip(ps, grads.values(), strict=True):
        p.grad = g.clone()
    return ps


def eager(algorithm: str, params: Params, grads: Params, *, gc: str | None) -> Peer:
    """gcfunc's pure step as it is, from the same params and state again and again."""
    opt = OURS[algorithm](gc)
    state = opt.init(params)
    return Peer(lambda: opt.step(params, grads, state), params)


def ours(
    algorithm: str,
    params: Params,
    grads: Params,
    *,
    gc: str | None,
    packed: bool,
    donate: bool,
    packing: bool = False,
) -> Peer:
    """gcfunc's compiled step; pure ones go on from the same params and state again and again.

    Gradients for packed params are packed beforehand or, with ``packing``, in every step.
    """
    opt = gcfunc.compile(OURS[algorithm](gc), donate=donate)
    own: Tree = {name: p.clone() for name, p in params.items()}
    own_grads: Tree = grads
    if packed:
        own = gcfunc.pack(own)
        own_grads = gcfunc.pack(grads, like=own)
    state = opt.init(own)
    if packing:
        return Peer(lambda: opt.step(own, gcfunc.pack(grads, like=own), state), own)
    return Peer(lambda: opt.step(own, own_grads, state), own)


def reference(algorithm: str, params: Params, grads: Params) -> Peer:
    """The reference's algorithm tensor by tensor: some temporaries and a dozen calls for each."""
    ps = [p.clone() for p in params.values()]
    gs = [g.clone() for g in grads.values()]
    first = [torch.zeros_like(p) for p in ps]
    second = [torch.zeros_like(p) for p in ps]
    t = 0

    def centralized(g: Tensor) -> Tensor:
        return g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g

    def sgd() -> None:
        for p, g, b in zip(ps, gs, first, strict=True):
            u = centralized(g + DECAY * p)
            b.mul_(MOMENTUM).add_(u)
            p.add_(b, alpha=-LR)

    def adamw() -> None:
        nonlocal t
        t += 1
        for p, g, m, v in zip(ps, gs, first, second, strict=True):
            u = centralized(g)
            m.mul_(0.9).add_(u, alpha=0.1)
            v.mul_(0.999).addcmul_(u, u, value=0.001)
            denominator = v.sqrt().div_((1 - 0.999**t) ** 0.5).add_(1e-8)
            update = m.div(1 - 0.9**t).div_(denominator).add_(p, alpha=0.01)
            p.add_(update, alpha=-LR)

    def adagrad() -> None:
        for p, g, s in zip(ps, gs, first, strict=True):
            u = centralized(g)
            s.addcmul_(u, u)
            p.addcdiv_(u, s.sqrt().add_(1e-10), value=-LR)

    step = {"sgd": sgd, "adamw": adamw, "adagrad": adagrad}[algorithm]
    return Peer(torch.no_grad()(step), dict(zip(params, ps, strict=True)))
