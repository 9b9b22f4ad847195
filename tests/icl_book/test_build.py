"""Every chapter at smoke scale, built with warnings as errors, and the pages read."""

import ast
import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
import torch
import transformers
from bs4 import BeautifulSoup

from icl.models import built_in
from icl_book.build import (
    build_book,
    chapter_path,
    chapters,
    executed_page,
    notebooks,
    run_page,
    run_sphinx,
)
from icl_book.execute import plan, run_once
from icl_book.scoreboard import read_claims
from icl_book.store import NOTEBOOK, RESULT, ROOT

pytestmark = pytest.mark.slow

#: Whether the configuration has the address of the public repository.
PUBLISHED = '  url: ""' not in (ROOT / "_config.yml").read_text()
#: Buttons to a public repository and to a hosted notebook.
BUTTONS = '[class*="source-buttons"], [class*="btn-source-"], [class*="launch-buttons"]'


@pytest.fixture(scope="module")
def html():
    return build_book("smoke", ROOT / "_build" / "smoke")


@pytest.fixture(scope="module")
def pages(html):
    return {
        path: BeautifulSoup(path.read_text(), "html.parser")
        for path in sorted(html.rglob("*.html"))
        if "_static" not in path.parts
    }


def test_pages_are_not_built_again_if_nothing_changed(html):
    page = html / "book" / "intro.html"
    before = page.stat().st_mtime_ns
    assert build_book("smoke", html.parent) == html
    assert page.stat().st_mtime_ns == before


def test_every_page_is_built(html):
    for name in [*notebooks(), "intro", "notation", "running", "execution"]:
        assert (html / "book" / f"{name}.html").is_file()


def test_nothing_is_loaded_from_elsewhere(html, pages):
    tags = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
    for path, page in pages.items():
        loads = [t.get(a) for tag, a in tags.items() for t in page.find_all(tag)]
        loads += [
            t.get("href")
            for t in page.find_all("link")
            if t.get("rel") != ["canonical"]
        ]
        for address in filter(None, loads):
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            assert not parts.scheme, f"{path}: {address}"
            assert not parts.netloc, f"{path.name} loads {address}"
            target = (path.parent / unquote(parts.path)).resolve()
            assert not parts.path or target.is_file(), f"{path.name}: no {address}"
    for style in html.rglob("*.css"):
        assert "@import url(http" not in style.read_text(), style


def test_links_inside_the_book_lead_somewhere(html, pages):
    places = {
        path: {tag.get(name) for tag in page.find_all(True) for name in ("id", "name")}
        for path, page in pages.items()
    }
    for path, page in pages.items():
        for link in page.find_all("a", href=True):
            parts = urlsplit(link["href"])
            if parts.scheme or parts.netloc:
                continue
            target = (
                (path.parent / unquote(parts.path)).resolve() if parts.path else path
            )
            there = target.exists() or (PUBLISHED and target.name == "book.pdf")
            assert there, f"{path.name} links to {link['href']}"
            if parts.fragment and target in pages:
                found = unquote(parts.fragment) in places[target]
                assert found, f"{path.name}: no anchor {link['href']}"


def test_no_page_shows_an_error_or_a_bar(pages):
    for path, page in pages.items():
        text = page.get_text()
        for sign in ("Traceback (most recent call last)", "it/s]", "Warning:", "✗"):
            assert sign not in text, f"{path.name} shows {sign!r}"
        assert not page.select(".stderr"), f"{path.name} shows a stderr stream"


def test_nothing_published_names_a_folder_of_this_machine(html):
    for path in html.rglob("*"):
        if path.is_file():
            assert str(ROOT).encode() not in path.read_bytes(), path


def test_no_tex_is_left_as_text(html, pages):
    for path in sorted((html / "book").glob("*.html")):
        article = copy.copy(pages[path].find("article"))  # parts are taken out of it
        for element in article.select(".math, pre, code, script, style"):
            element.decompose()
        left = re.search(r".{,30}(\\[A-Za-z]{2,}|\$|{[a-z:]+}`).*", article.get_text())
        assert not left, f"{path.name}: {left[0]}"


def test_every_image_has_alt_text(pages):
    for path, page in pages.items():
        for image in page.select("article img"):
            alt = image.get("alt", "")
            assert len(alt) > 40, f"{path.name}: {image.get('src')} has alt {alt!r}"


