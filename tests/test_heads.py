"""Queries, keys and values of every head, in all six families."""

import pytest
import torch
from conftest import TINY, tiny_model

from icl.heads import attention_inputs

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
    own = eager(IDS[None], output_attentions=True).attentions
    layers = attention_inputs(eager, IDS)
    assert len(layers) == eager.config.num_hidden_layers
    for heads, weights in zip(layers, own, strict=True):
        torch.testing.assert_close(attention(heads), weights[0], atol=1e-5, rtol=0)


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
    for heads, rows in zip(attention_inputs(eager, IDS), received, strict=True):
        out = (attention(heads) @ heads.value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out, rows, atol=1e-4, rtol=1e-5)


def test_prefix_changes_nothing(eager):
    whole = attention_inputs(eager, IDS)
    prefix = [type(h)(*(t[:, :7] for t in h)) for h in whole]
    for one, two in zip(whole, attention_inputs(eager, IDS[7:], prefix), strict=True):
        torch.testing.assert_close(two.query, one.query[:, 7:], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(two.key, one.key, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(two.value, one.value, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
def test_rotary_attention_depends_on_distances_alone(family):
    model = tiny_model(family)
    here, there = (attention_inputs(model, IDS, start=s) for s in (0, 90))
    for one, two in zip(here, there, strict=True):
        assert (one.key - two.key).abs().max() > 0.01
        torch.testing.assert_close(attention(one), attention(two), atol=1e-4, rtol=0)


def test_the_model_is_as_before(eager):
    usual = eager.config._attn_implementation
    before = eager(IDS[None]).logits
    attention_inputs(eager, IDS)
    assert eager.config._attn_implementation == usual
    torch.testing.assert_close(eager(IDS[None]).logits, before, atol=0, rtol=0)


def test_no_ids():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"token ids \(T,\), T >= 1, not \(0,\)"):
        attention_inputs(model, [])
    with pytest.raises(ValueError, match=r"not \(1, 12\)"):
        attention_inputs(model, IDS[None])


def test_a_family_out_of_reach():
    model = tiny_model("xglm")
    for layer in model.model.layers:  # its queries are then called something else
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
        layer.self_attn.__dict__["q_proj"] = layer.self_attn.query
    with pytest.raises(ValueError, match="queries of XGLMForCausalLM cannot be"):
        attention_inputs(model, IDS)
