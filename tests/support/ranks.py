"""Real ranks for tests: processes with gloo that stay alive from case to case, with timeouts and the child's traceback.

A pool of n processes is forked with all imports done and joins one process group. A case is a function of this module's
callers, by name, with arguments that can be pickled; every rank runs it, and what each returns comes back by rank.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from forks import assert_alone, forking
from processes import PATIENCE_S, TIMEOUT_S, forked

MOST_THREADS = 40
MOST_KEPT = 4  # ranks of a pool that waits for its next case: each has threads that wake a hundred times a second


class RankError(AssertionError):
    """A case that failed, with the tracebacks of the ranks that failed."""


def free_port() -> int:
    """A port below those that systems hand out to who asks for any: one of these could take it before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    assert_alone()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    os.environ["QKOV_TIMEOUT_S"] = str(TIMEOUT_S)
    import torch

    from qkov_dist.distributed.connect import connected

    torch.set_num_threads(1)
    with connected():
        while (case := pipe.recv()) is not None:
            folder, module, function, arguments = case
            if folder not in sys.path:
                sys.path.insert(0, folder)
            try:
                pipe.send(("done", getattr(importlib.import_module(module), function)(*arguments)))
            except BaseException as error:
                pipe.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
                os._exit(1)  # the others may wait in a collective: the pool is of no more use


class RankPool:
    """``world_size`` processes that run one case after another."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Any, *arguments: Any, timeout: float = PATIENCE_S) -> list[Any]:
        """Run a module-level function on every rank; returns what each returned, by rank.

        Raises:
            RankError: with the tracebacks of the ranks that failed, or where one died or took too long.
        """
        if self._is_crowded():
            self.close()
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            folder = str(Path(sys.modules[function.__module__].__file__).parent)
            pipe.send((folder, function.__module__, function.__name__, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            left = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(left, timeout)
            if not ready:
                self._fail(f"ranks {[r for r in range(self.world_size) if r not in results]} took over {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    state, value = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died with exit code {self._processes[rank].exitcode}")
                if state == "failed":
                    self._fail(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._processes, self._pipes = [], []

    def _is_crowded(self) -> bool:
        """Whether libraries have left more threads than it takes to fork anew: each group of ranks keeps some."""
        tasks = [Path(f"/proc/{process.pid}/task") for process in self._processes]
        return any(len(list(folder.iterdir())) > MOST_THREADS for folder in tasks if folder.exists())

    def _start(self) -> None:
        context, port = forking(), free_port()
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def _fail(self, message: str) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()  # until then it may hold the lock of a folder
        self._processes, self._pipes = [], []
        raise RankError(message)


def without_launcher(
    num_ranks: int, function: Any, *arguments: object, ends: Sequence[int] | None = None, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Call a function on ranks that nobody watches over, so that they depend on themselves; waits for some to end."""
    names = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        running = []
        for rank in range(num_ranks):
            own = {**names, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
            running.append(stack.enter_context(forked(function, *arguments, **own)))
        return [running[rank].ended() for rank in (range(num_ranks) if ends is None else ends)]


@contextlib.contextmanager
def pools() -> Iterator[Any]:
    """Pools by world size, made when first asked for."""
    made: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        for size, pool in made.items():
            if size not in (world_size, *range(MOST_KEPT + 1)):
                pool.close()
        return made.setdefault(world_size, RankPool(world_size))

    try:
        yield pool_of
    finally:
        for pool in made.values():
            pool.close()
