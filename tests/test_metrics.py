"""Proportions against published intervals, Rec2FTP against cases by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl.metrics import Proportion, accuracy, mean_interval, rec2ftp


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857-872, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    got = Proportion(successes, trials).interval()
    assert got == pytest.approx((low, high), abs=5e-5)


def test_mean_interval():
    # t with 6 degrees of freedom has its 97.5 % point at 2.446912 (any table)
    half = 2.446912 * math.sqrt(14 / 3) / math.sqrt(7)
    got = mean_interval([1, 2, 3, 4, 5, 6, 7])
    assert got == pytest.approx((4, 4 - half, 4 + half), abs=1e-6)
    with pytest.raises(ValueError, match="needs two values or more"):
        mean_interval([1.0])


def test_rec2ftp_by_hand():
    zsl = np.array([0, 0, 0, 0, 1, 1, 0, 1], bool)
    ft = np.array([1, 1, 1, 0, 1, 0, 0, 1], bool)
    icl = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    # FT mends 0, 1, 2; of these ICL is right on 0 and 2. Dividing by the examples
    # on which FT and ICL differ, as one port does, would give another number.
    assert rec2ftp(zsl, ft, icl) == (2, 3)


triples = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1)


@given(triples)
def test_rec2ftp_by_counting(rows):
    both = sum(f and i and not z for z, f, i in rows)
    mended = sum(f and not z for z, f, _ in rows)
    assert rec2ftp(*np.array(rows, bool).T) == (both, mended)


def test_nothing_mended_is_not_defined():
    right = np.ones(4, bool)
    recall = rec2ftp(right, right, right)
    assert math.isnan(recall.value)
    assert all(map(math.isnan, recall.interval()))
    assert str(recall) == "not defined (0 of 0)"


def test_bad_input():
    with pytest.raises(ValueError, match="must be a boolean array"):
        accuracy([1, 0, 1])
    with pytest.raises(ValueError, match=r"shapes are \(2,\), \(3,\) and \(2,\)"):
        rec2ftp([True] * 2, [True] * 3, [True] * 2)
