"""The report of many tasks: its files, tables, page's numbers, terminal and commands."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from matrices import made_matrix, matrix_of_camps
from pages import numbers, records
from running import qkov

from qkov_dist.errors import QkovError
from qkov_dist.report.matrix_figures import draw_totals
from qkov_dist.report.matrix_findings import said_of_pairs
from qkov_dist.report.matrix_page import make_matrix_page, matrix_data
from qkov_dist.report.matrix_tables import heads_over_pairs_table, matrix_table, pairs_table, tasks_table
from qkov_dist.report.pair_files import pair_files
from qkov_dist.report.summary import print_matrix_summary
from qkov_dist.report.write import first_pairs, write_matrix_page
from qkov_dist.results.matrix_pairs import KINDS
from qkov_dist.results.task_matrix import TaskMatrix

HOSTILE = "<script>window.evil = 1</script>"


@pytest.fixture(scope="module")
def matrix() -> TaskMatrix:
    return matrix_of_camps("+-0", ("math", "a/b c", HOSTILE), num_layers=2, num_heads=4)


def test_names_of_files_are_safe_and_never_meet() -> None:
    tasks = [
        "math",
        "Math",
        "a b",
        "a/b",
        "a_b-3",
        "a_b",
        "..",
        "",
        "loi française",
        "法律",
        "x" * 300,
        "x" * 299,
        "CON",
    ]
    files = pair_files(tasks)
    assert len(files) == len(tasks) * (len(tasks) - 1) // 2
    assert len({file.casefold() for file in files.values()}) == len(files)
    assert all(re.fullmatch(r"pairs/[A-Za-z0-9][\w.-]{0,110}\.html", file, re.ASCII) for file in files.values())
    assert pair_files(["math", "code"]) == {("math", "code"): "pairs/math__code.html"}


def test_pages_of_pairs_lie_beside_the_page_and_lead_back(matrix, tmp_path) -> None:
    page = write_matrix_page(matrix, tmp_path)
    files = pair_files(matrix.tasks)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("pairs/*")} == {*files.values()}
    assert all(f'"{file}"' in page.read_text() for file in files.values())
    of_pair = (tmp_path / files["math", "a/b c"]).read_text()
    assert '<a href="../report.html#math.a%2Fb%20c">' in of_pair
    assert "--pair math &#x27;a/b c&#x27; --by change_adam" in of_pair


def test_a_pair_is_linked_only_where_its_page_is_of_this_run(matrix, tmp_path) -> None:
    write_matrix_page(matrix, tmp_path, [("math", "a/b c")])
    page = write_matrix_page(matrix, tmp_path, []).read_text()
    written = [file in page for file in pair_files(matrix.tasks).values()]
    assert written == [True, False, False]
    other = dataclasses.replace(matrix, attributes={**matrix.attributes, "run_id": "another"})
    with pytest.raises(QkovError, match="Nothing was overwritten"):
        write_matrix_page(other, tmp_path)
    (tmp_path / "report.html").unlink()
    assert "pairs/math__" not in write_matrix_page(other, tmp_path, []).read_text()
    with pytest.raises(QkovError, match="Nothing was overwritten"):
        write_matrix_page(other, tmp_path, [("math", "a/b c")])
    with pytest.raises(QkovError, match="Ask for"):
        write_matrix_page(matrix, tmp_path, [("a/b c", "math")])


def test_of_many_pairs_the_surest_are_written_first(matrix) -> None:
    assert first_pairs(matrix, 3) == list(matrix.pairs)
    (surest,) = first_pairs(matrix, 1)
    p_values = {record.tasks: record.totals["adam"].total.p_value for record in matrix.records}
    assert surest == min(p_values, key=p_values.get)


def test_no_text_of_a_run_becomes_markup(matrix) -> None:
    page = make_matrix_page(matrix, {})
    assert HOSTILE not in page
    assert page.count("<script") == 2
    assert not re.search(r"https?://", page.replace("http://www.w3.org/2000/svg", ""))


def test_the_page_has_what_every_head_shows_in_every_pair(matrix) -> None:
    data = matrix_data(matrix, {})
    shape = (3, len(KINDS), 2, len(matrix.blocks))
    counts = numbers(data["counts"], "<i4").reshape(shape)
    for at, record in enumerate(matrix.records):
        for place, kind in enumerate(data["kinds"]):
            for side, sign in enumerate((1, -1)):
                assert counts[at, place, side].tolist() == [record.count(kind, sign, block) for block in matrix.blocks]
    for block in data["blocks"]:
        codes = numbers(block["codes"], "<i1").reshape(3, -1)
        for digit, kind in enumerate(KINDS):
            sides = codes // 3**digit % 3
            wanted = np.stack([record.codes[kind][block["name"]].ravel() for record in matrix.records])
            np.testing.assert_array_equal(np.where(sides == 2, -1, sides), wanted)
            total = numbers(block["values"][f"{kind}_above"])
            np.testing.assert_array_equal(total, (wanted == 1).sum(0))
    change = numbers(data["matrices"]["K"]["change_adam"]).reshape(3, 3)
    np.testing.assert_allclose(change, matrix.values["K"]["change_adam"].sum((2, 3)), rtol=1e-6)


def test_a_page_of_very_many_heads_has_counts_alone(matrix, monkeypatch) -> None:
    monkeypatch.setattr("qkov_dist.report.matrix_page.MOST_CODES", 10)
    assert [block["codes"] for block in matrix_data(matrix, {})["blocks"]] == [None] * 4


def test_tables_hold_pairs_tasks_heads_and_the_matrix(matrix) -> None:
    pairs = records(pairs_table(matrix))
    assert [row["conflict_adam"] for row in pairs] == sorted((row["conflict_adam"] for row in pairs), reverse=True)
    (first,) = (row for row in pairs if (row["task_a"], row["task_b"]) == ("math", "a/b c"))
    heatmap = matrix.heatmap("math", "a/b c")
    total = heatmap.total_effect("adam")
    assert (first["change_adam"], first["ci_low_adam"]) == (total.change, total.interval[0])
    assert first["direction_adam"] == "harm"
    assert first["step_on_b_adam"] == heatmap.verdict.practical["adam"]["b"]
    assert first["cosine_adam"] == matrix.cosines()[0, 1] < 0
    heads = records(heads_over_pairs_table(matrix))
    assert len(heads) == sum(int(mask.sum()) for mask in matrix.present.values())
    assert sum(row["conflict_sgd"] for row in heads) == sum(row["conflict_sgd"] for row in pairs)
    tasks = {row["task"]: row for row in records(tasks_table(matrix))}
    assert tasks["math"]["conflict_adam"] == sum(row["conflict_adam"] for row in pairs if "math" in row.values())
    assert tasks["a/b c"]["pairs_that_hurt"] == 1
    cells = {(row["task"], row["task_right"], row["block"]): row for row in records(matrix_table(matrix))}
    assert len(cells) == 9 * 5
    assert cells["math", HOSTILE, "Q"]["mean"] == pytest.approx(matrix.values["Q"]["mean"][0, 2].mean())


def test_a_warning_is_said_once_with_its_pairs() -> None:
    matrix = made_matrix()
    heatmaps = dict(matrix.heatmaps)
    for number, pair in enumerate(matrix.pairs):
        warnings = ["of the run", "of all", *(["of two"] if number < 2 else [])]
        attributes = {**heatmaps[pair].attributes, "warnings": warnings}
        heatmaps[pair] = dataclasses.replace(heatmaps[pair], attributes=attributes, statistics=None)
    attributes = {**matrix.attributes, "warnings": ["of the run"]}
    said = said_of_pairs(dataclasses.replace(matrix, heatmaps=heatmaps, attributes=attributes))
    of_warnings = [text for kind, text in said if kind == "warning"]
    assert of_warnings == ["of the run", "All pairs: of all", "math × code, math × loi française: of two"]


def test_the_terminal_begins_with_the_answer(matrix, capsys) -> None:
    print_matrix_summary(matrix, "runs/x")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Of 3 pairs of 3 tasks, 1 hurts each other, none help each other")
    header = next(line.split() for line in lines if line.startswith("a  "))
    row = next(line for line in lines if line.startswith("math  ") and "a/b c" in line)
    assert header[:6] == ["a", "b", "contested", "apart", "conflict", "synergy"]
    assert row.endswith("harm")
    assert lines[-2].endswith("runs/x/heatmap.h5")


def test_figures_count_from_0_and_tell_training_by_row_and_column(matrix) -> None:
    conflict, _, relative, _ = draw_totals(matrix).axes[:4]
    most = max(record.count("adam", 1) for record in matrix.records)
    assert conflict.images[0].get_clim() == (0, most)
    order = list(matrix.order)
    at = order.index(0), order.index(1)
    drawn = np.asarray(relative.images[0].get_array())
    assert drawn[at] == pytest.approx(100 * matrix.records[0].totals["adam"].relative(0)[0])
    assert drawn[at[::-1]] == pytest.approx(100 * matrix.records[0].totals["adam"].relative(1)[0])


@pytest.mark.long
def test_qkov_report_writes_all_of_a_file_and_one_pair_on_request(matrix, tmp_path, capsys) -> None:
    matrix.save(tmp_path / "heatmap.h5")
    assert qkov("report", tmp_path, "--pair", "math", HOSTILE) == 0
    assert len(list(tmp_path.glob("pairs/*"))) == 1
    assert not (tmp_path / "report").exists()
    assert qkov("report", tmp_path) == 0
    assert len(list(tmp_path.glob("pairs/*"))) == 3
    names = {"pairs", "tasks", "heads_over_pairs", "matrix"}
    figures = {"matrix", "matrix_blocks", "matrix_scores", "matrix_heads"}
    wanted = {f"{n}.{k}" for n in names for k in ("csv", "md")} | {f"{n}.{k}" for n in figures for k in ("pdf", "png")}
    assert {path.name for path in tmp_path.glob("report/*")} == wanted
    assert qkov("report", tmp_path, "--pair", "math", "maths") == 2
    assert qkov("heads", tmp_path, "--pair", "math", "a/b c", "--significant", "--format", "csv") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) > matrix.records[0].count("adam", 1)
    assert qkov("heads", tmp_path) == 2
