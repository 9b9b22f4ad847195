"""The scoreboard: verdicts follow from numbers, and no claim points nowhere."""

import math

import pytest

from icl_book import page, scoreboard


@pytest.fixture
def glued(monkeypatch):
    """What a page glues that has begun, with one check."""
    page.begin("smoke")
    page.check("two and two", 4, 4)
    rows = []
    monkeypatch.setattr("myst_nb.glue", lambda name, row, display: rows.append(row))
    return rows


@pytest.mark.parametrize(
    ("interval", "rule", "verdict"),
    [
        ((0.2, 0.1, 0.3), {"above": 0}, "holds"),
        ((0.2, -0.1, 0.5), {"above": 0}, "undecided"),
        ((-0.2, -0.3, -0.1), {"above": 0}, "does not hold"),
        ((0.2, 0.1, 0.3), {"above": 0.4}, "does not hold"),
        ((0.2, 0.1, 0.3), {"above": 0.1}, "undecided"),
        ((0.2, 0.1, 0.3), {"below": 0.4}, "holds"),
        ((0.2, 0.1, 0.3), {"below": 0.05}, "does not hold"),
        ((0.2, 0.1, 0.3), {"below": 0.25}, "undecided"),
    ],
)
def test_verdicts_follow_from_intervals(glued, interval, rule, verdict):
    assert page.finding(4, "s", interval, **rule) == verdict
    (row,) = glued
    assert row["here"] == "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)
    assert page.findings().loc[4, "verdict"] == row["verdict"] == verdict


def test_an_identity_needs_its_check(glued):
    assert page.finding(1, "sums", checked="two and two") == "holds"
    assert glued[0]["here"] == "to 0e+00"
    with pytest.raises(ValueError, match="no check 'other' on this page; made were: t"):
        page.finding(1, "sums", checked="other")


def test_a_finding_that_cannot_be_judged_is_refused(glued):
    both = {"above": 0, "below": 1}
    for interval, rule in [((0, 0, 0), {}), ((0, 0, 0), both), (None, {"above": 0})]:
        with pytest.raises(ValueError, match="give either an interval"):
            page.finding(1, "s", interval, **rule)
    for interval in [(2, 0, 1), (0.5, 1, 0), (math.nan, 0, 1), (0, -1, math.inf)]:
        with pytest.raises(ValueError, match="is no interval of"):
            page.finding(1, "s", interval, above=0)
    for bar in (math.nan, math.inf):
        with pytest.raises(ValueError, match="above"):
            page.finding(1, "s", (0.5, 0, 1), above=bar)
    assert not glued


@pytest.mark.parametrize(
    ("verdicts", "sum_of_them"),
    [
        (["holds", "holds"], "stands"),
        (["holds", "undecided"], "stands in part"),
        (["does not hold", "holds"], "stands in part"),
        (["undecided", "does not hold"], "falls"),
        (["undecided"], "undecided"),
    ],
)
def test_total(verdicts, sum_of_them):
    assert scoreboard.total(verdicts) == sum_of_them


def found(claim, statement, verdict="holds"):
    facts = {"published": "0.3", "here": "0.1 [0, 0.2]", "on": "a model"}
    return {"claim": claim, "statement": statement, "verdict": verdict} | facts


CLAIMS = [
    {"number": 1, "short": "1st", "claim": "one", "source": "a", "headline": "x"},
    {
        "number": 2,
        "short": "2nd",
        "claim": "two",
        "source": "b",
        "untested": "too large",
    },
]


def test_tables():
    rows = {"01_a": [found(1, "w", "undecided")], "02_b": [found(1, "x")]}
    short, whole = scoreboard.scoreboard(CLAIMS, rows)
    both = "{doc}`1 <01_a>`, {doc}`2 <02_b>`"
    here = "0.1 [0, 0.2]"
    assert short[1:] == [
        ["1", "one", "a", "0.3", f"x: {here}", "stands in part (1 of 2)", both],
        ["2", "two", "b", "", "", "not tested", "too large"],
    ]
    assert whole[1:] == [
        ["1", "w", "0.3", here, "undecided", "a model", "{doc}`1 <01_a>`"],
        ["1", "x", "0.3", here, "holds", "a model", "{doc}`2 <02_b>`"],
    ]


def test_the_picture_counts_verdicts(tmp_path):
    rows = [found(1, "w", "undecided"), found(1, "x"), found(1, "y")]
    counts = scoreboard.tally(CLAIMS, {"01_a": rows, "02_b": [found(2, "z")]})
    assert counts == {"holds": [2, 1], "undecided": [1, 0], "does not hold": [0, 0]}
    pictures = []
    for name in "ab":
        scoreboard.picture(CLAIMS, {"01_a": rows}, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert b"<svg" in pictures[0]
    assert pictures[0] == pictures[1]


def test_claims_and_findings_that_miss_each_other():
    for rows, problem in [
        ([], "claim 1 has no finding 'x'; those of the chapters are: none"),
        ([found(1, "w")], "those of the chapters are: w"),
        ([found(1, "x"), found(3, "z")], "of no claim in claims.toml: z"),
        ([found(1, "x"), found(2, "z")], "claim 2 is said to be untested, and is not"),
    ]:
        with pytest.raises(ValueError, match=problem):
            scoreboard.scoreboard(CLAIMS, {"01_a": rows})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("claim = 'a'\nuntested = 'b'", "has no source"),
        ("claim = 'a'\nsource = 'b'", "claim 1 needs either a headline"),
        (
            "claim = 'a'\nsource = 'b'\nheadline = 'c'\n[[claim]]\n"
            "number = 1\nshort = 's'\nclaim = 'a'\nsource = 'b'\nheadline = 'c'",
            "do not rise: .1, 1.",
        ),
    ],
)
def test_a_claim_that_is_not_whole(tmp_path, text, problem):
    path = tmp_path / "claims.toml"
    path.write_text(f"[[claim]]\nnumber = 1\nshort = 's'\n{text}\n")
    with pytest.raises(ValueError, match=problem):
        scoreboard.read_claims(path)
