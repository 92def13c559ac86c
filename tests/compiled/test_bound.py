"""How many graphs an optimizer keeps, and what it does when there are no more to come."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import gcfunc
from gcfunc import optim
from gcfunc._compiled import graph
from gcfunc._compiled.graph import Graphs
from gcfunc._tensors.versions import TORCH
from gcfunc.optim import inplace
from tests.cases import Params, largest_difference, random_like

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MOST = 5
SAYS = rf"for {MOST} sets of shapes at most.*compile=False"


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graph.MOST_COMPILATIONS == 32
    monkeypatch.setattr(graph, "MOST_COMPILATIONS", MOST)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def once(opt: Any, rows: int) -> Params:
    params: Params = {"weight": torch.arange(2.0 * rows).view(rows, 2), "bias": torch.ones(rows)}
    state = opt.init(params)
    for t in range(2):
        params, state = opt.step(params, random_like(params, t), state)
    assert state.step == 2
    return params


def test_a_model_that_grows_is_compiled_for_a_number_of_sizes() -> None:
    opt = gcfunc.adamw(0.1, gc="gc")
    compiled = gcfunc.compile(opt, backend="eager")
    sizes = range(2, 2 + MOST + 6)
    with pytest.warns(UserWarning, match=SAYS) as warned:
        results = [once(compiled, rows) for rows in sizes]
    for rows, result in zip(sizes, results, strict=True):
        assert largest_difference(result, once(opt, rows)) < 1e-5
        assert largest_difference(result, once(gcfunc.adamw(0.1), rows)) > 1e-2
    assert sum("sets of shapes" in str(w.message) for w in warned) == 1
    assert graphs() == len(compiled.planned.graphs) == MOST
    # What is compiled stays so.
    with torch.compiler.set_stance("fail_on_recompile"), warnings.catch_warnings(action="error"):
        for rows in (sizes[0], sizes[-1], sizes[MOST - 1]):
            assert largest_difference(once(compiled, rows), once(opt, rows)) < 1e-5
    assert graphs() == MOST


def test_a_drop_in_whose_parameter_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gaussian splatting does it: another parameter, and its state cut or lengthened."""
    eager_backend = {"fullgraph": True, "backend": "eager"}
    monkeypatch.setattr(inplace, "compile_options", lambda _: eager_backend)

    def grown(**options: Any) -> Tensor:
        p = torch.ones(2, 3).cumsum(1).requires_grad_()
        opt = optim.AdamW([p], lr=0.1, **options)
        for t in range(MOST + 4):
            p.grad = torch.sin(p.detach() * (1 + t))
            opt.step()
            entry = opt.state.pop(p)
            p = torch.cat([p.detach(), p.detach()[:1]]).requires_grad_()
            own = {
                slot: torch.cat([entry[slot], entry[slot][:1]]) for slot in entry if slot[0] == "e"
            }
            opt.state[p] = {"step": entry["step"].clone(), **own}
            opt.param_groups[0]["params"] = [p]
        return p.detach()

    with pytest.warns(UserWarning, match=SAYS) as warned:
        result = grown(gc="gc", compile=True)
    assert sum("sets of shapes" in str(w.message) for w in warned) == 1
    assert graphs() == MOST
    assert (result - grown(gc="gc", compile=False)).abs().max() < 1e-4
    assert (result - grown(compile=False)).abs().max() > 1e-2


@pytest.mark.skipif(TORCH < (2, 12), reason="torch 2.11 compiles for other layouts by itself")
def test_layouts_of_gradients_count_too() -> None:
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    compiled = gcfunc.compile(opt)
    compiled.planned.graphs = Graphs(1)
    params = {"a": torch.randn(4, 4)}
    own = {"a": params["a"].clone()}
    state, own_state = opt.init(params), compiled.init(own)

    def step(t: int) -> None:
        nonlocal params, state
        g = random_like(params, t)["a"]
        grads = {"a": g.t() if t % 2 else g}
        params, state = opt.step(params, grads, state)
        compiled.step(own, grads, own_state)
        assert largest_difference(own, params) < 1e-6

    step(0)
    with pytest.warns(UserWarning, match="not compiled from here on"):
        step(1)
    step(2)
    step(3)
    assert graphs() == 1


@pytest.mark.skipif(TORCH < (2, 12), reason="torch 2.11 compiles for each size anew at times")
def test_pure_steps_take_sizes_that_change_for_symbols() -> None:
    opt = gcfunc.adamw(0.1, gc="gc")
    compiled = gcfunc.compile(opt, donate=False, backend="aot_eager")
    for rows in range(3, 23):
        assert largest_difference(once(compiled, rows), once(opt, rows)) < 1e-5
    assert graphs() <= 3
