"""The page of benchmarks says what the table says; scripts replace their own rows."""

import ast
import importlib.util
import io
import symtable
import sys

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from icl_book import store
from icl_book.build import run_page

ROOT = store.ROOT
NOTEBOOK = ROOT / "book" / "benchmarks.ipynb"
SCRIPTS = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"measure"}
ABOUT = {
    name: {
        "command": f"python benchmarks/{name}.py",
        "commit": commit,
        "threads": 2,
        "seconds": 7,
        "processor": "P",
        "machine": "m",
        "python": "3",
        "torch": torch,
        "transformers": "5",
        "numpy": "2",
        "peers": {"lm_eval": "0.4"},
    }
    for name, commit, torch in [("one", "c0", "2.1"), ("two", "c1", "2.2")]
}


def row(value, **others):
    start = {"benchmark": "one", "what": "a over b", "at": None, "of": None}
    return start | {"value": value, "unit": "x"} | others


def point(value, at, **others):
    return row(value, at=at, unit="s", **({"of": "tokens"} | others))


def html_tables(outputs):
    """The rows of the tables among HTML outputs, by name, their heads first."""
    found = {}
    for html in outputs:
        table = BeautifulSoup(html, "html.parser").table
        lines = [line.find_all(["th", "td"]) for line in table.find_all("tr")]
        name = table["id"].removeprefix("tab-")
        assert table.caption.get_text()
        assert name not in found
        found[name] = [[cell.get_text() for cell in line] for line in lines]
    return found


@pytest.fixture
def page(monkeypatch):
    """Runs the code of the page on a table, in this process.

    Returns:
        its tables, what it has drawn, and its names.
    """

    def run(rows=None, about=ABOUT):
        if rows is not None:  # as from its file: what is missing comes back as NaN
            text = pd.DataFrame([point(1.0, at=1), *rows]).to_csv(index=False)
            table = pd.read_csv(io.StringIO(text))
            monkeypatch.setattr(store, "read_table", lambda name: (table, about))
        names, shown, figures = {}, [], []
        monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code":
                *body, last = ast.parse(cell.source).body
                exec(compile(ast.Module(body, []), "page", "exec"), names)
                code = compile(ast.Interactive([last]), "page", "single")
                monkeypatch.setattr(sys, "displayhook", shown.append)
                exec(code, names)
        html = [output.data for output in shown if output is not None]
        (figure,) = figures
        return html_tables(html), figure, names

    with plt.rc_context():
        yield run
    plt.close("all")


def test_points_of_curves_are_drawn_and_in_no_table(page):
    rows = [point(n / 10, at=n) for n in (4, 2)]
    rows += [point(n / 5, at=n, what="c over d", benchmark="two") for n in (2, 1)]
    rows += [point(5.0, at=1, of="queries"), row(8.0, at=1, of="tokens", unit="MB")]
    tables, figure, _ = page([*rows, row(3.0, what="seen")])
    assert tables["measured"][1:] == [["one", "seen", "3 x"]]
    panels = [ax for ax in figure.axes if ax.axison]
    drawn = {
        ax.get_xlabel(): {
            line.get_label(): line.get_xydata().tolist() for line in ax.lines
        }
        for ax in panels
    }
    assert drawn == {
        "tokens": {
            "a over b": [[1, 1.0], [2, 0.2], [4, 0.4]],
            "c over d": [[1, 0.2], [2, 0.4]],
        },
        "queries": {"a over b": [[1, 5.0]]},
    }
    for ax in panels:
        assert ax.get_ylabel() == "seconds"
        assert ax.get_xscale() == ax.get_yscale() == "log"
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == [*drawn[ax.get_xlabel()]]


def test_scripts_that_have_not_run_are_listed_too(page):
    tables, _, _ = page([row(1.0)])
    _, one, two, *others = tables["runs"]
    assert one == ["one", "python benchmarks/one.py", "c0", "2", "7"]
    assert two == ["two", "python benchmarks/two.py", "c1", "2", "7"]
    rest = ["not run for this page", "", "", ""]
    assert others == [[name, *rest] for name in sorted(SCRIPTS)]


def test_versions_that_differ_are_all_listed(page):
    about = ABOUT | {"two": ABOUT["two"] | {"peers": {"papermill": "2"}}}
    tables, _, _ = page([row(1.0)], about)
    versions = dict(tables["versions"])
    assert versions["torch"] == "2.1, 2.2"
    assert versions["transformers"] == "5"
    assert versions["lm_eval"] == "0.4"
    assert versions["papermill"] == "2"


def test_nothing_is_cut_and_no_sign_is_markup(page):
    name = "a long name of <what> is measured & more, " * 4
    tables, _, _ = page([row(1.0, what=name.strip())])
    assert tables["measured"][1][1] == name.strip()


def test_every_figure_of_the_committed_table_is_on_the_page_once(page):
    table, _ = store.read_table("benchmarks")
    tables, figure, names = page()
    lines = tables["measured"][1:]
    figures = table[table["at"].isna()]
    assert sorted((name, what) for name, what, *_ in lines) == sorted(
        zip(figures["benchmark"], figures["what"], strict=True)
    )
    shown = {(name, what): value for name, what, value, *_ in lines}
    for _, line in figures.iterrows():
        value = names["format_value"](line["value"], line["unit"])
        assert shown[line["benchmark"], line["what"]] == value
    drawn = sum(len(line.get_xydata()) for ax in figure.axes for line in ax.lines)
    assert drawn == (table["at"].notna() & (table["unit"] == "s")).sum() > 0
    assert {line[0] for line in tables["runs"][1:]} == SCRIPTS


