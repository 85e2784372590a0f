"""Partial files: round trips, resuming, and processes that are really killed while they write."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from processes import PATIENCE_S

from qkov_dist.errors import QkovError
from qkov_dist.results import hdf5_write
from qkov_dist.results.partial_schema import BlockPartial, PartialHeader, checked_layer
from qkov_dist.results.partials import Partial, PartialWriter, list_partials, partial_path, read_partial
from qkov_dist.scoring.fisher_sums import FISHER_COLUMNS
from qkov_dist.scoring.influence_records import no_influences
from qkov_dist.scoring.own_share_records import no_shares

HEADER = PartialHeader("run-1", 0, 2, 3, 4, (1, 4, 12), extra={"ids": ["é", "b"], "losses": [0.5, float("inf")]})


def make_layer(layer: int, header: PartialHeader = HEADER, heads: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a layer, a function of its number: what was written can be told from what should have been."""
    rng = np.random.default_rng(layer)
    pairs = (header.n_left, header.n_right)
    blocks = {
        block: BlockPartial(
            np.arange(count) * 2 + layer % 2,
            rng.random((count, *pairs)).astype(np.float32),
            rng.random((count, len(FISHER_COLUMNS))),
            rng.random(no_influences(count, header.num_samples).shape),
            rng.random(no_shares(count, header.num_samples).shape),
        )
        for block, count in {"Q": heads, "K": 1, "O": 2}.items()
    }
    return blocks, {"O_bias": rng.random(pairs).astype(np.float32)}


def assert_layer(path: Path, layer: int, header: PartialHeader = HEADER) -> None:
    blocks, shared = make_layer(layer, header)
    found = read_partial(path).read_layer(layer)
    assert found.blocks.keys() == blocks.keys()
    for block, arrays in blocks.items():
        for right, left in zip(arrays, found.blocks[block], strict=True):
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()
    assert found.shared.keys() == shared.keys()
    assert found.shared["O_bias"].tobytes() == shared["O_bias"].tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return partial_path(tmp_path, 0)


def write(path: Path, *layers: int, header: PartialHeader = HEADER, resume: bool = True) -> None:
    with PartialWriter(path, header, resume=resume) as writer:
        for layer in layers:
            writer.write_layer(layer, *make_layer(layer, header))


def stop_after(path: Path, *layers: int) -> None:
    """Write layers and leave by an error, so that they stay beside the partial file."""
    with contextlib.suppress(KeyboardInterrupt), PartialWriter(path, HEADER) as writer:
        for layer in layers:
            writer.write_layer(layer, *make_layer(layer))
        raise KeyboardInterrupt


def test_layers_come_back_bit_for_bit(path: Path) -> None:
    write(path, 4, 1, 12)
    partial = read_partial(path)
    assert partial.header == HEADER
    assert partial.header.extra == HEADER.extra
    assert partial.complete == (1, 4, 12)
    assert partial.missing == ()
    for layer in HEADER.layers:
        assert_layer(path, layer)
    assert list(path.parent.iterdir()) == [path]  # no folder of layers, no unfinished files


def test_file_has_the_names_types_and_checksums_of_the_specification(path: Path) -> None:
    write(path, 4)
    with h5py.File(path) as file:
        assert file.attrs["schema"] == b"qkov-dist/1"
        assert file.attrs["run_id"] == b"run-1"
        assert (file.attrs["rank"], file.attrs["world_size"]) == (0, 2)
        scores = file["partial/Q/layer_0004"]
        assert (scores.dtype, scores.shape, scores.chunks) == (np.float32, (3, 3, 4), (1, 3, 4))
        assert scores.attrs["heads"].tolist() == [0, 2, 4]
        assert file["fisher/Q/layer_0004"].dtype == np.float64
        assert file["fisher/Q/layer_0004"].shape == (3, len(FISHER_COLUMNS))
        influences = file["influences/Q/layer_0004"]
        assert (influences.dtype, influences.shape) == (np.float64, (3, 2, 6 + 7))
        assert file["complete"][...].tolist() == [0, 1, 0]
        assert list(file["partial/Q"]) == ["layer_0004"]
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert all(file[name].fletcher32 for name in names)


