"""The check line holds what it should hold, and begin refuses a wrong scale."""

import base64
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup

from icl import chapter
from icl.chapter import check


def test_check_prints_both_sides(capsys):
    chapter.begin("smoke")
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


def test_begin_refuses_a_wrong_scale():
    with pytest.raises(ValueError, match="scale 'big' is not one of smoke, laptop"):
        chapter.begin("big")


def test_a_dial_has_a_picture_for_each_value():
    def draw(value):
        fig, ax = plt.subplots()
        ax.plot([0, value])
        return fig

    values = [0.25, 0.5, 1.0]
    told = "slope", 'A line & "its" end.', "Steeper by the dial.", 1
    page = BeautifulSoup(chapter.dial(draw, values, *told).data, "html.parser")
    images = page.select("figure img")
    assert [image.has_attr("hidden") for image in images] == [True, False, True]
    assert images[2]["alt"] == 'A line & "its" end. Here slope is 1.'
    pictures = [base64.b64decode(image["src"].partition(",")[2]) for image in images]
    assert all(b"<svg" in picture for picture in pictures)
    assert len(set(pictures)) == 3
    dial = page.select_one("label input[type=range]")
    assert (dial["min"], dial["max"], dial["value"]) == ("0", "2", "1")
    assert page.output.text == "0.5"
    assert json.loads(page.figure["data-seen"]) == ["0.25", "0.5", "1"]
    again = BeautifulSoup(chapter.dial(draw, values, *told).data, "html.parser")
    assert str(again) == str(page)  # pages are built twice to the same bytes


def test_checks_of_a_page():
    chapter.begin("smoke")
    check("exact", 2, 2)
    check("near", np.array([1.0, 3.0]), [1.0, 3.25], 0.5)
    table = chapter.checks()
    assert table["largest difference"].tolist() == ["0e+00", "2e-01"]
    assert table["allowed"].tolist() == ["0e+00", "5e-01"]
    assert table.index.tolist() == ["exact", "near"]
    chapter.begin("smoke")
    assert chapter.checks().empty


def test_a_result_is_an_output_of_the_page(monkeypatch):
    shown = []
    monkeypatch.setattr(chapter, "display", lambda data, raw: shown.append(data))
    chapter.result(
        accuracy=np.float32(0.5),
        layers=torch.tensor([1.0, float("nan")]),
        task="mr",
        none=None,
        seeds=(1, np.int64(2)),
    )
    (output,) = shown
    entered = output["application/vnd.icl.result+json"]
    assert entered == {
        "accuracy": 0.5,
        "layers": [1.0, None],
        "task": "mr",
        "none": None,
        "seeds": [1, 2],
    }
    assert json.loads(json.dumps(entered)) == entered
    assert "accuracy = 0.5" in output["text/plain"]
    with pytest.raises(ValueError, match="model = <object .* is no entry: give a"):
        chapter.result(model=object())
