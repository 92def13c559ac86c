"""The handle: it removes hooks, tells what was replaced since, and keeps nothing alive."""

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import gcfunc
from gcfunc.hooks import centralize_backward, register_ddp
from tests.cases import largest_difference
from tests.distributed import gradients, require_same
from tests.hooks.cases import (
    BOTH,
    F64,
    X,
    hooks_on,
    loss_of,
    mlp,
    of_one_process,
    require_different,
)

pytestmark = pytest.mark.usefixtures("process_group", "seeded")


def test_remove() -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    with centralize_backward(model) as handle:
        assert len(hooks_on(model)) == len(handle.names) == 2
        assert repr(handle) == "CentralizeHandle(0.weight, 2.weight)"
        held = hooks_on(model)
    handle.remove()
    assert not hooks_on(model)
    assert repr(handle) == "CentralizeHandle(0.weight, 2.weight, removed)"
    with pytest.raises(RuntimeError, match="removed"):
        handle.check(model)
    for m in (model, plain):
        loss_of(m, X[0]).backward()
    require_same(gradients(model), gradients(plain))
    assert largest_difference(gcfunc.centralize(gradients(model)), gradients(model)) > 1e-3
    # Even while somebody holds on to the hooks that were removed.
    assert held
    assert centralize_backward(model).names == BOTH


def test_remove_leaves_hooks_of_others() -> None:
    model = mlp()
    weight = model.get_parameter("0.weight")
    seen: list[Tensor] = []
    weight.register_hook(lambda g: seen.append(g))
    with centralize_backward(model):
        weight.register_hook(lambda g: seen.append(g))
        loss_of(model, X[0]).backward()
        # Hooks run in their order.
        torch.testing.assert_close(gcfunc.centralize(seen[0]), seen[1], rtol=0, atol=1e-12)
        assert not torch.equal(seen[0], seen[1])
    assert len(hooks_on(model)) == 2


def test_an_error_in_the_block_removes_too() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError), centralize_backward(model):
        _ = 1 / 0
    assert not hooks_on(model)


def test_dropping_the_handle_keeps_the_hooks() -> None:
    model = mlp()
    centralize_backward(model)
    gc.collect()
    loss_of(model, X[0]).backward()
    assert max(gradients(model)["0.weight"].sum(1).abs()) < 1e-12


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    return model


def emptied(model: nn.Module) -> nn.Module:
    values = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(values)
    return model


def swapped(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(torch.float32).to(F64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=of_one_process())
    return model


def parallelized(model: nn.Module) -> nn.Module:
    return parallelize_module(
        model, of_one_process(), {"0": ColwiseParallel(), "2": ColwiseParallel()}
    )


def with_another_layer(model: nn.Module) -> nn.Module:
    model.set_submodule("0", nn.Linear(4, 3).double())
    return model


def reparametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.get_submodule("2"))
    return model


def itself(model: nn.Module) -> nn.Module:
    return model


Replace = Callable[[nn.Module], nn.Module]
REPLACED: dict[str, tuple[Replace, Replace, tuple[str, ...]]] = {
    "deepcopy": (itself, copy.deepcopy, BOTH),
    "pickle": (itself, through_pickle, BOTH),
    "torch.save": (itself, through_a_file, BOTH),
    "load_state_dict(assign=True)": (itself, assigned, BOTH),
    "to_empty": (itself, emptied, BOTH),
    "swap_tensors": (itself, swapped, BOTH),
    "fully_shard": (itself, sharded, BOTH),
    "parallelize_module": (itself, parallelized, BOTH),
    "DTensor.to(dtype)": (parallelized, lambda m: m.to(torch.float32).to(F64), BOTH),
    "submodule": (itself, with_another_layer, ("0.weight",)),
    "weight_norm": (itself, reparametrized, ("2.weight",)),
}


@pytest.mark.parametrize("case", REPLACED)
def test_check_tells_what_was_replaced(case: str) -> None:
    prepare, replace, lost = REPLACED[case]
    model = prepare(mlp())
    handle = centralize_backward(model)
    handle.check(model)
    model = replace(model)
    names = re.escape(", ".join(map(repr, lost)))
    with pytest.raises(RuntimeError, match=f"^{names}: replaced since"):
        handle.check(model)
    # What the message says to do.
    handle.remove()
    assert not hooks_on(model)
    loss_of(model, X[0]).backward()
    plain = gradients(model)
    model.zero_grad()
    handle = centralize_backward(model)
    loss_of(model, X[0]).backward()
    handle.check(model)
    require_same(gradients(model), gcfunc.centralize(plain))
    require_different(plain, gradients(model), handle.names)


def test_dtensors_are_saved_without_a_warning() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), of_one_process()))
    handle = centralize_backward(model)
    with pytest.raises(RuntimeError, match=r"^'weight': replaced since"):
        handle.check(through_a_file(model))


def converted(model: nn.Module) -> nn.Module:
    model.to(torch.float32).to(F64)
    return model


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(mlp().state_dict())
    return model


def compiled(model: nn.Module) -> nn.Module:
    optimized: Any = torch.compile(model, backend="eager")
    return optimized


KEPT: dict[str, tuple[Replace, Replace]] = {
    "nothing": (itself, itself),
    "model.to(dtype)": (itself, converted),
    "load_state_dict": (itself, loaded),
    "in a module": (itself, nn.Sequential),
    "DDP": (itself, DistributedDataParallel),
    "compile": (itself, compiled),
    "DDP of compile": (itself, lambda model: DistributedDataParallel(compiled(model))),
    "FSDP2, nothing": (sharded, itself),
    "FSDP2, model.to(dtype)": (sharded, converted),
}


@pytest.mark.parametrize("case", KEPT)
def test_check_passes_where_hooks_still_run(case: str) -> None:
    prepare, wrap = KEPT[case]
    model = prepare(mlp())
    handle = centralize_backward(model)
    inside = wrap(model)
    handle.check(inside)
    handle.check(model)
    loss_of(inside, X[0]).backward()
    have = gradients(model)
    handle.remove()
    inside.zero_grad()
    loss_of(inside, X[0]).backward()
    require_same(have, gcfunc.centralize(gradients(model)))
    require_different(gradients(model), have, handle.names)


def test_nothing_is_kept_alive() -> None:
    model = mlp()
    handle = centralize_backward(model)
    loss_of(model, X[0]).backward()
    refs: list[Any] = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5
    assert handle.names == BOTH
    with pytest.raises(RuntimeError, match="replaced"):
        handle.check(mlp())


def test_ddp_and_what_was_registered_with_it_go_together() -> None:
    model = mlp()
    ddp = DistributedDataParallel(model)
    register_ddp(ddp)
    loss_of(ddp, X[0]).backward()
    with pytest.raises(ValueError, match="already centralized"):
        centralize_backward(model)
    del ddp
    gc.collect()
    centralize_backward(model)
    refs = [*map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_trace_autograd_ops_set_later_is_noticed() -> None:
    model = nn.Linear(3, 2)
    with (
        centralize_backward(model) as handle,
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(RuntimeError, match="drops gradient hooks"),
    ):
        handle.check(model)
