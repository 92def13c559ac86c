"""What hook mode refuses: a clear error, and no hook left behind."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gcfunc import Units
from gcfunc._centralization.where import RULES
from gcfunc.hooks import centralize_backward, ddp_comm_hook, register_ddp
from tests.hooks.cases import BOTH, SPARSE, hooks_on, mlp, of_one_process

NAMES = ", ".join(map(repr, RULES))

pytestmark = pytest.mark.usefixtures("process_group", "seeded")


def sparse_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))


def partly_sharded() -> nn.Module:
    model = mlp()
    fully_shard(model[0], mesh=of_one_process())
    return model


def registered() -> nn.Module:
    model = mlp()
    centralize_backward(model, lambda name, p: name == "2.weight")
    return model


def complex_model() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Complex modules", UserWarning)
        return nn.Linear(3, 2, dtype=torch.complex64)


def flattened(originals: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP is switching", UserWarning)
        return FullyShardedDataParallel(
            mlp(), device_id=torch.device("cpu"), use_orig_params=originals
        )


def wrapped(model: nn.Module | None = None) -> DistributedDataParallel:
    return DistributedDataParallel(model or mlp())


def with_comm_hook() -> DistributedDataParallel:
    ddp = wrapped()
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    return ddp


def with_gc() -> DistributedDataParallel:
    ddp = wrapped()
    register_ddp(ddp)
    return ddp


def delayed() -> DistributedDataParallel:
    model = mlp()
    return DistributedDataParallel(
        model,
        delay_all_reduce_named_params=[("0.weight", model.get_parameter("0.weight"))],
        param_to_hook_all_reduce=model.get_parameter("2.weight"),
    )


def with_python_reducer() -> DistributedDataParallel:
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        return wrapped()


Refused = tuple[Callable[[], Any], type[Exception], str]
REFUSED: dict[str, Refused] = {
    "no module": (lambda: [mlp()], TypeError, r"torch.nn.Module, got list"),
    "FSDP1": (flattened, TypeError, r"\(FSDP1\).*fully_shard"),
    "FSDP1, original parameters": (
        partial(flattened, originals=True),
        TypeError,
        r"\(FSDP1\).*fully_shard",
    ),
    "no weights": (lambda: nn.LayerNorm(3), ValueError, r"selects none of 2 tensors \(weight \(3,"),
    "no parameters": (nn.Tanh, ValueError, r"selects none of 0 tensors"),
    "registered": (registered, ValueError, r"^'2.weight': already centralized"),
    "registered by DDP": (with_gc, ValueError, r"^'module.0.weight', .*: already centralized"),
    "sparse": (sparse_model, ValueError, r"^'0' has sparse=True.*sparse=.rows. or .skip."),
    "sparse alone": (lambda: SPARSE["Embedding"](True), ValueError, r"^'Embedding' has sparse"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0.weight' has no shape yet"),
    "meta": (lambda: nn.Linear(3, 2, device="meta"), TypeError, r"'weight' is on the meta device"),
    "complex": (complex_model, TypeError, r"'weight' has dtype torch.complex64"),
    "partly sharded": (partly_sharded, ValueError, r"^'2.weight': not in .* fully_shard"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models(case: str) -> None:
    build, error, message = REFUSED[case]
    model = build()
    before = [] if isinstance(model, list) else hooks_on(model)
    with pytest.raises(error, match=message):
        centralize_backward(model)
    assert before == ([] if isinstance(model, list) else hooks_on(model))


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown where": ({"where": "gcx"}, ValueError, f"one of {NAMES}, got 'gcx'"),
    "selects nothing": ({"where": "gcc"}, ValueError, r"where='gcc' selects none of 4 tensors"),
    "no kind of where": ({"where": 5}, TypeError, r"where must have the structure"),
    "mask": ({"where": {"x": True}}, ValueError, r"missing .*'2.weight'; unexpected 'x'"),
    "units": ({"where": lambda name, p: Units(2)}, ValueError, r"Units.* does not fit '0.weight'"),
    "unknown sparse": ({"sparse": "no"}, ValueError, r"'error', 'rows', 'skip'.*got 'no'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_refused_arguments(case: str) -> None:
    arguments, error, message = ARGUMENTS[case]
    model = mlp()
    with pytest.raises(error, match=message):
        centralize_backward(model, **arguments)
    assert not hooks_on(model)


DDP: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no DDP": (mlp, {}, TypeError, r"DistributedDataParallel, got Sequential"),
    "PowerSGD": (wrapped, {"inner": powerSGD_hook}, TypeError, r"PowerSGDState.*got ProcessG"),
    "state": (wrapped, {"state": "group"}, TypeError, r"state must be a ProcessGroup.*got str"),
    "nothing selected": (wrapped, {"where": "gcc"}, ValueError, r"selects none of 4 tensors"),
    "communication hook": (with_comm_hook, {}, RuntimeError, r"has a .* already; .*as inner"),
    "registered by DDP": (with_gc, {}, RuntimeError, r"has a communication hook already"),
    "registered": (lambda: wrapped(registered()), {}, ValueError, r"^'module.2.weight': already"),
    "delayed": (delayed, {}, ValueError, r"delay_all_reduce_named_params.*use centralize_backward"),
    "python reducer": (with_python_reducer, {}, ValueError, r"python_reducer.*centralize_backward"),
    "sparse": (lambda: wrapped(sparse_model()), {}, ValueError, r"^'module.0' has .*=.rows."),
}


@pytest.mark.parametrize("case", DDP)
def test_refused_for_ddp(case: str) -> None:
    build, arguments, error, message = DDP[case]
    ddp = build()
    before = hooks_on(ddp)
    with pytest.raises(error, match=message):
        register_ddp(ddp, **arguments)
    assert hooks_on(ddp) == before


def test_refused_where_compiled_code_drops_hooks() -> None:
    model = mlp()
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(RuntimeError, match="trace_autograd_ops"),
    ):
        centralize_backward(model)
    assert not hooks_on(model)


def test_a_registration_that_fails_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    last = model.get_parameter("2.weight")

    def fail(hook: object) -> None:
        raise MemoryError

    monkeypatch.setattr(last, "register_hook", fail)
    with pytest.raises(MemoryError):
        centralize_backward(model)
    assert not hooks_on(model)
    monkeypatch.undo()
    assert centralize_backward(model).names == BOTH


NO_RULES: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": ("gcx", ValueError, f"one of {NAMES}, got 'gcx'"),
    "predicate": (lambda name, p: True, TypeError, "masks and predicates need names"),
    "mask": ({"weight": True}, TypeError, "gcfunc.hooks.register_ddp knows"),
}


@pytest.mark.parametrize("rule", NO_RULES)
def test_communication_hooks_know_rules_only(rule: str) -> None:
    where, error, message = NO_RULES[rule]
    with pytest.raises(error, match=message):
        ddp_comm_hook(where=where)


def test_sparse_layers_that_do_not_matter() -> None:
    model = sparse_model()
    assert centralize_backward(model, lambda name, p: name == "1.weight").names == ("1.weight",)
    model = sparse_model()
    model[0].requires_grad_(False)
    assert centralize_backward(model).names == ("0.weight", "1.weight")


def test_one_hook_for_each_parameter() -> None:
    model = mlp()
    first = centralize_backward(model, lambda name, p: name == "0.weight")
    second = centralize_backward(model, lambda name, p: name == "2.weight")
    with pytest.raises(ValueError, match=r"'0.weight', '2.weight': already"):
        centralize_backward(model)
    first.remove()
    with pytest.raises(ValueError, match=r"^'2.weight': already"):
        centralize_backward(model)
    second.remove()
    third = centralize_backward(model)
    assert third.names == BOTH
    third.remove()
    assert register_ddp(wrapped(model)) == ("module.0.weight", "module.2.weight")


def test_what_never_trains_is_left_out() -> None:
    model = mlp()
    model.register_parameter(
        "quantized", nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    )
    with torch.inference_mode():
        model.register_parameter("inferred", nn.Parameter(torch.ones(2, 3), requires_grad=False))
    assert centralize_backward(model).names == BOTH


def test_private_names_of_torch_that_hook_mode_reads() -> None:
    ddp = DistributedDataParallel(mlp())
    weight = ddp.module.get_parameter("0.weight")
    assert isinstance(weight._cdata, int)
    assert weight._backward_hooks is None
    assert ddp._comm_hooks == []
    assert not ddp._delay_all_reduce_params
    assert ddp._use_python_reducer is False
