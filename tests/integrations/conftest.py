"""Fixtures of the frameworks' tests."""

import pytest
from frameworks import started_world


@pytest.fixture(scope="module")
def ranks():
    """Two ranks, for all tests of a framework."""
    with started_world(2) as world:
        yield world
