"""What pytest collects where not everything is installed, and what of it is heavy."""

from importlib.util import find_spec

import pytest
import torch

NEEDS = {
    "gcfunc/integrations/mmengine.py": ["mmengine"],
    "gcfunc/recipes": ["matplotlib", "mlxtend", "numpy", "rich", "scipy", "sklearn"],
    "gcfunc/recipes/batches.py": ["torchvision"],
    "gcfunc/recipes/images.py": ["torchvision"],
    "gcfunc/recipes/networks": ["torchvision"],
    "tests/centralization/test_select_models.py": ["transformers"],
    "tests/centralization/test_select_vision.py": ["torchvision"],
    "tests/recipes/test_batches.py": ["torchvision"],
    "tests/recipes/test_images.py": ["torchvision"],
    "tests/recipes/test_networks.py": ["torchvision"],
    "tests/recipes/test_weights.py": ["torchvision"],
}
"""What torch alone cannot import. Doctests are sought everywhere, and importing is how."""

MISSING = {
    path: missing
    for path, modules in NEEDS.items()
    if (missing := [m for m in modules if find_spec(m) is None])
}
collect_ignore = [*MISSING]

HEAVY = {"fresh_compiler": "compiles", "two": "processes", "four": "processes"}
"""The fixtures of tests that take long, and the marker by which `make quick` leaves these out."""


def pytest_report_header() -> list[str]:
    """Which torch is tested, and what is left out."""
    left_out = [f"left out: {path}, for want of {', '.join(m)}" for path, m in MISSING.items()]
    return [f"torch: {torch.__version__}", *left_out]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is heavy by its fixtures, so that no test has to say it twice."""
    for fixture in getattr(item, "fixturenames", ()):
        if fixture in HEAVY:
            item.add_marker(HEAVY[fixture])
