"""Ranks that speak: one process, torch.distributed and MPI alike; and what the others learn when one fails."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from forks import forking
from processes import ran, wait_shortly
from ranks import free_port, without_launcher
from torch.distributed import distributed_c10d

from qkov_dist.distributed import connect as comm
from qkov_dist.distributed.connect import connected, connected_by_mpi, current
from qkov_dist.distributed.failure_notes import Notes
from qkov_dist.distributed.failures import LOOK_S
from qkov_dist.distributed.shared_errors import SharedError, same_on_all, together
from qkov_dist.distributed.world import Alone, TorchWorld, World
from qkov_dist.errors import QkovError

MPIRUN = Path(sys.prefix) / "bin" / "mpirun"


# What every kind of world can do


def length(sender: int, receiver: int) -> int:
    """Bytes that one rank sends another: uneven, and none at all between some."""
    return (3 * sender + receiver) % 4


def conversation(world: World) -> dict:
    """One of every call, as JSON; all ranks take part."""
    frozen = np.arange(3.0)
    frozen.flags.writeable = False
    grid = np.arange(6, dtype=np.float32).reshape(2, 3) + world.rank
    parts = [torch.full((length(world.rank, r),), 10 * world.rank + r, dtype=torch.uint8) for r in range(world.size)]
    sums = {
        "float32": world.all_reduce(grid),
        "transposed": world.all_reduce(grid.T),
        "float64": world.all_reduce(np.array([1e-12, 1.0]) * (world.rank + 1)),
        "int64": world.all_reduce(np.array([2**40 + world.rank])),
        "empty": world.all_reduce(np.zeros((0, 3), np.float32)),
        "scalar": world.all_reduce(np.array(1.5)),
        "frozen": world.all_reduce(frozen),
    }
    return {
        "place": [world.rank, world.size],
        "gathered": world.all_gather({"rank": world.rank, "text": "é" * world.rank, "least": float("inf")}),
        "nothing": world.all_gather(None),
        "sums": {name: [total.dtype.name, total.tolist()] for name, total in sums.items()},
        "grid": grid.tolist(),
        "exchanged": [part.tolist() for part in world.all_to_all(parts)],
        "passed on": passed_on(world),
        "silence": [part.tolist() for part in world.all_to_all([torch.empty(0, dtype=torch.uint8)] * world.size)],
    }


def passed_on(world: World) -> list:
    """Tensors of several types and shapes, of some none at all: two for each rank, which say who sent them to whom."""

    def pair(sender: int, receiver: int) -> list[torch.Tensor]:
        rows = torch.full((length(sender, receiver), 3), 10.0 * sender + receiver, dtype=torch.bfloat16)
        return [rows, torch.tensor([[sender], [receiver]])]

    ranks = range(world.size)
    received = [[torch.zeros_like(part) for part in pair(other, world.rank)] for other in ranks]
    world.send_recv([pair(world.rank, other) for other in ranks], received)
    expected = [pair(other, world.rank) for other in ranks]
    return [[torch.equal(a, b) for a, b in zip(*both, strict=True)] for both in zip(received, expected, strict=True)]


def check_conversation(by_rank: list[dict]) -> None:
    size = len(by_rank)
    ones = np.arange(6, dtype=np.float32).reshape(2, 3)
    added = sum(range(size))
    for rank, said in enumerate(by_rank):
        assert said["place"] == [rank, size]
        assert said["gathered"] == [{"rank": r, "text": "é" * r, "least": float("inf")} for r in range(size)]
        assert said["nothing"] == [None] * size
        assert said["passed on"] == [[True, True]] * size
        assert said["grid"] == (ones + rank).tolist()  # a sum leaves its argument as it was
        assert said["sums"] == {
            "float32": ["float32", (ones * size + added).tolist()],
            "transposed": ["float32", (ones.T * size + added).tolist()],
            "float64": ["float64", (np.array([1e-12, 1.0]) * (added + size)).tolist()],
            "int64": ["int64", [2**40 * size + added]],
            "empty": ["float32", []],
            "scalar": ["float64", 1.5 * size],
            "frozen": ["float64", (np.arange(3.0) * size).tolist()],
        }
        assert said["exchanged"] == [[10 * r + rank] * length(r, rank) for r in range(size)]
        assert said["silence"] == [[]] * size


def disagreement(world: World) -> list[str]:
    """What every rank is told where the last one differs, where one fails, and where all fail alike."""
    is_last = world.rank == world.size - 1

    def fails_on(who: bool):
        if who:
            raise QkovError("file", expected="a", got="b", remedy="c.")
        return world.rank

    told = []
    for step in (
        lambda: same_on_all(world, "configuration", {"seed": 7 if is_last else 0, "same": 1}),
        lambda: together(world, lambda: fails_on(is_last)),
        lambda: together(world, lambda: fails_on(True)),
    ):
        try:
            step()
            told.append("nothing")
        except SharedError as error:
            told.append(str(error))
    try:
        together(world, lambda: 1 // 0 if is_last else None)
    except SharedError as error:
        told.append(str(error))
    except ZeroDivisionError:
        assert is_last
        told.append("its own mistake")
    assert together(world, lambda: fails_on(False)) == world.rank
    same_on_all(world, "configuration", {"same": [1, None]})
    return told


def check_disagreement(by_rank: list[list[str]]) -> None:
    last = len(by_rank) - 1
    mistakes = [told.pop() for told in by_rank]
    assert by_rank == [
        [
            f"rank {last}: configuration: seed: expected what rank 0 has, 0, got 7. "
            "Start all ranks with the same command, configuration and files.",
            f"rank {last}: file: expected a, got b. c.",
            "file: expected a, got b. c.",
        ]
    ] * len(by_rank)
    *others, own = mistakes
    assert own == "its own mistake"
    assert all(text.startswith(f"rank {last}: expected to finish, got an error (ZeroDiv") for text in others)


def test_one_process_is_a_world():
    check_conversation([conversation(Alone())])
    with connected() as world:
        assert isinstance(world, Alone)
        assert isinstance(current(), Alone)
    with connected_by_mpi() as world:
        assert isinstance(world, Alone)
    same_on_all(Alone(), "anything", {"key": 1})
    with pytest.raises(QkovError, match="x: expected"):
        together(Alone(), lambda: _refuse("x"))


def _refuse(where: str):
    raise QkovError(where, expected="a", got="b", remedy="c.")


# torch.distributed


@pytest.mark.parametrize(
    ("described", "host", "gpu"),
    [
        ("cpu:gloo,cuda:gloo", True, False),  # no back end named, without NCCL: gloo's way is over the host
        ("cpu:gloo,cuda:nccl", True, True),
        ("cuda:nccl", False, True),
        ("cpu:gloo", True, False),
        ("cpu:mpi,xpu:xccl", True, False),
    ],
)
def test_where_a_group_has_its_tensors_follows_from_how_torch_describes_it(described, host, gpu, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: described)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    world = TorchWorld.of()
    assert world.device == (torch.device("cpu") if host else torch.device("cuda", 1))
    assert (world.carries("cpu"), world.carries("cuda")) == (host, gpu)
    assert world.over(torch.device("cuda", 1)).device == torch.device("cuda", 1)


def over_torch(name: str):
    """A case on this rank of a pool; a warning of torch's own is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return globals()[name](current())


