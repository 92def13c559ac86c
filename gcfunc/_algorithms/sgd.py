"""Stochastic gradient descent with momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfunc._algorithms.pipeline import pipeline, zeros
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import Scalars, Slots
from gcfunc._step.hyperparams import Number, check, is_zero
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, average, mul


def sgd(
    lr: Number,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r"""Stochastic gradient descent, with momentum and coupled (L2) weight decay.

    .. math::
        u_t &= \Phi(g_t + \lambda\theta_{t-1}) \\
        b_t &= \mu b_{t-1} + (1 - \tau) u_t, \qquad b_1 = u_1 \\
        \theta_t &= \theta_{t-1} - \gamma\, b_t
                    \quad\text{or, with Nesterov,}\quad \theta_{t-1} - \gamma (u_t + \mu b_t)

    with :math:`\Phi` the centralization that ``gc`` asks for (the identity by default). Equal to
    :class:`torch.optim.SGD` when ``gc`` is ``None`` and to the reference's ``SGD_GC`` and
    ``SGD_GCC`` otherwise.

    Args:
        lr: Learning rate :math:`\gamma`.
        momentum: :math:`\mu`. With the Python number 0 no buffer is kept, and momentum cannot be
            raised later; a 0-d tensor keeps one whatever its value.
        dampening: :math:`\tau`, skipped on the first step.
        weight_decay: :math:`\lambda`, added to the gradient and centralized with it.
        nesterov: Nesterov momentum; needs ``momentum > 0`` and ``dampening = 0``.
        gc: ``None`` (plain), a rule such as ``"gc"`` or ``"gcc"``, or a :class:`gcfunc.GC`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a real 0-d tensor.
        ValueError: a hyperparameter is out of its bounds, or Nesterov lacks what it needs.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.sgd(lr=0.1, momentum=0.9, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> state = opt.init(params)
        >>> params, state = opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, state)
        >>> params
        {'weight': tensor([[ 0.1000, -0.1000]])}
    """
    return _sgd("sgd", lr, momentum, dampening, weight_decay, nesterov, gc, decoupled=False)


def sgdw(
    lr: Number,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r""":func:`sgd` with decoupled weight decay (https://arxiv.org/abs/1711.05101).

    The decay joins the momentum's result instead of the gradient, so that it is neither averaged
    nor, with ``at="gradient"``, centralized: :math:`\theta_t = \theta_{t-1} - \gamma (b_t +
    \lambda\theta_{t-1})`. Equal to the reference's ``SGDW``, ``SGDW_GC`` and ``SGDW_GCC``.
    Arguments and errors are those of :func:`sgd`.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.sgdw(lr=0.5, weight_decay=0.1)
        >>> params = {"weight": torch.ones(1, 2)}
        >>> opt.step(params, {"weight": torch.zeros(1, 2)}, opt.init(params))[0]
        {'weight': tensor([[0.9500, 0.9500]])}
    """
    return _sgd("sgdw", lr, momentum, dampening, weight_decay, nesterov, gc, decoupled=True)


def _sgd(
    name: str,
    lr: Number,
    momentum: Number,
    dampening: Number,
    weight_decay: Number,
    nesterov: bool,
    gc: GC | str | None,
    *,
    decoupled: bool,
) -> Optimizer:
    hyperparams = check(lr=lr, weight_decay=weight_decay)
    buffer = check(momentum=momentum, dampening=dampening)
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, "
            f"got momentum={momentum} and dampening={dampening}"
        )
    if is_zero(momentum):
        return pipeline(
            name, hyperparams, {}, lambda step, h: {}, _identity, decoupled=decoupled, gc=gc
        )

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        # The buffer starts at 0, so that taking the whole first gradient makes it b_1 = u_1.
        take = torch.where(step == 1, 1.0, 1 - h["dampening"])
        return {"momentum": h["momentum"], "1 - dampening": take}

    def direction(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
        b = average(slots["momentum_buffer"], s["momentum"], u, s["1 - dampening"])
        new = {"momentum_buffer": b}
        return (add(u, mul(b, s["momentum"])) if nesterov else b), new

    return pipeline(
        name,
        hyperparams | buffer,
        {"momentum_buffer": zeros},
        scalars,
        direction,
        decoupled=decoupled,
        gc=gc,
    )


def _identity(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
    return u, slots
