"""Regularised, augmented and negative attention: by loops, and as gradient steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.attention import (
    augmented_attention,
    negative_attention,
    regularised_attention,
)
from icl.kernels import contrastive_loss, gram_features, initial_weight, normaliser


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def inputs(heads=2, kv_heads=2, tokens=9, width=4, batch=1, seed=0):
    shapes = [(batch, n, tokens, width) for n in (heads, kv_heads, kv_heads)]
    return [draw(*shape, seed=seed + n) for n, shape in enumerate(shapes)]


def warped(x):
    return 2 * torch.tanh(x) + 0.3 * x.square()


def pushed(left, key, value, beta, k, candidates):
    """Values of one head with their negatives, by loops.

    ``candidates(i)`` lists the tokens that i may be pushed away from.
    """
    found = value.clone()
    for i in range(len(key)):
        near = sorted(candidates(i), key=lambda j: (left[i] @ key[j]).item())[:k]
        for j in near:
            found[i] -= beta / len(near) * value[j]
    return found


def in_two_parts(q, k, v, own_k, own_v, seen=lambda t, i: i <= t):
    """One head; a token's own key and value stand in where it looks at itself."""
    out = torch.zeros(len(q), v.shape[-1], dtype=v.dtype)
    for t in range(len(q)):
        there = [i for i in range(t + 1) if seen(t, i)]
        keys = torch.stack([own_k[i] if i == t else k[i] for i in there])
        values = torch.stack([own_v[i] if i == t else v[i] for i in there])
        out[t] = (keys @ q[t] / math.sqrt(q.shape[-1])).softmax(0) @ values
    return out


def by_heads(function, q, k, v):
    """Apply ``function(q, k, v)`` to every head of every sequence."""
    groups = q.shape[1] // k.shape[1]
    rows = [
        [
            function(q[b, h], k[b, h // groups], v[b, h // groups])
            for h in range(q.shape[1])
        ]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(row) for row in rows])


@settings(deadline=None, max_examples=25)
@given(
    alpha=st.floats(-1, 1),
    tokens=st.integers(1, 9),
    groups=st.sampled_from([(1, 1), (4, 2)]),
)
def test_regularised_attention_by_loops(alpha, tokens, groups):
    q, k, v = inputs(*groups, tokens=tokens)
    expected = by_heads(
        lambda q, k, v: in_two_parts(q, k, v, k, (1 - alpha) * v), q, k, v
    )
    torch.testing.assert_close(regularised_attention(q, k, v, alpha), expected)


@pytest.mark.parametrize("tokens", [9, 300])  # the second is more than a block
def test_augmented_attention_by_loops(tokens):
    q, k, v = inputs(4, 2, tokens)
    expected = by_heads(
        lambda q, k, v: in_two_parts(q, warped(k), warped(v), k, v), q, k, v
    )
    torch.testing.assert_close(augmented_attention(q, k, v, warped, warped), expected)


@settings(deadline=None, max_examples=25)
@given(
    beta=st.floats(-2, 2),
    k_negatives=st.integers(1, 7),
    groups=st.sampled_from([(1, 1), (4, 2)]),
    by=st.sampled_from(["keys", "scores"]),
)
def test_negative_attention_by_loops(beta, k_negatives, groups, by):
    q, k, v = inputs(*groups)

    def head(q, k, v):
        left = k if by == "keys" else q
        values = pushed(left, k, v, beta, k_negatives, range)
        return in_two_parts(q, k, values, k, v)

    found = negative_attention(q, k, v, beta, k_negatives, by=by)
    torch.testing.assert_close(found, by_heads(head, q, k, v))


def test_masks_say_who_is_seen():
    q, k, v = inputs()
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 1, 2, 2])  # a prefix, then two texts
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask &= (owner == 0) | (owner[:, None] == owner)

    def seen(t, i):
        return mask[t, i].item()

    def before(i):
        return [j for j in range(i) if mask[i, j]]

    def shrunk(q, k, v):
        return in_two_parts(q, k, v, k, 0.4 * v, seen)

    def negative(q, k, v):
        return in_two_parts(q, k, pushed(k, k, v, 0.7, 2, before), k, v, seen)

    hidden = torch.finfo(torch.float64).min
    additive = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~mask, hidden)
    for given_ in (mask, additive):
        found = regularised_attention(q, k, v, 0.6, mask=given_[None, None])
        torch.testing.assert_close(found, by_heads(shrunk, q, k, v))
        found = negative_attention(q, k, v, 0.7, 2, mask=given_[None, None])
        torch.testing.assert_close(found, by_heads(negative, q, k, v))


@pytest.mark.parametrize("new", [1, 4])
def test_the_last_tokens_alone(new):
    q, k, v = inputs(4, 2)
    for attend in (
        lambda q: regularised_attention(q, k, v, 0.3),
        lambda q: augmented_attention(q, k, v, warped, warped),
        lambda q: negative_attention(q, k, v, 0.7, 3),
    ):
        torch.testing.assert_close(attend(q[:, :, -new:]), attend(q)[:, :, -new:])


