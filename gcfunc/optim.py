"""``torch.optim.Optimizer`` classes over the functional steps, for whatever takes one.

Constructor arguments, errors, parameter groups and state are those of the torch class that each is
derived from; the arithmetic is the functional step's. Further arguments, the same for all:

- ``gc``: as in the functional constructors ``None``, ``"gc"``, ``"gcc"`` or a :class:`gcfunc.GC`,
  and an option of each parameter group, so that one may switch it off. Masks and predicates see
  names if the optimizer is given ``model.named_parameters()``. A ``state_dict`` has None for it:
  which weights are centralized is for code to say.
- ``compile``: whether the step is compiled by :func:`gcfunc.compile`. By default it is if the
  parameters hold a million values or more. Below that a step is so short that the seconds which
  compiling takes may never be won back. What is compiled is for the parameters that have
  gradients: others compile again, and a step keeps hold of the memory it planned for until the
  next.

``foreach`` and ``fused`` are accepted and change nothing; ``capturable`` and ``differentiable`` are
refused. The classes named ``SGD_GC`` and so on have the reference's names, defaults and results.
"""

import copy
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gcfunc import _sharding, _tree
from gcfunc._check import require_tensors
from gcfunc._hyperparams import check
from gcfunc._optimizer import Optimizer
from gcfunc._tree import Flat
from gcfunc._types import GC, State, as_gc
from gcfunc.adagrad import adagrad
from gcfunc.adam import adam, adamw
from gcfunc.centralize import Units, answers_for_some
from gcfunc.compile import compile  # noqa: A004
from gcfunc.lookahead import lookahead, ranger
from gcfunc.radam import radam
from gcfunc.sgd import sgd, sgdw

COMPILE_FROM = 1_000_000
"""How many values the parameters hold at least, for steps to be compiled by default."""

Choice = GC | str | None
Group = dict[str, Any]
Entry = dict[str, Any]
"""What ``optimizer.state`` has for one parameter."""


