"""`qkov compare`: the answer first, in each format; the files that it writes; what is refused."""

from __future__ import annotations

import csv
import io
import json

import pytest
from heatmaps import heatmap_with_tests
from influences import with_made_effects
from running import run_quietly, settings, write_inputs
from samples import mixed_samples, write_task
from zoo import VOCAB

from qkov_dist import compare_runs
from qkov_dist.cli import main

RUNS = ("early", "late", "last")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs of one layout."""
    folder = tmp_path_factory.mktemp("compared")
    for place, name in enumerate(RUNS):
        (folder / name).mkdir()
        with_made_effects(heatmap_with_tests(), seed=place).save(folder / name / "heatmap.h5")
    return [folder / name for name in RUNS]


@pytest.fixture
def compare(capsys):
    """What the command prints."""

    def run(*arguments: object) -> str:
        assert main(["compare", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def test_the_table_begins_with_the_answer(compare, folders):
    told = compare(*folders[:2])
    comparison = compare_runs(folders[:2])
    assert " ".join(told.split()).startswith(" ".join(comparison.verdict))
    assert "of 44 heads moved from early to late (q <= 0.3, change by adam, unpaired): " in " ".join(told.split())
    assert "largest step" not in told
    for note in comparison.notes:
        assert note[:60] in told


def test_more_than_two_runs_are_told_as_a_trajectory(compare, folders):
    told = compare(*folders)
    assert "moved from early to last" in " ".join(told.split())
    assert "rank correlation of every two runs" in told
    head, *_, to = next(line for line in told.splitlines() if line.startswith(("Q ", "K ", "V ", "O "))).split()
    assert head in "QKVO"
    assert to
    assert ", late" in told or ", last" in told  # where the largest step leads


def test_json_is_the_comparison(compare, folders):
    told = json.loads(
        compare(folders[0] / "heatmap.h5", folders[1], "--format", "json", "--alpha", "0.01", "--seed", 3)
    )
    assert told == json.loads(json.dumps(compare_runs(folders[:2], alpha=0.01, seed=3).to_json()))
    assert set(told) == {
        *("answer", "runs", "differs", "notes", "paired", "alpha", "confidence", "moved", "correlations", "heads"),
    }
    assert told["alpha"] == 0.01
    assert [run["name"] for run in told["runs"]] == ["early", "late"]
    assert len(told["heads"]) == 44
    assert {"block", "layer", "head", "change_adam_1", "change_adam_2", "change_adam_q_value"} <= set(told["heads"][0])
    small = [head for head in told["heads"] if head["change_adam_q_value"] <= 0.01]
    assert len(small) == told["moved"]["change_adam"]


def test_csv_has_a_row_for_each_head(compare, folders):
    rows = list(csv.DictReader(io.StringIO(compare(*folders, "--format", "csv"))))
    expected = compare_runs(folders).to_pandas()
    assert len(rows) == len(expected)
    assert list(rows[0]) == list(expected)
    assert [float(row["overlap_3"]) for row in rows[:5]] == expected["overlap_3"][:5].tolist()


@pytest.mark.long
def test_output_holds_page_tables_and_figures_and_runs_can_be_added(compare, folders, tmp_path):
    pytest.importorskip("matplotlib")
    compare(*folders[:2], "--output", tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    tables = {f"{name}.{kind}" for name in ("heads", "correlations") for kind in ("csv", "md")}
    drawn = {f"{name}.{kind}" for name in ("scatter", "differences") for kind in ("pdf", "png")}
    assert written == {"compare.html", *tables, *drawn}
    compare(*folders, "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - written == {"trajectories.pdf", "trajectories.png"}
    assert "early, last" in (tmp_path / "compare.html").read_text()
    assert main(["compare", *map(str, folders[1:]), "--output", str(tmp_path)]) == 2  # another first run
    assert "early, last" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "qkov: compare: expected two runs or more, got one."),
        (("nowhere",), "qkov: nowhere: expected a folder with heatmap.h5, or a heatmap, got none."),
        (("late", "--pair", "math", "law"), "heatmap.h5: pair: expected one of math, cøde, got 'law'"),
        (("late", "--alpha", "2"), "qkov: alpha: expected a number between 0 and 1, got 2.0."),
        (("late", "--format", "jsn"), "Did you mean 'json'?"),
        (("other",), "qkov: compare other with early: expected tasks 'math', 'cøde', got 'math', 'law'."),
    ],
)
def test_what_is_wrong_is_said_in_one_message(folders, more, says, capsys, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    if "other" in more:
        (folders[0].parent / "other").mkdir()
        heatmap_with_tests(task_b="law").save("other/heatmap.h5")
    try:
        code = main(["compare", "early", *more])
    except SystemExit as end:
        code = end.code
    assert code == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.out == ""


@pytest.mark.long
def test_of_many_tasks_a_pair_is_named(compare, tmp_path, capsys):
    """A run of three against one of two of them, on the same samples: their Fisher is not the same."""
    write_inputs(tmp_path, "llama")
    write_task(tmp_path / "c.jsonl", mixed_samples(4, VOCAB, seed=3))
    two = settings(tmp_path, "llama", "two", {}, metric={"layers": [1]})
    three = settings(tmp_path, "llama", "three", {}, metric={"layers": [1]})
    three["tasks"] = [*three["tasks"], {"name": "c", "path": str(tmp_path / "c.jsonl")}]
    run_quietly(two, three)
    capsys.readouterr()  # what libraries print when they are loaded
    runs = [tmp_path / "out" / name for name in ("two", "three")]
    told = json.loads(compare(*runs, "--pair", "a", "b", "--format", "json"))
    assert told["paired"]
    assert told["differs"] == ["tasks beside the pair (c; none)"]
    assert list(told["moved"]) == ["change_sgd", "relative_sgd"]  # adam's steps are by the Fisher of all
    assert told["moved"]["change_sgd"] == 0
    for more, says in (((), "the file is of more than two"), (("--pair", "b", "a"), "in their order")):
        assert main(["compare", *map(str, runs[::-1]), *more]) == 2
        assert says in capsys.readouterr().err


def test_the_pair_that_a_run_is_of_may_be_named(compare, folders):
    assert compare(*folders[:2], "--pair", "math", "cøde") == compare(*folders[:2])
