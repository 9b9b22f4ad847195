"""What every chapter opens and closes with, its ``check`` lines and its findings."""

import base64
import datetime
import io
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from jinja2 import Environment, PackageLoader

from icl_book.scoreboard import asked, over
from icl_book.store import COSTS, MADE, RESULT, environment, read_table, short_name

#: How much is run, from seconds (tests) and a minute (reading) to the whole protocol.
SCALES = ("smoke", "laptop", "paper")

#: One colour per role, for the whole book (Okabe & Ito's colour-blind-safe set,
#: lightened or darkened to be read on white and on near-black).
COLOURS = {
    "ZSL": "#8a8f98",
    "ICL": "#2f8fce",
    "FT": "#e07b1a",
    "momentum": "#c65fa0",
    "decay": "#1f9e78",
    "exact": "#a88600",
    "precond": "#8272d6",
    "random": "#d1495b",
    "neutral": "#7a828e",  # lines to compare with, and text
}


class _Names(dict):
    def __missing__(self, name):
        return name


#: The paper's tasks as figures and tables name them, in the paper's order; others go
#: by their own names.
TASK_NAMES = _Names(
    sst2="SST2", sst5="SST5", mr="MR", subj="Subj", agnews="AGNews", cb="CB"
)

#: Models as figures and tables name them; others go by their own names.
MODEL_NAMES = {
    "smollm2-135m": "SmolLM2-135M-Instruct, 4-bit",
    "tinyllama-1.1b-chat": "TinyLlama-1.1B-Chat, 2-bit",
    "models/smollm2-135m-random": "SmolLM2's shape, random weights",
}

_opened = {}
_checks = []
_findings = []


def begin(scale: str, seed: int = 0):
    """Open a chapter: check its parameters, seed NumPy and torch, set the style."""
    import torch  # seconds, which not every experiment needs
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    _check_parameters()
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    _checks.clear()
    _findings.clear()
    _opened.update(started=time.perf_counter(), scale=scale, seed=seed)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()
    np.random.seed(seed)  # noqa: NPY002  (for libraries that draw from it)
    torch.manual_seed(seed)
    plt.style.use("icl_book.book")
    set_matplotlib_formats("svg", metadata={"Date": None})


def _check_parameters():
    """Refuse what papermill was given by hand: it injects any name and any value."""
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    injected = [n for n, cell in enumerate(cells) if cell.startswith("# Parameters\n")]
    if injected:
        from icl_book.execute import check_values, parameters_in

        given = {}
        exec(cells[injected[0]], {}, given)
        known = parameters_in({"source": cells[injected[0] - 1]}, "this notebook")
        check_values(known, given, "this notebook")


def check(claim, got, expected=0.0, tolerance=0.0) -> None:
    """Print a claim with what was expected and found; fail if they differ.

    Args:
        claim: the statement, in words.
        got: a number, or an array of them.
        expected: what ``got`` should be (array or number).
        tolerance: the largest allowed absolute difference. 0 asks for equality.

    """
    if any("complex" in str(getattr(v, "dtype", type(v))) for v in (got, expected)):
        raise ValueError(f"{claim}: compare real and imaginary parts by themselves")
    got, expected = (
        np.asarray(v.detach().cpu().double() if hasattr(v, "detach") else v, float)
        for v in (got, expected)
    )
    if expected.size != 1 and np.broadcast(got, expected).shape != got.shape:
        raise ValueError(f"{claim}: expected is {expected.shape}, got {got.shape}")
    error = float(np.max(np.abs(got - expected))) if got.size else float("nan")
    holds = error <= tolerance
    if got.size == 1:
        found = f"expected {expected.item():.6g}, got {got.item():.6g}"
    else:
        found = f"{got.size} numbers within {error:.1e}"
    line = f"{claim}: {found} (allowed {tolerance:.0e})"
    print(f"{'✓' if holds else '✗'} {line}")
    assert holds, f"the check does not hold: {line}"
    _checks.append((claim, error, tolerance))


