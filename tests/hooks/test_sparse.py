"""Sparse gradients: centralized by rows, skipped or refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from gcfunc import Units
from gcfunc.hooks import centralize_backward
from tests.cases import largest_difference
from tests.distributed import gradients, require_same
from tests.hooks.cases import SPARSE, loss_of

pytestmark = pytest.mark.usefixtures("seeded")

WORDS = torch.tensor([[0, 3, 3], [6, 0, 3]])


def sparse_and_dense(name: str) -> tuple[nn.Module, nn.Module]:
    sparse, dense = (SPARSE[name](sparse).double() for sparse in (True, False))
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_rows_are_exact(name: str, passes: int) -> None:
    model, dense = sparse_and_dense(name)
    centralize_backward(model, sparse="rows")
    for m in (model, dense):
        for _ in range(passes):
            loss_of(m, WORDS).backward()
    have, want = gradients(model)["weight"], gradients(dense)["weight"]
    assert have.is_sparse
    require_same({"weight": have.to_dense()}, gcfunc.centralize({"weight": want}))
    assert (have.to_dense() - want).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's Adagrad
def test_sparse_rows_take_steps() -> None:
    model, dense = sparse_and_dense("Embedding")
    plain = copy.deepcopy(dense)
    centralize_backward(model, sparse="rows")
    centralize_backward(dense)
    for m in (model, dense, plain):
        optimizer = torch.optim.Adagrad(m.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(m, WORDS).backward()
            optimizer.step()
    require_same(model.state_dict(), dense.state_dict())
    assert largest_difference(plain.state_dict(), dense.state_dict()) > 1e-3


def test_sparse_skipped() -> None:
    model, dense = sparse_and_dense("Embedding")
    centralize_backward(model, sparse="skip")
    for m in (model, dense):
        loss_of(m, WORDS).backward()
    assert gradients(model)["weight"].is_sparse
    require_same({"weight": gradients(model)["weight"].to_dense()}, gradients(dense))


class SparseGradient(torch.autograd.Function):
    """Of a parameter that looks as if its gradient were dense."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dims: int, coalesced: bool) -> Tensor:
        ctx.dims, ctx.coalesced = dims, coalesced
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = torch.arange(6.0).view(2, 3).square().to_sparse(ctx.dims)
        if not ctx.coalesced:
            grad = torch.cat([grad, grad]).coalesce()
            grad = torch.sparse_coo_tensor(grad.indices() % 2, grad.values(), (2, 3))
        return grad, None, None


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(2, 3))

    def forward(self, dims: int, coalesced: bool = True) -> Tensor:
        loss: Tensor = SparseGradient.apply(self.odd, dims, coalesced)
        return loss


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_that_say_whether_rows_repeat(coalesced: bool) -> None:
    model = Odd()
    centralize_backward(model, sparse="rows")
    # By autograd.grad, as accumulation forgets it.
    (grad,) = torch.autograd.grad(model(1, coalesced), model.odd)
    want = torch.arange(6.0).view(2, 3).square() * (1 if coalesced else 2)
    assert grad.is_coalesced() == coalesced
    torch.testing.assert_close(grad.to_dense(), gcfunc.centralize(want))
    assert not torch.equal(grad.to_dense(), want)


SURPRISES: dict[str, tuple[dict[str, Any], int]] = {
    "not announced": ({}, 1),
    "not of rows": ({"sparse": "rows"}, 2),
    "other units": ({"sparse": "rows", "where": lambda name, p: Units(dim=1)}, 1),
}


@pytest.mark.parametrize("surprise", SURPRISES)
def test_sparse_gradients_that_cannot_be_centralized(surprise: str) -> None:
    options, dims = SURPRISES[surprise]
    model = Odd()
    centralize_backward(model, **options)
    with pytest.raises(RuntimeError, match=r"gradient of 'odd' is sparse.* or leave it out"):
        model(dims).backward()
    assert model.odd.grad is None
