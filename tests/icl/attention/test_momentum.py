"""Momentum, heavy ball and convolution, against loops written here."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.attention import ConvolutionAttention, HeavyBallAttention, MomentumAttention


def draw(heads=4, kv_heads=2, tokens=9, width=5, batch=2, seed=0, new=None):
    """Query, key and value in float64; the queries are those of the last ``new``."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, new or tokens), (kv_heads, tokens), (kv_heads, tokens)]
    return [
        torch.randn(batch, *shape, width, generator=g, dtype=torch.float64)
        for shape in shapes
    ]


def nothing(s, h):
    return torch.zeros(len(s), dtype=torch.float64)


def by_hand(query, key, value, weight=nothing, gain=None, mask=None, softmax=True):
    """``Σ_i g(s) e^{q·k_i} v_i / Σ_i g(s) e^{q·k_i} + Σ_{s>0} w(s) v_i``, row by row.

    s counts the seen tokens between token i and the query's own, its own included.
    """
    batch, heads, new, width = query.shape
    kv_heads, length = key.shape[1:3]
    out = torch.zeros(batch, heads, new, value.shape[-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        kv, own = h * kv_heads // heads, length - new + t
        seen = torch.arange(own + 1)
        if mask is not None:
            seen = seen[mask[b % len(mask), t, : own + 1]]
        s = torch.arange(len(seen)).flip(0).double()
        if softmax and len(seen):
            e = (key[b, kv, seen] @ query[b, h, t] / width**0.5).exp()
            e = e if gain is None else gain(s) * e
            out[b, h, t] = e @ value[b, kv, seen] / e.sum()
        out[b, h, t] += weight(s, h)[:-1] @ value[b, kv, seen[:-1]]
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
    attend = MomentumAttention(eta=eta, normalise=normalise, softmax=softmax)
    scale = 1 - eta if normalise else 1
    expected = by_hand(q, k, v, lambda s, h: scale * eta**s, softmax=softmax)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("new", [70, 5, 1])
def test_every_head_has_its_own_rate(new):
    q, k, v = draw(tokens=70, new=new)
    eta = torch.tensor([0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    expected = by_hand(q, k, v, lambda s, h: eta[h] ** s)
    found = MomentumAttention(eta=eta)(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_two_tokens_by_hand():
    zero = torch.zeros(1, 1, 3, 1)
    value = torch.tensor([8.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    got = MomentumAttention(eta=0.5)(zero, zero, value).flatten()
    # means of what is seen: 8, 5, 14/3; sums: 0, 8/2, 8/4 + 2/2
    torch.testing.assert_close(got, torch.tensor([8.0, 9.0, 14 / 3 + 3]))


@pytest.mark.parametrize("eta", [0.5, 0.9999, 1 - 1e-7])
def test_long_sums_are_stable(eta):
    tokens, attend = 5000, MomentumAttention(eta=eta, softmax=False)
    value = torch.randn(1, 1, tokens, 2, dtype=torch.float64) + 1
    exact, state = [], [0.0, 0.0]
    for pair in value[0, 0].tolist():
        exact.append(state)
        state = [eta * (a + b) for a, b in zip(state, pair, strict=True)]
    exact = torch.tensor(exact, dtype=torch.float64)
    zero = torch.zeros(1, 1, tokens, 2)
    for dtype, allowed in [(torch.float64, 1e-11), (torch.float32, 2e-6)]:
        found = attend(zero.to(dtype), zero.to(dtype), value.to(dtype))
        assert (found - exact).abs().max() < allowed * exact.abs().max()
    rounded = value.bfloat16()
    half = attend(zero.bfloat16(), zero.bfloat16(), rounded)
    whole = attend(zero, zero, rounded.float())
    torch.testing.assert_close(half, whole.bfloat16())  # rounded once, at the end


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_of_momentum(tokens, per_head):
    inputs = draw(2, 1, tokens, width=2, batch=1)
    eta = torch.tensor([0.6, 0.9] if per_head else 0.7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in [*inputs, eta]]

    def attend(q, k, v, eta):
        return MomentumAttention(eta=eta)(q, k, v)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def with_weights(weights, q, k, v, mask=None):
    """A convolution whose weights were learned."""
    groups = q.shape[1] // k.shape[1]
    module = SimpleNamespace(convolution_weights=weights, num_key_value_groups=groups)
    attend = ConvolutionAttention(eta=0.5, reach=weights.shape[1], learned=True)
    return attend.forward(q, k, v, mask, module=module)


def test_gradients_of_the_others():
    q, k, v = (x.requires_grad_() for x in draw(2, 1, 6, width=2, batch=1))
    mu = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    heavy_ball = lambda q, k, v, mu: HeavyBallAttention(mu=mu)(q, k, v)  # noqa: E731
    assert torch.autograd.gradcheck(heavy_ball, (q, k, v, mu), fast_mode=True)
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(with_weights, (weights, q, k, v), fast_mode=True)


@pytest.mark.parametrize("new", [9, 3, 1])
def test_heavy_ball_repeats_its_steps(new):
    q, k, v = draw(new=new)
    mu, tokens = 0.8, 9
    step, memory = torch.zeros(2, tokens, dtype=torch.float64)
    for t in range(tokens):  # one coordinate a token: how often its step was taken
        step = mu * step
        step[t] += 1
        memory = memory + step
    assert memory[0] / memory[-1] == pytest.approx((1 - mu**9) / (1 - mu))
    expected = by_hand(q, k, v, gain=lambda s: memory.flip(0)[s.int()])
    torch.testing.assert_close(HeavyBallAttention(mu=mu)(q, k, v), expected)


@pytest.mark.parametrize("new", [9, 3, 1])
@pytest.mark.parametrize("reach", [1, 3, 12])
def test_convolution_is_its_definition(new, reach):
    q, k, v = draw(new=new)

    def fixed(s, h):
        return torch.where(s <= reach, 0.7**s, 0.0)

    attend = ConvolutionAttention(eta=0.7, reach=reach)
    found = attend(q, k, v)
    torch.testing.assert_close(found, by_hand(q, k, v, fixed))
    mask = torch.ones(1, 1, new, 9, dtype=torch.bool).tril(9 - new)
    torch.testing.assert_close(found, attend(q, k, v, mask))
    weights = torch.randn(4, reach, dtype=torch.float64)

    def learned(s, h):
        return torch.where(s <= reach, weights[h, s.int().clamp(1, reach) - 1], 0.0)

    expected = by_hand(q, k, v, learned)
    for given_ in (mask, None) if new in (1, 9) else (mask,):
        torch.testing.assert_close(with_weights(weights, q, k, v, given_), expected)


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
    eta = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    for attend, reference in (
        (MomentumAttention(eta=eta), {"weight": lambda s, h: eta[h] ** s}),
        (HeavyBallAttention(mu=0.8), {"gain": lambda s: 1 - 0.8 ** (s + 1)}),
        (
            ConvolutionAttention(eta=0.6, reach=2),
            {"weight": lambda s, h: torch.where(s <= 2, 0.6**s, 0.0)},
        ),
    ):
        sees = mask.any(-1).expand(2, -1)  # rows of padding are nobody's
        found = attend(q, k, v, given_).transpose(1, 2)[sees]
        expected = by_hand(q, k, v, mask=mask, **reference).transpose(1, 2)[sees]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("eta", [1.0, -0.1, float("nan"), torch.tensor([0.1, 1.2])])
def test_rates_outside_of_their_range_are_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        MomentumAttention(eta=eta)
    with pytest.raises(ValueError, match="mu"):
        HeavyBallAttention(mu=eta)
    with pytest.raises(ValueError, match="eta"):
        ConvolutionAttention(eta=float(torch.as_tensor(eta).max()), reach=2)


@pytest.mark.parametrize("new", [9, 3, 1])
def test_rates_for_another_number_of_heads_are_refused(new):
    q, k, v = draw(new=new)
    with pytest.raises(RuntimeError):
        MomentumAttention(eta=torch.tensor([0.1, 0.2]))(q, k, v)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        dict(key=torch.zeros(2, 3, 9, 5), value=torch.zeros(2, 3, 9, 5)),
        dict(query=torch.zeros(2, 4, 10, 5)),
        dict(mask=torch.ones(1, 1, 9, 9, dtype=bool)),  # not causal
        dict(mask=torch.ones(1, 4, 9, 9, dtype=bool).tril()),  # one for each head
        dict(mask=torch.ones(1, 1, 9, 9, dtype=bool).tril() & (torch.arange(9) < 7)),
    ],
)
def test_what_does_not_fit_is_refused(change, softmax):
    q, k, v = (x.float() for x in draw())
    attend = MomentumAttention(eta=0.5, softmax=softmax)
    with pytest.raises(ValueError, match="not fit|causal"):
        attend(**(dict(query=q, key=k, value=v) | change))
