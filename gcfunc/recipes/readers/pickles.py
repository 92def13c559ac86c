"""Pickles that hold lists, text and arrays, and can do nothing."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from gcfunc.recipes.errors import UsageError

# How NumPy makes an array before it is filled. Pickles name it by the module that it was in when
# they were written, which NumPy has moved since.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


def load(raw: bytes, where: Path) -> Any:
    """What was pickled, by Python 2 perhaps.

    Raises:
        UsageError: the pickle is not whole, or calls anything that arrays do not need.
    """
    try:
        return _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    except UsageError as error:
        raise UsageError(f"{where} {error}") from None
    except Exception as error:  # as pickle's documentation says, any can be raised
        raise UsageError(f"{where} is not a whole pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UsageError(
                f"is refused: it calls {module}.{name}, and a pickled dataset has no need to"
            ) from None
