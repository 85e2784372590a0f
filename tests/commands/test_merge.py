"""`qkov merge`: partial files of any number of ranks become the heatmap that their run would have written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import comparing
import h5py
import numpy as np
import pytest
import yaml
from comparing import assert_identical
from jobs import job_for
from owners import flat_owner
from processes import ran
from rounding import SCORES, assert_same_fisher, assert_same_tests, reordered
from samples import write_task
from zoo import TINY

import qkov_dist.distributed.topology
from qkov_dist import load_heatmap
from qkov_dist.cli import main
from qkov_dist.commands.merge import merge_folder
from qkov_dist.config_file import from_dict
from qkov_dist.distributed.connect import current
from qkov_dist.distributed.world import Alone
from qkov_dist.errors import QkovError
from qkov_dist.job import prepare
from qkov_dist.results.gather import NUM_LISTED, Source, check_sources
from qkov_dist.results.partial_schema import PartialHeader
from qkov_dist.results.partials import Partial, PartialWriter, partial_path, read_partial
from qkov_dist.run import run

MPIRUN = Path(sys.prefix) / "bin" / "mpirun"


def qkov(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the run of one process in ``one``, and the partial files of three simulated ranks in ``three``."""
    folder = tmp_path_factory.mktemp("merge")
    TINY["gpt2"].build().save_pretrained(folder / "model")
    job = job_for(TINY["gpt2"])
    write_task(folder / "a.jsonl", job.a)
    write_task(folder / "b.jsonl", job.b)
    raw = {
        "model": {"path": str(folder / "model")},
        "tasks": [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")],
        "metric": {"include_bias": True},
        "statistics": {"permutations": 50},
        "output": {"dir": str(folder / "one"), "pairs": "all"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    run(from_dict(raw))
    _write_as_three_ranks(raw, folder)
    return folder


def _write_as_three_ranks(raw: dict, folder: Path) -> None:
    """Score each third of every weight by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(3):
            owner = flat_owner(rank, 3)
            patch.setattr(qkov_dist.distributed.topology.Topology, "owned", lambda self, owner=owner: owner)
            place = {"dir": str(folder / f"third-{rank}"), "pairs": "all"}
            with contextlib.suppress(QkovError):  # a third of the scores is no heatmap
                run(from_dict({**raw, "output": place}))
            third = read_partial(partial_path(folder / f"third-{rank}", 0))
            header = dataclasses.replace(third.header, rank=rank, world_size=3)
            with PartialWriter(partial_path(folder / "three", rank), header) as writer:
                for layer in third.complete:
                    writer.write_layer(layer, *third.read_layer(layer))


@pytest.fixture
def three(finished, tmp_path) -> Path:
    """A copy of the three ranks' partial files."""
    return Path(shutil.copytree(finished / "three", tmp_path / "three"))


def deviation(one, other) -> float:
    """Largest deviation of any score, among all samples too, or effect, as a share of its block's largest."""
    pairs = [(one.pooled[block], other.pooled[block]) for block in other.blocks]
    pairs += [(one.shared[name]["cross"], other.shared[name]["cross"]) for name in other.shared]
    shares = [float(np.abs(got - expected).max() / np.abs(expected).max()) for got, expected in pairs]
    return max(comparing.deviation(one, other), *shares)


def places(heatmap) -> dict:
    """Where each head lies: its part of the weight, and of the bias where it has one."""
    return {(x.block, x.layer, x.head): x.ranges for x in heatmap.select("interference").heads if x.ranges}


# What comes out


def test_one_process_is_merged_bit_for_bit(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished / "one", tmp_path / "one"))
    before = load_heatmap(folder / "heatmap.h5")
    (folder / "heatmap.h5").unlink()
    assert qkov("merge", folder, "--quiet") == 0
    printed = capsys.readouterr()
    assert "strongest heads" in printed.out
    assert str(folder / "heatmap.h5") in printed.out
    assert "adding 1 partial file of run" in printed.err
    after = load_heatmap(folder / "heatmap.h5")
    assert_identical(after, before)
    assert deviation(after, before) == 0
    assert dict(after.attributes) == dict(before.attributes)
    with h5py.File(finished / "one" / "heatmap.h5") as run_file, h5py.File(folder / "heatmap.h5") as file:
        assert sorted(file) == sorted(run_file)  # the pairs that the configuration asks for among them


def test_three_ranks_add_up_to_one_process(finished, three, capsys):
    assert qkov("merge", three, "--quiet") == 0
    assert "adding 3 partial files" in capsys.readouterr().err
    merged, one = (load_heatmap(folder / "heatmap.h5") for folder in (three, finished / "one"))
    assert deviation(merged, one) < SCORES
    for block in one.blocks:
        assert_same_fisher(merged.fisher[block], one.fisher[block])
        assert_same_tests(merged.statistics["overlap"][block], one.statistics["overlap"][block], "overlap", SCORES)
    assert merged.run_id == one.run_id
    assert len(places(merged)) == 2 * 4 * 4  # layers, blocks and heads
    assert places(merged) == places(one)
    assert merged.samples_a.ids == one.samples_a.ids


@pytest.mark.long
def test_tests_with_other_settings_are_not_lost_without_a_word(finished, tmp_path, capsys):
    """`qkov stats`, then `qkov merge` into the same file: refused, or one of the two by name."""
    folder = Path(shutil.copytree(finished / "one", tmp_path / "one"))
    assert qkov("merge", folder, "--quiet") == 0  # the run's own tests are no loss
    assert qkov("stats", folder, "--permutations", 70, "--alternative", "less") == 0
    content = (folder / "heatmap.h5").read_bytes()
    capsys.readouterr()
    assert qkov("merge", folder, "--quiet") == 2
    told = capsys.readouterr().err
    assert "permutations 70 -> 50" in told
    assert "alternative less -> two-sided" in told
    assert "--tests keep" in told
    assert (folder / "heatmap.h5").read_bytes() == content
    assert qkov("merge", folder, "--quiet", "--output", tmp_path / "else.h5") == 0
    before = load_heatmap(folder / "heatmap.h5")
    assert qkov("merge", folder, "--quiet", "--tests", "keep") == 0
    kept = load_heatmap(folder / "heatmap.h5").statistics
    assert kept["settings"] == before.statistics["settings"]
    np.testing.assert_array_equal(kept["overlap"]["Q"]["p_value"], before.statistics["overlap"]["Q"]["p_value"])
    assert qkov("merge", folder, "--quiet", "--tests", "run") == 0
    assert load_heatmap(folder / "heatmap.h5").statistics["settings"]["n_permutations"] == 50


def test_a_rank_counted_twice_would_be_far_out_of_tolerance(finished, three):
    part, one = read_partial(partial_path(three, 1)), load_heatmap(finished / "one" / "heatmap.h5")
    scores = part.read_layer(0).blocks["O"].scores
    assert np.abs(scores).max() > 1e3 * SCORES * np.abs(one.pooled["O"]).max()


TWICE = """
import sys
from qkov_dist.cli import main
codes = [main(["merge", folder, "--output", f"{folder}/shared.h5", "--quiet"]) for folder in sys.argv[1:]]
sys.exit(max(codes))
"""


@pytest.mark.long
def test_processes_of_mpirun_share_the_files_and_say_once_what_is_wrong(finished, three, tmp_path):
    """Three files: one of two processes has two of them. Then the same, one of them damaged."""
    pytest.importorskip("mpi4py")
    if not MPIRUN.exists():
        pytest.skip("no mpirun beside mpi4py")
    wrong = tmp_path / "wrong"
    shutil.copytree(three, wrong)
    damage(partial_path(wrong, 2), "partial/O/layer_0001")
    done = ran(MPIRUN, "-n", 2, sys.executable, "-c", TWICE, three, wrong)
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("strongest heads") == 1
    assert str(three / "shared.h5") in done.stdout
    assert_shared(finished, three)
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("qkov: ") and "expected" in line]
    assert "partial_rank00002.h5: partial/O/layer_0001: expected data that match their checksum" in message
    assert not (wrong / "shared.h5").exists()


def merge_on_ranks(folder: str) -> None:
    merge_folder(folder, Path(folder) / "shared.h5", world=current())


@pytest.mark.long
def test_four_processes_share_three_files(finished, three, ranks):
    """One has none, whatever the processes speak through."""
    ranks(4).run(merge_on_ranks, str(three))
    assert_shared(finished, three)


def assert_shared(finished, three):
    """What several added up is what one adds up, and what one process computed."""
    assert qkov("merge", three, "--quiet") == 0
    shared, alone, one = (
        load_heatmap(path) for path in (three / "shared.h5", three / "heatmap.h5", finished / "one" / "heatmap.h5")
    )
    assert deviation(shared, alone) < reordered(3)
    assert deviation(shared, one) < SCORES
    assert shared.statistics["overlap"].keys() == one.statistics["overlap"].keys()


# What is refused, before anything is written


def refused(capsys, folder: Path, *arguments: object) -> str:
    before = sorted(path for path in folder.parent.rglob("*"))
    capsys.readouterr()
    assert qkov("merge", folder, "--quiet", *arguments) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if " expected " in line]
    assert message.startswith("qkov: ")
    assert sorted(path for path in folder.parent.rglob("*")) == before
    return message


