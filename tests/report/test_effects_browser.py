"""Effects on the page, in a real browser: the answer, the list of heads, the heatmaps' values, links and downloads."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browsing import IN_A_BROWSER, errors, number, pixel, set_screen, text_of
from heatmaps import HEADS, KV_HEADS, LAYERS, NUM_A, heatmap_with_tests, present
from influences import heatmap_with_effects

from qkov_dist.report.write import write_page
from qkov_dist.results.heatmap_data import SampleTable

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def heatmap():
    table = SampleTable(tuple("=123"), np.arange(9, 9 + NUM_A), np.ones(NUM_A), ("+1", '"', "b\nc", "λ"))
    return heatmap_with_effects(samples_a=table)


@pytest.fixture
def page(browser, heatmap, tmp_path):
    set_screen(browser, 1360, 1000)
    browser.get("about:blank")  # so that an address with a hash alone is loaded anew
    errors(browser)
    browser.get(write_page(heatmap, tmp_path).as_uri())
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    return browser


def press(page, selector: str) -> None:
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


def rows(page) -> list[list[str]]:
    script = """return [...document.querySelectorAll('#heads tbody tr')].map((row) =>
        [...row.cells].map((cell) => cell.textContent))"""
    return page.execute_script(script)


def selected(page) -> str:
    return text_of(page, "#selected h3")


def test_the_answer_its_interval_and_the_next_command_are_seen_before_scrolling(page, heatmap) -> None:
    for width, height, is_phone in ((1360, 800, False), (390, 844, True)):
        set_screen(page, width, height, is_phone=is_phone)
        script = "return arguments[0].getBoundingClientRect().bottom"
        for selector in ("#answer .verdict", "#answer .interval-line", "#answer .next pre"):
            assert 0 < page.execute_script(script, page.find_element("css selector", selector)) <= height
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    shown = text_of(page, "#answer .verdict").replace("−", "-").replace("rate × number", "rate x number")
    assert shown == " ".join(heatmap.verdict.sentences[:2])
    assert errors(page) == []


def test_changes_are_what_is_drawn_first_orange_for_harm_and_blue_for_gain(page, heatmap) -> None:
    for block, name in enumerate("QKVO"):
        for layer, head in np.argwhere(present(name)).tolist():
            red, _, blue = pixel(page, block, layer, head)
            change = heatmap.effects[name]["adam"]["change"][layer, head]
            if abs(change) > 1:
                assert (red > blue) == (change > 0)


def test_each_value_has_its_own_picture_and_the_switches_that_belong_to_it(page) -> None:
    seen = []
    for value in ("change", "harm", "curvature", "score", "overlap", "effect", "q", "share"):
        press(page, f"input[name=value][value={value}]")
        seen.append(tuple(page.execute_script("return MAPS.map((map) => map.canvas.toDataURL())")))
        is_effect = value in ("change", "harm", "curvature")
        shown = "return document.querySelector(arguments[0]).offsetParent !== null"
        assert page.execute_script(shown, "#step") == is_effect
        assert page.execute_script(shown, "#effect-marks") == is_effect
        assert page.execute_script(shown, "#marks") != is_effect
    assert len(set(seen)) == 8
    assert errors(page) == []


@pytest.mark.parametrize(("optimizer", "harmed"), [("adam", "a"), ("sgd", "b")])
def test_harm_is_computed_again_for_the_step_that_is_typed(page, heatmap, optimizer: str, harmed: str) -> None:
    press(page, f"input[name=optimizer][value={optimizer}]")
    press(page, f"input[name=harmed][value={harmed}]")
    step = page.find_element("css selector", "#step")
    step.clear()
    step.send_keys("0.25")
    assert page.execute_script("return STATE.value") == "harm"
    harm = heatmap.harm(0.25, optimizer, harmed)
    for place, block in enumerate("QKVO"):
        found = page.execute_script("return [...MAPS[arguments[0]].block.values.harm].map((x) => x ?? null)", place)
        np.testing.assert_allclose(np.array(found, float), harm.value[block].ravel(), rtol=1e-4, atol=1e-5)
    assert text_of(page, "#answer .step-of-command") == "0.25"
    assert page.execute_script("return document.querySelector('#heads th[data-key=harm]').textContent") == (
        f"harm to {'math' if harmed == 'a' else 'cøde'} at 0.25"
    )
    practical = heatmap.verdict.practical[optimizer]["b" if harmed == "a" else "a"]
    assert (10 * practical < 0.25) == ("takes more than all of" in text_of(page, "#step-said"))


@pytest.mark.parametrize("typed", ["abc", "-1", "0", "1,5", " ", "1e9"])
def test_what_is_no_step_gets_a_message_and_changes_nothing(page, typed: str) -> None:
    step = page.find_element("css selector", "#step")
    before = page.execute_script("return STATE.step")
    step.clear()
    step.send_keys(typed)
    assert step.get_attribute("aria-invalid") == "true"
    assert text_of(page, "#step-said").startswith("Not a step: type a number above 0")
    assert page.execute_script("return STATE.step") in (before, 1)  # 1e9 and 1,5 begin with a step of 1
    step.clear()
    step.send_keys(str(before))
    assert not text_of(page, "#step-said").startswith("Not a step")


def test_a_filter_that_keeps_no_head_says_so(browser, heatmap, tmp_path) -> None:
    effects = {
        block: {
            optimizer: {**arrays, "q_value": np.where(arrays["change"] > 0, 0.9, arrays["q_value"])}
            for optimizer, arrays in of_block.items()
        }
        for block, of_block in heatmap.effects.items()
    }
    browser.get(write_page(heatmap.with_effects(effects), tmp_path).as_uri())
    browser.find_element("css selector", "#ranked-kind option[value=conflict]").click()
    assert rows(browser) == [["No head is in conflict by adam at q ≤ 0.3 (0 of 44)."]]
    assert text_of(browser, "#ranked-more") == ""


def test_sorting_by_effect_puts_heads_without_one_last(page) -> None:
    page.execute_script("RANKED.most = 1000; drawRanked()")
    for _ in range(2):
        press(page, "#heads th[data-key=finding] button")
        shown = [row[-1] != "none" for row in rows(page)]
        assert shown == sorted(shown, reverse=True)


def test_the_list_of_heads_is_sorted_filtered_and_follows_the_optimizer(page, heatmap) -> None:
    page.execute_script("RANKED.most = 1000; drawRanked()")
    for optimizer in ("adam", "sgd"):
        press(page, f"input[name=ranked-optimizer][value={optimizer}]")
        assert page.execute_script("return document.querySelector('input[name=optimizer]:checked').value") == optimizer
        shown = {row[0]: row for row in rows(page)}
        assert len(shown) == 44
        table = heatmap.to_pandas()
        harm = table[f"change_{optimizer}"].clip(lower=0).sum()
        for _, row in table.iterrows():
            cells = shown[f"{row['block']} {row['layer']}.{row['head']}"]
            for place, key in {1: "change", 3: "q_value", 4: "p_max", 6: "curvature_along_a"}.items():
                assert number(cells[place]) == pytest.approx(row[f"{key}_{optimizer}"], rel=1e-3)
            low, high = (row[f"{end}_{optimizer}"] for end in ("ci_low", "ci_high"))
            assert [number(end) for end in cells[2].strip("[]").split(",")] == pytest.approx([low, high], rel=1e-3)
            share = row[f"change_{optimizer}"] / harm
            assert (
                cells[5] == "–"
                if share <= 0
                else number(cells[5].removesuffix(" %")) == pytest.approx(100 * share, rel=0.01)
            )
        changes = [number(row[1]) for row in rows(page)]
        assert changes == sorted(changes, reverse=True)
    press(page, "#heads th[data-key=q] button")
    assert [number(row[3]) for row in rows(page)] == sorted(number(row[3]) for row in rows(page))
    page.find_element("css selector", "#ranked-kind option[value=synergy]").click()
    assert {row[-1] for row in rows(page)} == {"▼ synergy"}
    columns, *kept = page.execute_script("return rankedTable()")
    assert len(kept) == len(rows(page))  # the file holds what the filter shows
    assert {row[columns.index("finding_sgd")] for row in kept} == {"synergy"}
    harm = heatmap.harm(page.execute_script("return STATE.step"), "sgd", "a").value
    for row in kept:
        at = LAYERS.index(row[1]), heatmap.natives(row[0]).index(row[2])
        assert row[columns.index("harm_a_sgd")] == pytest.approx(harm[row[0]][at], rel=1e-4)


def test_hover_shows_the_change_with_interval_and_null(page, heatmap) -> None:
    page.execute_script("showTip(MAPS[1], { layer: 1, head: 2 }, 100, 100)")
    stored = heatmap.effects["K"]["adam"]
    shown = text_of(page, "#tip").replace("−", "-")
    change, low, high = (float(f"{stored[key][1, 2]:.4g}") for key in ("change", "ci_low", "ci_high"))
    assert f"change (adam) {change:g} [{low:g}, {high:g}]" in shown
    assert "change (sgd)" in shown
    assert "mean interference" in shown


def test_an_address_opens_a_head_and_follows_the_selection(page) -> None:
    address = page.current_url.partition("#")[0]
    page.get("about:blank")
    page.get(f"{address}#V.5.2")
    assert selected(page) == "V, layer 5, kv head 2"
    page.execute_script(f"select(MAPS[0], {{ layer: {LAYERS.index(7)}, head: {HEADS.index(3)} }})")
    assert page.current_url == f"{address}#Q.7.3"
    page.execute_script("location.hash = 'K.2.1'")
    time.sleep(0.2)
    assert selected(page) == f"K, layer 2, kv head {KV_HEADS[1]}"
    for nowhere in ("K.3.1", "W.2.1", "heatmaps", "Q.2.1e3"):
        page.execute_script(f"location.hash = '{nowhere}'")
        time.sleep(0.1)
        assert selected(page) == "K, layer 2, kv head 1"
        is_said = page.execute_script("return document.getElementById('no-head').offsetParent !== null")
        assert is_said == (nowhere != "heatmaps")
    assert text_of(page, "#no-head").startswith("This report has no head Q 2.1e3: blocks Q, K, V, O; layers 2 to 7;")
    page.execute_script("location.hash = 'K.2.1'")
    time.sleep(0.1)
    assert page.execute_script("return document.getElementById('no-head').hidden")
    assert errors(page) == []


@pytest.mark.parametrize(("width", "height", "is_phone"), [(1360, 800, False), (390, 844, True)])
def test_an_address_of_a_head_brings_its_numbers_into_sight(page, width: int, height: int, is_phone: bool) -> None:
    set_screen(page, width, height, is_phone=is_phone)
    address = page.current_url.partition("#")[0]
    page.get("about:blank")
    page.get(f"{address}#V.5.2")
    time.sleep(0.3)
    script = "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.top, b.bottom]"
    for part in ("#selected h3", "#selected .numbers"):
        top, bottom = page.execute_script(script, part)
        assert page.execute_script(script, "nav")[1] <= top < bottom <= height


def test_a_head_of_the_answer_and_of_the_list_leads_to_its_cell(page, heatmap) -> None:
    name = heatmap.verdict.carriers[0]
    block, layer, head = re.split(r"[ .]", name)
    for selector in ("#answer .heads a", "#heads tbody a"):
        page.execute_script("STATE.selected = null; scrollTo(0, 0); history.replaceState(null, '', location.pathname)")
        press(page, selector)
        time.sleep(0.2)
        assert selected(page).startswith(f"{block}, layer {layer}, ")
        assert selected(page).endswith(f" {head}")
        assert page.execute_script("return scrollY") > 0


def download(page, folder: Path, name: str) -> bytes:
    """Press a download's button and wait for its file."""
    press(page, f"button[data-file='{name}']")
    path = folder / f"math-cøde-{name}"
    for _ in range(100):
        if path.exists() and path.stat().st_size:
            return path.read_bytes()
        time.sleep(0.05)
    raise AssertionError(f"no {name} in {sorted(folder.iterdir())}")


