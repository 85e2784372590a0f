"""The report's page in a real browser: drawn, hovered, sorted, filtered, and silent on the network."""

from __future__ import annotations

import json

import numpy as np
import pytest
from browsing import IN_A_BROWSER, errors, middle, number, pixel, set_screen, text_of
from heatmaps import (
    HEADS,
    KV_HEADS,
    LAYERS,
    NUM_A,
    heatmap_with_tests,
    large_heatmap,
    make_table,
    present,
    signed_heatmap,
)

from qkov_dist.report.tables import conflicts_table
from qkov_dist.report.write import write_page
from qkov_dist.results.heatmap_data import SampleTable

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

HOSTILE = "<b id=evil>bold</b><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
CIVIDIS_LOW, CIVIDIS_HIGH = [0, 0x22, 0x4E], [0xFE, 0xE8, 0x38]

pytestmark = IN_A_BROWSER
GLYPHS = {None: "none", "contested": "■ contested", "apart": "◆ apart"}


@pytest.fixture(scope="module")
def heatmap():
    table = SampleTable((HOSTILE, "=1", "+2", "3"), np.arange(9, 9 + NUM_A), np.ones(NUM_A), (HOSTILE,) * NUM_A)
    return heatmap_with_tests(samples_a=table, samples_b=make_table("b", 3))


@pytest.fixture
def page(browser, heatmap, tmp_path):
    set_screen(browser, 1360, 1000)
    browser.get_log("performance")
    browser.get(write_page(heatmap, tmp_path).as_uri())
    return browser


def column(page, key: str) -> list[str]:
    place = page.execute_script("return COLUMNS.findIndex(([key]) => key === arguments[0])", key)
    script = (
        "return [...document.querySelectorAll('#conflicts tbody tr')].map((row) => row.cells[arguments[0]].textContent)"
    )
    return page.execute_script(script, place)


def hover(page, block: int, layer: int, head: int) -> None:
    canvas = page.find_element("css selector", f"#map-{'QKVO'[block]}")
    page.execute_script("arguments[0].scrollIntoView({ block: 'center' })", canvas)
    x, y = middle(page, block, layer, head)
    ActionChains(page).move_to_element_with_offset(
        canvas, round(x - canvas.size["width"] / 2), round(y - canvas.size["height"] / 2)
    ).perform()


def test_no_request_leaves_the_page_and_nothing_goes_wrong(page) -> None:
    for value in ("overlap", "effect", "q", "share", "score"):
        page.find_element("css selector", f"input[value={value}]").click()
    entries = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.endswith("/report.html") and url.startswith("file://") for url in asked)
    assert errors(page) == []


def test_what_a_page_might_ask_for_is_forbidden(page) -> None:
    script = """
      const done = arguments[0];
      addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
      document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));"""
    assert page.execute_async_script(script) == "img-src"
    assert errors(page)  # the violation


def test_the_heatmaps_are_drawn(page, heatmap) -> None:
    absent = page.execute_script(
        "return parse(getComputedStyle(document.documentElement).getPropertyValue('--absent').trim())"
    )
    for block, name in enumerate("QKVO"):
        mean = heatmap.mean[name]
        highest, lowest = (np.unravel_index(find(mean), mean.shape) for find in (np.nanargmax, np.nanargmin))
        assert pixel(page, block, *map(int, highest)) == CIVIDIS_HIGH
        assert pixel(page, block, *map(int, lowest)) == CIVIDIS_LOW
        for layer, head in np.argwhere(~present(name)):
            assert pixel(page, block, int(layer), int(head)) == absent


def expected_finding(heatmap, name: str, layer: int, head: int) -> str | None:
    tests = heatmap.tests[name]
    if not tests["q_value"][layer, head] <= 0.3:
        return None
    return "contested" if tests["effect_size"][layer, head] > 0 else "apart"


