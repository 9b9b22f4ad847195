"""What notebooks of experiments define for themselves."""

import itertools
import json
import math
import string
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import tokenizers
import torch
from conftest import tiny_encoder
from scipy.stats import chisquare, pearsonr, rankdata, spearmanr

from icl.attention import replace_attention
from icl.corpora import as_bytes
from icl.metrics import Interval, calibrated

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


def test_measures_of_glue_by_hand():
    measures = defined_in("encoder", "measures", rankdata=rankdata)
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 0, 1, 0])
    answers = np.array([1, 1, 0, 0, 1, 1, 0, 0, 0, 0])
    logits = np.stack([1 - answers, answers], 1) - 0.3
    tp, fp, fn, tn = 3, 1, 2, 4
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = measures("cola", labels, logits)
    assert found == pytest.approx(
        {"Matthews": (tp * tn - fp * fn) / root, "accuracy": 0.7}
    )
    found = measures("mrpc", labels, logits)
    assert found == pytest.approx({"F1": 2 * tp / (2 * tp + fp + fn), "accuracy": 0.7})
    assert measures("rte", labels, logits) == measures("mr", labels, logits)
    assert measures("rte", labels, logits) == pytest.approx({"accuracy": 0.7})
    g = np.random.default_rng(0)
    scores, said = g.integers(0, 6, 40).astype(float), g.normal(size=(40, 1))
    said[:5] = said[5:10]  # ties
    found = measures("stsb", scores, said)
    wanted = [f(said[:, 0], scores).statistic for f in (pearsonr, spearmanr)]
    assert [*found.values()] == pytest.approx(wanted)
    assert [*found] == ["Pearson", "Spearman"]


def test_measures_of_an_answer_that_is_always_the_same():
    measures = defined_in("encoder", "measures", rankdata=rankdata)
    always = np.array([[1.0, 0.0]] * 4)
    labels = np.array([0, 1, 1, 0])
    assert measures("cola", labels, always) == {"Matthews": 0, "accuracy": 0.5}
    assert measures("mrpc", labels, always) == {"F1": 0, "accuracy": 0.5}
    assert measures("mrpc", 0 * labels, always) == {"F1": 0, "accuracy": 1}
    found = measures("stsb", labels.astype(float), always[:, :1])
    assert found == {"Pearson": 0, "Spearman": 0}


def test_arms_of_the_encoder_and_where_they_begin():
    """Those that learn begin at the pretrained model, as the notebook says."""
    arms = names_of("encoder", "ARMS = ")["ARMS"]
    ids = torch.tensor([[0, 5, 9, 4, 11, 6, 7, 0]])
    own = tiny_encoder("bert")(ids).logits
    for arm, options in arms.items():
        model = tiny_encoder("bert")
        if options:
            replace_attention(model, **options)
        off = (model(ids).logits - own).abs().max()
        begins = arm == "softmax" or "learned" in arm or "augmented" in arm
        assert (off < 1e-5) == begins, arm
        assert arm.removesuffix(", apart") in arms
        if arm.endswith((", matched", ", apart")) and not arm.startswith("augm"):
            plain = dict(arms[arm.split(",")[0]])
            assert options in (plain, plain | {"matched": True})


def names_of(notebook, starts):
    """What a cell of a notebook defines, by a line that it has."""
    cells = nbformat.read(EXPERIMENTS / f"{notebook}.ipynb", as_version=4).cells
    (source,) = (c.source for c in cells if f"\n{starts}" in c.source)
    names = {}
    exec(source, names)
    return names


def test_a_task_that_is_nowhere(tmp_path):
    ask = dict(ask_hub=lambda *_: "unreachable", data_folder=lambda: tmp_path)
    load = defined_in("encoder", "load_splits", **ask)
    with pytest.raises(ValueError, match=r"no text for task 'rte'.*unreachable.*mr"):
        load("rte")


def glue_reader():
    problem = defined_in("encoder", "problem")
    return defined_in("encoder", "read_lines", json=json, problem=problem)


def test_tasks_of_glue_are_read(tmp_path):
    rows = [
        {"sentence1": "a b", "sentence2": "b c", "score": 0},
        {"sentence1": "a b", "sentence2": "b\u2028c", "score": 4.75, "genre": "x"},
    ]
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert glue_reader()(path, "stsb") == rows


GOOD = {"premise": "a", "hypothesis": "b", "label": 1}


@pytest.mark.parametrize(
    ("task", "row", "named"),
    [
        ("rte", {"premise": "a", "label": 1}, "no field 'hypothesis'"),
        ("rte", GOOD | {"premise": " "}, "'premise' is ' ', not a text"),
        ("rte", GOOD | {"label": -1}, "label -1 is not 0 or 1"),
        ("rte", GOOD | {"label": True}, "label True"),
        ("cola", {"text": 3, "label": 0}, "'text' is 3"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": 5.2}, "5.2 is no"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 5}, "no field 'score'"),
        ("cola", ["text"], "not a JSON object"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(task, row, named, tmp_path):
    path = tmp_path / "train.jsonl"
    good = {"cola": {"text": "a", "label": 1}, "rte": GOOD}
    good["stsb"] = {"sentence1": "a", "sentence2": "b", "score": 1.5}
    path.write_text(f"{json.dumps(good[task])}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: .*" + named):
        glue_reader()(path, task)


def test_an_epoch_has_every_example_once_in_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(3, 60, 150)
    rows = [{"input_ids": [0] * n} for n in lengths]
    names = dict(encoded={"training": rows}, parts={"training": rows}, BATCH=16, seed=3)
    plan = defined_in("encoder", "plan", **names, torch=torch, Counter=dict)
    first, second = plan(0), plan(1)
    for batches in (first, second):
        assert sorted(np.concatenate(batches)) == [*range(150)]
        assert sorted(map(len, batches)) == [6] + [16] * 9
        spans = sorted((min(lengths[b]), max(lengths[b])) for b in batches)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert [*map(list, first)] != [*map(list, second)]
    assert [*map(list, first)] == [*map(list, plan(0))]


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


@pytest.mark.parametrize(
    ("ends", "rule", "expected"),
    [
        ((0.1, 0.3), {"above": 0}, "supported"),
        ((-0.3, -0.1), {"above": 0}, "contradicted"),
        ((-0.1, 0.1), {"above": 0}, "not shown"),
        ((-0.02, 0.03), {"within": 0.05}, "supported"),
        ((-0.02, 0.07), {"within": 0.05}, "not shown"),
        ((0.06, 0.3), {"within": 0.05}, "contradicted"),
        ((-0.3, -0.06), {"within": 0.05}, "contradicted"),
    ],
)
def test_verdict_of_an_interval(ends, rule, expected):
    scope = {}
    cells = nbformat.read(EXPERIMENTS / "report.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if "def verdict(" in cell.source)
    exec(source.partition("minus = ")[0], scope)
    assert scope["verdict"](Interval(sum(ends) / 2, *ends), **rule) == expected
