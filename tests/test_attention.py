"""Momentum attention, heavy ball and convolution, against loops written here."""

import math

import pytest
import torch
from conftest import TINY, assert_same_token_by_token, padded_left, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from icl.attention import (
    convolution_attention,
    equip,
    heavy_ball_attention,
    layerwise_momentum,
    momentum_attention,
    rates,
)
from icl.scoring import score

THROUGH_INTERFACE = [family for family in TINY if family != "xglm"]


def draw(heads=4, kv_heads=2, tokens=9, width=5, batch=2, seed=0, new=None):
    """Query, key and value in float64; the queries are those of the last ``new``."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, new or tokens), (kv_heads, tokens), (kv_heads, tokens)]
    return [
        torch.randn(batch, *shape, width, generator=g, dtype=torch.float64)
        for shape in shapes
    ]


def by_hand(query, key, value, weight, gain=lambda s: 1.0, mask=None, softmax=True):
    """``Σ_i g(s) e^{q·k_i} v_i / Σ_i g(s) e^{q·k_i} + Σ_{s>0} w(s) v_i``, by loops.

    s counts the seen tokens between token i and the query's own, its own included.
    """
    batch, heads, new, width = query.shape
    kv_heads, length = key.shape[1:3]
    out = torch.zeros(batch, heads, new, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            for t in range(new):
                own = length - new + t
                seen = [
                    i
                    for i in range(own + 1)
                    if mask is None or mask[b % len(mask), t, i]
                ]
                total = 0.0
                for s, i in enumerate(reversed(seen)):
                    e = gain(s) * math.exp(query[b, h, t] @ key[b, kv, i] / width**0.5)
                    total += e
                    out[b, h, t] += e * value[b, kv, i]
                out[b, h, t] = out[b, h, t] / total if seen and softmax else 0
                for s, i in enumerate(reversed(seen)):
                    if s:
                        out[b, h, t] += weight(s, h) * value[b, kv, i]
    return out


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 70),
    new=st.integers(1, 70),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    eta=st.floats(0.01, 0.999),
    normalise=st.booleans(),
    softmax=st.booleans(),
)
def test_momentum_attention_is_its_definition(
    tokens, new, groups, eta, normalise, softmax
):
    q, k, v = draw(*groups, tokens, width=3, batch=1, new=min(new, tokens))
    found = momentum_attention(q, k, v, eta, normalise=normalise, softmax=softmax)
    scale = 1 - eta if normalise else 1
    expected = by_hand(q, k, v, lambda s, h: scale * eta**s, softmax=softmax)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("new", [70, 5, 1])
def test_every_head_has_its_own_rate(new):
    q, k, v = draw(tokens=70, new=new)
    eta = torch.tensor([0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    expected = by_hand(q, k, v, lambda s, h: eta[h].item() ** s)
    found = momentum_attention(q, k, v, eta)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_two_tokens_by_hand():
    zero = torch.zeros(1, 1, 3, 1)
    value = torch.tensor([8.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    got = momentum_attention(zero, zero, value, 0.5).flatten()
    # means of what is seen: 8, 5, 14/3; sums: 0, 8/2, 8/4 + 2/2
    torch.testing.assert_close(got, torch.tensor([8.0, 9.0, 14 / 3 + 3]))


@pytest.mark.parametrize("eta", [0.5, 0.99, 0.9999, 1 - 1e-7])
def test_long_sums_are_stable(eta):
    tokens = 5000
    value = torch.randn(1, 1, tokens, 2, dtype=torch.float64) + 1
    exact, state = torch.zeros_like(value), torch.zeros(2, dtype=torch.float64)
    for t in range(tokens):
        exact[0, 0, t] = state
        state = eta * (state + value[0, 0, t])
    zero = torch.zeros(1, 1, tokens, 2)
    for dtype, allowed in [(torch.float64, 1e-11), (torch.float32, 2e-6)]:
        like = [zero.to(dtype), zero.to(dtype), value.to(dtype)]
        found = momentum_attention(*like, eta, softmax=False)
        assert (found - exact).abs().max() < allowed * exact.abs().max()
    rounded = value.bfloat16()
    half = momentum_attention(*[zero.bfloat16()] * 2, rounded, eta, softmax=False)
    whole = momentum_attention(zero, zero, rounded.float(), eta, softmax=False)
    torch.testing.assert_close(half, whole.bfloat16())  # rounded once, at the end


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_of_momentum(tokens, per_head):
    inputs = draw(2, 1, tokens, width=2, batch=1)
    eta = torch.tensor([0.6, 0.9] if per_head else 0.7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in [*inputs, eta]]
    assert torch.autograd.gradcheck(momentum_attention, inputs, fast_mode=True)


def test_gradients_of_the_others():
    q, k, v = (x.requires_grad_() for x in draw(2, 1, 6, width=2, batch=1))
    mu = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(heavy_ball_attention, (q, k, v, mu))
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(convolution_attention, (q, k, v, weights))


@pytest.mark.parametrize("new", [9, 3, 1])
def test_heavy_ball_repeats_its_steps(new):
    q, k, v = draw(new=new)
    mu, tokens = 0.8, 9
    step, memory = torch.zeros(tokens), torch.zeros(tokens)
    for t in range(tokens):  # one coordinate a token: how often its step was taken
        step = mu * step
        step[t] += 1
        memory = memory + step
    assert memory[0] / memory[-1] == pytest.approx((1 - mu**9) / (1 - mu))
    expected = by_hand(q, k, v, lambda s, h: 0.0, lambda s: memory[-1 - s].item())
    torch.testing.assert_close(
        heavy_ball_attention(q, k, v, mu), expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("new", [9, 3, 1])
@pytest.mark.parametrize("reach", [1, 3, 12])
def test_convolution_is_its_definition(new, reach):
    q, k, v = draw(new=new)
    weights = torch.randn(4, reach, dtype=torch.float64)

    def weight(s, h):
        return weights[h, s - 1].item() if s <= reach else 0.0

    found = convolution_attention(q, k, v, weights)
    torch.testing.assert_close(found, by_hand(q, k, v, weight))
    mask = torch.ones(1, 1, new, 9, dtype=torch.bool).tril(9 - new)
    torch.testing.assert_close(found, convolution_attention(q, k, v, weights, mask))


def masks():
    """Causal masks in which rows see different things."""
    left = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    left[1, :, :4] = False
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 1, 2, 2])  # 0: a prefix, then two texts
    packed = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    packed &= (owner == 0) | (owner[:, None] == owner)
    window = torch.ones(1, 9, 9, dtype=torch.bool).tril().triu(-3)
    return {"left": left, "packed": packed, "window": window}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("additive", [False, True])
def test_distances_follow_what_a_query_sees(name, additive):
    q, k, v = draw()
    mask = masks()[name]
    given_ = mask[:, None]
    if additive:
        given_ = torch.zeros(given_.shape, dtype=torch.float64)
        given_ = given_.masked_fill(~mask[:, None], torch.finfo(torch.float64).min)
    sees = mask.any(-1).expand(2, -1)  # rows of padding are nobody's
    eta = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    found = momentum_attention(q, k, v, eta, given_).transpose(1, 2)
    expected = by_hand(q, k, v, lambda s, h: eta[h].item() ** s, mask=mask)
    torch.testing.assert_close(found[sees], expected.transpose(1, 2)[sees])
    found = heavy_ball_attention(q, k, v, 0.8, given_).transpose(1, 2)
    expected = by_hand(q, k, v, lambda s, h: 0.0, lambda s: 1 - 0.8 ** (s + 1), mask)
    torch.testing.assert_close(found[sees], expected.transpose(1, 2)[sees])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eta=1.0), r"eta must lie in \(0, 1\), not \[1.0\]"),
        (dict(eta=-0.1), r"eta must lie in \(0, 1\)"),
        (dict(eta=float("nan")), r"eta must lie in \(0, 1\)"),
        (dict(eta=torch.tensor([0.1, 0.2])), "one a head, 4, not 2"),
        (dict(key=torch.zeros(2, 3, 9, 5)), "do not fit"),
        (dict(mask=torch.ones(1, 1, 9, 9, dtype=bool)), "not causal, or pads on the"),
        (dict(mask=torch.ones(1, 4, 9, 9, dtype=bool).tril()), "the same for all"),
    ],
)
def test_bad_input_is_refused(change, message):
    q, k, v = draw()
    with pytest.raises(ValueError, match=message):
        momentum_attention(**(dict(query=q, key=k, value=v, eta=0.5) | change))


def test_padding_on_the_right_is_refused():
    q, k, v = draw()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, :, 6:] = False
    with pytest.raises(ValueError, match="pads on the right"):
        momentum_attention(q, k, v, 0.5, mask)


# --- in models ----------------------------------------------------------------------

CASES = [
    dict(kind="momentum", eta=0.7),
    dict(kind="momentum", eta=0.7, normalise=True, softmax=False),
    dict(kind="momentum", eta=0.7, learned=True),
    dict(kind="heavy_ball", mu=0.7),
    dict(kind="convolution", eta=0.7, reach=3, learned=True),
]
IDS = torch.tensor([[3, 7, 5, 9, 4, 11, 6, 8, 5, 3, 12, 7]])


def equipped(family, learned_apart=True, **case):
    model = equip(tiny_model(family), **case)
    for n, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("momentum"):  # another one for every head
            with torch.no_grad():
                parameter += (
                    0.3 * torch.arange(parameter.numel()).view_as(parameter) + n
                )
    return model


@pytest.mark.parametrize("family", THROUGH_INTERFACE)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_token_by_token_is_the_whole_pass(family, case):
    model = equipped(family, **case)
    whole = model(IDS).logits
    plain = tiny_model(family)(IDS).logits
    assert (whole - plain).abs().max() > 1e-2  # the attention was replaced
    assert_same_token_by_token(model, IDS, whole)
    padded, mask = padded_left(IDS, 5)
    longer = dict(max_new_tokens=6, do_sample=False, pad_token_id=1)
    alone = model.generate(IDS, attention_mask=torch.ones_like(IDS), **longer)
    ahead = model.generate(padded, attention_mask=mask, **longer)
    assert ahead[0, 5:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("family", THROUGH_INTERFACE)
def test_with_a_vanishing_rate_it_is_the_models_own_attention(family):
    own = tiny_model(family)(IDS).logits
    model = equip(tiny_model(family), "momentum", eta=1e-30)
    assert torch.equal(model(IDS).logits, own)


@pytest.mark.parametrize("family", THROUGH_INTERFACE)
def test_packed_scoring_is_scoring_one_by_one(family, tokenizer):
    model = equipped(family, kind="momentum", eta=0.7, learned=True)
    queries = ["Review : a bad film Sentiment :", "Review : good Sentiment :"]
    labels = ["Positive", "Negative", "Unclearly"]
    shown = "Review : the plot was dull . Sentiment : Negative "
    packed = score(model, tokenizer, queries, labels, shown)
    for query, row in zip(queries, packed, strict=True):
        for label, found in zip(labels, row, strict=True):
            ids = [
                tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in (shown, query, " " + label)
            ]
            text = torch.tensor([sum(ids, [])])
            log_p = model(text).logits[0].log_softmax(-1)
            tail = ids[2]
            steps = range(text.shape[1] - len(tail) - 1, text.shape[1] - 1)
            exact = [log_p[s, t].item() for s, t in zip(steps, tail, strict=True)]
            assert found == pytest.approx(sum(exact) / len(exact), abs=1e-4)


def test_a_saved_model_comes_back(tmp_path):
    model = equip(tiny_model("llama"), "momentum", eta=0.6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="icl_momentum"
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    plain = tiny_model("llama")
    plain.set_attn_implementation("icl_momentum")
    with pytest.raises(ValueError, match="has not been told its numbers"):
        plain(IDS)


def test_learned_rates_are_learned_and_not_lost(tmp_path):
    model = equip(tiny_model("gpt2"), "momentum", eta=0.25, learned=True)
    torch.testing.assert_close(rates(model), torch.full((3, 4), 0.25).double())
    model(IDS, labels=IDS).loss.backward()
    for block in model.transformer.h:
        assert block.attn.momentum.grad.abs().min() > 0
    with torch.no_grad():
        model.transformer.h[1].attn.momentum[2] = 0.0
    assert rates(model)[1, 2] == 0.5
    state = model.state_dict()
    other = tiny_model("gpt2")
    other.config.icl_attention = model.config.icl_attention
    other.set_attn_implementation("icl_momentum")
    with pytest.raises(ValueError, match="not loaded"):
        other(IDS)
    other = equip(tiny_model("gpt2"), "momentum", eta=0.25, learned=True)
    other.load_state_dict(state)
    assert torch.equal(rates(other), rates(model))


def test_fixed_rates_are_told():
    model = equip(tiny_model("gpt2"), "convolution", eta=0.5, reach=2)
    expected = torch.tensor([0.5, 0.25]).double().expand(3, 4, 2)
    torch.testing.assert_close(rates(model), expected)


def test_layerwise_momentum_looks_ahead():
    model = tiny_model("llama")
    own = model(IDS).logits
    hooks = layerwise_momentum(model, 0.4)
    found = model(IDS).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(IDS).logits, own)
    body = model.model
    before, x = None, body.embed_tokens(IDS)
    place = torch.arange(IDS.shape[1])[None]
    turn = body.rotary_emb(x, place)
    for layer in body.layers:
        start = x if before is None else x + 0.4 * (x - before)
        before, x = x, layer(start, position_embeddings=turn, position_ids=place)
    torch.testing.assert_close(found, model.lm_head(body.norm(x)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nesterov", {}, "not one of momentum, heavy_ball, convolution"),
        ("momentum", {}, "momentum is told eta, normalise, softmax; given were none"),
        ("momentum", {"eta": 1.5}, r"eta must lie in \(0, 1\), not 1.5"),
        ("heavy_ball", {"eta": 0.5}, "heavy_ball is told mu; given were eta"),
        ("heavy_ball", {"mu": 0.5, "normalise": True}, "is told mu; given were mu, no"),
        ("heavy_ball", {"mu": 0.0}, r"mu must lie in \(0, 1\), not 0.0"),
        ("convolution", {"eta": 0.5}, "is told eta, reach; given were eta"),
        ("convolution", {"eta": 0.5, "reach": 0}, "reach is 1 token or more, not 0"),
    ],
)
def test_equip_says_what_is_wrong(kind, options, message):
    with pytest.raises(ValueError, match=message):
        equip(tiny_model("gpt2"), kind, **options)


def test_what_cannot_be_replaced_is_named():
    with pytest.raises(ValueError, match="XGLMForCausalLM cannot be replaced"):
        equip(tiny_model("xglm"), "momentum", eta=0.5)
    with pytest.raises(ValueError, match=r"mu must lie in \(0, 1\)"):
        layerwise_momentum(tiny_model("gpt2"), 1.0)


def test_what_was_learned_before_is_gone():
    model = equip(tiny_model("gpt2"), "convolution", eta=0.5, reach=2, learned=True)
    equip(model, "momentum", eta=0.3)
    assert not [name for name in model.state_dict() if name.endswith("momentum")]
    assert (rates(model) == 0.3).all()
