"""Where a rank is in its run, and where in it the rank dies.

A rank notes each *phase* that it enters and leaves, and each *step* inside one: before and after a call of a function
or of the system, and in the middle of a write. What workers do is a step of scoring, whatever their process does
meanwhile. The note is on the system's side at once, so that it outlives the rank.
A rank with an *aim* sends itself a signal at one step of one phase, before it goes any further.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES: dict[str, tuple[str, ...]] = {
    "preparing": ("qkov_dist.job:prepare",),
    "carrying over": (
        "qkov_dist.results.resume:carry_over",
        "qkov_dist.results.resume:take_over",
        "qkov_dist.results.resume:forget",
    ),
    "taking up": ("qkov_dist.results.partials:PartialWriter.__enter__",),
    "capture": ("qkov_dist.capture.collect:Collection.run_tasks",),
    "scoring": ("qkov_dist.scoring.engine:score_rounds",),
    "writing a layer": ("qkov_dist.results.partials:PartialWriter.write_layer",),
    "bringing together": ("qkov_dist.results.partials:PartialWriter.__exit__",),
    "adding up": ("qkov_dist.finish:combine",),
    "statistics": (
        "qkov_dist.stats.head_tests:layer_tests",
        "qkov_dist.stats.pair_tests:PairTests.of_all_ranks",
        "qkov_dist.stats.statistics:QKOVStatistics.results",
    ),
    "final write": ("qkov_dist.results.heatmap:Heatmap.save",),
    "report": ("qkov_dist.report.write:write_page",),
}
BETWEEN = "between phases"
ENCLOSING = "adding up"  # the one phase that another may lie in; elsewhere the outer one counts
STEPS = (
    "qkov_dist.capture.hooks:Capture.run",
    "qkov_dist.capture.row_buffer:RowBuffer.spill",
    "qkov_dist.scoring.kernel:add_tile",
    "qkov_dist.distributed.world:TorchWorld.all_to_all",
    "qkov_dist.distributed.world:TorchWorld.send_recv",
    "qkov_dist.distributed.world:TorchWorld.all_reduce",
)
CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate")
SCORING = "qkov_dist.scoring.engine:score_layers"
SCORED = "scoring"  # the phase of which all that workers do is a step
STOPPABLE = "qkov_dist.distributed.preemption:stoppable"


@dataclass(frozen=True)
class Aim:
    """A moment seen from inside: the n-th step (from 1) of a phase, and the signal that the rank sends itself there.

    Attributes:
        in_write: Whether steps in writes are counted, or all others; writes are many, and hide what lies beside them.
    """

    phase: str
    step: int
    in_write: bool = False
    signal: int = signal.SIGKILL


@dataclass
class Seen:
    """What a rank noted.

    Attributes:
        phase: The one it was in at last.
        steps: Steps of each phase outside writes.
        writes: Steps of each phase in writes.
        scored: The layers that it began to score.
        stoppable: Whether it was where SIGTERM is a request.
        told: Whether it sent itself a signal, and was where SIGTERM is a request then; None where it sent none.
    """

    phase: str = BETWEEN
    steps: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    scored: list[int] = field(default_factory=list)
    stoppable: bool = False
    told: bool | None = None


def read_notes(path: Path) -> Seen:
    """What a rank noted until now; nothing where it did not come so far."""
    seen, running = Seen(), [BETWEEN]
    for line in path.read_text().splitlines() if path.exists() else ():
        kind, rest = line[0], line[1:]
        if kind == "+":
            running.append(rest)
        elif kind == "-":
            running.pop()
        elif kind == ".":
            seen.steps[running[-1]] += 1
        elif kind == "~":
            seen.steps[SCORED] += 1
        elif kind == ",":
            seen.writes[running[-1]] += 1
        elif kind == "*":
            seen.scored.append(int(rest))
        elif kind == "!":
            seen.told = seen.stoppable
        else:
            seen.stoppable = kind == "("
    seen.phase = running[-1]
    return seen


def take_notes(path: Path, aim: Aim | None) -> None:
    """Have this process note what it does from now on, and die where its aim says.

    Raises:
        AttributeError: for a function that the package no longer has.
    """
    notes = _Notes(path, aim)
    for phase, places in PHASES.items():
        for place in places:
            _replace(place, lambda function, phase=phase: _phase(notes, phase, function))
    _replace(SCORING, lambda function: _naming_layers(notes, function))
    _replace(STOPPABLE, lambda function: _marking(notes, function))
    for place in STEPS:
        _replace(place, lambda function: _stepping(notes, function))
    for name in CALLS:
        setattr(os, name, _stepping(notes, getattr(os, name)))
    os.pwrite = _in_two(notes, os.pwrite)


class _Notes:
    """One rank's notes."""

    def __init__(self, path: Path, aim: Aim | None) -> None:
        self._aim, self.running, self._done = aim, [BETWEEN], 0
        self._one_at_a_time = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())

    def step(self, *, in_write: bool = False) -> None:
        """Note a step; die if it is the one."""
        by_worker = threading.current_thread() is not threading.main_thread()
        phase = SCORED if by_worker else self.running[-1]
        with self._one_at_a_time:
            self.write("~" if by_worker else "," if in_write else ".")
            if self._aim is None or (phase, in_write) != (self._aim.phase, self._aim.in_write):
                return
            self._done += 1
            if self._done == self._aim.step:
                self.write("!")
                os.kill(os.getpid(), self._aim.signal)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.running[-1] not in (BETWEEN, ENCLOSING):
            yield
            return
        self.running.append(name)
        self.write(f"+{name}")
        try:
            self.step()
            yield
            self.step()
        finally:
            self.running.pop()
            self.write("-")


