"""Processes that import nothing: forked from one that has imported everything and has no thread but its first.

One such server serves a whole session: pools of ranks, commands, the harness of kills, readers under fuzzing.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

PRELOADED = (
    *("pytest", "hypothesis", "jobs", "running", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("qkov_dist.cli", "qkov_dist.run", "qkov_dist.report.write", "transformers.models.llama.modeling_llama"),
    *("deepspeed", "transformers.integrations.deepspeed"),
)


@functools.cache
def forking() -> Any:
    """The context whose processes are forked; the one that they are forked from is started here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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


def write_to(out: Path, err: Path) -> None:
    """Let this process write what it says into files."""
    for path, stream in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, stream)
        os.close(descriptor)
