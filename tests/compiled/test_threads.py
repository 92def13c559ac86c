"""Several threads step at once: what is not compiled yet, and what is."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gcfunc
from gcfunc._tensors.versions import CONFIGURES_THREADS_TOGETHER
from tests.cases import Params, largest_difference

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LONG = 120
"""Seconds after which a thread is taken to hang; no test that passes waits for them."""
Job = Callable[[], Any]


def at_once(jobs: list[Job]) -> list[Any]:
    """What the jobs return, each in a thread of its own, all begun together."""
    start = threading.Barrier(len(jobs))
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def work(i: int, job: Job) -> None:
        start.wait()
        try:
            results[i] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=own, daemon=True) for own in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not errors
    return [results[i] for i in range(len(jobs))]


def start(rows: int) -> Params:
    return {"weight": torch.arange(4.0 * rows).view(rows, 4), "bias": torch.ones(rows)}


def trained(opt: Any, params: Params, steps: int = 3) -> Params:
    params = {name: p.clone() for name, p in params.items()}
    state = opt.init(params)
    for t in range(steps):
        grads = {name: torch.cos(p + t) for name, p in params.items()}
        params, state = opt.step(params, grads, state)
    return params


def trained_by_class(params: Params, steps: int = 3, **options: Any) -> Params:
    own = {name: p.clone().requires_grad_() for name, p in params.items()}
    opt = gcfunc.optim.AdamW(own.values(), lr=0.01, **options)
    for t in range(steps):
        for p in own.values():
            p.grad = torch.cos(p.detach() + t)
        opt.step()
    return {name: p.detach() for name, p in own.items()}


def differs_without_gc(params: Params, result: Params) -> bool:
    return largest_difference(trained(gcfunc.adamw(0.01), params), result) > 1e-3


@pytest.mark.parametrize("form", ["class", "shared", "own"])
def test_first_steps_at_once(form: str) -> None:
    opt = gcfunc.adamw(0.01, gc="gc")
    starts = [start(rows) for rows in (2, 3, 5)]
    shared = gcfunc.compile(opt)

    def job(params: Params) -> Job:
        if form == "class":
            return lambda: trained_by_class(params, gc="gc", compile=True)
        return lambda: trained(shared if form == "shared" else gcfunc.compile(opt), params)

    jobs = [job(params) for params in starts]
    results = at_once(jobs)
    again = at_once(jobs) if form == "shared" else results
    for params, result, same in zip(starts, results, again, strict=True):
        assert largest_difference(trained(opt, params), result) < 1e-5
        assert largest_difference(result, same) == 0
        assert differs_without_gc(params, result)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def fitted(step: Any, steps: int = 3) -> Params:
    train = step.init()
    for _ in range(steps):
        train, _ = step(train, torch.ones(2, 3), torch.ones(2, 2))
    params: Params = train.params
    return params


@pytest.mark.parametrize("donate", [True, False], ids=["donated", "pure"])
@pytest.mark.parametrize("whole", [False, True], ids=["optimizer", "train_step"])
def test_a_function_that_many_threads_share_is_compiled_once(whole: bool, donate: bool) -> None:
    """Not once a thread, which would be more often than torch compiles one function."""
    opt = gcfunc.adamw(0.01, gc="gc")
    plain: Any = gcfunc.train_step(small_model(), nn.functional.mse_loss, opt) if whole else opt
    compiled: Any = gcfunc.compile(plain, donate=donate, backend="aot_eager")
    params = start(3)

    def run(step: Any) -> Params:
        return fitted(step) if whole else trained(step, params)

    results = at_once([lambda: run(compiled)] * 12)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(largest_difference(results[0], other) == 0 for other in results)
    assert largest_difference(run(plain), results[0]) < 1e-5
    if not whole:
        assert differs_without_gc(params, results[0])


class Compilation:
    """A compilation in a thread of its own that lasts until it is released, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs, self.released = threading.Event(), threading.Event()
        self._error = error
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        assert self.runs.wait(LONG)

    def _backend(self, graph: Any, inputs: Any) -> Any:
        self.runs.set()
        self.released.wait(LONG)
        if self._error:
            raise self._error
        return graph.forward

    def _work(self) -> None:
        opt = gcfunc.compile(gcfunc.sgd(0.1), backend=self._backend)
        params = {"only here": torch.ones(7)}
        try:
            opt.step(params, params, opt.init(params))
        except Exception:
            assert self._error

    def end(self) -> None:
        self.released.set()
        self.thread.join(LONG)


