"""Where a run's time goes: functions of the package, timed from wherever they are called, each second counted once.

A phase is a set of functions. A function that is called inside another phase stops that phase's clock, so that phases
add up to the whole; what no phase claims is ``rest``. A generator's clock runs from its first item to its end: what is
done with its items meanwhile (layers are written while others are scored) is counted with it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from qkov_dist.planning.measured import Measured

PHASES: dict[str, tuple[str, ...]] = {
    "loading": ("qkov_dist.distributed.parallelism:load_parallel",),
    "preparing": ("qkov_dist.job:prepare",),
    "capture": ("qkov_dist.capture.collect:Collection.run_tasks",),
    "scoring": ("qkov_dist.scoring.engine:score_rounds",),
    "statistics": ("qkov_dist.finish:combine",),
    "writing": ("qkov_dist.results.heatmap:Heatmap.save",),
}
REST = "rest"


class Stopwatch:
    """Wall and processor seconds by phase."""

    def __init__(self) -> None:
        self.wall = dict.fromkeys((*PHASES, REST), 0.0)
        self.cpu = dict.fromkeys((*PHASES, REST), 0.0)
        self._running: list[str] = []
        self._since = (0.0, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as this phase, and not as the one around it."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def _count(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._running:
            self.wall[self._running[-1]] += now[0] - self._since[0]
            self.cpu[self._running[-1]] += now[1] - self._since[1]
        self._since = now


@contextmanager
def timed_phases() -> Iterator[Stopwatch]:
    """Time the package's phases inside the block.

    Raises:
        AttributeError: for a function of ``PHASES`` that the package no longer has.
    """
    watch = Stopwatch()
    with ExitStack() as stack:
        for phase, paths in PHASES.items():
            for path in paths:
                for owner, name, function in _places(path):
                    stack.enter_context(mock.patch.object(owner, name, _timed(function, watch, phase)))
        stack.enter_context(watch.phase(REST))
        yield watch


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes of factors that this rank sends to others inside the block."""
    sent = {"factors": 0}
    see = Measured.see_sent

    def seen(self: Measured, factors: int) -> None:
        sent["factors"] += factors
        see(self, factors)

    with mock.patch.object(Measured, "see_sent", seen):
        yield sent


def _timed(function: Callable[..., Any], watch: Stopwatch, phase: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def each(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with watch.phase(phase):
            yield from function(*args, **kwargs)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with watch.phase(phase):
            return function(*args, **kwargs)

    return each if inspect.isgeneratorfunction(function) else wrapper


def _places(path: str) -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, name, function) of every name in the package that means this function."""
    module_name, _, qualified = path.partition(":")
    module = importlib.import_module(module_name)
    importlib.import_module("qkov_dist.run")
    if "." in qualified:
        owner, _, name = qualified.partition(".")
        return [(getattr(module, owner), name, getattr(getattr(module, owner), name))]
    function = getattr(module, qualified)
    package = [m for key, m in sys.modules.items() if key.startswith("qkov_dist.")]
    return [(m, name, function) for m in package for name, value in vars(m).items() if value is function]
