"""Rectified Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfunc._algorithms.adam import moment_scalars, moments
from gcfunc._algorithms.pipeline import pipeline, zeros
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import Scalars, Slots
from gcfunc._step.hyperparams import Number, check, check_betas
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, div, mul, sqrt


def radam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    decoupled_weight_decay: bool = False,
    gc: GC | str | None = None,
) -> Optimizer:
    r"""Rectified Adam (https://arxiv.org/abs/1908.03265).

    Adam's moments :math:`m_t, v_t`, and the variance of its step size estimated from

    .. math::
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}

    While :math:`\rho_t \le 5` that variance cannot be trusted and the step is momentum's,
    :math:`\theta_t = \theta_{t-1} - \gamma\, m_t / (1 - \beta_1^t)`. From then on

    .. math::
        \theta_t = \theta_{t-1} - \gamma\, r_t\,
            \frac{m_t}{1 - \beta_1^t}\, \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon}, \qquad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}
                         {(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}

    Equal to :class:`torch.optim.RAdam` when ``gc`` is ``None``. The reference's RAdam puts eps
    elsewhere and, with weight decay or ``gc_loc=False``, overwrites its momentum while the
    variance is not trusted; that is not reproduced.

    Args:
        lr: Learning rate :math:`\gamma`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`, added outside the root, before the bias correction.
        weight_decay: Coupled (L2) by default: added to the gradient and centralized with it.
        decoupled_weight_decay: Add the decay to the update instead, as :func:`gcfunc.adamw` does.
        gc: ``None`` (plain), a rule such as ``"gc"`` or ``"gcc"``, or a :class:`gcfunc.GC`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a real 0-d tensor.
        ValueError: a hyperparameter is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.radam(lr=0.1, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, opt.init(params))[0]
        {'weight': tensor([[ 0.1000, -0.1000]])}
    """

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        s = moment_scalars(step, h)
        rho_inf = 2 / s["1 - beta2"] - 1
        rho = rho_inf - 2 * step * (1 - s["bias2"]) / s["bias2"]
        trusted = rho > 5
        # Where it is not trusted the ratio may be negative, and its root has no finite derivative.
        safe = torch.where(trusted, rho, 6.0)
        ratio = (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe)
        rectification = torch.where(trusted, ratio, 1.0).sqrt()
        return s | {
            "eps": h["eps"],
            "adaptive": torch.where(trusted, rectification * s["bias2"].sqrt() / s["bias1"], 0.0),
            "plain": torch.where(trusted, 0.0, 1 / s["bias1"]),
        }

    def direction(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
        m, v = moments(u, slots, s)
        adaptive = div(mul(m, s["adaptive"]), add(sqrt(v), s["eps"]))
        return add(adaptive, mul(m, s["plain"])), {"exp_avg": m, "exp_avg_sq": v}

    return pipeline(
        "radam",
        check(lr=lr, weight_decay=weight_decay, eps=eps) | check_betas(betas),
        {"exp_avg": zeros, "exp_avg_sq": zeros},
        scalars,
        direction,
        decoupled=decoupled_weight_decay,
        gc=gc,
    )
