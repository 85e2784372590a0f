"""The report without a browser: what is written, what is escaped, and what is refused."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from heatmaps import (
    HEADS,
    KV_HEADS,
    LAYERS,
    NUM_A,
    NUM_B,
    heatmap_with_tests,
    large_heatmap,
    make_heatmap,
    make_table,
    present,
    signed_heatmap,
)
from pages import numbers, records

from qkov_dist.cli import main
from qkov_dist.errors import QkovError
from qkov_dist.report.figures import draw_blocks, draw_heatmaps
from qkov_dist.report.page import make_page, page_data
from qkov_dist.report.page_frame import round_to_float32
from qkov_dist.report.table import Table
from qkov_dist.report.tables import all_tables, blocks_table, conflicts_table, heads_table, layers_table
from qkov_dist.report.write import write_page, write_report
from qkov_dist.results.heatmap_data import SampleTable

HOSTILE = "</script><script>alert(1)</script><!-- <img src=https://example.com/x.png> {{script}} \u2028 \udc80"


def data_of(page: str) -> dict:
    """The data block as a browser's JSON.parse would see it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def text_of(page: str, name: str) -> str:
    """The text of the element with an id, up to the end of its list, paragraph or table."""
    found = re.search(rf"<(\w+)[^>]*\bid=['\"]{name}['\"].*?</\1>", page, re.S)[0]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", found)))


