"""What Triton's interpreter gives, and that it would see what is wrong."""

import pytest

from benchmarks.cuda import interpret
from tests.cuda.processes import HERE, require_passes


@pytest.mark.parametrize("file", ["interpreting.py", "breaking.py", "failing.py"])
def test_what_is_interpreted(file: str) -> None:
    require_passes("1", interpret.why_not(), str(HERE / file))