def in_groups(world: World) -> list:
    """Sums and exchanges within groups of uneven size, then a group that leaves this rank out."""
    members = [list(range(world.size - 1)), [world.size - 1]]
    group = world.subgroup(members)
    mine = members[world.rank == world.size - 1]
    parts = [torch.tensor([world.rank, other], dtype=torch.uint8) for other in mine]
    said = [
        group.rank,
        group.size,
        group.all_reduce(np.array([1.0 + world.rank])).tolist(),
        group.all_gather(world.rank),
    ]
    said.append([part.tolist() for part in group.all_to_all(parts)])
    try:
        world.subgroup([[0]])
    except ValueError as error:
        said.append(str(error))
    return said


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_of_torch_speak(ranks, world_size):
    check_conversation(ranks(world_size).run(over_torch, "conversation"))
    check_disagreement(ranks(world_size).run(over_torch, "disagreement"))


@pytest.mark.long
def test_groups_are_worlds_of_their_own(ranks):
    first, second, third = ranks(3).run(over_torch, "in_groups")
    assert first == [0, 2, [3.0], [0, 1], [[0, 0], [1, 0]]]
    assert second[:-1] == [1, 2, [3.0], [0, 1], [[0, 1], [1, 1]]]
    assert third[:-1] == [0, 1, [3.0], [2], [[2, 2]]]
    assert second[-1] == "rank 1 is in none of the groups [[0]]"


# MPI


def over_mpi(folder: str, *names: str) -> None:
    """Cases on this rank of mpirun; leaves what each returns in a file."""
    with connected_by_mpi() as world:
        for name in names:
            said = globals()[name](world)
            (Path(folder) / f"{name}-{world.rank}.json").write_text(json.dumps(said))


def fails_alone(world: World) -> None:
    """The last rank fails where no other looks: they wait for it."""
    if world.rank == world.size - 1:
        raise ZeroDivisionError("a mistake")
    world.all_gather(None)


def called(code: str) -> str:
    """Python that calls a function of this file in a process of its own."""
    return f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_world; test_world.{code}"


