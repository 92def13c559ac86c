"""Where the tests of this folder run: on the GPU, or in rehearsal on the CPU."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from gcfunc._rows import fit

REHEARSE, INTERPRET, SECONDS = "--rehearse", "--interpret", "--seconds"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gcfunc")
    group.addoption(REHEARSE, action="store_true", help="run on the CPU what needs a GPU")
    group.addoption(
        INTERPRET,
        action="store_true",
        help=f"with {REHEARSE}, go through the kernels for GPUs, in Triton's interpreter",
    )
    group.addoption(SECONDS, type=float, help="leave tests out that would begin later than this")


def option(config: pytest.Config, name: str) -> object:
    """Nothing where the whole suite is collected: it was told no options of this folder."""
    return config.getoption(name.removeprefix("--"), None)


BEGAN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    if option(request.config, REHEARSE):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip(f"needs a GPU; {REHEARSE} runs it on the CPU")
    return "cuda"


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest) -> None:
    seconds = option(request.config, SECONDS)
    if seconds is not None:
        assert isinstance(seconds, float)
        # A failure: what was left out has not been shown.
        late = time.monotonic() - request.config.stash[BEGAN] > seconds
        assert not late, f"left out, as it would begin after {seconds:g} s"


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether kernels for GPUs run in Triton's interpreter."""
    asked = bool(option(request.config, INTERPRET))
    if asked:
        assert os.environ.get("TRITON_INTERPRET") == "1", "set it before triton is imported"
        monkeypatch.setattr(fit, "DEVICES", ("cpu",))
    return asked


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Nothing compiled yet, and no TensorFloat32, which is good for three digits."""
    torch.compiler.reset()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.compiler.reset()