def _phase(notes: _Notes, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in a phase; of a generator, what it does for each of its items."""

    def each(*args: Any, **kwargs: Any) -> Iterator[Any]:
        end = object()
        with closing(function(*args, **kwargs)) as items:
            while True:
                with notes.phase(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item

    def noted(*args: Any, **kwargs: Any) -> Any:
        with notes.phase(name):
            return function(*args, **kwargs)

    return each if inspect.isgeneratorfunction(function) else noted


def _stepping(notes: _Notes, function: Callable[..., Any]) -> Callable[..., Any]:
    def stepped(*args: Any, **kwargs: Any) -> Any:
        notes.step()
        result = function(*args, **kwargs)
        notes.step()
        return result

    return stepped


def _in_two(notes: _Notes, pwrite: Callable[[int, Any, int], int]) -> Callable[[int, Any, int], int]:
    """A write as two, so that a step comes between them."""

    def written(descriptor: int, data: Any, offset: int) -> int:
        half = len(data) // 2
        notes.step(in_write=True)
        done = pwrite(descriptor, data[:half], offset) if half else 0
        notes.step(in_write=True)
        return done if done < half else done + pwrite(descriptor, data[half:], offset + half)

    return written


def _naming_layers(notes: _Notes, function: Callable[..., Any]) -> Callable[..., Any]:
    def begun(layers: Iterable[Any]) -> Iterator[Any]:
        for layer in layers:
            if layer is not None:
                notes.write(f"*{layer[0].layer}")
            yield layer

    return lambda layers, *args: function(begun(layers), *args)


def _marking(notes: _Notes, stoppable: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def marked(world: Any) -> Iterator[Any]:
        with stoppable(world) as may_stop:
            notes.write("(")
            try:
                yield may_stop
            finally:
                notes.write(")")

    return marked


def _replace(place: str, made_of: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function, ``module:name`` or ``module:Class.name``, under every name in the package that means it."""
    module_name, _, qualified = place.partition(":")
    module = importlib.import_module(module_name)
    owner_name, _, name = qualified.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    function = getattr(owner, name)
    new = made_of(function)
    setattr(owner, name, new)
    if owner is module:
        for other in [m for key, m in sys.modules.items() if key.startswith("qkov_dist.")]:
            for alias in [key for key, value in vars(other).items() if value is function]:
                setattr(other, alias, new)