def damage(path: Path, dataset: str) -> None:
    """Change one byte of a dataset's first chunk."""
    with h5py.File(path) as file:
        offset = file[dataset].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def test_a_folder_without_partial_files(tmp_path, capsys):
    (tmp_path / "empty" / "partial_rank00000.layers").mkdir(parents=True)  # a rank that finished no layer
    assert "empty: expected partial files partial_rankNNNNN.h5" in refused(capsys, tmp_path / "empty")
    assert "nowhere: expected an existing file" in refused(capsys, tmp_path / "nowhere")


def test_missing_ranks_are_listed(three, capsys):
    partial_path(three, 0).unlink()
    partial_path(three, 2).unlink()
    message = refused(capsys, three)
    assert "expected one partial file of each of 3 ranks, got none of ranks [0, 2]" in message
    assert "qkov run" in message


def test_a_copied_file_would_count_twice(three, capsys):
    shutil.copy(partial_path(three, 1), partial_path(three, 3))
    assert "got two of ranks [1]" in refused(capsys, three)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": "another"}, "partial_rank00002.h5: run_id: expected"),
        ({"world_size": 5}, "partial_rank00002.h5: world_size: expected 3, as in partial_rank00000.h5, got 5"),
        ({"layers": (0, 1, 2)}, "partial_rank00002.h5: layers: expected (0, 1)"),
        ({"pooled": False}, "partial_rank00002.h5: pooled: expected True"),
        ({"n_left": 7}, "partial_rank00002.h5: n_left: expected 8"),
    ],
)
def test_files_of_different_runs(three, capsys, change, message):
    path = partial_path(three, 2)
    header = dataclasses.replace(read_partial(path).header, **change)
    path.unlink()
    with PartialWriter(path, header):
        pass
    assert message in refused(capsys, three)


