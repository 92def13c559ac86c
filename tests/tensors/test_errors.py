"""Bad trees and bad tensors: a clear error, and nothing changed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bad_input import (
    FLOATS,
    GRADS,
    LEAVES,
    MODEL,
    PARAMS,
    PLAIN,
    SORTED,
    STATE,
    Case,
    one_else,
    require_refused,
    step,
)

TREE = "params is a pytree of tensors, for example dict(model.named_parameters())"


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


def exhausted() -> object:
    parameters = MODEL.parameters()
    assert [*parameters]
    return parameters


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
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    require_refused(CASES[name])
