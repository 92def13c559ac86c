"""Lookahead, around any optimizer, and Ranger."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gcfunc._algorithms.radam import radam
from gcfunc._centralization.where import GC
from gcfunc._step.bucket import ListAlgorithm, Projections, Scalars, Slots
from gcfunc._step.hyperparams import Number, check
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, mul, sub, where


def lookahead(inner: Optimizer, *, k: Number = 5, alpha: Number = 0.5) -> Optimizer:
    r"""Lookahead (https://arxiv.org/abs/1907.08610): k steps forward, 1 step back.

    ``inner`` moves the fast weights :math:`\theta`. After every ``k``-th step the slow weights
    follow a part of the way, and the fast ones go on from there:

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi

    The slow weights start as the params given to ``init`` and are the state's slot
    ``slow_params``. (The reference takes its first slow weights after step 1; that is not
    reproduced.)

    Args:
        inner: Any optimizer of this library, :func:`gcfunc.partition` included.
        k: Steps between synchronizations.
        alpha: How far the slow weights move, :math:`\alpha` in [0, 1]. In the state it is called
            ``lookahead_alpha`` if ``inner`` has an ``alpha`` of its own, as RMSprop does.

    Raises:
        TypeError: ``inner`` is no optimizer of this library.
        ValueError: ``inner`` already is a lookahead, or a hyperparameter is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.lookahead(gcfunc.sgd(lr=1.0), k=2, alpha=0.5)
        >>> params, grads = torch.tensor([8.0]), torch.tensor([1.0])
        >>> state = opt.init(params)
        >>> for _ in range(2):
        ...     params, state = opt.step(params, grads, state)
        ...     print(params)
        tensor([7.])
        tensor([7.])
    """
    if not isinstance(inner, Optimizer):
        raise TypeError(f"inner must be an optimizer such as gcfunc.sgd(0.1), got {inner!r}")
    own = check(k=k, alpha=alpha)
    return replace(
        inner,
        algorithms={key: _ahead(algorithm, **own) for key, algorithm in inner.algorithms.items()},
    )


def _ahead(inner: ListAlgorithm, k: Number, alpha: Number) -> ListAlgorithm:
    if "slow_params" in inner.slots:
        raise ValueError(f"{inner.name} already is a lookahead")
    # RMSprop has an alpha, too.
    own_alpha = "lookahead_alpha" if "alpha" in inner.hyperparams else "alpha"

    def scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        own = {"nearer": h[own_alpha], "synchronize": step % h["k"] == 0}
        return inner.scalars(step, h) | own

    def update(
        params: Tensors,
        grads: Tensors,
        slots: Slots,
        s: Scalars,
        projections: Projections,
    ) -> tuple[Tensors, Slots]:
        slow = slots["slow_params"]
        fast, new = inner.update(params, grads, slots, s, projections)
        nearer = add(slow, mul(sub(fast, slow), s["nearer"]))
        fast = where(s["synchronize"], nearer, fast)
        slow = where(s["synchronize"], nearer, slow)
        return fast, new | {"slow_params": slow}

    return replace(
        inner,
        name=f"lookahead({inner.name})",
        hyperparams={**inner.hyperparams, "k": k, own_alpha: alpha},
        slots={**inner.slots, "slow_params": Tensor.clone},
        scalars=scalars,
        update=update,
    )


def ranger(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.95, 0.999),
    eps: Number = 1e-5,
    weight_decay: Number = 0.0,
    k: Number = 6,
    alpha: Number = 0.5,
    *,
    gc: GC | str | None = None,
) -> Optimizer:
    """Ranger: :func:`lookahead` over :func:`gcfunc.radam` with decoupled weight decay.

    The combination and its defaults are those of https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer,
    which the reference builds on. Arguments and errors are those of the two it is made of.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.ranger(lr=0.1, gc="gc")
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, opt.init(params))[0]
        {'weight': tensor([[ 0.1000, -0.1000]])}
    """
    inner = radam(lr, betas, eps, weight_decay, decoupled_weight_decay=True, gc=gc)
    return lookahead(inner, k=k, alpha=alpha)
