"""The page of many tasks in a real browser: drawn, hovered, walked with keys, and leading to the pages of pairs."""

from __future__ import annotations

import dataclasses

import pytest
from browsing import IN_A_BROWSER, errors, number, set_screen, text_of
from matrices import matrix_of_camps

from qkov_dist.report.pair_files import pair_files
from qkov_dist.report.write import write_matrix_page

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = IN_A_BROWSER
TASKS = ("math", "code", "loi <b>française</b>", "chat.1")


@pytest.fixture(scope="module")
def matrix():
    return matrix_of_camps("+-+0", TASKS, num_layers=3)


@pytest.fixture(scope="module")
def folder(matrix, tmp_path_factory):
    place = tmp_path_factory.mktemp("many")
    write_matrix_page(matrix, place, matrix.pairs[:5])  # the last pair has no page
    return place


@pytest.fixture
def page(browser, folder):
    set_screen(browser, 1280, 1000)
    browser.get("about:blank")
    errors(browser)
    browser.get((folder / "report.html").as_uri())
    return browser


def cell(page, row: int, column: int):
    return page.find_element("css selector", f"#grid [data-row='{row}'][data-column='{column}']")


def press(page, selector: str) -> None:
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


def test_cells_show_counts_and_changes_like_tasks_together(page, matrix) -> None:
    for value, sign in (("conflict", 1), ("synergy", -1)):
        press(page, f"input[name=matrix][value={value}]")
        for record in matrix.records:
            a, b = (matrix.tasks.index(task) for task in record.tasks)
            assert {cell(page, a, b).text, cell(page, b, a).text} == {str(record.count("adam", sign))}
    press(page, "input[name=matrix][value=change]")
    of = matrix.records[0].totals["adam"]
    for harmed, at in ((0, (0, 1)), (1, (1, 0))):
        shown = number(cell(page, *at).text.partition("%")[0].replace("+", ""))
        assert shown == pytest.approx(100 * of.relative(harmed)[0], abs=0.06)
        assert cell(page, *at).text.endswith("▲")
    assert cell(page, 2, 2).text == "−10%"
    press(page, "input[name=block][value=K]")
    factor = of.relative(0)[0] / of.total.change
    shown = number(cell(page, 0, 1).text.partition("%")[0].replace("+", ""))
    assert shown == pytest.approx(100 * factor * matrix.values["K"]["change_adam"][0, 1].sum(), abs=0.06)
    names = [name.text for name in page.find_elements("css selector", "#grid tbody th")]
    assert names == [matrix.tasks[place] for place in matrix.order]
    assert errors(page) == []


def test_a_click_leads_to_the_pairs_page_and_back(page, matrix, folder) -> None:
    ActionChains(page).move_to_element(cell(page, 1, 0)).perform()
    assert "code × math" in text_of(page, "#tip")
    assert f"heads in conflict {matrix.records[0].count('adam', 1)}" in text_of(page, "#tip")
    cell(page, 1, 0).click()
    assert page.current_url == (folder / pair_files(TASKS)["math", "code"]).as_uri()
    assert text_of(page, "h1") == "math × code"
    page.find_element("css selector", ".back a").click()
    assert page.current_url.endswith("report.html#math.code")
    assert text_of(page, "#pair h3") == "math × code"
    assert errors(page) == []


def test_keys_walk_the_matrix_and_enter_opens_a_pair(page, matrix) -> None:
    order = matrix.order
    page.execute_script("selectPair({ row: arguments[0], column: arguments[0] }, { focus: true })", order[0])
    page.switch_to.active_element.send_keys(
        Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.HOME
    )
    row, column = TASKS[order[1]], TASKS[order[0]]
    assert text_of(page, "#pair h3") == f"{row} × {column}"
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert sorted(text_of(page, "h1").split(" × ")) == sorted((row, column))


def test_a_pair_without_a_page_says_the_command(page) -> None:
    cell(page, 2, 3).click()
    assert page.current_url.partition("#")[0].endswith("report.html")
    command = "qkov report runs/camps --pair 'loi <b>française</b>' chat.1"
    assert text_of(page, "#pair pre") == command
    assert "5 of 6 pairs have their pages" in text_of(page, "#pairs-hint")


