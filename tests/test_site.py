"""The built site: links, pictures, and what a reader's browser makes of it."""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from lib.site import board, results

SITE = Path(__file__).resolve().parents[1] / "_build" / "html"
PHONE = 390  # CSS pixels
CONTRAST = 4.5  # WCAG 2 AA for text of normal size
CSS = SITE.parents[1] / "book" / "_static" / "book.css"


@pytest.fixture(scope="module")
def pages():
    """Path within the site -> parsed page."""
    if not (SITE / "index.html").exists():
        reason = "the site is not built: run `make book`"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    found = [path for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts]
    return {
        path.relative_to(SITE).as_posix(): BeautifulSoup(path.read_bytes(), "html.parser")
        for path in found
    }


def resources(page):
    """What a browser loads by itself."""
    for tag, attribute in [("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")]:
        yield from (found[attribute] for found in page.find_all(tag, **{attribute: True}))
    for link in page.find_all("link", href=True):
        if {"stylesheet", "icon", "preload", "prefetch", "modulepreload"} & set(link["rel"]):
            yield link["href"]


def test_every_internal_link_and_anchor_exists(pages):
    anchors = {
        name: {tag["id"] for tag in page.find_all(id=True)}
        | {tag["name"] for tag in page.find_all("a", attrs={"name": True})}
        for name, page in pages.items()
    }
    broken, checked = [], 0
    for name, page in pages.items():
        targets = [a["href"] for a in page.find_all("a", href=True)] + list(resources(page))
        for target in targets:
            where = urlsplit(urljoin(f"http://site/{name}", target))
            if where.netloc != "site":
                continue
            checked += 1
            path = unquote(where.path).lstrip("/") or "index.html"
            exists = (SITE / path).is_file()
            if exists and where.fragment and path in anchors:
                exists = unquote(where.fragment) in anchors[path]
            if not exists:
                broken.append(f"{name} -> {target}")
    assert checked > 10 * len(pages)
    assert not broken


def test_nothing_is_loaded_from_another_host(pages):
    foreign = [
        f"{name}: {target}"
        for name, page in pages.items()
        for target in resources(page)
        if urlsplit(target).netloc
    ]
    foreign += [
        f"{name}: {script.string.strip()[:200]}"
        for name, page in pages.items()
        for script in page.find_all("script", src=False)
        if re.search(r"https?://", script.string or "") and "ld+json" not in script.get("type", "")
    ]
    foreign += [
        f"{path.name}: {found}"
        for path in SITE.rglob("*.css")
        for found in re.findall(
            r"(?:url\(|@import)\s*[\"']?https?:[^)]*", path.read_text(encoding="utf-8")
        )
    ]
    assert not foreign


def test_every_picture_says_what_it_shows(pages):
    silent = [
        f"{name}: {image.get('src', '')[-60:]} alt={image.get('alt')!r}"
        for name, page in pages.items()
        for image in page.find_all("img")
        if not image.get("alt", "").strip()
        or re.search(r"\.(png|jpe?g|svg|gif|webp)$", image["alt"].strip(), re.IGNORECASE)
    ]
    assert not silent


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["", 'html[data-theme="dark"] '], ids=["light", "dark"])
@pytest.mark.parametrize("verdict", ["supported", "contradicted", "inconclusive", "unmeasured"])
def test_verdicts_can_be_read(verdict, theme):
    css = CSS.read_text(encoding="utf-8")
    rule = re.search(rf"^{re.escape(theme)}\.verdict-{verdict} {{(.*?)}}", css, re.S | re.M)[1]
    colours = [
        re.search(rf"(?<![-\w]){name}: (#\w{{6}})", rule)[1]
        for name in ("color", "background-color")
    ]
    dark, light = sorted(map(luminance, colours))
    assert (light + 0.05) / (dark + 0.05) >= CONTRAST
    assert f".verdict-{verdict}::before" in css, "colour alone must not tell verdicts apart"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(pages):
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    names = ["chromium", "chromium-browser", "google-chrome", "chrome"]
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium with its chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for argument in [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--no-proxy-server",
        f"--user-data-dir={profile}",
        "--window-size=1280,900",
    ]:
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.set_page_load_timeout(60)
        browser.set_script_timeout(60)
        yield browser


