"""K/V-only SGD against PyTorch's own optimizer with frozen parts, all families."""

import copy

import pytest
import torch
import transformers
from conftest import SMALL, TINY, tiny_model

from icl.activations import capture_qkv, capture_queries
from icl.finetuning import (
    applied_update,
    heads_on_frozen_inputs,
    kv_projections,
    kv_sgd,
)

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
    with applied_update(model, update):
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
    with pytest.raises(KeyError), applied_update(model, update):
        raise KeyError
    assert all(map(torch.equal, model.parameters(), before))


def test_ascent_is_descent_with_the_sign_turned(tokenizer):
    model = tiny_model("llama")
    down, _ = kv_sgd(model, tokenizer, TEXTS[:1], 0.05)
    up, _ = kv_sgd(model, tokenizer, TEXTS[:1], -0.05)
    for name, change in down.items():
        torch.testing.assert_close(up[name], -change, atol=1e-6, rtol=1e-4)


def test_parts_alone_are_trained(model, tokenizer):
    """The first layer's projections and, whole, another parameter: autograd's step."""
    before = {n: p.clone() for n, p in model.named_parameters()}
    projections = kv_projections(model)
    first = next(iter(projections))
    other = next(n for n in before if "norm" in n or "ln_" in n)
    parts = {first: projections[first], other: lambda t: t}
    update, losses = kv_sgd(model, tokenizer, TEXTS[:1], 0.05, parts=parts)
    ids = tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt").input_ids
    weights = [model.get_parameter(n).requires_grad_(True) for n in parts]
    loss = model(ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, weights)
    model.requires_grad_(False)
    assert losses == [pytest.approx(loss.item(), abs=1e-5)]
    assert list(update) == [first, other]
    for (name, part), gradient in zip(parts.items(), gradients, strict=True):
        want = -0.05 * part(gradient)
        torch.testing.assert_close(update[name], want, atol=1e-6, rtol=1e-4)
        assert want.abs().max() > 1e-4
    with applied_update(model, update):
        for name, parameter in model.named_parameters():
            part = parts.get(name)
            want = before[name].clone()
            if part:
                part(want).add_(update[name])
            assert torch.equal(parameter, want), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_layer_causal_descent(family, tokenizer):
    """Each block against a model that is cut off right behind that block."""
    whole = tiny_model(family)
    update, losses = kv_sgd(whole, tokenizer, TEXTS[:1], 0.05, layer_causal=True)
    ids = tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt")
    ids, total = ids["input_ids"], 0.0
    for depth in range(1, 4):
        cut = tiny_model(family)
        inner = {"gpt2": "transformer", "llama": "model", "opt": "model.decoder"}
        stack = cut.get_submodule(inner[family])
        name = "h" if family == "gpt2" else "layers"
        setattr(stack, name, getattr(stack, name)[:depth])
        if family == "gpt2":
            cut.config.n_layer = depth
        else:
            cut.config.num_hidden_layers = depth
        own = {
            n: cut.get_parameter(n).requires_grad_(True)
            for n in update
            if f".{depth - 1}." in n
        }
        assert own
        logits = cut(ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        total += loss.item()
        gradients = torch.autograd.grad(loss, list(own.values()))
        for name, gradient in zip(own, gradients, strict=True):
            part = kv_projections(whole)[name](gradient)
            torch.testing.assert_close(update[name], -0.05 * part, atol=1e-6, rtol=1e-4)
    assert losses[0] == pytest.approx(total, abs=1e-4)


def test_blocks_of_one_step_do_not_meet(model, tokenizer):
    """In all families: the first block's update ignores what comes after it."""
    update, _ = kv_sgd(model, tokenizer, TEXTS[:1], 0.05, layer_causal=True)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if ".2." in name:
                parameter.mul_(2)
    again, _ = kv_sgd(changed, tokenizer, TEXTS[:1], 0.05, layer_causal=True)
    whole, _ = kv_sgd(changed, tokenizer, TEXTS[:1], 0.05)
    for name, change in update.items():
        if ".0." in name or ".1." in name:
            torch.testing.assert_close(again[name], change, atol=0, rtol=0)
            if (
                change.dim() > 1
            ):  # key biases have no gradient: softmax is blind to them
                assert not torch.allclose(whole[name], change, atol=1e-5)


def test_heads_on_frozen_inputs(model, tokenizer):
    """Layer l reads what it reads when no layer below has been updated."""
    update, _ = kv_sgd(model, tokenizer, TEXTS, 0.5)
    ids = [0, 5, 7, 9]
    frozen = heads_on_frozen_inputs(model, update, ids, start=3)
    before = capture_qkv(model, ids, start=3)
    for layer in range(3):
        alone = {n: w for n, w in update.items() if f".{layer}." in n}
        with applied_update(model, alone):
            want = capture_qkv(model, ids, start=3)[layer]
        for part, other in zip(frozen[layer], want, strict=True):
            torch.testing.assert_close(part, other, atol=1e-6, rtol=1e-6)
        assert (frozen[layer].value - before[layer].value).abs().max() > 0.01


def test_queries_of_training_tokens_at_their_own_step(tokenizer):
    model = tiny_model("llama")
    with capture_queries(model) as queries:
        kv_sgd(model, tokenizer, TEXTS, 0.05)
    assert len(queries) == 3 * len(TEXTS)
    for step, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        before = kv_sgd(model, tokenizer, TEXTS[:step], 0.05)[0] if step else {}
        with applied_update(model, before):
            want = capture_qkv(model, ids)
        for layer in range(3):
            torch.testing.assert_close(
                queries[3 * step + layer], want[layer].query, atol=1e-5, rtol=1e-4
            )


def test_divergence_is_named_and_undone(tokenizer):
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 2 .* inf"):
        kv_sgd(model, tokenizer, TEXTS, float("inf"))
    assert all(map(torch.equal, model.parameters(), before))


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


#: Every family with both types and both ways, as pairs.
HALVES = [
    (family, dtype, (n + m) % 2 == 1)
    for n, family in enumerate(TINY)
    for m, dtype in enumerate((torch.bfloat16, torch.float16))
]


@pytest.mark.parametrize(("family", "dtype", "layer_causal"), HALVES)
def test_half_precision_is_trained_in_float32(family, dtype, layer_causal, tokenizer):
    """At a rate at which steps on the weights themselves would be rounded away."""
    half = tiny_model(family).to(dtype)
    before = {n: t.clone() for n, t in half.state_dict().items()}
    whole = copy.deepcopy(half).float()
    asked = tokenizer, iter(TEXTS), 1e-4, layer_causal
    want, losses = kv_sgd(whole, tokenizer, TEXTS, 1e-4, layer_causal)
    update, found = kv_sgd(half, *asked)
    assert found == pytest.approx(losses, abs=1e-5)
    assert all(part.dtype == torch.float32 for part in update.values())
    cosine = torch.cosine_similarity(*map(flat, (want.values(), update.values())), 0)
    assert cosine > 0.9999
    ids = torch.tensor([[0, 5, 7, 9]])
    with applied_update(half, update), applied_update(whole, want):
        assert half.dtype == torch.float32
        logits = whole(ids).logits
        torch.testing.assert_close(half(ids).logits, logits, atol=1e-5, rtol=1e-5)
        assert not torch.equal(logits, tiny_model(family)(ids).logits)
    frozen = heads_on_frozen_inputs(half, update, ids[0])
    frozen_whole = heads_on_frozen_inputs(whole, want, ids[0])
    for one, two in zip(frozen, frozen_whole, strict=True):
        torch.testing.assert_close(one.value, two.value, atol=1e-5, rtol=1e-4)
    assert half.dtype == dtype
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(KeyError), applied_update(half, update):
        raise KeyError
    assert half.dtype == dtype


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ([], "text"),
        ("good film", "text"),
        ([TEXTS[0], None], "text 1"),
        ([TEXTS[0], ""], "text 1"),
        ([TEXTS[0], "good"], "text 1 has 1 token"),
        ([TEXTS[0], "good " * 257], r"text 1 .* 257 .* 256"),
    ],
)
def test_texts_that_are_refused(texts, named, tokenizer):
    with pytest.raises(ValueError, match=named):
        kv_sgd(tiny_model("opt"), tokenizer, texts, 0.1)


