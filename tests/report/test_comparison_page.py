"""The page of a comparison: it asks nobody, holds every number, and draws it in a browser."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from browsing import IN_A_BROWSER, errors, set_screen, text_of
from heatmaps import heatmap_with_tests
from influences import with_made_effects
from pages import numbers

from qkov_dist import compare_runs
from qkov_dist.report.comparison_figures import draw_differences, draw_scatter, draw_trajectories
from qkov_dist.report.comparison_page import make_comparison_page

HOSTILE = "</script><script>alert(1)</script> <img src=https://example.com/x.png> {{script}} \u2028"

CHOOSE = "const s = document.getElementById('quantity'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
CELLS = "return [...document.querySelectorAll('#heads td.difference')].map((cell) => cell.textContent)"


@pytest.fixture(scope="module")
def heatmaps():
    return [with_made_effects(heatmap_with_tests(), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def comparison(heatmaps):
    return compare_runs(heatmaps, names=["first", "middle", "last"])


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_every_number_is_on_the_page(comparison):
    data = data_of(make_comparison_page(comparison))
    assert data["runs"] == ["first", "middle", "last"]
    assert [of["key"] for of in data["quantities"]] == list(comparison.quantities)
    for block in data["blocks"]:
        for name, quantity in comparison.quantities.items():
            for place, values in enumerate(quantity.values[block["name"]]):
                np.testing.assert_array_equal(numbers(block["values"][f"{name}_{place}"]), values.ravel().astype("f4"))
            for key in ("q_value", "p_max", "difference") if quantity.moves else ():
                expected = quantity.moves[block["name"]][key].ravel().astype("f4")
                np.testing.assert_array_equal(numbers(block["values"][f"{name}_{key}"]), expected)


def test_the_page_asks_nobody_and_takes_no_name_for_markup(heatmaps):
    pages = []
    for text in ("plain", HOSTILE):
        attributes = {"run_id": text, "score": "interference", "config": {"model": {"path": text}}}
        runs = [dataclasses.replace(run, task_a=text, attributes=attributes) for run in heatmaps[:2]]
        pages.append(make_comparison_page(compare_runs(runs, names=[f"{text}1", f"{text}2"])))
    tags = [re.findall(r"<(\w+)", page) for page in pages]
    assert tags[0] == tags[1]
    page = pages[0].replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import|<(link|img|iframe|form)\b| on\w+=| style=", page.split("<script")[0])
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_trajectories_are_of_more_than_two_runs(heatmaps, comparison):
    assert 'id="trajectory-charts"' in make_comparison_page(comparison)
    two = compare_runs(heatmaps[:2])
    assert 'id="trajectory-charts"' not in make_comparison_page(two)
    assert "Runs</th>" not in make_comparison_page(two)  # of the table of rank correlations


def test_figures_mark_the_heads_that_moved(comparison):
    pytest.importorskip("matplotlib")
    quantity = comparison.quantities["change_adam"]
    scatter, apart, over_runs = (make(comparison) for make in (draw_scatter, draw_differences, draw_trajectories))
    for place, block in enumerate(comparison.blocks):
        moved = quantity.moved(block, comparison.alpha)
        still, *sides = scatter.axes[place].collections
        there = int(np.isfinite(quantity.values[block][0]).sum())
        assert (len(still.get_offsets().compressed()) // 2, sum(len(x.get_offsets()) for x in sides)) == (
            there - moved.sum(),
            moved.sum(),
        )
        (dots,) = apart.axes[place].collections
        assert len(dots.get_offsets()) == moved.sum()
        lines = over_runs.axes[place].lines
        assert len(lines) == there + min(there, 8)


@IN_A_BROWSER[0]
@IN_A_BROWSER[1]
@pytest.mark.parametrize("is_phone", [False, True])
def test_a_browser_draws_every_quantity(browser, comparison, tmp_path, is_phone):
    (tmp_path / "compare.html").write_text(make_comparison_page(comparison), encoding="utf-8")
    set_screen(browser, 390 if is_phone else 1360, 900, scheme="dark" if is_phone else "light", is_phone=is_phone)
    errors(browser)
    browser.get((tmp_path / "compare.html").as_uri())
    for name, quantity in comparison.quantities.items():
        browser.execute_script(CHOOSE, name)
        marked = browser.execute_script("return document.querySelectorAll('#scatter .moved').length")
        assert marked == (0 if quantity.moves is None else comparison.num_moved(name))
        dots = browser.execute_script("return document.querySelectorAll('#scatter circle').length")
        assert dots == sum(int(np.isfinite(of[[0, -1]]).all(0).sum()) for of in quantity.values.values())
    assert "44 heads" in text_of(browser, "#more")
    browser.execute_script("document.querySelector('#heads th[data-key=difference] button').click()")
    cells = browser.execute_script(CELLS)
    found = [float(cell.replace("\N{MINUS SIGN}", "-")) for cell in cells]
    assert found == sorted(found, reverse=True)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert errors(browser) == []