def in_a_thread(job: Job) -> threading.Thread:
    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("form", ["ahead", "donated", "pure"])
def test_compiled_steps_wait_for_no_compilation(form: str) -> None:
    if CONFIGURES_THREADS_TOGETHER and form != "pure":
        pytest.skip("torch 2.11 sets its configuration in each call, for all threads")
    kwargs: dict[str, Any] = {} if form == "ahead" else {"backend": "aot_eager"}
    opt = gcfunc.compile(gcfunc.adamw(0.01, gc="gc"), donate=form != "pure", **kwargs)
    params, other = start(3), start(6)
    (expected,) = at_once([lambda: trained(opt, params)])
    results: list[Params] = []
    compilation = Compilation()
    waits = in_a_thread(lambda: results.append(trained(opt, other)))
    for _ in range(3):
        goes = in_a_thread(lambda: results.append(trained(opt, params)))
        goes.join(LONG)
    assert len(results) == 3
    assert waits.is_alive()
    assert all(largest_difference(expected, result) == 0 for result in results)
    compilation.end()
    waits.join(LONG)
    assert largest_difference(results[3], trained(gcfunc.adamw(0.01, gc="gc"), other)) < 1e-5


@pytest.mark.parametrize("ahead", [True, False])
def test_a_compilation_that_fails_leaves_nothing_locked(ahead: bool) -> None:
    compilation = Compilation(ValueError("no"))
    params = start(2)
    opt = gcfunc.adamw(0.01, gc="gc")
    compiled = gcfunc.compile(opt) if ahead else gcfunc.compile(opt, backend="aot_eager")
    results: list[Params] = []
    waits = in_a_thread(lambda: results.append(trained(compiled, params)))
    compilation.end()
    waits.join(LONG)
    assert largest_difference(results[0], trained(opt, params)) < 1e-5


def test_steps_compiled_while_steps_run() -> None:
    """Below torch 2.14 it refuses calls of compiled functions while another thread traces."""
    pure = gcfunc.compile(gcfunc.adamw(0.01, gc="gc"), donate=False, backend="aot_eager")
    params = start(3)
    expected = trained(pure, params)
    results: list[Params] = []
    done = threading.Event()

    def compile_more() -> None:
        try:
            trained(gcfunc.compile(gcfunc.adamw(0.01, gc="gc")), start(4))
        finally:
            done.set()

    def step_on() -> None:
        while not done.is_set():
            results.append(trained(pure, params, 3))

    at_once([compile_more, step_on])
    assert results
    assert all(largest_difference(expected, result) == 0 for result in results)


FORKING: list[Job] = []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_during_a_compilation_can_compile() -> None:
    opt = gcfunc.adamw(0.01, gc="gc")
    params = start(2)
    expected = trained(opt, params)
    compilation = Compilation()
    # Runs before what was registered earlier: the fork has begun, and the compilation goes on.
    FORKING.append(compilation.released.set)
    os.register_at_fork(before=lambda: FORKING.pop()() if FORKING else None)
    child = os.fork()
    if not child:
        result = trained(gcfunc.compile(opt, donate=False, backend="aot_eager"), params)
        os._exit(0 if largest_difference(result, expected) < 1e-5 else 1)
    compilation.end()
    deadline = time.monotonic() + LONG
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert (ended, status) == (child, 0)


def test_torch_has_the_lock_that_it_compiles_under() -> None:
    """Which ``aot_compile`` does not take; see _compiled/threads.py."""
    from torch._dynamo import convert_frame

    lock: Any = convert_frame.compile_lock
    held: list[Tensor | bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        other = in_a_thread(lambda: held.append(not lock.acquire(blocking=False)))
        other.join(LONG)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert held == [True]
