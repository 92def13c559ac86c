"""Adam, with coupled or decoupled weight decay."""

from __future__ import annotations

from torch import Tensor

from gcfunc._algorithms.pipeline import pipeline, zeros
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import Scalars, Slots
from gcfunc._step.hyperparams import Number, check, check_betas
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, average, div, maximum, mul, sqrt


def adam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r"""Adam (https://arxiv.org/abs/1412.6980), with coupled (L2) weight decay.

    .. math::
        u_t &= \Phi(g_t + \lambda\theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) u_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) u_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`\Phi` the centralization that ``gc`` asks for (the identity by default; with
    ``at="update"`` it acts on the fraction instead). Equal to :class:`torch.optim.Adam` when
    ``gc`` is ``None`` and to the reference's ``Adam_GC``, ``Adam_GCC``, ``Adam_GC2`` and
    ``Adam_GCC2`` otherwise.

    Args:
        lr: Learning rate :math:`\gamma`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`, added outside the root.
        weight_decay: :math:`\lambda`, added to the gradient and centralized with it.
        amsgrad: Divide by the largest :math:`v` so far (https://openreview.net/forum?id=ryQu7f-RZ).
        gc: ``None`` (plain), a rule such as ``"gc"`` or ``"gcc"``, or a :class:`gcfunc.GC`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a real 0-d tensor.
        ValueError: a hyperparameter is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.adam(lr=0.1, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, opt.init(params))[0]
        {'weight': tensor([[ 0.1000, -0.1000]])}
    """
    return _adam("adam", lr, betas, eps, weight_decay, amsgrad, gc, decoupled=False)


def adamw(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    amsgrad: bool = False,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r""":func:`adam` with decoupled weight decay (https://arxiv.org/abs/1711.05101).

    The decay is added to the fraction, so that it is neither averaged nor rescaled nor, with
    ``at="gradient"``, centralized. Equal to :class:`torch.optim.AdamW` when ``gc`` is ``None``.
    The reference's AdamW classes scale decay and eps by the bias corrections; ours equal theirs
    with ``weight_decay / (1 - beta1**t)`` in its second generation, and in its first with
    ``weight_decay * sqrt(1 - beta2**t) / (1 - beta1**t)`` and ``eps / sqrt(1 - beta2**t)``.
    Arguments and errors are those of :func:`adam`.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.adamw(lr=0.5, weight_decay=0.1)
        >>> params = {"weight": torch.ones(1, 2)}
        >>> opt.step(params, {"weight": torch.zeros(1, 2)}, opt.init(params))[0]
        {'weight': tensor([[0.9500, 0.9500]])}
    """
    return _adam("adamw", lr, betas, eps, weight_decay, amsgrad, gc, decoupled=True)


def _adam(
    name: str,
    lr: Number,
    betas: tuple[Number, Number],
    eps: Number,
    weight_decay: Number,
    amsgrad: bool,
    gc: GC | str | None,
    *,
    decoupled: bool,
) -> Optimizer:
    def direction(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
        m, v = moments(u, slots, s)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if amsgrad:
            new["max_exp_avg_sq"] = v = maximum(slots["max_exp_avg_sq"], v)
        denominator = add(mul(sqrt(v), s["1 / sqrt(bias2)"]), s["eps"])
        return div(mul(m, s["1 / bias1"]), denominator), new

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        s = moment_scalars(step, h)
        return s | {
            "eps": h["eps"],
            "1 / bias1": 1 / s["bias1"],
            "1 / sqrt(bias2)": s["bias2"].rsqrt(),
        }

    slots = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    return pipeline(
        name,
        check(lr=lr, weight_decay=weight_decay, eps=eps) | check_betas(betas),
        dict.fromkeys(slots, zeros),
        scalars,
        direction,
        decoupled=decoupled,
        gc=gc,
    )


def moments(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Tensors]:
    """The running first and second moment of ``u``, not yet corrected for their start at 0."""
    m = average(slots["exp_avg"], s["beta1"], u, s["1 - beta1"])
    v = average(slots["exp_avg_sq"], s["beta2"], mul(u, u), s["1 - beta2"])
    return m, v


def moment_scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
    """What :func:`moments` reads, and the weight ``1 - beta**t`` that each moment holds so far."""
    beta1, beta2 = h["beta1"], h["beta2"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        # In float64: 1 - 0.999 in float32 is off by 5e-5.
        "1 - beta1": 1 - beta1,
        "1 - beta2": 1 - beta2,
        "bias1": 1 - beta1**step,
        "bias2": 1 - beta2**step,
    }
