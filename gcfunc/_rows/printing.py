"""A traced formula printed as statements of Triton, one for each operation.

What is computed stands in the formula alone. Here stands how Triton spells each of aten's
operations, and nothing of any algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

TYPES: Mapping[torch.dtype, str] = {
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.int64: "tl.int64",
    torch.bool: "tl.int1",
}


class UnprintableError(Exception):
    """A formula has an operation that is not known here."""


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of what a node gives."""
    return _value(node).dtype


def is_scalar(node: fx.Node) -> bool:
    """Whether a node gives one number, the same for all entries."""
    return _value(node).ndim == 0


def _value(node: fx.Node) -> Tensor:
    """What a node gave while it was traced."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise UnprintableError(f"{node.target} gives several tensors")
    return value


def statements(nodes: Iterable[fx.Node]) -> list[str]:
    """A statement for each operation among the nodes, in their order."""
    return [f"{node.name} = {_expression(node)}" for node in nodes]


def is_mean(node: fx.Node) -> bool:
    """Whether a node gives the means of rows."""
    return _operation(node) == "mean"


def _operation(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _expression(node: fx.Node) -> str:
    name = _operation(node)
    if name not in _SPELLED:
        raise UnprintableError(f"aten.{name}")
    return _SPELLED[name](node)


def _literal(number: float) -> str:
    return repr(number) if abs(number) != float("inf") else f'{"-" * (number < 0)}float("inf")'


def _operand(argument: object, dtype: torch.dtype) -> str:
    """An argument, in the dtype in which an operation computes."""
    if isinstance(argument, fx.Node):
        own = argument.name
        return own if dtype_of(argument) is dtype else f"{own}.to({TYPES[dtype]})"
    if isinstance(argument, bool | int | float):
        return _literal(argument)
    raise UnprintableError(f"an operand of {type(argument).__name__}")


def _operands(node: fx.Node, dtype: torch.dtype) -> list[str]:
    if node.kwargs:
        raise UnprintableError(f"{node.target} with {', '.join(node.kwargs)}")
    return [_operand(argument, dtype) for argument in node.args]


def _in_its_dtype(template: str) -> Callable[[fx.Node], str]:
    return lambda node: template.format(*_operands(node, dtype_of(node)))


def _compared(sign: str) -> Callable[[fx.Node], str]:
    def spelled(node: fx.Node) -> str:
        dtypes = [dtype_of(a) for a in node.args if isinstance(a, fx.Node)]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        x, y = _operands(node, dtype)
        return f"{x} {sign} {y}"

    return spelled


def _in_single(single: str, otherwise: str) -> Callable[[fx.Node], str]:
    """Triton rounds quotients and roots of float32 to the nearest only where it is told so."""
    return lambda node: _in_its_dtype(single if dtype_of(node) is torch.float32 else otherwise)(
        node
    )


def _full(node: fx.Node) -> str:
    value = node.args[-1]
    if not is_scalar(node) or not isinstance(value, bool | int | float):
        raise UnprintableError(str(node.target))
    return f"tl.full((), {_literal(value)}, {TYPES[dtype_of(node)]})"


def _mean(node: fx.Node) -> str:
    x, dims, *keepdim = node.args
    if [*keepdim] != [True] or dims != [1] or not isinstance(x, fx.Node) or is_scalar(x):
        raise UnprintableError(f"a mean over {dims}")
    return f"row_mean({x.name}, mask, count, centralized)"


def _where(node: fx.Node) -> str:
    condition, x, y = node.args
    dtype = dtype_of(node)
    own = _operand(condition, torch.bool), _operand(x, dtype), _operand(y, dtype)
    return "tl.where({}, {}, {})".format(*own)


_LARGER = "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)"
_SPELLED: Mapping[str, Callable[[fx.Node], str]] = {
    "add": _in_its_dtype("{} + {}"),
    "sub": _in_its_dtype("{} - {}"),
    "rsub": _in_its_dtype("{1} - {0}"),
    "mul": _in_its_dtype("{} * {}"),
    "div": _in_single("tl.div_rn({}, {})", "{} / {}"),
    "reciprocal": _in_single("tl.div_rn(1.0, {})", "1.0 / {}"),
    "remainder": _in_its_dtype("{} % {}"),  # of counts, which are not negative
    "pow": _in_its_dtype("tl.exp({1} * tl.log({0}))"),  # of what is not negative
    "sqrt": _in_single("tl.sqrt_rn({})", "tl.sqrt({})"),
    "rsqrt": _in_single("tl.div_rn(1.0, tl.sqrt_rn({}))", "1.0 / tl.sqrt({})"),
    "maximum": _in_its_dtype(_LARGER),
    "clamp_min": _in_its_dtype(_LARGER),
    "sign": lambda node: "({0} > 0).to({1}) - ({0} < 0).to({1})".format(
        *_operands(node, dtype_of(node)), TYPES[dtype_of(node)]
    ),
    "eq": _compared("=="),
    "gt": _compared(">"),
    "where": _where,
    "full": _full,
    "scalar_tensor": _full,
    "mean": _mean,
    "_to_copy": lambda node: _operand(node.args[0], dtype_of(node)),
    "detach": lambda node: _operand(node.args[0], dtype_of(node)),
}
