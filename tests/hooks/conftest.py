"""What some of the tests of hook mode run under."""

import pytest
import torch


@pytest.fixture
def seeded() -> None:
    """The same random numbers, whichever tests ran before."""
    torch.manual_seed(0)