def test_headings_are_in_order(pages):
    for path, page in pages.items():
        levels = [int(h.name[1]) for h in page.select("article :is(h1,h2,h3,h4)")]
        steps = [b - a for a, b in pairwise(levels)]
        assert all(step <= 1 for step in steps), f"{path.name}: {levels}"


def test_figures_are_vector(pages):
    for path, page in pages.items():
        for image in page.select("article img"):
            kind = image["src"].endswith(".svg") or "data:image/svg+xml" in image["src"]
            assert kind, f"{path.name}: {image['src'][:80]}"


def test_execution_page_has_every_chapter_from_its_run(html, pages):
    page = pages[html / "book" / "execution.html"]
    rows = [[c.get_text() for c in r.find_all("td")] for r in page.select("table tr")]
    rows = [row for row in rows if row]
    assert len(rows) == len(chapters())
    for row, name in zip(rows, chapters(), strict=True):
        _, run = run_page(chapter_path(name), {"scale": "smoke"})
        assert row[1:] == ["smoke", f"{run['seconds']:.0f}", f"{run['peak_gb']:.1f}"]


def test_the_package_page_names_the_chapters_that_use_a_function(html, pages):
    page = pages[html / "book" / "api.html"]
    entry = page.find(id="icl.models.load_model").find_parent("dl")
    links = {link["href"].partition("#")[0] for link in entry.find_all("a", href=True)}
    for name in chapters():
        cells = json.loads((ROOT / "book" / f"{name}.ipynb").read_text())["cells"]
        code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert (f"{name}.html" in links) == ("load_model" in code), name


