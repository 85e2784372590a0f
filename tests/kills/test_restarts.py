"""One restart by torchrun of each kind; ``restarts.py`` makes many."""

from __future__ import annotations

import random

import pytest
from forks import forking
from restarts import PLACES, faults_of
from scene import Scene

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return Scene(forking(), tmp_path_factory.mktemp("restarts"))


@pytest.mark.parametrize("place", PLACES)
def test_ranks_that_torchrun_starts_again_end_right(place, scene):
    assert [*faults_of(scene, place, place, random.Random(0))] == []
