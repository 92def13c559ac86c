"""Schedules, averages of weights, scaled losses: the drop-ins under what else trains a model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer, lr_scheduler, swa_utils

from gcfunc import optim
from gcfunc._catalog import CATALOG
from tests.optim.training import (
    EXACT,
    Options,
    copies,
    difference,
    leaves,
    require_same_state,
    saved,
    set_grads,
    train,
    values,
)

F64 = torch.float64
STEPS = 12
Schedule = Callable[[Optimizer], Any]


def two(opt: Optimizer) -> list[lr_scheduler.LRScheduler]:
    return [lr_scheduler.ConstantLR(opt, 0.1, 3), lr_scheduler.ExponentialLR(opt, 0.8)]


# Every schedule of torch by name, with momentum cycling where it has that.
SCHEDULES: dict[str, Schedule] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.8),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(opt, two(opt), [4]),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS, 0.01),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(two(opt), opt),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.2, STEPS + 1),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, STEPS, 2.0),
}
# Those of torch's classes that have a momentum to cycle.
CLASSES: dict[str, Options] = {
    row.drop_in.__name__: {option: value for option, value in options.items() if option != "lr"}
    for row in CATALOG.values()
    if row.twin and {"betas", "momentum"} & {*row.options}
    for options in row.variants.values()
}


def test_every_schedule_is_there() -> None:
    assert SCHEDULES.keys() | {"LRScheduler"} == {*lr_scheduler.__all__}


def scheduled(opt: Optimizer, schedule: Any, params: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """The parameters after every step, and what was scheduled for it."""
    for seed in range(STEPS):
        train(opt, params, [seed])
        group = opt.param_groups[0]
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        yield [*values(opt), torch.tensor([group["lr"], momentum], dtype=F64)]
        plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
        schedule.step(*[1.0] * plateau)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_scheduled_it_is_torch(schedule: Schedule, name: str, tensor_lr: bool) -> None:
    runs = []
    for module in (optim, torch.optim):
        params = leaves()
        lr = torch.tensor(0.1, dtype=F64) if tensor_lr else 0.1
        groups = [{"params": [p]} for p in params.values()]
        opt = getattr(module, name)(groups, lr=lr, **CLASSES[name])
        runs.append([*scheduled(opt, schedule(opt), params)])
    for ours, theirs in zip(*runs, strict=True):
        assert difference(ours, theirs) <= EXACT
    assert len({step[-1] for step in runs[0]}) > 1


@pytest.mark.parametrize("name", ["LinearLR", "OneCycleLR"])
def test_of_a_lookahead(name: str) -> None:
    """Over the same steps by hand, which its inner optimizer cannot be given a schedule for."""
    params, same = leaves(), leaves()
    opt = optim.Lookahead(optim.SGD(params.values(), lr=0.1, momentum=0.9, gc="gc"), k=3)
    other = optim.Lookahead(optim.SGD(same.values(), lr=0.1, momentum=0.9, gc="gc"), k=3)
    schedule, lrs = SCHEDULES[name](opt), set()
    for seed, (*_, scalars) in enumerate(scheduled(opt, schedule, params)):
        lr, momentum = scalars.tolist()
        other.param_groups[0].update(lr=lr, momentum=momentum)
        train(other, same, [seed])
        lrs.add(lr)
    assert difference(values(opt), values(other)) <= EXACT
    assert len(lrs) > 5


TWINS = [row.drop_in for row in CATALOG.values() if row.twin]


@pytest.mark.parametrize("drop_in", [optim.Ranger, optim.Lion, *TWINS])
def test_numbers_of_numpy(drop_in: Callable[..., Optimizer]) -> None:
    """Arrays too, and written in place; torch takes them where NumPy's arithmetic lets it."""
    results = []
    for array, number in ((np.array, np.float32), (float, float)):
        params = leaves()
        opt = train(drop_in(params.values(), lr=array(0.25)), params, range(1))
        group = opt.param_groups[0]
        train(opt, params, range(1, 2))
        group["lr"] *= 0.5
        train(opt, params, range(2, 3))
        group["lr"], group["weight_decay"] = number(0.0625), array(0.1)
        results.append(values(train(opt, params, range(3, 5))))
    assert difference(*results) == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_a_schedule_does_not_recompile() -> None:
    params = {"weight": torch.ones(4, 3).cumsum(1).requires_grad_()}
    opt = optim.SGD(params.values(), lr=0.1, momentum=0.9, gc="gc", compile=True)
    schedule = SCHEDULES["OneCycleLR"](opt)
    run = scheduled(opt, schedule, params)
    lrs = {float(next(run)[-1][0])}
    with torch.compiler.set_stance("fail_on_recompile"):
        lrs |= {float(step[-1][0]) for step in run}
    assert len(lrs) == STEPS
    assert counters["stats"]["unique_graphs"] == 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def batches(n: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, dtype=F64, generator=generator) for _ in range(n)]


