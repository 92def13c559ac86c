"""Bad input: a clear error, and nothing changed."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import GC, Optimizer, State, Units

PARAMS = {
    "conv.weight": torch.arange(48.0).view(4, 3, 2, 2),
    "fc.weight": torch.arange(30.0).view(5, 6),
    "fc.bias": torch.arange(5.0),
}
GRADS = {name: p.cos() for name, p in PARAMS.items()}
OPT = gcfunc.adamw(0.1, gc="gc")
_, STATE = OPT.step(PARAMS, GRADS, OPT.init(PARAMS))
MODEL = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def one_else(name: str, other: Any, of: Mapping[str, Tensor] = GRADS) -> dict[str, Any]:
    """The same tree with another leaf; the last one, so that the others come first."""
    assert name in of
    return {n: t for n, t in of.items() if n != name} | {name: other}


def rare(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A tensor of a kind that torch itself warns of."""
    kinds = "Sparse CSR tensor support|The PyTorch API of nested|torch.quantize_per_tensor"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"({kinds}).*", UserWarning)
        return make(*args, **kwargs)


def nested() -> Tensor:
    return rare(torch.nested.nested_tensor, [torch.ones(2), torch.ones(3)])


def quantized() -> Tensor:
    return rare(torch.quantize_per_tensor, torch.ones(2), 0.1, 0, torch.qint8)


def unchanged(trees: Any) -> Callable[[], bool]:
    """Whether the tensors in there still are what they are now."""
    tensors = [t for t in pytree.tree_leaves(trees) if isinstance(t, Tensor)]
    versions = [t._version for t in tensors]
    plain = [t for t in tensors if t.layout is torch.strided and not t.is_meta and not t.is_nested]
    values = [t.clone() for t in plain]
    return lambda: (
        [t._version for t in tensors] == versions and all(map(torch.equal, plain, values))
    )


def step(opt: Optimizer = OPT, **given: Any) -> object:
    args = {"params": PARAMS, "grads": GRADS, "state": STATE} | given
    still = unchanged(args)
    try:
        return opt.step(**args)
    finally:
        assert still()


def exhausted() -> object:
    parameters = MODEL.parameters()
    assert [*parameters]
    return parameters


def slots(**given: Any) -> State:
    """The state with other slots for the bias."""
    new = {s: one_else("fc.bias", given.get(s, c["fc.bias"]), c) for s, c in STATE.slots.items()}
    return STATE._replace(slots=new)


def hyperparam(**given: Any) -> State:
    return STATE._replace(hyperparams=STATE.hyperparams | given)


def where(where: Any) -> Callable[[], object]:
    return lambda: gcfunc.sgd(0.1, gc=GC(where=where)).init(PARAMS)


def mask(**given: Any) -> dict[str, Any]:
    return {"conv.weight": True, "fc.weight": False, "fc.bias": False} | given


def by_units(units: Any) -> Callable[[str, Tensor], Any]:
    return lambda name, tensor: tensor.ndim >= 2 and units


def partition(labels: Any, *names: str) -> Callable[[], object]:
    opts = {name: gcfunc.sgd(0.1) for name in names or ("a", "b")}
    return lambda: gcfunc.partition(opts, labels).init(PARAMS)


def checkpoint(**given: Any) -> dict[str, Any]:
    return gcfunc.state_dict(STATE) | given


PLAIN = gcfunc.sgd(0.1)
NO_GCS: list[tuple[Any, type[Exception]]] = [
    ("GC", ValueError),
    ("", ValueError),
    ("update", ValueError),
    (True, TypeError),
    (1, TypeError),
    (GC, TypeError),
    (["gc"], TypeError),
]
NO_STATES: list[Any] = [None, {}, tuple(STATE), OPT, STATE.step]
LEAVES = "'conv.weight', 'fc.weight', 'fc.bias'"
SORTED = "'conv.weight', 'fc.bias', 'fc.weight'"
FLOATS = "supported are float32, bfloat16, float16, float64"
OTHER = "state.hyperparams does not match this optimizer's state"
TREE = "params is a pytree of tensors, for example dict(model.named_parameters())"

