"""One restart by torchrun; ``restarts.py`` makes many, of ranks killed in capture, in scoring and in merging."""

from __future__ import annotations

import random

import pytest
from forks import forking
from restarts import faults_of
from scene import Scene


@pytest.mark.long
def test_ranks_that_torchrun_starts_again_end_right(tmp_path):
    assert [*faults_of(Scene(forking(), tmp_path), "scoring", "scoring", random.Random(0))] == []
