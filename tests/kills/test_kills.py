"""The harness of kills in small, so that it cannot rot; and that it sees what is broken."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import attempts
import h5py
import pytest
import torch
from attempts import Clock, Kill, Outcome, play
from forks import forking
from kills import page, play_campaign
from moments import PHASES, Aim, Seen, read_notes
from scene import ALONE, LAYERS, Scene
from stories import Story, Tally
from verdicts import (
    KILLED,
    TOLERANCE,
    Standing,
    ending_faults,
    folder_faults,
    heatmap_faults,
    leftovers,
    of_ranks,
    standing,
    work_faults,
)

from qkov_dist.results import export as labelled
from qkov_dist.results import hdf5_write
from qkov_dist.results.hdf5_read import SCHEMA

pytestmark = pytest.mark.long
PLAYED = (ALONE, "hybrid", "ep", "cp")


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    pytest.importorskip("deepspeed")
    return Scene(forking(), tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def campaign(scene) -> Iterator[Future[dict[str, Tally]]]:
    """A kill with cuts that no other test kills, played beside other tests: who is left waits for seconds."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(play_campaign, scene, 0, PLAYED, len(PLAYED), lambda line: None)


@pytest.fixture(scope="module")
def half(scene, campaign) -> Path:
    """What two fsdp ranks leave of which one was killed after some layers."""
    story = Story(scene, 0, "fsdp", 1000)
    steps = scene.undisturbed("fsdp", 2).seen[1].steps["writing a layer"]
    assert story.attempt("fsdp", 2, Kill(Aim("writing a layer", steps * 2 // 3), (1,)))
    assert len(standing(story.out).whole) > 2
    return story.out


@pytest.fixture(scope="module")
def carry_steps(scene, half) -> int:
    """The steps, outside writes, of carrying that over to one process."""
    story = copied(scene, half, 1001)
    assert not story.attempt(ALONE, 1)
    return read_notes(scene.folder / "notes" / story.name / "1" / "notes0.txt").steps["carrying over"]


def copied(scene: Scene, half: Path, number: int) -> Story:
    story = Story(scene, 0, "fsdp", number)
    shutil.copytree(half, story.out)
    return story


@pytest.mark.parametrize("share", [0.4, 0.85])
def test_a_run_returns_to_its_first_ranks_after_a_kill_on_others(share, scene, half, carry_steps):
    """However far the layers had come on their way to one process, two ranks go on, and count nothing twice."""
    story = copied(scene, half, 1100 + int(100 * share))
    assert story.attempt(ALONE, 1, Kill(Aim("carrying over", int(carry_steps * share)), (0,)))
    assert not story.attempt("fsdp", 2)
    story.judge_end()
    assert story.tally.faults == []


def test_another_cut_of_as_many_ranks_is_another_world(scene):
    """What one ddp rank has finished is no part of the same layer under fsdp."""
    story = Story(scene, 0, "ddp", 2000)
    assert story.attempt("ddp", 2, Kill(Aim("writing a layer", 40), (0, 1)))
    assert not story.attempt("fsdp", 2)
    story.judge_end()
    assert story.tally.faults == []


def die_while_deepspeed_makes_groups() -> None:
    from deepspeed.utils import groups

    os.environ["QKOV_TIMEOUT_S"] = "3"
    if os.environ["RANK"] == "1":
        groups._clone_world_group = lambda: os.kill(os.getpid(), signal.SIGKILL)


def test_nobody_waits_longer_for_a_rank_that_died_while_a_library_made_its_groups(scene, monkeypatch):
    monkeypatch.setattr(attempts, "DEADLINE_S", 60)
    order = replace(scene.order("zero3-5000", "zero3", 2), broken=die_while_deepspeed_makes_groups)
    ended = play(scene.context, order, Kill(Clock(60.0), (1,)))
    assert (ended.codes, ended.hung) == ((2, KILLED), frozenset())
    assert "rank 1: expected an answer" in ended.said[0]


def die_while_weights_are_read() -> None:
    if os.environ["RANK"] == "1":
        torch.distributed.broadcast = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_died_while_weights_were_read_is_named(scene):
    """Others see a broken call inside the loading of the model: the model is not at fault."""
    order = replace(scene.order("zero3-5001", "zero3", 2), broken=die_while_weights_are_read)
    ended = play(scene.context, order, Kill(Clock(60.0), (1,)))
    assert ended.codes == (2, KILLED)
    assert "rank 1: expected an answer" in ended.said[0]


@contextmanager
def in_place(path: Path, run_id: str) -> Iterator[Any]:
    with hdf5_write._Sink(path).synced() as sink, h5py.File(sink, "w", libver=("v110", "v110")) as file:
        file.attrs["run_id"], file.attrs["schema"] = run_id, SCHEMA
        yield hdf5_write.Writer(file, sink)


def write_in_place() -> None:
    labelled.writing = in_place


def test_a_heatmap_that_is_written_in_place_is_seen(scene):
    story = Story(scene, 0, ALONE, 3000)
    assert not story.attempt(ALONE, 1, Kill(Aim("final write", 300, in_write=True), (0,)), broken=write_in_place)
    (fault,) = story.tally.faults
    assert fault.startswith("half a heatmap")


def test_notes_say_where_a_rank_died(scene):
    story = Story(scene, 0, ALONE, 4000)
    assert story.attempt(ALONE, 1, Kill(Aim("writing a layer", 20), (0,)))
    seen = read_notes(scene.folder / "notes" / story.name / "1" / "notes0.txt")
    assert (seen.phase, seen.steps["writing a layer"], seen.told) == ("writing a layer", 20, True)
    in_hand = set(seen.scored[-2:])  # what was being written, or was just now, and what workers had begun meanwhile
    assert seen.scored == sorted(standing(story.out).whole | in_hand)
    assert story.tally.kills == {("writing a layer", "SIGKILL", "the job"): 1}


def test_a_wrong_or_half_heatmap_is_seen(scene, tmp_path):
    path = tmp_path / "heatmap.h5"
    shutil.copy(scene.reference, path)
    assert list(heatmap_faults(path, scene.reference, same_bits=True)) == []
    with h5py.File(path, "r+") as file:
        largest = abs(file["scores/K"][()]).max()
        file["scores/K"][2, 1, 0, 0] += 2 * TOLERANCE * largest
    assert list(heatmap_faults(path, scene.reference, same_bits=True)) == [
        "/scores/K is not bit for bit that of an undisturbed run"
    ]
    (fault,) = heatmap_faults(path, scene.reference, same_bits=False)
    assert fault.startswith(f"K: scores are off by {2 * TOLERANCE:.1e}")
    path.write_bytes(path.read_bytes()[:-100])
    assert all(list(heatmap_faults(path, scene.reference, same_bits=bits)) for bits in (True, False))


def test_lost_layers_and_leftovers_are_seen(scene, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(scene.reference.parent, folder)
    before = standing(folder)
    alone = of_ranks(before, 1, same_cut=True)
    assert (before.whole, alone) == (set(LAYERS), {0: set(LAYERS)})
    assert list(folder_faults(folder, before, 1, alone, partials=True)) == []
    assert list(leftovers(folder, 1, partials=True)) == []
    assert list(leftovers(folder, 1, partials=False)) == ["partial_rank00000.h5 is left over"]
    (folder / ".heatmap.h5.00.tmp").touch()
    (folder / "unfinished_of_2_ranks").mkdir()
    assert list(leftovers(folder, 1, partials=True)) == [".heatmap.h5.00.tmp is left over"]
    (folder / "partial_rank00000.h5").rename(tmp_path / "elsewhere.h5")
    assert len(list(folder_faults(folder, before, 1, alone, partials=True))) == 2
    (folder / "partial_rank00000.h5").write_bytes((tmp_path / "elsewhere.h5").read_bytes()[:-10])
    (fault,) = folder_faults(folder, before, 1, alone, partials=True)
    assert "cannot be read" in fault


def test_layers_finished_by_all_ranks_are_whole():
    found = Standing({(2, 0): frozenset({0, 1}), (2, 1): frozenset({1, 2}), (3, 0): frozenset({4})}, frozenset({5}))
    assert found.whole == {1, 5}
    assert of_ranks(found, 2, same_cut=True) == {0: {0, 1}, 1: {1, 2}}
    assert of_ranks(found, 2, same_cut=False) == {}


def test_work_done_again_is_seen():
    before = Standing({(2, 0): frozenset({0, 1}), (2, 1): frozenset({0})})
    alone = of_ranks(before, 2, same_cut=True)
    assert list(work_faults(outcome((0, 0), scored=([2, 3], [1, 2])), before, alone)) == []
    again = list(work_faults(outcome((0, 0), scored=([1], [0, 2, 2])), before, alone))
    assert again == [
        "rank 0 scored layers [1] again, which were finished",
        "rank 1 scored layers [0] again, which were finished",
        "rank 1 scored layers [2] twice",
    ]


def outcome(codes, said=("", ""), struck=(), hung=(), scored=([], []), told=(None, None)) -> Outcome:
    seen = tuple(Seen(scored=layers, told=asked) for layers, asked in zip(scored, told, strict=True))
    return Outcome(codes, said, seen, frozenset(struck), "scoring", frozenset(hung), 1.0)


ONE = Kill(Clock(0.1), (1,))
TERM = Kill(Aim("scoring", 1, signal=signal.SIGTERM), (1,))
NAMED = ("qkov: rank 0: rank 1: expected an answer", "")
CHAIN = (
    "qkov: rank 0: rank 1, 2: expected",
    "",
    "qkov: rank 2: rank 0: expected an answer, got none (seen by rank 2: ",
)


@pytest.mark.parametrize(
    ("kill", "ended"),
    [
        (None, outcome((0, 0))),
        (ONE, outcome((2, KILLED), NAMED, {1})),
        (ONE, outcome((2, KILLED), ("qkov: rank 0: rank 1, 2: expected an answer", ""), {1})),
        (ONE, outcome((2, KILLED), ("expected 2 ranks to meet", ""), {1})),
        (ONE, outcome((0, 0), struck={1})),
        (TERM, outcome((143, 143), struck={1}, told=(None, True))),
        (TERM, outcome((2, -15), NAMED, {1}, told=(None, False))),
    ],
)
def test_good_endings_are_not_at_fault(kill, ended):
    assert list(ending_faults(ended, kill, has_heatmap=False)) == []


@pytest.mark.parametrize(
    ("kill", "ended", "fault"),
    [
        (None, outcome((0, 2)), "nobody was killed"),
        (None, outcome((0, 1)), "rank 1 ended with 1"),
        (ONE, outcome((2, KILLED, 2), CHAIN, {1}, scored=([],) * 3, told=(None,) * 3), "does not name rank [1]"),
        (ONE, outcome((KILLED, KILLED), struck={1}, hung={0}), "hang of ranks"),
        (ONE, outcome((2, KILLED), ("qkov: rank 0: expected", ""), {1}), "does not name rank"),
        (ONE, outcome((2, KILLED), ("qkov: rank 0: rank 11: expected", ""), {1}), "does not name rank"),
        (
            ONE,
            outcome((2, KILLED, 2), ("", "", CHAIN[2]), {1}, scored=([],) * 3, told=(None,) * 3),
            "does not name rank",
        ),
        (ONE, outcome((0, KILLED), struck={1}), "does not name rank"),
        (ONE, outcome((2, 2), NAMED, {1}), "SIGKILL, but"),
        (TERM, outcome((2, 2), struck={1}, told=(None, True)), "SIGTERM while it may be answered"),
        (TERM, outcome((0, 0), struck={1}, told=(None, True)), "SIGTERM while it may be answered"),
        (TERM, outcome((2, -11), NAMED, {1}, told=(None, False)), "SIGTERM, but"),
    ],
)
def test_bad_endings_are_seen(kill, ended, fault):
    assert fault in " ".join(ending_faults(ended, kill, has_heatmap=False))


def test_killed_runs_end_in_the_right_result(campaign):
    tallies = campaign.result()
    assert [fault for tally in tallies.values() for fault in tally.faults] == []
    assert all(tally.num_kills >= 1 for tally in tallies.values())
    assert all(tally.resumes >= 1 for tally in tallies.values())
    printed = page(tallies)
    assert all(name in printed for name in (*PLAYED, *PHASES))
