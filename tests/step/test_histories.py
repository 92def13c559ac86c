"""Whatever happens to params and state in the course of training, it is a plain loop's result.

Hypothesis makes up the histories: steps, missing gradients, hyperparameters, checkpoints, copies,
packing, another default dtype, other values. The loop knows tensors, formulas and a count.
"""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor

import gcfunc
from gcfunc import GC, Optimizer
from tests.cases import Params
from tests.histories import check

WITHIN = 1e-9
SHAPES: dict[str, tuple[int, ...]] = {
    "linear.weight": (3, 4),
    "conv.weight": (2, 3, 2, 2),
    "linear.bias": (3,),
    "gain": (),
    "empty": (0, 3),
}
Slots = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, Slots, int, dict[str, float]], Tensor]
"""What one parameter is moved by: ``(param, grad, its slots, steps from 1, hyperparameters)``."""


def average(slots: Slots, name: str, keep: float, value: Tensor) -> Tensor:
    slots[name] = keep * slots.get(name, torch.zeros_like(value)) + (1 - keep) * value
    return slots[name]


def sgd(p: Tensor, g: Tensor, slots: Slots, t: int, h: dict[str, float]) -> Tensor:
    slots["buffer"] = h["momentum"] * slots.get("buffer", torch.zeros_like(g)) + g
    return g + h["momentum"] * slots["buffer"]


def adam(p: Tensor, g: Tensor, slots: Slots, t: int, h: dict[str, float]) -> Tensor:
    first = average(slots, "first", h["beta1"], g) / (1 - h["beta1"] ** t)
    second = average(slots, "second", h["beta2"], g * g) / (1 - h["beta2"] ** t)
    return first / (second.sqrt() + h["eps"])


def adagrad(p: Tensor, g: Tensor, slots: Slots, t: int, h: dict[str, float]) -> Tensor:
    slots["sum"] = slots.get("sum", torch.zeros_like(g)) + g * g
    return g / (slots["sum"].sqrt() + h["eps"]) / (1 + (t - 1) * h["lr_decay"])


# The library's constructor, whether the decay is decoupled, and the formula.
KINDS: dict[str, tuple[Callable[..., Optimizer], bool, Update]] = {
    "sgd": (lambda gc: gcfunc.sgd(0.1, 0.9, weight_decay=0.1, nesterov=True, gc=gc), False, sgd),
    "adam": (lambda gc: gcfunc.adam(0.1, (0.5, 0.9), 0.1, 0.1, gc=gc), False, adam),
    "adamw": (lambda gc: gcfunc.adamw(0.1, (0.5, 0.9), 0.1, 0.1, gc=gc), True, adam),
    "adagrad": (
        lambda gc: gcfunc.adagrad(0.1, lr_decay=0.1, weight_decay=0.1, eps=0.1, gc=gc),
        False,
        adagrad,
    ),
}
GCS: list[GC | None] = [None, GC("gc"), GC("gcc"), GC("gc", at="update"), GC("linear")]


