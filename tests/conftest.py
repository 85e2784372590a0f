"""Shared settings of the test suite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from ranks import pools

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # machines are noisy: time decides no test
settings.load_profile("patient")


@pytest.fixture(scope="module")
def ranks():
    """World size -> a pool of that many real ranks, kept for the module."""
    with pools() as pool_of:
        yield pool_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
