"""Effects in a report, without a browser: the page begins with the answer, and all numbers are the heatmap's."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from heatmaps import NUM_A, heatmap_with_tests, large_heatmap, make_table
from influences import heatmap_with_effects
from pages import numbers, records
from selections import heatmap_with_slices

from qkov_dist.cli import main
from qkov_dist.report.effect_figures import draw_changes, draw_waterfall
from qkov_dist.report.effect_findings import effect_counts, effect_name, found_by_change, is_family_wise_change
from qkov_dist.report.figures import figures
from qkov_dist.report.findings import about_intervals
from qkov_dist.report.page import make_page, page_data
from qkov_dist.report.summary import print_summary
from qkov_dist.report.tables import all_tables, blocks_table, heads_table, layers_table
from qkov_dist.results.effects import EFFECT_KEYS, UNTESTED_KEYS
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import SampleTable
from qkov_dist.results.heatmap_file import load_heatmap

OPTIMIZERS = ("sgd", "adam")
HOSTILE = "</h2><script>alert(1)</script> {{data}}"


def shown_text(page: str, name: str) -> str:
    """The text of the section with an id."""
    found = re.search(rf'<section id="{name}".*?</section>', page, re.S)[0]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", found)))


def expected(heatmap: Heatmap, block: str, optimizer: str) -> np.ndarray:
    """What each head shows, by the definition: conflict or synergy where q is at most alpha."""
    arrays = heatmap.effects[block][optimizer]
    words = np.where(arrays["change"] > 0, "conflict", "synergy")
    return np.where(arrays["q_value"] <= 0.3, words, "")


# Findings


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_head_is_in_conflict_above_0_and_in_synergy_below(optimizer: str) -> None:
    heatmap = heatmap_with_effects()
    seen: list[str] = []
    for block in heatmap.blocks:
        words, p_max = expected(heatmap, block, optimizer), heatmap.effects[block][optimizer]["p_max"]
        codes, family = (find(heatmap, block, optimizer) for find in (found_by_change, is_family_wise_change))
        for at in np.ndindex(codes.shape):
            assert (effect_name(int(codes[at])) or "") == words[at]
            assert family[at] == (words[at] != "" and p_max[at] <= 0.3)
            seen.append(str(words[at]))
    counts = {finding.name: number for finding, number in effect_counts(heatmap, optimizer).items()}
    assert counts == {name: seen.count(name) for name in ("conflict", "synergy")}
    assert all(counts.values())


def without_tests_of_effects() -> Heatmap:
    heatmap = heatmap_with_effects()
    effects = {
        block: {opt: {key: arrays[key] for key in UNTESTED_KEYS} for opt, arrays in of_block.items()}
        for block, of_block in heatmap.effects.items()
    }
    return heatmap.with_effects(effects)


@pytest.mark.parametrize("make", [heatmap_with_tests, without_tests_of_effects])
def test_where_effects_are_not_known_or_not_tested_nothing_is_said_of_them(make, capsys, tmp_path) -> None:
    heatmap = make()
    assert heatmap.verdict is None
    assert page_data(heatmap)["effects"] is None
    assert 'id="answer"' not in make_page(heatmap)
    assert not any("_adam" in name for table in all_tables(heatmap) for name in table.columns)
    print_summary(heatmap, tmp_path)
    assert capsys.readouterr().out.lstrip().startswith("math x cøde: strongest heads")
    assert not found_by_change(heatmap, "Q").any()
    assert not is_family_wise_change(heatmap, "Q").any()
    assert effect_counts(heatmap) == {}


# The page


def test_the_page_begins_with_the_answer_and_says_what_to_do_next() -> None:
    heatmap = heatmap_with_effects()
    page = make_page(heatmap)
    verdict = heatmap.verdict
    shown = shown_text(page, "answer").replace("−", "-").replace("≤", "<=").replace("rate × number", "rate x number")
    for text in (*verdict.sentences[:2], *verdict.details, *(action.why for action in verdict.actions)):
        assert text in shown
    assert all(action.command in shown for action in verdict.actions)
    assert page.index('id="answer"') < min(page.index(f'id="{name}"') for name in ("ranked", "maps", "sums"))
    significant = [
        f"{block} {heatmap.layers[layer]}.{heatmap.natives(block)[head]}"
        for block, arrays in ((block, heatmap.effects[block]["adam"]) for block in heatmap.blocks)
        for layer, head in np.argwhere((arrays["q_value"] <= 0.3) & (arrays["change"] > 0))
    ]
    assert 0 < len(significant) <= 6
    for name in set(significant) & {*verdict.carriers[:5]}:
        assert f'<a href="#{name.replace(" ", ".")}">{name}</a>' in page


def test_two_vocabularies_have_signs_of_their_own_and_the_second_stands_below_the_first_view() -> None:
    page = make_page(heatmap_with_effects())
    answer, weights = shown_text(page, "answer"), shown_text(page, "same-weights")
    assert "contested" not in answer
    assert "<dt>Significant</dt>" not in page
    assert "■ contested : the tasks use the same weights more than" in weights
    assert "◆ apart : they do so less" in weights
    effects = re.search(r'<ul class="legend-marks" id="effect-marks">.*?</ul>', page, re.S)[0]
    assert set("▲▼") <= set(effects)
    assert not set("▲▼") & set(re.search(r'<ul class="legend-marks" id="marks">.*?</ul>', page, re.S)[0])


def test_beside_intervals_of_overlap_it_is_said_what_they_hold() -> None:
    said = about_intervals(heatmap_with_effects())
    assert "need not hold the value" in said
    page = make_page(heatmap_with_effects())
    assert said in shown_text(page, "block-comparison")
    assert page_data(heatmap_with_effects())["intervals_beside"] == said
    assert about_intervals(dataclasses.replace(heatmap_with_effects(), statistics=None)) == ""


def test_a_file_that_knows_no_effects_shows_what_it_showed() -> None:
    page = make_page(heatmap_with_tests())
    for name in ("answer", "ranked", "sums", "same-weights", "effect-marks"):
        assert f'id="{name}"' not in page


def test_the_numbers_of_the_page_are_those_of_the_heatmap() -> None:
    heatmap = heatmap_with_effects()
    data = page_data(heatmap)
    for block in data["blocks"]:
        for optimizer, packed in block["effects"].items():
            stored = heatmap.effects[block["name"]][optimizer]
            same = {"change": "change", "q": "q_value", "p_max": "p_max"}
            for key, name in (same | {f"curvature_{task}": f"curvature_along_{task}" for task in "ab"}).items():
                np.testing.assert_array_equal(numbers(packed[key]), stored[name].ravel().astype("f4"))
            change, width = numbers(packed["change"]), numbers(packed["width"])
            np.testing.assert_allclose(change + width, stored["ci_high"].ravel(), rtol=1e-5)
            np.testing.assert_allclose(change - width, stored["ci_low"].ravel(), rtol=1e-5)
            names = [effect_name(code) or "" for code in numbers(packed["found"], "i1")]
            assert names == expected(heatmap, block["name"], optimizer).ravel().tolist()
    for optimizer, totals in data["effects"]["totals"].items():
        whole = heatmap.total_effect(optimizer)
        assert totals["all"] == pytest.approx([whole.change, *whole.interval], rel=1e-5)
        for parts in (totals["blocks"], totals["layers"]):
            assert sum(change for change, *_ in parts) == pytest.approx(whole.change, rel=1e-4)
        for layer, part in zip(heatmap.layers, totals["layers"], strict=True):
            found = heatmap.total_effect(optimizer, layer=layer)
            assert part == pytest.approx([found.change, *found.interval], rel=1e-5)


def test_a_file_without_the_curvature_along_a_step_has_the_same_page(tmp_path) -> None:
    heatmap = heatmap_with_effects()
    older = heatmap.with_effects(
        {
            block: {
                optimizer: {key: values for key, values in arrays.items() if "along" not in key}
                for optimizer, arrays in of_block.items()
            }
            for block, of_block in heatmap.effects.items()
        }
    )
    assert make_page(older) == make_page(heatmap)
    assert {row["curvature_along_a_adam"] for row in records(heads_table(older))} == {None}


def test_names_of_tasks_are_never_markup() -> None:
    plain, hostile = heatmap_with_effects(), heatmap_with_effects(task_a=HOSTILE, task_b=HOSTILE)
    assert _tags(make_page(hostile)) == _tags(make_page(plain))


def _tags(page: str) -> list[str]:
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    return found


def test_where_every_head_lies_is_not_listed() -> None:
    heatmap = heatmap_with_slices()
    assert "q_proj.weight" in str(heatmap.attributes)
    assert "q_proj.weight" not in make_page(heatmap)


def test_effects_without_errors_have_a_page() -> None:
    one = {"samples_b": make_table("b", 1)}
    base = heatmap_with_tests()
    pooled = {block: scores[..., : NUM_A + 1, : NUM_A + 1] for block, scores in base.pooled.items()}
    cross = {block: scores[..., :1] for block, scores in base.cross.items()}
    page = make_page(heatmap_with_effects(**one, pooled=pooled, cross=cross))
    assert "fewer than two samples" in shown_text(page, "answer")
    assert "NaN" not in page[page.index('id="data"') :].partition("</script>")[0]


def test_eighty_layers_of_64_heads_with_effects_stay_below_5_mb() -> None:
    heatmap, rng = large_heatmap(), np.random.default_rng(0)
    contents = {f"samples_{task}": with_contents(heatmap.samples_a, task) for task in "ab"}
    shape = heatmap.mean["Q"].shape
    influences = {block: rng.normal(size=(*shape, 2, 8)) for block in "QKVO"}
    effects = {b: {opt: {key: rng.random(shape) for key in EFFECT_KEYS} for opt in OPTIMIZERS} for b in "QKVO"}
    page = make_page(dataclasses.replace(heatmap, influences=influences, effects=effects, **contents))
    assert len(page.encode()) < 5_000_000
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["effects"]["step"] > 0


def with_contents(table: SampleTable, task: str) -> SampleTable:
    return dataclasses.replace(table, contents=tuple(f"{task}{place}" for place in range(len(table))))


# Tables


def test_the_table_of_heads_has_the_columns_of_pandas_most_harmful_first() -> None:
    heatmap = heatmap_with_effects()
    table = records(heads_table(heatmap))
    frame = heatmap.to_pandas().set_index(["block", "layer", "head"])
    for row in table:
        stored = frame.loc[row["block"], row["layer"], row["head"]]
        for optimizer in OPTIMIZERS:
            for key in EFFECT_KEYS:
                assert row[f"{key}_{optimizer}"] == stored[f"{key}_{optimizer}"]
            significant = stored[f"q_value_{optimizer}"] <= 0.3
            name = "conflict" if row[f"change_{optimizer}"] > 0 else "synergy"
            assert row[f"finding_{optimizer}"] == (name if significant else None)
    changes = [row["change_adam"] for row in table]
    assert changes == sorted(changes, reverse=True)
    assert len(table) == len(frame)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_blocks_and_layers_add_up_with_errors_of_their_own(optimizer: str) -> None:
    heatmap = heatmap_with_effects()
    whole = heatmap.total_effect(optimizer)
    for table in (blocks_table(heatmap), layers_table(heatmap)):
        rows = records(table)
        for key, value in {"change": whole.change, "curvature_a": whole.curvature["a"]}.items():
            assert sum(row[f"{key}_{optimizer}"] for row in rows) == pytest.approx(value)
        for row in rows:
            found = heatmap.total_effect(optimizer, row["block"], row.get("layer"))
            assert row[f"standard_error_{optimizer}"] == found.standard_error
            assert (row[f"ci_low_{optimizer}"], row[f"ci_high_{optimizer}"]) == found.interval
            assert row[f"own_b_{optimizer}"] == found.own["b"]
            assert row[f"curvature_along_a_{optimizer}"] == found.curvature_along["a"]
        conflicts = sum((expected(heatmap, block, optimizer) == "conflict").sum() for block in heatmap.blocks)
        assert sum(row[f"conflict_{optimizer}"] for row in rows) == conflicts


# Figures and terminal


@pytest.mark.long
def test_every_figure_says_model_tasks_and_samples() -> None:
    pytest.importorskip("matplotlib")
    config = {"model": {"path": "hub/small-model/"}}
    heatmap = heatmap_with_effects(attributes={"run_id": "r", "score": "interference", "config": config})
    assert draw_changes(heatmap).get_suptitle() == "small-model: math (4) × cøde (3)"
    names = {name for name, _ in figures(heatmap)}
    assert {"changes.pdf", "waterfall.png"} < names
    assert not {"changes.png", "waterfall.png"} & {name for name, _ in figures(heatmap_with_tests(), ["png"])}


def test_marks_of_changes_point_up_for_conflict_and_down_for_synergy() -> None:
    pytest.importorskip("matplotlib")
    heatmap = heatmap_with_effects()
    panels = [axis for axis in draw_changes(heatmap).axes if axis.images]
    for axis, (optimizer, block) in zip(panels, ((o, b) for o in ("adam", "sgd") for b in "QKVO"), strict=True):
        marked = {"conflict": set(), "synergy": set()}
        for marks in axis.collections:
            corners = marks.get_paths()[0].vertices[:3].round(6)
            is_up = (corners[:, 1] == corners[:, 1].max()).sum() == 1
            marked["conflict" if is_up else "synergy"] |= {tuple(place) for place in marks.get_offsets().tolist()}
        words = expected(heatmap, block, optimizer)
        for name, places in marked.items():
            assert places == {(head, layer) for layer, head in np.argwhere(words == name).tolist()}


def test_a_waterfall_ends_where_all_of_attention_ends() -> None:
    pytest.importorskip("matplotlib")
    heatmap = heatmap_with_effects()
    whole = heatmap.total_effect("adam")
    for axis in draw_waterfall(heatmap).axes:
        *parts, last = axis.patches
        assert last.get_height() == pytest.approx(whole.change)
        assert parts[-1].get_y() + parts[-1].get_height() == pytest.approx(whole.change)
        ends = axis.collections[0].get_segments()[-1][:, 1]
        assert ends == pytest.approx(whole.interval)


def test_a_run_prints_the_answer_first(capsys, tmp_path) -> None:
    heatmap = heatmap_with_effects()
    print_summary(heatmap, tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(heatmap.verdict.sentences[0])
    for action in heatmap.verdict.actions:
        assert action.why in printed
        assert action.command in printed


def test_what_to_do_next_can_be_done(capsys, tmp_path) -> None:
    heatmap = heatmap_with_slices()
    heatmap = dataclasses.replace(
        heatmap, attributes={**heatmap.attributes, "config": {"output": {"dir": str(tmp_path)}}}
    )
    heatmap.save(tmp_path / "heatmap.h5")
    actions = [action.command for action in heatmap.verdict.actions]
    listed = [shlex.split(command)[1:] for command in actions if command.startswith("qkov heads")]
    assert len(listed) == 2
    for command in listed:
        assert main(command) == 0
        assert "most harmful first" in capsys.readouterr().out
    (line,) = (command for command in actions if command.startswith("with freeze_heads"))
    asked = re.search(r"load_heatmap.*\)(?=\): )", line)[0]
    conflicts = next(number for finding, number in effect_counts(heatmap).items() if finding.name == "conflict")
    assert len(eval(asked, {"load_heatmap": load_heatmap}).heads) == conflicts