def test_prose_may_be_newer_than_the_run(tmp_path):
    """Its code decides whether a chapter runs again; the page has today's text."""
    source, run = tmp_path / "source.ipynb", tmp_path / "run.ipynb"
    tags = {"tags": ["parameters"]}
    cells = [
        nbformat.v4.new_markdown_cell("# Old"),
        nbformat.v4.new_code_cell("a: int = 1  # n", metadata=tags),
        nbformat.v4.new_code_cell("a"),
    ]
    injected = nbformat.v4.new_code_cell(
        "a = 2", metadata={"tags": ["injected-parameters"]}
    )
    output = nbformat.v4.new_output("display_data", {"text/plain": "2"})
    done = nbformat.v4.new_notebook(cells=[*cells[:2], injected, cells[2].copy()])
    entered = nbformat.v4.new_output(
        "display_data", {RESULT: {"findings": [{"claim": 4}]}}
    )
    done.cells[-1].outputs = [entered, output]
    done.metadata["papermill"] = {"input_path": str(source)}
    nbformat.write(done, run)
    cells[0].source = "# New"
    cells[2].metadata["mystnb"] = {"figure": {"caption": "newer"}}
    cells.insert(2, nbformat.v4.new_markdown_cell("Between"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    page = executed_page(source, run)
    shown = [cell.source for cell in page.cells]
    place = '<span id="claim-4"></span>'
    assert shown == ["# New", "a: int = 1  # n", "a = 2", "Between", place, "a"]
    assert page.cells[-1].outputs == [output]
    assert str(tmp_path) not in nbformat.writes(page)
    assert page.cells[-1].metadata.mystnb.figure.caption == "newer"


def test_a_chapter_says_what_its_run_took(html, pages):
    for name in chapters():
        _, run = run_page(chapter_path(name), {"scale": "smoke"})
        badges = pages[html / "book" / f"{name}.html"].select("h1 + p .sd-badge")
        said = [badge.get_text() for badge in badges]
        assert said[:2] == [f"{run['seconds']:.0f} s", f"{run['peak_gb']:.1f} GB"]


def test_the_scoreboard_has_every_claim_and_finding(html, pages):
    page = pages[html / "book" / "scoreboard.html"]
    claims = read_claims(ROOT / "book" / "claims.toml")
    titles = [head.get_text() for head in page.select("article h2")]
    wanted = [f"{claim['number']}. {claim['short']}" for claim in claims]
    assert [title.rstrip("#").replace("’", "'") for title in titles] == wanted
    verdicts = [mark.get_text() for mark in page.select("p.verdict b")]
    cards = json.loads((html / "_downloads" / download(page, "json")).read_text())
    assert verdicts == [card["verdict"] for card in cards]
    table = pd.read_csv(html / "_downloads" / download(page, "csv"))
    assert len(table) == sum(len(card["found"]) for card in cards) > 80
    assert table.on.notna().all()
    said = re.findall(r"[+-]\d\.\d+ \[.*?\]", (ROOT / "README.md").read_text())
    assert len(said) > 5


def test_all_code_is_folded_but_the_argument_and_solutions(html, pages):
    for name in chapters():
        cells = json.loads((ROOT / "book" / f"{name}.ipynb").read_text())["cells"]
        tags = [cell["metadata"].get("tags", []) for cell in cells]
        page = pages[html / "book" / f"{name}.html"]
        seen = page.select("article .cell_input")
        open_ = [c for c in seen if not c.find_parent("details")]
        own = [c for c in open_ if not c.find_parent(class_="solution")]
        assert len(own) == sum("argument" in each for each in tags), name
        folded = page.select("article details.hide .cell_input")
        assert len(folded) == len(seen) - len(open_) > 0, name
        said = {s.get_text() for s in page.select("details.hide p.collapsed")}
        assert said == {"Show code", "Show the table"}, name


def test_a_chapter_can_be_downloaded_executed_clean_and_as_a_script(html, pages):
    for name in chapters():
        page, found = pages[html / "book" / f"{name}.html"], {}
        for kind in ("source", "notebook", "script"):
            (link,) = page.select(f".btn-download-{kind}-button")
            found[kind] = (html / "book" / link["href"]).read_text()
        assert any(c.get("outputs") for c in json.loads(found["source"])["cells"]), name
        needs, *clean = nbformat.reads(found["notebook"], as_version=4).cells
        assert needs.source.startswith("# Needs")
        assert needs.cell_type == "code"
        assert ("git clone" in needs.source) == PUBLISHED  # nobody knows from where
        assert bool(page.select(BUTTONS)) == PUBLISHED, name
        assert clean == nbformat.read(chapter_path(name), as_version=4).cells, name
        ast.parse(found["script"])
        for link in page.select(".btn-download-table-button"):
            path = html / "book" / link["href"]
            assert path.read_bytes() == (ROOT / "results" / path.name).read_bytes()


def test_every_page_says_what_it_is_about(pages, html):
    seen = set()
    for path in (html / "book").glob("*.html"):
        head = pages[path].head
        said = head.find("meta", attrs={"name": "description"})["content"]
        assert 60 < len(said) <= 200, f"{path.name}: {said}"
        assert head.find("meta", property="og:description")["content"] == said
        seen.add(said)
    assert len(seen) == len(list((html / "book").glob("*.html")))


def test_a_term_says_what_it_means(html, pages):
    for name in chapters():
        for link in pages[html / "book" / f"{name}.html"].select(
            'a[href*="glossary.html#term"]'
        ):
            assert len(link["title"]) > 20, f"{name}: {link}"


def download(page, kind):
    """Where a file of findings lies below ``_downloads``."""
    (link,) = page.select(f'a.download[href$="findings.{kind}"]')
    return link["href"].split("_downloads/")[1]


def test_pages_are_small(html, pages):
    for name in [*chapters(), "intro", "scoreboard", "api"]:
        page = html / "book" / f"{name}.html"
        own = pages[page].select("article img")
        sources = {image["src"] for image in own if image["src"].endswith(".svg")}
        images = {page.parent / source for source in sources}
        size = page.stat().st_size + sum(p.stat().st_size for p in images)
        assert size <= 1.5e6, f"{name} has {size / 1e6:.2f} MB"


def test_pages_built_again_are_as_built_at_first(html):
    """Those that changed are, and all that show a title or a meaning of theirs."""

    def digests():
        files = sorted(p for p in html.rglob("*") if p.is_file())
        contents = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]
        names = [str(p.relative_to(html)) for p in files]
        return dict(zip(names, contents, strict=True))

    def edit(name, old, new):
        path = html.parent / "source" / "book" / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def build_again():
        mark = html.parent / ".made-of"
        mark.write_text(f"{mark.read_text().split()[0]}\nwith other sources\n")
        assert build_book("smoke", html.parent) == html
        return digests()

    first, built = digests(), html.parent / "_build" / "html" / "book"
    edit("closing.md", "\n\n", "\n\nA sentence more.\n\n")
    run_sphinx(html.parent)
    assert "A sentence more." in (built / "closing.html").read_text()
    after_one = build_again()
    # no new word, which would stay in the search's index
    edit("11_attention_maps.ipynb", "# Attention maps", "# Maps, attention")
    edit("glossary.md", "\ncalibration\n  ", "\ncalibration\n  For once: ")
    run_sphinx(html.parent)
    assert "Maps, attention" in (built / "19_memory_descent.html").read_text()
    assert 'title="For once: ' in (built / "09_icl_and_finetuning.html").read_text()
    for again in (after_one, build_again()):
        assert again.keys() == first.keys()
        assert not [name for name in first if again[name] != first[name]]


def test_every_chapter_has_the_year(html, pages):
    config = (ROOT / "_config.yml").read_text()
    year = re.search(r'copyright: "(\d+)"', config)[1]
    for name in chapters():
        text = pages[html / "book" / f"{name}.html"].get_text()
        assert re.findall(r"© Copyright (\d+)", text) == [year], name


def test_a_page_for_wrong_addresses_leads_back(html):
    page = BeautifulSoup((html / "404.html").read_text(), "html.parser")
    links = [link["href"] for link in page.find_all("a")]
    assert all((html / link).is_file() for link in links)


def test_mathjax_is_here_and_small(html):
    assert (html / "mathjax" / "tex-chtml.js").is_file()
    size = sum(p.stat().st_size for p in Path(html / "mathjax").rglob("*"))
    assert size < 4e6


def test_paper_scale_runs_the_whole_protocol(tmp_path, monkeypatch):
    """On a tiny random model with the built-in one's tokenizer, on ten sentences."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(built_in())
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "mr").mkdir()
    for split, size in [("train", 40), ("validation", 12)]:
        rows = [{"text": f"film number {n} .", "label": n % 2} for n in range(size)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "mr" / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("ICL_DATA", str(tmp_path))
    given = {"scale": "paper", "model": str(tmp_path / "tiny"), "k": 8}
    (run,) = plan(chapter_path("09_icl_and_finetuning"), [given], tmp_path / "runs")
    run_once(run)
    text = (run.folder / NOTEBOOK).read_text()
    cells = [c for c in json.loads(text)["cells"] if "outputs" in c]
    shown = [
        "".join(o["data"]["text/plain"])
        for c in cells
        for o in c["outputs"]
        if "text/plain" in o.get("data", ())
    ]
    picked = next(s for s in shown if "rates that did not diverge" in s)
    assert picked.splitlines()[1].split()[:2] == ["MR", "12"]
    assert int(picked.split()[-1]) > 30


def test_one_setting_turns_on_the_buttons(tmp_path):
    """The pages of the smoke build, without an address, have none."""
    address = "https://github.com/someone/something"
    (tmp_path / "book").mkdir()
    (tmp_path / "_mathjax").mkdir()
    shutil.copytree(ROOT / "book" / "_static", tmp_path / "book" / "_static")
    for name in ("references.bib", "404.html"):
        shutil.copy(ROOT / "book" / name, tmp_path / "book" / name)
    config = (ROOT / "_config.yml").read_text()
    config = re.sub("(?m)^  url: .*", f'  url: "{address}"', config)
    (tmp_path / "_config.yml").write_text(config)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/04_softmax_dual\n")
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.cells = [nbformat.v4.new_markdown_cell("# A page")]
    nbformat.write(notebook, tmp_path / "book" / "04_softmax_dual.ipynb")
    build = Path(sys.executable).with_name("jupyter-book")
    subprocess.run([build, "build", tmp_path, "-q"], check=True, capture_output=True)
    text = (tmp_path / "_build/html/book/04_softmax_dual.html").read_text()
    page = BeautifulSoup(text, "html.parser")
    assert len(page.select(BUTTONS)) > 1
    (pdf,) = page.select(".btn-download-book")
    assert pdf["href"] == "../book.pdf"
    links = [link["href"] for link in page.select("a[href]")]
    outside = {link for link in links if link.startswith("http")}
    clean = tmp_path / "_build/html/notebooks/04_softmax_dual.ipynb"
    (needs, *_) = nbformat.read(clean, as_version=4).cells
    assert f"git clone --quiet --depth 1 {address}" in needs.source
    assert address in outside
    assert f"{address}/edit/main/book/04_softmax_dual.ipynb" in outside
    assert any(link.startswith(f"{address}/issues/new") for link in outside)
    hub = "https://mybinder.org/v2/gh/someone/something/main"
    assert f"{hub}?urlpath=lab/tree/book/04_softmax_dual.ipynb" in outside
    assert "Launch on Binder, at smoke scale: it has 2 GB of memory" in text
