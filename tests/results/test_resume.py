"""A run goes on with another number of ranks: what was finished is carried over, once, whatever is killed when."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from comparing import deviation
from rounding import PASSES, assert_same_fisher
from running import run_quietly, settings
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

import qkov_dist.run
import qkov_dist.scoring.engine
from qkov_dist import QkovError, load_heatmap
from qkov_dist.config_file import from_dict
from qkov_dist.distributed.connect import current
from qkov_dist.results import resume
from qkov_dist.results.partials import list_partials, read_partial
from qkov_dist.results.resume import CARRIED, carry_over
from qkov_dist.run import run

LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("carry")
    for task, seed, num in (("a", 1, 5), ("b", 2, 4)):
        write_task(made / f"{task}.jsonl", mixed_samples(num, VOCAB, seed=seed))
    TINY["llama"].build(num_hidden_layers=LAYERS).save_pretrained(made / "llama")
    run_quietly(resumed(made, "whole"))
    return made


def resumed(folder: Path, out: str, shard: str = "none") -> dict:
    raw = settings(folder, "llama", out, {"shard": shard}, statistics={"permutations": 30})
    raw["output"]["resume"] = True
    return raw


def stop_before(layer: int):
    """Make scoring fail at a layer, as a kill would between two layers."""
    score_layers = qkov_dist.scoring.engine.score_layers

    def until(layers):
        for source in layers:
            if source is not None and source[0].layer == layer:
                raise QkovError("test", expected="to go on", got="a stop", remedy="none")
            yield source

    return lambda layers, *args: score_layers(until(layers), *args)


def run_until(raw: dict, layer: int) -> str:
    """Run until a layer, which fails on the rank that owns it."""
    kept = qkov_dist.scoring.engine.score_layers
    qkov_dist.scoring.engine.score_layers = stop_before(layer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(from_dict(raw))
    except QkovError as error:
        current().all_gather(None)  # every rank owns a part of every layer: each has recorded what it finished
        return str(error)
    finally:
        qkov_dist.scoring.engine.score_layers = kept
    return ""


def assert_right(folder: Path, out: str) -> None:
    found, whole = (load_heatmap(folder / "out" / name / "heatmap.h5") for name in (out, "whole"))
    assert found.run_id == whole.run_id
    assert deviation(found, whole) < PASSES
    for block in whole.blocks:
        assert_same_fisher(found.fisher[block], whole.fisher[block], PASSES)
        np.testing.assert_allclose(found.tests[block]["p_value"], whole.tests[block]["p_value"], atol=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after", "finished"),
    [
        ((1, "none"), (3, "ddp"), {3}),
        ((2, "fsdp"), (1, "none"), {3}),
        ((3, "fsdp"), (2, "ddp"), {3}),
        ((2, "ddp"), (1, "none"), {1, 2}),  # each layer is one rank's; the other may be a layer behind
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(before, after, finished, ranks, folder):
    out = f"{before[0]}{before[1]}-{after[0]}{after[1]}"
    first, second = (resumed(folder, out, shard) for _, shard in (before, after))
    if before[0] == 1:
        assert "a stop" in run_until(first, 3)
    else:
        with pytest.raises(AssertionError, match="a stop"):
            ranks(before[0]).run(run_until_or_raise, first, 3)
    left = [read_partial(path) for path in list_partials(folder / "out" / out)]
    assert {partial.header.world_size for partial in left} == {before[0]}
    num = len(set.intersection(*(set(partial.complete) for partial in left)))
    assert num in finished
    said = run_quietly(second) if after[0] == 1 else ranks(after[0]).run(run_quietly, second)[0]
    assert f"{num} layers of this run were finished on {before[0]} ranks and are taken over" in said
    assert f"resuming: {num} of 5 layers are on disk" in said
    assert_right(folder, out)
    assert not (folder / "out" / out / CARRIED).exists()


@pytest.mark.long
def test_norms_of_samples_go_along_to_another_number_of_ranks(ranks, folder):
    """Layers that are left would give other norms than all layers did."""
    whole, first, second = (
        {**resumed(folder, out, shard), "metric": {"sample_scale": "unit"}}
        for out, shard in (("unit", "none"), ("unit-1-2", "none"), ("unit-1-2", "ddp"))
    )
    run_quietly(whole)
    assert "a stop" in run_until(first, 3)
    said = ranks(2).run(run_quietly, second)[0]
    assert "resuming: 3 of 5 layers are on disk" in said
    found, expected = (load_heatmap(folder / "out" / out / "heatmap.h5") for out in ("unit-1-2", "unit"))
    np.testing.assert_array_equal(found.samples_a.gradient_norms, expected.samples_a.gradient_norms)
    for block in expected.blocks:
        largest = np.abs(expected.cross[block]).max()
        np.testing.assert_allclose(found.cross[block], expected.cross[block], atol=PASSES * largest, rtol=0)


@pytest.mark.long
def test_who_starts_again_gets_all_layers_anew_whatever_ranks_were_there(ranks, folder, half):
    """Partial files of one process, then two ranks with output.resume=false."""
    raw = resumed(folder, half.name, "fsdp")
    raw["output"]["resume"] = False
    said = ranks(2).run(run_quietly, raw)[0]
    assert "resuming" not in said
    assert_right(folder, half.name)
    assert {read_partial(path).header.world_size for path in list_partials(half)} == {2}
    assert not any(path.is_dir() for path in half.iterdir())


def test_starting_again_leaves_files_of_another_run_alone(half):
    before = {path: path.read_bytes() for path in half.rglob("*.h5")}
    resume.remove_run(half, "another")
    assert {path: path.read_bytes() for path in half.rglob("*.h5")} == before
    resume.remove_run(half, header_of(half, 1).run_id)
    assert not list(half.iterdir())


def run_until_or_raise(raw: dict, layer: int) -> None:
    if message := run_until(raw, layer):
        raise AssertionError(message)


@pytest.fixture
def half(folder, tmp_path, request):
    """The partial files of a run of one process that stopped before layer 3."""
    out = folder / "out" / "half"
    if not out.exists():
        run_until(resumed(folder, "half"), 3)
    copy = folder / "out" / tmp_path.name
    shutil.copytree(out, copy)
    return copy


def header_of(copy: Path, world_size: int):
    header = read_partial(list_partials(copy)[0]).header
    return qkov_dist.results.partials.PartialHeader(
        header.run_id, 0, world_size, header.n_left, header.n_right, header.layers, header.pooled
    )


@pytest.mark.long
@pytest.mark.parametrize("step", ["writing", "removing", "reading"])
def test_a_kill_at_any_step_of_carrying_loses_nothing_and_counts_nothing_twice(step, half, folder, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    header = header_of(half, 2)

    with monkeypatch.context() as patch:
        if step == "writing":
            write, count = resume.PartialWriter.write_layer, []

            def second_fails(self, layer, *args):
                if count:
                    raise KeyboardInterrupt
                count.append(layer)
                write(self, layer, *args)

            patch.setattr(resume.PartialWriter, "write_layer", second_fails)
        elif step == "removing":
            patch.setattr(resume, "_put_away", killed)
        else:
            patch.setattr(resume, "read_partial", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_over(half, header)
    assert carry_over(half, header) == [0, 1, 2]
    assert carry_over(half, header) == [0, 1, 2]
    assert list_partials(half) == ()
    run_quietly(resumed(folder, half.name))
    assert_right(folder, half.name)


def test_what_a_killed_rank_left_behind_goes(half, folder):
    for rank in range(3):  # factors on disk, and a layer that was not finished
        left = half / f"partial_rank{rank:05d}.layers" / "qkov-factors-killed"
        left.mkdir(parents=True)
        (left / "x_00000.bin").write_bytes(bytes(100))
        (left.parent / "layer_0004.h5.part").write_bytes(bytes(10))
    assert carry_over(half, header_of(half, 2)) == [0, 1, 2]
    assert not list(half.rglob("qkov-factors-*"))[1:]  # rank 1 clears its own folder
    run_quietly(resumed(folder, half.name))
    assert_right(folder, half.name)
    assert not list(half.rglob("partial_rank*.layers"))


def test_files_of_another_run_are_left_alone(half):
    header = header_of(half, 2)
    other = qkov_dist.results.partials.PartialHeader("another", 0, 2, header.n_left, header.n_right, header.layers)
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    assert carry_over(half, other) == []
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before


@pytest.mark.long
def test_layers_that_not_all_ranks_finished_are_put_aside(ranks, folder):
    out = folder / "out" / "aside"
    with pytest.raises(AssertionError, match="a stop"):
        ranks(2).run(run_until_or_raise, resumed(folder, "aside", "fsdp"), 2)
    (out / "partial_rank00001.layers" / "layer_0001.h5").unlink()
    run_quietly(resumed(folder, "aside"))
    assert_right(folder, "aside")
    aside = out / "unfinished_of_2_ranks"
    assert sorted(path.name for path in aside.iterdir()) == ["partial_rank00000.layers"]
    assert (aside / "partial_rank00000.layers" / "layer_0001.h5").exists()