# --- one step on the loss ------------------------------------------------------------

N, REST, WIDTH, ETA = 7, 3, 4, 0.3


def stepped(loss, W_0):
    """One gradient step of size ETA, by autograd."""
    W = W_0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(W), W)
    return W_0 - ETA * gradient


@pytest.fixture
def episode():
    """Seven demonstrations, three tokens of the query part, and a query."""
    q, k, v = draw(WIDTH), draw(N + REST, WIDTH, seed=1), draw(N + REST, WIDTH, seed=2)
    shown = torch.arange(N + REST) < N
    return q, k, v, shown, (q[None, None, None], k[None, None], v[None, None])


def features(keys, q):
    """Exact features of the keys and of the query, and attention's normaliser."""
    phi = gram_features(torch.cat([keys, q[None]]) / WIDTH**0.25)
    return phi[:-1], phi[-1], normaliser(phi[:-1], phi[-1])


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0])
def test_regularised_attention_is_a_step_with_weight_decay(episode, alpha):
    q, k, v, shown, given_ = episode
    phi, phi_q, D = features(k, q)

    def loss(W):
        decay = alpha / (2 * ETA) * W.square().sum()
        return contrastive_loss(W, v[:N], phi[:N], D, ETA) + decay

    W_1 = stepped(loss, initial_weight(v[N:], phi[N:], D))
    found = regularised_attention(*given_, alpha, shown)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


def test_augmented_attention_is_a_step_on_augmented_pairs(episode):
    q, k, v, shown, given_ = episode
    keys = torch.cat([warped(k[:N]), k[N:]])
    phi, phi_q, D = features(keys, q)
    W_1 = stepped(
        lambda W: contrastive_loss(W, warped(v[:N]), phi[:N], D, ETA),
        initial_weight(v[N:], phi[N:], D),
    )
    found = augmented_attention(*given_, warped, warped, shown)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k_negatives", [1, 3, 6])
def test_negative_attention_is_a_step_on_pairs_and_negatives(episode, k_negatives):
    q, k, v, shown, given_ = episode
    phi, phi_q, D = features(k, q)
    beta = 0.8

    def loss(W):
        total = torch.zeros((), dtype=W.dtype)
        for i in range(N):
            drawn = v[i] @ W @ phi[i]
            others = sorted({*range(N)} - {i}, key=lambda j: (k[i] @ k[j]).item())
            for j in others[:k_negatives]:
                drawn = drawn - beta / k_negatives * (v[j] @ W @ phi[i])
            total = total - drawn / (ETA * D)
        return total

    W_1 = stepped(loss, initial_weight(v[N:], phi[N:], D))
    found = negative_attention(*given_, beta, k_negatives, shown)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


# --- gradients, and what is refused ---------------------------------------------------


@pytest.mark.parametrize("tokens", [6, 150])
def test_gradients(tokens):
    given_ = [x.requires_grad_() for x in inputs(2, 1, tokens, width=2)]
    check = torch.autograd.gradcheck
    options = dict(fast_mode=tokens > 10)
    assert check(lambda q, k, v: regularised_attention(q, k, v, 0.4), given_, **options)
    assert check(
        lambda q, k, v: augmented_attention(q, k, v, warped, warped), given_, **options
    )
    assert check(lambda q, k, v: negative_attention(q, k, v, 0.4, 3), given_, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: regularised_attention(q, k, v, math.nan), "alpha must be fin"),
        (lambda q, k, v: negative_attention(q, k, v, math.inf, 2), "beta must be fini"),
        (
            lambda q, k, v: negative_attention(q, k, v, 1.0, 9),
            "k must be 1 to 8, the o",
        ),
        (lambda q, k, v: negative_attention(q, k, v, 1.0, 0), "k must be 1 to 8"),
        (
            lambda q, k, v: negative_attention(q, k, v, 1.0, 2, torch.arange(9) < 2),
            "k must be 1 to 1",
        ),
        (
            lambda q, k, v: negative_attention(q, k, v, 1.0, 2, by="values"),
            "'keys' or 'scores', not 'values'",
        ),
        (
            lambda q, k, v: negative_attention(q[:, :, 1:], k, v, 1.0, 2, by="scores"),
            "needs the queries of all tokens",
        ),
        (
            lambda q, k, v: regularised_attention(q, k, v, 0.1, torch.zeros(9).bool()),
            "marks no token",
        ),
        (
            lambda q, k, v: regularised_attention(q, k, v, 0.1, torch.ones(9)),
            r"must be booleans \(9,\) or \(1, 9\), not torch.float32",
        ),
        (
            lambda q, k, v: augmented_attention(q, k, v, warped, lambda x: x[..., :2]),
            r"of_key must keep the shape \(1, 2, 9, 4\), but returned \(1, 2, 9, 2\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*inputs())