def test_float64_on_request_and_float32_otherwise(path: Path) -> None:
    heads, fisher, others = np.array([0]), np.zeros((1, len(FISHER_COLUMNS))), (no_influences(1), no_shares(1))
    with PartialWriter(path, HEADER) as writer:
        writer.write_layer(1, {"Q": BlockPartial(heads, np.full((1, 3, 4), 1 / 3), fisher, *others)})
        half = np.full((1, 3, 4), 0.5, np.float16)
        writer.write_layer(4, {"Q": BlockPartial(heads, half, fisher, *others)})
    partial = read_partial(path)
    assert partial.read_layer(1).blocks["Q"].scores[0, 0, 0] == 1 / 3
    assert partial.read_layer(4).blocks["Q"].scores.dtype == np.float32
    assert partial.read_layer(4).shared == {}
    assert partial.read_layer(4).blocks["Q"].influences.shape == no_influences(1).shape  # none were written


def test_a_rank_that_owns_nothing_of_a_block_or_layer_completes_it_all_the_same(path: Path) -> None:
    others = np.zeros((0, 4)), no_influences(0), no_shares(0)
    nothing = BlockPartial(np.zeros(0, int), np.zeros((0, 3, 4), np.float32), *others)
    with PartialWriter(path, HEADER) as writer:
        writer.write_layer(1, {"V": nothing})
        writer.write_layer(4, {})
    partial = read_partial(path)
    assert partial.complete == (1, 4)
    assert partial.missing == (12,)
    assert partial.read_layer(1).blocks == partial.read_layer(4).blocks == {}


def test_a_layer_is_readable_as_soon_as_it_was_written(path: Path) -> None:
    with PartialWriter(path, HEADER) as writer:
        assert writer.completed == frozenset()
        writer.write_layer(4, *make_layer(4))
        assert writer.completed == {4}
        assert not path.exists()
        assert read_partial(path).complete == (4,)
        assert_layer(path, 4)


@pytest.mark.parametrize("leave", [write, stop_after])
def test_resuming_keeps_what_is_complete(path: Path, leave: Callable[..., None]) -> None:
    leave(path, 1, 12)
    assert path.exists() == (leave is write)
    with PartialWriter(path, dataclasses.replace(HEADER, extra={"new": 1})) as writer:
        assert writer.completed == {1, 12}
        with pytest.raises(QkovError, match="layer 12"):
            writer.write_layer(12, *make_layer(12))
        writer.write_layer(4, *make_layer(4))
    for layer in HEADER.layers:
        assert_layer(path, layer)
    assert read_partial(path).header.extra == {"new": 1}
    assert list(path.parent.iterdir()) == [path]


def test_what_merging_needs_outlives_a_writer_that_does_not_know_it(path: Path) -> None:
    stop_after(path, *HEADER.layers)
    write(path, header=dataclasses.replace(HEADER, extra={}))
    assert read_partial(path).header.extra == HEADER.extra
    with PartialWriter(path.with_name("partial_rank00001.h5"), dataclasses.replace(HEADER, extra={})) as writer:
        writer.header = dataclasses.replace(writer.header, extra={"late": 1})
        writer.write_layer(1, *make_layer(1))
    assert read_partial(writer.path).header.extra == {"late": 1}


def test_without_resume_the_same_run_starts_over(path: Path) -> None:
    write(path, 1)
    stop_after(path, 4)
    with PartialWriter(path, HEADER, resume=False) as writer:
        assert writer.completed == frozenset()
        writer.write_layer(12, *make_layer(12))
    assert read_partial(path).complete == (12,)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("leave", [write, stop_after])
@pytest.mark.parametrize(
    "change",
    [{"run_id": "run-2"}, {"rank": 1}, {"world_size": 3}, {"n_left": 2}, {"layers": (1, 4)}, {"pooled": True}],
    ids=lambda change: next(iter(change)),
)
def test_files_of_another_run_are_refused_and_untouched(
    path: Path, leave: Callable[..., None], change: dict[str, Any], resume: bool
) -> None:
    leave(path, 1)
    before = {file: file.read_bytes() for file in path.parent.rglob("*.h5")}
    with (
        pytest.raises(QkovError, match=next(iter(change))) as raised,
        PartialWriter(path, dataclasses.replace(HEADER, **change), resume=resume),
    ):
        pass
    assert str(path) in str(raised.value)
    assert "Nothing was overwritten" in str(raised.value)
    assert {file: file.read_bytes() for file in path.parent.rglob("*.h5")} == before
    assert path.with_suffix(".layers").exists() == (leave is stop_after)


