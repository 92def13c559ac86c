"""What every mechanism owes, whoever writes the next one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import gcfunc
from gcfunc._centralization.formula import ROWS
from gcfunc.hooks.mechanisms import AfterReduction, BeforeAccumulation, Mechanism

DUTIES = ("register", "hook", "runs_first", "meets_sparse")


class AfterAccumulation(Mechanism):
    """One more, as a newcomer might write it: what has been accumulated, in place."""

    runs_first = True
    meets_sparse = True

    def register(self, param: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        register: Any = param.register_post_accumulate_grad_hook
        handle: RemovableHandle = register(hook)
        return handle

    def hook(self) -> Callable[[Tensor], None]:
        def centralize(param: Tensor) -> None:
            assert param.grad is not None
            param.grad = self.centralized(param.grad)

        return centralize


MECHANISMS = [kind for kind in Mechanism.__subclasses__() if kind is not AfterAccumulation]
MECHANISMS.append(AfterAccumulation)


def weight(sparse: bool = False) -> tuple[nn.Embedding, Tensor]:
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, sparse=sparse, dtype=torch.float64)
    return table, torch.tensor([1, 3, 3, 5])


def backward(table: nn.Embedding, rows: Tensor) -> Tensor:
    table(rows).square().sum().backward()
    assert table.weight.grad is not None
    return table.weight.grad.to_dense()


def expected() -> Tensor:
    plain = backward(*weight())
    centralized: Tensor = gcfunc.centralize(plain)
    assert float((plain - centralized).abs().max()) > 0.1
    return centralized


@pytest.mark.parametrize("duty", DUTIES)
def test_none_can_be_left_out(duty: str) -> None:
    given = {name: member for name, member in vars(AfterAccumulation).items() if name != duty}
    forgetful = type("Forgetful", (Mechanism,), given)
    with pytest.raises(TypeError, match=f"abstract.*{duty}"):
        forgetful("weight", ROWS, "error")


@pytest.mark.parametrize("kind", MECHANISMS)
def test_frozen_parameters_stay_frozen_and_are_covered_afterwards(kind: type[Mechanism]) -> None:
    table, rows = weight()
    table.weight.requires_grad_(False)
    kind("weight", ROWS, "error").install(table.weight)
    assert not table.weight.requires_grad
    table.weight.requires_grad_(True)
    torch.testing.assert_close(backward(table, rows), expected())


def test_those_that_run_first_do() -> None:
    table, rows = weight()
    seen: list[Tensor] = []

    def read(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.clone())

    register: Any = table.weight.register_post_accumulate_grad_hook
    register(read)
    AfterAccumulation("weight", ROWS, "error").install(table.weight)
    backward(table, rows)
    torch.testing.assert_close(seen, [expected()])


def test_all_of_the_library_are_among_them() -> None:
    assert {BeforeAccumulation, AfterReduction, AfterAccumulation} <= {*MECHANISMS}


@pytest.mark.parametrize("kind", MECHANISMS)
def test_swapped_parameters_are_covered(kind: type[Mechanism]) -> None:
    table, rows = weight()
    table.weight.register_hook(lambda grad: None)
    register: Any = table.weight.register_post_accumulate_grad_hook
    register(lambda param: None)
    other = nn.Parameter(table.weight.detach().clone())
    torch.utils.swap_tensors(table.weight, other)
    kind("weight", ROWS, "error").install(table.weight)
    torch.testing.assert_close(backward(table, rows), expected())


# torch 2.11 warns whatever it is told.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("kind", MECHANISMS)
def test_sparse_gradients_are_treated_as_the_user_said(kind: type[Mechanism]) -> None:
    table, rows = weight(sparse=True)
    if not kind("weight", ROWS, "rows").meets_sparse:
        kind("weight", ROWS, "rows").install(table.weight)
        with pytest.raises(RuntimeError, match="'weight' is sparse, where none can be"):
            backward(table, rows)
        return
    handle, _ = kind("weight", ROWS, "rows").install(table.weight)
    torch.testing.assert_close(backward(table, rows), expected())
    handle.remove()
    table.weight.grad = None

    handle, _ = kind("weight", ROWS, "skip").install(table.weight)
    torch.testing.assert_close(backward(table, rows), backward(*weight()))
    handle.remove()
    table.weight.grad = None

    kind("weight", ROWS, "error").install(table.weight)
    with pytest.raises(RuntimeError, match="the gradient of 'weight' is sparse"):
        backward(table, rows)