def rows_of(name: str, model: str) -> pd.DataFrame:
    """Rows of a table in ``results/`` of a model, and a line that says whose they are.

    A model that has no rows, or not for all tasks, gets those of the built-in one, and
    a note how to make its own.
    """
    from icl.models import DEFAULT

    table, _ = read_table(name)
    theirs, mine = (table[table.model == own] for own in (DEFAULT, short_name(model)))
    if missing := {*theirs.task} - {*mine.task}:
        note = f"""> **The table {name} has no rows of {model}** for
        {", ".join(sorted(missing))}. What follows is of {DEFAULT}. To make rows of your
        model, write `- model: {model}` and its tasks under `vary:` in
        `experiments/{name}.yaml`, and run `make table NAME={name}
        OPTIONS=--only-missing`."""
        display(Markdown(" ".join(note.split())))
        mine = theirs
    print(f"results/{name}.csv: {mine.model.iloc[0]}")
    return mine


def finding(
    claim,
    statement,
    interval=None,
    *,
    above=None,
    below=None,
    within=None,
    checked=None,
    control=False,
    published=None,
    on="",
    form="+.3f",
) -> None:
    """Enter what this page found for a claim into the book's scoreboard.

    Exactly one of ``above``, ``below``, ``within`` and ``checked`` says what is asked.
    The build judges the claim's primary statement, all others are shown as they are.

    Args:
        claim: its number in ``book/claims.toml``.
        statement: what is asked, in words.
        interval: an :class:`icl.metrics.Interval`.
        above, below: the side of a number on which the interval should be.
        within: the margin about 0 in which it should be, for "about as well".
        checked: the statement is an identity, shown by this line of :func:`check`.
        control: this is not what the claim's source asserts, but what we add to it.
        published: what the source gives for it: the value, where, and its unit.
        on: model and data.
        form: format of the numbers.
    """
    rules = dict(above=above, below=below, within=within, checked=checked)
    given = [(name, value) for name, value in rules.items() if value is not None]
    if len(given) != 1 or (interval is None) != (checked is not None):
        raise ValueError(
            f"{statement!r}: give either an interval with one of above, below and "
            "within, or the check that shows it"
        )
    ((side, bar),) = given
    role = "control" if control else "claim"
    row = {"claim": claim, "statement": statement, "role": role, "side": side, "on": on}
    row["published"] = list(published or ())
    if side == "checked":
        errors = {name: error for name, error, _ in _checks}
        if checked not in errors:
            made = "; ".join(errors) or "none"
            raise ValueError(f"no check {checked!r} on this page; made were: {made}")
        row |= {"here": f"to {errors[checked]:.0e}"}
    else:
        mean, low, high = interval
        ordered = -np.inf < low <= mean <= high < np.inf
        if not (ordered and interval.unit and np.isfinite(interval.error)):
            raise ValueError(
                f"{statement!r}: {interval} over {interval.unit!r} is no interval; see "
                "icl.metrics"
            )
        if not np.isfinite(bar) or (side == "within" and bar <= 0):
            raise ValueError(f"{statement!r}: {side}={bar} is no number to compare to")
        row |= {"mean": mean, "low": low, "high": high, "bar": float(bar)}
        row |= {"unit": interval.unit, "count": interval.count, "error": interval.error}
        row |= {"freedom": min(interval.freedom, 1e9), "here": f"{interval:{form}}"}
        row["detectable"] = interval.detectable
    _findings.append(row)
    display({RESULT: {"findings": [_entries(row)]}}, raw=True)


def result(*rows, facts=None, **columns) -> None:
    """Enter rows of this page into the table of its sweep.

    Args:
        rows: dicts, each a row of the table; left out, one of the ``columns`` alone.
        facts: of the table's record, such as where the text is from.
        columns: by name, what stands in every row. Entries are numbers, words,
            ``True``, ``False``, ``None``, or lists of these; one that is not finite
            is entered as missing.
    """
    found = [_entries(columns | row) for row in rows or [{}]]
    facts = _entries(facts or {})
    if taken := ({*COSTS} & {*()}.union(*found)) | (MADE & facts.keys()):
        raise ValueError(f"{', '.join(sorted(taken))}: the runner enters that; rename")
    shown = "\n".join(f"{name} = {value}" for name, value in found[0].items())
    shown += f"\n... {len(found)} rows" if len(found) > 1 else ""
    display({RESULT: {"rows": found, "facts": facts}, "text/plain": shown}, raw=True)


def _entries(part):
    return {name: _entry(name, value) for name, value in part.items()}


def _entry(name, value):
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_entry(name, part) for part in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, str):  # as a CSV file can hold it
        value.encode()  # an error for half of a surrogate pair
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(
        f"{name} = {value!r} is no entry: give a number, a word, or a list of them"
    )


