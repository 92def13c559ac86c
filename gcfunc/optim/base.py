"""What all classes share: torch's groups and state in front of a functional step.

A class says what it is by few names: ``_algorithm`` is the functional constructor, and where a
group's options decide more than hyperparameters do, ``_constructor`` and ``_structure`` say how it
is called for a group. The rest follows from the constructor's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gcfunc._centralization.where import GC, as_gc
from gcfunc._compiled.graph import Graphs
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors import trees
from gcfunc.optim.groups import (
    Group,
    require_dense,
    require_effect,
    require_steppable,
    units_of,
    with_gradients,
)
from gcfunc.optim.run import GroupRun, Options

COMPILE_FROM = 1_000_000
"""How many values the parameters hold at least, for steps to be compiled by default."""

Choice = GC | str | None
Constructor = Callable[..., Optimizer]


class DropIn(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step is a functional one, in place."""

    _algorithm: ClassVar[Constructor]
    """The functional constructor."""
    _gc: ClassVar[Choice] = None
    """What ``gc`` is by default."""
    _counts: ClassVar[bool] = True
    """Whether the state of a parameter has a ``"step"``, as torch's has or has not."""
    _own: Group = {}  # noqa: RUF012
    """Options of its groups that torch's class does not have."""

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
        require_effect(self.param_groups)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # For help(), and for what makes optimizers from configurations: torch's arguments and ours.
        own = next(c for c in cls.__mro__ if "__init__" in vars(c) and c is not DropIn)
        _, *given = inspect.signature(vars(own)["__init__"]).parameters.values()
        if own is OfConstructor:
            ours = inspect.signature(cls._algorithm).parameters.values()
            given = [given[0], *(p for p in ours if p.name != "gc"), *given[2:]]
        more = [p for p in given if p.kind is p.VAR_KEYWORD]
        if more or not issubclass(own, DropIn):
            named = [p for p in given if p not in more]
            kind = inspect.Parameter.KEYWORD_ONLY
            named.append(inspect.Parameter("gc", kind, default=cls._gc, annotation=Choice))
            named.append(inspect.Parameter("compile", kind, default=None, annotation=bool | None))
            given = [*named, *more]
        cls.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        """Begin anew with whatever params and state there are; keep what was compiled."""
        self._runs: dict[int, GroupRun] = {}
        self._entries: list[int] = []
        if not hasattr(self, "_functionals"):  # of which none holds params or state
            self._functionals: dict[Any, tuple[Optimizer, Graphs]] = {}
            self._failures: list[Exception] = []

    def _compiles(self) -> bool:
        if self._compile is not None:
            return self._compile
        values = sum(p.numel() for group in self.param_groups for p in group["params"])
        return values >= COMPILE_FROM and not self._failures

    def _constructor(self, group: Group) -> Constructor:
        """The functional constructor for a group."""
        return type(self)._algorithm

    def _structure(self, group: Group) -> Options:
        """The options that the constructor is called with: another one makes another optimizer.

        By default its switches, the options that are True or False. All others are
        hyperparameters, which are set before each step.
        """
        switches = _switches(self._constructor(group))
        return tuple((option, group[option]) for option in switches)

    def _made_of(self, group: Group) -> tuple[Constructor, Options]:
        """What a group's functional optimizer is made of: equal groups share one."""
        return self._constructor(group), self._structure(group)

    def _functional(self, group: Group, gc: GC | None) -> Optimizer:
        """The functional optimizer for a group."""
        return self._constructor(group)(lr=0.0, **dict(self._structure(group)), gc=gc)

    def _functional_for(self, group: Group, *, centralizes: bool) -> tuple[Optimizer, Graphs]:
        """The functional optimizer, shared by groups that are alike, and what it has compiled."""
        gc = as_gc(group["gc"]) if centralizes else None
        # Which parameters it takes is said in each step, by the units that ``where`` was found to
        # mean.
        gc = gc and GC(at=gc.at)
        key = self._made_of(group), gc
        if key not in self._functionals:
            self._functionals[key] = self._functional(group, gc), Graphs()
        return self._functionals[key]

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
            require_steppable(group)
            units_of(group)
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
        # Dynamo, tracing a user's function, calls this as it is: the step is compiled already, and
        # what it is called with is found out in Python, which cannot be traced.
        step = _step_untraced if torch.compiler.is_compiling() else DropIn._step_groups
        step(self)
        return loss

    def _step_groups(self) -> None:
        given = [with_gradients(group["params"]) for group in self.param_groups]
        for _, grads in given:
            require_dense(type(self).__name__, grads)
        if self._entries != [*map(id, self.state.values())] or len(self._runs) > len(given):
            self._runs = {}
        known = len(self.state)
        try:
            for i, (params, _) in enumerate(given):
                run = self._runs.get(i)
                if params and not (run and run.serves(self, self.param_groups[i], params)):
                    self._runs[i] = GroupRun(self, i, params)
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
        """As in torch, also of what its class of the same name saved. No tensors are shared."""
        own = [{option: group[option] for option in self._own} for group in self.param_groups]
        names = [group.get("param_names") for group in self.param_groups]

        given: list[Any] = []

        def note(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            # After hooks that users registered: it may be another dict now.
            given.extend(trees.leaves_of(loaded.get("state")))

        def complete(optimizer: torch.optim.Optimizer) -> None:
            # What is on its device already, torch takes over as it is:
            # https://github.com/pytorch/pytorch/issues/196083
            _own_tensors(self.state, {id(t) for t in given if isinstance(t, Tensor)})
            for group, options, own_names in zip(self.param_groups, own, names, strict=True):
                group.pop("gc", None)
                for option, value in options.items():
                    group.setdefault(option, value)
                if own_names is not None:
                    # GC asks by them. Saved ones may be those of a wrapped model.
                    group["param_names"] = own_names

        handles = (
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(complete, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_own": self._own, "_compile": self._compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


_step_untraced = torch.compiler.disable(DropIn._step_groups)  # type: ignore[no-untyped-call]


class OfConstructor(torch.optim.Optimizer):
    """What stands behind a drop-in where torch has no class: the constructor's options and errors.

    ``maximize`` is an option of the groups, as in torch's classes.
    """

    _algorithm: ClassVar[Constructor]

    def __init__(self, params: Any, *options: Any, maximize: bool = False, **named: Any) -> None:
        constructor = type(self)._algorithm
        given = inspect.signature(constructor).bind(*options, **named)
        constructor(*given.args, **given.kwargs)
        given.apply_defaults()
        defaults = {name: value for name, value in given.arguments.items() if name != "gc"}
        super().__init__(params, defaults | {"maximize": maximize})


@cache
def _switches(constructor: Constructor) -> list[str]:
    parameters = inspect.signature(constructor).parameters.values()
    return [p.name for p in parameters if isinstance(p.default, bool)]


def _as_torch_would(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        # Not left out: torch.distributed.checkpoint looks up every option that a group has.
        group["gc"] = None
    for key, entry in saved["state"].items():
        # Users may have put something else beside the parameters' entries.
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            # Parameters share a counter here, and torch would count it up for each of them.
            saved["state"][key] = entry | {"step": entry["step"].clone()}


def _own_tensors(state: dict[Any, Any], shared: set[int]) -> None:
    """Clone what parameters' entries share, by id."""

    def own(value: Any) -> Any:
        return value.detach().clone() if id(value) in shared else value

    for key, entry in state.items():
        if isinstance(key, Tensor):
            state[key] = trees.mapped(own, entry)
