"""What the notebook of the attentions defines for itself."""

from pathlib import Path

import nbformat
import numpy as np
from scipy.stats import chisquare

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def defined_in(notebook, name):
    """A function of a notebook, from its own cell; it may use NumPy."""
    cells = nbformat.read(EXPERIMENTS / f"{notebook}.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if f"def {name}(" in cell.source)
    names = {"np": np}
    exec(source, names)
    return names[name]


def test_recall_asks_for_pairs_that_were_shown():
    batches = defined_in("attentions", "recall_batches")
    batch = batches(5, pairs=6, symbols=9, seed=2)(3)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        shown = dict(zip(ids[:12:2], ids[1:12:2], strict=True))
        assert len(shown) == 6
        assert set(shown) <= set(range(9))
        assert set(shown.values()) <= set(range(9, 18))
        for first, second in zip(ids[12::2], ids[13::2], strict=True):
            assert shown[first] == second
        answers = np.flatnonzero(labels >= 0)
        assert answers.tolist() == list(range(13, 24, 2))
        assert (labels[answers] == ids[answers]).all()
    # every one of them is asked as often, at every place, whatever was asked before
    many = batches(9000, pairs=3, symbols=3, seed=2)(0)["input_ids"]
    place = (many[:, :6:2, None] == many[:, None, 6::2]).argmax(1)
    counts = np.bincount(place @ [9, 3, 1], minlength=27)
    assert chisquare(counts).pvalue > 1e-3
    other = batches(5, 6, 9, seed=2)(4)["input_ids"]
    assert (other != batch["input_ids"]).any()
