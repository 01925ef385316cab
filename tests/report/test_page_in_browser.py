"""The page of a report as Chromium has it: nothing to complain of, nothing asked for, light and dark, narrow, by keyboard."""

from pathlib import Path

import pytest

from cola_ds.cli import main
from tests.report.test_page import HOSTILE, colors, draw_metrics, save_run_of
from tests.report.test_tables import LORA, save_result
from tests.support.browser import CHROMIUM, chromium

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Three runs, of which one has a hostile name, and a task with several seeds."""
    place = tmp_path_factory.mktemp("pages")
    for number, name in enumerate(["one", "two", HOSTILE[1].replace("/", "\u2215")]):
        evals = [{"step": step, "loss": 2.0 - step / 100} for step in range(1, 600, 100)]
        save_run_of(
            place / "r" / name, draw_metrics(600, number), evals=evals, knots=[], events=[{"event": HOSTILE[0]}]
        )
    for seed in range(3):
        save_result(
            place / f"r/seed{seed}", 0.5 + seed / 10, seed=seed, task="a-long-name-" * 8, losses=[2.0, 1.0], **LORA
        )
    assert main(["report", str(place / "r"), "--html", str(place / "x.html")]) == 0
    return (place / "x.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_to_complain_of(browser, url, width, scheme):
    """No message on the console, no request but the page's own, nothing wider than the screen, the colours of the scheme."""
    browser.open(url, width, scheme)
    browser.find("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.find("document.documentElement.scrollWidth") == width
    every = "[...document.querySelectorAll('svg, p, h1, h2, h3, figure')]"
    wide = f"{every}.filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.textContent)"
    assert browser.find(wide) == []
    assert browser.complaints == []
    assert browser.requests == [url]
    found = colors(scheme == "dark")
    shown = "getComputedStyle(document.querySelector('{}')).{}"
    for place, what, name in (
        ("body", "backgroundColor", "page"), ("body", "color", "ink"),
        ("path.line.c0", "stroke", "c0"), ("circle.c1", "fill", "c1"),
    ):  # fmt: skip
        assert browser.find(shown.format(place, what)) == rgb(found[name])


def rgb(color):
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"


def test_what_is_not_the_page_s_own_is_refused(browser, url, tmp_path):
    """A check of the checks: what this page must not have is seen by them."""
    page = tmp_path / "x.html"
    text = Path(url.removeprefix("file://")).read_text(encoding="utf-8")
    page.write_text(
        text.replace("</main>", "<script>document.title = 'x'</script><img src='http://127.0.0.1:9/x'></main>")
    )
    browser.open(page.as_uri())
    assert len(browser.complaints) == 2
    assert all("Content Security Policy" in each for each in browser.complaints)
    assert browser.find("document.title") == "Report of 6 runs"


def test_charts_keep_their_labels_within(browser, url):
    """No label of an axis is cut off, at the width of a telephone either."""
    for width in (360, 1200):
        browser.open(url, width)
        browser.find("document.querySelectorAll('details').forEach(each => each.open = true)")
        outside = """[...document.querySelectorAll('svg text')].filter(text => {
            const [a, b] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
            return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1; }).map(text => text.textContent)"""
        assert browser.find(outside) == []


def test_by_keyboard(browser, url):
    """Tab reaches the link past the header, the colours, the tables, each run; a key opens what is folded and chooses colours."""
    browser.open(url)
    browser.press("Tab")
    assert browser.find("document.activeElement.className") == "skip"
    browser.press("Tab")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.find("document.activeElement.id") == "dark"
    assert browser.find("getComputedStyle(document.body).backgroundColor") == rgb(colors(True)["page"])
    seen = []
    for _ in range(200):
        browser.press("Tab")
        seen.append(browser.find("document.activeElement.tagName + '.' + document.activeElement.className"))
        if seen[-1] == "SUMMARY." and browser.find("document.activeElement.parentElement.className") == "run":
            break
    assert {"A.", "DIV.scroll", "SUMMARY."} <= set(seen)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.find(outline) == "solid"
    assert not browser.find("document.activeElement.parentElement.open")
    browser.press("Enter", "\r")
    assert browser.find("document.activeElement.parentElement.open")


def test_a_link_opens_the_run_that_it_leads_to(browser, url):
    browser.open(url)
    opened = "document.getElementById('run-2').closest('details').open"
    assert not browser.find(opened)
    browser.find("document.querySelector('a[href=\"#run-2\"]').click()")
    assert browser.find(opened)


def test_in_print(browser, url):
    """On white paper, with every run opened, and without what is for the screen."""
    browser.open(url, scheme="dark")
    seen = "document.querySelector('.run figure').checkVisibility()"
    assert not browser.find(seen)
    browser.like("dark", media="print")
    assert browser.find(seen)
    assert browser.find("getComputedStyle(document.body).backgroundColor") == rgb(colors(False)["page"])
    assert browser.find("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.like("light")