@pytest.fixture
def reading(browser, server, pages):
    """Open the site's pages one after the other, each when it has settled."""

    def open_each(names=pages):
        for name in names:
            browser.get(f"{server}/{name}")
            # MathJax draws after the page has loaded.
            browser.execute_async_script(
                """const done = arguments[0];
                const ready = window.MathJax?.startup?.promise ?? Promise.resolve();
                ready.then(() => document.fonts.ready).then(() => done());"""
            )
            yield name

    yield open_each
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_script("localStorage.clear()")


def test_no_page_has_an_error_and_all_comes_from_the_site(reading, browser, server):
    browser.get_log("browser")
    wrong = []
    for name in reading():
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        wrong += [f"{name}: {entry['message']}" for entry in errors]
        loaded = browser.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        local = (server, "data:", "blob:", "chrome")
        wrong += [f"{name} loads {url}" for url in loaded if not url.startswith(local)]
        wrong += browser.execute_script(
            """return [...document.querySelectorAll('mjx-container [data-mjx-error]')]
            .map(found => arguments[0] + ': ' + found.getAttribute('data-mjx-error'))""",
            name,
        )
        undrawn = browser.execute_script(
            """return [...document.querySelectorAll('.bd-article .math')]
            .filter(formula => !formula.querySelector('mjx-container')).length"""
        )
        wrong += [f"{name}: {undrawn} formulas not drawn"] if undrawn else []
    assert not wrong


def test_on_paper_nothing_scrolls_and_no_switch_is_left(reading, browser):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    wrong = []
    try:
        for name in reading():
            wrong += browser.execute_script(
                """const shown = found => found.getClientRects().length > 0;
                const all = selector => [...document.querySelectorAll('.bd-article ' + selector)];
                return [
                    ...all('details.hide:not([open])').filter(shown),
                    ...all('pre').filter(found => getComputedStyle(found).overflowX !== 'visible'),
                ].map(found => `${arguments[0]}: ${found.outerHTML.slice(0, 80)}`)""",
                name,
            )
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert not wrong


def test_every_picture_is_drawn_in_its_true_colours(reading, browser, server):
    browser.get(f"{server}/index.html")
    for theme in ("light", "dark"):
        browser.execute_script(
            "for (const key of ['mode', 'theme']) localStorage.setItem(key, arguments[0])",
            theme,
        )
        wrong = []
        for name in reading():
            assert browser.execute_script("return document.documentElement.dataset.theme") == theme
            wrong += browser.execute_script(
                """return [...document.querySelectorAll('.bd-article img')].filter(image => {
                    const style = getComputedStyle(image);
                    image.loading = 'eager';
                    return !(image.complete && image.naturalWidth > 0 && image.clientWidth > 0)
                        || style.filter !== 'none' || style.mixBlendMode !== 'normal';
                }).map(image => `${arguments[0]}: ${image.src}`)""",
                name,
            )
        assert not wrong, theme


