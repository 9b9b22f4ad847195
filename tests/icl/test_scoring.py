"""The packed scorer against each prompt scored by itself."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TINY, marking_tokenizer, tiny_model
from tokenizers import normalizers

from icl import scoring
from icl.attention import replace_attention
from icl.scoring import Packing, score

PREFIX = (
    "<s> Review : the film was good Positive </s> Review : dull story Negative </s>"
)
QUERIES = [
    "Review : a moving plot and bright actors Sentiment :",
    "Review : boring Sentiment :",
    "Review : the plot was not very good , but the actors is so . Sentiment :",
    "Review : dull , dull , dull Sentiment :",
]
LABELS = ["Positive", "Unclearly", "Neitherly"]  # of one, three and two tokens


@torch.inference_mode()
def one_by_one(model, tokenizer, queries, label_words, demonstrations):
    """Every full prompt with every label, alone, without cache or mask."""
    scores = np.empty((len(queries), len(label_words)))
    for n, query in enumerate(queries):
        for c, word in enumerate(label_words):
            parts = [demonstrations, query, " " + word]
            ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts]
            row = torch.tensor([sum(ids, [])])
            log_p = model(row[:, :-1], use_cache=False).logits[0].double()
            log_p = log_p.log_softmax(-1)
            start = row.shape[1] - len(ids[2])
            steps = [log_p[t - 1, row[0, t]] for t in range(start, row.shape[1])]
            scores[n, c] = np.mean([s.item() for s in steps])
    return scores


#: Every family with several queries a row; one, and all, with two of them.
PACKED = [(family, prefix, 40) for family in TINY for prefix in (PREFIX, "")]
PACKED += [("gpt2", PREFIX, 1), ("qwen3", "", 1), ("opt", PREFIX, 768)]
PACKED += [("llama", "", 768), ("gpt_neox", PREFIX, 768), ("xglm", "", 1)]


@pytest.mark.parametrize(("family", "prefix", "pack_tokens"), PACKED)
def test_packing_is_exact(family, tokenizer, prefix, pack_tokens, monkeypatch):
    model = tiny_model(family)
    monkeypatch.setattr(scoring, "PACK_TOKENS", pack_tokens)
    got = score(model, tokenizer, QUERIES, LABELS, prefix)
    want = one_by_one(model, tokenizer, QUERIES, LABELS, prefix)
    assert np.ptp(want, axis=0).min() > 0.01, "the case is too easy: queries tie"
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("device", "limit"), [("cpu", 30), ("cuda", 90)])
def test_rows_are_as_long_as_the_device_allows(device, limit, tokenizer, monkeypatch):
    """No GPU is here: a model that says it is on one is asked for its rows alone."""
    monkeypatch.setattr(scoring, "PACK_TOKENS", 30)
    monkeypatch.setattr(scoring, "_PACK_TOKENS_CUDA", 90)
    packing = Packing(tiny_model("llama"), tokenizer, QUERIES * 5, LABELS, PREFIX)
    monkeypatch.setattr(type(packing.model), "device", torch.device(device))
    monkeypatch.setattr(Packing, "_read_prefix", lambda self: None)
    rows = list(packing.rows())
    assert sorted(n for row in rows for n in row.numbers) == list(range(20))
    sizes = [len(row.ids) for row in rows]
    assert max(sizes) <= limit
    assert all(a + b > limit for a, b in pairwise(sizes[:-1]))  # and not shorter


def test_demonstrations_matter(model, tokenizer):
    with_prefix = score(model, tokenizer, QUERIES, LABELS, PREFIX)
    without = score(model, tokenizer, QUERIES, LABELS)
    assert np.abs(with_prefix - without).min() > 1e-3


def test_each_token_is_computed_once(tokenizer, monkeypatch):
    """But for the first call, in which a query is computed alone too."""
    model = tiny_model("llama")
    score(model, tokenizer, QUERIES, LABELS, PREFIX)
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **k: seen.append(ids.numel()) or forward(ids, **k)
    )
    score(model, tokenizer, QUERIES, LABELS, PREFIX)

    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    branches = sum(count(" " + w) - 1 for w in LABELS)  # the last is only predicted
    assert branches == 3
    want = count(PREFIX) + sum(count(q) + branches for q in QUERIES)
    want -= (len(QUERIES) - 1) * count("Review :")  # with which all of them begin
    assert sum(seen) == want


def test_label_words_that_share_tokens(tokenizer):
    """Each is scored over all its tokens; only the same tokens are refused."""
    model, words = tiny_model("llama"), ["Un", "Unclear", "Unclearly", "Positive ly"]
    got = score(model, tokenizer, QUERIES, words, PREFIX)
    want = one_by_one(model, tokenizer, QUERIES, words, PREFIX)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"'Odd' and 'Even'.*\[UNK\]"):
        score(model, tokenizer, QUERIES, ["Odd", "good", "Even"])


@pytest.mark.parametrize("blank", [" ", ""])
@pytest.mark.parametrize("demonstrations", ["\nReview : dull Negative\n", ""])
def test_a_prompt_is_encoded_as_one_text(demonstrations, blank):
    """As lm-evaluation-harness cuts it: whole texts, and the label what comes last."""
    tokenizer, model = marking_tokenizer(), tiny_model("llama", vocab_size=120)
    queries, words = ["Review : dull Sentiment :", "Review : not :"], LABELS[:2]
    got = score(model, tokenizer, queries, words, demonstrations, blank)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for n, query in enumerate(queries):
        before = encode(demonstrations + query)
        for c, word in enumerate(words):
            ids = encode(demonstrations + query + blank + word)
            assert ids[: len(before)] == before
            with torch.inference_mode():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            label = range(len(before), len(ids))
            want = np.mean([log_p[t - 1, ids[t]].item() for t in label])
            assert got[n, c] == pytest.approx(want, abs=1e-4)
    parts = encode(demonstrations) + encode(queries[0])
    assert (encode(demonstrations + queries[0]) == parts) == (not demonstrations)


def test_a_label_that_the_tokenizer_merges_with_its_query():
    tokenizer = marking_tokenizer()
    merged = ["Review : d", "Review : du"]  # "dull" is a token
    with pytest.raises(ValueError, match="merges the label word 'ull' .*'Review : d'"):
        score(tiny_model("llama", vocab_size=120), tokenizer, merged, ["ull"], blank="")


@pytest.mark.parametrize(
    ("queries", "labels", "named"),
    [
        (["good", "  "], LABELS, "query 1"),
        ([], LABELS, "query"),
        ("good", LABELS, "query"),
        (["good", None], LABELS, "query 1 .*None"),
        (None, LABELS, "query.*None"),
        (QUERIES, [], "label word"),
        (QUERIES, "Positive", "label word"),
        (QUERIES, ["Positive", ""], "label word 1"),
        (["good", "\u200b"], LABELS, "query 1"),  # which the tokenizer drops
    ],
)
def test_texts_that_are_refused(tokenizer, queries, labels, named):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(ValueError, match=named):
        score(tiny_model("gpt2"), tokenizer, queries, labels)


def test_queries_of_any_kind_of_sequence(tokenizer):
    model = tiny_model("llama")
    want = score(model, tokenizer, QUERIES, LABELS)
    for queries in (iter(QUERIES), np.array(QUERIES), tuple(QUERIES)):
        given = score(model, tokenizer, queries, np.array(LABELS))
        np.testing.assert_array_equal(given, want)


def test_a_query_twice(tokenizer):
    """What all queries have in common stands before them, but for their last token."""
    model = tiny_model("llama")
    for queries in (QUERIES[:1] * 2, ["film", "film"], ["the film", "the film was"]):
        got = score(model, tokenizer, queries, LABELS, PREFIX)
        want = one_by_one(model, tokenizer, queries, LABELS, PREFIX)
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shown", [0, 100])
@pytest.mark.parametrize("family", TINY)
def test_prompt_of_the_context_and_one_token_more(family, shown, tokenizer):
    """The last token of a label is predicted, not read."""
    model, demonstrations = tiny_model(family), "good " * shown
    fits = "good " * (256 - 2 - shown)  # and two of the three of "Unclearly"
    got = score(model, tokenizer, [fits], LABELS, demonstrations)
    want = one_by_one(model, tokenizer, [fits], LABELS, demonstrations)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=f"{shown} .* {257 - shown} .* 256"):
        score(model, tokenizer, [fits + "good"], LABELS, demonstrations)


def test_sliding_window_shorter_than_the_prompt(tokenizer):
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=16)
    with pytest.raises(ValueError, match="16"):
        score(model, tokenizer, QUERIES, LABELS, PREFIX)


def test_one_score_that_is_not_finite(tokenizer):
    packing = Packing(tiny_model("llama"), tokenizer, QUERIES, LABELS)
    (row,) = packing.rows()
    log_p, _ = packing.run(row)
    assert np.isfinite(packing.label_scores(row, log_p)).all()
    log_p[0, packing.labels[0]] = -torch.inf
    with pytest.raises(FloatingPointError, match="float32"):
        packing.label_scores(row, log_p)


def test_output_that_is_not_finite(tokenizer):
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="float32"):
        score(model, tokenizer, QUERIES, LABELS)


@pytest.mark.parametrize("first", [PREFIX, ""])
def test_a_prefix_of_another_length_is_compared_again(first, tokenizer):
    """Behind a border in the prompt a packed row is right by its prefix alone."""
    model = tiny_model("llama")
    replace_attention(model, "regularised", alpha=0.9, demonstrations=8)
    for prefix in (first, PREFIX, "the film "):
        got = score(model, tokenizer, QUERIES, LABELS, prefix)
        want = one_by_one(model, tokenizer, QUERIES, LABELS, prefix)
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_a_model_in_training_mode_is_refused(tokenizer):
    model = tiny_model("gpt2").train()
    with pytest.raises(ValueError, match="eval"):
        score(model, tokenizer, QUERIES, LABELS)
    got = score(model.eval(), tokenizer, QUERIES, LABELS)
    np.testing.assert_array_equal(got, score(model, tokenizer, QUERIES, LABELS))
