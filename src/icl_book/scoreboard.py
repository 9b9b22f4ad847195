"""The scoreboard: claims in ``book/claims.toml``, judged by what the chapters found."""

import re
import tomllib
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.style import context
from scipy.special import stdtr  # scipy.stats takes half a second to import

#: What a claim is about. Claims of one kind are judged together.
KINDS = ("algebra", "language model", "small model")
SIDES = ("above", "below", "within")
PUBLISHED = {"value", "source", "unit"}

#: The verdicts, with their colours.
VERDICTS = {
    "holds exactly": "#1f9e78",
    "supported": "#1f9e78",
    "not supported": "#7a828e",
    "contradicted": "#d1495b",
}


def read_claims(path: Path) -> list[dict]:
    """The claims of the book, by number, each with the rule of its primary statement.

    Raises:
        ValueError: a claim without one of its parts, with a rule that cannot be
            applied or another source's value, or two of the same number.
    """
    claims = tomllib.loads(Path(path).read_text(encoding="utf-8"))["claim"]
    for claim in claims:
        if wrong := _problem(claim):
            raise ValueError(f"{path}: claim {claim.get('number', claim)} {wrong}")
    numbers = [claim["number"] for claim in claims]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"{path}: the numbers of claims do not rise: {numbers}")
    return claims


def _problem(claim):
    needed = {"number", "short", "kind", "claim", "source", "change", "primary"}
    if missing := needed - claim.keys():
        return f"has no {', '.join(sorted(missing))}"
    if claim["kind"] not in KINDS:
        return f"is {claim['kind']!r}, which is none of {', '.join(KINDS)}"
    rule = claim["primary"]
    sides = {side for side in SIDES if side in rule}
    algebra = claim["kind"] == "algebra"
    parts = {"statement"} if algebra else {"statement", "unit", *sides}
    whole = rule.keys() - {"published"} == parts and len(sides) == 1 - algebra
    if not whole:
        return (
            "needs a primary with a statement and, if it is no algebra, a unit and one "
            f"of {', '.join(SIDES)}; this one has {', '.join(rule)}"
        )
    published = rule.get("published", dict.fromkeys(PUBLISHED, ""))
    if published.keys() != PUBLISHED:
        return "has a published value without its value, source and unit"
    cited = set(re.findall(r"`(\w+)`", published["source"]))
    if cited - set(re.findall(r"\w+", claim["source"])):
        return f"has a published value of {', '.join(cited)}, which is not its source"
    return ""


def asked(row: dict) -> str:
    """What is asked of a finding, in words."""
    if row["side"] == "checked":
        return "equal to rounding"
    return f"{row['side']} {'±' * (row['side'] == 'within')}{row['bar']:.3g}"


def over(row: dict) -> str:
    """What the interval of a finding is over, in words."""
    if row["side"] == "checked":
        return ""
    first, *rest = re.split("(?=,)", row["unit"])
    many = {"query": "queries"}
    plural = " × ".join(many.get(unit, f"{unit}s") for unit in first.split(" × "))
    return f"{row['count']} {plural}{''.join(rest)}"


def distance(row: dict, value: float) -> float:
    """How far a value is on the side that is asked, in the finding's units."""
    if row["side"] == "within":
        return row["bar"] - abs(value)
    return (value - row["bar"]) * (1 if row["side"] == "above" else -1)


def p_value(row: dict) -> float:
    """Of the two-sided t test against the bar, or against the nearer end of a margin.

    1 - p is the highest level at which the interval is wholly on one side: for a
    margin, inside it (two one-sided tests) or outside.
    """
    apart = abs(distance(row, row["mean"]))
    if not row["error"]:
        return 0.0 if apart else 1.0
    return float(2 * stdtr(row["freedom"], -apart / row["error"]))


def holm(p: list[float]) -> list[float]:
    """Adjusted p values of tests that are judged together (Holm 1979)."""
    adjusted, least = list(p), 0.0
    for rank, n in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        adjusted[n] = least = max(least, min(1.0, (len(p) - rank) * p[n]))
    return adjusted


def judge(claims: list[dict], found: dict[str, list[dict]]) -> list[dict]:
    """The claims with their findings: ``found``, ``first`` (the primary), ``verdict``.

    Args:
        claims: from :func:`read_claims`.
        found: findings by the chapter that has them, in the order of the book.

    Raises:
        ValueError: a finding of no claim or entered twice, numbers that stand for two
            statements, a claim without its primary, or a primary that was asked
            otherwise than it was declared.
    """
    rows = [row | {"chapter": name} for name in found for row in found[name]]
    known = {claim["number"] for claim in claims}
    if strays := [r["statement"] for r in rows if r["claim"] not in known]:
        raise ValueError(f"findings of no claim in claims.toml: {'; '.join(strays)}")
    seen = {}
    for row in rows:
        if row["side"] != "checked" and row["role"] == "claim" and row["error"]:
            ends = sorted(abs(row[k] - row["bar"]) for k in ("mean", "low", "high"))
            other = seen.setdefault(tuple(ends), row)
            if other is not row:
                raise ValueError(
                    f"the same numbers stand for {other['statement']!r} (claim "
                    f"{other['claim']}) and {row['statement']!r} (claim {row['claim']})"
                )
    cards = [_card(c, [r for r in rows if r["claim"] == c["number"]]) for c in claims]
    for kind in KINDS[1:]:
        tested = [card for card in cards if card["kind"] == kind]
        adjusted = holm([p_value(card["first"]) for card in tested])
        for card, p in zip(tested, adjusted, strict=True):
            row = card["first"]
            way = "supported" if distance(row, row["mean"]) > 0 else "contradicted"
            card["verdict"] = way if p < 0.05 else "not supported"
            card["p"] = p
    return cards