def test_no_page_is_wider_than_a_phone(reading, browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    wide = []
    for name in reading():
        width = browser.execute_script("return document.documentElement.scrollWidth")
        if width > PHONE:
            culprits = browser.execute_script(
                """return [...document.querySelectorAll('.bd-main *')]
                .filter(found => found.getBoundingClientRect().right > arguments[0])
                .slice(0, 5).map(found => found.outerHTML.slice(0, 80))""",
                PHONE,
            )
            wide.append(f"{name} is {width} wide: {culprits}")
    assert not wide


def test_the_scoreboard_is_sorted_by_what_is_clicked(browser, server):
    browser.get(f"{server}/scoreboard.html")
    state = """return {
        sorted: [...document.querySelectorAll('.sortable [aria-sort]')]
            .map(found => [found.dataset.column, found.getAttribute('aria-sort')]),
        keys: [...document.querySelectorAll('.sortable tbody tr')]
            .map(row => row.cells[arguments[0]].dataset.sort),
    }"""
    before = browser.execute_script(state, 0)
    assert before["sorted"] == [["0", "ascending"]]
    assert before["keys"] == [str(place) for place in range(len(before["keys"]))]
    named = browser.execute_script(
        "return [...document.querySelectorAll('[data-of] button')].map(found => found.ariaLabel)"
    )
    assert len(named) == len(set(named)) > 0  # columns of the same name belong to other studies
    for label, title in zip(named, board.titles().values(), strict=True):
        assert label.endswith(f", {title}")
    button = "document.querySelector('.sortable th[data-column=\"1\"] button')"
    for direction in ("ascending", "descending"):
        # As a keyboard does it: the button has the focus, and Enter is a click.
        browser.execute_script(f"{button}.focus()")
        browser.switch_to.active_element.send_keys("\n")
        after = browser.execute_script(state, 1)
        assert after["sorted"] == [["1", direction]]
        assert after["keys"] == sorted(
            after["keys"], key=str.casefold, reverse=direction == "descending"
        )
        assert len(after["keys"]) == len(before["keys"])


@pytest.mark.parametrize("source", ["server", "file"])
def test_the_explorer_reads_its_cells(source, browser, server):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.get(
        f"{server}/explorer.html" if source == "server" else f"{SITE.as_uri()}/explorer.html"
    )
    reading = browser.find_element("css selector", "[data-part=reading]")
    canvas = browser.find_element("css selector", "[data-part=map]")
    pattern = r"(.+) × (.+): CKA -?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]"
    rows, columns = re.fullmatch(pattern, reading.text).groups()
    assert (rows.split(",")[0], columns.split(",")[0]) == ("ViT", "ResNet")
    assert canvas.get_attribute("aria-label").startswith("CKA of ViT with ResNet; ")
    canvas.send_keys(Keys.ARROW_UP)
    above, same = re.fullmatch(pattern, reading.text).groups()
    assert above != rows
    assert same == columns
    canvas.send_keys(Keys.PAGE_DOWN, Keys.HOME)
    assert reading.text.startswith("ViT, block 0, input × ResNet, stem, convolution: CKA ")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)  # there is nothing beyond
    assert reading.text.startswith("ViT, block 0, input × ResNet, stem, convolution: CKA ")
    browser.execute_script(
        """const right = document.querySelector('[data-part=columns]');
        right.value = 0;
        right.dispatchEvent(new Event('change'));
        document.querySelector('[data-part=blocks]').click();"""
    )
    rows, columns = re.fullmatch(pattern, reading.text).groups()
    assert rows == columns
    assert rows.endswith("output")
    assert "CKA 1.00 [1.00, 1.00]" in reading.text
    # The page scrolls smoothly, so that what is pointed at would still be on its way.
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas
    )
    wide, high = canvas.rect["width"], canvas.rect["height"]
    cell = (wide - 60) / 8
    ActionChains(browser).move_to_element_with_offset(canvas, -60, -90).perform()
    row, column = 7 - int((high / 2 - 90 - 8) / cell), int((wide / 2 - 60 - 52) / cell)
    assert row != column
    expected = f"ViT, block {row}, output × ViT, block {column}, output: CKA "
    assert reading.text.startswith(expected)


SHOWN = """return {
    buttons: [...document.querySelectorAll('.study-switch button')]
        .map(button => [button.value, button.ariaPressed]),
    images: [...document.querySelectorAll('figure[id] img')].map(image => [image.src, image.alt]),
    missing: document.querySelectorAll('figure[id] .not-here').length,
    verdicts: [...document.querySelectorAll('table.claims tr')].map(row => row.textContent),
    numbers: [...document.querySelectorAll('[data-glue]')].map(number => number.textContent),
    lab: [...document.querySelectorAll('.of-lab')].map(found => found.textContent),
}"""


