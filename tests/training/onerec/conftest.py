"""One small world for all tests of the recommender."""

from __future__ import annotations

import pytest
from onerec_world import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()