def mpirun(size: int, code: str, **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("mpi4py")
    if not MPIRUN.exists():
        pytest.skip("no mpirun beside mpi4py")
    return ran(MPIRUN, "-n", size, sys.executable, "-c", called(code), **environment)


@pytest.mark.long
def test_ranks_of_mpi_speak(tmp_path):
    done = mpirun(3, f"over_mpi({str(tmp_path)!r}, 'conversation', 'disagreement')")
    assert done.returncode == 0, done.stderr
    for name, check in (("conversation", check_conversation), ("disagreement", check_disagreement)):
        check([json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(3)])


@pytest.mark.long
def test_a_rank_of_mpi_that_fails_alone_ends_all(tmp_path):
    done = mpirun(3, f"over_mpi({str(tmp_path)!r}, 'fails_alone')")
    assert done.returncode != 0
    assert "qkov: rank 2: ZeroDivisionError('a mistake')" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_mpi_that_does_not_see_the_ranks_is_refused(monkeypatch):
    """As under torchrun, or where mpirun and mpi4py are of different MPIs: each rank would be alone."""
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=_CommOfOne())))
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(QkovError, match="MPI: expected 2 ranks"), connected_by_mpi():
        pass
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(QkovError, match="expected mpi4py"), connected_by_mpi():
        pass


class _CommOfOne:
    def Get_size(self) -> int:  # noqa: N802
        return 1


# Failures


def failing(how: str, who: int) -> None:
    """One rank fails in some way; the others go on to a call that needs it."""
    wait_shortly()
    try:
        with connected() as world:
            world.all_gather("hello")
            if world.rank == who:
                _fail(how)
            if how in ("hangs", "killed, one far away"):  # all have met, however long it took: now a wait is short
                distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
            if how == "far away" and world.rank == 1:  # as DeepSpeed does while it tries a compiler
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            if how == "far away" or (how == "killed, one far away" and world.rank == 2):
                time.sleep(1000)
            world.all_reduce(np.ones(3))
    except BaseException as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
        sys.exit(2)


def _fail(how: str) -> None:
    if how in ("error", "far away"):
        raise QkovError("model", expected="a", got="b", remedy="c.")
    if how == "mistake":
        raise RuntimeError("CUDA out of memory")
    if how.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(1000)


def step_that_fails(how: str) -> None:
    """As in a user's own script, without `qkov`: rank 1 fails within a step or before it, the others wait in one."""
    wait_shortly()
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with comm.step() as world:
        world.all_gather("hello")
    if rank == 1 and how == "before":
        raise KeyError("in own code")
    try:
        with comm.step() as world:
            if rank == 1:
                raise ZeroDivisionError("in a pass")
            world.all_gather("hello")
    except QkovError as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
    except ZeroDivisionError:
        time.sleep(1000)  # the user's code caught it, and does something else
    sys.exit(2)


WAITING = {
    "a rank hangs": (failing, "hangs", 1),
    "ranks are far away": (failing, "far away", 2),
    "one is far away, one killed": (failing, "killed, one far away", 1),
    "an error before a step": (step_that_fails, "before"),
    "an error within a step": (step_that_fails, "within"),
}


@pytest.fixture(scope="module")
def waited():
    """What comes of failures after which ranks wait for seconds, by name: they wait beside each other."""
    forking()
    with ThreadPoolExecutor(len(WAITING)) as threads:
        ends = {name: (0, 2) if "within" in name else (0, 1, 2) for name in WAITING}
        begun = {name: threads.submit(without_launcher, 3, *case, ends=ends[name]) for name, case in WAITING.items()}
        yield lambda name: begun[name].result()


def told(process: subprocess.CompletedProcess) -> str:
    """The error that a rank raised."""
    (line,) = process.stdout.splitlines()
    kind, text = json.loads(line)
    assert kind == "QkovError", (kind, text)
    return text


@pytest.mark.long
@pytest.mark.parametrize("who", [0, 1])  # rank 0 holds the store in which notes are left
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", "expected to finish, got an error (model: expected a, got b. c.)"),
        ("mistake", "expected to finish, got an error (RuntimeError: CUDA out of memory)"),
        ("killed", "expected an answer, got none (seen by rank {seen}: "),
    ],
)
def test_the_others_are_told_which_rank_failed_and_why(how, who, message):
    done = without_launcher(3, failing, how, who)
    for rank, process in enumerate(done):
        if rank == who:
            assert process.returncode == (-signal.SIGKILL if how == "killed" else 2)
        else:
            assert process.returncode == 2, process.stderr
            assert told(process).startswith(f"rank {who}: " + message.format(seen=rank)), process.stdout
    if how == "error":
        assert told(done[who]) == "model: expected a, got b. c."


