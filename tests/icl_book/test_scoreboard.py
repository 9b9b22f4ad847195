"""The scoreboard: verdicts follow from intervals by rules that were declared."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from icl.metrics import Interval, Proportion, mean_interval
from icl_book import page, scoreboard
from icl_book.store import RESULT, ROOT, read_table


@pytest.fixture
def shown(monkeypatch):
    """The findings of a page that has begun, with one check."""
    page.begin("smoke")
    page.check("two and two", 4, 4)
    rows = []
    monkeypatch.setattr(
        page, "display", lambda data, raw: rows.extend(data[RESULT]["findings"])
    )
    return rows


def interval(mean, low, high, unit="seed"):
    error = (high - low) / 2 / scipy.stats.t.ppf(0.975, 4)
    return Interval(mean, low, high).over(unit, 5, error, 4)


def test_a_finding_says_what_was_asked_and_over_what(shown):
    page.finding(4, "s", mean_interval([1, 2, 3], "task"), above=0.5, on="a model")
    (row,) = shown
    assert json.loads(json.dumps(row)) == row  # as the build reads it
    assert scoreboard.asked(row) == "above 0.5"
    assert scoreboard.over(row) == "3 tasks"
    assert row["here"] == "+2.000 [-0.484, +4.484]"
    said = {"query": "3 queries", "draw × query": "3 draws × queries"}
    said["draw, within tasks"] = "3 draws, within tasks"
    assert {unit: scoreboard.over(row | {"unit": unit}) for unit in said} == said
    assert page.findings().loc[4, "asked"] == "above 0.5"


def test_an_identity_needs_its_check(shown):
    page.finding(1, "sums", checked="two and two")
    assert shown[0]["here"] == "to 0e+00"
    with pytest.raises(ValueError, match="no check 'other' on this page; made were: t"):
        page.finding(1, "sums", checked="other")


def test_a_finding_that_cannot_be_judged_is_refused(shown):
    right = interval(0.5, 0, 1)
    for wrong, rule in [
        (right, {}),
        (right, {"above": 0, "below": 1}),
        (right, {"above": 0, "within": 1}),
        (None, {"above": 0}),
        (right, {"checked": "two and two"}),
    ]:
        with pytest.raises(ValueError, match="give either an interval"):
            page.finding(1, "s", wrong, **rule)
    for wrong in [(2, 0, 1), (0.5, 1, 0), (math.nan, 0, 1), (0, -1, math.inf)]:
        with pytest.raises(ValueError, match="is no interval"):
            page.finding(1, "s", interval(*wrong), above=0)
    for rule in ({"above": math.nan}, {"below": math.inf}, {"within": 0}):
        with pytest.raises(ValueError, match="is no number to compare to"):
            page.finding(1, "s", right, **rule)
    for wrong in (Interval(0.5, 0, 1), Proportion(5, 10).interval()):
        with pytest.raises(ValueError, match="is no interval"):
            page.finding(1, "s", wrong, above=0)
    assert not shown


def row(claim=1, statement="x", numbers=(0.2, 0.1, 0.3), side="above", bar=0.0, **more):
    found = interval(*numbers, unit=more.pop("unit", "seed"))
    facts = {"claim": claim, "statement": statement, "role": "claim", "on": "a model"}
    facts |= {"side": side, "bar": bar, "published": [], "here": f"{found}"}
    facts |= dict(zip(("mean", "low", "high"), found, strict=True))
    facts |= {
        "unit": found.unit,
        "count": 5,
        "error": found.error,
        "freedom": 4,
        "detectable": 0.1,
    }
    return facts | more


def identity(claim=1, statement="x"):
    facts = {"claim": claim, "statement": statement, "role": "claim", "on": "float64"}
    return facts | {"side": "checked", "published": [], "here": "to 1e-12"}


def claim(number=1, kind="small model", rule=None, **more):
    rule = rule or {"statement": "x", "unit": "seed", "above": 0}
    facts = {"number": number, "kind": kind, "short": "s", "claim": "c"}
    return facts | {"source": "{cite:t}`a2020`", "change": "d", "primary": rule} | more


def verdict(numbers, side="above", bar=0.0):
    rule = {"statement": "x", "unit": "seed", side: bar}
    found = {"01_a": [row(numbers=numbers, side=side, bar=bar)]}
    return scoreboard.judge([claim(rule=rule)], found)[0]["verdict"]


@pytest.mark.parametrize(
    ("numbers", "side", "bar", "wanted"),
    [
        ((0.2, 0.1, 0.3), "above", 0, "supported"),
        ((0.2, -0.1, 0.5), "above", 0, "not supported"),
        ((-0.2, -0.3, -0.1), "above", 0, "contradicted"),
        ((0.2, 0.1, 0.3), "below", 0, "contradicted"),
        ((0.2, 0.1, 0.3), "above", 0.25, "not supported"),
        ((0.2, 0.1, 0.3), "below", 0.4, "supported"),
        ((0.01, -0.02, 0.04), "within", 0.05, "supported"),
        ((0.0, -0.1, 0.1), "within", 0.05, "not supported"),  # measured too little
        ((0.04, 0.02, 0.06), "within", 0.05, "not supported"),
        ((-0.2, -0.3, -0.1), "within", 0.05, "contradicted"),
    ],
)
def test_verdicts_follow_from_the_declared_side(numbers, side, bar, wanted):
    assert verdict(numbers, side, bar) == wanted


def test_every_empirical_claim_of_the_book_can_fall():
    for known in scoreboard.read_claims(ROOT / "book" / "claims.toml"):
        rule = known.get("primary")
        if rule is None or known["kind"] == "algebra":
            continue
        (side,) = (s for s in scoreboard.SIDES if s in rule)
        bar, unit = rule[side], rule["unit"]
        far = {"above": bar - 1, "below": bar + 1, "within": bar + 1}[side]
        numbers = (far, far - 0.1, far + 0.1)
        own = row(known["number"], rule["statement"], numbers, side, bar, unit=unit)
        (card,) = scoreboard.judge([known], {"01_a": [own]})
        assert card["verdict"] == "contradicted"


def test_holm():
    """By hand: the smallest times 3, the next times 2, none less than one before it."""
    assert scoreboard.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert scoreboard.holm([0.6, 0.7]) == [1.0, 1.0]
    assert scoreboard.holm([]) == []


def test_judged_together_one_interval_has_to_be_clearer():
    """An interval that just excludes 0 is enough alone, and not among three."""
    numbers = (0.2, 0.01, 0.39)
    known = [claim(n) for n in (1, 2, 3)]
    found = [row(1, numbers=numbers)]
    assert scoreboard.judge(known[:1], {"01_a": found})[0]["verdict"] == "supported"
    found += [row(n, numbers=(0.1 * n, -1, 1 + 0.2 * n)) for n in (2, 3)]
    cards = scoreboard.judge(known, {"01_a": found})
    assert cards[0]["verdict"] == "not supported"
    known[1]["kind"] = known[2]["kind"] = "language model"  # another family
    assert scoreboard.judge(known, {"01_a": found})[0]["verdict"] == "supported"


def test_p_values_are_those_of_the_intervals():
    values = np.array([0.3, 0.1, 0.4, 0.2, 0.05])
    found = mean_interval(values, "seed")
    own = row(numbers=tuple(found))
    want = scipy.stats.ttest_1samp(values, 0).pvalue
    assert scoreboard.p_value(own) == pytest.approx(want)
    at_end = row(numbers=tuple(found), side="below", bar=found.high)
    assert scoreboard.p_value(at_end) == pytest.approx(0.05)


def test_algebra_is_shown_apart_and_props_nothing_up():
    found = [identity(statement="i"), row(numbers=(0.2, -0.1, 0.5))]
    (card,) = scoreboard.judge([claim()], {"01_a": found})
    assert card["verdict"] == "not supported"
    assert "**Algebra, holds exactly:** i (to 1e-12)" in scoreboard.markdown([card])
    algebra = claim(kind="algebra", rule={"statement": "x"})
    (card,) = scoreboard.judge([algebra], {"01_a": [identity()]})
    assert card["verdict"] == "holds exactly"


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "claim 1 has no finding 'x'; those of the chapters: none"),
        ([row(statement="w")], "those of the chapters: w"),
        ([row(), row(3, "z", (9, 8, 10))], "of no claim in claims.toml: z"),
        ([row(), row(numbers=(9, 8, 10))], "has these twice: x"),
        ([row(), row(2, "y")], "the same numbers stand for 'x' .claim 1. and 'y'"),
        (
            [row(), row(2, "y", (-0.2, -0.3, -0.1), "below")],  # mirrored
            "the same numbers stand for",
        ),
        ([row(unit="draw")], "is declared over seed, its interval is over draw"),
        ([row(side="below")], "is declared above 0, and was asked below 0"),
        ([row(bar=0.1)], "is declared above 0, and was asked above 0.1"),
        ([row(side="within", bar=0.1)], "and was asked within ±0.1"),
        ([identity()], "is algebra if its primary is an identity, and only then"),
        ([row(role="control")], "was entered as a control"),
    ],
)
def test_claims_and_findings_that_miss_each_other(rows, problem):
    second = claim(2, rule={"statement": "y", "unit": "seed", "above": 0})
    known = [claim(), second] if any(r["claim"] == 2 for r in rows) else [claim()]
    with pytest.raises(ValueError, match=problem):
        scoreboard.judge(known, {"01_a": rows})


def test_a_control_may_have_the_numbers_of_a_statement():
    rows = [row(), row(2, "y", (9, 8, 10)), row(2, "z", role="control")]
    second = claim(2, rule={"statement": "y", "unit": "seed", "above": 0})
    assert len(scoreboard.judge([claim(), second], {"01_a": rows})) == 2


def test_cards():
    rule = {"statement": "x", "unit": "seed", "above": 0}
    rule["published"] = {
        "value": 0.3,
        "source": "{cite:t}`a2020`, T. 1",
        "unit": "nats",
    }
    found = {"02_b": [row(), row(statement="y", role="control", numbers=(3, 2, 4))]}
    text = scoreboard.markdown(scoreboard.judge([claim(rule=rule)], found))
    for part in (
        "(claim-1)=",
        "<b>supported</b> · small model",
        "x, above 0, over 5 seeds; a model.",
        "0.3 nats;\n{cite:t}`a2020`, T. 1",
        '<a href="02_b.html#claim-1">chapter 2</a>',
        "{dropdown} 0 more statements, 1 controls",
        "y (control)",
    ):
        assert part in text, part
    assert text.count('<text class="published"') == 1


def test_the_picture_is_the_same_twice(tmp_path):
    cards = scoreboard.judge([claim()], {"01_a": [row()]})
    for name in "ab":
        scoreboard.picture(cards, tmp_path / name)
    assert b"<svg" in (tmp_path / "a").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


WHOLE = """[[claim]]
number = 1
kind = "small model"
short = "s"
claim = "c"
source = "{cite:t}`a2020`"
change = "d"
primary = {statement = "x", unit = "seed", above = 0}
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("source", "sauce", "claim 1 has no source"),
        ("small model", "model", "is 'model', which is none of algebra"),
        ("primary", "secondary", "has no primary"),
        ("above = 0", "above = 0, below = 1", "one of above, below, within"),
        (", above = 0", "", "one of above, below, within"),
        ('unit = "seed", ', "", "a unit and one of"),
        ("small model", "algebra", "if it is no algebra"),
        ("above = 0", "bar = 0", "this one has statement, unit, bar"),
        ("above = 0", "above = 0, published = {value = 1}", "value, source and unit"),
        (
            "above = 0",
            'above = 0, published = {value = 1, source = "{cite:t}`b`", unit = "u"}',
            "has a published value of b, which is not its source",
        ),
        ('"s"', '"s"\n[[claim]]\nnumber = 1', "claim 1 has no"),
    ],
)
def test_a_claim_that_is_not_whole(tmp_path, old, new, problem):
    path = tmp_path / "claims.toml"
    path.write_text(WHOLE)
    assert len(scoreboard.read_claims(path)) == 1
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(ValueError, match=problem):
        scoreboard.read_claims(path)
    path.write_text(WHOLE * 2)
    with pytest.raises(ValueError, match="do not rise: .1, 1."):
        scoreboard.read_claims(path)


