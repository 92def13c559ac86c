"""What stands in the source of a Triton kernel that Inductor wrote."""

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, cast

BLOCK = re.compile(r"[XYZR]\d*_?BLOCK(_\d+)?$")
"""The names of parameters that say how much one program does; the autotuner chooses them."""

_ON_GPU = "triton_helpers.set_driver_to_gpu()"


@dataclass(frozen=True)
class Kernel:
    """A kernel, read and not run.

    Attributes:
        name: Of its function.
        function: Its syntax tree.
        signature: Triton's type of each parameter, such as ``"*fp32"`` for a pointer.
        meta: Inductor's notes, its grid among them.
        source: All of it, but for the line that looks for a GPU.
        plain: The same without Inductor's decorator, which tunes and launches it.
    """

    name: str
    function: ast.FunctionDef
    signature: dict[str, str]
    meta: dict[str, Any]
    source: str
    plain: str

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters."""
        return [argument.arg for argument in self.function.args.args]


@cache
def parsed(source: str) -> Kernel:
    """A kernel from its source."""
    tree = ast.parse(source)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    heuristics, jit = function.decorator_list
    said = {k.arg: k.value for k in cast(ast.Call, heuristics).keywords}
    triton_meta = cast(ast.Dict, said["triton_meta"])
    (signature,) = (
        value
        for key, value in zip(triton_meta.keys, triton_meta.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "signature"
    )
    lines = source.splitlines()
    lines[heuristics.lineno - 1 : jit.lineno - 1] = []
    return Kernel(
        function.name,
        function,
        ast.literal_eval(signature),
        ast.literal_eval(said["inductor_meta"]),
        source.replace(_ON_GPU, ""),
        "\n".join(lines).replace(_ON_GPU, "") + "\n",
    )


_numbers = count()


def imported(source: str, folder: Path) -> ModuleType:
    """A module with this source, in a file, which Triton reads."""
    path = folder / f"kernel_{next(_numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot import {path}")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