def test_tables_are_downloaded_as_csv(page, heatmap, tmp_path) -> None:
    heads = list(csv.DictReader(download(page, tmp_path, "heads.csv").decode().splitlines()))
    table = heatmap.to_pandas().sort_values("change_adam", ascending=False)
    assert [(r["block"], int(r["layer"]), int(r["head"])) for r in heads] == [
        tuple(row) for row in table[["block", "layer", "head"]].itertuples(index=False)
    ]
    for key in ("change_adam", "ci_low_adam", "q_value_adam", "curvature_along_b_adam"):
        np.testing.assert_allclose([float(row[key]) for row in heads], table[key], rtol=1e-5)
    conflicts = list(csv.DictReader(download(page, tmp_path, "conflicts.csv").decode().splitlines(keepends=True)))
    assert {row["id_a"] for row in conflicts} == {"'=", "1", "2", "3"}  # no formula is run
    assert {row["text_a"] for row in conflicts} == {"'+1", '"', "b\nc", "λ"}
    assert errors(page) == []


def test_pictures_are_downloaded(page, tmp_path) -> None:
    assert download(page, tmp_path, "heatmaps.png").startswith(b"\x89PNG")
    for name in ("blocks", "layers", "sums"):
        drawn = download(page, tmp_path, f"{name}.svg")
        root = ElementTree.fromstring(drawn)
        text = " ".join(root.itertext())
        assert "math (4) × cøde (3)" in text
        assert len(root.findall("{http://www.w3.org/2000/svg}svg")) == (2 if name == "sums" else 4)
        assert b"class=" not in drawn  # looks travel with it
    assert errors(page) == []


