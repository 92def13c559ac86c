"""Steps are counted as torch counts them, whoever else writes the counters."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.optim import Optimizer

from gcfunc import optim
from tests.cases import Params
from tests.optim.training import (
    PLAIN,
    difference,
    leaves,
    require_same_state,
    set_grads,
    train,
    values,
)

COUNTED = [name for name in PLAIN if not name.startswith("SGD")]
UNKNOWN_TO_TORCH = ["Ranger", "Lion", "Lookahead"]


def make(library: Any, name: str, params: Params, **own: Any) -> Optimizer:
    if name == "Lookahead":
        return optim.Lookahead(optim.AdamW(params.values(), lr=0.1, **own), k=2)
    cls, options = PLAIN.get(name, (name, {"lr": 0.1}))
    new: Callable[..., Optimizer] = getattr(library, cls)
    return new(params.values(), **options, **own)


@pytest.fixture
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def unevenly(opt: Optimizer, params: Params) -> Optimizer:
    """Counters are made anew where parameters part, and where they meet again."""
    train(opt, params, range(3))
    train(opt, params, range(3, 5), only=["linear.weight"])
    return train(opt, params, range(5, 7))


@pytest.mark.usefixtures("_default_dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", COUNTED)
def test_a_default_dtype_changes_no_counter(name: str, dtype: torch.dtype) -> None:
    results = []
    for library in (optim, torch.optim):
        torch.set_default_dtype(torch.float32)
        params = leaves(torch.float32)
        opt = train(make(library, name, params), params, range(2))
        torch.set_default_dtype(dtype)
        # Later ones are torch's of that default: float64 under float64, else float32.
        unevenly(opt, params)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        unevenly(opt, params)
        fresh = leaves(torch.float32)
        results.append((opt, unevenly(make(library, name, fresh), fresh)))
    for ours, torchs in zip(*results, strict=True):
        require_same_state(ours.state_dict(), torchs.state_dict(), within=1e-4)
        assert difference(values(ours), values(torchs)) < 1e-5


@pytest.mark.usefixtures("_default_dtype")
def test_no_counter_stops_at_256() -> None:
    """The largest count that 16 bits of bfloat16 hold."""
    torch.set_default_dtype(torch.bfloat16)
    p = torch.ones(2, 3, dtype=torch.float32, requires_grad=True)
    opt = optim.AdamW([p], lr=1e-3)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        opt.step()
    step = opt.state[p]["step"]
    assert (float(step), step.dtype) == (300.0, torch.float32)


@pytest.mark.parametrize("name", [*COUNTED, *UNKNOWN_TO_TORCH])
def test_counters_lie_on_the_cpu_whatever_the_default_device(name: str) -> None:
    params, twins = leaves(), leaves()
    opt = make(optim, name, params)
    for seed, only in ((0, None), (1, ["linear.weight"]), (2, None)):
        set_grads(params, seed, only)
        with torch.device("meta"):
            opt.step()
    assert {e["step"].device.type for e in opt.state.values()} == {"cpu"}
    twin = train(make(optim, name, twins), twins, range(1))
    train(twin, twins, range(1, 2), only=["linear.weight"])
    assert difference(values(opt), values(train(twin, twins, range(2, 3)))) == 0


def through_data(step: Tensor) -> None:
    step.data.fill_(1)


def in_place(step: Tensor) -> None:
    step.fill_(1)


def by_another(step: Tensor) -> None:
    step.data = torch.tensor(1.0)


@pytest.mark.parametrize("write", [through_data, in_place, by_another])
@pytest.mark.parametrize("name", COUNTED)
def test_a_counter_that_somebody_writes_counts(name: str, write: Callable[..., None]) -> None:
    results = []
    for library in (optim, torch.optim):
        params = leaves()
        opt = train(make(library, name, params), params, range(4))
        write(opt.state[params["linear.weight"]]["step"])
        train(opt, params, range(4, 7))
        results.append(opt)
    ours, torchs = results
    require_same_state(ours.state_dict(), torchs.state_dict())
    assert difference(values(ours), values(torchs)) < 1e-12


def steps_in_turn(runs: list[tuple[Optimizer, Params]], seed: int) -> None:
    for opt, params in runs:
        train(opt, params, range(seed, seed + 2))


def shared(library: Any, name: str, **own: Any) -> tuple[Optimizer, Params]:
    """An optimizer whose parameters and state all processes see, as for Hogwild."""
    params = leaves()
    for p in params.values():
        p.share_memory_()
    opt = train(make(library, name, params, **own), params, range(1))
    for entry in opt.state.values():
        for t in entry.values():
            if isinstance(t, Tensor):  # of SGD without momentum there is None
                t.share_memory_()
    return opt, params


@pytest.mark.parametrize(("method", "children"), [("fork", 2), ("spawn", 1)])
def test_processes_that_share_an_optimizer_count_together(method: str, children: int) -> None:
    """In turn, so that the order is the same: values and counts are torch's, or one process's."""
    shared_by_all = {
        ("ours", name): shared(optim, name, compile=False) for name in [*PLAIN, *UNKNOWN_TO_TORCH]
    }
    twins = {name: shared(torch.optim, name) for name in PLAIN}
    alone = {name: shared(optim, name) for name in UNKNOWN_TO_TORCH}
    runs = [*shared_by_all.values(), *twins.values()]
    context: Any = multiprocessing.get_context(method)
    for turn in range(children):
        child = context.Process(target=steps_in_turn, args=(runs, 1 + 2 * turn))
        child.start()
        child.join(120)
        assert child.exitcode == 0
        steps_in_turn([*alone.values()], 1 + 2 * turn)
    for run in (runs, [*alone.values()]):
        steps_in_turn(run, 5)
    for (_, name), (ours, _) in shared_by_all.items():
        other, _ = (twins | alone)[name]
        assert difference(values(ours), values(other)) < 1e-12, name
        require_same_state(ours.state_dict(), other.state_dict())
    counts = {float(e["step"]) for opt, _ in runs for e in opt.state.values() if "step" in e}
    assert counts == {3.0 + 2 * children}


def test_a_shared_counter_stays_where_it_is() -> None:
    """And its neighbours count on, which are not shared."""
    params = leaves()
    opt = train(make(optim, "Adam", params), params, range(2))
    step = torch.tensor(2.0).share_memory_()
    opt.state[params["linear.weight"]]["step"] = step
    train(opt, params, range(2, 5))
    assert opt.state[params["linear.weight"]]["step"] is step
    assert {float(entry["step"]) for entry in opt.state.values()} == {5.0}
    twins = leaves()
    assert difference(values(opt), values(train(make(optim, "Adam", twins), twins, range(5)))) == 0
