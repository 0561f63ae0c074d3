"""The site as `make docs` leaves it: every internal link leads somewhere, pages fit."""

from __future__ import annotations

import inspect
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parent.parent / "build" / "site"
START = "docs/index.html"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / START).exists(), reason="`make docs` builds the site"),
]


class Page(HTMLParser):
    """Links out of a page and anchors in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[k] for k in ("id", "name") if k in found}
        self.links += [found[k] for k in ("href", "src") if found.get(k)]


def broken(site):
    """(page, link) for each link within the site that leads nowhere."""
    found = (p for p in site.rglob("*.html") if "_static" not in p.parts)
    pages = {p: Page(p.read_text()) for p in found}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                lost.append((path.name, link))
    return lost


def test_internal_links_lead_somewhere():
    assert broken(SITE.resolve()) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a id="here" href="b.html#there">x</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<p id="elsewhere"><a href="a.html#here">y</a>')
    assert broken(tmp_path) == [("a.html", "b.html#there"), ("a.html", "c.png")]


def test_every_public_name_has_a_page():
    import diagnostics
    import inference
    import zoo

    missing = []
    for package in (zoo, inference, diagnostics):
        for name in package.__all__:
            entry, page = getattr(package, name), f"docs/api/{package.__name__}.{name}.html"
            documented = inspect.isclass(entry) or inspect.isfunction(entry)
            own = documented and entry.__module__.startswith(package.__name__)
            if own and not (SITE / page).exists():
                missing.append(page)
    assert missing == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", [START, "docs/concepts.html", "tutorials/1_first_posterior.html"])
def test_pages_fit_the_window(name, width, tmp_path):
    """Nothing sticks out to the right, at the width of a desk and of a phone."""
    script = f"""<html><body><iframe id=f src="file://{SITE}/{name}" width={width} height=900>
    </iframe><script>f.onload = () => {{
    const d = f.contentDocument.documentElement;
    document.title = d.scrollWidth + ' ' + f.contentWindow.innerWidth }}</script></body></html>"""
    outer = tmp_path / "outer.html"
    outer.write_text(script)
    command = ["chromium", "--headless", "--no-sandbox", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=8000", "--dump-dom"]
    dom = subprocess.run([*command, str(outer)], capture_output=True, text=True, timeout=120).stdout
    inside, window = map(int, dom.split("<title>")[1].split("</title>")[0].split())
    assert inside <= window