@pytest.mark.parametrize("family", TINY)
def test_a_text_of_the_context(family, tokenizer):
    _, losses = kv_sgd(tiny_model(family), tokenizer, ["good " * 256], 0.1)
    assert losses[0] > 0


def test_bad_input(tokenizer):
    model = tiny_model("opt")
    for rate in (0, float("nan")):
        with pytest.raises(ValueError, match=f"learning rate .*{rate}"):
            kv_sgd(model, tokenizer, TEXTS, rate)


@pytest.mark.parametrize("family", ["bloom", "phi3", "codegen", "gpt_bigcode"])
def test_fused_projections_that_no_rule_splits(family, tokenizer):
    """Of these, names alone would take queries for keys and values."""
    sizes = dict(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    sizes |= dict(intermediate_size=32, rotary_dim=4, pad_token_id=0)
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=type(model).__name__):
        kv_sgd(model, tokenizer, TEXTS, 1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_model_that_is_being_trained_stays_so(family, tokenizer):
    model = tiny_model(family).requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    update, _ = kv_sgd(model, tokenizer, ["the film was good"], 0.1)
    with applied_update(model, update):
        pass
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
    with pytest.raises(ValueError, match="eval"):
        kv_sgd(model.train(), tokenizer, ["the film was good"], 0.1)


def test_layer_causal_finetuning_of_another_head_is_refused(tokenizer):
    model = tiny_model("granite", **SMALL, logits_scaling=4.0)
    kv_sgd(model, tokenizer, ["the film was good"], 0.1)
    with pytest.raises(ValueError, match="layer-causal"):
        kv_sgd(model, tokenizer, ["the film was good"], 0.1, layer_causal=True)
