"""What the sources of the chapters must be, before any of them runs."""

import re

import nbformat
import pytest

from icl import tasks
from icl_book.build import chapter_path, chapters, notebooks
from icl_book.execute import parameters_in, read_parameters
from icl_book.page import SCALES
from icl_book.store import ROOT

NAMES = chapters()
PAGES = sorted((ROOT / "book").glob("*.md")) + [chapter_path(n) for n in notebooks()]


@pytest.fixture(scope="module", params=NAMES)
def book(request):
    return nbformat.read(chapter_path(request.param), as_version=4)


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def test_every_notebook_is_in_the_table_of_contents():
    assert {p.stem for p in (ROOT / "book").glob("*.ipynb")} == set(notebooks())


def test_no_outputs_are_committed(book):
    for cell in code(book):
        assert not cell.outputs
        assert cell.execution_count is None


def test_title_first(book):
    assert re.match(r"# \S", book.cells[0].source)
    assert len(re.findall(r"^# ", prose(book), re.M)) == 1


def test_skeleton(book):
    headings = re.findall(r"^## (.*)", prose(book), re.M)
    for heading in (
        "Parameters",
        "Claimed and reproduced",
        "Where it breaks",
        "Exercises",
    ):
        assert heading in headings
    assert headings[-2:] == ["Where to go next", "How this page was made"]
    assert "{admonition} The question" in prose(book)
    assert "What you will take away" in prose(book)


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    parameters = read_parameters(chapter_path(name))
    assert parameters["scale"].allowed == SCALES
    assert parameters["scale"].default == "laptop"
    for parameter in parameters.values():
        assert len(parameter.help) > 3, f"{parameter.name} has no help"
        number = type(parameter.default) in (int, float)
        assert parameter.allowed or not number, f"{parameter.name} has no range"
    if "task" in parameters:  # a chapter of synthetic data has none
        named = {*tasks.PAPER_TASKS, *tasks.KIN, "*.jsonl"}
        assert set(parameters["task"].allowed) <= named


def test_a_chapter_enters_the_numbers_of_its_own_run(book):
    """So that a sweep over its parameters has them in its table."""
    (parameters,) = (
        c for c in code(book) if "parameters" in c.metadata.get("tags", ())
    )
    if set(parameters_in(parameters, "")) - {"scale", "seed"}:
        assert any("page.result(" in cell.source for cell in code(book))


def test_tables_are_read_of_the_model_that_is_asked_for(book):
    """By ``page.rows_of``, which says whose rows they are."""
    for cell in code(book):
        assert not re.search(r"model.{,4}== .?smollm2", cell.source), cell.source


def test_lines_of_code_fit_the_page(book):
    for cell in code(book):
        if "parameters" not in cell.metadata.get("tags", ()):
            for line in cell.source.splitlines():
                assert len(line) <= 78, line


def test_every_figure_has_alt_text_and_caption(book):
    for cell in code(book):
        if "plt.show()" in cell.source:
            mystnb = cell.metadata.get("mystnb", {})
            assert len(mystnb.get("image", {}).get("alt", "")) > 40, cell.source
            assert mystnb.get("figure", {}).get("caption"), cell.source
        elif "page.slider(" not in cell.source:
            assert "subplots" not in cell.source, "a figure without plt.show()"


def test_exercises_say_how_hard_and_fold_hint_and_solution(book):
    text = prose(book)
    exercises = re.findall(r"{exercise-start}.*\n:label: (\S+)", text)
    assert len(exercises) >= 2
    for label in exercises:
        assert re.search(rf"{{solution-start}} {label}\n:class: dropdown", text)
        part = text.partition(f":label: {label}\n")[2].partition("{exercise-end}")[0]
        assert re.match(r"```\n\*(Easy|Medium|Hard), \d+ minutes\.\*", part), label
        assert "```{dropdown} Hint" in part, f"{label} has no hint"


def test_a_reader_can_test_an_answer_and_the_solution_passes(book):
    cells = "\n".join(c.source for c in code(book))
    made = re.findall(r"^def (test_\w+)\(", cells, re.M)
    assert made, "no exercise has a test"
    for name in made:
        assert re.search(rf"^{name}\(", cells, re.M), f"no solution calls {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_citations_resolve(path):
    known = re.findall(r"@\w+{(\w+),", (ROOT / "book" / "references.bib").read_text())
    cited = re.findall(r"{cite:[a-z]+}`([^`]+)`", path.read_text())
    for key in ",".join(cited).split(","):
        assert not key or key.strip() in known, f"{key} is not in references.bib"


def test_bibliography_has_addresses_and_is_cited():
    entries = (ROOT / "book" / "references.bib").read_text().split("\n@")
    pages = "".join(path.read_text() for path in PAGES)
    for entry in entries:
        key = re.search(r"\w+{(\w+),", entry)[1]
        assert re.search(rf"cite:[a-z]+}}`[^`]*{key}", pages), f"{key} is never cited"
        assert "arXiv:" not in entry, f"{key}: eprint = {{...}} makes a link"
