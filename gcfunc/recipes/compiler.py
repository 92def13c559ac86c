"""Whether torch.compile works here."""

import torch


def why_not() -> str | None:
    """What keeps torch.compile from working on this machine, or ``None`` if it works.

    Found by compiling something trivial: on a CPU that needs a C++ compiler and Python's headers,
    neither of which pip installs.
    """
    try:
        torch.compile(_double, fullgraph=True)(torch.ones(8))
    except Exception as error:  # what a backend raises depends on the platform and on what is amiss
        lines = [line.strip() for line in str(error).splitlines()]
        # "backend='inductor' raised:" comes first where the error is not Inductor's own.
        telling = [line for line in lines if line and not line.endswith("raised:")]
        return telling[0] if telling else type(error).__name__
    return None


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x