def test_stochastic_weight_averaging() -> None:
    results = []
    for module in (optim, torch.optim):
        model = Net().double()
        opt = module.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averaged = swa_utils.AveragedModel(model)
        schedule = swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=3)
        for x in batches():
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
            averaged.update_parameters(model)
            schedule.step()
        swa_utils.update_bn(batches(), averaged)
        results.append([*averaged.parameters(), *averaged.buffers()])
    assert difference(*results) <= EXACT


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_scaled_losses(name: str, fused: bool | None) -> None:
    """The third step overflows and is skipped."""
    results = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        opt = getattr(module, name)(model.parameters(), lr=0.1, fused=fused)
        opt.load_state_dict(opt.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scales = []
        for i, x in enumerate(batches()):
            before = [*values(opt)]
            opt.zero_grad()
            loss = model(x).square().mean() * (float("inf") if i == 2 else 1.0)
            scaler.scale(loss).backward()
            if i > 3:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
            assert (difference(values(opt), before) == 0) == (i == 2)
        assert scales == [2.0**10] * 2 + [2.0**9] * 4
        results.append(values(opt))
    assert difference(*results) <= EXACT


def test_a_closure_is_evaluated_once() -> None:
    params, same = leaves(), leaves()
    results = []
    for module, own in ((optim, params), (torch.optim, same)):
        opt = module.Adam(own.values(), lr=0.1)
        schedule = lr_scheduler.StepLR(opt, 1)
        calls: list[Tensor] = []

        def closure(own: Any = own, calls: Any = calls) -> Tensor:
            set_grads(own, len(calls))
            calls.append(torch.tensor(float(len(calls))))
            return calls[-1]

        for i in range(3):
            assert opt.step(closure) is calls[i]
            assert len(calls) == i + 1
            schedule.step()
        results.append(opt)
    assert difference(*map(values, results)) <= EXACT


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_schedule_resumes_with_its_optimizer(tensor_lr: bool) -> None:
    def start(params: dict[str, Tensor]) -> tuple[Optimizer, Any]:
        lr = torch.tensor(0.1, dtype=F64) if tensor_lr else 0.1
        opt = optim.SGD(params.values(), lr=lr, momentum=0.9, gc="gc")
        return opt, lr_scheduler.CosineAnnealingLR(opt, STEPS)

    def go_on(params: dict[str, Tensor], opt: Optimizer, schedule: Any, steps: range) -> None:
        for seed in steps:
            train(opt, params, [seed])
            schedule.step()

    params = leaves()
    opt, schedule = start(params)
    go_on(params, opt, schedule, range(4))
    other = copies(params)
    resumed, other_schedule = start(other)
    resumed.load_state_dict(saved(opt))
    other_schedule.load_state_dict(schedule.state_dict())
    go_on(params, opt, schedule, range(4, 8))
    go_on(other, resumed, other_schedule, range(4, 8))
    assert difference(values(opt), values(resumed)) == 0
    require_same_state(opt.state_dict(), resumed.state_dict(), within=0)
