"""The drop-ins by the reference's names, with the reference's results."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import gcfunc
from gcfunc import GC, optim
from gcfunc._catalog import CATALOG
from tests import golden
from tests.cases import Params
from tests.optim.training import EXACT, copies

CLASSES = [row.drop_in.__name__ for row in CATALOG.values()]
REFERENCE = [name for row in CATALOG.values() for name in row.reference]
NAMES = [*CLASSES, *REFERENCE]


def test_names() -> None:
    classes = [getattr(optim, name) for name in NAMES]
    assert all(issubclass(cls, Optimizer) for cls in classes)
    assert [cls.__name__ for cls in classes] == NAMES
    assert gcfunc.optim is optim
    for row in CATALOG.values():
        assert row.twin is None or row.twin in row.drop_in.__mro__
        assert all(issubclass(getattr(optim, name), row.drop_in) for name in row.reference)


def rebuilt(case: dict[str, Any], params: Params, **options: Any) -> tuple[Optimizer, bool]:
    """The drop-in for a golden case, and whether decay is to be set for each step."""
    h = dict(case["hyperparameters"])
    name = case["optimizer"]
    if case["source"] == "algorithm-GC":
        del h["use_gc"]
        where = "gcc" if h.pop("gc_conv_only", False) else "gc"
        options = {"gc": GC(where, "gradient" if h.pop("gc_loc", True) else "update")} | options
    elif name == "AdamW":
        # The name is torch's here, whose conventions it has; the reference's are in AdamW_GC.
        name, options = "AdamW_GC", {"gc": None} | options
    if name == "RAdam":
        h["decoupled_weight_decay"] = True
    by_step = case["source"] == "algorithm-GC" and name == "AdamW"
    return getattr(optim, name)(params.values(), **h, **options), by_step


def trajectory(case: dict[str, Any], **options: Any) -> Iterator[tuple[int, Params]]:
    params = copies(golden.tensors("init"))
    opt, by_step = rebuilt(case, params, **options)
    (group,) = opt.param_groups
    decay = group["weight_decay"]
    for t in range(1, golden.MANIFEST["steps"] + 1):
        if by_step:
            group["weight_decay"] = decay / (1 - group["betas"][0] ** t)
        grads = golden.tensors(f"grad/{t}")
        for name, p in params.items():
            p.grad = grads[name]
        opt.step()
        if t in golden.MANIFEST["saved"]:
            yield t, {name: p.detach().clone() for name, p in params.items()}


GOLDEN = [case for case in golden.CASES if not golden.is_quirk(case)]


@pytest.mark.parametrize("case", GOLDEN, ids=golden.ids)
def test_equals_the_reference(case: dict[str, Any]) -> None:
    single = case["optimizer"] in ("RAdam", "Ranger")
    tolerance = golden.SINGLE if single else EXACT
    assert golden.error(case, trajectory(case, compile=False)) < tolerance
    if case["optimizer"] not in ("SGDW", "AdamW") or case["source"] == "algorithm-GC":
        assert golden.error(case, trajectory(case, compile=False, gc=None)) > 1e-4


def test_every_name_of_the_reference_is_among_them() -> None:
    assert {case["optimizer"] for case in GOLDEN if case["source"] == "GC_code"} == {
        *("SGDW", "AdamW"),
        *REFERENCE,
    }


COMPILED = ["SGDW_GCC", "AdamW_GC2"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_equals_the_reference_compiled(name: str) -> None:
    *_, case = (case for case in GOLDEN if case["optimizer"] == name)
    assert golden.error(case, trajectory(case, compile=True)) < EXACT
    assert counters["stats"]["unique_graphs"]