def test_layers_of_two_runs_in_one_place_are_not_read_as_one(path: Path, tmp_path: Path) -> None:
    stop_after(path, 1)
    other = partial_path(tmp_path / "other", 0)
    write(other, 4, header=dataclasses.replace(HEADER, run_id="run-2"))
    other.rename(path.with_suffix(".layers") / "layer_0004.h5")
    with pytest.raises(QkovError, match="run_id"):
        read_partial(path)


def test_two_writers_at_once_are_refused(path: Path) -> None:
    with PartialWriter(path, HEADER) as writer:
        with pytest.raises(QkovError, match="no other process is writing"), PartialWriter(path, HEADER):
            pass
        writer.write_layer(1, *make_layer(1))
    assert_layer(path, 1)
    write(path, 4)


def test_listing_finds_finished_and_unfinished_ranks(tmp_path: Path) -> None:
    write(partial_path(tmp_path, 1), 1)
    stop_after(partial_path(tmp_path, 0), 1)
    (tmp_path / "partial_rank.h5").touch()
    (tmp_path / "heatmap.h5").touch()
    assert list_partials(tmp_path) == (partial_path(tmp_path, 0), partial_path(tmp_path, 1))
    assert read_partial(list_partials(tmp_path)[0]).complete == (1,)
    with pytest.raises(QkovError, match="absent"):
        list_partials(tmp_path / "absent")


def test_reading_what_is_not_there_says_so(path: Path) -> None:
    with pytest.raises(QkovError, match="a partial file"):
        read_partial(path)
    write(path, 1)
    with pytest.raises(QkovError, match="layer 4 to be complete"):
        read_partial(path).read_layer(4)


def block_of(num_heads: int = 1) -> BlockPartial:
    """What fits the header."""
    sums = np.zeros((num_heads, len(FISHER_COLUMNS)))
    others = no_influences(num_heads, 7), no_shares(num_heads)
    return BlockPartial(np.arange(num_heads), np.zeros((num_heads, 3, 4)), sums, *others)


@pytest.mark.parametrize(
    ("layer", "blocks", "shared", "message"),
    [
        (3, {}, {}, "layer 3"),
        (1, {"X": block_of()}, {}, "block X"),
        (1, {"Q": block_of(2)._replace(heads=np.array([0, 0]))}, {}, "different heads"),
        (1, {"Q": block_of()._replace(scores=np.zeros((1, 4, 3)))}, {}, r"scores \[1, 3, 4\]"),
        (1, {"Q": block_of()._replace(fisher_sums=np.zeros((1, 3)))}, {}, "Fisher sums"),
        (1, {"Q": block_of()._replace(influences=no_influences(1, 6))}, {}, r"influences \[1, 2, 13\]"),
        (1, {}, {"O_bias": np.zeros((4, 3))}, "O_bias"),
        (1, {}, {"../x": np.zeros((3, 4))}, "letters"),
    ],
)
def test_layers_that_do_not_fit_are_refused_and_not_complete(
    path: Path, layer: int, blocks: Any, shared: Any, message: str
) -> None:
    with PartialWriter(path, HEADER) as writer:
        with pytest.raises(QkovError, match=message):
            writer.write_layer(layer, blocks, shared)
        assert writer.completed == frozenset()
    assert read_partial(path).complete == ()


# Damage: named, and never taken for a complete layer.


