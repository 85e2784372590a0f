"""Commands in processes of their own: what they say is kept, no wait is without end, and none outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

PATIENCE_S = 500  # for what comes in the end: a machine may be at work on much else
TIMEOUT_S = 300  # of ranks that wait for others; tests of that timeout alone set another
SETTINGS = {"OMP_NUM_THREADS": "1", "QKOV_TIMEOUT_S": str(TIMEOUT_S)}
SET_BY_MPI = ("PMI", "MPI", "OMPI", "SLURM")


def torchrun(num_ranks: int) -> list[str]:
    """What starts so many ranks on a port of their own: tests run beside each other."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher]


class Started:
    """A command that was started, in a process group of its own.

    Both streams are files: a reader of a pipe waits for every process that holds it, orphans too.
    """

    def __init__(self, command: Sequence[object], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        plain = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_MPI)}
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**plain, "PYTHONPATH": path, **SETTINGS, **environment},
            )

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
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        self.process.wait()
        self._folder.cleanup()


@contextlib.contextmanager
def started(*command: object, **environment: str) -> Iterator[Started]:
    """Start a command, with these variables beside those of the tests; its group is gone after the block."""
    running = Started(command, environment)
    try:
        yield running
    finally:
        running.close()


def ran(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    with started(*command, **environment) as running:
        return running.ended()