class _Stepped(torch.optim.Optimizer):
    """What all classes share: torch's groups and state in front of a functional step."""

    _own: Group = {}  # noqa: RUF012
    """Options of its groups that torch's class does not have."""
    _gc: ClassVar[Choice] = None
    _counts: ClassVar[bool] = True
    """Whether the state has a ``"step"``."""

    def __init__(
        self,
        params: Any,
        *args: Any,
        gc: Choice | Literal["default"] = "default",
        compile: bool | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> None:
        for option in ("capturable", "differentiable"):
            if kwargs.get(option):
                raise ValueError(f"{type(self).__name__} does not support {option}=True")
        self._own = self._own | {"gc": self._gc if gc == "default" else gc}
        self._compile = compile
        self._forget()
        super().__init__(params, *args, **kwargs)
        # With fused=True torch's own classes have GradScaler leave the unscaling to them.
        self._step_supports_amp_scaling = False
        centralized = [group for group in self.param_groups if group["gc"] is not None]
        if centralized and not any(any(_units(group).values()) for group in centralized):
            raise ValueError(f"gc={centralized[0]['gc']!r} selects none of the parameters")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # For help(), and for what makes optimizers from configurations: torch's arguments and ours.
        own = next(c for c in cls.__mro__ if "__init__" in vars(c) and c is not _Stepped)
        _, *given = inspect.signature(vars(own)["__init__"]).parameters.values()
        more = [p for p in given if p.kind is p.VAR_KEYWORD]
        if more or own.__module__ != __name__:
            named = [p for p in given if p not in more]
            kind = inspect.Parameter.KEYWORD_ONLY
            named.append(inspect.Parameter("gc", kind, default=cls._gc, annotation=Choice))
            named.append(inspect.Parameter("compile", kind, default=None, annotation=bool | None))
            given = [*named, *more]
        cls.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._entries: list[int] = []
        if not hasattr(self, "_steps"):  # of which none holds params or state
            self._steps: dict[Any, tuple[Optimizer, Callable[[], Step]]] = {}
            self._graphs: dict[Any, dict[Any, Any]] = {}
            self._failures: list[Exception] = []

    def _compiles(self) -> bool:
        if self._compile is not None:
            return self._compile
        values = sum(p.numel() for group in self.param_groups for p in group["params"])
        return values >= COMPILE_FROM and not self._failures

    def _structure(self, group: Group) -> tuple[Any, ...]:
        """What a functional optimizer is built with, and can only be built anew for."""
        return ()

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        """The functional optimizer for a group; hyperparameters are set before each step."""
        raise NotImplementedError

    def _hyperparam(self, group: Group, name: str, step: int) -> Any:
        """The value of one of its hyperparameters in a step, from 1."""
        if name in ("beta1", "beta2"):
            return group["betas"][name == "beta2"]
        return group[name]

    def add_param_group(self, param_group: Group) -> None:
        """As in torch, with ``gc`` among the options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for option, value in self._own.items():
                group.setdefault(option, value)
            _require_steppable(group)
            _units(group)
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after ``closure``, if given, was evaluated; returns what that returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A user's compiled function calls this rather than have it traced: the step is compiled
        # already, and what it is to be called with is found out in Python.
        step = _apart if torch.compiler.is_compiling() else _Stepped._step_groups
        step(self)
        return loss

    def _step_groups(self) -> None:
        given = [_with_gradients(group["params"]) for group in self.param_groups]
        for _, grads in given:
            _require_dense(type(self).__name__, grads)
        if self._entries != [*map(id, self.state.values())] or len(self._runs) > len(given):
            self._runs = {}
        known = len(self.state)
        try:
            for i, (params, _) in enumerate(given):
                run = self._runs.get(i)
                if params and not (run and run.serves(self, self.param_groups[i], params)):
                    self._runs[i] = _Run(self, i, params)
                    self._entries = [*map(id, self.state.values())]
        except BaseException:
            # No group is stepped, so none may look as if it had been.
            for p in [*self.state][known:]:
                del self.state[p]
            raise
        for i, (params, grads) in enumerate(given):
            if params:
                self._runs[i].step(self, grads)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, whose class of the same name can load it."""
        # A hook, for those that users registered to see what is saved.
        handle = self.register_state_dict_post_hook(_as_torch_would, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, also of what its class of the same name saved."""
        own = [{option: group[option] for option in self._own} for group in self.param_groups]
        names = [group.get("param_names") for group in self.param_groups]

        def complete(optimizer: torch.optim.Optimizer) -> None:
            for group, options, own_names in zip(self.param_groups, own, names, strict=True):
                group.pop("gc", None)
                for option, value in options.items():
                    group.setdefault(option, value)
                if own_names is not None:
                    # GC asks by them. Saved ones may be those of a wrapped model.
                    group["param_names"] = own_names

        handle = self.register_load_state_dict_post_hook(complete, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_own": self._own, "_compile": self._compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


_apart = torch.compiler.disable(_Stepped._step_groups)  # type: ignore[no-untyped-call]

Step = Callable[[Flat, Sequence[Tensor], State], None]
"""A step in place, on trees that were taken apart."""


class _Run:
    """A group's parameters as functional trees, for as long as the same ones are stepped."""

    def __init__(self, optimizer: _Stepped, i: int, params: list[Tensor]) -> None:
        group = optimizer.param_groups[i]
        self._group = group
        self._structure = (group["gc"], *optimizer._structure(group))
        self._params = [*params]
        names = _names(group)
        cohorts: dict[int, list[int]] = {}
        for j, p in enumerate(params):
            cohorts.setdefault(_count(optimizer.state.get(p, {})), []).append(j)
        self._cohorts = [
            (members, _cohort(optimizer, i, count, {names[params[j]]: params[j] for j in members}))
            for count, members in cohorts.items()
        ]
        self._views = [optimizer.state[p].values() for p in params if p in optimizer.state]
        self._held = [*self._values()]

    def serves(self, optimizer: _Stepped, group: Group, params: list[Tensor]) -> bool:
        """Whether nothing was exchanged since the run was made."""
        return (
            group is self._group
            and len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and all(map(operator.is_, self._values(), self._held))
            and not any(cohort.was_recounted() for _, cohort in self._cohorts)
            and group["gc"] is self._structure[0]
            and optimizer._structure(group) == self._structure[1:]
        )

    def _values(self) -> Iterator[Any]:
        """All of the parameters' state, and an end that differs from any of it."""
        return itertools.chain(itertools.chain.from_iterable(self._views), (_END,))

    def step(self, optimizer: _Stepped, grads: list[Tensor]) -> None:
        """Step the parameters."""
        if self._group["maximize"]:
            grads = [g.neg() for g in grads]
        for members, cohort in self._cohorts:
            every = len(members) == len(grads)
            own = grads if every else [grads[j] for j in members]
            cohort.step(optimizer, self._group, own)


_END = object()


def _cohort(optimizer: _Stepped, i: int, count: int, params: dict[str, Tensor]) -> "_Cohort":
    group = optimizer.param_groups[i]
    gc, units = as_gc(group["gc"]), _units(group)
    # A cohort that has nothing to centralize, such as biases, is no mistake.
    if not any(units[name] for name in params):
        gc = None
    structure, compiled = optimizer._structure(group), optimizer._compiles()
    key = (i, compiled, *structure, gc and (gc.at, *units.items()))
    if key not in optimizer._steps:
        if gc is not None:
            gc = replace(gc, where=lambda name, p: units[name] or False)
        opt = optimizer._functional(group, gc)
        make: Callable[[], Step] = partial(_eager, opt)
        if compiled:
            graphs = optimizer._graphs.setdefault((structure, gc and gc.at), {})
            failures = optimizer._failures if optimizer._compile is None else None
            make = _compiled(opt, graphs, failures)
        optimizer._steps[key] = opt, make
    opt, make = optimizer._steps[key]
    return _Cohort(optimizer, opt, make(), count, params)


class _Cohort:
    """Those of a group's parameters that have taken equally many steps: one functional state."""

    def __init__(
        self,
        optimizer: _Stepped,
        opt: Optimizer,
        step: Step,
        count: int,
        params: dict[str, Tensor],
    ) -> None:
        self._flat, self._step, self._count = _tree.flatten(params, "params"), step, count
        start = opt.init(params)
        # As in torch, what has no state has no entry either, and a counter comes first.
        keeps = optimizer._counts or start.slots
        entries = {name: optimizer.state[p] for name, p in params.items() if keeps}
        # One to count up, and a view of it for each parameter.
        self._counts = torch.full((len(params),), float(count))
        if optimizer._counts:
            for entry, own in zip(entries.values(), self._counts.unbind(), strict=True):
                entry["step"] = own
        self._version = self._counts._version
        slots: dict[str, dict[str, Tensor]] = {}
        for slot, column in start.slots.items():
            slots[slot] = {
                name: entries[name].get(slot)
                if entries[name].get(slot) is not None
                else column[name]
                for name in params
            }
            for name, entry in entries.items():
                entry[slot] = slots[slot][name]
        device = start.step.device
        self._state = State(torch.tensor(count, device=device), start.hyperparams, slots)
        self._given: dict[str, Any] = {}

    def was_recounted(self) -> bool:
        """Whether somebody else wrote one of the counters, whose version they share."""
        return self._counts._version != self._version

    def step(self, optimizer: _Stepped, group: Group, grads: Sequence[Tensor]) -> None:
        """Update params and state in place."""
        step = self._count + 1
        for name, scalar in self._state.hyperparams.items():
            value = optimizer._hyperparam(group, name, step)
            if isinstance(value, Tensor):
                scalar.copy_(value.reshape(()))
                self._given.pop(name, None)
            elif self._given.get(name) != value:
                scalar.fill_(value)
                self._given[name] = value
        self._step(self._flat, grads, self._state)
        self._counts.add_(1)
        self._count, self._version = step, self._counts._version


def _eager(opt: Optimizer) -> Step:
    def step(flat: Flat, grads: Sequence[Tensor], state: State) -> None:
        params = flat.rebuild(flat.leaves)
        new, new_state = opt.step(params, flat.rebuild(grads), state)
        pairs = [(params, new), *((c, new_state.slots[slot]) for slot, c in state.slots.items())]
        for old, values in pairs:
            torch._foreach_copy_(
                [_sharding.local(t) for t in old.values()],
                [_sharding.local(t) for t in values.values()],
            )
        state.step.copy_(new_state.step)

    return step


def _compiled(
    opt: Optimizer, graphs: dict[Any, Any], failures: list[Exception] | None
) -> Callable[[], Step]:
    """Makes compiled steps that share ``graphs``, each with a plan of its own.

    With a list for ``failures`` they go on eager where compiling fails.
    """
    try:
        compiled = compile(opt)
    except RuntimeError as error:  # Dynamo does not know this Python, or this platform
        if failures is None:
            raise
        _note(error, failures)
        return partial(_eager, opt)
    compiled.graphs = graphs

    def make() -> Step:
        step = copy.copy(compiled).step_flat
        return step if failures is None else _or_eager(opt, step, failures)

    return make


def _or_eager(opt: Optimizer, step: Step, failures: list[Exception]) -> Step:
    eager = _eager(opt)

    def attempt(flat: Flat, grads: Sequence[Tensor], state: State) -> None:
        if not failures:
            try:
                step(flat, grads, state)
            except torch._dynamo.exc.TorchDynamoException as error:
                _note(error, failures)
            else:
                return
        eager(flat, grads, state)

    return attempt


def _note(error: Exception, failures: list[Exception]) -> None:
    reason = " ".join(str(error).split("\n")[:2]).strip()
    warnings.warn(
        f"steps are not compiled, as torch.compile fails here ({reason}); compile=False says so",
        stacklevel=3,
    )
    failures.append(RuntimeError(reason))  # without what a traceback holds


def _names(group: Group) -> dict[Tensor, str]:
    params = group["params"]
    names: Iterable[str] = group.get("param_names", ())
    if len(set(names)) < len(params):
        names = map(str, range(len(params)))  # there are none, or those of two models
    return dict(zip(params, names, strict=True))


def _units(group: Group) -> dict[str, Units | None]:
    """How each of a group's parameters is centralized; unlike elsewhere, none need be."""
    names = _names(group)
    gc = as_gc(group["gc"])
    if gc is None:
        return dict.fromkeys(names.values())
    given = group.get("param_names", ())
    if len(set(given)) < len(given) and not isinstance(gc.where, str):
        twice = sorted({name for name in given if given.count(name) > 1})
        raise ValueError(f"gc: two parameters have the name {', '.join(map(repr, twice))}")
    masked = not isinstance(gc.where, str) and not _tree.is_function(gc.where)
    if masked and "param_names" not in group:
        raise ValueError("gc: a mask needs names; give the optimizer model.named_parameters()")
    return answers_for_some(gc.where, {name: p for p, name in names.items()})


def _as_torch_would(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        # Not left out: torch.distributed.checkpoint looks up every option that a group has.
        group["gc"] = None
    for key, entry in saved["state"].items():
        # Users may have put something else beside the parameters' entries.
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            # Parameters share a counter here, and torch would count it up for each of them.
            saved["state"][key] = entry | {"step": entry["step"].clone()}


def _count(entry: Entry) -> int:
    """How many steps a parameter has taken."""
    if "step" in entry:
        return int(entry["step"])
    return int(entry.get("momentum_buffer") is not None)


def _require_steppable(group: Group) -> None:
    params = group["params"]
    if len(set(params)) < len(params):
        # Torch warns of it for now, and steps them twice.
        raise ValueError("some parameters appear more than once in a parameter group")
    names = [*_names(group).values()]
    # Private names; FSDP1 has no public one for the parameters that it made or flattened.
    flattened = [
        name
        for name, p in zip(names, params, strict=True)
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
    ]
    if flattened and group["gc"] is not None:
        raise ValueError(
            f"{', '.join(map(repr, flattened))}: flattened by FullyShardedDataParallel (FSDP1), so "
            "that there are no rows to centralize; shard with torch.distributed.fsdp.fully_shard"
        )
    require_tensors(names, params, "params")


def _with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    grads = [p.grad for p in params]
    with_gradients = [g for g in grads if g is not None]
    if len(with_gradients) < len(params):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
    return params, with_gradients


def _require_dense(name: str, grads: Sequence[Tensor]) -> None:
    if {g.layout for g in grads} - {torch.strided}:
        raise RuntimeError(f"{name} does not support sparse gradients")


class SGD(_Stepped, torch.optim.SGD):
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

    _counts = False
    _rule: ClassVar[Callable[..., Optimizer]] = staticmethod(sgd)

    def _structure(self, group: Group) -> tuple[Any, ...]:
        return group["nesterov"], group["momentum"] == 0

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        # Of a group without momentum, torch does not ask about nesterov.
        momentum = 0.0 if group["momentum"] == 0 else 0.5
        return self._rule(0.0, momentum, nesterov=group["nesterov"] and momentum > 0, gc=gc)


class SGDW(SGD):
    """:class:`SGD` with decoupled weight decay; see :func:`gcfunc.sgdw`."""

    _rule = staticmethod(sgdw)


class Adam(_Stepped, torch.optim.Adam):
    """:class:`torch.optim.Adam` with ``gc``; see :func:`gcfunc.adam`."""

    def _structure(self, group: Group) -> tuple[Any, ...]:
        return group["amsgrad"], group["decoupled_weight_decay"]

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        rule = adamw if group["decoupled_weight_decay"] else adam
        return rule(amsgrad=group["amsgrad"], gc=gc)


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` with ``gc``; see :func:`gcfunc.adamw`."""


class Adagrad(_Stepped, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad` with ``gc``; see :func:`gcfunc.adagrad`."""

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        # For a parameter of a group that was added; torch asks the defaults too.
        start = self.defaults["initial_accumulator_value"]
        return adagrad(initial_accumulator_value=start, gc=gc)


class RAdam(_Stepped, torch.optim.RAdam):
    """:class:`torch.optim.RAdam` with ``gc``; see :func:`gcfunc.radam`."""

    def _structure(self, group: Group) -> tuple[Any, ...]:
        return (group["decoupled_weight_decay"],)

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        return radam(decoupled_weight_decay=group["decoupled_weight_decay"], gc=gc)


class Ranger(_Stepped, torch.optim.RAdam):
    """Lookahead over RAdam with decoupled weight decay; see :func:`gcfunc.ranger`."""

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

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        return ranger(gc=gc)


class Lookahead(_Stepped):
    """Lookahead around another of these optimizers; see :func:`gcfunc.lookahead`.

    Parameter groups and state are those of ``optimizer``, which is not to be stepped any more.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Linear(2, 1)
        >>> inner = gcfunc.optim.SGD(model.parameters(), lr=0.1, gc="gc")
        >>> opt = gcfunc.optim.Lookahead(inner, k=5, alpha=0.5)
    """

    def __init__(self, optimizer: _Stepped, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(optimizer, _Stepped) or isinstance(optimizer, Lookahead | Ranger):
            raise TypeError(
                "optimizer must be one of gcfunc.optim, and not a lookahead already, got "
                f"{type(optimizer).__name__}"
            )
        own = check(k=k, alpha=alpha)
        self._inner = optimizer
        self._compile = optimizer._compile
        self._own = optimizer._own | own
        self._forget()
        optimizer._forget()
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults | own)
        self.state = optimizer.state

    def _structure(self, group: Group) -> tuple[Any, ...]:
        return self._inner._structure(group)

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        inner = self._inner._functional(group, gc)
        return lookahead(inner)

    def _hyperparam(self, group: Group, name: str, step: int) -> Any:
        return self._inner._hyperparam(group, name, step)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_inner": self._inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What was loaded is the inner optimizer's too, and its class may have to complete it.
        self._inner.__setstate__({"state": self.state, "param_groups": self.param_groups})


class _AdamWOfTheReference(AdamW):
    """Its decay and eps are scaled by the bias corrections, and it does not decay by default."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)

    def _hyperparam(self, group: Group, name: str, step: int) -> Any:
        value = super()._hyperparam(group, name, step)
        beta1, beta2 = group["betas"]
        if name == "eps":
            return value / (1 - beta2**step) ** 0.5
        if name == "weight_decay":
            return value * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return value


class SGD_GC(SGD):
    """The reference's ``SGD_GC``: all weights are centralized."""

    _gc = "gc"


class SGD_GCC(SGD):
    """The reference's ``SGD_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class SGDW_GC(SGDW):
    """The reference's ``SGDW_GC``: all weights are centralized."""

    _gc = "gc"


class SGDW_GCC(SGDW):
    """The reference's ``SGDW_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class Adam_GC(Adam):
    """The reference's ``Adam_GC``: all weights are centralized."""

    _gc = "gc"


class Adam_GCC(Adam):
    """The reference's ``Adam_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class Adam_GC2(Adam):
    """The reference's ``Adam_GC2``: all weights are centralized at the update."""

    _gc = GC("gc", at="update")


class Adam_GCC2(Adam):
    """The reference's ``Adam_GCC2``: convolution weights are centralized at the update."""

    _gc = GC("gcc", at="update")


class AdamW_GC(_AdamWOfTheReference):
    """The reference's ``AdamW_GC``: all weights are centralized."""

    _gc = "gc"


class AdamW_GCC(_AdamWOfTheReference):
    """The reference's ``AdamW_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class AdamW_GC2(_AdamWOfTheReference):
    """The reference's ``AdamW_GC2``: all weights are centralized at the update."""

    _gc = GC("gc", at="update")


class AdamW_GCC2(_AdamWOfTheReference):
    """The reference's ``AdamW_GCC2``: convolution weights are centralized at the update."""

    _gc = GC("gcc", at="update")


class Adagrad_GC(Adagrad):
    """The reference's ``Adagrad_GC``: all weights are centralized."""

    _gc = "gc"


class Adagrad_GCC(Adagrad):
    """The reference's ``Adagrad_GCC``: convolution weights are centralized."""

    _gc = "gcc"