def leave_in_the_middle_of_a_look() -> None:
    trouble = Notes.trouble

    def slowly(notes: Notes) -> bool:
        time.sleep(1.0)
        return trouble(notes)

    with mock.patch.object(Notes, "trouble", slowly), connected():
        time.sleep(2 * LOOK_S)
    print([thread.name for thread in threading.enumerate()])


def test_no_thread_is_in_a_call_of_the_store_where_python_ends():
    """It would abort the process, whatever its exit code is."""
    for process in without_launcher(2, leave_in_the_middle_of_a_look):
        assert "qkov-failures" not in process.stdout.splitlines()[-1], process.stderr


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_ended(waited):
    done = waited("a rank hangs")
    said = [told(done[rank]) for rank in (0, 2)]
    for rank, text in zip((0, 2), said, strict=True):
        assert text.startswith(f"rank 1: expected an answer, got none (seen by rank {rank}: ")
        assert "QKOV_TIMEOUT_S" in text
    assert any("Timed out" in text for text in said)  # the second may see that the first has left
    assert done[1].returncode == 2
    assert "qkov: rank 1: expected to answer in time, got other ranks that gave up waiting" in done[1].stderr


@pytest.mark.long
def test_ranks_far_from_their_next_call_are_ended_too(waited):
    """They never make a call that could break: the thread that looks for notes ends them, and says why.

    Rank 1 is in a library's code that has put stderr elsewhere.
    """
    done = waited("ranks are far away")
    for rank in (0, 1):
        assert done[rank].returncode == 2
        assert "qkov: rank 2: expected to finish, got an error (model: expected a, got b. c.)" in done[rank].stderr


@pytest.mark.long
def test_a_rank_far_from_its_next_call_learns_which_one_died(waited):
    """Rank 0, which holds the store, finds out and leaves; that it is gone must not look as if it had died."""
    done = waited("one is far away, one killed")
    assert told(done[0]).startswith("rank 1: expected an answer, got none (seen by rank 0: ")
    assert done[2].returncode == 2
    assert "qkov: rank 1: expected an answer, got none (seen by rank 2: " in done[2].stderr


@pytest.mark.long
def test_ranks_that_do_not_meet_are_told_where_they_looked(monkeypatch, capfd):
    port = str(free_port())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("QKOV_TIMEOUT_S", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    where = rf"rank 1: expected 2 ranks to meet .*MASTER_PORT={port}, GLOO_SOCKET_IFNAME="
    with pytest.raises(QkovError, match=rf"{where}lo\).*GLOO_SOCKET_IFNAME left out .*this one has .*lo"), connected():
        pass
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with pytest.raises(QkovError, match=rf"{where}None\).*GLOO_SOCKET_IFNAME set where nodes"), connected():
        pass
    capfd.readouterr()  # torch's own trace


@pytest.mark.long
def test_an_error_between_two_calls_is_named_by_the_next_call_of_the_others(waited):
    done = waited("an error before a step")
    for rank in (0, 2):
        assert told(done[rank]).startswith("rank 1: expected to finish, got an error (KeyError: 'in own code')")
    assert "Traceback" in done[1].stderr


@pytest.mark.long
def test_ranks_whose_call_no_longer_comes_to_an_end_are_ended_with_the_reason(waited):
    done = waited("an error within a step")
    for process in done:
        assert process.returncode == 2
        assert "qkov: rank 1: expected to finish, got an error (ZeroDivisionError: in a pass)" in process.stderr


@pytest.mark.parametrize("text", ["", "0", "soon", "1.5", "-3"])
def test_a_timeout_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("QKOV_TIMEOUT_S", text)
    with pytest.raises(QkovError, match="QKOV_TIMEOUT_S: expected a whole number of seconds"):
        comm.timeout_seconds()


def test_every_rank_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert comm._own_gpu() == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(QkovError, match="rank 3: expected a GPU for each rank of a node, got 1 for local rank 3"):
        comm._own_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(QkovError, match="got 1 for local rank 3"):  # of the two one is not there
        comm._own_gpu()
    for name, text in (("SLURM_LOCALID", "3"), *((name, "3") for name in comm.VISIBLE)):
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with monkeypatch.context() as patch:
            patch.setenv(name, text)  # it sees its own alone: srun --gpus-per-task=1, or a script of the user's
            assert comm._own_gpu() == 0
            assert os.environ["LOCAL_RANK"] == "0"


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    """Each sees one alone, and has to ask whose it is."""
    store, seen = torch.distributed.HashStore(), {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=seen["uuid"]))
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    for rank, uuid in enumerate(("first", "second", "first")):
        seen["uuid"] = uuid
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        if rank < 2:
            comm._refuse_shared_gpu()
            continue
        with pytest.raises(QkovError, match="rank 2: expected a GPU for each rank of a node, got that of rank 0 for"):
            comm._refuse_shared_gpu()
