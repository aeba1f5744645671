"""The page in a real browser: `make test-page` installs one."""

import json
import os
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import httpx2
import pytest

from tests.serving import engines
from tests.serving.folders import write_index, write_model
from tests.serving.test_serve import SAYS, process

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

MISSING = BROWSER is None or find_spec("playwright") is None

pytestmark = [
    pytest.mark.slow,
    # `make test-page` asks for it, so that a browser that is not found is an error there.
    pytest.mark.skipif(MISSING and "PREFIXMEM_PAGE" not in os.environ, reason="make test-page installs a browser"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / "model")
    index = write_index(folder / "items.json")
    named = json.loads(index.read_text())
    named["<img src=x onerror=document.title='run'>"] = named["item 5"]
    index.write_text(json.dumps(named))
    command = ["serve", folder / "model", "--catalogue", index, "--port", "0", "--start", "1", "--json"]
    with process("-m", "prefixmem_fast.cli", *command, "--max-history", "3", "--max-beams", "9") as (one, line):
        yield SimpleNamespace(process=one, address=json.loads(line)["address"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=BROWSER, headless=True, args=FLAGS
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, server):
    opened = browser.new_page()
    opened.set_default_timeout(30_000)
    opened.wrong, opened.asked = [], []
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("console", lambda message: opened.wrong.append(message.text) if "Content Security" in message.text else 0)
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(server.address)
    opened.wait_for_selector("#about:has-text('9 items, 3 codes each')")
    yield opened
    assert opened.wrong == []
    assert all(url.startswith((server.address, "data:")) for url in opened.asked), "nothing from elsewhere"
    opened.close()


def add(page, typed, taken):
    page.fill("#search", typed)
    page.wait_for_selector(f"#names li:has-text('{taken}')")
    page.keyboard.press("Enter")


def texts(page, selector):
    return [one.inner_text() for one in page.query_selector_all(selector)]


def answered(page):
    page.wait_for_selector("#seconds:has-text('answered in')")


def test_adding_an_item_shows_the_tree_and_the_items(page, server):
    add(page, "ITEM 3", "item 3")
    answered(page)
    body = {"history": ["item 3"], "num_beams": 9}
    expected = httpx2.post(f"{server.address}/v1/recommend", json=body).json()
    assert texts(page, "#history .name") == ["item 3"]
    assert texts(page, "#history .sid") == ["1 · 3 · 0"]
    names = [", ".join(found["names"]) for found in expected["items"]]
    assert texts(page, "#items .name") == names
    assert [len(level) for level in expected["beams"]] == [3, 6, 7], "all prefixes of the eight items"
    boxes = page.eval_on_selector_all("#tree g.node[data-prefix]", "all => all.map(one => one.dataset.prefix)")
    prefixes = [",".join(map(str, beam["prefix"])) for level in expected["beams"] for beam in level]
    assert sorted(boxes) == sorted(prefixes)
    links = page.eval_on_selector_all(
        "#tree .link", "all => all.map(one => [one.dataset.prefix, one.getAttribute('stroke-width')])"
    )
    widths = {prefix: float(width) for prefix, width in links}
    for level in expected["beams"]:
        of_level = [widths[",".join(map(str, beam["prefix"]))] for beam in level]
        assert of_level == sorted(of_level, reverse=True), "wider where it is more probable"
        assert of_level[0] == 10


def test_hovering_shows_a_prefix_and_lights_its_path(page):
    add(page, "item 3", "item 3")
    answered(page)
    page.hover("#tree g.node[data-prefix='1,3']")
    assert page.inner_text("#hint").startswith("Prefix 1 · 3\nProbability ")
    dim = page.eval_on_selector_all("#tree g.node.dim", "all => all.map(one => one.dataset.prefix)")
    assert "1" not in dim
    assert "1,3,4" not in dim
    assert "1,0" in dim
    lit = page.eval_on_selector_all("#items li.lit", "all => all.map(one => one.dataset.prefix)")
    assert sorted(lit) == ["1,3,0", "1,3,4"]
    page.mouse.move(2, 2)
    page.wait_for_selector("#hint", state="hidden")


def test_chips_are_removed_and_the_example_and_fewer_beams(page):
    page.click("#example")
    answered(page)
    assert len(texts(page, "#history .name")) == 3
    page.click("#history li:first-child button")
    answered(page)
    assert len(texts(page, "#history .name")) == 2
    page.fill("#beams", "2")
    page.keyboard.press("Tab")
    page.wait_for_selector("#items:not(:has(li:nth-child(3))) li:nth-child(2) .name")
    page.click("#clear")
    page.wait_for_selector("#tree .empty")
    assert texts(page, "#history li") == ["No item yet."]


def test_errors_are_said_in_words(page):
    page.fill("#search", "nothing like it")
    page.wait_for_selector("#names .empty")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == (
        "history has items that the catalogue does not: 'nothing like it'; GET /v1/items?prefix= lists names"
    )
    page.click("#clear")
    page.wait_for_selector("#error", state="hidden")
    for _ in range(4):
        add(page, "item 1", "item 1")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "history has 4 items; allowed are 3 at most: send the last 3"
    page.click("#example")
    page.fill("#beams", "10")
    page.keyboard.press("Tab")
    page.wait_for_selector("#error:has-text('num_beams = 10; allowed are 1..9')")


def test_names_are_text(page):
    add(page, "<img", "<img")
    answered(page)
    assert texts(page, "#history .name") == ["<img src=x onerror=document.title='run'>"]
    assert page.query_selector("img") is None
    assert page.title() == "prefixmem serve: which item comes next?"


def test_both_colour_schemes_can_be_read(page):
    """Contrast of text with what is behind it, by WCAG's formula: 4.5 or more."""
    program = """() => {
        const light = (css) => {
            const [r, g, b] = css.match(/[0-9.]+/g).map(Number).map(c => c / 255)
                .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const style = (selector) => getComputedStyle(document.querySelector(selector));
        const pairs = [["h1", "body"], ["header p", "body"], ["h2", "section"], [".note", "section"],
            ["#example", "#example"]];
        return pairs.map(([text, behind]) => {
            const [one, other] = [light(style(text).color), light(style(behind).backgroundColor)].sort((a, b) => b - a);
            return (one + 0.05) / (other + 0.05);
        });
    }"""
    behind = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert min(page.evaluate(program)) >= 4.5
        behind.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(behind) == 2


def test_a_server_that_has_gone_is_said(browser, tmp_path_factory):
    folder = engines.pipes(tmp_path_factory.mktemp("says"))
    write_model(folder, kind="bare")
    write_index(folder / "items.json")
    (folder / "says.py").write_text(SAYS)
    with process(folder / "says.py", folder) as (one, line):
        page = browser.new_page()
        page.goto(line.strip())
        page.wait_for_selector("#about:has-text('8 items')")
        one.kill()
        one.wait()
        page.click("#example")
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#error") == "The server does not answer. Is prefixmem serve still running?"
        page.close()
