"""What every chapter opens and closes with, its ``check`` lines and its findings."""

import base64
import datetime
import html
import io
import json
import os
import platform
import time
from importlib.metadata import version

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, display
from myst_nb import glue

from icl.results import RESULT, commit

#: How much is run, from seconds (tests) and a minute (reading) to the whole protocol.
SCALES = ("smoke", "laptop", "paper")

#: One colour a role, for the whole book (Okabe & Ito's colour-blind-safe set,
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
}

#: The paper's tasks as figures and tables name them, in the paper's order.
TASK_NAMES = {
    "sst2": "SST2",
    "sst5": "SST5",
    "mr": "MR",
    "subj": "Subj",
    "agnews": "AGNews",
    "cb": "CB",
}

_opened = {}
_checks = []
_findings = []


def begin(scale: str, seed: int = 0):
    """Open a chapter: check its scale, seed everything, set the figures' style.

    Raises:
        ValueError: ``scale`` is not one of ``SCALES``.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    _checks.clear()
    _findings.clear()
    _opened.update(started=time.perf_counter(), scale=scale, seed=seed)
    np.random.seed(seed)  # noqa: NPY002  (for libraries that draw from it)
    torch.manual_seed(seed)
    plt.style.use("icl.book")
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    set_matplotlib_formats("svg", metadata={"Date": None})


def check(claim, got, expected=0.0, tolerance=0.0) -> None:
    """Print a claim with what was expected and found; fail if they differ.

    Args:
        claim: the statement, in words.
        got: a number, or an array of them.
        expected: what ``got`` should be (array or number).
        tolerance: the largest allowed absolute difference. 0 asks for equality.

    Raises:
        AssertionError: some difference exceeds the tolerance or is NaN.
    """
    got, expected = (np.asarray(_plain(v), dtype=float) for v in (got, expected))
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


def verdict(low: float, high: float) -> str:
    """What an interval says of "it is above zero"."""
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "undecided"


def finding(
    claim,
    statement,
    interval=None,
    *,
    above=None,
    below=None,
    checked=None,
    published="",
    on="",
    form="+.3f",
) -> str:
    """Enter what this page says of a claim into the book's scoreboard.

    Exactly one of ``above``, ``below`` and ``checked`` says how it is judged.

    Args:
        claim: its number in ``book/claims.toml``.
        statement: what of the claim is judged, in words.
        interval: ``(mean, low, high)``, a 95 % interval.
        above: the statement holds if the whole interval is above this number, does
            not hold if the whole is below, and is undecided otherwise.
        below: the same, the other way round.
        checked: the statement is an identity, and this the line of :func:`check`
            that holds on this page.
        published: the number that the source gives, if it gives one.
        on: model and data.
        form: of the numbers.

    Returns:
        the verdict.

    Raises:
        ValueError: not exactly one rule, an interval that is none, or a check that
            has not been made on this page.
    """
    rules = [rule is not None for rule in (above, below, checked)]
    if sum(rules) != 1 or (interval is None) != (checked is not None):
        raise ValueError(
            f"{statement!r}: give either an interval with one of above and below, or "
            "the check that shows it"
        )
    row = {"claim": claim, "statement": statement, "published": published, "on": on}
    if checked is not None:
        errors = {name: error for name, error, _ in _checks}
        if checked not in errors:
            made = "; ".join(errors) or "none"
            raise ValueError(f"no check {checked!r} on this page; made were: {made}")
        row |= {"here": f"to {errors[checked]:.0e}", "verdict": "holds"}
    else:
        mean, low, high = map(float, interval)
        if not -np.inf < low <= mean <= high < np.inf:
            raise ValueError(f"{statement!r}: {low} .. {high} is no interval of {mean}")
        bar = below if above is None else above
        sides = (low - bar, high - bar) if below is None else (bar - high, bar - low)
        row |= {"mean": mean, "low": low, "high": high, "bar": float(bar)}
        row["side"] = "above" if below is None else "below"
        row["here"] = f"{mean:{form}} [{low:{form}}, {high:{form}}]"
        row["verdict"] = verdict(*sides)
    _findings.append(row)
    glue(statement, row, display=False)
    return row["verdict"]


def result(**values) -> None:
    """Enter numbers of this page into its row of a sweep's table (icl.sweep).

    Args:
        values: by the name of their column: numbers, words, ``True``, ``False``,
            ``None``, or lists of these. One that is not finite is entered as missing.

    Raises:
        ValueError: some other value.
    """
    entered = {name: _entry(name, value) for name, value in values.items()}
    shown = "\n".join(f"{name} = {value}" for name, value in entered.items())
    display({RESULT: entered, "text/plain": shown}, raw=True)


def _entry(name, value):
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_entry(name, part) for part in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(
        f"{name} = {value!r} is no entry: give a number, a word, or a list of them"
    )


def findings() -> pd.DataFrame:
    """What :func:`finding` has entered on this page, by claim."""
    columns = ["statement", "published", "here", "verdict"]
    return pd.DataFrame(_findings, columns=["claim", *columns]).set_index("claim")


def panels(count: int):
    """A figure of ``count`` small panels, three a row: ``(figure, axes)``."""
    rows = -(-count // 3)
    fig, axes = plt.subplots(
        rows,
        min(count, 3),
        figsize=(7, 0.6 + 1.9 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, axes.flat[:count]


def dial(draw, values, name, alt, caption, start=0) -> HTML:
    """A figure with a slider: a picture for each value, of which one is seen.

    It needs no kernel, no network and no library; on paper it is the first one seen.

    Args:
        draw: ``draw(value)`` makes a figure.
        values: those that the slider has.
        name: of what it moves.
        alt, caption: what is seen, and what it shows.
        start: number of the value at first.
    """
    pictures = []
    for n, value in enumerate(values):
        figure, file = draw(value), io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
        picture = base64.b64encode(file.getvalue()).decode()
        what = html.escape(f"{alt} Here {name} is {value:g}.")
        hidden = "" if n == start else " hidden"
        source = f"data:image/svg+xml;base64,{picture}"
        pictures.append(f'<img src="{source}" alt="{what}"{hidden}>')
    seen = html.escape(json.dumps([f"{value:g}" for value in values]))
    move = (
        "const f = this.closest('figure'); "
        "f.querySelectorAll('img').forEach((i, n) => i.hidden = n != this.value); "
        "f.querySelector('output').value = JSON.parse(f.dataset.seen)[this.value];"
    )
    return HTML(
        f'<figure class="dial" data-seen="{seen}"><label>{html.escape(name)} '
        f'<input type="range" min="0" max="{len(values) - 1}" value="{start}" '
        f'oninput="{move}"> <output>{values[start]:g}</output></label>'
        f"{''.join(pictures)}<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def checks() -> pd.DataFrame:
    """The checks of this page so far: claim, largest difference, allowed."""
    columns = ["claim", "largest difference", "allowed"]
    table = pd.DataFrame(_checks, columns=columns).set_index("claim")
    return table.map("{:.0e}".format)


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double().numpy()
    return value


def end(**parameters) -> pd.DataFrame:
    """How this page was made: parameters, versions, machine, time, memory."""
    facts = {
        **parameters,
        "scale": _opened["scale"],
        "seed": _opened["seed"],
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} torch threads",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "run on": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "seconds": f"{time.perf_counter() - _opened['started']:.0f}",
    }
    table = pd.DataFrame({"value": map(str, facts.values())}, index=list(facts))
    return table.rename_axis("this page")
