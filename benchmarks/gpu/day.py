"""``make gpu``: first the tests of ``tests/gpu``, then the figures, within minutes.

Nothing is installed: what this Python lacks is named, and what can go on without it does.

    python -m benchmarks.gpu.day
    python -m benchmarks.gpu.day --rehearse
"""

# Of the standard library alone until it is known what there is.
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS, FOR_TESTS = 490.0, 0.5
"""For all, and the share of it that tests may take; figures get what is left."""
LATE = 30.0
"""Seconds after its time until a command is stopped."""
WORKERS = 4
OLDEST = (2, 11)
"""Of torch."""


def main() -> None:
    """Test, measure, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in any time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all")
    parser.add_argument("--only", metavar="EXPRESSION", help="of the tests, as pytest's -k")
    args = parser.parse_args()
    began = time.monotonic()
    if (reason := refusal(rehearse=args.rehearse)) is not None:
        sys.exit(f"make gpu: {reason}")
    lacks = missing()
    for name, consequence in lacks.items():
        print(f"{name} is missing: {consequence}", flush=True)
    rehearse = ["--rehearse"] if args.rehearse else []
    failed = []
    with installed() as environment:
        if "pytest" in lacks:
            failed.append("tests: left out")
        else:
            seconds = FOR_TESTS * args.seconds
            only = ["-k", args.only] if args.only else []
            command = [*tests(seconds), *only, *rehearse]
            # Each of the processes compiles in several more.
            threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
            own = {**environment, "TORCHINDUCTOR_COMPILE_THREADS": threads}
            failed += run("tests", command, seconds, own)
        seconds = args.seconds - (time.monotonic() - began)
        command = ["-m", "benchmarks.gpu", f"--seconds={seconds:.0f}", *rehearse]
        failed += run("figures", command, seconds, environment)
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)
    if failed:
        sys.exit("\n".join(failed))


def refusal(*, rehearse: bool) -> str | None:
    """Why there is nothing to be done here, if so."""
    here = f"Python {sys.version.split()[0]} ({sys.executable})"
    if sys.version_info < (3, 11):  # noqa: UP036 - it was named by hand
        return f"{here} is older than 3.11; name another: make gpu PYTHON=python3.12"
    if find_spec("torch") is None:
        return f"{here} has no torch; name one that has: make gpu PYTHON=python3.12"
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        return f"torch {torch.__version__} of {here} is older than {'.'.join(map(str, OLDEST))}"
    if rehearse or torch.cuda.is_available():
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"no GPU: torch {torch.__version__} of {here}, {built}, finds none. "
        "make gpu OPTIONS=--rehearse rehearses it on the CPU"
    )


def missing() -> dict[str, str]:
    """What may be missing, and what that means."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    header = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    found = {
        "pytest": (find_spec("pytest"), "the tests are left out"),
        "triton": (find_spec("triton"), "nothing can be compiled for a GPU"),
        "a C compiler": (compiler, "Triton may not be able to launch what it compiled"),
        "Python.h": (header, "Triton may not be able to launch what it compiled"),
        "optimi": (find_spec("optimi"), "it is left out of the figures (torch-optimi on PyPI)"),
    }
    return {name: consequence for name, (there, consequence) in found.items() if not there}


def tests(seconds: float) -> list[str]:
    """The command of tests, in several processes where that is installed and helps."""
    spread = find_spec("xdist") is not None and (os.cpu_count() or 1) >= 2 * WORKERS
    workers = [f"-n{WORKERS}"] if spread else []
    ini = ["-c", "tests/gpu/pytest.ini", "tests/gpu"]
    return ["-m", "pytest", "-q", *ini, f"--seconds={seconds:.0f}", *workers]


@contextmanager
def installed() -> Iterator[Mapping[str, str]]:
    """An environment in which gcfunc finds its version, as if it had been installed."""
    # The profiler would report each of its starts.
    environment = {**os.environ, "KINETO_LOG_LEVEL": "99"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            version("gcfunc")
        except PackageNotFoundError:
            about = Path(folder) / "gcfunc-0.dist-info" / "METADATA"
            about.parent.mkdir()
            about.write_text("Metadata-Version: 2.1\nName: gcfunc\nVersion: 0\n")
            paths = [folder, os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        yield environment


def run(
    name: str, arguments: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> list[str]:
    """Run Python with arguments; how it failed, if it did."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, timeout=seconds + LATE
        )
    except subprocess.TimeoutExpired:
        return [f"{name}: stopped after {seconds + LATE:.0f} s"]
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return [f"{name}: failed"] if done.returncode else []


if __name__ == "__main__":
    main()
