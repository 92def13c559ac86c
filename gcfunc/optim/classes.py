"""The classes: for each algorithm, torch's class of that name in front of the functional step."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gcfunc._algorithms.adagrad import adagrad
from gcfunc._algorithms.adam import adam, adamw
from gcfunc._algorithms.lion import lion
from gcfunc._algorithms.lookahead import lookahead, ranger
from gcfunc._algorithms.radam import radam
from gcfunc._algorithms.rmsprop import rmsprop
from gcfunc._algorithms.sgd import sgd, sgdw
from gcfunc._centralization.where import GC
from gcfunc._step.hyperparams import check
from gcfunc._step.optimizer import Optimizer
from gcfunc.optim.base import Constructor, DropIn, OfConstructor
from gcfunc.optim.groups import Group
from gcfunc.optim.run import Options


class SGD(DropIn, torch.optim.SGD):
    """:class:`torch.optim.SGD` with ``gc``; see :func:`gcfunc.sgd`.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> opt = gcfunc.optim.SGD(model.parameters(), lr=1.0, gc="gc")
        >>> before = model.weight.detach().clone()
        >>> model(torch.tensor([[1.0, 3.0]])).sum().backward()
        >>> opt.step()
        >>> (model.weight.detach() - before).round(decimals=4)
        tensor([[ 1., -1.]])
    """

    _algorithm = staticmethod(sgd)
    _counts = False

    def _structure(self, group: Group) -> Options:
        # Without momentum there is no buffer, and torch does not ask about nesterov.
        momentum = 0.0 if group["momentum"] == 0 else 0.5
        return ("momentum", momentum), ("nesterov", group["nesterov"] and momentum > 0)


class SGDW(SGD):
    """:class:`SGD` with decoupled weight decay; see :func:`gcfunc.sgdw`."""

    _algorithm = staticmethod(sgdw)


class Adam(DropIn, torch.optim.Adam):
    """:class:`torch.optim.Adam` with ``gc``; see :func:`gcfunc.adam`."""

    _algorithm = staticmethod(adam)

    def _constructor(self, group: Group) -> Constructor:
        return adamw if group["decoupled_weight_decay"] else adam


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` with ``gc``; see :func:`gcfunc.adamw`."""


class Adagrad(DropIn, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad` with ``gc``; see :func:`gcfunc.adagrad`."""

    _algorithm = staticmethod(adagrad)

    def _structure(self, group: Group) -> Options:
        # For a parameter of a group that was added, torch asks the defaults too.
        start = "initial_accumulator_value"
        return ((start, self.defaults[start]),)


class RAdam(DropIn, torch.optim.RAdam):
    """:class:`torch.optim.RAdam` with ``gc``; see :func:`gcfunc.radam`."""

    _algorithm = staticmethod(radam)


class RMSprop(DropIn, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop` with ``gc``; see :func:`gcfunc.rmsprop`."""

    _algorithm = staticmethod(rmsprop)

    def _structure(self, group: Group) -> Options:
        momentum = 0.0 if group["momentum"] == 0 else 0.5
        return ("momentum", momentum), ("centered", group["centered"])


class Lion(DropIn, OfConstructor):
    """Lion with ``gc``, of which torch has none; see :func:`gcfunc.lion`.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gcfunc.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1, gc="gc")
    """

    _algorithm = staticmethod(lion)


class Ranger(DropIn, torch.optim.RAdam):
    """Lookahead over RAdam with decoupled weight decay; see :func:`gcfunc.ranger`."""

    _algorithm = staticmethod(ranger)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        k: int = 6,
        alpha: float = 0.5,
        **kwargs: Any,
    ) -> None:
        self._own = check(k=k, alpha=alpha)
        kwargs["decoupled_weight_decay"] = True
        super().__init__(params, lr, betas, eps, weight_decay, **kwargs)


class Lookahead(DropIn):
    """Lookahead around another of these optimizers; see :func:`gcfunc.lookahead`.

    Parameter groups and state are those of ``optimizer``: what either of the two is given or loads
    is the other's, too. Only the steps are for this one to take. The groups have ``k`` and
    ``alpha`` besides, the latter as ``lookahead_alpha`` where RMSprop's ``alpha`` stands already.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Linear(2, 1)
        >>> inner = gcfunc.optim.SGD(model.parameters(), lr=0.1, gc="gc")
        >>> opt = gcfunc.optim.Lookahead(inner, k=5, alpha=0.5)
    """

    def __init__(self, optimizer: DropIn, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(optimizer, DropIn) or isinstance(optimizer, Lookahead | Ranger):
            raise TypeError(
                "optimizer must be one of gcfunc.optim, and not a lookahead already, got "
                f"{type(optimizer).__name__}"
            )
        own = check(k=k, alpha=alpha)
        if "alpha" in optimizer.defaults:
            own["lookahead_alpha"] = own.pop("alpha")
        self._compile = optimizer._compile
        # Groups that the inner optimizer is given later need them, too.
        self._own = optimizer._own = optimizer._own | own
        self._forget()
        optimizer._forget()
        # Of what torch sets to nothing here, the inner optimizer's are not to become any.
        self._inner: DropIn = SimpleNamespace()  # type: ignore[assignment]
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults | own)
        self._inner = optimizer

    # One list of groups and one state, whichever of the two optimizers is asked.

    @property
    def param_groups(self) -> list[Group]:
        """Those of the inner optimizer."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        """That of the inner optimizer."""
        return self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._inner.state = state

    def _constructor(self, group: Group) -> Constructor:
        return self._inner._constructor(group)

    def _structure(self, group: Group) -> Options:
        return self._inner._structure(group)

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        return lookahead(self._inner._functional(group, gc))

    def _hyperparam(self, group: Group, name: str, step: int) -> Any:
        return self._inner._hyperparam(group, name, step)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_inner": self._inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        self._inner = own.pop("_inner", None) or self._inner
        # Its class may have to complete what is loaded.
        self._inner.__setstate__({name: own.pop(name) for name in ("state", "param_groups")})
        super().__setstate__(own)