def test_published_values_are_those_of_the_record():
    """Means over both models and all tasks, from the typed tables."""
    claims = {
        c["number"]: c["primary"]["published"]["value"]
        for c in scoreboard.read_claims(ROOT / "book" / "claims.toml")
        if "published" in c.get("primary", {})
    }
    dai, _ = read_table("reported_dai2023")
    mean = dai.groupby(["measure", "setting"]).value.mean()
    deutch, _ = read_table("reported_deutch2024")
    deutch = deutch[deutch.table == 1].groupby(["measure", "weights"]).value.mean()
    valid, _ = read_table("reported_dai2023_momentum")
    valid = valid[valid.evaluation == "valid_1024"].set_index("attention").value
    name = "SimAOU, not normalised"
    want = {
        4: (mean["accuracy %", "ICL"] - mean["accuracy %", "FT"]) / 100,
        5: mean["Rec2FTP %", "FT"] / 100,
        6: mean["SimAOU", "FT"],
        7: math.log(valid["MoAttn"] / valid["Transformer"]),
        10: deutch[name, "trained"] - deutch[name, "untrained"],
    }
    assert claims == {n: pytest.approx(value, abs=5e-4) for n, value in want.items()}


def test_a_number_that_no_chapter_found_is_named():
    cards = scoreboard.judge([claim()], {"01_a": [row()]})
    scoreboard.check_numbers(cards, {"a.md": "it is +0.200\n[+0.100, +0.300], so"})
    wrong = {"b.md": "+0.200 [+0.100, +0.300] and +0.201 [+0.100, +0.300]"}
    with pytest.raises(ValueError, match="b.md has .0.201 .* which no chapter found"):
        scoreboard.check_numbers(cards, wrong)
