"""Lion."""

from __future__ import annotations

from torch import Tensor

from gcfunc._algorithms.pipeline import pipeline, zeros
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import Scalars, Slots
from gcfunc._step.hyperparams import Number, check, check_betas
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, average, sign


def lion(
    lr: Number = 1e-4,
    betas: tuple[Number, Number] = (0.9, 0.99),
    weight_decay: Number = 0.0,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r"""Lion (https://arxiv.org/abs/2302.06675), with decoupled weight decay.

    .. math::
        u_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1)\, \Phi(g_t)), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2)\, \Phi(g_t) \\
        \theta_t &= \theta_{t-1} - \gamma (u_t + \lambda\theta_{t-1})

    with :math:`\Phi` the centralization that ``gc`` asks for (the identity by default). The sign of
    a centralized gradient has no zero mean; with ``at="update"``, :math:`\Phi` acts on
    :math:`u_t + \lambda\theta_{t-1}` instead, which then has one.

    Args:
        lr: Learning rate :math:`\gamma`. Every entry moves by this much, decay aside, so that it is
            3 to 10 times smaller than Adam's.
        betas: :math:`(\beta_1, \beta_2)`.
        weight_decay: :math:`\lambda`, which is to be as many times larger.
        gc: ``None`` (plain), a rule such as ``"gc"`` or ``"gcc"``, or a :class:`gcfunc.GC`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a real 0-d tensor.
        ValueError: a hyperparameter is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.lion(lr=0.1, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, opt.init(params))[0]
        {'weight': tensor([[ 0.1000, -0.1000]])}
    """

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        beta1, beta2 = h["beta1"], h["beta2"]
        return {"beta1": beta1, "1 - beta1": 1 - beta1, "beta2": beta2, "1 - beta2": 1 - beta2}

    def direction(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
        m = slots["exp_avg"]
        new = {"exp_avg": average(m, s["beta2"], u, s["1 - beta2"])}
        return sign(average(m, s["beta1"], u, s["1 - beta1"])), new

    return pipeline(
        "lion",
        check(lr=lr, weight_decay=weight_decay) | check_betas(betas),
        {"exp_avg": zeros},
        scalars,
        direction,
        decoupled=True,
        gc=gc,
    )
