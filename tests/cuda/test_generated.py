"""What Inductor and gcfunc's own kernels are for a GPU, generated, compiled and counted."""

import pytest

from benchmarks.cuda import fake
from tests.cuda.processes import HERE, require_passes


@pytest.mark.parametrize("file", ["generating.py", "counting.py"])
def test_what_is_generated(file: str) -> None:
    require_passes("0", fake.why_not(), str(HERE / file))
