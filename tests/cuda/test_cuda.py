"""What Inductor generates for a GPU, in processes of their own.

Triton's functions are made either to be interpreted or to be compiled, once for a process, and a
device that is not there should not be seen by other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda import fake, interpret

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "switch", "why_not"),
    [("generating.py", "0", fake.why_not()), ("interpreting.py", "1", interpret.why_not())],
)
def test_in_a_process_of_its_own(file: str, switch: str, why_not: str | None) -> None:
    if why_not is not None:
        pytest.skip(why_not)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, interpret.SWITCH: switch},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