class Tags(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# The page


def test_the_page_holds_the_heatmap_at_native_resolution():
    heatmap = heatmap_with_tests()
    data = data_of(make_page(heatmap))
    assert [block["name"] for block in data["blocks"]] == list("QKVO")
    for block in data["blocks"]:
        name = block["name"]
        assert block["heads"] == list(HEADS if name in "QO" else KV_HEADS)
        np.testing.assert_array_equal(numbers(block["values"]["score"]), heatmap.mean[name].ravel().astype("f4"))
        tests = heatmap.statistics["overlap"][name]
        keys = {"stat": "statistic", "q": "q_value", "stat_low": "ci_low", "p_max": "p_max"}
        for key, stored in (keys | {f"stat_{key}": key for key in ("null_low", "null_high")}).items():
            np.testing.assert_array_equal(numbers(block["values"][key]), tests[stored].ravel().astype("f4"))
    assert data["layers"] == list(LAYERS)
    assert data["alpha"] == 0.3


def test_overlap_is_shown_whichever_statistic_decides():
    heatmap = heatmap_with_tests()
    settings = {**heatmap.statistics["settings"], "statistic": "cross_mean"}
    values = page_data(heatmap.with_statistics({**heatmap.statistics, "settings": settings}))["blocks"][0]["values"]
    for key, stored in {"stat": ("overlap", "statistic"), "q": ("cross_mean", "q_value")}.items():
        expected = heatmap.statistics[stored[0]]["Q"][stored[1]]
        np.testing.assert_array_equal(numbers(values[key]), expected.ravel().astype("f4"))


def test_the_strongest_pair_of_each_head_is_the_stored_maximum():
    heatmap = heatmap_with_tests()
    for block in page_data(heatmap)["blocks"]:
        places = np.frombuffer(base64.b64decode(block["pairs"]), "<i4")
        flat = heatmap.cross[block["name"]].reshape(-1, NUM_A * NUM_B)
        there = present(block["name"]).ravel()
        np.testing.assert_array_equal(places[there], np.nanargmax(flat[there], axis=1))


def test_for_signed_scores_the_strongest_pair_is_the_lowest():
    heatmap = make_heatmap(attributes={"run_id": "s", "score": "signed"})
    block = page_data(heatmap)["blocks"][0]
    places = np.frombuffer(base64.b64decode(block["pairs"]), "<i4")
    there = present("Q").ravel()
    np.testing.assert_array_equal(places[there], np.nanargmin(heatmap.cross["Q"].reshape(-1, 12)[there], axis=1))


def test_the_null_is_shown_beside_every_observed_value():
    """In the page's data, its table of blocks, the table of heads, and as grey bars in the figure."""
    heatmap = heatmap_with_tests()
    page = make_page(heatmap)
    for block in data_of(page)["blocks"]:
        for name, value in (("null", 0.0625), ("null_low", -0.5), ("null_high", 0.75)):
            for key in (f"score_{name}", f"stat_{name}"):
                found = numbers(block["values"][key])
                assert set(found[~np.isnan(found)]) == {np.float32(value)}
    assert "its null 0.0625 [−0.5, 0.75]" in text_of(page, "blocks")
    assert "Compared with its null, not with 0" in text_of(page, "tested")
    rows = records(heads_table(heatmap))
    assert {(row["overlap_null_mean"], row["cross_mean_null_high"]) for row in rows} == {(0.0625, 0.75)}
    pytest.importorskip("matplotlib")
    figure = draw_blocks(heatmap)
    assert "null" in figure.legends[0].get_title().get_text()
    for axis in figure.axes:
        ends = {tuple(path.vertices[:, 1]) for lines in axis.collections for path in lines.get_paths() if len(path)}
        assert (-0.5, 0.75) in ends


def test_text_of_samples_tasks_and_warnings_is_never_markup():
    table = SampleTable((HOSTILE,) * NUM_A, np.ones(NUM_A, int), np.ones(NUM_A), (HOSTILE,) * NUM_A)
    attributes = {"run_id": HOSTILE, "score": "interference", "warnings": [HOSTILE], "notes": [HOSTILE], "x": HOSTILE}
    plain, hostile = (
        Tags(make_page(heatmap)).found
        for heatmap in (
            heatmap_with_tests(
                attributes=attributes | dict.fromkeys(("run_id", "x"), "-") | {"warnings": [""], "notes": [""]}
            ),
            heatmap_with_tests(task_a=HOSTILE, samples_a=table, attributes=attributes),
        )
    )
    assert [tag for tag, _ in hostile] == [tag for tag, _ in plain]
    data = data_of(make_page(heatmap_with_tests(samples_a=table)))
    assert data["samples"][0]["texts"][0] == HOSTILE.encode("utf-8", "backslashreplace").decode()


def test_the_page_asks_nobody_for_anything():
    page = make_page(heatmap_with_tests())
    for tag, attributes in Tags(page).found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|url\(|@import", without_namespace)


def test_the_policy_allows_this_style_and_this_script_alone():
    page = make_page(heatmap_with_tests())
    policy = next(a["content"] for tag, a in Tags(page).found if a.get("http-equiv") == "Content-Security-Policy")
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    for name, pattern in {"style-src": r"<style>(.*?)</style>", "script-src": r"<script>(.*?)</script>"}.items():
        text = re.search(pattern, page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert directives.pop(name) == f"'sha256-{digest}'"
    assert set(directives.values()) == {"'none'"}
    assert "default-src" in directives


def test_warnings_notes_and_provenance_are_on_the_page():
    page = make_page(heatmap_with_tests())
    for text in ("ridge exceeds I on 60% of Q 5.1", "é &lt;b&gt;", "few &lt;labellings&gt;", "versions.torch", "run-1"):
        assert text in page


def test_every_significant_head_travels_with_what_it_shows():
    heatmap = heatmap_with_tests()
    data = data_of(make_page(heatmap))
    names = [None, *(finding["name"] for finding in data["findings"])]
    seen = set()
    for block in data["blocks"]:
        tests = heatmap.tests[block["name"]]
        marks = {key: numbers(text, "i1") for key, text in block["marks"].items()}
        for at, (q, effect, p_max) in enumerate(
            zip(tests["q_value"].ravel(), tests["effect_size"].ravel(), tests["p_max"].ravel(), strict=True)
        ):
            expected = None if not q <= 0.3 else "contested" if effect > 0 else "apart"
            assert names[marks["found"][at]] == expected
            assert marks["family"][at] == (expected is not None and p_max <= 0.3)
            assert marks["side"][at] == (0 if np.isnan(effect) else np.sign(effect))
            seen.add(expected)
    assert seen == {None, "contested", "apart"}


def test_facts_legend_and_block_table_count_contested_and_apart_heads_alike():
    heatmap = heatmap_with_tests()
    page = make_page(heatmap)
    numbers_of = {
        name: sum(
            int(((tests["q_value"] <= 0.3) & (sign * tests["effect_size"] > 0)).sum())
            for tests in (heatmap.tests[block] for block in "QKVO")
        )
        for name, sign in {"contested": 1, "apart": -1}.items()
    }
    assert all(numbers_of.values())
    for name, number in numbers_of.items():
        assert f"{number} {name}" in re.search(r"<dt>Significant</dt><dd>(.*?)</dd>", page)[1]
        assert f"{name} {number} head" in text_of(page, "marks")
        assert sum(row[name] for row in records(blocks_table(heatmap))) == number
        assert sum(row[name] for row in records(layers_table(heatmap))) == number
        assert sum(row["finding"] == name for row in records(heads_table(heatmap))) == number
    assert "(overlap, two-sided, q ≤ 0.3)" in page


def test_signed_scores_have_words_of_their_own():
    heatmap = signed_heatmap()
    table = records(heads_table(heatmap))
    assert {row["finding"] for row in table} == {None, "synergy", "conflict", "weaker", "milder"}
    for row in table:
        if row["finding"] is not None:
            assert (row["finding"] in ("synergy", "milder")) == (row["cross_mean_direction"] == "above")
            assert (row["finding"] in ("conflict", "milder")) == (row["score_mean"] < 0)
    shown = text_of(make_page(heatmap), "blocks")
    assert all(word in shown for word in ("▲ synergy", "▼ conflict", "■ weaker", "◆ milder"))


def test_the_page_says_how_heads_were_tested():
    settings = {
        "statistic": "overlap",
        "alternative": "two-sided",
        "method": "monte-carlo",
        "n_labellings": 5401,
        "seed": 17,
        "n_a": NUM_A,
        "n_b": NUM_B,
        "exactly_exchangeable": False,
    }
    heatmap = heatmap_with_tests()
    said = text_of(make_page(heatmap.with_statistics({**heatmap.statistics, "settings": settings})), "tested")
    for part in (
        "two-sided",
        "5,400 random labellings",
        "(seed 17)",
        "4 + 3 samples",
        "0.00019",
        "nearly, not exactly",
    ):
        assert part in said
    assert 'id="tested"' not in make_page(make_heatmap())


def test_whose_fisher_it_is_stands_in_the_table_of_blocks():
    heatmap = heatmap_with_tests()
    shown = text_of(make_page(heatmap), "blocks")
    assert "Median Fisher share of math" in shown
    for row in records(blocks_table(heatmap)):
        share = heatmap.fisher[row["block"]]["share_a"]
        assert row["share_a_median"] == np.nanmedian(share)
        assert f"{np.nanmedian(share):.4g} {np.nanmin(share):.4g} to {np.nanmax(share):.4g}" in shown


@pytest.mark.parametrize("is_named", [True, False])
def test_a_file_that_does_not_know_whose_fisher_it_is_has_no_such_column_and_no_such_view(is_named):
    heatmap = make_heatmap()
    for parts in heatmap.fisher.values():
        parts["share_a"] = np.full_like(parts["mean"], np.nan)
        if not is_named:
            del parts["share_a"]
    page = make_page(heatmap)
    assert "Fisher share" not in text_of(page, "blocks")
    assert all("share" not in block["values"] for block in data_of(page)["blocks"])
    assert {row["share_a"] for row in records(heads_table(heatmap))} == {None}


def test_a_bias_of_o_is_shown_by_layer_where_there_is_one():
    heatmap = make_heatmap()
    page = make_page(heatmap)
    shown = text_of(page, "shared-table")
    for layer, mean in zip(LAYERS, heatmap.shared["O_bias"]["mean"], strict=True):
        assert f"O_bias {layer} {mean:.4g}" in shown
    np.testing.assert_array_equal(
        numbers(data_of(page)["shared"]["O_bias"]), heatmap.shared["O_bias"]["mean"].astype("f4")
    )
    assert "belongs to no head" in text_of(page, "shared")
    without = dataclasses.replace(heatmap, shared={})
    assert 'id="shared"' not in make_page(without)
    assert "shared" not in {table.name for table in all_tables(without)}


def test_eighty_layers_of_64_heads_stay_below_5_mb():
    page = make_page(large_heatmap())
    assert len(page.encode()) < 5_000_000
    texts = data_of(page)["samples"][0]["texts"]
    assert texts[0].endswith("… [1,000,000 characters in all]")


@pytest.mark.parametrize("changes", [{"cross": None, "pooled": None}, {"attributes": {}}])
def test_a_heatmap_without_pairs_tests_or_attributes_has_a_page(changes):
    heatmap = make_heatmap(**changes)
    data = data_of(make_page(heatmap))
    assert data["statistic"] is None
    assert bool(data["conflicts"]) == (heatmap.cross is not None)
    assert all(table.to_csv() and table.to_markdown() for table in all_tables(heatmap))


# Tables


def test_heads_are_listed_strongest_first_with_their_tests():
    heatmap = heatmap_with_tests()
    table = heads_table(heatmap)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert len(rows) == sum(int(present(block).sum()) for block in "QKVO")
    scores = [row["score_mean"] for row in rows if row["block"] == "V"]
    assert scores == sorted(scores, reverse=True)
    row = next(row for row in rows if (row["block"], row["layer"], row["head"]) == ("Q", 5, 3))
    assert row["kv_head"] == 1  # two query heads of one kv head in layer 5
    assert row["share_a"] == heatmap.fisher["Q"]["share_a"][1, 3]
    for name in ("overlap", "cross_mean"):
        tests = heatmap.statistics[name]["Q"]
        for key in ("q_value", "p_greater", "p_less"):
            assert row[f"{name}_{key}"] == tests[key][1, 3]
        assert row[f"{name}_direction"] == ("above" if tests["effect_size"][1, 3] > 0 else "below")


def test_a_finding_is_named_in_csv_and_markdown():
    table = heads_table(heatmap_with_tests())
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert {line["finding"] for line in lines} == {"contested", "apart", ""}
    assert {line["overlap_direction"] for line in lines} == {"above", "below"}
    assert "| contested |" in table.to_markdown()


def test_older_tests_without_one_sided_p_values_leave_these_cells_empty():
    heatmap = heatmap_with_tests()
    for block in "QKVO":
        for key in ("p_greater", "p_less"):
            del heatmap.statistics["overlap"][block][key]
    rows = records(heads_table(heatmap))
    assert {row["overlap_p_less"] for row in rows} == {None}
    assert {row["overlap_direction"] for row in rows} == {"above", "below"}


def test_blocks_and_layers_sum_up_what_is_stored():
    heatmap = heatmap_with_tests()
    rows = {row[0]: dict(zip(blocks_table(heatmap).columns, row, strict=True)) for row in blocks_table(heatmap).rows}
    overlap = heatmap.statistics["overlap"]["V"]
    assert rows["V"]["layers"] == 2
    assert rows["V"]["score_mean"] == np.nanmean(heatmap.mean["V"])
    assert rows["V"]["overlap_largest"] == np.nanmax(overlap["statistic"])
    assert rows["V"]["overlap_largest_ci_high"] == pytest.approx(np.nanmax(overlap["statistic"]) + 0.1)
    assert rows["V"]["overlap_lowest"] == np.nanmin(overlap["statistic"])
    layer, head = np.unravel_index(np.nanargmin(overlap["statistic"]), overlap["statistic"].shape)
    assert (rows["V"]["overlap_lowest_layer"], rows["V"]["overlap_lowest_head"]) == (LAYERS[layer], KV_HEADS[head])
    assert rows["V"]["significant"] == int((overlap["q_value"] <= 0.3).sum())
    layers = layers_table(heatmap)
    assert ("V", 7) not in {row[:2] for row in layers.rows}  # no V heads there
    assert dict(zip(layers.columns, layers.rows[1], strict=True))["score_mean"] == np.nanmean(heatmap.mean["Q"][1])


def test_conflicts_come_with_texts_and_token_counts():
    heatmap = heatmap_with_tests()
    table = conflicts_table(heatmap)
    first = dict(zip(table.columns, table.rows[0], strict=True))
    top = heatmap["Q"].top_excesses(1)[0]
    for key in ("score", "excess", "id_a", "id_b", "layer", "head"):
        assert first[key] == top[key]
    assert first["text_b"] == heatmap.samples_b.texts[top["sample_j"]]
    assert first["tokens_a"] == heatmap.samples_a.num_tokens[top["sample_i"]]
    heads = {(row["block"], row["layer"], row["head"]): row["finding"] for row in records(heads_table(heatmap))}
    for row in records(table):
        assert row["finding"] == heads[row["block"], row["layer"], row["head"]]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", '=HYPERLINK("x","y")'])
def test_a_spreadsheet_runs_no_text(text):
    cells = list(csv.reader(io.StringIO(Table("t", (text,), ((text, -1.5, 2, None),)).to_csv(), newline="")))
    assert cells[1] == [f"'{text}", "-1.5", "2", ""]
    assert cells[0] == [f"'{text}"]


def test_markdown_cells_hold_no_markup():
    text = Table("t", ("a|b",), (("a | b\n<b>*x*</b> `c` [l](u)",), ("long " * 99,), (0.123456,))).to_markdown()
    lines = text.splitlines()
    assert lines[0] == r"| a\|b |"
    assert lines[2] == r"| a \| b \<b\>\*x\*\</b\> \`c\` \[l\](u) |"
    assert len(lines[3]) < 100
    assert lines[4] == "| 0.1235 |"


# Figures


def test_marks_of_a_figure_are_squares_for_contested_heads_and_diamonds_for_heads_apart():
    pytest.importorskip("matplotlib")
    heatmap = heatmap_with_tests()
    figure = draw_heatmaps(heatmap)
    for axis, block in zip(figure.axes, "QKVO", strict=False):
        marked = {"contested": set(), "apart": set()}
        for marks in axis.collections:
            corners = marks.get_paths()[0].vertices[:4].round(6)
            is_square = len(set(corners[:, 0])) == 2
            marked["contested" if is_square else "apart"] |= {tuple(place) for place in marks.get_offsets().tolist()}
        tests = heatmap.tests[block]
        for name, sign in {"contested": 1, "apart": -1}.items():
            layers, heads = np.nonzero((tests["q_value"] <= 0.3) & (sign * tests["effect_size"] > 0))
            assert marked[name] == set(zip(heads, layers, strict=True))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.partition(":")[0] for text in legend] == ["contested", "apart"]
    assert "two-sided" in figure.legends[0].get_title().get_text()


# Files


def saved(folder: Path) -> Path:
    heatmap_with_tests().save(folder / "heatmap.h5")
    return folder


@pytest.mark.long
def test_the_command_writes_page_tables_and_figures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert main(["report", str(saved(tmp_path))]) == 0
    printed = capsys.readouterr()
    assert str(tmp_path / "report.html") in printed.out
    names = {path.name for path in (tmp_path / "report").iterdir()}
    tables = {
        f"{name}.{kind}" for name in ("heads", "blocks", "layers", "conflicts", "shared") for kind in ("csv", "md")
    }
    assert names == tables | {f"{name}.{kind}" for name in ("heatmaps", "blocks", "layers") for kind in ("pdf", "png")}
    assert (tmp_path / "report" / "heatmaps.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "report" / "layers.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path)]) == 0  # its own page may be written again


def test_without_matplotlib_the_page_is_written_and_the_lack_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    assert write_report(saved(tmp_path), said.append).exists()
    assert any("matplotlib" in line and "qkov-dist[report]" in line for line in said)
    assert not list((tmp_path / "report").glob("*.p*"))


def test_a_page_of_another_run_is_not_overwritten(tmp_path):
    write_page(make_heatmap(), tmp_path)
    other = dataclasses.replace(make_heatmap(), attributes={"run_id": "run-2"})
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(QkovError, match="run-2"):
        write_page(other, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_folder_without_a_heatmap_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "heatmap.h5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_samples_without_text_have_a_page():
    table = dataclasses.replace(make_table("a", NUM_A), texts=("",) * NUM_A, losses=np.full(NUM_A, np.nan))
    assert data_of(make_page(make_heatmap(samples_a=table)))["samples"][0]["losses"] == [None] * NUM_A


def test_numbers_of_the_page_are_float32s_and_larger_ones_stay_finite():
    assert round_to_float32(1 / 3) == 0.33333334
    assert round_to_float32(-1e300) == -1e300
