"""What attention computes, in all six families, and what a packed pass records."""

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_model

from icl import activations, scoring
from icl.activations import capture_qkv, read_recording, record
from icl.scoring import score

IDS = torch.tensor([0, 5, 9, 3, 14, 7, 22, 4, 11, 8, 19, 6])


def attention(heads, start=0):
    scores = heads.query @ heads.key.mT
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(start + 1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


@pytest.fixture(params=list(TINY))
def eager(request):
    """A model whose own attention weights can be read, and its family."""
    model = tiny_model(request.param)
    if model._supports_attention_backend:
        model.set_attn_implementation("eager")
    return model


def test_scores_are_the_models_own(eager):
    before = eager(IDS[None]).logits
    usual = eager.config._attn_implementation
    own = eager(IDS[None], output_attentions=True).attentions
    layers = capture_qkv(eager, IDS)
    assert len(layers) == eager.config.num_hidden_layers
    for heads, weights in zip(layers, own, strict=True):
        torch.testing.assert_close(attention(heads), weights[0], atol=1e-5, rtol=0)
    assert eager.config._attn_implementation == usual  # and the model is as before
    torch.testing.assert_close(eager(IDS[None]).logits, before, atol=0, rtol=0)


def test_outputs_are_the_models_own(eager):
    """What the output projection receives is attention over these values."""
    received, hooks = [], []
    for name, module in eager.named_modules():
        if name.endswith(("attn.c_proj", "attn.out_proj", "attn.o_proj")) or (
            name.endswith("attention.dense")
        ):
            keep = lambda module, inputs: received.append(inputs[0][0])  # noqa: E731
            hooks.append(module.register_forward_pre_hook(keep))
    eager(IDS[None])
    for hook in hooks:
        hook.remove()
    for heads, rows in zip(capture_qkv(eager, IDS), received, strict=True):
        out = (attention(heads) @ heads.value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out, rows, atol=1e-4, rtol=1e-5)


def test_prefix_changes_nothing(eager):
    whole = capture_qkv(eager, IDS)
    prefix = [type(h)(*(t[:, :7] for t in h)) for h in whole]
    for one, two in zip(whole, capture_qkv(eager, IDS[7:], prefix), strict=True):
        torch.testing.assert_close(two.query, one.query[:, 7:], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(two.key, one.key, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(two.value, one.value, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
def test_rotary_attention_depends_on_distances_alone(family):
    model = tiny_model(family)
    here, there = (capture_qkv(model, IDS, start=s) for s in (0, 90))
    for one, two in zip(here, there, strict=True):
        assert (one.key - two.key).abs().max() > 0.01
        torch.testing.assert_close(attention(one), attention(two), atol=1e-4, rtol=0)


def test_more_tokens_than_a_model_holds(eager):
    capture_qkv(eager, IDS, start=256 - len(IDS))
    with pytest.raises(ValueError, match="257 .* 256"):
        capture_qkv(eager, IDS, start=257 - len(IDS))


def test_a_label_word_that_does_not_fit(eager, tokenizer, tmp_path):
    """It is read, not only predicted, where its own attention is asked for."""
    asked = eager, tokenizer, ["good " * 256], ["Positive"]
    record(*asked, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="257 .* 256"):
        record(*asked, folder=tmp_path / "two", positions=("label",))
    record(eager, tokenizer, ["good " * 255], ["Positive"], folder=tmp_path / "two")


def test_heads_that_are_not_the_models_own():
    """Queries before the rotary embedding would not give its attention weights."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    model._supports_attention_backend = False  # so that projections are read
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        capture_qkv(model, IDS)


def test_a_family_out_of_reach():
    model = tiny_model("xglm")
    for layer in model.model.layers:  # its queries are then called something else
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
        layer.self_attn.__dict__["q_proj"] = layer.self_attn.query
    with pytest.raises(ValueError, match="XGLMForCausalLM"):
        capture_qkv(model, IDS)


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


#: Every family with both positions behind demonstrations; the other ways to ask, each
#: with families of absolute and of rotary positions, and with shared keys.
ASKED = [(family, PREFIX, ("prompt", "label")) for family in TINY]
ASKED += [(family, "", ("prompt", "label")) for family in ("gpt2", "xglm", "qwen3")]
ASKED += [("llama", PREFIX, ("prompt",)), ("opt", "", ("prompt",))]
ASKED += [("gpt_neox", PREFIX, ("label",)), ("llama", "", ("label",))]


@pytest.mark.parametrize(("family", "prefix", "positions"), ASKED)
def test_recording_is_each_prompt_alone(
    family, tokenizer, tmp_path, positions, prefix, monkeypatch
):
    model = tiny_model(family)
    monkeypatch.setattr(scoring, "PACK_TOKENS", 30)
    asked = model, tokenizer, QUERIES, LABELS, prefix
    record(*asked, folder=tmp_path / "run", positions=positions, attended=3)
    found = read_recording(tmp_path / "run")
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
    model = tiny_model("qwen3")
    record(model, tokenizer, QUERIES, LABELS, PREFIX, folder=tmp_path / "run")
    got = read_recording(tmp_path / "run")["prompt"]
    for n, query in enumerate(QUERIES):
        ids = encode(tokenizer, PREFIX) + encode(tokenizer, query)
        for l, heads in enumerate(capture_qkv(model, ids)):  # noqa: E741
            want = heads.query[:, -1].numpy()
            np.testing.assert_allclose(got.queries[n, l], want, atol=1e-4)
            scores = (heads.key @ heads.query[:, -1, :, None])[..., 0].numpy()
            both = np.concatenate([got.demonstrations[n, l], got.own[n][l]], -1)
            np.testing.assert_allclose(both, scores, atol=1e-3)


def test_a_query_of_one_token_has_a_map_of_one(tokenizer, tmp_path):
    asked = tiny_model("llama"), tokenizer, ["good", "bad"], LABELS, PREFIX
    record(*asked, folder=tmp_path / "run")
    own = read_recording(tmp_path / "run")["prompt"].own
    assert [each.shape for each in own] == [(3, 4, 1)] * 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_likeliest_next_tokens(family, tokenizer, tmp_path):
    """Against the full distribution after each prompt by itself."""
    model = tiny_model(family)
    record(model, tokenizer, QUERIES, LABELS, PREFIX, folder=tmp_path / "run")
    got = read_recording(tmp_path / "run")
    for n, query in enumerate(QUERIES):
        ids = encode(tokenizer, PREFIX) + encode(tokenizer, query)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        log_p, order = logits.log_softmax(-1).sort(descending=True)
        np.testing.assert_array_equal(got["prompt"].tokens[n], order[:10])
        np.testing.assert_allclose(got["prompt"].log_p[n], log_p[:10], atol=1e-4)


def test_a_killed_run_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    calls = []

    def save(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        usual(tensors, path)

    usual = activations.save_file
    monkeypatch.setattr(activations, "save_file", save)
    monkeypatch.setattr(scoring, "PACK_TOKENS", 1)
    arguments = tiny_model("gpt2"), tokenizer, QUERIES, LABELS, PREFIX
    with pytest.raises(KeyboardInterrupt):
        record(*arguments, folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="run"):
        read_recording(tmp_path / "run")


def test_positions_and_folders_that_are_refused(tokenizer, tmp_path):
    arguments = tiny_model("gpt2"), tokenizer, QUERIES, LABELS, PREFIX
    for wrong in (("last",), "label", ()):
        with pytest.raises(ValueError, match="'prompt', 'label'"):
            record(*arguments, folder=tmp_path / "run", positions=wrong)
    with pytest.raises(ValueError, match=tmp_path.name):
        record(*arguments, folder=tmp_path)
