"""What Inductor generates for a GPU, in processes of their own.

Triton's functions are made either to be interpreted or to be compiled, once for a process, and a
device that is not there should not be seen by other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda.fake import why_not
from benchmarks.cuda.interpret import SWITCH

HERE = Path(__file__).parent


@pytest.mark.skipif(why_not() is not None, reason=f"no fake CUDA device: {why_not()}")
@pytest.mark.parametrize(("file", "interpret"), [("generating.py", "0"), ("interpreting.py", "1")])
def test_in_a_process_of_its_own(file: str, interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, SWITCH: interpret},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