Case = tuple[Callable[[], object], type[Exception], str]
# What is called, the error, and the whole message or its beginning.
CASES: dict[str, Case] = {
    # Structures
    "grads lack a leaf": (
        lambda: step(grads={n: g for n, g in GRADS.items() if n != "fc.bias"}),
        ValueError,
        "grads does not match params; missing 'fc.bias'",
    ),
    "grads have a leaf too many": (
        lambda: step(grads=GRADS | {"x": torch.ones(1)}),
        ValueError,
        "grads does not match params; unexpected 'x'",
    ),
    "grads have another name": (
        lambda: step(grads={n.replace("bias", "offset"): g for n, g in GRADS.items()}),
        ValueError,
        "grads does not match params; missing 'fc.bias'; unexpected 'fc.offset'",
    ),
    "grads are nested elsewhere": (
        lambda: step(grads={"model": GRADS}),
        ValueError,
        f"grads does not match params; missing {SORTED}; unexpected 'model.conv.weight', ",
    ),
    "grads are a list": (
        lambda: step(grads=[*GRADS.values()]),
        ValueError,
        f"grads does not match params; missing {SORTED}; unexpected '0', '1', '2'",
    ),
    "grads are what backward() returns": (
        lambda: step(grads=None),
        TypeError,
        f"grads must have the structure of params (leaves {LEAVES}), got a bare NoneType",
    ),
    "grads are one tensor": (
        lambda: step(grads=torch.ones(2, 2)),
        TypeError,
        f"grads must have the structure of params (leaves {LEAVES}), got a bare Tensor",
    ),
    "grads are a generator": (
        lambda: step(grads=(g for g in GRADS.values())),
        TypeError,
        f"grads must have the structure of params (leaves {LEAVES}), got a bare generator",
    ),
    "grads and state are swapped": (
        lambda: step(grads=STATE, state=GRADS),
        ValueError,
        f"grads does not match params; missing {SORTED}; unexpected 'hyperparams.beta1', ",
    ),
    "two leaves have one name": (
        lambda: PLAIN.init({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}),
        ValueError,
        "params: two leaves have the name 'a.b'",
    ),
    # What params are
    "params are empty": (
        lambda: PLAIN.init({}),
        ValueError,
        "params holds no tensors (an empty container or an exhausted iterator?)",
    ),
    "params are empty, nested": (
        lambda: PLAIN.init({"a": [], "b": ({},)}),
        ValueError,
        "params holds no tensors",
    ),
    "params of a layer without any": (
        lambda: PLAIN.init(dict(nn.ReLU().named_parameters())),
        ValueError,
        "params holds no tensors",
    ),
    "params are None": (
        lambda: PLAIN.init(None),
        TypeError,
        f"params: 'param' must be a tensor, got NoneType; {TREE}",
    ),
    "a param is None": (
        lambda: PLAIN.init(PARAMS | {"x": None}),
        TypeError,
        f"params: 'x' must be a tensor, got NoneType; {TREE}",
    ),
    "params are a module": (
        lambda: PLAIN.init(MODEL),
        TypeError,
        f"params: 'param' must be a tensor, got Sequential; {TREE}",
    ),
    "params are a generator": (
        lambda: PLAIN.init(MODEL.parameters()),
        TypeError,
        f"params: 'param' must be a tensor, got generator; {TREE}",
    ),
    "params are an exhausted generator": (
        lambda: PLAIN.init(exhausted()),
        TypeError,
        f"params: 'param' must be a tensor, got generator; {TREE}",
    ),
    "params are a list of an exhausted generator": (
        lambda: PLAIN.init([*exhausted()]),  # type: ignore[misc]
        ValueError,
        "params holds no tensors (an empty container or an exhausted iterator?)",
    ),
    "params are an exhausted generator, in step": (
        lambda: step(params=exhausted()),
        TypeError,
        f"params: 'param' must be a tensor, got generator; {TREE}",
    ),
    "params are names": (
        lambda: PLAIN.init(["conv.weight", "fc.weight"]),
        TypeError,
        f"params: '0' must be a tensor, got str; {TREE}",
    ),
    "params are pairs": (
        lambda: PLAIN.init([*MODEL.named_parameters()]),
        TypeError,
        f"params: '0.0' must be a tensor, got str; {TREE}",
    ),
    "params are numbers": (
        lambda: PLAIN.init({"a": 1.0}),
        TypeError,
        f"params: 'a' must be a tensor, got float; {TREE}",
    ),
    # Shapes, dtypes, devices, layouts
    "a grad of another shape": (
        lambda: step(grads=one_else("fc.weight", torch.ones(6, 5))),
        ValueError,
        "grads: 'fc.weight' has shape (6, 5), but its parameter has (5, 6)",
    ),
    "a grad that would broadcast": (
        lambda: step(grads=one_else("fc.weight", torch.ones(6))),
        ValueError,
        "grads: 'fc.weight' has shape (6,), but its parameter has (5, 6)",
    ),
    "a grad of another dtype": (
        lambda: step(grads=one_else("fc.bias", torch.ones(5, dtype=torch.bfloat16))),
        ValueError,
        "grads: 'fc.bias' has dtype torch.bfloat16, but its parameter has torch.float32",
    ),
    "an integer grad": (
        lambda: step(grads=one_else("fc.bias", torch.ones(5, dtype=torch.int64))),
        TypeError,
        f"grads: 'fc.bias' has dtype torch.int64; {FLOATS}",
    ),
    "a bool grad": (
        lambda: step(grads=one_else("fc.bias", torch.ones(5, dtype=torch.bool))),
        TypeError,
        f"grads: 'fc.bias' has dtype torch.bool; {FLOATS}",
    ),
    "a complex grad": (
        lambda: step(grads=one_else("fc.bias", torch.ones(5, dtype=torch.complex64))),
        TypeError,
        f"grads: 'fc.bias' has dtype torch.complex64; {FLOATS}",
    ),
    "a float8 grad": (
        lambda: step(grads=one_else("fc.bias", torch.ones(5).to(torch.float8_e4m3fn))),
        TypeError,
        f"grads: 'fc.bias' has dtype torch.float8_e4m3fn; {FLOATS}",
    ),
    "a sparse COO grad": (
        lambda: step(grads=one_else("fc.weight", GRADS["fc.weight"].to_sparse())),
        TypeError,
        "grads: 'fc.weight' has layout torch.sparse_coo; only strided is supported",
    ),
    "a sparse CSR grad": (
        lambda: step(grads=one_else("fc.weight", rare(GRADS["fc.weight"].to_sparse_csr))),
        TypeError,
        "grads: 'fc.weight' has layout torch.sparse_csr; only strided is supported",
    ),
    "a nested grad": (
        lambda: step(grads=one_else("fc.weight", nested())),
        TypeError,
        "grads: 'fc.weight' has layout nested; only strided is supported",
    ),
    "a meta grad": (
        lambda: step(grads=one_else("fc.bias", torch.ones(5, device="meta"))),
        TypeError,
        "grads: 'fc.bias' is on the meta device and has no values",
    ),
    "a grad that is no tensor": (
        lambda: step(grads=one_else("fc.bias", [0.0])),
        ValueError,
        "grads does not match params; missing 'fc.bias'; unexpected 'fc.bias.0'",
    ),
    "a grad that is a number": (
        lambda: step(grads=one_else("fc.bias", 0.0)),
        TypeError,
        "grads: 'fc.bias' must be a tensor, got float",
    ),
    "integer params": (
        lambda: PLAIN.init(one_else("fc.bias", torch.ones(5, dtype=torch.int32), PARAMS)),
        TypeError,
        f"params: 'fc.bias' has dtype torch.int32; {FLOATS}",
    ),
    "complex params": (
        lambda: PLAIN.init({"z": torch.ones(2, 2, dtype=torch.complex128)}),
        TypeError,
        f"params: 'z' has dtype torch.complex128; {FLOATS}",
    ),
    "sparse params": (
        lambda: PLAIN.init({"table": torch.ones(2, 2).to_sparse()}),
        TypeError,
        "params: 'table' has layout torch.sparse_coo; only strided is supported",
    ),
    "quantized params": (
        lambda: PLAIN.init({"q": quantized()}),
        TypeError,
        f"params: 'q' has dtype torch.qint8; {FLOATS}",
    ),
    "meta params": (
        lambda: PLAIN.init(dict(nn.Linear(2, 2, device="meta").named_parameters())),
        TypeError,
        "params: 'weight' is on the meta device and has no values",
    ),
    "meta params in step": (
        lambda: step(params=one_else("fc.bias", torch.ones(5, device="meta"), PARAMS)),
        TypeError,
        "params: 'fc.bias' is on the meta device and has no values",
    ),
    # States
    "the state of another optimizer": (
        lambda: step(state=gcfunc.sgd(0.1, 0.9).init(PARAMS)),
        ValueError,
        f"{OTHER}; missing 'beta1', 'beta2', 'eps'; unexpected 'dampening', 'momentum'",
    ),
    "the state of another option": (
        lambda: step(state=gcfunc.adamw(amsgrad=True).init(PARAMS)),
        ValueError,
        "state.slots does not match this optimizer's state; unexpected 'max_exp_avg_sq'",
    ),
    "the state of other params": (
        lambda: step(state=OPT.init({"w": torch.ones(2, 2)})),
        ValueError,
        f"state.slots['exp_avg'] does not match params; missing {SORTED}; unexpected 'w'",
    ),
    "the state of another grouping": (
        lambda: step(
            gcfunc.partition({"a": PLAIN}, lambda name, tensor: "a"), state=PLAIN.init(PARAMS)
        ),
        ValueError,
        f"{OTHER}; missing 'a.lr', 'a.weight_decay'; unexpected 'lr', 'weight_decay'",
    ),
    "a state slot of another shape": (
        lambda: step(state=slots(exp_avg=torch.ones(6))),
        ValueError,
        "state.slots['exp_avg']: 'fc.bias' has shape (6,), but its parameter has (5,)",
    ),
    "a state slot of another dtype": (
        lambda: step(state=slots(exp_avg_sq=torch.ones(5, dtype=torch.float64))),
        ValueError,
        "state.slots['exp_avg_sq']: 'fc.bias' has dtype torch.float64, but its parameter has ",
    ),
    "a state slot on another device": (
        lambda: step(state=slots(exp_avg=torch.ones(5, device="meta"))),
        ValueError,
        "state.slots['exp_avg']: 'fc.bias' has device meta, but its parameter has cpu",
    ),
    "a state slot that is a number": (
        lambda: step(state=slots(exp_avg=0.0)),
        TypeError,
        "state.slots['exp_avg']: 'fc.bias' must be a tensor, got float",
    ),
    "a hyperparameter that is a number": (
        lambda: step(state=hyperparam(lr=0.5)),
        TypeError,
        "state: 'lr' must be a 0-d tensor, got 0.5; gcfunc.update_hyperparams makes one",
    ),
    "a hyperparameter per entry": (
        lambda: step(state=hyperparam(lr=torch.ones(6))),
        TypeError,
        "state: 'lr' must be a 0-d tensor, got tensor([1., 1., 1., 1., 1., 1.])",
    ),
    "a step that is a number": (
        lambda: step(state=State(3, *STATE[1:])),  # type: ignore[arg-type]
        TypeError,
        "state: 'step' must be a 0-d tensor, got 3",
    ),
    **{
        f"a state that is a {type(other).__name__}": (
            partial(step, state=other),
            TypeError,
            f"state must come from init or step, got {type(other).__name__}",
        )
        for other in NO_STATES
    },
    # Hyperparameters beyond their bounds, which have a table of their own below
    "nesterov without momentum": (
        lambda: gcfunc.sgd(0.1, nesterov=True),
        ValueError,
        "nesterov needs momentum > 0 and dampening = 0, got momentum=0.0 and dampening=0.0",
    ),
    "nesterov with dampening": (
        lambda: gcfunc.sgdw(0.1, 0.9, 0.1, nesterov=True),
        ValueError,
        "nesterov needs momentum > 0 and dampening = 0, got momentum=0.9 and dampening=0.1",
    ),
    "one beta": (
        lambda: gcfunc.adam(betas=0.9),  # type: ignore[arg-type]
        TypeError,
        "betas must be a pair of numbers, got 0.9",
    ),
    "three betas": (
        lambda: gcfunc.ranger(betas=(0.9, 0.9, 0.9)),  # type: ignore[arg-type]
        TypeError,
        "betas must be a pair of numbers, got (0.9, 0.9, 0.9)",
    ),
    "no betas": (
        lambda: gcfunc.radam(betas=None),  # type: ignore[arg-type]
        TypeError,
        "betas must be a pair of numbers, got None",
    ),
    "an unknown hyperparameter": (
        lambda: gcfunc.update_hyperparams(STATE, momentum=0.9),
        ValueError,
        "the state has no hyperparameter 'momentum', it has lr, weight_decay, eps, beta1, beta2",
    ),
    "an unknown group": (
        lambda: gcfunc.update_hyperparams(STATE, **{"head.lr": 0.1}),
        ValueError,
        "the state has no hyperparameter 'head.lr', it has lr, ",
    ),
    "one good and one bad hyperparameter": (
        lambda: gcfunc.update_hyperparams(STATE, lr=0.2, eps=-1.0),
        ValueError,
        "eps must be a finite number >= 0, got -1.0",
    ),
    "hyperparameters of no state": (
        lambda: gcfunc.update_hyperparams(STATE.hyperparams, lr=0.2),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got dict",
    ),
    # GC
    **{
        f"gc={gc!r}": (
            partial(gcfunc.adamw, gc=gc),
            error,
            (
                "gc must be None, 'gc', 'gcc' or a gcfunc.GC, which takes a mask or a predicate as "
                f"GC(where=...); got {gc!r}"
            ),
        )
        for gc, error in NO_GCS
    },
    "an unknown rule": (
        lambda: GC("conv"),
        ValueError,
        "where must be one of 'gc', 'gcc', got 'conv'",
    ),
    "an unknown rule, outside a step": (
        lambda: gcfunc.centralize(GRADS, where="conv"),
        ValueError,
        "where must be one of 'gc', 'gcc', got 'conv'",
    ),
    "an unknown place": (
        lambda: GC(at="weights"),  # type: ignore[arg-type]
        ValueError,
        "at must be 'gradient' or 'update', got 'weights'",
    ),
    "no place": (
        lambda: GC(at=None),  # type: ignore[arg-type]
        ValueError,
        "at must be 'gradient' or 'update', got None",
    ),
    "nothing to centralize": (
        lambda: gcfunc.sgd(0.1, gc="gc").init({"fc.bias": PARAMS["fc.bias"]}),
        ValueError,
        "where='gc' selects none of 1 tensors (fc.bias (5,)); nothing would be centralized",
    ),
    "no convolutions": (
        lambda: gcfunc.sgd(0.1, gc="gcc").init(dict(MODEL.named_parameters())),
        ValueError,
        "where='gcc' selects none of 4 tensors (0.weight (2, 3), 0.bias (2,), 1.weight (2,), ",
    ),
    "nothing to centralize in a group": (
        lambda: gcfunc.partition(
            {"w": PLAIN, "b": gcfunc.sgd(0.1, gc="gc")},
            lambda name, tensor: "w" if tensor.ndim >= 2 else "b",
        ).init(PARAMS),
        ValueError,
        "where='gc' selects none of 1 tensors (fc.bias (5,))",
    ),
    "a label of another kind": (
        lambda: gcfunc.partition(
            {"a": gcfunc.sgd(0.1)},
            lambda name, tensor: ["a"],  # type: ignore[return-value]
        ).init(PARAMS),
        ValueError,
        "labels: 3 leaves have a label without an optimizer, 'conv.weight' has ['a']",
    ),
    "a checkpoint with a number for a name": (
        lambda: gcfunc.load_state_dict(
            STATE,
            {**gcfunc.state_dict(STATE), 1: torch.ones(1)},  # type: ignore[dict-item]
        ),
        ValueError,
        "the checkpoint does not match the state; unexpected 1",
    ),
    "a predicate that takes nothing": (
        where(lambda name, tensor: False),
        ValueError,
        "where=<function> selects none of 3 tensors (conv.weight (4, 3, 2, 2), fc.weight (5, 6), ",
    ),
    "a predicate that takes vectors only": (
        where(lambda name, tensor: "bias" in name),
        ValueError,
        "where=<function> selects none of 3 tensors",
    ),
    "a predicate that returns a number": (
        where(lambda name, tensor: tensor.ndim - 1),
        TypeError,
        "where: 'conv.weight' must map to a bool or Units, got 3",
    ),
    "a predicate that forgets to return": (
        where(lambda name, tensor: None),
        TypeError,
        "where: 'conv.weight' must map to a bool or Units, got None",
    ),
    "a mask that lacks a leaf": (
        where({"conv.weight": True, "fc.weight": True}),
        ValueError,
        "where does not match params; missing 'fc.bias'",
    ),
    "a mask of other names": (
        where({"weight": True}),
        ValueError,
        f"where does not match params; missing {SORTED}; unexpected 'weight'",
    ),
    "a mask of names": (
        where(["conv.weight", "fc.weight"]),
        ValueError,
        f"where does not match params; missing {SORTED}; unexpected '0', '1'",
    ),
    "a mask that is one bool": (
        where(True),
        TypeError,
        f"where must have the structure of params (leaves {LEAVES}), got a bare bool",
    ),
    "a mask that is None": (
        where(None),
        TypeError,
        f"where must have the structure of params (leaves {LEAVES}), got a bare NoneType",
    ),
    "a mask of tensors": (
        where(mask(**{"fc.weight": torch.tensor(True)})),
        TypeError,
        "where: 'fc.weight' must map to a bool or Units, got tensor(True)",
    ),
    "a mask of integers": (
        where(mask(**{"fc.weight": 1})),
        TypeError,
        "where: 'fc.weight' must map to a bool or Units, got 1",
    ),
    "a mask that takes nothing": (
        where(mask(**{"conv.weight": False})),
        ValueError,
        "where=<dict> selects none of 3 tensors (conv.weight (4, 3, 2, 2), ",
    ),
    "a mask of another model, in step": (
        lambda: step(gcfunc.adamw(0.1, gc=GC(where=gcfunc.select(MODEL)))),
        ValueError,
        f"where does not match params; missing {SORTED}; unexpected '0.bias', '0.weight'",
    ),
    **{
        f"{units} do not fit": (
            where(by_units(units)),
            ValueError,
            f"where: {units} does not fit 'conv.weight' of shape (4, 3, 2, 2)",
        )
        for units in (Units(dim=4), Units(dim=-1), Units(groups=3), Units(groups=0))
    },
    "centralize nothing": (
        lambda: gcfunc.centralize([]),
        ValueError,
        "tree holds no tensors",
    ),
    "centralize integers": (
        lambda: gcfunc.centralize({"a": torch.ones(2, 2, dtype=torch.int64)}),
        TypeError,
        f"tree: 'a' has dtype torch.int64; {FLOATS}",
    ),
    "centralize a missing gradient": (
        lambda: gcfunc.centralize(one_else("fc.bias", None)),
        TypeError,
        "tree: 'fc.bias' must be a tensor, got NoneType",
    ),
    # Partition and lookahead
    "an unknown label": (
        partition(lambda name, tensor: name[0]),
        ValueError,
        "labels: 3 leaves have a label without an optimizer, 'conv.weight' has 'c'; there are 'a'",
    ),
    "an unused label": (
        partition(lambda name, tensor: "a"),
        ValueError,
        "labels: no leaf has the label 'b'",
    ),
    "labels of another structure": (
        partition({"conv.weight": "a", "fc.weight": "b"}),
        ValueError,
        "labels does not match params; missing 'fc.bias'",
    ),
    "no labels": (
        partition(None),
        TypeError,
        f"labels must have the structure of params (leaves {LEAVES}), got a bare NoneType",
    ),
    "no groups": (
        lambda: gcfunc.partition({}, lambda name, tensor: "a"),
        ValueError,
        "optimizers is empty",
    ),
    "a group that is no optimizer": (
        lambda: gcfunc.partition({"a": gcfunc.sgd}, lambda name, tensor: "a"),  # type: ignore[dict-item]
        TypeError,
        "optimizers must map string labels to optimizers, got {'a': <function sgd",
    ),
    "a group of torch.optim": (
        lambda: gcfunc.partition(
            {"a": torch.optim.SGD(MODEL.parameters())},  # type: ignore[dict-item]
            lambda name, tensor: "a",
        ),
        TypeError,
        "optimizers must map string labels to optimizers, got {'a': SGD",
    ),
    "a label that is no string": (
        lambda: gcfunc.partition({0: PLAIN}, lambda name, tensor: 0),  # type: ignore[dict-item]
        TypeError,
        "optimizers must map string labels to optimizers, got {0: ",
    ),
    "groups that are a list": (
        lambda: gcfunc.partition([PLAIN], lambda name, tensor: 0),  # type: ignore[arg-type]
        TypeError,
        "optimizers must map string labels to optimizers, got [",
    ),
    "two groups of one name": (
        lambda: gcfunc.partition(
            {"a.b": PLAIN, "a": gcfunc.partition({"b": PLAIN}, lambda name, tensor: "b")},
            lambda name, tensor: "a",
        ),
        ValueError,
        "optimizers: two groups have one name, among 'a.b'",
    ),
    "lookahead of lookahead": (
        lambda: gcfunc.lookahead(gcfunc.lookahead(PLAIN)),
        ValueError,
        "lookahead(sgd) already is a lookahead",
    ),
    "lookahead of ranger": (
        lambda: gcfunc.lookahead(gcfunc.ranger()),
        ValueError,
        "lookahead(radam) already is a lookahead",
    ),
    "lookahead of a group of lookahead": (
        lambda: gcfunc.lookahead(
            gcfunc.partition({"a": PLAIN, "b": gcfunc.ranger()}, lambda name, tensor: "a")
        ),
        ValueError,
        "lookahead(radam) already is a lookahead",
    ),
    "lookahead of torch.optim": (
        lambda: gcfunc.lookahead(torch.optim.SGD(MODEL.parameters())),  # type: ignore[arg-type]
        TypeError,
        "inner must be an optimizer such as gcfunc.sgd(0.1), got SGD",
    ),
    "lookahead of a constructor": (
        lambda: gcfunc.lookahead(gcfunc.sgd),  # type: ignore[arg-type]
        TypeError,
        "inner must be an optimizer such as gcfunc.sgd(0.1), got <function sgd",
    ),
    # Checkpoints; more in test_checkpoint
    "load into no state": (
        lambda: gcfunc.load_state_dict(checkpoint(), checkpoint()),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got dict",
    ),
    "load no mapping": (
        lambda: gcfunc.load_state_dict(STATE, STATE),  # type: ignore[arg-type]
        TypeError,
        "d must map names to tensors, got State",
    ),
    "load a path": (
        lambda: gcfunc.load_state_dict(STATE, "checkpoint.pt"),  # type: ignore[arg-type]
        TypeError,
        "d must map names to tensors, got str",
    ),
    "load swapped arguments": (
        lambda: gcfunc.load_state_dict(checkpoint(), STATE),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got dict",
    ),
    "load what is not all tensors": (
        lambda: gcfunc.load_state_dict(STATE, checkpoint(step=1)),
        ValueError,
        "the checkpoint does not match the state: 'step' is int, expected torch.int64 ()",
    ),
    "the dict of no state": (
        lambda: gcfunc.state_dict(OPT),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got Optimizer",
    ),
    # Select
    "select from params": (
        lambda: gcfunc.select(dict(MODEL.named_parameters())),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module, got dict",
    ),
    "select from a class": (
        lambda: gcfunc.select(nn.Linear),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module, got type",
    ),
    "select by an unknown rule": (
        lambda: gcfunc.select(MODEL, "conv"),  # type: ignore[arg-type]
        ValueError,
        "where must be one of 'gc', 'gcc', got 'conv'",
    ),
    "select by None": (
        lambda: gcfunc.select(MODEL, None),  # type: ignore[arg-type]
        ValueError,
        "where must be one of 'gc', 'gcc', got None",
    ),
    "select from a lazy model": (
        lambda: gcfunc.select(nn.Sequential(nn.LazyLinear(2))),
        ValueError,
        "'weight' of a LazyLinear has no shape yet; run the model once",
    ),
    "layers that are a list": (
        lambda: gcfunc.select(MODEL, layers=[nn.Linear]),  # type: ignore[arg-type]
        TypeError,
        "layers must map module classes to gcfunc.Units, got [<class",
    ),
    "layers that map to a bool": (
        lambda: gcfunc.select(MODEL, layers={nn.Linear: True}),  # type: ignore[dict-item]
        TypeError,
        "layers must map module classes to gcfunc.Units, got {<class",
    ),
    "layers by name": (
        lambda: gcfunc.select(MODEL, layers={"Linear": Units()}),  # type: ignore[dict-item]
        TypeError,
        "layers must map module classes to gcfunc.Units, got {'Linear': Units(",
    ),
    "layers that do not fit": (
        lambda: gcfunc.select(MODEL, layers={nn.Linear: Units(dim=2)}),
        ValueError,
        "layers: Units(dim=2, groups=1) does not fit a weight of shape (2, 3)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    call, error, message = CASES[name]
    still = unchanged([PARAMS, GRADS, STATE, dict(MODEL.named_parameters())])
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
    assert still()
    step()


# Hyperparameters

NON_NEGATIVE = "a finite number >= 0"
BOUNDS = {
    "lr": NON_NEGATIVE,
    "momentum": NON_NEGATIVE,
    "dampening": "a finite number",
    "weight_decay": NON_NEGATIVE,
    "eps": NON_NEGATIVE,
    "lr_decay": NON_NEGATIVE,
    "initial_accumulator_value": NON_NEGATIVE,
    "beta1": "in [0, 1)",
    "beta2": "in [0, 1)",
    "k": "an integer from 1 to 2**31",
    "alpha": "in [0, 1]",
}
OUTSIDE: dict[str, list[float]] = {
    NON_NEGATIVE: [-1, -1e-300],
    "a finite number": [],
    "in [0, 1)": [-0.1, 1, 1.0, 1.5],
    "in [0, 1]": [-0.1, 1.5],
    "an integer from 1 to 2**31": [0, -1, 2.5, 0.5],
}
NO_NUMBERS = [True, "0.1", None, 1j, [0.1], (0.1,), torch.nn.Identity]
NO_SCALARS = [torch.ones(2), torch.ones(1), torch.tensor(True), torch.tensor(1j)]
CONSTRUCTORS: dict[str, tuple[Callable[..., Optimizer], str]] = {
    "sgd": (gcfunc.sgd, "lr momentum dampening weight_decay"),
    "sgdw": (gcfunc.sgdw, "lr momentum dampening weight_decay"),
    "adam": (gcfunc.adam, "lr weight_decay eps beta1 beta2"),
    "adamw": (gcfunc.adamw, "lr weight_decay eps beta1 beta2"),
    "adagrad": (gcfunc.adagrad, "lr lr_decay weight_decay initial_accumulator_value eps"),
    "radam": (gcfunc.radam, "lr weight_decay eps beta1 beta2"),
    "ranger": (gcfunc.ranger, "lr weight_decay eps beta1 beta2 k alpha"),
    "lookahead": (lambda lr=0.1, **own: gcfunc.lookahead(gcfunc.sgd(lr), **own), "k alpha"),
}
HYPERPARAMETERS = [(c, name) for c, (_, names) in CONSTRUCTORS.items() for name in names.split()]
IN_STATE = [(c, name) for c, name in HYPERPARAMETERS if name != "initial_accumulator_value"]


def build(constructor: str, **given: Any) -> Optimizer:
    given = {"lr": 0.1} | given
    if "beta1" in given or "beta2" in given:
        given["betas"] = given.pop("beta1", 0.9), given.pop("beta2", 0.99)
    return CONSTRUCTORS[constructor][0](**given)


def refused(name: str) -> list[tuple[Any, type[Exception], str]]:
    """Bad values of a hyperparameter, the error and its message."""
    outside = [math.nan, math.inf, -math.inf, *OUTSIDE[BOUNDS[name]]]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in outside]
    bounds = f"{name} must be {BOUNDS[name]}, got "
    scalar = f"{name} must be a real 0-d tensor or a number, got a tensor of shape "
    return [
        *((x, ValueError, f"{bounds}{x}") for x in outside),
        *((x, ValueError, f"{bounds}{float(x)}") for x in tensors),
        *(
            (x, TypeError, f"{name} must be a number or a 0-d tensor, got {x!r}")
            for x in NO_NUMBERS
        ),
        *((x, TypeError, f"{scalar}{tuple(x.shape)} and dtype {x.dtype}") for x in NO_SCALARS),
    ]


@pytest.mark.parametrize(("constructor", "name"), HYPERPARAMETERS)
def test_constructors_refuse_hyperparameters(constructor: str, name: str) -> None:
    for value, error, message in refused(name):
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            build(constructor, **{name: value})
    build(constructor, **{name: 1 if name == "k" else 0.25})


@pytest.mark.parametrize(("constructor", "name"), IN_STATE)
def test_updates_refuse_hyperparameters(constructor: str, name: str) -> None:
    own = {"momentum": 0.5} if constructor in ("sgd", "sgdw") else {}
    state = build(constructor, **own).init(PARAMS)
    still = unchanged(state)
    for value, error, message in refused(name):
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            gcfunc.update_hyperparams(state, **{name: value})
    assert still()
    new = gcfunc.update_hyperparams(state, **{name: 1 if name == "k" else 0.25})
    assert new.hyperparams[name] == (1 if name == "k" else 0.25)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_the_table_of_hyperparameters_is_whole(constructor: str) -> None:
    own = {"momentum": 0.5} if constructor in ("sgd", "sgdw") else {}
    in_state = {*build(constructor, **own).init(PARAMS).hyperparams}
    inner = {"lr", "weight_decay"} if constructor == "lookahead" else set()
    assert in_state - inner == {name for c, name in IN_STATE if c == constructor}
