"""Steps, hooks, training steps, packing and compilation as ratios to what people use today."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gcfunc
from benchmarks.gates import internals
from benchmarks.gates.conftest import Gate
from benchmarks.harness.shapes import MODELS, tensors
from benchmarks.peers import hooks, steps, train_step
from benchmarks.peers.algorithms import COMPARED, NEAREST, NEAREST_FUSED, OURS
from benchmarks.peers.steps import Peer
from benchmarks.peers.tasks import Step

Make = Callable[..., Peer]
GC: dict[str, str | None] = {"none": None, "gc": "gc", "gcc": "gcc"}
MODES: dict[str, tuple[Make, Make]] = {
    "eager": (steps.eager, steps.foreach_torch),
    "compiled": (partial(steps.ours, packed=False, donate=True), steps.fastest_torch),
    "drop_in": (steps.drop_in, steps.fastest_torch),
}


def baseline_of(mode: str, algorithm: str) -> str:
    """What torch has that is nearest."""
    how, nearest = ("foreach", NEAREST) if mode == "eager" else ("fused", NEAREST_FUSED)
    return f"torch.optim's {nearest.get(algorithm, algorithm)}, {how}=True, no GC"


@pytest.mark.parametrize("gc", GC)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithm", OURS)
@pytest.mark.parametrize("model", MODELS)
def test_step(gate: Gate, device: str, model: str, algorithm: str, mode: str, gc: str) -> None:
    if gc == "gcc" and max(map(len, MODELS[model]().values())) < 4:
        pytest.skip(f"{model} has no convolutions")
    ours, theirs = MODES[mode]
    params, grads = tensors(MODELS[model](), device)
    step = ours(algorithm, params, grads, gc=GC[gc]).step
    baseline = theirs(algorithm, params, grads).step
    gate(f"step.{model}.{mode}.{algorithm}.{gc}", step, baseline, baseline_of(mode, algorithm))


@pytest.mark.parametrize("algorithm", COMPARED)
@pytest.mark.parametrize("model", MODELS)
def test_packed_step(gate: Gate, device: str, model: str, algorithm: str) -> None:
    params, grads = tensors(MODELS[model](), device)
    step = steps.ours(algorithm, params, grads, gc="gc", packed=True, donate=True).step
    baseline = steps.fastest_torch(algorithm, params, grads).step
    gate(f"packed_step.{model}.{algorithm}.gc", step, baseline, baseline_of("packed", algorithm))


@pytest.mark.parametrize("model", MODELS)
def test_pack(gate: Gate, device: str, model: str) -> None:
    params, grads = tensors(MODELS[model](), device)
    packed = gcfunc.pack(params)
    gate(
        f"packing.{model}.pack",
        partial(gcfunc.pack, grads, like=packed),
        partial(parameters_to_vector, grads.values()),
        "torch.nn.utils.parameters_to_vector",
    )


@pytest.mark.parametrize("model", MODELS)
def test_unpack(gate: Gate, device: str, model: str) -> None:
    params, _ = tensors(MODELS[model](), device)
    packed, vector = gcfunc.pack(params), parameters_to_vector(params.values())
    gate(
        f"packing.{model}.unpack",
        partial(gcfunc.unpack, packed),
        partial(vector_to_parameters, vector, params.values()),
        "torch.nn.utils.vector_to_parameters",
    )


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("model", ["cnn", "resnet50", "mlp", "transformer"])
def test_hooks(gate: Gate, device: str, model: str, mode: str) -> None:
    """On one model, with its hooks and without them in turn; see benchmarks/peers/hooks.py."""
    setting = hooks.prepare(model, mode, ddp=False, device=device)
    way, baseline = hooks.hooked(setting), hooks.unhooked(setting)
    within = ExitStack()

    def enter() -> None:
        within.enter_context(way.within())
        way.step()

    def several(step: Step) -> None:
        for _ in range(hooks.MODELS[model].steps):
            step()

    gate(
        f"hooks.{model}.{mode}",
        partial(several, way.step),
        partial(several, baseline.step),
        "the same without hooks",
        setup=enter,
        teardown=within.close,
        baseline_setup=baseline.step,
    )


WAYS = {
    "none": partial(train_step.ours, gc=None, donate=True),
    "gc": partial(train_step.ours, gc="gc", donate=True),
    "gcc": partial(train_step.ours, gc="gcc", donate=True),
    "pure": partial(train_step.ours, gc="gc", donate=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
@pytest.mark.parametrize("model", train_step.MODELS)
def test_train_step(gate: Gate, device: str, model: str, algorithm: str, way: str) -> None:
    torch.manual_seed(0)
    task = train_step.MODELS[model]().to(device)
    if way == "gcc" and max(p.dim() for p in task.model.parameters()) < 4:
        pytest.skip(f"{model} has no convolutions")
    gate(
        f"train_step.{model}.{algorithm}.{way}",
        WAYS[way](task, algorithm),
        train_step.ordinary(task, algorithm, compiled=True),
        "torch.compile(model), autograd and torch.optim, fused=True, no GC",
    )


def restart(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Compile as a new process would, with this cache on disk."""
    internals.forget()
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    patch.setenv("TRITON_CACHE_DIR", str(cache / "triton"))


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("form", ["packed", "unpacked"])
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["resnet50"])
def test_compilation(
    gate: Gate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    model: str,
    algorithm: str,
    form: str,
    start: str,
) -> None:
    """The first step, its compilation included."""
    params, grads = tensors(MODELS[model](), device)
    ours = partial(
        steps.ours, algorithm, params, grads, gc="gc", packed=form == "packed", donate=True
    )
    theirs = partial(steps.compiled_torch, algorithm, params, grads, loop=False)
    current: list[Peer] = []
    caches = itertools.count()

    def anew(make: Callable[[], Peer], name: str) -> None:
        cache = tmp_path / (name if start == "warm" else f"{next(caches)}")
        restart(cache, monkeypatch)
        if start == "cold":  # what any compilation takes
            torch.compile(lambda x: x + 1)(torch.ones(3, device=device))
        current[:] = [make()]

    def first() -> None:
        current[0].step()

    if start == "warm":
        for make, name in ((ours, "ours"), (theirs, "theirs")):
            anew(make, name)
            first()
    gate(
        f"compilation.{model}.{algorithm}-{form}.{start}",
        first,
        first,
        "torch.compile of torch.optim's step, no GC",
        setup=partial(anew, ours, "ours"),
        baseline_setup=partial(anew, theirs, "theirs"),
        rounds=3,
    )
    shutil.rmtree(tmp_path)
