"""The heatmap in memory: query-head views against loops, top conflicts against a full sort, exports."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
import sys

import numpy as np
import pytest
from heatmaps import GROUPS, HEADS, KV_HEADS, LAYERS, NUM_A, NUM_B, NUM_HEADS, make_heatmap, make_statistics, present
from influences import heatmap_with_effects

from qkov_dist.errors import QkovError
from qkov_dist.results.block_view import BlockView
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import SampleTable


def sorted_conflicts(heatmap: Heatmap, block: str, sign: int) -> list[tuple[float, int, int, int, int]]:
    scores = heatmap.cross[block]
    order = sorted(
        (-sign * float(scores[place]), *place) for place in np.ndindex(scores.shape) if not np.isnan(scores[place])
    )
    return [(-sign * score, *place) for score, *place in order]


@pytest.mark.parametrize("block", ["Q", "K", "V", "O"])
def test_query_head_view_repeats_the_kv_head_of_each_query_head(block: str) -> None:
    heatmap = make_heatmap()
    scores, average = heatmap[block]["scores"], heatmap[block]["layer_head_avg"]
    assert scores.shape == (NUM_A, NUM_B, len(LAYERS), len(HEADS))
    assert average.shape == (len(LAYERS), len(HEADS))
    assert average.dtype == np.float64
    for layer in range(len(LAYERS)):
        for place, head in enumerate(HEADS):
            native = head if block in "QO" else head // GROUPS[layer]
            exists = head < NUM_HEADS[layer] and not (block == "V" and LAYERS[layer] == 7)
            if exists:
                np.testing.assert_array_equal(scores[:, :, layer, place], heatmap.cross[block][layer, native])
                assert average[layer, place] == heatmap.mean[block][layer, native]
            else:
                assert np.isnan(scores[:, :, layer, place]).all()
                assert np.isnan(average[layer, place])


def test_kv_heads_of_selected_query_heads_are_found_by_number_in_any_order() -> None:
    """With heads 5 and 2 of groups of 2, the kv heads are 2 and 1, here stored as (2, 1)."""
    view = BlockView(
        "K", (0,), (5, 2, 0), (2, 1), np.array([2]), np.array([[20.0, 10.0]]), None, ("a",), ("b",)
    )  # fmt: skip
    np.testing.assert_array_equal(view["layer_head_avg"], [[20.0, 10.0, np.nan]])


def test_mean_is_over_native_heads_not_repeats() -> None:
    heatmap = make_heatmap()
    native, repeated = heatmap["K"]["native_avg"], heatmap["K"]["layer_head_avg"]
    assert native.shape == (len(LAYERS), len(KV_HEADS))
    assert np.nansum(repeated) > 1.5 * np.nansum(native)  # summing the view would count kv heads several times


@pytest.mark.parametrize("score", ["interference", "signed"])
@pytest.mark.parametrize("block", ["Q", "V"])
def test_top_conflicts_are_those_of_a_full_sort(block: str, score: str) -> None:
    heatmap = make_heatmap(attributes={"score": score})
    sign = -1 if score == "signed" else 1
    expected = sorted_conflicts(heatmap, block, sign)[:20]
    found = heatmap[block]["top_conflicts"]
    natives = heatmap.natives(block)
    assert [
        (c["score"], LAYERS.index(c["layer"]), natives.index(c["head"]), c["sample_i"], c["sample_j"]) for c in found
    ] == expected
    for conflict in found:
        assert conflict["id_a"] == heatmap.samples_a.ids[conflict["sample_i"]]
        assert conflict["id_b"] == heatmap.samples_b.ids[conflict["sample_j"]]
        assert conflict["p_value"] is None
        assert ("kv_head" in conflict) == (block == "V")
        assert conflict.get("kv_head", conflict["head"]) == conflict["head"]


def test_ties_come_in_index_order_and_no_conflict_is_listed_twice() -> None:
    scores = {block: np.where(present(block)[..., None, None], np.float32(1), np.nan) for block in "QKVO"}
    cross = {block: np.broadcast_to(array, (*array.shape[:2], NUM_A, NUM_B)).copy() for block, array in scores.items()}
    cross["Q"][1, 3, 2, 1] = 2
    heatmap = make_heatmap(cross=cross, pooled=None)
    found = heatmap["Q"].top_conflicts(14)
    keys = [(c["layer"], c["head"], c["sample_i"], c["sample_j"]) for c in found]
    first = [(2, head, i, j) for head in (0, 1) for i in range(NUM_A) for j in range(NUM_B)][:13]
    assert keys == [(5, 3, 2, 1), *first]
    everything = heatmap["V"].top_conflicts(10_000)
    assert len(everything) == present("V").sum() * NUM_A * NUM_B
    assert len({tuple(c.values()) for c in everything}) == len(everything)
    assert heatmap["V"].top_conflicts(0) == []


def test_statistics_give_conflicts_their_p_values_and_leave_the_original_alone() -> None:
    heatmap, tests = make_heatmap(), make_statistics()
    tested = heatmap.with_statistics(tests)
    assert heatmap.statistics is None
    for conflict in tested["K"]["top_conflicts"]:
        layer, head = LAYERS.index(conflict["layer"]), KV_HEADS.index(conflict["kv_head"])
        assert conflict["p_value"] == tests["cross_mean"]["K"]["p_value"][layer, head]


@pytest.mark.parametrize("deciding", ["cross_mean", "overlap"])
def test_p_values_are_those_of_the_statistic_that_decides(deciding: str) -> None:
    tests = make_statistics() | {"settings": {"statistic": deciding}}
    tested = make_heatmap().with_statistics(tests)
    assert tested.deciding == deciding
    for block in "QKVO":
        np.testing.assert_array_equal(tested[block].p_values, tests[deciding][block]["p_value"])
    assert make_heatmap()["Q"].p_values is None
    assert not make_heatmap().tests


def test_unknown_names_are_qkov_errors_that_mappings_understand() -> None:
    heatmap = make_heatmap()
    with pytest.raises(QkovError, match="one of Q, K, V, O") as raised:
        heatmap["X"]
    assert isinstance(raised.value, KeyError)
    assert not str(raised.value).startswith(("'", '"'))
    with pytest.raises(QkovError, match="layer_head_avg"):
        heatmap["Q"]["means"]
    assert "X" not in heatmap
    assert heatmap.get("X") is None
    assert list(heatmap) == ["Q", "K", "V", "O"]
    assert set(heatmap["Q"]) == {"scores", "layer_head_avg", "native_avg", "top_conflicts"}


def test_without_pairs_there_are_averages_and_an_error_that_says_what_to_set() -> None:
    view = make_heatmap(cross=None, pooled=None)["Q"]
    assert set(view) == {"layer_head_avg", "native_avg"}
    for name in ("scores", "top_conflicts"):
        with pytest.raises(QkovError, match=r"output\.pairs"):
            view[name]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("groups", lambda h: np.array([1, 2]), "groups"),
        ("mean", lambda h: h.mean | {"Q": h.mean["Q"][:2]}, "mean Q"),
        ("mean", lambda h: h.mean | {"V": np.nan_to_num(h.mean["V"])}, "NaN where"),
        ("present", lambda h: {"Q": h.present["Q"]}, "present"),
        ("cross", lambda h: h.cross | {"K": h.cross["K"][..., :1]}, "cross K"),
        ("pooled", lambda h: h.pooled | {"O": h.cross["O"]}, "pooled O"),
        ("fisher", lambda h: h.fisher | {"Q": {"mean": h.mean["Q"]}}, "fisher Q min"),
        ("kv_heads", lambda h: (), "block K"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(field: str, change: object, message: str) -> None:
    heatmap = make_heatmap()
    with pytest.raises(QkovError, match=message):
        dataclasses.replace(heatmap, **{field: change(heatmap)})


def test_sample_table_refuses_columns_of_other_lengths() -> None:
    with pytest.raises(QkovError, match="losses"):
        SampleTable(("x", "y"), np.array([1, 2]), np.array([1.0]), ("", ""))


def test_to_xarray_is_labelled_and_makes_no_copies() -> None:
    heatmap = make_heatmap().with_statistics(make_statistics())
    data = heatmap.to_xarray()
    assert data["scores_K"].dims == ("layer", "kv_head", "sample_a", "sample_b")
    assert data["scores_Q"].dims == ("layer", "head", "sample_a", "sample_b")
    assert np.shares_memory(data["scores_Q"].values, heatmap.pooled["Q"])
    assert data["heatmap_V"].sel(layer=5, kv_head=2) == heatmap.mean["V"][1, 2]
    assert data["fisher_O_ridge_share"].sel(layer=7, head=3) == heatmap.fisher["O"]["ridge_share"][2, 3]
    assert data["overlap_K_q_value"].dims == ("layer", "kv_head")
    assert data["O_bias_heatmap"].dims == ("layer",)
    assert tuple(data["id_a"].values) == heatmap.samples_a.ids
    assert data.attrs["task_b"] == "cøde"


def test_to_pandas_has_one_row_for_each_present_native_head() -> None:
    heatmap, tests = make_heatmap(), make_statistics()
    table = heatmap.with_statistics(tests).to_pandas()
    assert len(table) == sum(present(block).sum() for block in "QKVO")
    assert not table["score_mean"].isna().any()
    row = table[(table.block == "Q") & (table.layer == 5) & (table["head"] == 4)].iloc[0]
    assert row.kv_head == 4 // GROUPS[1]
    assert row.score_mean == heatmap.mean["Q"][1, 4]
    row = table[(table.block == "K") & (table.layer == 5) & (table.kv_head == 2)].iloc[0]
    assert row["head"] == 2
    assert row.cross_mean_p_value == tests["cross_mean"]["K"]["p_value"][1, 2]
    assert row.fisher_min == heatmap.fisher["K"]["min"][1, 2]
    assert "cross_mean_p_value" not in heatmap.to_pandas()


def test_plot_shows_the_four_blocks_with_the_models_numbers(tmp_path) -> None:
    figure = make_heatmap().plot()
    panels = figure.axes[:4]
    assert [panel.get_title() for panel in panels] == [f"{block}: mean score" for block in "QKVO"]
    assert [panel.get_xlabel() for panel in panels] == ["head", "kv head", "kv head", "head"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["2", "5", "7"]
    np.testing.assert_array_equal(panels[2].images[0].get_array().mask, ~present("V"))
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


@pytest.mark.parametrize(
    ("method", "module"), [("plot", "matplotlib.figure"), ("to_xarray", "xarray"), ("to_pandas", "pandas")]
)
def test_a_missing_package_names_the_extra(method: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(QkovError, match=r"pip install 'qkov-dist\[report\]'"):
        getattr(make_heatmap(), method)()


@pytest.mark.parametrize("value", ["change_adam", "q_value_sgd", "overlap_p_value", "fisher_ridge_share", "score_mean"])
def test_any_column_of_pandas_is_drawn_under_its_name(value: str) -> None:
    pytest.importorskip("matplotlib")
    heatmap = heatmap_with_effects()
    table = heatmap.to_pandas()
    figure = heatmap.plot(value=value)
    assert "math (4) \N{MULTIPLICATION SIGN} cøde (3)" in figure.get_suptitle()
    for axis, block in zip(figure.axes, "QKVO", strict=False):
        drawn = axis.images[0].get_array().compressed()
        np.testing.assert_array_equal(drawn, table[table["block"] == block][value])
    ends = {axis.images[0].get_clim() for axis in figure.axes[:4]}
    if value == "change_adam":  # one scale for all blocks, about 0: changes add up
        ((low, high),) = ends
        assert high == -low == np.abs(table[value]).max()


def test_one_block_is_drawn_on_an_axis_of_ones_own() -> None:
    pyplot = pytest.importorskip("matplotlib.figure")
    heatmap, figure = heatmap_with_effects(), pyplot.Figure()
    axis = figure.subplots()
    assert heatmap.plot(axis, block="V", value="change_sgd") is figure
    assert axis.get_title() == "V: change sgd"
    with pytest.raises(QkovError, match="one block on one axis"):
        heatmap.plot(axis)
    with pytest.raises(QkovError, match="change_adam"):
        heatmap.plot(value="chang_adam")


def test_html_shows_verdict_and_picture_and_is_escaped() -> None:
    text = make_heatmap(task_a="<i>", task_b="$x_{")._repr_html_()
    assert "&lt;i&gt;" in text
    assert "<i>" not in text
    shown = dataclasses.replace(heatmap_with_effects(), task_a="<i>")
    text = shown._repr_html_()
    assert html.escape(shown.verdict.sentences[0]) in text
    assert "<i>" not in text
    assert len(text) < 100_000


def test_html_has_a_picture_only_where_matplotlib_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    found = re.search(r'src="data:image/png;base64,([^"]+)"', make_heatmap()._repr_html_())
    assert base64.b64decode(found[1]).startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = make_heatmap()._repr_html_()
    assert "<img" not in text
    assert "<table>" in text
    assert len(text) < 1000


def test_repr_says_what_it_is_of() -> None:
    assert repr(make_heatmap()).startswith("Heatmap('math' (4 samples)")
