"""The protocol: which runs it makes, what it picks, what it does not repeat."""

import math

import numpy as np
import pytest
from conftest import tiny_model

from icl.comparison import LEARNING_RATES, protocol
from icl.finetuning import kv_sgd, updated
from icl.scoring import score
from icl.tasks import Task, prompt_prefix

TEXTS = ["good film", "dull story", "bright actors", "boring plot", "very moving"]
ROWS = [{"text": t, "label": n % 2} for n, t in enumerate(TEXTS)]
TASK = Task("tiny", "Review : {text} is", ["Positive", "Negative"], ROWS * 4, ROWS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def right(predictions):
    return np.mean(predictions == TASK.labels())


def test_grid_of_the_paper():
    assert len(LEARNING_RATES) == 36
    assert min(LEARNING_RATES) == pytest.approx(1e-4)
    assert max(LEARNING_RATES) == pytest.approx(0.9)


def test_runs_and_picks(model, tokenizer):
    seeds, rates = (1, 2, 3), (0.01, 0.3)
    found = list(
        protocol(model, tokenizer, TASK, " ", 3, seeds=seeds, learning_rates=rates)
    )
    runs = {run[:3]: run[3] for run in found}
    assert len(runs) == len(found) == 1 + 3 + 2 + 2
    icl = {s: right(runs["ICL", s, 0.0]) for s in seeds}
    picked = max(icl, key=icl.get)
    rate = max(rates, key=lambda r: right(runs["FT", picked, r]))
    assert {key for key in runs if key[0] == "FT"} == {
        *[("FT", picked, r) for r in rates],
        *[("FT", s, rate) for s in seeds],
    }


def test_runs_are_what_they_say(model, tokenizer):
    found = protocol(model, tokenizer, TASK, " ", 3, seeds=(2,), learning_rates=(0.05,))
    zsl, icl, ft = [run[3] for run in found]
    queries = [TASK.query(e) for e in ROWS]
    lessons = TASK.sample(3, 2)
    prefix = prompt_prefix(TASK, lessons, tokenizer, " ")

    def predict(before):
        return score(model, tokenizer, queries, TASK.label_words, before).argmax(1)

    np.testing.assert_array_equal(zsl, predict(""))
    np.testing.assert_array_equal(icl, predict(prefix))
    texts = [TASK.demonstration(e) for e in lessons]
    with updated(model, kv_sgd(model, tokenizer, texts, 0.05)[0]):
        np.testing.assert_array_equal(ft, predict(""))


def test_finished_runs_are_not_repeated(model, tokenizer, monkeypatch):
    again = dict(seeds=(1, 2), learning_rates=(0.01,))
    first = list(protocol(model, tokenizer, TASK, " ", 3, **again))
    done = {run[:3]: run[3] for run in first}
    monkeypatch.setattr("icl.comparison.score", lambda *_: pytest.fail("computed"))
    second = list(protocol(model, tokenizer, TASK, " ", 3, **again, done=done))
    assert [run[:3] for run in second] == [run[:3] for run in first]


def test_divergence_is_a_run_without_predictions(model, tokenizer):
    found = protocol(
        model, tokenizer, TASK, " ", 3, seeds=(1,), learning_rates=(math.inf, 0.01)
    )
    *_, diverged, fine = [run[3] for run in found]
    assert diverged is None
    assert fine is not None
