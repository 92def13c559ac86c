"""Other libraries' steps. Each is imported when it is built, so that a missing one fails alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from benchmarks.peers.algorithms import DECAY, LR, MOMENTUM, TORCH
from benchmarks.peers.steps import Params, Peer, with_grads

BETAS, ADAMW_DECAY = (0.9, 0.999), 0.01


def pytorch_optimizer_gc(algorithm: str, params: Params, grads: Params) -> Peer:
    """pytorch_optimizer's ``centralize_gradient``, which stacks equal shapes, before torch fused.

    Coupled decay (SGD) comes after it, and so is not centralized.
    """
    from pytorch_optimizer import centralize_gradient

    ps = with_grads(params, grads)
    opt = TORCH[algorithm](ps, fused=True)

    def step() -> None:
        centralize_gradient([p.grad for p in ps if p.grad is not None])
        opt.step()

    return Peer(step, dict(zip(params, ps, strict=True)))


def pytorch_optimizer(algorithm: str, params: Params, grads: Params) -> Peer:
    """pytorch_optimizer's own optimizer that is nearest, as it is by default.

    SGD: ``SGDW`` with coupled decay, which has no GC, after ``centralize_gradient``. AdamW:
    ``AdamP`` with ``use_gc`` and a threshold at which it never projects, though it looks whether
    to; its eps is inside of the bias correction.
    """
    from pytorch_optimizer import SGDW, AdamP, centralize_gradient

    ps = with_grads(params, grads)
    opt: torch.optim.Optimizer
    if algorithm == "sgd":
        opt = SGDW(ps, LR, MOMENTUM, weight_decay=DECAY, weight_decouple=False)
    elif algorithm == "adamw":
        opt = AdamP(ps, LR, BETAS, weight_decay=ADAMW_DECAY, delta=0.0, use_gc=True)
    else:
        raise LookupError(f"pytorch_optimizer has no {algorithm}")

    def step() -> None:
        centralize_gradient([p.grad for p in ps if p.grad is not None])
        opt.step()

    return Peer(step if algorithm == "sgd" else opt.step, dict(zip(params, ps, strict=True)))


def optimi(algorithm: str, params: Params, grads: Params) -> Peer:
    """optimi's step as it is by default, without GC, which it does not have."""
    import optimi as library

    ps = with_grads(params, grads)
    opt: torch.optim.Optimizer
    if algorithm == "sgd":
        opt = library.SGD(ps, LR, MOMENTUM, weight_decay=DECAY)
    elif algorithm == "adamw":
        # Its own defaults of betas and eps differ from torch's.
        opt = library.AdamW(ps, LR, BETAS, ADAMW_DECAY, eps=1e-8)
    else:
        raise LookupError(f"optimi has no {algorithm}")
    return Peer(opt.step, dict(zip(params, ps, strict=True)))


def optax(algorithm: str, params: Params, grads: Params) -> Peer:
    """``optax.centralize`` and optax's optimizer under ``jax.jit``, params and state donated.

    On the CPU, where jax takes as many threads as there are cores, whatever torch was told; they
    sleep between its steps. Coupled decay (SGD) comes before ``centralize``, as in gcfunc. The eps
    of its Adagrad is inside of the square root, and squared here to mean the same.
    """
    jax: Any = import_module("jax")
    library: Any = import_module("optax")
    # Any other would claim most of an accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    if any(p.device.type != "cpu" for p in params.values()):
        raise NotImplementedError("jax is measured on the CPU only")
    opts: dict[str, Callable[[], Any]] = {
        "sgd": lambda: library.chain(
            library.add_decayed_weights(DECAY), library.centralize(), library.sgd(LR, MOMENTUM)
        ),
        "adamw": lambda: library.chain(
            library.centralize(), library.adamw(LR, *BETAS, weight_decay=ADAMW_DECAY)
        ),
        "adagrad": lambda: library.chain(
            library.centralize(), library.adagrad(LR, initial_accumulator_value=0.0, eps=1e-20)
        ),
    }
    opt = opts[algorithm]()

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = opt.update(grads, state, params)
        return library.apply_updates(params, updates), state

    donating = jax.jit(update, donate_argnums=(0, 1))
    # Copies: what is donated must not be torch's memory.
    own, own_grads = (
        {name: jax.numpy.array(t.numpy()) for name, t in tree.items()} for tree in (params, grads)
    )
    state = opt.init(own)

    def step() -> None:
        nonlocal state
        moved, state = donating(own, state, own_grads)
        jax.block_until_ready((moved, state))
        own.update(moved)

    return Peer(step, own)
