"""Commands in processes of their own: what they say is kept, no wait is without end, and none outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from forks import Fork
from places import SUPPORT

PATIENCE_S = 500  # for what comes in the end: a machine may be at work on much else
TIMEOUT_S = 300  # of ranks that wait for others; tests of that timeout alone set another
GRACE_S, LINGER_S = 2.0, 4.0  # of qkov_dist.distributed.failures, shorter than a user's: one machine answers at once
SETTINGS = {"OMP_NUM_THREADS": "1", "QKOV_TIMEOUT_S": str(TIMEOUT_S)}
SET_BY_MPI = ("PMI", "MPI", "OMPI", "SLURM")


def wait_shortly() -> None:
    """Have this process wait as long as one machine takes, where another of its job has failed."""
    from qkov_dist.distributed import failures

    failures.GRACE_S, failures.LINGER_S = GRACE_S, LINGER_S


def torchrun(num_ranks: int) -> list[str]:
    """What starts so many ranks on a port of their own: tests run beside each other."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher]


class Started:
    """A command that was started, in a process group of its own.

    Both streams are files: a reader of a pipe waits for every process that holds it, orphans too.
    """

    def __init__(self, start: Callable[[dict[str, str], Path, Path], Any], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        plain = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_MPI)}
        path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = start({**plain, "PYTHONPATH": path, **SETTINGS, **environment}, self._out, self._err)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """What was written on stderr so far."""
        return self._err.read_text(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal to the process that was started, not to its children."""
        self.process.send_signal(number)

    def wait_until(self, came: Callable[[], bool], pause_s: float = 0.005) -> None:
        """Wait for something that the command does; it must not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not came():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said[-4000:]}"
            assert time.monotonic() < deadline, f"nothing came of it: {self.said[-4000:]}"
            time.sleep(pause_s)

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end by itself; returns its exit code and all it said."""
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end: {self.said[-4000:]}") from None
        return subprocess.CompletedProcess(self.process.args, code, self._out.read_text(errors="replace"), self.said)

    def close(self) -> None:
        """Kill what is left of it, and the workers that launchers put in groups of their own."""
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        self.process.wait()
        self._folder.cleanup()


@contextlib.contextmanager
def started(*command: object, **environment: str) -> Iterator[Started]:
    """Start a command, with these variables beside those of the tests; its group is gone after the block."""
    words = [str(word) for word in command]

    def start(variables: dict[str, str], out: Path, err: Path) -> subprocess.Popen[bytes]:
        with out.open("ab") as said, err.open("ab") as complained:
            return subprocess.Popen(words, stdout=said, stderr=complained, start_new_session=True, env=variables)

    with contextlib.closing(Started(start, environment)) as running:
        yield running


@contextlib.contextmanager
def forked(function: Callable[..., object], *arguments: object, **environment: str) -> Iterator[Started]:
    """Call a function of a module in a process that need not import anything, else like a command."""

    def start(variables: dict[str, str], out: Path, err: Path) -> Fork:
        return Fork(function, arguments, variables, out, err)

    with contextlib.closing(Started(start, environment)) as running:
        yield running


def ran(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    with started(*command, **environment) as running:
        return running.ended()