def mark_colors(page, block: int, layer: int, head: int) -> list[list[int]]:
    """A cell's colour in its middle, where the upper left of a square would be, and where the top of a diamond."""
    script = """
      const [x, y, radius] = markPlace(MAPS[arguments[0]], arguments[1], arguments[2]);
      const context = MAPS[arguments[0]].canvas.getContext("2d");
      return [[0, 0], [-0.8, -0.8], [0, -0.95]].map(([right, down]) =>
        [...context.getImageData(x + right * radius, y + down * radius, 1, 1).data].slice(0, 3))"""
    return page.execute_script(script, block, layer, head)


def test_shape_and_colour_of_a_mark_tell_the_side_and_the_family_wise_heads(page, heatmap) -> None:
    seen = set()
    for block, name in enumerate("QKVO"):
        for layer, head in np.argwhere(present(name)).tolist():
            ground = pixel(page, block, layer, head)
            inside, corner, top = mark_colors(page, block, layer, head)
            finding = expected_finding(heatmap, name, layer, head)
            is_family = heatmap.tests[name]["p_max"][layer, head] <= 0.3
            seen.add((finding, bool(is_family)))
            if finding is None:
                assert inside == corner == top == ground
                continue
            drawn, bare = (corner, None) if finding == "contested" else (top, corner)
            assert drawn != ground
            assert bare in (None, ground)
            fill = {"contested": [255, 143, 82], "apart": [124, 198, 255]}[finding]
            assert inside == (fill if is_family else [255, 255, 255])
    assert len(seen) == 6


def test_the_switch_of_marks_leaves_one_kind_or_none(page, heatmap) -> None:
    for shown in ("contested", "apart", "none", "all"):
        page.find_element("css selector", f"input[name=marks][value={shown}]").click()
        for block, name in enumerate("QKVO"):
            for layer, head in np.argwhere(present(name)).tolist():
                finding = expected_finding(heatmap, name, layer, head)
                is_marked = mark_colors(page, block, layer, head)[0] != pixel(page, block, layer, head)
                assert is_marked == (finding is not None and shown in (finding, "all"))
        in_charts = page.execute_script("return document.querySelectorAll('#block-charts path[class^=mark-]').length")
        assert (in_charts == 0) == (shown == "none")


def test_marks_on_nearly_every_cell_are_off_at_first(browser, heatmap, tmp_path) -> None:
    tests = {
        block: {**of, "q_value": np.where(np.isnan(of["q_value"]), np.nan, 0.1)} for block, of in heatmap.tests.items()
    }
    marked = heatmap.with_statistics({**heatmap.statistics, heatmap.deciding: tests})
    browser.get(write_page(marked, tmp_path).as_uri())
    assert browser.execute_script("return STATE.marks") == "none"
    assert "44 of 44 heads are significant" in text_of(browser, "#value-hint")
    browser.find_element("css selector", "input[name=marks][value=all]").click()
    assert "are significant" not in text_of(browser, "#value-hint")
    assert mark_colors(browser, 0, 0, 0)[0] != pixel(browser, 0, 0, 0)


def test_small_q_is_orange_above_the_null_and_blue_below(page, heatmap) -> None:
    page.find_element("css selector", "input[value=q]").click()
    seen = set()
    for block, name in enumerate("QKVO"):
        for layer, head in np.argwhere(present(name)).tolist():
            if finding := expected_finding(heatmap, name, layer, head):
                red, _, blue = pixel(page, block, layer, head)
                assert (red > blue) == (finding == "contested")
                seen.add(finding)
    assert seen == {"contested", "apart"}


def test_the_share_of_task_a_has_a_heatmap_from_0_to_1(page, heatmap) -> None:
    page.find_element("css selector", "input[value=share]").click()
    assert "math" in text_of(page, "#value-hint")
    for block, name in enumerate("QKVO"):
        share = heatmap.fisher[name]["share_a"]
        assert page.execute_script("return MAPS[arguments[0]].ends.map((e) => e.textContent)", block) == [
            "0",
            "0.5",
            "1",
        ]
        for layer, head in np.argwhere(present(name)).tolist():
            red, _, blue = pixel(page, block, layer, head)
            if abs(share[layer, head] - 0.5) > 0.05:
                assert (red > blue) == (share[layer, head] > 0.5)


