"""What notebooks of experiments define for themselves."""

import math
import string
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import tokenizers
import torch
from scipy.stats import chisquare

from icl.corpora import as_bytes
from icl.metrics import calibrated

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def defined_in(notebook, name, **names):
    """A function of a notebook, from its own cell; it may use NumPy and ``names``."""
    cells = nbformat.read(EXPERIMENTS / f"{notebook}.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if f"def {name}(" in cell.source)
    names["np"] = np
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


def test_byte_pairs_are_learned_and_know_all_text():
    text = "the cat sat on the mat; the café cat.\nthe cat sat\n" * 20
    byte_pairs = defined_in("attentions", "byte_pairs", **vars(tokenizers))
    pairs = byte_pairs(text, 300)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    ids = pairs.encode(text).ids
    assert pairs.decode(ids) == text
    assert 256 < max(ids) < 300
    assert len(ids) < len(as_bytes(text)) / 2
    unseen = "ζ ∞ \t \r\n 猫"  # nothing is unknown to bytes
    assert pairs.decode(pairs.encode(unseen).ids) == unseen
    assert byte_pairs(text, 300).encode(text).ids == ids


def test_next_tokens_by_hand():
    compare = defined_in("controls", "next_tokens")

    def given(tokens, p):
        return SimpleNamespace(tokens=np.array(tokens), log_p=np.log(p))

    a = given([[1, 2, 3], [1, 2, 3]], [[0.5, 0.2, 0.1], [0.5, 0.2, 0.1]])
    b = given([[3, 9, 1], [7, 8, 9]], [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    overlap, cosine = compare(a, b)
    assert overlap.tolist() == [2 / 3, 0]
    # tokens 1 (0.5 and 0.1) and 3 (0.1 and 0.6) are shared
    by_hand = (0.5 * 0.1 + 0.1 * 0.6) / math.sqrt(0.30 * 0.46)
    assert cosine == pytest.approx([by_hand, 0])
    assert compare(a, a)[1] == pytest.approx([1, 1])


def test_a_digit_for_every_label():
    names = {"string": string, "calibrated": calibrated}
    encode = defined_in("icl_vs_finetuning", "encode_predictions", **names)
    for n in (2, 10, 11, 36):
        columns = encode(np.eye(n))
        assert [int(digit, 36) for digit in columns["predictions"]] == [*range(n)]
        assert len(columns["calibrated"]) == n
    assert encode(None)["predictions"] == ""
    with pytest.raises(IndexError):
        encode(np.eye(37))


def test_patches_of_queries():
    g = torch.Generator().manual_seed(0)
    X, C = torch.randn(2, 5, 8, generator=g)
    names = {"torch": torch, "RIDGE": 1e-9}
    left, right = defined_in("patches", "mean_of", **names)(X, C)
    each = [np.outer(c, x) / (x @ x) for x, c in zip(X.numpy(), C.numpy(), strict=True)]
    np.testing.assert_allclose(left @ right, np.mean(each, 0), atol=1e-6)
    left, right = defined_in("patches", "fit_of", **names)(X, C)
    np.testing.assert_allclose(left @ right @ X.T, C.T, atol=1e-4)


def test_a_shift_of_labels_explains_nothing():
    explained = defined_in("patches", "explained", calibrated=calibrated)
    zsl, icl = np.random.default_rng(0).normal(size=(2, 7, 3))
    shift = np.array([1.0, -2.0, 4.0])
    assert explained(zsl, zsl, icl) == 0
    assert explained(zsl + shift, zsl, icl) == pytest.approx(0)
    assert explained(icl + shift, zsl, icl) == pytest.approx(1)
    assert explained(icl + shift, zsl, icl, shared=True) < 1
    half = zsl + (icl - zsl) / 2
    assert explained(half, zsl, icl) == pytest.approx(3 / 4)
