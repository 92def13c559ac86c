"""What pytest collects where not everything is installed, and what of it is heavy."""

from importlib.util import find_spec

import pytest

NEEDS = {
    "gcfunc/integrations/mmengine.py": ["mmengine"],
    "gcfunc/recipes": ["matplotlib", "mlxtend", "numpy", "rich", "scipy", "sklearn"],
    "tests/centralization/test_select_models.py": ["transformers"],
}
"""What torch alone cannot import. Doctests are sought everywhere, and importing is how."""

collect_ignore = [
    path for path, modules in NEEDS.items() if any(find_spec(m) is None for m in modules)
]

HEAVY = {"fresh_compiler": "compiles", "two": "processes", "four": "processes"}
"""The fixtures of tests that take long, and the marker by which `make quick` leaves these out."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is heavy by its fixtures, so that no test has to say it twice."""
    for fixture in getattr(item, "fixturenames", ()):
        if fixture in HEAVY:
            item.add_marker(HEAVY[fixture])
