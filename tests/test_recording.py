"""What a packed pass records, against each prompt run by itself."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from icl import recording, scoring
from icl.recording import read, record
from icl.scoring import score

PREFIX = "<s> Review : the film was good Positive </s> Review : dull Negative </s>"
QUERIES = [
    "Review : a moving plot and bright actors Sentiment :",
    "Review : boring Sentiment :",
    "Review : the plot was not very good , but the actors is so . Sentiment :",
    "Review : dull , dull , dull Sentiment :",
]
LABELS = ["Unclearly", "Positive"]  # of three tokens and of one


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def alone(model, tokenizer, prefix, query, position):
    """Attention outputs and raw scores of one prompt, from its own weights."""
    if model._supports_attention_backend:
        model.set_attn_implementation("eager")
    before = encode(tokenizer, prefix) if prefix else []
    ids = before + encode(tokenizer, query)
    if position == "label":
        ids = ids + encode(tokenizer, " " + LABELS[0])
    outputs = []
    layers = [m for n, m in model.named_modules() if n.split(".")[-1].isdigit()]
    hooks = []
    for layer in layers:
        part = next(
            m
            for n, m in layer.named_children()
            if n in ("attn", "self_attn", "attention")
        )
        hooks.append(
            part.register_forward_hook(lambda m, i, o: outputs.append(o[0][0, -1]))
        )
    weights = model(torch.tensor([ids]), output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    # log-weights are the scores up to a constant a head
    logs = np.stack([w[0, :, -1].double().log().numpy() for w in weights])
    return torch.stack(outputs).numpy(), logs, len(before)


def level(scores):
    return scores - scores.mean(-1, keepdims=True)


@pytest.mark.parametrize("positions", [("prompt",), ("label",), ("prompt", "label")])
@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["demonstrations", "zero-shot"])
def test_recording_is_each_prompt_alone(
    model, tokenizer, tmp_path, positions, prefix, monkeypatch
):
    monkeypatch.setattr(scoring, "PACK_TOKENS", 30)
    found = record(
        model,
        tokenizer,
        QUERIES,
        LABELS,
        prefix,
        folder=tmp_path / "run",
        positions=positions,
        attended=3,
    )
    assert set(found) == set(positions)
    scores = score(model, tokenizer, QUERIES, LABELS, prefix)
    for position, got in found.items():
        np.testing.assert_allclose(got.scores, scores, atol=1e-4)
        assert len(got.demonstrations) == 3
        for n, query in enumerate(QUERIES):
            outputs, logs, start = alone(model, tokenizer, prefix, query, position)
            np.testing.assert_allclose(got.outputs[n], outputs, atol=1e-4)
            assert got.own[n].shape == logs[..., start:].shape
            own = level(got.own[n])
            np.testing.assert_allclose(own, level(logs[..., start:]), atol=1e-3)
            if n < 3:
                both = np.concatenate([got.demonstrations[n], got.own[n]], -1)
                np.testing.assert_allclose(level(both), level(logs), atol=1e-3)


def test_queries_make_the_scores(tokenizer, tmp_path):
    """The recorded query times a key is the recorded score."""
    from icl.heads import attention_inputs

    model = tiny_model("qwen3")
    got = record(model, tokenizer, QUERIES, LABELS, PREFIX, folder=tmp_path / "run")
    got = got["prompt"]
    for n, query in enumerate(QUERIES):
        ids = encode(tokenizer, PREFIX) + encode(tokenizer, query)
        for l, heads in enumerate(attention_inputs(model, ids)):  # noqa: E741
            want = heads.query[:, -1].numpy()
            np.testing.assert_allclose(got.queries[n, l], want, atol=1e-4)
            scores = (heads.key @ heads.query[:, -1, :, None])[..., 0].numpy()
            both = np.concatenate([got.demonstrations[n, l], got.own[n][l]], -1)
            np.testing.assert_allclose(both, scores, atol=1e-3)


def test_likeliest_next_tokens(model, tokenizer, tmp_path):
    """Against the full distribution after each prompt by itself."""
    got = record(model, tokenizer, QUERIES, LABELS, PREFIX, folder=tmp_path / "run")
    for n, query in enumerate(QUERIES):
        ids = encode(tokenizer, PREFIX) + encode(tokenizer, query)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        log_p, order = logits.log_softmax(-1).sort(descending=True)
        np.testing.assert_array_equal(got["prompt"].tokens[n], order[:10])
        np.testing.assert_allclose(got["prompt"].log_p[n], log_p[:10], atol=1e-4)


def test_read_again(tokenizer, tmp_path):
    model = tiny_model("llama")
    got = record(model, tokenizer, QUERIES, LABELS, PREFIX, folder=tmp_path / "run")
    again = read(tmp_path / "run")
    for name in ("scores", "outputs", "queries", "demonstrations", "tokens", "log_p"):
        one, two = (getattr(found["prompt"], name) for found in (got, again))
        np.testing.assert_array_equal(one, two)


def test_a_killed_run_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    calls = []

    def save(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        recording_save(tensors, path)

    recording_save = recording.save_file
    monkeypatch.setattr(recording, "save_file", save)
    monkeypatch.setattr(scoring, "PACK_TOKENS", 1)
    arguments = tiny_model("gpt2"), tokenizer, QUERIES, LABELS, PREFIX
    with pytest.raises(KeyboardInterrupt):
        record(*arguments, folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no recording in"):
        read(tmp_path / "run")


def test_bad_input(tokenizer, tmp_path):
    arguments = tiny_model("gpt2"), tokenizer, QUERIES, LABELS, PREFIX
    for wrong in (("last",), "label", ()):
        with pytest.raises(ValueError, match="some of prompt, label, not"):
            record(*arguments, folder=tmp_path / "run", positions=wrong)
    with pytest.raises(ValueError, match="exists; delete it"):
        record(*arguments, folder=tmp_path)
