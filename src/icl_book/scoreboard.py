"""The scoreboard: claims in ``book/claims.toml``, and what the chapters found."""

import tomllib
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.style import context


def read_claims(path: Path) -> list[dict]:
    """The claims of the book, by number.

    Raises:
        ValueError: a claim without one of its parts, or two of the same number.
    """
    claims = tomllib.loads(Path(path).read_text(encoding="utf-8"))["claim"]
    for claim in claims:
        if missing := {"number", "short", "claim", "source"} - claim.keys():
            raise ValueError(f"{path}: claim {claim} has no {', '.join(missing)}")
        if ("headline" in claim) == ("untested" in claim):
            raise ValueError(
                f"{path}: claim {claim['number']} needs either a headline, one of its "
                "statements, or what keeps it untested"
            )
    numbers = [claim["number"] for claim in claims]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"{path}: the numbers of claims do not rise: {numbers}")
    return claims


def total(verdicts) -> str:
    """What its statements make of a claim, a word or three.

    It stands if all hold and stands in part if some do; it falls if none holds and
    some do not, and is undecided otherwise.
    """
    held = [verdict == "holds" for verdict in verdicts]
    if all(held):
        return "stands"
    if any(held):
        return "stands in part"
    return "falls" if "does not hold" in verdicts else "undecided"


def scoreboard(claims: list[dict], found: dict[str, list[dict]]):
    """Two tables of strings, their heads first: claims, and all statements.

    Args:
        claims: from :func:`read_claims`.
        found: findings by the chapter that has them, in the order of the book.

    Raises:
        ValueError: a claim that no chapter tests, a headline that is none of its
            statements, or a finding of no claim.
    """
    rows = [row | {"chapter": name} for name in found for row in found[name]]
    known = {claim["number"] for claim in claims}
    if strays := [r["statement"] for r in rows if r["claim"] not in known]:
        raise ValueError(f"findings of no claim in claims.toml: {'; '.join(strays)}")
    head = ["", "claim", "source", "published", "here", "verdict", "chapter"]
    short, whole = [head], [["", "statement", *head[3:6], "on", head[6]]]
    for claim in claims:
        own = [row for row in rows if row["claim"] == claim["number"]]
        number, named = str(claim["number"]), [claim["claim"], claim["source"]]
        if "untested" in claim:
            if own:
                raise ValueError(f"claim {number} is said to be untested, and is not")
            short.append([number, *named, "", "", "not tested", claim["untested"]])
            continue
        first = [row for row in own if row["statement"] == claim["headline"]]
        if not first:
            there = "; ".join(row["statement"] for row in own) or "none"
            raise ValueError(
                f"claim {number} has no finding {claim['headline']!r}; "
                f"those of the chapters are: {there}"
            )
        pages = dict.fromkeys(map(_page, own))
        verdicts = [row["verdict"] for row in own]
        held = f"{verdicts.count('holds')} of {len(own)}"
        short.append(
            [
                number,
                *named,
                first[0]["published"],
                f"{first[0]['statement']}: {first[0]['here']}",
                f"{total(verdicts)} ({held})",
                ", ".join(pages),
            ]
        )
        for row in own:
            facts = ("statement", "published", "here", "verdict", "on")
            whole.append([number, *(row[fact] for fact in facts), _page(row)])
    return short, whole


VERDICTS = {"holds": "#1f9e78", "undecided": "#8a8f98", "does not hold": "#d1495b"}


def tally(claims: list[dict], found: dict[str, list[dict]]) -> dict[str, list[int]]:
    """How many statements of each claim have a verdict, by verdict."""
    rows = [row for name in found for row in found[name]]
    counts = {}
    for verdict in VERDICTS:
        own = [row["claim"] for row in rows if row["verdict"] == verdict]
        counts[verdict] = [own.count(claim["number"]) for claim in claims]
    return counts


def picture(claims: list[dict], found: dict[str, list[dict]], path: Path):
    """Draw :func:`tally` as bars, into an SVG file."""
    names = [f"{claim['short']}  {claim['number']}" for claim in claims]
    with context("icl_book.book"):
        figure = Figure(figsize=(7, 0.3 + 0.27 * len(claims)), layout="constrained")
        ax = figure.subplots()
        left = [0] * len(claims)
        for verdict, counts in tally(claims, found).items():
            look = {"color": VERDICTS[verdict], "label": verdict}
            bars = ax.barh(names, counts, left=left, **look)
            labels = [count or "" for count in counts]
            ax.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
            left = [a + b for a, b in zip(left, counts, strict=True)]
        ax.invert_yaxis()
        ax.grid(False)
        ax.set(xlabel="statements", xlim=(0, max([1, *left])))
        ax.legend(loc="lower right")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _page(row):
    return f"{{doc}}`{int(row['chapter'][:2])} <{row['chapter']}>`"