def test_the_bias_of_o_has_a_chart_of_its_own(page, heatmap) -> None:
    line = page.find_element("css selector", "#shared-charts .mark.line").get_attribute("d")
    heights = [float(point.split()[1].removesuffix("h.01")) for point in line.removeprefix("M").split("L")]
    means = heatmap.shared["O_bias"]["mean"]
    assert np.argsort(heights).tolist() == np.argsort(-means).tolist()  # down is larger in SVG


def test_switching_the_value_draws_other_colours(page) -> None:
    script = "return MAPS.map((map) => map.canvas.toDataURL())"
    seen = []
    for value in ("score", "overlap", "effect", "q", "share"):
        page.find_element("css selector", f"input[value={value}]").click()
        seen.append(tuple(page.execute_script(script)))
        assert text_of(page, "#value-hint")
    assert len(set(seen)) == 5


@pytest.mark.parametrize(("block", "layer", "head"), [(0, 1, 3), (2, 1, 2)])
def test_hover_shows_the_numbers_of_a_head(page, heatmap, block, layer, head) -> None:
    name = "QKVO"[block]
    hover(page, block, layer, head)
    shown = text_of(page, "#tip")
    axis, natives = ("head", HEADS) if name in "QO" else ("kv head", KV_HEADS)
    assert f"{name}, layer {LAYERS[layer]}, {axis} {natives[head]}" in shown
    for value in (heatmap.mean[name], heatmap.tests[name]["statistic"], heatmap.tests[name]["q_value"]):
        assert f" {float(f'{value[layer, head]:.4g}'):g}" in shown
    share = heatmap.fisher[name]["share_a"][layer, head]
    assert f"Fisher share of math {float(f'{share:.4g}'):g}" in shown
    assert f"finding {GLYPHS[expected_finding(heatmap, name, layer, head)]}" in shown
    assert page.execute_script("return !document.getElementById('tip').hidden")


def test_hover_over_an_absent_head_says_so(page) -> None:
    hover(page, 2, 2, 0)
    assert "no such head" in text_of(page, "#tip")


def test_arrow_keys_move_between_heads_and_enter_lists_conflicts(page) -> None:
    canvas = page.find_element("css selector", "#map-K")
    page.execute_script("select(MAPS[1], { layer: 0, head: 0 }); arguments[0].focus()", canvas)
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert text_of(page, "#selected h3") == f"K, layer {LAYERS[1]}, kv head {KV_HEADS[1]}"
    canvas.send_keys(Keys.ENTER)
    assert set(column(page, "layer")) <= {str(LAYERS[1])}
    assert page.execute_script("return document.getElementById('filter-block').value") == "K"


def test_every_control_is_reached_by_tab(page) -> None:
    seen = set()
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        script = "const e = document.activeElement; return e.id || e.name || e.closest('th')?.dataset.key || e.tagName"
        seen.add(page.execute_script(script))
    assert {
        "value",
        "marks",
        "scale",
        "range",
        "map-Q",
        "map-K",
        "map-V",
        "map-O",
        "filter-block",
        "score",
        "excess",
        "tokens_a",
    } <= seen