def write_and_die(partial: Partial, layers: dict) -> None:
    """Write some layers of a partial file as a run does that is interrupted then."""
    with contextlib.suppress(KeyboardInterrupt), PartialWriter(partial.path, partial.header) as writer:
        for layer, content in layers.items():
            writer.write_layer(layer, *content)
        raise KeyboardInterrupt


def test_unfinished_layers_are_listed_with_their_ranks(three, capsys):
    """As a killed run leaves them: rank 1 has layer 1 beside its file, rank 2 nothing but layer 0."""
    kept = {1: read_partial(partial_path(three, 1)), 2: read_partial(partial_path(three, 2))}
    layers = {rank: {n: partial.read_layer(n) for n in partial.complete} for rank, partial in kept.items()}
    for rank, done in ((1, (1,)), (2, (0,))):
        partial_path(three, rank).unlink()
        write_and_die(kept[rank], {layer: layers[rank][layer] for layer in done})
    message = refused(capsys, three)
    assert "expected all 2 layers from each of 3 ranks, got no layers [0] of rank 1, layers [1] of rank 2." in message
    assert "output.resume=true" in message
    for rank, missing in ((1, 0), (2, 1)):
        write_and_die(kept[rank], {missing: layers[rank][missing]})
    assert qkov("merge", three, "--quiet") == 0  # complete, though no rank brought its layers together


