"""K/V-only SGD against PyTorch's own optimiser with frozen parts, all families."""

import pytest
import torch
import transformers
from conftest import tiny_model

from icl.finetuning import kv_sgd, updated

TEXTS = ["the film was good Positive", "a dull story Negative", "not boring Positive"]


def key_value_mask(name, parameter, family, heads=4):
    """True where a parameter's entry makes a key or a value, written entry-wise."""
    mask = torch.zeros_like(parameter, dtype=torch.bool)
    if family == "gpt2" and "attn.c_attn" in name:
        third = parameter.shape[-1] // 3
        mask[..., third:] = True
    elif family == "gpt_neox" and "query_key_value" in name:
        size = parameter.shape[0] // (3 * heads)
        for head in range(heads):
            start = head * 3 * size
            mask[start + size : start + 3 * size] = True
    elif "k_proj" in name or "v_proj" in name:
        mask[:] = True
    return mask


def reference(family, tokenizer, learning_rate):
    """The same steps by torch.optim.SGD on all weights, others put back."""
    model = tiny_model(family).requires_grad_(True)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    sgd = torch.optim.SGD(model.parameters(), learning_rate)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        sgd.zero_grad()
        model(ids["input_ids"], labels=ids["input_ids"]).loss.backward()
        sgd.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                mask = key_value_mask(name, parameter, family)
                parameter.copy_(torch.where(mask, parameter, start[name]))
    return model.requires_grad_(False)


def test_equals_torch_sgd(model, tokenizer):
    family = model.config.model_type
    before = {n: p.clone() for n, p in model.named_parameters()}
    update, losses = kv_sgd(model, tokenizer, TEXTS, 0.05)
    want = reference(family, tokenizer, 0.05)
    assert len(losses) == len(TEXTS)
    with updated(model, update):
        moved = 0
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter, want.get_parameter(name), atol=1e-6, rtol=1e-5
            )
            moved += (parameter != before[name]).any().item()
    assert moved >= 3  # every layer
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was not put back"
        assert not parameter.requires_grad


def test_loss_is_the_mean_over_all_tokens(model, tokenizer):
    _, losses = kv_sgd(model, tokenizer, TEXTS[:1], 1e-3)
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = -sum(log_p[t - 1, ids[t]] for t in range(1, len(ids))) / (len(ids) - 1)
    assert losses[0] == pytest.approx(want.item(), abs=1e-5)


def test_weights_return_after_an_error(model, tokenizer):
    before = [p.clone() for p in model.parameters()]
    update, _ = kv_sgd(model, tokenizer, TEXTS, 0.01)
    with pytest.raises(KeyError), updated(model, update):
        raise KeyError
    assert all(map(torch.equal, model.parameters(), before))


def test_divergence_is_named_and_undone(tokenizer):
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 2 of 3 .* learning rate inf"):
        kv_sgd(model, tokenizer, TEXTS, float("inf"))
    assert all(map(torch.equal, model.parameters(), before))


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="given were 0 texts and learning rate 0.1"):
        kv_sgd(tiny_model("gpt2"), tokenizer, [], 0.1)
    with pytest.raises(ValueError, match="learning rate -1"):
        kv_sgd(tiny_model("gpt2"), tokenizer, TEXTS, -1)
    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9)
    bloom = transformers.BloomForCausalLM(config)
    with pytest.raises(ValueError, match="no key and .* found in BloomForCausalLM"):
        kv_sgd(bloom, tokenizer, TEXTS, 1)
