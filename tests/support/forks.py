"""Processes that import nothing: forked from one that has imported everything and has no thread but its first.

One such server serves a whole session: pools of ranks, commands, the harness of kills, readers under fuzzing.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

PRELOADED = (
    *("pytest", "hypothesis", "jobs", "running", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("qkov_dist.cli", "qkov_dist.run", "qkov_dist.report.write", "transformers.models.llama.modeling_llama"),
    "transformers.models.mixtral.modeling_mixtral",
    *("deepspeed", "transformers.integrations.deepspeed"),
    "frozen",  # last: no fork looks at all this for garbage, or copies it for that
)


@functools.cache
def forking() -> Any:
    """The context whose processes are forked; the one that they are forked from is started here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    alone["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow, which pandas loads where it is there
    with mock.patch.dict(os.environ, alone):  # libraries that start threads there would leave locks to every fork
        first = context.Process(target=int)
        first.start()
        first.join()
    return context


def assert_alone() -> None:
    """This process has one thread: no other one held a lock when it was forked."""
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.exists() else 1
    assert threads == 1, f"forked from a process of {threads} threads: locks may be held for ever"


class Fork:
    """A function in a process of its own, with what is used here of ``subprocess.Popen``.

    It ends as a script would that calls the function: with its exit code, and hooks of uncaught errors are called.
    """

    def __init__(
        self, function: Callable[..., object], arguments: Sequence[object], environment: dict[str, str], *said: Path
    ) -> None:
        self.args = [function.__name__, *map(str, arguments)]
        self._process = forking().Process(target=_perform, args=(function, arguments, environment, *said), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _perform(
    function: Callable[..., object], arguments: Sequence[object], environment: dict[str, str], out: Path, err: Path
) -> None:
    os.setsid()
    write_to(out, err)
    assert_alone()
    os.environ.clear()
    os.environ.update(environment)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def write_to(out: Path, err: Path) -> None:
    """Let this process write what it says into files."""
    for path, stream in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, stream)
        os.close(descriptor)