@pytest.mark.parametrize("source", ["server", "file"])
def test_a_chapter_shows_another_study_in_place(source, browser, server, pages):
    from selenium.webdriver.support.ui import WebDriverWait

    site = server if source == "server" else SITE.as_uri()
    (chapter,) = (name for name in pages if name.startswith("chapters/06-"))
    browser.get(f"{site}/{chapter}")
    lab = browser.execute_script(SHOWN)
    studies = list(board.titles())
    assert lab["buttons"] == [[study, str(study == "lab").lower()] for study in studies]
    assert len(lab["images"]) == len(pages[chapter].select("figure[id] img")) == 5
    assert (lab["missing"], lab["lab"]) == (0, [])

    browser.find_element("css selector", '[value="tiny-imagenet-small"]').click()
    photos = browser.execute_script(SHOWN)
    assert dict(photos["buttons"])["tiny-imagenet-small"] == "true"
    kept = results.load("tiny-imagenet-small")["chapters"]["06-scale"]
    drawn = {name: one for name, one in kept["figures"].items() if "width" in one}
    assert [url.split("_static/")[1] for url, _ in photos["images"]] == [
        f"studies/tiny-imagenet-small/06-scale/{name}.png" for name in drawn
    ]
    assert [alt for _, alt in photos["images"]] == [one["alt"] for one in drawn.values()]
    assert photos["missing"] == 5 - len(drawn) == 2
    assert len(photos["verdicts"]) == len(lab["verdicts"]) > 5
    assert photos["verdicts"] != lab["verdicts"]
    assert len(photos["numbers"]) == len(lab["numbers"]) > 20
    assert sum(a != b for a, b in zip(photos["numbers"], lab["numbers"], strict=True)) > 10
    loaded = "return [...document.querySelectorAll('figure[id] img')].every(i => i.naturalWidth)"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(loaded))
    status = browser.find_element("css selector", ".study-switch + p").text
    assert "the text was written about the lab" in status

    browser.refresh()  # the choice is remembered
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(SHOWN) == photos)
    browser.get(f"{site}/{chapter}?study=lab-faint#e16-early")  # an address outweighs it
    chosen = "return document.querySelector('.study-switch [aria-pressed=true]').value"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(chosen) == "lab-faint")
    browser.execute_script("document.querySelector('.study-switch [value=lab]').click()")
    assert browser.execute_script(SHOWN) == lab
    browser.execute_script("localStorage.clear()")


def test_the_explorer_loads_a_study_when_it_is_chosen(browser, server):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{server}/explorer.html")
    loaded = "return [...document.scripts].map(s => s.src).filter(s => s.includes('/explorer/'))"
    WebDriverWait(browser, 30).until(lambda b: "CKA" in b.page_source)
    assert [url.rsplit("/")[-1] for url in browser.execute_script(loaded)] == ["lab.js"]
    reading = browser.find_element("css selector", "[data-part=reading]")
    before = reading.text
    browser.execute_script(
        """const study = document.querySelector('[data-part=study]');
        study.value = 'lab-masked';
        study.dispatchEvent(new Event('change'));"""
    )
    WebDriverWait(browser, 30).until(lambda _: reading.text != before)
    assert len(browser.execute_script(loaded)) == 2


def test_scripts_are_loaded_where_they_are_needed(pages):
    switched = {f"chapters/{name}.html" for name in results.load("lab-long")["chapters"]}
    ours = {"scoreboard.js": {"scoreboard.html"}, "explorer.js": {"explorer.html"}}
    ours |= {"switch.js": switched}
    ours |= {f"switch/{page[9:-5]}.js": {page} for page in switched}
    assert len(switched) == 6
    for script, those in ours.items():
        assert (SITE / "_static" / script).is_file()
        assert {
            name
            for name, found in pages.items()
            if any(urlsplit(url).path.endswith(f"/{script}") for url in resources(found))
        } == those
        text = (SITE / "_static" / script).read_text(encoding="utf-8")
        if "/" not in script:
            assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|\bimport\b", text)


def test_search_finds_the_first_chapter(browser, server, pages):
    from selenium.webdriver.support.ui import WebDriverWait

    chapter = next(name for name in pages if name.startswith("chapters/01-"))
    browser.get(f"{server}/search.html?q=CKA")
    links = "return [...document.querySelectorAll('#search-results a')].map(a => a.pathname)"
    WebDriverWait(browser, 30).until(
        lambda b: f"/{chapter}" in b.execute_script(links),
        f"searching for CKA does not find {chapter}",
    )
