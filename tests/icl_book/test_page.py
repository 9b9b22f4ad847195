"""The check line holds what it should hold, and begin refuses a wrong scale."""

import base64
import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import pytest
import torch
from bs4 import BeautifulSoup

from icl_book import page, store
from icl_book.page import check
from icl_book.store import BookError


def test_check_prints_both_sides(capsys):
    page.begin("smoke")
    check("two and two", 4.0, 4, 1e-9)
    check("a tensor", torch.ones(3, dtype=torch.float64) + 1e-12, np.ones(3), 1e-10)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "✓ two and two: expected 4, got 4 (allowed 1e-09)"
    assert second.startswith("✓ a tensor: 3 numbers within 1.0e-12 (allowed 1e-10)")


@pytest.mark.parametrize(
    ("got", "expected", "tolerance"),
    [
        (1.0, 1.1, 0.05),
        ([1, 2], [1, 3], 0.5),
        (float("nan"), 0, 1),
        (1, 2, 0),
        ([], 0, 1),
    ],
)
def test_check_fails_the_run(got, expected, tolerance):
    with pytest.raises(AssertionError, match="the check does not hold"):
        check("no", got, expected, tolerance)


def test_check_does_not_stretch_what_it_compares():
    with pytest.raises(ValueError, match="shape|expected"):
        check("a column for a row", np.ones(3), np.ones((3, 1)))
    with pytest.raises(ValueError, match="shape|expected"):
        check("a number for a row", 1.0, np.ones(3))
    check("each row", np.ones((2, 3)), np.ones(3))
    check("each number", np.ones((2, 3)), [1])


def test_check_of_other_numbers():
    check("half precision", torch.ones(3, dtype=torch.bfloat16), 1)
    for one in (1 + 5j, np.array([1 + 5j]), torch.tensor([1 + 5j])):
        with pytest.raises(ValueError, match="imaginary"):
            check("only half of it", one, 1)


@pytest.mark.parametrize(
    "injected", ["steps = 10", "steps = 2.5", "step = 3", "eta = float('nan')"]
)
def test_a_page_refuses_what_papermill_was_given_by_hand(injected, monkeypatch):
    own = "steps: int = 3  # 1..9: how many\neta: float = 0.5  # of learning"
    cells = ["", own, "# Parameters\nsteps = 4\neta = 1\n", "page.begin(...)"]
    monkeypatch.setattr(
        page, "get_ipython", lambda: SimpleNamespace(user_ns={"In": cells})
    )
    page.begin("smoke")
    cells[2] = f"# Parameters\n{injected}\n"
    with pytest.raises(BookError, match=injected.split()[0]):
        page.begin("smoke")
    cells.insert(1, "# Needs the book's packages")  # as in a notebook downloaded
    with pytest.raises(BookError, match=injected.split()[0]):
        page.begin("smoke")


@pytest.mark.slow
def test_papermill_by_hand(tmp_path):
    """What is injected is found where papermill and ipykernel put it."""
    cells = [nbformat.v4.new_markdown_cell("# A page")]
    tags = {"tags": ["parameters"]}
    line = 'scale: str = "smoke"  # smoke | laptop: how much'
    cells += [nbformat.v4.new_code_cell(line, metadata=tags)]
    code = "from icl_book import page\npage.begin(scale)"
    cells += [nbformat.v4.new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "one.ipynb")
    paths, quiet = [tmp_path / "one.ipynb", tmp_path / "out.ipynb"], False
    with pytest.raises(papermill.PapermillExecutionError, match="colour"):
        papermill.execute_notebook(*paths, {"colour": "red"}, progress_bar=quiet)


def test_rows_of_a_model_or_a_note_that_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    shown = []
    monkeypatch.setattr(page, "display", shown.append)
    (tmp_path / "results").mkdir()
    rows = [
        "smollm2-135m,mr,1",
        "smollm2-135m,cb,2",
        "mine,mr,3",
        "mine,cb,4",
        "b,mr,5",
        "models/folder,mr,6",
        "models/folder,cb,7",
    ]
    text = "\n".join(["model,task,x", *rows])
    (tmp_path / "results" / "t.csv").write_text(text)
    (tmp_path / "models" / "folder").mkdir(parents=True)
    assert page.rows_of("t", "models/folder").x.tolist() == [6, 7]
    for model in ("mine", "models/mine.gguf"):
        assert page.rows_of("t", model).x.tolist() == [3, 4]
    assert page.rows_of("t", "smollm2-135m").x.tolist() == [1, 2]
    assert not shown
    assert "mine" in capsys.readouterr().out
    for model in ("other", "b", "else/smollm2-135m"):
        assert page.rows_of("t", model).x.tolist() == [1, 2]
        assert model in shown.pop().data
        assert "smollm2-135m" in capsys.readouterr().out


