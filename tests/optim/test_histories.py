"""Whatever happens to a drop-in in the course of training, it goes on as torch's class does.

Hypothesis makes up the histories: steps, missing gradients, frozen parameters, groups that are
added, options, checkpoints, copies, other defaults, other data, other parameters.
"""

import copy
import pickle
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
from torch import Tensor, nn

from gcfunc import optim
from gcfunc._tensors.versions import TORCH
from tests.histories import check
from tests.optim.training import PLAIN, difference, require_same_state

WITHIN = 1e-9
SHAPES = [(3, 4), (2, 3, 2, 2), (4,), (), (0, 3), (2, 1)]
NUMBERS = st.integers(0, 2**16)
shapes = st.sampled_from(SHAPES)
values = st.sampled_from([0.3, 0.07, 0.0])


def centralized(grad: Tensor) -> Tensor:
    if grad.ndim < 2 or not grad.numel():
        return grad
    return grad - grad.mean(tuple(range(1, grad.ndim)), keepdim=True)


class History(RuleBasedStateMachine):
    """A drop-in and torch's class side by side; with GC the latter gets centralized gradients."""

    gc: ClassVar[str | None] = None

    @initialize(kind=st.sampled_from([*PLAIN]), many=st.integers(1, 4), seed=NUMBERS)
    def begin(self, kind: str, many: int, seed: int) -> None:
        self.name, self.options = PLAIN[kind]
        if self.gc:
            # A decay that is coupled would have to be centralized, too.
            decoupled = self.name == "AdamW" or self.options.get("decoupled_weight_decay")
            self.options = self.options | ({} if decoupled else {"weight_decay": 0.0})
        self.default = torch.get_default_dtype()
        self.random = torch.Generator().manual_seed(seed)
        params = [self.parameter(SHAPES[i % len(SHAPES)]) for i in range(many)]
        self.ours = self.make(optim, params)
        self.theirs = self.make(torch.optim, copy.deepcopy(params))
        self.frozen: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "default"):
            torch.set_default_dtype(self.default)

    def make(self, library: Any, params: list[nn.Parameter]) -> Any:
        own = {"gc": self.gc, "compile": False} if library is optim else {}
        new = getattr(library, self.name)
        return new([{"params": params}], **self.options, **own, foreach=False)

    def parameter(self, shape: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(self.numbers(shape))

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64) + 0.5

    def params(self, opt: Any) -> list[nn.Parameter]:
        return [p for group in opt.param_groups for p in group["params"]]

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [*zip(self.params(self.ours), self.params(self.theirs), strict=True)]

    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def for_torch(self, grad: Tensor) -> Tensor:
        return grad.clone() if self.gc is None else centralized(grad)

    def asked(self) -> tuple[Any, Any]:
        """Which are given groups and checkpoints."""
        return self.both()

    @rule(missing=st.sets(st.integers(0, 8)), times=st.integers(1, 3))
    def step(self, missing: set[int], times: int) -> None:
        for _ in range(times):
            for i, (p, q) in enumerate(self.pairs()):
                grad = self.numbers(tuple(p.shape))
                without = i in missing or i in self.frozen
                p.grad = None if without else grad
                q.grad = None if without else self.for_torch(grad)
            for opt in self.both():
                opt.step()

    @rule(i=st.integers(0, 8))
    def freeze_or_unfreeze(self, i: int) -> None:
        self.frozen ^= {i}
        for pair in self.pairs()[i : i + 1]:
            for p in pair:
                p.requires_grad_(i not in self.frozen)

    # Of a group that is added, older versions of torch's Adagrad make no state.
    @precondition(lambda self: self.name != "Adagrad" or TORCH >= (2, 12))
    @rule(shape=shapes, lr=values)
    def add_a_group(self, shape: tuple[int, ...], lr: float) -> None:
        new = self.parameter(shape)
        for opt in self.asked():
            opt.add_param_group({"params": [copy.deepcopy(new)], "lr": lr})

    @rule(i=st.integers(0, 3), lr=values, as_tensor=st.booleans())
    def change_lr(self, i: int, lr: float, as_tensor: bool) -> None:
        for opt in self.both():
            groups = opt.param_groups
            tensor = as_tensor and self.name != "Adagrad"
            groups[i % len(groups)]["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor else lr

    @rule(i=st.integers(0, 3), value=values)
    def change_another_option(self, i: int, value: float) -> None:
        for opt in self.both():
            groups = opt.param_groups
            group = groups[i % len(groups)]
            if "betas" in group:
                group["betas"] = (value, 0.9)
            elif group.get("momentum") and not group.get("nesterov"):
                group["momentum"] = value + 0.1

    @rule()
    def load_into_itself(self) -> None:
        for opt in self.asked():
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    @rule()
    def load_into_another(self) -> None:
        """Which nothing of the old one can touch any more."""
        before = self.both()
        self.ours, self.theirs = (
            self.make(library, opt.param_groups[0]["params"])
            for library, opt in zip((optim, torch.optim), before, strict=True)
        )
        for old, new in zip(before, self.asked(), strict=True):
            for group in old.param_groups[1:]:
                new.add_param_group({"params": group["params"]})
            state = old.state_dict()
            new.load_state_dict(state if old is before[0] else copy.deepcopy(state))
            for entry in old.state.values():
                for t in entry.values():
                    if isinstance(t, Tensor):
                        t.fill_(7.0)

    @rule()
    def exchange_checkpoints(self) -> None:
        """Each goes on from what the other one has saved."""
        saved = [copy.deepcopy(opt.state_dict()) for opt in self.asked()]
        for opt, state in zip(self.asked(), reversed(saved), strict=True):
            opt.load_state_dict(state)

    @rule(by_pickle=st.booleans())
    def copy_both(self, by_pickle: bool) -> None:
        both = self.both()
        copied = pickle.loads(pickle.dumps(both)) if by_pickle else copy.deepcopy(both)
        self.ours, self.theirs = copied

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def change_the_default_dtype(self, dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)

    @rule(i=st.integers(0, 8))
    def replace_data(self, i: int) -> None:
        for pair in self.pairs()[i : i + 1]:
            data = self.numbers(tuple(pair[0].shape))
            for p in pair:
                p.data = data.clone()

    @precondition(lambda self: self.name != "Adagrad")  # torch's has state from its constructor
    @rule(i=st.integers(0, 3), shape=shapes)
    def replace_a_parameter(self, i: int, shape: tuple[int, ...]) -> None:
        new = self.parameter(shape)
        for opt in self.both():
            groups = opt.param_groups
            params = groups[i % len(groups)]["params"]
            old, params[-1] = params[-1], copy.deepcopy(new)
            opt.state.pop(old, None)

    @rule(i=st.integers(0, 8), count=st.integers(0, 5), through_data=st.booleans())
    def write_a_counter(self, i: int, count: int, through_data: bool) -> None:
        for opt, params in zip(self.both(), zip(*self.pairs(), strict=True), strict=True):
            for p in params[i : i + 1]:
                step = opt.state.get(p, {}).get("step")
                if step is not None:
                    (step.data if through_data else step).fill_(count)

    @rule(i=st.integers(0, 8))
    def replace_state(self, i: int) -> None:
        """By equal tensors elsewhere."""
        for pair in self.pairs()[i : i + 1]:
            for opt, p in zip(self.both(), pair, strict=True):
                for slot, t in opt.state.get(p, {}).items():
                    if isinstance(t, Tensor):
                        opt.state[p][slot] = t.clone()

    @invariant()
    def the_two_agree(self) -> None:
        if not hasattr(self, "ours"):
            return
        for p, q in self.pairs():
            assert (p.shape, p.requires_grad) == (q.shape, q.requires_grad)
        assert difference(*map(self.params, self.both())) <= WITHIN
        states = [opt.state_dict() for opt in self.both()]
        require_same_state(states[0], states[1], within=WITHIN)


class CentralizedHistory(History):
    gc = "gc"


class LookaheadHistory(CentralizedHistory):
    """Two of which one has its inner optimizer do all but the steps."""

    def make(self, library: Any, params: list[nn.Parameter]) -> Any:
        return optim.Lookahead(super().make(optim, params), k=2)

    def asked(self) -> tuple[Any, Any]:
        return self.ours._inner, self.theirs


machines = pytest.mark.parametrize("machine", [History, CentralizedHistory, LookaheadHistory])


@machines
def test_histories(machine: type[History]) -> None:
    check(machine, 20, 20, derandomize=True)


@pytest.mark.slow
@machines
def test_many_histories(machine: type[History]) -> None:
    check(machine, 300, 50)


def test_centralized_histories_differ_from_plain_ones() -> None:
    """The second machine would tell if GC did nothing."""

    class WithoutGC(CentralizedHistory):
        def make(self, library: Any, params: list[nn.Parameter]) -> Any:
            opt = super().make(library, params)
            if library is optim:
                for group in opt.param_groups:
                    group["gc"] = None
            return opt

    history = WithoutGC()
    history.begin("SGD", many=2, seed=0)
    history.the_two_agree()
    history.step(missing=set(), times=1)
    with pytest.raises(AssertionError):
        history.the_two_agree()
