"""What one run of a setting is, and how two settings are compared."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import marking_tokenizer, tiny_model, word_tokenizer

from icl.activations import capture_qkv, read_recording, record
from icl.comparison import (
    LEARNING_RATES,
    Evaluator,
    finetune_with_queries,
    run_scores,
    similarities,
)
from icl.finetuning import applied_update, kv_sgd
from icl.metrics import kendall, simam
from icl.scoring import score
from icl.tasks import Task, demonstration_of_tokens, prompt_prefix, token_starts

TEXTS = ["good film", "dull story", "bright actors", "boring plot", "very moving"]
ROWS = [{"text": t, "label": n % 2} for n, t in enumerate(TEXTS)]
TASK = Task("tiny", "Review : {text} is", ["Positive", "Negative"], ROWS * 4, ROWS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_grid_of_the_paper():
    assert len(LEARNING_RATES) == 36
    assert min(LEARNING_RATES) == pytest.approx(1e-4)
    assert max(LEARNING_RATES) == pytest.approx(0.9)


def test_runs_are_what_they_say(model, tokenizer):
    queries = [TASK.query(e) for e in ROWS]

    def predict(lessons):
        before = prompt_prefix(TASK, lessons, tokenizer)
        return score(model, tokenizer, queries, TASK.label_words, before).argmax(1)

    evaluator, told_apart = Evaluator(model, tokenizer, TASK), False
    for seed in range(6):
        zsl, icl, ft = (
            run_scores(evaluator, setting, seed, 0.05, 3).argmax(1)
            for setting in ("ZSL", "ICL", "FT")
        )
        lessons = TASK.sample(3, seed)
        np.testing.assert_array_equal(zsl, predict([]))
        np.testing.assert_array_equal(icl, predict(lessons))
        told_apart |= (icl != predict(lessons[:-1])).any()
        texts = [TASK.demonstration(e) for e in lessons]
        with applied_update(model, kv_sgd(model, tokenizer, texts, 0.05)[0]):
            np.testing.assert_array_equal(ft, predict([]))
    assert told_apart  # two demonstrations answer otherwise than three


def test_layer_causal_runs_are_no_plain_ones(model, tokenizer):
    """Through run_scores, against the update computed here; and plain FT differs."""
    evaluator = Evaluator(model, tokenizer, TASK)
    found = {s: run_scores(evaluator, s, 1, 0.05, 3) for s in ("FT", "LCGD")}
    texts = [TASK.demonstration(e) for e in TASK.sample(3, 1)]
    for setting, scores in found.items():
        update, _ = kv_sgd(model, tokenizer, texts, 0.05, setting == "LCGD")
        with applied_update(model, update):
            np.testing.assert_allclose(scores, evaluator.score(), atol=1e-6)
    assert np.abs(found["FT"] - found["LCGD"]).max() > 1e-3


def test_a_blank_reaches_prompt_and_score(model, tokenizer, tmp_path):
    """A word that begins with the blank is scored as with it."""
    words = [" " + word for word in TASK.label_words]
    joined = replace(TASK, blank="", label_words=words)
    one, two = (Evaluator(model, tokenizer, task) for task in (TASK, joined))
    examples, broken = TASK.sample(3, 1), replace(TASK, blank="(")
    np.testing.assert_array_equal(one.score(examples), two.score(examples))
    three = Evaluator(model, tokenizer, broken)
    assert np.abs(three.score() - one.score()).max() > 1e-3
    recording = three.record(tmp_path / "run")["prompt"]
    np.testing.assert_allclose(recording.scores, three.score(), atol=1e-5)


def test_demonstrations_that_do_not_fit_are_counted(model, tokenizer, monkeypatch):
    evaluator, many = Evaluator(model, tokenizer, TASK, "bare"), [ROWS[0]] * 9

    def used(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = max(used(TASK.query(row)) for row in ROWS)
    asked += max(used(TASK.blank + word) for word in TASK.label_words)
    six = used(prompt_prefix(TASK, many[:6], tokenizer, "bare"))
    for room, fit in ((six, 6), (six - 1, 5), (0, 0)):
        limit = asked + room
        monkeypatch.setattr(model.config, "max_position_embeddings", limit)
        assert evaluator.prefix(many[:fit]) is not None
        with pytest.raises(ValueError, match=f"9 demonstrations .* {limit} .* {fit} "):
            evaluator.prefix(many)


def test_divergence_is_a_run_without_predictions(model, tokenizer):
    evaluator = Evaluator(model, tokenizer, TASK)
    assert run_scores(evaluator, "FT", 1, math.inf, 3) is None
    assert run_scores(evaluator, "FT", 1, 0.01, 3) is not None


def recorded(*asked, folder, **options):
    record(*asked, folder=folder, **options)
    return read_recording(folder)["prompt"]


def test_similarities_from_separate_passes(model, tokenizer, tmp_path):
    """Kendall and SimAM again, every prompt and every training step by itself."""
    examples = TASK.sample(3, 1)
    texts = [TASK.demonstration(e) for e in examples]
    prefix = prompt_prefix(TASK, examples, tokenizer, "eos")
    owner = demonstration_of_tokens(TASK, examples, tokenizer, "eos")
    queries = [TASK.query(e) for e in TASK.evaluation]
    arguments = model, tokenizer, queries, TASK.label_words
    zsl = recorded(*arguments, folder=tmp_path / "zsl")
    icl = recorded(*arguments, prefix, folder=tmp_path / "icl", attended=2)
    update, training = finetune_with_queries(model, tokenizer, texts, 0.05)
    with applied_update(model, update):
        ft = recorded(*arguments, folder=tmp_path / "ft")
    found = similarities(zsl, ft, icl, training, owner)
    assert found["Kendall"].values.shape == (2, 3)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    trained = []  # tokens' queries, each text behind the steps before it
    for step, text in enumerate(texts):
        before = kv_sgd(model, tokenizer, texts[:step], 0.05)[0] if step else {}
        with applied_update(model, before):
            trained.append([h.query.numpy() for h in capture_qkv(model, encode(text))])
    columns = [i for i, o in enumerate(owner) if o >= 0]
    for n, query in enumerate(queries):
        context = capture_qkv(model, encode(prefix) + encode(query))
        with applied_update(model, update):
            after = capture_qkv(model, encode(query))
        for l in range(3):  # noqa: E741
            scores = (context[l].key @ context[l].query[:, -1, :, None])[..., 0].numpy()
            own = (after[l].key @ after[l].query[:, -1, :, None])[..., 0].numpy()
            maps = [[own[None]], [scores[None, :, len(owner) :]]]
            want = simam(*maps).values[0, 0]
            got = found["SimAM after"].values[n, l]
            assert got == pytest.approx(want, abs=1e-4)
            if n < 2:
                m_icl = sum(scores[h] for h in range(4))[columns]
                q = after[l].query[:, -1].numpy()
                m_ft = [
                    sum(step[l][h, t] @ q[h] for h in range(4))
                    for step in trained
                    for t in range(step[l].shape[1])
                ]
                # rounding may turn a pair that is nearly tied
                want = kendall(m_icl[None, None], np.array(m_ft)[None, None]).mean
                assert found["Kendall"].values[n, l] == pytest.approx(want, abs=0.02)


def test_front_token_of_a_layout_is_no_demonstration(model, tokenizer, tmp_path):
    """Each text is trained on behind <s>, whose own queries are left out."""
    evaluator = Evaluator(model, tokenizer, TASK, "eos")
    examples = TASK.sample(3, 1)
    update, queries = evaluator.finetune(examples, 0.05)
    texts = ["<s>" + TASK.demonstration(e) for e in examples]
    want, every = finetune_with_queries(model, tokenizer, texts, 0.05)
    assert all(torch.equal(update[name], part) for name, part in want.items())
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = np.concatenate([np.array(text) != 0 for text in ids])  # <s> is token 0
    np.testing.assert_array_equal(queries, every[kept])
    owner = demonstration_of_tokens(TASK, examples, tokenizer, "eos")
    run = evaluator.record(tmp_path / "run", examples)["prompt"]
    found = similarities(run, run, run, queries, owner)
    assert np.isfinite(found["Kendall"].mean)


@pytest.mark.parametrize("layout", ["newline", "eos"])
def test_both_learners_are_shown_the_same_tokens(layout, tmp_path):
    """Though the tokenizer marks the start of a text, and so of the first one."""
    tokenizer = marking_tokenizer()
    examples, front = TASK.sample(3, 1), prompt_prefix(TASK, [], tokenizer, layout)
    owner = demonstration_of_tokens(TASK, examples, tokenizer, layout)

    def encode(text):
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])

    read = encode(prompt_prefix(TASK, examples, tokenizer, layout))
    for number, example in enumerate(examples):
        text = front + TASK.demonstration(example)
        own = token_starts(tokenizer, text) >= len(front)
        assert encode(text)[own].tolist() == read[owner == number].tolist()
    model = tiny_model("llama", vocab_size=120)
    evaluator = Evaluator(model, tokenizer, TASK, layout)
    _, queries = evaluator.finetune(examples, 0.05)
    run = evaluator.record(tmp_path / "run", examples)["prompt"]
    assert np.isfinite(similarities(run, run, run, queries, owner)["Kendall"].mean)


def test_a_tokenizer_without_characters_is_finetuned_all_the_same(model, monkeypatch):
    tokenizer = word_tokenizer()
    evaluator, examples = Evaluator(model, tokenizer, TASK), TASK.sample(3, 1)
    want, _ = evaluator.finetune(examples, 0.05)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    update, queries = evaluator.finetune(examples, 0.05)
    assert queries is None
    assert all(torch.equal(want[name], part) for name, part in update.items())
    with pytest.raises(ValueError, match="which characters"):
        demonstration_of_tokens(TASK, examples, tokenizer)


def test_similarities_need_the_same_demonstrations(model, tokenizer, tmp_path):
    examples = TASK.sample(3, 1)
    prefix = prompt_prefix(TASK, examples, tokenizer, "eos")
    owner = demonstration_of_tokens(TASK, examples, tokenizer, "eos")
    asked = model, tokenizer, ["good"], ["Positive"], prefix
    run = recorded(*asked, folder=tmp_path / "run")
    _, training = finetune_with_queries(model, tokenizer, ["good film"], 0.05)
    with pytest.raises(ValueError, match="finetuning saw 2"):
        similarities(run, run, run, training, owner)