def flip_a_score(file: Path, layer: int) -> None:
    with h5py.File(file) as opened:
        chunk = opened[f"partial/Q/layer_{layer:04d}"].id.get_chunk_info(0)
    data = bytearray(file.read_bytes())
    data[chunk.byte_offset + 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("leave", [write, stop_after])
def test_a_flipped_byte_is_found_on_reading_and_before_resuming(path: Path, leave: Callable[..., None]) -> None:
    leave(path, 1, 4)
    file = path if leave is write else path.with_suffix(".layers") / "layer_0004.h5"
    flip_a_score(file, 4)
    assert_layer(path, 1)
    with pytest.raises(QkovError, match="checksum") as raised:
        read_partial(path).read_layer(4)
    assert str(file) in str(raised.value)
    with pytest.raises(QkovError, match="checksum"), PartialWriter(path, HEADER):
        pass


def test_layers_just_written_are_had_from_memory_once_as_far_as_there_is_room(path, monkeypatch) -> None:
    monkeypatch.setattr("qkov_dist.results.partials.HELD_BYTES", checked_layer(4, HEADER, *make_layer(4)).nbytes)
    with PartialWriter(path, HEADER) as writer:
        for layer in (4, 1):
            writer.write_layer(layer, *make_layer(layer))
    read, reads = Partial.read_layer, []
    monkeypatch.setattr(Partial, "read_layer", lambda self, layer: reads.append(layer) or read(self, layer))
    for layer, from_disk in [(4, []), (1, [1]), (4, [1, 4])]:
        found, (blocks, shared) = writer.layer(layer), make_layer(layer)
        assert reads == from_disk
        for block, arrays in blocks.items():
            for one, other in zip(found.blocks[block], arrays, strict=True):
                assert one.tobytes() == other.tobytes()
        assert found.shared["O_bias"].tobytes() == shared["O_bias"].tobytes()


def test_bringing_together_keeps_checksums_of_the_original(path: Path) -> None:
    """A byte that is lost while the run goes on is not sealed with a new checksum."""
    with PartialWriter(path, HEADER) as writer:
        writer.write_layer(4, *make_layer(4))
        flip_a_score(path.with_suffix(".layers") / "layer_0004.h5", 4)
    with pytest.raises(QkovError, match="checksum"):
        read_partial(path).read_layer(4)


def test_a_truncated_or_foreign_layer_is_named(path: Path) -> None:
    stop_after(path, 1, 4)
    file = path.with_suffix(".layers") / "layer_0004.h5"
    file.write_bytes(file.read_bytes()[:-100])
    for attempt in (lambda: read_partial(path), lambda: PartialWriter(path, HEADER).__enter__()):
        with pytest.raises(QkovError, match=r"layer_0004\.h5"):
            attempt()
    file.unlink()  # what the remedy says: the layer is then scored again
    write(path, 4, 12)
    assert read_partial(path).missing == ()


# Processes that die. They are forked from a clean server, so that neither torch nor open files are in them.

FORKS = multiprocessing.get_context("forkserver")
KILL_HEADER = PartialHeader("run-1", 0, 1, 48, 48, tuple(range(8)))


def fork(target: Callable[..., None], *arguments: Any) -> Any:
    FORKS.set_forkserver_preload(["numpy", "h5py", "pytest", "qkov_dist.results.partials"])
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def write_what_is_missing(path: Path, told: Connection) -> None:
    """Say which layers are on disk as soon as they should be."""
    told.send("ready")
    with PartialWriter(path, KILL_HEADER) as writer:
        for layer in KILL_HEADER.layers:
            if layer not in writer.completed:
                writer.write_layer(layer, *make_layer(layer, KILL_HEADER))
                told.send(layer)
    told.send("closed")


def drain(connection: Connection) -> list[Any]:
    messages = []
    with contextlib.suppress(EOFError):
        while connection.poll():
            messages.append(connection.recv())
    return messages


def received(connection: Connection) -> Any:
    """The next message, or None where the process has ended."""
    assert connection.poll(PATIENCE_S)
    try:
        return connection.recv()
    except EOFError:
        return None


def seconds_of_a_layer(folder: Path) -> float:
    ours, theirs = FORKS.Pipe(duplex=False)
    process = fork(write_what_is_missing, partial_path(folder / "unkilled", 0), theirs)
    assert received(ours) == "ready"
    start = time.monotonic()
    process.join()
    return (time.monotonic() - start) / len(KILL_HEADER.layers)


@pytest.mark.long
def test_sigkill_at_random_moments_loses_no_complete_layer(tmp_path: Path) -> None:
    moments = random.Random(0)
    layer_seconds = seconds_of_a_layer(tmp_path)
    kills, kills_with_progress, place = 0, 0, 0
    promised: set[int] = set()
    while kills < 20:
        path = partial_path(tmp_path / str(place), 0)
        ours, theirs = FORKS.Pipe(duplex=False)
        process = fork(write_what_is_missing, path, theirs)
        theirs.close()
        messages = [received(ours) for _ in range(moments.randrange(1, 4))]  # "ready", then layers
        time.sleep(moments.uniform(0, layer_seconds))
        process.kill()
        process.join()
        messages += drain(ours)
        promised |= {layer for layer in messages if isinstance(layer, int)}
        if promised:
            partial = read_partial(path)
            assert promised <= set(partial.complete)
            for layer in partial.complete:
                assert_layer(path, layer, KILL_HEADER)
        if "closed" in messages:  # too late to be killed: on to a new place
            assert partial.missing == ()
            place, promised = place + 1, set()
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            kills_with_progress += bool(promised)
    assert kills_with_progress > 5  # a chance of two in three each
    ours, theirs = FORKS.Pipe(duplex=False)
    last = fork(write_what_is_missing, path, theirs)
    last.join()
    assert last.exitcode == 0
    for layer in KILL_HEADER.layers:
        assert_layer(path, layer, KILL_HEADER)
    assert list(path.parent.iterdir()) == [path]


def die_at_step(path: Path, step: int, told: Connection) -> None:
    """Write two layers more, and be killed at the n-th step that has an effect on the file system."""
    steps = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for module, names in (
        (os, ("fsync", "unlink", "rmdir", "mkdir")),
        (hdf5_write.Path, ("replace",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    with PartialWriter(path, HEADER) as writer:
        for layer in (4, 12):
            writer.write_layer(layer, *make_layer(layer))
            told.send(layer)
    told.send("closed")


@pytest.mark.long
def test_sigkill_at_every_step_loses_no_complete_layer(tmp_path: Path) -> None:
    """Also while layers are brought together and removed; layer 1 was complete before."""
    step, finished = 0, False
    while not finished:
        step += 1
        path = partial_path(tmp_path / str(step), 0)
        write(path, 1)
        ours, theirs = FORKS.Pipe(duplex=False)
        process = fork(die_at_step, path, step, theirs)
        process.join()
        messages = drain(ours)
        finished = process.exitcode == 0
        assert finished == ("closed" in messages)
        promised = {1} | {layer for layer in messages if isinstance(layer, int)}
        assert promised <= set(read_partial(path).complete)
        for layer in read_partial(path).complete:
            assert_layer(path, layer)
        write(path, *read_partial(path).missing)
        assert read_partial(path).missing == ()
        for layer in HEADER.layers:
            assert_layer(path, layer)
        assert list(path.parent.iterdir()) == [path]
    assert step > 15


def fill_the_disk(path: Path, room: int, told: Connection) -> None:
    import resource

    try:
        with PartialWriter(path, HEADER) as writer:
            writer.write_layer(1, *make_layer(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            writer.write_layer(4, *make_layer(4))
    except QkovError as error:
        told.send(str(error))


@pytest.mark.parametrize(("share", "complete"), [(0, (1,)), (0.5, (1,)), (0.95, (1,)), (1.05, (1, 4))])
def test_a_full_disk_is_one_clear_error_and_keeps_what_was_complete(
    path: Path, share: float, complete: tuple[int, ...]
) -> None:
    """With room for a layer but not for two, it is the bringing together that fails."""
    stop_after(partial_path(path.parent / "other", 0), 4)
    room = int((path.parent / "other" / "partial_rank00000.layers" / "layer_0004.h5").stat().st_size * share)
    ours, theirs = FORKS.Pipe(duplex=False)
    process = fork(fill_the_disk, path, room, theirs)
    process.join()
    assert process.exitcode == 0
    (message,) = drain(ours)
    assert "partial_rank00000" in message
    assert "room on the disk" in message
    assert read_partial(path).complete == complete
    write(path, *read_partial(path).missing)
    for layer in HEADER.layers:
        assert_layer(path, layer)


def write_as_nobody(path: Path, told: Connection) -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        write(path, 1)
    except QkovError as error:
        told.send(str(error))


def test_a_folder_that_cannot_be_written_is_named(path: Path) -> None:
    path.parent.chmod(0o555)
    ours, theirs = FORKS.Pipe(duplex=False)
    fork(write_as_nobody, path, theirs).join()
    path.parent.chmod(0o755)
    (message,) = drain(ours)
    assert "partial_rank00000" in message
    assert "permission" in message
