"""The page of a comparison in headless Chromium.

These run where Python's playwright is installed (`pip install playwright`), and Chromium, the
system's or playwright's own.
"""

import shutil

from comparison_reports import HOSTILE, RECIPES, hostile, report
import pytest

from coda_jax.profiling.comparison_page import page

api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
SIZES = {"wide": (1280, 800), "narrow": (360, 740)}


@pytest.fixture(scope="module", name="browser")
def fixture_browser():
    """Playwright's own Chromium, or the system's."""
    with api.sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {error}")
        yield browser
        browser.close()


@pytest.fixture(name="open_page")
def fixture_open_page(browser, tmp_path):
    """(report, size, ...) -> its page; the test fails where a program of it does."""
    contexts, errors = [], []

    def opened(found, size="wide", **options):
        file = tmp_path / "report.html"
        file.write_text(page(found), encoding="utf-8")
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        tab.on("dialog", lambda dialog: errors.append(dialog.message) or dialog.dismiss())
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or errors.append(r.url))
        tab.goto(file.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def column(tab, number):
    """The texts of a column of the first table."""
    return tab.locator(f"table >> nth=0 >> tbody tr > :nth-child({number})").all_inner_texts()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [report, hostile])
def test_the_page_never_scrolls_sideways(size, make, open_page):
    tab = open_page(make(), size)
    width, _ = SIZES[size]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    box = tab.locator(".box").first
    if size == "narrow":  # the table scrolls in its box, by keyboard, and keeps its names
        assert box.evaluate("x => x.scrollWidth > x.clientWidth")
        box.focus()
        tab.keyboard.press("ArrowRight")
        tab.wait_for_function("document.querySelector('.box').scrollLeft > 0")
        name = tab.locator("tbody th").first.bounding_box()
        assert name["x"] >= 0 and name["width"] < width / 2


@pytest.mark.parametrize("size", SIZES)
def test_one_of_the_two_pictures_is_seen(size, open_page):
    tab = open_page(report(), size)
    pictures = tab.locator(".picture svg")
    assert [p.is_visible() for p in pictures.all()] == [size == "wide", size == "narrow"]


def test_columns_sort_by_click_and_by_keyboard(open_page):
    tab = open_page(report())
    heading = tab.locator("th", has_text="accuracy, %").first
    means = [row[1] for row in RECIPES.values()] + [66.2]

    def numbers():
        return [float(text.split()[0]) for text in column(tab, 2)[:-1]]

    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(means)
    assert column(tab, 1)[-1] == "dense model"  # which has none
    tab.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(means, reverse=True)
    assert column(tab, 1)[-1] == "dense model"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") == "none"
    trained = [int(text.split()[0].replace(",", "")) for text in column(tab, 3)[:-2]]
    assert trained == sorted(row[0] for row in RECIPES.values())
    tab.locator("th button").first.click()
    assert column(tab, 1) == sorted(column(tab, 1), key=str.casefold)


@pytest.mark.parametrize("how", ["hover", "focus"])
@pytest.mark.parametrize("size", SIZES)
def test_a_point_shows_its_runs_and_their_commands(size, how, open_page):
    found = report()
    tab = open_page(found, size)
    shown = tab.locator(".run:visible")
    assert shown.count() == 1
    for i, name in reversed([*enumerate(RECIPES)]):
        point = tab.locator(f".picture .to-run[href='#run-{i}']:visible")
        if how == "hover":
            point.locator("text").hover()  # two points may be one upon the other
        else:
            point.focus()
        assert shown.locator("h3").inner_text() == name
        cell = found["recipes"][name]["cells"]["0"]
        texts = shown.locator("pre:visible").all_inner_texts()
        assert texts == [cell[key] for key in ("directory", "train", "evaluate")]


def test_points_are_reached_and_followed_with_the_tab_key(open_page):
    tab = open_page(report())
    tab.locator(".wide .to-run").first.focus()
    for i, name in enumerate(RECIPES):
        assert tab.evaluate("document.activeElement.getAttribute('href')") == f"#run-{i}"
        assert tab.locator(".run:visible h3").inner_text() == name
        ring = tab.locator(f".wide .to-run[href='#run-{i}'] .target")
        assert ring.evaluate("x => getComputedStyle(x).stroke") != "none"
        if i < len(RECIPES) - 1:
            tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")  # into the run
    inside = "document.activeElement.closest('.run').id"
    assert tab.evaluate(inside) == f"run-{len(RECIPES) - 1}"


def test_commands_are_copied(open_page):
    tab = open_page(report(), permissions=["clipboard-read", "clipboard-write"])
    tab.locator(".run:visible .copy:visible").nth(1).click()
    command = next(iter(report()["recipes"].values()))["cells"]["0"]["train"]
    assert tab.evaluate("getSelection().toString()") == command
    assert tab.evaluate("navigator.clipboard.readText()") == command


@pytest.mark.parametrize("number", range(3))
def test_the_slider_goes_through_the_layers(number, open_page):
    tab = open_page(report())
    figure = tab.locator("figure").nth(number)
    weights = report()["routed"][number]["weights"]
    figure.locator("input").focus()
    for layer, row in enumerate(weights):
        taken = "x => [...x.querySelectorAll('.cell')].map(c => c.classList.contains('taken'))"
        assert figure.evaluate(taken) == [w > 0 for w in row]
        count = sum(w > 0 for w in row)
        said = figure.locator("output").inner_text()
        assert said == f"layer {layer}: {count} of {len(row)} taken"
        tab.keyboard.press("ArrowRight")
    strong, weak = (row.index(f(w for w in row if w > 0.01)) for f in (max, min))
    colors = [
        figure.locator(".cell").nth(i).evaluate("x => getComputedStyle(x).backgroundColor")
        for i in (strong, weak, row.index(0))
    ]
    assert len(set(colors)) == 3  # the shade says the weight


@pytest.mark.parametrize("size", SIZES)
def test_light_and_dark_can_be_read(size, open_page):
    """Every text has 4.5 times the luminance of what is behind it, or a 4.5th of it."""
    for scheme in ("light", "dark"):
        tab = open_page(report(), size, color_scheme=scheme)
        low = tab.evaluate(CONTRASTS)
        assert not low, f"{scheme}: {low}"
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


# Texts of a page whose contrast with the colours behind them is below 4.5.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = colors => {
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = rgb => rgb.map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const low = [];
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const behind = ["white"];
    const above = [];
    for (let e = element; e; e = e.parentElement) above.unshift(e);
    for (const e of above) behind.push(getComputedStyle(e).backgroundColor);
    const style = getComputedStyle(element);
    const color = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(paint(behind)), luminance(paint([...behind, color]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([element.className, element.textContent.slice(0, 20), ratio]);
  }
  return low;
}"""


def test_texts_of_a_report_do_not_run(open_page):
    tab = open_page(hostile())
    assert tab.title() == f"Methods side by side: {HOSTILE}"
    assert tab.locator("script").count() == 1


def test_without_its_program_the_page_is_a_table_with_all_runs(open_page):
    tab = open_page(report(), "narrow", java_script_enabled=False)
    assert len(column(tab, 1)) == len(RECIPES) + 2
    assert tab.locator(".run:visible").count() == len(RECIPES)
    assert tab.locator(".copy:visible").count() == 0
    assert tab.locator("figure input:visible").count() == 0
    assert tab.locator("figure .cell.taken").count() > 0
