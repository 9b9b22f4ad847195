"""What a built page loads."""

import base64
import re
import shutil
from io import BytesIO
from pathlib import Path

import pydata_sphinx_theme
import pytest
from fontTools.ttLib import TTFont

from icl_book.web import lighten

THEME = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme/static"
PAGE = """<html><head>
<link rel="preload" as="script" href="{root}_static/scripts/bootstrap.js" />
<link href="{root}_static/styles/pydata-sphinx-theme.css?digest=1" rel="stylesheet" />
<link rel="stylesheet" type="text/css" href="{root}_static/own.css?v=2" />
<link rel="search" href="{root}search.html" />
<script src="{root}_static/scripts/fontawesome.js"></script>
<script>let before = 1;</script>
<script src="{root}_static/one.js?v=3"></script>
<script defer="defer" src="{root}_static/../mathjax/tex-chtml.js"></script>
<script>DOCUMENTATION_OPTIONS.pagename = "x";</script>
<script src="{root}_static/two.js"></script>
</head><body><article><i class="fa-solid fa-bars"></i>{body}</article></body></html>"""
SVG = '<svg width="60pt" height="30.4pt" xmlns="http://www.w3.org/2000/svg"></svg>'
STYLE = """/* kept.out */ @import "more.css";
.kept, .unknown { color: red }
.unknown > b { color: red }
@media (min-width: 1px) { .unknown { color: red } }
@media print { p:not(.unknown), .fresh { color: red } }
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("site")
    for part in ("styles", "vendor"):
        shutil.copytree(THEME / part, tmp_path / "_static" / part)
    (tmp_path / "_static" / "scripts").mkdir()
    files = {
        "scripts/fontawesome.js": "icons",
        "own.css": STYLE,
        "more.css": ".kept { background: url(up.png) }",
        "one.js": "const one = 1;  // fresh\n//# sourceMappingURL=one.js.map",
        "two.js": "const two = one + 1;",
    }
    for name, text in files.items():
        (tmp_path / "_static" / name).write_text(text)
    (tmp_path / "book").mkdir()
    (tmp_path / "_images").mkdir()
    (tmp_path / "_images" / "drawn.svg").write_text(SVG)
    data = base64.b64encode(SVG.encode()).decode()
    body = f"""<p class="kept">words</p><img src="../_images/drawn.svg" alt="drawn">
    <img src="data:image/svg+xml;base64,{data}" alt="slid" hidden>"""
    (tmp_path / "book" / "plain.html").write_text(PAGE.format(root="../", body=body))
    body = '<span class="math notranslate">x</span>'
    (tmp_path / "search.html").write_text(PAGE.format(root="", body=body))
    lighten(tmp_path)
    return tmp_path


def loads(page):
    return re.findall(r'<(?:link|script) [^>]*(?:href|src)="([^"?]+)', page.read_text())


def test_a_page_loads_one_sheet_and_one_script(site):
    own = ["_static/styles/book.css", "_static/styles/book.js"]
    found = [a for a in loads(site / "book" / "plain.html") if "search" not in a]
    assert found == [f"../{name}" for name in own]
    script = (site / "_static/styles/book.js").read_text()
    assert script.index("one = 1") < script.index("two = one")
    assert "sourceMapping" not in script
    assert not (site / "_static/scripts/fontawesome.js").exists()
    assert not [*site.rglob("*.map")]


def test_settings_come_before_the_script_and_uses_after_it(site):
    text = (site / "book" / "plain.html").read_text()
    places = [text.index(s) for s in ("let before", "book.js", "pagename")]
    assert places == sorted(places)


def test_mathjax_is_for_pages_with_formulas(site):
    assert "tex-chtml" not in (site / "book" / "plain.html").read_text()
    assert "_static/../mathjax/tex-chtml.js" in loads(site / "search.html")


def test_rules_for_unknown_classes_go_and_others_stay(site):
    style = (site / "_static/styles/book.css").read_text()
    assert re.search(r"\.kept\s*{ color: red }", style)
    assert ".unknown >" not in style
    assert "min-width: 1px" not in style
    assert re.search(r"@media print { p:not\(.unknown\), .fresh\s*{", style)
    assert "background: url(../up.png)" in style  # from styles/, as the sheet is now
    assert "Bootstrap" in style  # whose licence asks for it


def test_the_font_has_the_icons_that_are_shown(site):
    style = (site / "_static/styles/book.css").read_text()
    data = re.search(r"data:font/woff;base64,([^)]+)", style)[1]
    font = TTFont(BytesIO(base64.b64decode(data)))
    assert 0xF0C9 in font.getBestCmap()  # fa-bars, which the pages have
    assert 0xF206 not in font.getBestCmap()  # a bicycle, which they do not
    assert len(data) < 10_000


def test_pictures_are_files_that_load_late_in_a_place_of_their_size(site):
    text = (site / "book" / "plain.html").read_text()
    tags = re.findall(r"<img [^>]*>", text)
    assert len(tags) == 2
    for tag in tags:
        assert 'loading="lazy" width="80" height="41"' in tag
        source = re.search('src="([^"]+)"', tag)[1]
        assert (site / "book" / source).read_text() == SVG


def test_a_search_from_disk_has_the_texts(site):
    script = (site / "_static" / "texts.js").read_text()
    assert '"book/plain.html"' in script
    assert "words" in script
    assert "texts.js" in (site / "search.html").read_text()
    assert "texts.js" not in (site / "book" / "plain.html").read_text()