def findings() -> pd.DataFrame:
    """What :func:`finding` has entered on this page, by claim."""
    rows = [row | {"asked": asked(row), "over": over(row)} for row in _findings]
    columns = ["statement", "role", "asked", "here", "over"]
    return pd.DataFrame(rows, columns=["claim", *columns]).set_index("claim")


def at_best_rate(rows, measure: str, seeds=1, **where):
    """What the small language models came to, each arm at its best learning rate.

    The best is that with the least loss on the validation text from seed 0.

    Args:
        rows: of ``results/language_models.csv``.
        measure: one of its measures.
        seeds: the first seed that counts; default 1, since 0 has chosen the rate.
        where: values of the table's other columns; default rotary models of 1 million
            weights after 600 steps on Shakespeare.

    Returns:
        ``(rates, values)``: the rate of each arm, a series, and a table of values by
        seed (row) and arm (column).
    """
    usual = dict(corpus="shakespeare", positions="rotary", size="1m", steps=600)
    for column, value in (usual | where).items():
        rows = rows[rows[column] == value]
    rows = rows[rows.step == rows.steps]
    search = rows[(rows.measure == "validation") & (rows.seed == 0)]
    best = search.sort_values("value").drop_duplicates("arm")[["arm", "rate"]]
    found = rows[(rows.measure == measure) & (rows.seed >= seeds)].merge(best)
    values = found.pivot_table("value", "seed", "arm")
    return best.set_index("arm").rate, values


def subplot_grid(count: int):
    """A figure of ``count`` small panels, three per row: ``(figure, axes)``."""
    rows = -(-count // 3)
    size, look = (7, 0.6 + 1.9 * rows), {"squeeze": False, "layout": "constrained"}
    look |= {"sharex": True, "sharey": True, "figsize": size}
    fig, axes = plt.subplots(rows, min(count, 3), **look)
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, axes.flat[:count]


def intervals(ax, found, at=None, along="x", **look):
    """Draw intervals as dots with bars: a forest plot, or points of a curve.

    Args:
        found: mean, low and high of each; None leaves a gap.
        at: places on the other axis; default 0, 1, 2, ...
        along: "x" or "y", the axis that the intervals are on.
        look: as for ``Axes.errorbar``.
    """
    rows = np.array([(np.nan,) * 3 if row is None else tuple(row) for row in found])
    mean, low, high = rows.astype(float).T
    half = np.maximum([mean - low, high - mean], 0)  # rounding
    other = np.arange(len(mean)) if at is None else at
    places = (mean, other) if along == "x" else (other, mean)
    look = {"fmt": "o", "ms": 4, "capsize": 2} | look
    ax.errorbar(*places, **{f"{along}err": half}, **look)


def slider(draw, values, name, alt, caption, start=0) -> HTML:
    """A figure with a slider: a picture for each value, of which one is shown.

    It needs no kernel, network or library; on paper it shows the picture of ``start``.

    Args:
        draw: ``draw(value)`` makes a figure.
        values: numbers that the slider steps through.
        name: name of that quantity, the slider's label.
        alt, caption: alternative text, and caption.
        start: index of the first value shown.
    """
    pictures = []
    for value in values:
        figure, file = draw(value), io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
        picture = base64.b64encode(file.getvalue()).decode()
        pictures.append((f"{value:g}", picture))
    templates = Environment(loader=PackageLoader("icl_book", "."), autoescape=True)
    seen = dict(pictures=pictures, name=name, alt=alt, caption=caption, start=start)
    return HTML(templates.get_template("slider.html.jinja").render(seen))


def checks() -> pd.DataFrame:
    """The checks of this page so far: claim, largest difference, allowed."""
    columns = ["claim", "largest difference", "allowed"]
    table = pd.DataFrame(_checks, columns=columns).set_index("claim")
    return table.map("{:.0e}".format)


def end(**parameters) -> pd.DataFrame:
    """How this page was made: parameters, versions, machine, time."""
    import torch

    facts = {
        **parameters,
        "scale": _opened["scale"],
        "seed": _opened["seed"],
        **environment(),
        "torch threads": torch.get_num_threads(),
        "run on": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "seconds": f"{time.perf_counter() - _opened['started']:.0f}",
    }
    table = pd.DataFrame({"value": map(str, facts.values())}, index=list(facts))
    return table.rename_axis("this page")
