"""RMSprop."""

from __future__ import annotations

from torch import Tensor

from gcfunc._algorithms.pipeline import pipeline, zeros
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import Scalars, Slots
from gcfunc._step.hyperparams import Number, check, is_zero
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, average, div, mul, nonnegative, sqrt, sub


def rmsprop(
    lr: Number = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    r"""RMSprop (https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf).

    .. math::
        u_t &= \Phi(g_t + \lambda\theta_{t-1}), \qquad
        s_t = \alpha s_{t-1} + (1 - \alpha) u_t^2 \\
        b_t &= \mu b_{t-1} + \frac{u_t}{\sqrt{s_t} + \epsilon}, \qquad
        \theta_t = \theta_{t-1} - \gamma\, b_t

    with :math:`\Phi` the centralization that ``gc`` asks for (the identity by default). If
    ``centered`` (https://arxiv.org/abs/1308.0850), :math:`s_t` is replaced under the root by the
    variance :math:`\max(0, s_t - a_t^2)` with :math:`a_t = \alpha a_{t-1} + (1 - \alpha) u_t`.
    Equal to :class:`torch.optim.RMSprop` when ``gc`` is ``None``, except that torch's variance may
    round to less than 0, and then gives NaN.

    Args:
        lr: Learning rate :math:`\gamma`.
        alpha: :math:`\alpha`. Around this optimizer, the ``alpha`` of :func:`gcfunc.lookahead` is
            called ``lookahead_alpha`` in the state.
        eps: :math:`\epsilon`, added outside the root.
        weight_decay: :math:`\lambda`, added to the gradient and centralized with it.
        momentum: :math:`\mu`. With the Python number 0 no buffer is kept, and momentum cannot be
            raised later; a 0-d tensor keeps one whatever its value.
        centered: Divide by the deviation of the gradient rather than by its size.
        gc: ``None`` (plain), a rule such as ``"gc"`` or ``"gcc"``, or a :class:`gcfunc.GC`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a real 0-d tensor.
        ValueError: a hyperparameter is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.rmsprop(lr=0.1, alpha=0.75, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, opt.init(params))[0]
        {'weight': tensor([[ 0.2000, -0.2000]])}
    """
    hyperparams = check(lr=lr, weight_decay=weight_decay, alpha=alpha, eps=eps)
    slots = ["square_avg"]
    if not is_zero(momentum):
        hyperparams |= check(momentum=momentum)
        slots.append("momentum_buffer")
    if centered:
        slots.append("grad_avg")

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        own = {"alpha": h["alpha"], "1 - alpha": 1 - h["alpha"], "eps": h["eps"]}
        return own | ({} if is_zero(momentum) else {"momentum": h["momentum"]})

    def direction(u: Tensors, slots: Slots, s: Scalars) -> tuple[Tensors, Slots]:
        square = average(slots["square_avg"], s["alpha"], mul(u, u), s["1 - alpha"])
        new, spread = {"square_avg": square}, square
        if centered:
            mean = average(slots["grad_avg"], s["alpha"], u, s["1 - alpha"])
            new["grad_avg"], spread = mean, nonnegative(sub(square, mul(mean, mean)))
        u = div(u, add(sqrt(spread), s["eps"]))
        if not is_zero(momentum):
            new["momentum_buffer"] = u = add(mul(slots["momentum_buffer"], s["momentum"]), u)
        return u, new

    return pipeline(
        "rmsprop",
        hyperparams,
        dict.fromkeys(slots, zeros),
        scalars,
        direction,
        decoupled=False,
        gc=gc,
    )
