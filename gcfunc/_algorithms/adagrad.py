"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfunc._algorithms.pipeline import pipeline
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import Scalars, Slots
from gcfunc._step.hyperparams import Number, check
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, div, mul, sqrt


def adagrad(
    lr: Number = 1e-2,
    lr_decay: Number = 0.0,
    weight_decay: Number = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Number = 1e-10,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r"""Adagrad (https://jmlr.org/papers/v12/duchi11a.html), with coupled (L2) weight decay.

    .. math::
        u_t &= \Phi(g_t + \lambda\theta_{t-1}), \qquad s_t = s_{t-1} + u_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 + (t - 1)\eta}\,
            \frac{u_t}{\sqrt{s_t} + \epsilon}

    with :math:`\Phi` the centralization that ``gc`` asks for (the identity by default). Equal to
    :class:`torch.optim.Adagrad` when ``gc`` is ``None`` and to the reference's ``Adagrad_GC`` and
    ``Adagrad_GCC`` otherwise.

    Args:
        lr: Learning rate :math:`\gamma`.
        lr_decay: :math:`\eta`.
        weight_decay: :math:`\lambda`, added to the gradient and centralized with it.
        initial_accumulator_value: What every entry of :math:`s_0` is.
        eps: :math:`\epsilon`, added outside the root.
        gc: ``None`` (plain), a rule such as ``"gc"`` or ``"gcc"``, or a :class:`gcfunc.GC`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a real 0-d tensor.
        ValueError: a hyperparameter is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.adagrad(lr=0.1, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, opt.init(params))[0]
        {'weight': tensor([[ 0.1000, -0.1000]])}
    """
    check(initial_accumulator_value=initial_accumulator_value)

    def start(param: Tensor) -> Tensor:
        return torch.full_like(param, float(initial_accumulator_value), requires_grad=False)

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        return {"lr": h["lr"] / (1 + (step - 1) * h["lr_decay"]), "eps": h["eps"]}

    def direction(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
        total = add(slots["sum"], mul(u, u))
        return div(u, add(sqrt(total), s["eps"])), {"sum": total}

    return pipeline(
        "adagrad",
        check(lr=lr, weight_decay=weight_decay, lr_decay=lr_decay, eps=eps),
        {"sum": start},
        scalars,
        direction,
        decoupled=False,
        gc=gc,
    )
