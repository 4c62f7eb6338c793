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


def test_search_finds_the_first_chapter(browser, server, pages):
    from selenium.webdriver.support.ui import WebDriverWait

    chapter = next(name for name in pages if name.startswith("chapters/01-"))
    browser.get(f"{server}/search.html?q=CKA")
    links = "return [...document.querySelectorAll('#search-results a')].map(a => a.pathname)"
    WebDriverWait(browser, 30).until(
        lambda b: f"/{chapter}" in b.execute_script(links),
        f"searching for CKA does not find {chapter}",
    )