class History(RuleBasedStateMachine):
    """Steps of the library and a plain loop side by side."""

    ignore_gc: ClassVar[bool] = False

    @initialize(kind=st.sampled_from([*KINDS]), gc=st.sampled_from(GCS), seed=st.integers(0, 2**16))
    def begin(self, kind: str, gc: GC | None, seed: int) -> None:
        make, self.decoupled, self.update = KINDS[kind]
        self.gc = gc
        self.opt = make(gc)
        self.stepper = self.compiled(self.opt)
        self.default = torch.get_default_dtype()
        self.random = torch.Generator().manual_seed(seed)
        self.params: Any = self.numbers()
        self.state = self.opt.init(self.params)
        self.plain = {name: p.clone() for name, p in self.params.items()}
        self.slots: dict[str, Slots] = {name: {} for name in SHAPES}
        self.count = 0
        self.packed = False

    def compiled(self, opt: Optimizer) -> Any:
        return opt

    def teardown(self) -> None:
        if hasattr(self, "default"):
            torch.set_default_dtype(self.default)

    def numbers(self) -> Params:
        return {
            name: torch.randn(shape, generator=self.random, dtype=torch.float64) + 0.5
            for name, shape in SHAPES.items()
        }

    def centralized(self, u: Tensor, at: str) -> Tensor:
        if self.ignore_gc or self.gc is None or self.gc.at != at or not u.numel():
            return u
        least, most = {"gc": (2, 9), "gcc": (4, 9), "linear": (2, 2)}[str(self.gc.where)]
        taken = least <= u.ndim <= most
        return u - u.mean(tuple(range(1, u.ndim)), keepdim=True) if taken else u

    @rule(missing=st.sets(st.sampled_from([*SHAPES])), times=st.integers(1, 3))
    def step(self, missing: set[str], times: int) -> None:
        for _ in range(times):
            numbers = self.numbers()
            left_out = set() if self.packed else missing
            grads: Any = {n: None if n in left_out else g.clone() for n, g in numbers.items()}
            if self.packed:
                grads = gcfunc.pack(grads, like=self.params)
            self.params, self.state = self.stepper.step(self.params, grads, self.state)
            self.count += 1
            hyperparams = {n: float(v) for n, v in self.state.hyperparams.items()}
            lr, decay = hyperparams["lr"], hyperparams["weight_decay"]
            for name in SHAPES.keys() - left_out:
                p, u = self.plain[name], numbers[name]
                u = self.centralized(u if self.decoupled else u + decay * p, "gradient")
                u = self.update(p, u, self.slots[name], self.count, hyperparams)
                u = self.centralized(u + decay * p if self.decoupled else u, "update")
                self.plain[name] = p - lr * u

    @rule(name=st.sampled_from(["lr", "weight_decay", "momentum", "beta1"]), part=st.booleans())
    def change_a_hyperparameter(self, name: str, part: bool) -> None:
        if name in self.state.hyperparams:
            value = 0.3 if part else 0.0
            self.state = gcfunc.update_hyperparams(self.state, **{name: value})

    @rule()
    def save_and_load(self) -> None:
        """Into a fresh state; the file holds plain tensors."""
        file = io.BytesIO()
        torch.save((dict(self.unpacked()), gcfunc.state_dict(self.state)), file)
        file.seek(0)
        params, saved = torch.load(file, weights_only=True)
        self.params = gcfunc.pack(params) if self.packed else params
        self.state = gcfunc.load_state_dict(self.opt.init(self.params), saved)

    @rule(by_pickle=st.booleans())
    def copy_both(self, by_pickle: bool) -> None:
        both = self.params, self.state
        self.params, self.state = (
            pickle.loads(pickle.dumps(both)) if by_pickle else copy.deepcopy(both)
        )

    def unpacked(self) -> Params:
        params: Params = gcfunc.unpack(self.params) if self.packed else self.params
        return params

    @rule()
    def pack_or_unpack(self) -> None:
        saved = gcfunc.state_dict(self.state)
        own = {name: p.clone() for name, p in self.unpacked().items()}
        self.packed = not self.packed
        self.params = gcfunc.pack(own) if self.packed else own
        self.state = gcfunc.load_state_dict(self.opt.init(self.params), saved)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def change_the_default_dtype(self, dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)

    @rule(name=st.sampled_from([*SHAPES]), in_place=st.booleans())
    def set_a_parameter(self, name: str, in_place: bool) -> None:
        new = self.numbers()[name]
        self.plain[name] = new.clone()
        own = self.unpacked()
        if in_place or self.packed:
            own[name].copy_(new)
        else:
            self.params = own | {name: new}

    @precondition(lambda self: not self.packed)
    @rule()
    def put_in_another_order(self) -> None:
        self.params = dict(reversed(self.params.items()))

    @invariant()
    def the_two_agree(self) -> None:
        if not hasattr(self, "plain"):
            return
        own = self.unpacked()
        assert own.keys() == self.plain.keys()
        assert int(self.state.step) == self.count
        for name, p in self.plain.items():
            assert own[name].dtype is torch.float64
            assert not p.numel() or float((own[name] - p).abs().max()) <= WITHIN, name


class DonatedHistory(History):
    """In place, through torch.compile with a backend that changes nothing."""

    def compiled(self, opt: Optimizer) -> Any:
        return gcfunc.compile(opt, backend="eager")


def test_histories() -> None:
    check(History, 20, 20, derandomize=True)


@pytest.mark.slow
def test_many_histories() -> None:
    check(History, 300, 50)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_many_donated_histories() -> None:
    check(DonatedHistory, 30, 20)


def test_histories_would_tell_if_gc_did_nothing() -> None:
    class WithoutGC(History):
        ignore_gc = True

    for history, differs in ((History(), False), (WithoutGC(), True)):
        history.begin("sgd", GC("gc"), seed=0)
        history.step(missing=set(), times=1)
        with pytest.raises(AssertionError) if differs else nullcontext():
            history.the_two_agree()
