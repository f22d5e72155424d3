"""The site as a reader gets it: built without network, read file by file, and opened in a real browser."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import flowchart
import pytest
import yaml
from browser import CHROMIUM, Browser

pytest.importorskip("sphinx", reason="the site's packages aren't installed: `make site`")
pytest.importorskip("myst_nb", reason="the site's packages aren't installed: `make site`")

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "embed": "src",
         "link": "href"}
VERBATIM = ("pre", "code", "script", "style")
MATHS = r"(^|\s)\$[^$\n]+\$(\s|$)|\\frac|\\sum|\\begin\{"

class Page(HTMLParser):
    """Links, what is loaded, pictures, ids, words, and code that isn't inside of a <details>."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.links, self.loaded, self.pictures, self.ids = path, [], [], [], set()
        self.section, self.by_section, self.folds, self.code, self.unfolded = None, {}, 0, 0, 0
        self.verbatim, self.words, self.classes = 0, [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "section":
            self.section = found.get("id")
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            self.by_section.setdefault(self.section, []).append(found["href"])
        if tag in LOADS and LOADS[tag] in found:
            self.loaded.append(found[LOADS[tag]])
        if tag == "img":
            self.pictures.append(found)
        self.folds += tag == "details"
        self.verbatim += tag in VERBATIM
        classes = set((found.get("class") or "").split())
        self.classes |= classes
        if tag == "div" and "cell_input" in classes:
            self.code += 1
            self.unfolded += not self.folds

    def handle_endtag(self, tag):
        self.folds -= tag == "details"
        self.verbatim -= tag in VERBATIM

    def handle_data(self, data):
        if not self.verbatim:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built from the working tree, as `make site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-c", OFFLINE, "-q", "-W", "--keep-going", "-c", ROOT / "docs/site",
                           "-d", folder / "doctrees", ROOT, folder / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site) -> list[Page]:
    return [Page(path) for path in sorted(site.rglob("*.html"))]


def test_every_document_claim_and_executed_notebook_is_a_page(site):
    sources = [ROOT / "README.md", ROOT / "results/README.md", ROOT / "results/scales.md", *ROOT.glob("docs/*.md"),
               *ROOT.glob("results/*/claims.md"), *ROOT.glob("results/*/continuations.md"),
               *ROOT.glob("results/*/last_word.md"), *ROOT.glob("results/*/notebooks/*.ipynb")]
    expected = {path.relative_to(ROOT).with_suffix(".html") for path in sources if "smoke" not in path.parts}
    assert len(expected) > 30
    assert {path.relative_to(site) for path in site.rglob("*.html")} - expected == {
        Path("index.html"), Path("search.html")}
    assert all((site / path).exists() for path in expected)


def test_the_folder_opens_with_the_readme(site):
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()


def test_every_link_leads_to_a_file_and_place_of_the_site(site, pages):
    ids = {page.path: page.ids for page in pages}
    links = [(page.path, link) for page in pages for link in [*page.links, *page.loaded]]
    assert sum(link.endswith(".jsonl") for _, link in links) > 100
    for page, link in links:
        parts = urlsplit(link)
        if not parts.scheme:
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file() and target.is_relative_to(site), f"{page}: {link}"
            if parts.fragment and target in ids:
                assert parts.fragment in ids[target], f"{page}: {link}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for page in pages:
        assert not [address for address in page.loaded if urlsplit(address).scheme not in ("", "data")], page.path
    for path in site.rglob("*.css"):
        for address in re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", path.read_text(encoding="utf-8")):
            local = address.startswith("data:") or (path.parent / address.partition("?")[0]).exists()
            assert local, f"{path}: {address}"


def test_every_picture_has_a_text(pages):
    pictures = [(page.path, picture) for page in pages for picture in page.pictures]
    notebooks = [path for path in ROOT.glob("results/*/notebooks/*.ipynb") if "smoke" not in path.parts]
    assert len(pictures) > sum(path.read_text().count('"image/png": "') for path in notebooks) > 20  # README's too
    for page, picture in pictures:
        assert len(picture.get("alt") or "") > 10 and ".png" not in picture["alt"], f"{page}: {picture}"


def test_code_is_folded(pages):
    assert sum(page.code for page in pages) > 100
    assert not [page.path for page in pages if page.unfolded]


def test_a_claim_links_to_its_notebook_tables_figures_and_logs(site):
    """At the profile that has all its runs; each of the links is a file, as another test says."""
    ledger = yaml.safe_load((ROOT / "ouroboros/analysis/claims.yaml").read_text())
    links = Page(site / "results/tiny/claims.html").by_section
    verdicts = (ROOT / "results/tiny/claims.md").read_text()
    for claim in (claim["id"] for claim in ledger if claim["rule"] not in ("value", "count")):
        kinds = {Path(link).suffix for link in links[claim.replace("_", "-")]}
        measured = "runs</summary>" in verdicts.partition(f"\n## {claim}\n")[2].partition("\n## ")[0]
        assert kinds >= {".html", ".csv", ".png", *[".jsonl"] * measured}, claim


def test_a_value_links_to_its_notebook_tables_figures_and_logs(site):
    text = (site / "results/tiny/claims.html").read_text().partition("where each is measured")[2]
    for claim in ("L36", "rec", "c1", "s8", "adv16", "range"):
        kinds = {Path(link).suffix for link in re.findall('href="([^"]+)"', text.partition(f">{claim}</span>")[2]
                                                          .partition("</li>")[0])}
        assert kinds == {".html", ".csv", ".png", ".jsonl"}, claim


def test_the_raw_logs_are_there_as_they_are(site):
    logs = [path for path in ROOT.glob("results/*/runs/*.jsonl") if "smoke" not in path.parts]
    assert len(logs) > 500
    for log in logs:
        assert (site / log.relative_to(ROOT)).read_bytes() == log.read_bytes(), log


def test_no_page_has_maths(pages):
    """Nothing renders it: a page that gets some must bring a renderer that needs no network."""
    for page in pages:
        assert not (found := re.search(MATHS, "".join(page.words))), f"{page.path}: {found[0]}"
        assert "math" not in page.classes, page.path


# ------------------------------------------------------------------------------------------------- the drawing

def test_the_drawing_says_what_readmes_says(site):
    source = (ROOT / "README.md").read_text().partition("```mermaid")[2].partition("```")[0]
    drawn = re.search(r"<svg class=\"flowchart\".*?</svg>", (site / "README.html").read_text(), re.DOTALL)[0]
    written = {re.sub("<.*?>", "", text) for text in re.findall(r"<text.*?</text>", drawn)}
    assert written == {"tokens", "state", "loss", *re.findall(r'"([^"]+)"', source)}
    assert drawn.count('class="arrow"') == source.count("-->")


def test_a_drawing_has_every_node_once_and_every_edge():
    chart = flowchart.parse('flowchart LR\n  a --> b["one & two"] -- "x" --> c((see))\n  c --> a')
    assert chart.nodes == {"a": ("a", False), "b": ("one & two", False), "c": ("see", True)}
    assert chart.edges == [("a", "b", ""), ("b", "c", "x"), ("c", "a", "")]
    drawn = flowchart.svg(chart)
    assert drawn.count("<rect") == 3 and drawn.count('class="arrow"') == 3 and "one &amp; two" in drawn


@pytest.mark.parametrize("source", ["graph LR\n a --> b", "flowchart LR\n a ==> b", "flowchart LR\n a --> {b}",
                                    "flowchart LR\n a -->", "flowchart LR\n a & b --> c"])
def test_a_drawing_that_cannot_be_drawn_is_refused(source):
    with pytest.raises(ValueError, match="flowchart"):
        flowchart.parse(source)


# ------------------------------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on PATH")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_opens_from_disk(width, scheme, browser, pages):
    """Without a complaint on the console or a request that leaves the disk, and no wider than the window."""
    browser.show(width, scheme)
    for page in pages:
        browser.open(page.path.as_uri())
        assert browser.complaints() == [], page.path
        assert {urlsplit(address).scheme for address in browser.requested()} <= {"file", "data"}, page.path
        assert browser.value("document.documentElement.scrollWidth") <= width, page.path
        assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth)"), page.path
        background = browser.value("getComputedStyle(document.body).backgroundColor")  # rgb(0, 0, 0)
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128) == (scheme == "light"), page.path


def test_what_is_wide_fits_the_column_or_scrolls_in_a_box(browser, pages):
    browser.show(390, "light")
    wide = ("[...document.querySelectorAll('article *')].filter(element => element.getBoundingClientRect().right > 390"
            " && !element.closest('.table-wrapper, .cell_output, pre')).map(element => element.outerHTML.slice(0, 99))")
    for page in pages:
        browser.open(page.path.as_uri())
        assert browser.value(wide) == [], page.path


def test_searching_needs_no_server(browser, site):
    browser.show(1280, "light")
    browser.open(f"{(site / 'search.html').as_uri()}?q=controller")
    found = browser.value("new Promise(done => { const look = () => { const n = document.querySelectorAll("
                          "'ul.search li').length; n > 5 ? done(n) : setTimeout(look, 50) }; look() })")
    assert found > 5
    assert browser.complaints() == []