def test_begin_refuses_a_wrong_scale():
    with pytest.raises(ValueError, match="scale 'big' is not one of smoke, laptop"):
        page.begin("big")


def test_a_slider_has_a_picture_for_each_value():
    def draw(value):
        fig, ax = plt.subplots()
        ax.plot([0, value])
        return fig

    values = [0.25, 0.5, 1.0]
    words = "slope", 'A line & "its" end.', "Steeper by the slider.", 1
    found = BeautifulSoup(page.slider(draw, values, *words).data, "html.parser")
    images = found.select("figure img")
    assert [image.has_attr("hidden") for image in images] == [True, False, True]
    assert images[2]["alt"] == 'A line & "its" end. Here slope is 1.'
    pictures = [base64.b64decode(image["src"].partition(",")[2]) for image in images]
    assert all(b"<svg" in picture for picture in pictures)
    assert len(set(pictures)) == 3
    moved = found.select_one("label input[type=range]")
    assert (moved["min"], moved["max"], moved["value"]) == ("0", "2", "1")
    assert found.output.text == found.input["aria-valuetext"] == "0.5"
    assert json.loads(found.figure["data-seen"]) == ["0.25", "0.5", "1"]
    again = BeautifulSoup(page.slider(draw, values, *words).data, "html.parser")
    assert str(again) == str(found)  # pages are built twice to the same bytes


@pytest.mark.parametrize(
    ("along", "expected"), [("x", [[0, 5], [3, 5]]), ("y", [[5, 0], [5, 3]])]
)
def test_intervals_are_drawn_from_low_to_high(along, expected):
    _, ax = plt.subplots()
    page.intervals(ax, [(1.0, 0.0, 3.0), None], [5, 6], along)
    (bars,) = ax.collections
    drawn, gap = bars.get_segments()
    assert np.array_equal(drawn, expected)
    assert not gap.size
    plt.close()


def test_checks_of_a_page():
    page.begin("smoke")
    check("exact", 2, 2)
    check("near", np.array([1.0, 3.0]), [1.0, 3.25], 0.5)
    table = page.checks()
    assert table["largest difference"].tolist() == ["0e+00", "2e-01"]
    assert table["allowed"].tolist() == ["0e+00", "5e-01"]
    assert table.index.tolist() == ["exact", "near"]
    page.begin("smoke")
    assert page.checks().empty


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(page, "display", lambda data, raw: outputs.append(data))
    return outputs


def test_a_result_is_an_output_of_the_page(shown):
    page.result(
        accuracy=np.float32(0.5),
        layers=torch.tensor([1.0, float("nan")]),
        task="mr",
        none=None,
        seeds=(1, np.int64(2)),
    )
    (output,) = shown
    (row,) = output["application/vnd.icl.result+json"]["rows"]
    assert row == {
        "accuracy": 0.5,
        "layers": [1.0, None],
        "task": "mr",
        "none": None,
        "seeds": [1, 2],
    }
    assert json.loads(json.dumps(output)) == output
    assert "accuracy = 0.5" in output["text/plain"]
    with pytest.raises(ValueError, match="model = <object"):
        page.result(model=object())


@pytest.mark.parametrize("name", ["seconds", "peak_gb", "fingerprint"])
def test_columns_that_the_runner_enters_are_refused(name, shown):
    with pytest.raises(ValueError, match=name):
        page.result({"x": 1}, {"x": 2, name: 3})
    assert not shown


def test_facts_are_json_and_none_of_the_record(shown):
    page.result(x=1, facts={"mean": float("nan"), "seeds": (1, 2)})
    facts = shown[0]["application/vnd.icl.result+json"]["facts"]
    assert facts == {"mean": None, "seeds": [1, 2]}
    for name in ("commit", "torch", "runs"):
        with pytest.raises(ValueError, match=name):
            page.result(x=1, facts={name: "mine"})


def test_rows_share_columns_that_they_may_override(shown):
    rows = [{"measure": "a"}, {"measure": "b", "setting": "labels"}]
    page.result(*rows, setting="ICL", facts={"data_sha256": "12ab"})
    entered = shown[0]["application/vnd.icl.result+json"]
    assert entered["rows"] == [
        {"setting": "ICL", "measure": "a"},
        {"setting": "labels", "measure": "b"},
    ]
    assert entered["facts"] == {"data_sha256": "12ab"}
