"""The check line holds what it should hold, and begin refuses a wrong scale."""

import numpy as np
import pytest
import torch

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