def test_the_table_sorts_by_any_column(page, heatmap) -> None:
    excesses = [number(text) for text in column(page, "excess")]
    assert excesses == sorted(excesses, reverse=True)
    best = max(row[4] for row in conflicts_table(heatmap).rows)
    assert excesses[0] == float(f"{best:.4g}")
    for key in ("tokens_a", "layer", "score", "q", "excess"):
        header = page.find_element("css selector", f"th[data-key={key}] button")
        page.execute_script("arguments[0].click()", header)
        order = page.execute_script("return document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
        shown = [number(text) for text in column(page, key) if text != "–"]
        assert shown == sorted(shown, reverse=order == "descending")
        assert page.execute_script("return document.querySelectorAll('th[aria-sort]').length") == 1


def test_the_table_names_the_finding_of_each_head(page, heatmap) -> None:
    page.execute_script("FILTER.most = 1000; drawConflicts()")
    rows = list(zip(*(column(page, key) for key in ("block", "layer", "head", "finding")), strict=True))
    for block, layer, head, shown in rows:
        axis = HEADS if block in "QO" else KV_HEADS
        place = LAYERS.index(int(layer)), axis.index(int(head))
        assert shown == GLYPHS[expected_finding(heatmap, block, *place)]
    assert {shown for *_, shown in rows} == set(GLYPHS.values())


def test_the_table_is_filtered(page) -> None:
    page.execute_script("FILTER.most = 1000; drawConflicts()")
    words = page.find_element("css selector", "#filter-words")
    words.send_keys("b/é-1")
    assert {text.split("λ")[0] for text in column(page, "b")} == {"b/é-1"}
    page.find_element("css selector", "#filter-clear").click()
    page.find_element("css selector", "#filter-block option[value=V]").click()
    assert set(column(page, "block")) == {"V"}


def test_html_in_a_sample_is_shown_as_text(page) -> None:
    assert HOSTILE in text_of(page, "#conflicts tbody")
    page.execute_script("select(MAPS[0], { layer: 0, head: 0 })")
    assert text_of(page, "#selected pre") == HOSTILE
    assert page.execute_script("return [window.evil === undefined, document.getElementById('evil')]") == [True, None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction(page, scheme) -> None:
    set_screen(page, 360, 740, scheme=scheme, is_phone=True)
    page.refresh()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")


def test_every_switch_of_signed_scores_is_in_sight_on_a_phone(browser, tmp_path) -> None:
    set_screen(browser, 360, 740, is_phone=True)
    browser.get(write_page(signed_heatmap(), tmp_path).as_uri())
    assert browser.execute_script("return [...document.querySelectorAll('input[name=marks]')].map((i) => i.value)") == [
        *("all", "synergy", "conflict", "weaker", "milder", "none")
    ]
    edges = "return [...document.querySelectorAll('.segments label')].map((l) => l.getBoundingClientRect().right)"
    switches = "return [...document.querySelectorAll('.segments')].map((s) => s.getBoundingClientRect().right)"
    assert max(browser.execute_script(edges)) <= max(browser.execute_script(switches)) <= 360
    assert errors(browser) == []


def test_a_large_model_stays_readable(browser, tmp_path) -> None:
    set_screen(browser, 1360, 1000)
    errors(browser)  # those of the page before
    browser.get(write_page(large_heatmap(), tmp_path).as_uri())
    width, height = browser.execute_script("return [MAPS[0].size.cellWidth, MAPS[0].size.cellHeight]")
    assert width >= 4
    assert height >= 7
    tops = browser.execute_script("return MAPS.map((map) => map.canvas.getBoundingClientRect().top)")
    assert len(set(tops)) == 1  # side by side
    colors = {"contested": [], "apart": []}
    for at, name in enumerate(
        browser.execute_script(
            "return [...MAPS[0].block.marks.found.keys()].map((at) => MAPS[0].block.finding(at)?.name)"
        )[:640]
    ):
        if name and browser.execute_script("return MAPS[0].block.marks.family[arguments[0]]", at):
            colors[name].append(mark_colors(browser, 0, *divmod(at, 64))[0])
    assert all(red > blue for red, _, blue in colors["contested"])
    assert all(blue > red for red, _, blue in colors["apart"])
    assert min(map(len, colors.values())) > 10
    assert errors(browser) == []