def test_heads_of_one_task_are_counted_and_lead_to_pairs(page, matrix) -> None:
    page.execute_script("document.getElementById('heads-task').value = '1'; STATE.task = '1'; redraw()")
    counts = page.execute_script("return DATA.blocks.map((block) => [...block.values.shown])")
    of_code = [record for record in matrix.records if "code" in record.tasks]
    for block, shown in zip(matrix.blocks, counts, strict=True):
        wanted = sum((record.codes["adam"][block] == 1).astype(int) for record in of_code)
        assert shown == wanted.ravel().tolist()
    layer, head = divmod(max(range(len(counts[0])), key=counts[0].__getitem__), len(matrix.heads))
    page.execute_script("select(MAPS[0], { layer: arguments[0], head: arguments[1] })", layer, head)
    links = [link.get_attribute("href") for link in page.find_elements("css selector", "#selected a")]
    assert links
    assert all(link.endswith(f".html#Q.{layer}.{head}") for link in links)
    page.get(links[0])
    assert text_of(page, "#selected h3") == f"Q, layer {layer}, head {head}"


def test_an_address_of_no_pair_says_so(browser, folder) -> None:
    browser.get("about:blank")
    browser.get((folder / "report.html").as_uri() + "#math.maths")
    assert "no pair math.maths" in text_of(browser, "#no-pair")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction_and_shows_before_it_opens(page, scheme) -> None:
    set_screen(page, 390, 844, scheme=scheme, is_phone=True)
    page.refresh()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    assert page.execute_script("return document.getElementById('grid').offsetWidth") <= 390
    touch = """arguments[0].dispatchEvent(
        new PointerEvent("click", { bubbles: true, cancelable: true, pointerType: "touch" }))"""
    page.execute_script(touch, cell(page, 0, 1))
    assert text_of(page, "#pair h3") == "math × code"
    assert page.current_url.partition("#")[0].endswith("report.html")
    assert errors(page) == []


@pytest.mark.parametrize("is_tested", [True, False])
def test_without_effects_there_are_scores_alone(browser, matrix, tmp_path, is_tested) -> None:
    without = {"effects": None, "influences": None, **({} if is_tested else {"statistics": None})}
    heatmaps = {pair: dataclasses.replace(heatmap, **without) for pair, heatmap in matrix.heatmaps.items()}
    values = {block: {name: of[name] for name in ("mean", "overlap")} for block, of in matrix.values.items()}
    bare = dataclasses.replace(matrix, heatmaps=heatmaps, values=values)
    set_screen(browser, 1280, 1000)
    errors(browser)
    browser.get(write_matrix_page(bare, tmp_path, []).as_uri())
    assert number(cell(browser, 0, 1).text) == float(f"{bare.average('mean')[0, 1]:.2g}")
    offered = [i.get_attribute("value") for i in browser.find_elements("css selector", "input[name=matrix]:enabled")]
    assert offered == ["score", "overlap", *(["contested", "apart"] if is_tested else [])]
    assert browser.find_element("css selector", "#heads-over-pairs").is_displayed() == is_tested
    assert errors(browser) == []


def test_many_tasks_stay_readable(browser, tmp_path) -> None:
    matrix = matrix_of_camps("+-0" * 8, num_samples=4, num_layers=1, num_heads=2)
    set_screen(browser, 1280, 1000)
    errors(browser)
    browser.get(write_matrix_page(matrix, tmp_path).as_uri())
    assert not list(tmp_path.glob("pairs/*"))
    width = browser.execute_script("return document.getElementById('grid').offsetWidth")
    assert width <= browser.execute_script("return document.getElementById('matrix-area').clientWidth")
    assert browser.execute_script("return document.querySelectorAll('#grid td').length") == 24**2
    assert "0 of 276 pairs have their pages" in text_of(browser, "#pairs-hint")
    assert errors(browser) == []