def test_colours_of_effects_are_shared_or_those_of_each_block(page) -> None:
    script = "return MAPS.map((map) => map.ends[2].textContent)"
    assert len(set(page.execute_script(script))) == 1
    press(page, "input[name=range-of-effects][value=block]")
    assert len(set(page.execute_script(script))) > 1


def test_what_adds_up_ends_at_the_total(page, heatmap) -> None:
    for optimizer in ("adam", "sgd"):
        press(page, f"input[name=optimizer][value={optimizer}]")
        whole = heatmap.total_effect(optimizer)
        script = """return [...document.querySelectorAll('#sums-charts svg')].map((svg) =>
            [...svg.querySelectorAll('rect')].at(-1).textContent)"""
        for text in page.execute_script(script):
            assert number(text.split()[1]) == pytest.approx(whole.change, rel=1e-3)
        names = [
            text.partition(":")[0]
            for text in page.execute_script(
                "return [...document.querySelectorAll('#sums-charts rect')].map((rect) => rect.textContent)"
            )
        ]
        assert names == [*"QKVO", "all", *map(str, LAYERS), "all"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction(page, scheme: str) -> None:
    set_screen(page, 360, 740, scheme=scheme, is_phone=True)
    page.refresh()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    for value in ("harm", "overlap"):
        press(page, f"input[name=value][value={value}]")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    assert errors(page) == []


def test_a_page_without_effects_links_and_downloads_too(browser, tmp_path) -> None:
    set_screen(browser, 1360, 1000)
    browser.get("about:blank")
    errors(browser)
    browser.get(f"{write_page(heatmap_with_tests(), tmp_path).as_uri()}#O.5.4")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    assert selected(browser) == "O, layer 5, head 4"
    assert browser.execute_script("return STATE.value") == "score"
    assert download(browser, tmp_path, "blocks.svg")
    assert errors(browser) == []
