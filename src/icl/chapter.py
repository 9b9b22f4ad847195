"""What every chapter opens and closes with, and its ``check`` line."""

import datetime
import os
import platform
import time
from importlib.metadata import version

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from icl.results import commit

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


def begin(scale: str, seed: int = 0):
    """Open a chapter: check its scale, seed everything, set the figures' style.

    Raises:
        ValueError: ``scale`` is not one of ``SCALES``.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    _checks.clear()
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
