"""Heads ranked by each criterion, most harmful first, and chosen; as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from heatmaps import ATTRIBUTES, make_heatmap, signed_heatmap
from influences import heatmap_with_effects
from selections import heatmap_with_slices

from qkov_dist import QkovError, Selection
from qkov_dist.results.head_slices import HeadRange


@pytest.fixture(scope="module")
def heatmap():
    return heatmap_with_slices()


def by_hand(heatmap, arrays):
    """(block, layer, head, value) of arrays [layer, head], largest first."""
    found = [
        (block, heatmap.layers[layer], heatmap.natives(block)[head], values[layer, head])
        for block, values in arrays.items()
        for layer, head in np.argwhere(heatmap.present[block])
    ]
    return sorted(found, key=lambda head: -head[3])


CRITERIA = {
    "change_adam": lambda h: {b: h.effects[b]["adam"]["change"] for b in h},
    "change_sgd": lambda h: {b: h.effects[b]["sgd"]["change"] for b in h},
    "curvature": lambda h: {b: h.effects[b]["adam"]["curvature_a"] for b in h},
    "interference": lambda h: h.mean,
    "overlap": lambda h: {b: h.statistics["overlap"][b]["statistic"] for b in h},
}


@pytest.mark.parametrize("by", CRITERIA)
def test_all_heads_come_most_harmful_first(heatmap, by):
    expected = by_hand(heatmap, CRITERIA[by](heatmap))
    found = heatmap.select(by).heads
    assert [(head.block, head.layer, head.head, head.value) for head in found] == expected
    assert len(found) == sum(mask.sum() for mask in heatmap.present.values())


def test_harm_and_curvature_are_of_the_task_and_optimizer_asked_for(heatmap):
    found = heatmap.select("curvature", harms="B", optimizer="sgd")
    by_b = by_hand(heatmap, {block: heatmap.effects[block]["sgd"]["curvature_b"] for block in heatmap})
    assert [head.value for head in found.heads] == [value for *_, value in by_b]
    assert found.settings["harms"] == "B"
    for harms, optimizer in (("A", None), ("b", "sgd")):
        found = heatmap.select("harm", step=0.1, harms=harms, optimizer=optimizer)
        harm = heatmap.harm(0.1, optimizer or "adam", harms)
        assert [head.value for head in found.heads] == [value for *_, value in by_hand(heatmap, harm.value)]
        assert found.settings["step"] == 0.1
    assert all(head.q_value is None for head in found.heads)


def test_the_first_a_part_or_some_blocks(heatmap):
    every = heatmap.select()
    num = len(every)
    assert heatmap.select(top=3).heads == every.heads[:3]
    assert heatmap.select(top=10**6).heads == every.heads
    assert heatmap.select(share=0.25).heads == every.heads[: round(num / 4)]
    assert heatmap.select(share=1e-9).heads == every.heads[:1]
    kv = heatmap.select(blocks="v, k", share=0.5)
    assert kv.heads == tuple(head for head in every.heads if head.block in "KV")[: len(kv)]
    assert len(kv) == round(sum(heatmap.present[block].sum() for block in "KV") / 2)
    assert heatmap.select(blocks=["K", "V"]).settings["blocks"] == ["K", "V"]


@pytest.mark.parametrize(
    ("by", "tests", "side"),
    [
        ("change_sgd", lambda h, b: h.effects[b]["sgd"], "change"),
        ("overlap", lambda h, b: h.statistics["overlap"][b], "effect_size"),
        ("interference", lambda h, b: h.statistics["cross_mean"][b], "effect_size"),
    ],
)
def test_significant_heads_lie_on_the_harmful_side(heatmap, by, tests, side):
    found = {(head.block, head.layer, head.head): head.q_value for head in heatmap.select(by, significant=True).heads}
    expected = {}
    for block in heatmap:
        arrays = tests(heatmap, block)
        for layer, head in np.argwhere((arrays["q_value"] <= heatmap.fdr_alpha) & (arrays[side] > 0)):
            key = (block, heatmap.layers[layer], heatmap.natives(block)[head])
            expected[key] = arrays["q_value"][layer, head]
    assert found == expected
    assert (
        0 < len(expected) < sum((tests(heatmap, block)["q_value"] <= heatmap.fdr_alpha).sum() for block in heatmap)
    )  # some lie on the other side


def test_the_level_is_that_of_the_test_or_else_of_the_configuration(heatmap):
    assert heatmap.fdr_alpha == 0.3
    untested = dataclasses.replace(heatmap, statistics=None)
    assert untested.fdr_alpha == 0.05
    config = {"statistics": {"fdr_alpha": 0.2}}
    assert dataclasses.replace(untested, attributes={**ATTRIBUTES, "config": config}).fdr_alpha == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "harms"}, "by: expected one of harm, change_adam"),
        ({"by": "harm"}, "step: expected learning rate times number of steps, got None"),
        ({"by": "harm", "step": -1.0}, "step: expected a finite number above 0"),
        ({"step": 1.0}, "step: expected one for harm alone"),
        ({"optimizer": "sgd"}, "optimizer: expected one for harm and curvature alone"),
        ({"by": "curvature", "optimizer": "lion"}, "optimizer: expected one of sgd, adam"),
        ({"harms": "C"}, "harms: expected one of a, b"),
        ({"top": 0}, "top: expected a whole number of at least 1"),
        ({"top": True}, "top: expected a whole number of at least 1"),
        ({"share": 0.0}, "share: expected a number above 0 and up to 1"),
        ({"share": 1.5}, "share: expected a number above 0 and up to 1"),
        ({"share": float("nan")}, "share: expected a number above 0 and up to 1"),
        ({"top": 1, "significant": True}, "top, share, significant: expected one of them"),
        ({"by": "curvature", "significant": True}, "significant: expected a criterion with q-values"),
        ({"blocks": "Q,X"}, "blocks: expected some of Q, K, V, O"),
        ({"blocks": []}, "blocks: expected some of Q, K, V, O"),
    ],
)
def test_arguments_that_mean_nothing_are_named(heatmap, arguments, message):
    with pytest.raises(QkovError) as caught:
        heatmap.select(**arguments)
    assert str(caught.value).startswith(message)


def test_what_a_heatmap_lacks_is_said():
    old = make_heatmap()
    with pytest.raises(QkovError, match=r"heatmap\.effects.*before effects were"):
        old.select()
    with pytest.raises(QkovError, match=r"heatmap\.effects.*before effects were"):
        old.select("harm", step=1.0)
    with pytest.raises(QkovError, match="a test of overlap"):
        old.select("overlap")
    with pytest.raises(QkovError, match="expected scores of interference, got signed"):
        signed_heatmap().select("interference")
    assert old.select("interference", top=1).heads[0].q_value is None  # it needs no test
    with pytest.raises(QkovError, match="q-values"):
        old.select("interference", significant=True)


def test_json_has_an_entry_for_each_rectangle_and_comes_back(heatmap, tmp_path):
    selection = heatmap.select("change_adam", blocks="K,O")
    raw = selection.to_json(tmp_path / "heads.json")
    assert json.loads((tmp_path / "heads.json").read_text()) == raw
    assert {(head.block, len(head.ranges)) for head in selection.heads} == {("K", 2), ("O", 1)}
    first = next(entry for entry in raw["heads"] if entry["block"] == "O")
    assert first.keys() == {"block", "layer", "head", "value", "q_value", "parameter", "cols"}
    assert all(("rows" in entry) == (entry["block"] == "K") for entry in raw["heads"])
    assert Selection.from_json(tmp_path / "heads.json") == selection
    none = dataclasses.replace(selection, heads=())  # as where nothing is significant
    none.to_json(tmp_path / "none.json")
    assert Selection.from_json(tmp_path / "none.json") == none


def test_other_programs_write_less_or_more(tmp_path):
    entry = {"block": "Q", "layer": 3, "head": 1, "value": 2, "parameter": "q.weight", "rows": [8, 16], "note": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps({"by": "mine", "heads": [entry], "more": 1}))
    (head,) = Selection.from_json(tmp_path / "mine.json").heads
    assert head.ranges == (HeadRange("q.weight", "rows", 8, 16),)
    assert (head.value, head.q_value) == (2.0, None)


@pytest.mark.parametrize(
    "change",
    [
        {"block": "X"},
        {"layer": -1},
        {"head": 1.5},
        {"value": "much"},
        {"parameter": 3},
        {"rows": [16, 8]},
        {"rows": [0, 8, 16]},
        {"cols": [0, 8]},
    ],
)
def test_what_is_no_selection_is_refused_by_its_file(tmp_path, change):
    entry = {"block": "Q", "layer": 3, "head": 1, "value": 2, "parameter": "q.weight", "rows": [8, 16]}
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"by": "mine", "heads": [{**entry, **change}]}))
    with pytest.raises(QkovError, match=r"wrong\.json: expected heads as `qkov heads --format json` writes them"):
        Selection.from_json(path)


@pytest.mark.parametrize("text", ["", "[]", '{"by": "x"}', "{" * 10])
def test_what_is_no_json_of_heads_is_refused(tmp_path, text):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(QkovError, match=r"wrong\.json"):
        Selection.from_json(tmp_path / "wrong.json")
    with pytest.raises(QkovError, match=r"gone\.json"):
        Selection.from_json(tmp_path / "gone.json")


def test_as_text_and_in_a_notebook(heatmap):
    selection = heatmap.select("overlap", top=2)
    lines = str(selection).splitlines()
    assert lines[0].split() == ["block", "layer", "head", "overlap", "q_value", "weights"]
    assert len(lines) == 4
    assert ".weight[" in lines[2]
    assert "<p>2 heads by overlap</p><table>" in selection._repr_html_()
    assert str(dataclasses.replace(selection, heads=())) == "no head"


def test_a_file_that_does_not_say_where_heads_lie_is_ranked_but_not_acted_on():
    selection = heatmap_with_effects().select(top=2)
    assert len(selection) == 2
    with pytest.raises(QkovError, match="where each head lies"):
        selection.to_json()
