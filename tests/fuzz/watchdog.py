"""Runs a reader on an input in a process of its own, under limits, and says what came of it.

An outcome is ``ok``, ``refused`` (one clear QkovError), ``unclear`` (a QkovError that is no single readable line),
``error`` (anything else that was raised, a MemoryError too), ``crash`` (the interpreter died), or ``hang``. The last
four are failures. The process may take ``HEADROOM`` bytes of address space more than it had before the input, and
``CPU_SECONDS`` of processor time: a busy machine makes no hang. ``WALL_SECONDS`` is for what waits without computing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import os
import re
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forks import forking

FAILURES = ("unclear", "error", "crash", "hang")
KINDS = ("ok", "refused", *FAILURES)
HEADROOM = 1 << 30
CPU_SECONDS, WALL_SECONDS = 30, 300
LONGEST_MESSAGE = 1500

Files = Mapping[str, bytes]  # name in the input's folder -> content


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one input: a kind, what was said or raised, and for a failure what it has in common with others."""

    kind: str
    detail: str = ""
    place: str = ""


class Watchdog:
    """A worker process and the folder where it finds its input; a context manager. A worker that dies is replaced.

    Args:
        module: Has ``READERS``, by name.
        cpu_seconds: Processor time of one input.
        wall_seconds: Time to wait for its outcome.
    """

    def __init__(
        self, module: str = "fuzz_readers", *, cpu_seconds: int = CPU_SECONDS, wall_seconds: int = WALL_SECONDS
    ) -> None:
        self._module, self._cpu_seconds, self._wall_seconds = module, cpu_seconds, wall_seconds
        self._root = Path(tempfile.mkdtemp(prefix="qkov-fuzz-"))
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._end()
        shutil.rmtree(self._root)

    def run(self, reader: str, files: Files) -> Outcome:
        """Give the files to a reader and wait for the outcome."""
        if not self._process:
            self._start()
        self._pipe.send((reader, dict(files)))
        if not any(
            self._pipe.poll(1) for _ in range(self._wall_seconds)
        ):  # slices: a machine that is paused makes no hang
            self._end()
            return Outcome("hang", f"nothing after {self._wall_seconds} s", "waiting")
        with contextlib.suppress(EOFError):
            return Outcome(*self._pipe.recv())
        return self._death()

    def _start(self) -> None:
        self._pipe, theirs = forking().Pipe()
        arguments = (theirs, str(self._root), self._module, self._cpu_seconds)
        self._process = forking().Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def _death(self) -> Outcome:
        self._process.join(self._wall_seconds)
        code = self._process.exitcode
        self._end()
        stack = (self._root / "stack").read_text(errors="replace")
        if code == -signal.SIGPROF:
            return Outcome("hang", f"more than {self._cpu_seconds} s of processor time\n{stack}", "computing")
        frames = re.findall(r'File ".*?(\w+\.py)", line (\d+)', stack)
        place = ":".join(frames[0]) if frames else "no Python frame"
        return Outcome("crash", f"exit code {code}\n{stack}", f"exit code {code} at {place}")

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(1)  # it ends by itself, unless it is at work
        self._process.kill()
        self._process.join()
        self._process = None


def place_files(folder: Path, files: Files) -> None:
    """Write an input into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _serve(pipe: Connection, root: str, module: str, cpu_seconds: int) -> None:
    """The worker: takes inputs until its parent is gone."""
    readers = importlib.import_module(module).READERS
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # as the command line does
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    stack = (Path(root) / "stack").open("w")
    faulthandler.enable(stack, all_threads=False)
    faulthandler.register(signal.SIGPROF, stack, all_threads=False, chain=True)
    folder = Path(root) / "input"
    with contextlib.suppress(EOFError):
        while True:
            reader, files = pipe.recv()
            shutil.rmtree(folder, ignore_errors=True)
            place_files(folder, files)
            with _limits(cpu_seconds):
                found = _attempt(readers[reader], folder)
            pipe.send(found)


@contextlib.contextmanager
def _limits(cpu_seconds: int) -> Iterator[None]:
    """Bound the address space, from what it is now, and the processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _attempt(read: Any, folder: Path) -> tuple[str, str, str]:
    """Kind, detail and place of what a reader makes of a folder."""
    from qkov_dist.errors import QkovError

    try:
        read(folder)
    except QkovError as error:
        text = str(error)
        is_clear = text.isprintable() and len(text) <= LONGEST_MESSAGE
        return ("refused", text, "") if is_clear else ("unclear", repr(text[:5000]), _place(error))
    except BaseException as error:
        return "error", "".join(traceback.format_exception(error))[-10_000:], _place(error)
    return "ok", "", ""


def _place(error: BaseException) -> str:
    """The type of an error and the last line of the package that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "qkov_dist" in Path(frame.filename).parts] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