def test_many_unfinished_ranks_are_counted():
    headers = [PartialHeader("run", rank, 64, 3, 4, (0, 1)) for rank in range(64)]
    sources = [Source(f"{header.rank}.h5", header, ()) for header in headers]
    with pytest.raises(Exception, match=rf"of rank {NUM_LISTED - 1}, and of {64 - NUM_LISTED} more ranks"):
        check_sources(Path("runs"), sources)
    check_sources(Path("runs"), [dataclasses.replace(source, complete=(0, 1)) for source in sources])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("partial/O/layer_0000", "partial/O/layer_0000: expected data that match their checksum"),
        ("fisher/O/layer_0001", "fisher/O/layer_0001: expected data that match their checksum"),
        ("layer", "layer: expected data that match their checksum"),
    ],
)
def test_damaged_files(three, capsys, dataset, message):
    damage(partial_path(three, 1), dataset)
    assert f"partial_rank00001.h5: {message}" in refused(capsys, three)


def test_a_file_that_is_no_partial(three, capsys):
    partial_path(three, 1).write_text("text")
    assert "partial_rank00001.h5: expected an intact file" in refused(capsys, three)


def test_the_output_of_another_run_stays(finished, three, capsys):
    other = load_heatmap(finished / "one" / "heatmap.h5")
    other = dataclasses.replace(other, attributes={**other.attributes, "run_id": "another"})
    other.save(three / "heatmap.h5")
    assert "Nothing was overwritten" in refused(capsys, three)
    assert load_heatmap(three / "heatmap.h5").run_id == "another"
    assert qkov("merge", three, "--quiet", "--output", three / "mine.h5") == 0
    assert qkov("merge", three, "--quiet", "--output", three / "mine.h5") == 0  # its own it writes again
    assert "existing folder" in refused(capsys, three, "--output", three / "no" / "mine.h5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda extra: {}, "expected a description of layers, heads and samples"),
        (lambda extra: {**extra, "attributes": {}}, "expected the run's configuration"),
        (
            lambda extra: _with_key(extra, "metric", "loudness", 1),
            "configuration in the partial files: metric.loudness",
        ),
    ],
)
def test_metadata_that_nobody_can_read(three, capsys, change, message):
    path = partial_path(three, 0)
    partial = read_partial(path)
    layers = {layer: partial.read_layer(layer) for layer in partial.complete}
    path.unlink()
    with PartialWriter(path, dataclasses.replace(partial.header, extra=change(partial.header.extra))) as writer:
        for layer, content in layers.items():
            writer.write_layer(layer, *content)
    assert message in refused(capsys, three)


def _with_key(extra: dict, section: str, key: str, value: object) -> dict:
    changed = json.loads(json.dumps(extra))
    changed["attributes"]["config"][section][key] = value
    return changed


def test_the_simulated_ranks_are_those_of_the_run(finished):
    """The thirds are of one and the same run, so that what is merged here is what a run of three would leave."""
    raw = yaml.safe_load((finished / "run.yaml").read_text())
    job = prepare(from_dict(raw), Alone())
    assert {read_partial(partial_path(finished / "three", rank)).header.run_id for rank in range(3)} == {job.run_id}


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        qkov("merge", "--help")
    assert "qkov merge runs/first" in capsys.readouterr().out
