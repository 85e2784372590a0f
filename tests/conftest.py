"""Shared settings of the test suite."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import pools


def pytest_configure(config: pytest.Config) -> None:
    """Set up a process that runs tests; one that only hands them out begins to without loading torch."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)
    settings.register_profile("patient", deadline=None)  # machines are noisy: time decides no test
    settings.load_profile("patient")


@pytest.fixture(scope="session")
def ranks():
    """World size -> a pool of that many real ranks, kept for the session."""
    with pools() as pool_of:
        yield pool_of


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed: reports without figures, which take seconds, for tests of all else."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here, and begin with what takes longest."""
    import torch

    long = {item.path for item in items if item.get_closest_marker("long")}
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: ("ranks" not in item.fixturenames, item.path not in long))


def pytest_collection_finish() -> None:
    """What was imported for thousands of tests stays to the end: looking at it for garbage took a tenth of the time."""
    importlib.import_module("frozen")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file share a worker and its fixtures; all tests on ranks share another, and the pools."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return "ranks" if test.partition("[")[0] in tests_on_ranks(config.rootpath / file) else file

    return ByFile(config, log) if config.option.dist == "loadgroup" else None


@functools.cache
def tests_on_ranks(file: Path) -> frozenset[str]:
    """Names of the tests that ask for the fixture; who hands out tests has not collected them."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return frozenset(f.name for f in functions if "ranks" in [argument.arg for argument in f.args.args])
