"""Shared settings of the test suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from ranks import pools

TESTS = Path(__file__).parent

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # machines are noisy: time decides no test
settings.load_profile("patient")


@pytest.fixture(scope="session")
def ranks():
    """World size -> a pool of that many real ranks, kept for the session."""
    with pools() as pool_of:
        yield pool_of


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here; say which tests share a worker, and begin with what takes longest.

    Tests of one file share its fixtures, and all tests on ranks share the pools (``--dist loadgroup``).
    """
    long = {item.path for item in items if item.get_closest_marker("long")}
    for item in items:
        on_ranks = "ranks" in item.fixturenames
        item.add_marker(pytest.mark.xdist_group("ranks" if on_ranks else str(item.path.relative_to(TESTS))))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: ("ranks" not in item.fixturenames, item.path not in long))