def _card(claim, rows):
    statements, rule = [row["statement"] for row in rows], claim["primary"]
    primary = [r for r in rows if r["statement"] == rule["statement"]]
    first, wrong = primary[0] if primary else None, ""
    if twice := {s for s in statements if statements.count(s) > 1}:
        wrong = f"has these twice: {'; '.join(sorted(twice))}"
    elif first is None:
        there = "; ".join(statements) or "none"
        wrong = f"has no finding {rule['statement']!r}; those of the chapters: {there}"
    elif first["role"] != "claim":
        wrong = "has a primary statement that was entered as a control"
    elif (claim["kind"] == "algebra") != (first["side"] == "checked"):
        wrong = "is algebra if its primary is an identity, and only then"
    elif first.get("unit") != rule.get("unit"):
        wrong = f"is declared over {rule['unit']}, its interval is over {first['unit']}"
    elif "unit" in rule and rule.get(first["side"]) != first["bar"]:
        declared = [f"{side} {rule[side]}" for side in SIDES if side in rule]
        wrong = f"is declared {declared[0]}, and was asked {asked(first)}"
    if wrong:
        raise ValueError(f"claim {claim['number']} {wrong}")
    verdict = "holds exactly"  # of algebra; of the others see judge
    pages = dict.fromkeys(row["chapter"] for row in rows)
    more = {"found": rows, "first": first, "verdict": verdict, "pages": list(pages)}
    return claim | more


def picture(cards: list[dict], path: Path):
    """The primary effects as a forest plot, into an SVG file.

    They have many units: each is drawn by its distance from what is asked, in
    half-widths of its 95 % interval, to the right where the claim wants it.
    """
    end = 6.0
    with context("icl_book.book"):
        figure = Figure(figsize=(7.4, 0.6 + 0.3 * len(cards)), layout="constrained")
        ax = figure.subplots()
        for y, card in enumerate(cards):
            row, colour = card["first"], VERDICTS[card["verdict"]]
            said = f"{card['verdict']}   {row['here']}"
            ax.text(7, y, said, fontsize=8.5, va="center")
            if row["side"] == "checked":
                ax.plot(0, y, "D", color=colour, ms=5)
                continue
            half = max((row["high"] - row["low"]) / 2, 1e-12)
            x = distance(row, row["mean"]) / half
            ends = [max(-end, min(end, x + move)) for move in (-1, 1)]
            ax.plot(ends, [y, y], color=colour, lw=2.4)
            mark = "o" if abs(x) < end else ">" if x > 0 else "<"
            ax.plot(max(-end, min(end, x)), y, mark, color=colour, ms=5)
        ax.axvline(0, color=VERDICTS["not supported"], lw=0.8)
        names = [f"{card['short']}  {card['number']}" for card in cards]
        ax.set_yticks(range(len(cards)), names)
        ax.set(xlim=(-7, 17), ylim=(len(cards) - 0.4, -0.6), xticks=[-5, 0, 5])
        ax.set_xlabel("against the claim  ←  half-widths of the interval  →  for it")
        ax.xaxis.set_label_coords(7 / 24, -0.05)
        ax.grid(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def check_numbers(cards: list[dict], pages: dict[str, str]):
    """That every interval in the text of a page is one that a chapter found.

    Raises:
        ValueError: one is not, with its page.
    """
    known = {row["here"] for card in cards for row in card["found"]}
    for name, text in pages.items():
        said = re.findall(r"[+-]\d+\.\d+\s\[[^]]*\]", text)
        if strange := [s for s in said if " ".join(s.split()) not in known]:
            raise ValueError(f"{name} has {strange[0]}, which no chapter found")


def _places(row, published=None):
    """Where the parts of an interval's picture are, in percent of its width."""
    bars = {row["bar"], -row["bar"]} if row["side"] == "within" else {row["bar"]}
    ends = {k: row[k] for k in ("low", "mean", "high")}
    ends |= {} if published is None else {"published": published}
    left, right = min([*bars, *ends.values()]), max([*bars, *ends.values()])

    def at(value):
        return round(6 + 88 * (value - left) / ((right - left) or 1), 1)

    marks = [(at(bar), f"{bar:.3g}") for bar in sorted(bars)]
    return {k: at(value) for k, value in ends.items()} | {"bars": marks}


def markdown(cards: list[dict]) -> str:
    """The cards of the scoreboard, one section per claim."""
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "autoescape": False}
    environment = Environment(loader=PackageLoader("icl_book", "."), **blocks)
    environment.globals |= {"asked": asked, "over": over, "places": _places}
    return environment.get_template("scoreboard.md.jinja").render(cards=cards)