def test_the_notebook_is_committed_as_chapters_are():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert max(map(len, cell.source.splitlines())) <= 78
        if "plt.show()" in cell.source:
            about = cell.metadata.mystnb
            assert about.figure.name == "fig-costs"
            assert about.figure.caption.endswith(".")
            assert 40 < len(about.image.alt) < len(about.figure.caption) < 600


def test_the_committed_table_is_of_the_scripts_there_are():
    table, about = store.read_table("benchmarks")
    assert set(table["benchmark"]) == set(about) <= SCRIPTS
    assert not table.duplicated(["benchmark", "what", "at", "of", "unit"]).any()
    assert table["value"].notna().all()
    for name, facts in about.items():
        assert facts["command"] == f"python benchmarks/{name}.py"
        assert {"lm_eval", "papermill", "distributed"} <= facts["peers"].keys()


@pytest.mark.slow
def test_the_page_is_the_same_run_as_the_book_runs_it(page):
    run, _ = run_page(NOTEBOOK, {})
    done = nbformat.read(run.folder / store.NOTEBOOK, as_version=4)
    outputs = [o for cell in done.cells for o in cell.get("outputs", ())]
    assert {o.output_type for o in outputs} <= {"execute_result", "display_data"}
    assert sum("image/svg+xml" in o.data for o in outputs) == 1
    html = [o.data["text/html"] for o in outputs if "text/html" in o.data]
    tables, _, _ = page()
    assert html_tables(html) == tables
    assert tables.keys() == {"measured", "runs", "versions"}


# -- measure.py, and the scripts -----------------------------------------------------


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A fresh ``benchmarks/measure.py`` that writes elsewhere and knows no peers."""
    path = ROOT / "benchmarks" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PEERS", ("numpy",))
    return module


def run(measure, monkeypatch, script, task=None, **figures):
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py"])
    measure.ROWS.clear()
    for what, value in figures.items():
        measure.record(what, value)
    measure.save(task)


def test_a_script_replaces_its_own_rows_alone(measure, monkeypatch):
    run(measure, monkeypatch, "b", old=1, kept=2)
    run(measure, monkeypatch, "b", kept=2)
    run(measure, monkeypatch, "a", other=3)
    run(measure, monkeypatch, "b", kept=4)
    table, about = store.read_table("benchmarks")
    found = list(table[["benchmark", "what", "value"]].itertuples(index=False))
    assert [tuple(line) for line in found] == [("a", "other", 3), ("b", "kept", 4)]
    assert list(table) == list(store.pd.read_csv(ROOT / "results" / "benchmarks.csv"))
    assert list(about) == ["a", "b"]
    assert about["b"]["command"] == "python benchmarks/b.py"


def test_the_record_of_a_script_says_what_made_its_figures(measure, monkeypatch):
    class Task:
        name, source = "mr", "a folder"

        def digest(self):
            return "d0"

    run(measure, monkeypatch, "a", drawn=1)
    run(measure, monkeypatch, "b", Task(), read=1)
    _, about = store.read_table("benchmarks")
    _, committed = store.read_table(ROOT / "results" / "benchmarks.csv")
    assert about["a"].keys() == committed["attention"].keys()
    assert about["b"].keys() == committed["scoring"].keys()
    assert about["b"]["data_sha256"] == "d0"
    assert about["a"] | store.environment() == about["a"]
    assert about["a"]["peers"] == {"numpy": about["a"]["numpy"]}


def test_numbers_have_three_digits_where_measured_and_on_the_page(
    page, measure, capsys
):
    _, _, names = page([row(1.0)])
    capsys.readouterr()
    wanted = {1234.5: "1,230", 0.98765: "0.988", 12.34: "12.3", 0: "0", 2e-7: "2e-07"}
    for value, want in wanted.items():
        assert names["format_value"](value) == want
        assert names["format_value"](value, "x") == f"{want} x"
        measure.record("a", value, "x", at=2048, of="tokens", at_least=1.5, at_most=3e4)
        line = f"a, 2,048 tokens: {want} x (target: at least 1.5, at most 30,000)\n"
        assert capsys.readouterr().out == line
        measure.record("a", value)
        assert capsys.readouterr().out == f"a: {want}\n"


def test_the_power_of_a_curve(measure):
    points = {n: 3 * n**1.5 for n in (1, 2, 4, 8)}
    measure.record_curve("a", "tokens", points, at_most=1)
    *points, power = measure.ROWS
    assert [point["at"] for point in points] == [1, 2, 4, 8]
    assert power["value"] == pytest.approx(1.5)
    measure.ROWS.clear()
    measure.record_curve("b", "tokens", {1: 9.0, 2: 2.0, 4: 4.0}, last=2)
    assert measure.ROWS[-1]["value"] == pytest.approx(1)
    assert "(2 to 4)" in measure.ROWS[-1]["what"]


@pytest.mark.parametrize("script", ["measure", *sorted(SCRIPTS)])
def test_what_a_script_imports_is_there(script):
    """In functions too, where only a measurement would find it missing."""
    text = {n: (ROOT / "benchmarks" / f"{n}.py").read_text() for n in SCRIPTS}
    text["measure"] = (ROOT / "benchmarks" / "measure.py").read_text()
    for node in ast.walk(ast.parse(text[script])):
        if not isinstance(node, ast.ImportFrom):
            continue
        wanted = {name.name for name in node.names}
        if node.module in text:
            top = symtable.symtable(text[node.module], node.module, "exec")
            assert wanted <= {*top.get_identifiers()}, node.module
        elif node.module.split(".")[0] in {"icl", "icl_book"}:
            found = vars(importlib.import_module(node.module))
            assert wanted <= found.keys(), node.module
