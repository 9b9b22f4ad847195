"""Softmax attention is one gradient step of a kernel model; its streaming form."""

import math
from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.kernels import (
    balance,
    contrastive_loss,
    gram_features,
    initial_weight,
    normaliser,
    streaming_attention,
)

F32, F64 = torch.float32, torch.float64
SEEDS = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def vectors(g, *size, norm=None, dtype=F64):
    x = torch.randn(size, generator=g, dtype=F64)
    if norm is not None:
        x = norm * x / x.norm(dim=-1, keepdim=True)
    return x.to(dtype)


def log_features(x, W):
    """Logarithms of positive random features, but for their number."""
    return x @ W.mT - x.square().sum(-1, keepdim=True) / 2


def softmax_attention(q, k, v):
    """NumPy, one query: shifted by the largest score."""
    q, k, v = (t.detach().double().numpy() for t in (q, k, v))
    scores = k @ q
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


def one_step(loss, W_0, eta):
    """A step of PyTorch's own optimizer."""
    W = torch.nn.Parameter(W_0.clone())
    sgd = torch.optim.SGD([W], lr=eta)
    loss(W).backward()
    sgd.step()
    return W.detach()


def dual_step(phi_D, v_D, phi_T, v_T, phi_q, eta):
    """The dual model's weight and prediction after one step."""
    D = normaliser(torch.cat([phi_D, phi_T]), phi_q)
    W_0 = initial_weight(v_T, phi_T, D)
    W_1 = one_step(lambda W: contrastive_loss(W, v_D, phi_D, D, eta), W_0, eta)
    return W_1, W_1 @ phi_q


# -- the theorem --------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    seed=SEEDS,
    N=st.integers(1, 16),
    own=st.integers(0, 4),
    d=st.integers(1, 9),
    d_o=st.integers(1, 5),
    norm=st.sampled_from([1e-6, 0.5, 1.0, 2.0, 3.0]),
    eta=st.floats(1e-4, 1e4),
    dtype=st.sampled_from([F32, F64]),
)
def test_one_step_is_softmax_attention(seed, N, own, d, d_o, norm, eta, dtype):
    g = generator(seed)
    z = vectors(g, N + own + 1, d, norm=norm, dtype=dtype)
    v = vectors(g, N + own, d_o, dtype=dtype)
    phi = gram_features(z)
    _, got = dual_step(phi[:N], v[:N], phi[N:-1], v[N:], phi[-1], eta)
    want = softmax_attention(z[-1], z[:-1], v)
    # e^{|q|²/2 + |k|²/2} against the smallest D, N e^{-|q||k|}: features cancel
    unit = torch.finfo(dtype).eps * math.exp(2 * norm**2) * (N + own + 1)
    np.testing.assert_allclose(got, want, atol=max(20 * unit, 1e-10), rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    seed=SEEDS,
    N=st.integers(1, 12),
    own=st.integers(0, 3),
    d_r=st.integers(1, 40),
    eta=st.floats(1e-3, 1e3),
)
def test_one_step_is_kernel_attention_for_any_features(seed, N, own, d_r, eta):
    g = generator(seed)
    z, v = vectors(g, N + own + 1, 5), vectors(g, N + own, 3)
    W = vectors(g, d_r, 5)
    phi = log_features(z, W).exp()
    _, got = dual_step(phi[:N], v[:N], phi[N:-1], v[N:], phi[-1], eta)
    weights = [float(f @ phi[-1]) for f in phi[:-1]]
    want = sum(w * row.numpy() for w, row in zip(weights, v, strict=True))
    np.testing.assert_allclose(got, want / sum(weights), atol=1e-11, rtol=1e-10)


# -- what the theorem entails -------------------------------------------------


def dual_problem(seed, N=7, own=2, d=4, d_o=3):
    g = generator(seed)
    phi = gram_features(vectors(g, N + own + 1, d))
    v = vectors(g, N + own, d_o)
    D = normaliser(phi[:-1], phi[-1])
    return phi[:N], v[:N], initial_weight(v[N:], phi[N:-1], D), D


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, eta=st.floats(1e-6, 1e6), other=st.floats(1e-6, 1e6))
def test_step_size_cancels(seed, eta, other):
    phi, v, W_0, D = dual_problem(seed)
    a, b = (
        one_step(lambda W, e=e: contrastive_loss(W, v, phi, D, e), W_0, e)
        for e in (eta, other)
    )
    torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, eta=st.floats(0.01, 100), t=st.floats(-50, 50))
def test_loss_is_linear_with_a_constant_gradient(seed, eta, t):
    phi, v, W_0, D = dual_problem(seed)
    direction = torch.zeros_like(W_0)
    for f, row in zip(phi, v, strict=True):
        direction += torch.outer(row, f)
    for W in (W_0, W_0 + t, torch.zeros_like(W_0)):
        W = W.requires_grad_(True)
        (gradient,) = torch.autograd.grad(contrastive_loss(W, v, phi, D, eta), W)
        torch.testing.assert_close(gradient, -direction / (eta * D))
    start, there = (
        contrastive_loss(W_0.detach() + s * direction, v, phi, D, eta) for s in (0, t)
    )
    fall = -t * direction.square().sum() / (eta * D)  # without bound as t grows
    torch.testing.assert_close(there - start, fall, atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, order=st.permutations(range(7)), taken=st.integers(0, 7))
def test_a_step_an_example_makes_partial_sums(seed, order, taken):
    phi, v, W_0, D = dual_problem(seed)
    W = W_0
    for i in order[:taken]:
        one = slice(i, i + 1)
        W = one_step(lambda W, s=one: contrastive_loss(W, v[s], phi[s], D, 1.0), W, 1.0)
    seen = list(order[:taken])
    torch.testing.assert_close(W, W_0 + v[seen].mT @ phi[seen] / D)


def test_two_queries_make_two_losses():
    g = generator(4)
    z, v = vectors(g, 9, 3), vectors(g, 7, 2)
    phi = gram_features(z)
    (W_a, _), (W_b, _) = (
        dual_step(phi[:7], v, phi[:0], v[:0], phi[q], 1.0) for q in (7, 8)
    )
    ratio = float((z[:7] @ z[8]).exp().sum() / (z[:7] @ z[7]).exp().sum())
    torch.testing.assert_close(W_a, W_b * ratio, atol=1e-10, rtol=1e-10)
    assert abs(ratio - 1) > 0.1


# -- feature maps -------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=SEEDS,
    n=st.integers(1, 20),
    d=st.integers(1, 8),
    norm=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 5.0]),
    copies=st.booleans(),
)
def test_gram_features(seed, n, d, norm, copies):
    z = vectors(generator(seed), n, d, norm=norm)
    if copies:  # the Gram matrix is then singular
        z = torch.cat([z, z])
    phi = gram_features(z).numpy()
    want = np.exp(z.numpy() @ z.numpy().T)
    assert np.abs(phi @ phi.T - want).max() <= 1e-13 * len(z) * math.exp(norm**2)


def test_gram_features_of_very_unequal_norms():
    z = vectors(generator(1), 12, 4)
    z[:6] *= 1e-5
    z[6:] *= 20 / z[6:].norm(dim=1, keepdim=True)
    phi = gram_features(z)
    small = (phi[:6] @ phi[:6].mT).numpy()  # beside entries of e^400
    np.testing.assert_allclose(
        small, np.exp(z[:6].numpy() @ z[:6].numpy().T), rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [F32, F64])
def test_gram_features_name_the_norm_that_overflows(dtype):
    largest = math.sqrt(2 * math.log(torch.finfo(dtype).max))
    z = torch.zeros(3, 2, dtype=dtype)
    z[1, 0] = 0.999 * largest
    assert gram_features(z).isfinite().all()
    z[1, 0] = 1.001 * largest
    with pytest.raises(ValueError, match=f"{z[1, 0]:.4g}"):
        gram_features(z)
    for bad in (math.nan, math.inf):
        z[1, 0] = bad
        with pytest.raises(ValueError, match=f"{bad}"):
            gram_features(z)


# -- shorter queries and keys --------------------------------------------------


def uneven(g, *size):
    """Vectors off the origin, longer along some directions than along others."""
    d = size[-1]
    return vectors(g, *size) @ vectors(g, d, d) + 3 * vectors(g, d)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, T=st.integers(2, 40), d=st.integers(1, 6))
def test_balanced_heads_attend_alike(seed, T, d):
    g = generator(seed)
    q, k = uneven(g, T, d), uneven(g, T, d)
    v = vectors(g, T, 3)
    balanced = balance(q, k)
    for i in range(T):
        got = softmax_attention(balanced[0][i], balanced[1], v)
        np.testing.assert_allclose(got, softmax_attention(q[i], k, v), atol=1e-8)


def test_balanced_heads_are_the_shortest():
    """None of many other shifts and matrices gives a smaller mean |q + k|²."""
    g = generator(3)
    q, k = uneven(g, 2, 500, 4), uneven(g, 2, 500, 4)
    q, k = balance(q, k)

    def size(q, k):  # over all pairs of a query and a key
        q, k = q.numpy(), k.numpy()
        return np.square(q[:, :, None] + k[:, None]).sum(-1).mean((1, 2))

    least = size(q, k)
    for scale in (0.05, 0.3):
        for _ in range(20):
            A = torch.eye(4, dtype=F64) + scale * vectors(g, 4, 4)
            shift = scale * vectors(g, 4)
            other = size(q @ A.mT, k @ torch.linalg.inv(A) + shift)
            assert (least < 1.001 * other).all()
    assert (least < 0.5 * size(2 * q, k / 2)).all()
    # where the derivatives vanish: opposite means, and equal second moments
    np.testing.assert_allclose(q.mean(1), -k.mean(1), atol=1e-10)
    for own in zip(q, k, strict=True):
        of_q, of_k = (torch.cov(x.mT) for x in own)
        assert (of_q - of_k).norm() < 0.01 * of_k.norm()


# -- streaming ----------------------------------------------------------------


def quadratic(q, k, v, W):
    """The causal formula term by term, by log-sum-exp in NumPy: one stream."""
    q, k, v, W = (t.detach().double().numpy() for t in (q, k, v, W))
    a = k @ W.T - np.square(k).sum(1, keepdims=True) / 2
    b = q @ W.T  # what depends on the query alone cancels
    out = []
    for t in range(len(q)):
        exponents = a[: t + 1] + b[t]
        terms = np.exp(exponents - exponents.max()).sum(1)
        out.append(terms @ v[: t + 1] / terms.sum())
    return np.array(out)


STREAMS = dict(
    seed=SEEDS,
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    T=st.integers(1, 40),
    chunk=st.integers(1, 50),
    d=st.integers(1, 8),
    d_r=st.integers(1, 30),
)


@settings(deadline=None, max_examples=80)
@given(
    **STREAMS,
    norm=st.sampled_from([1e-4, 1.0, 5.0, 50.0]),
    dtype=st.sampled_from([F32, F64]),
)
def test_streaming(seed, batch, T, chunk, d, d_r, norm, dtype):
    g = generator(seed)
    q, k = vectors(g, 2, *batch, T, d, norm=norm, dtype=dtype)
    v = vectors(g, *batch, T, 3, dtype=dtype)
    W = vectors(g, d_r, d)
    got = streaming_attention(q, k, v, W, chunk)
    assert got.dtype == dtype
    assert got.shape == v.shape
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v, got))
    tolerance = 1e-6 if dtype == F32 else 1e-11
    for q_1, k_1, v_1, got_1 in zip(*flat, strict=True):
        want = quadratic(q_1, k_1, v_1, W)
        np.testing.assert_allclose(got_1, want, atol=10 * tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=30)
@given(**STREAMS, norm=st.sampled_from([0.1, 1.0, 4.0]))
def test_gradients_of_streaming(seed, batch, T, chunk, d, d_r, norm):
    g = generator(seed)
    q, k = vectors(g, 2, *batch, T, d, norm=norm)
    v, up = vectors(g, 2, *batch, T, 3)
    W = vectors(g, d_r, d)
    inputs = [t.clone().requires_grad_(True) for t in (q, k, v)]
    streamed = streaming_attention(*inputs, W, chunk)
    got = torch.autograd.grad((streamed * up).sum(), inputs)
    phi_q, phi_k = (log_features(x, W) for x in inputs[:2])
    scores = (phi_q[..., :, None, :] + phi_k[..., None, :, :]).logsumexp(-1)
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
    output = scores.masked_fill(ahead, -math.inf).softmax(-1) @ inputs[2]
    want = torch.autograd.grad((output * up).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, T=st.integers(2, 40), t=st.integers(1, 39), chunk=st.integers(1, 40))
def test_streaming_is_causal(seed, T, t, chunk):
    g = generator(seed)
    q, k, v = vectors(g, 3, T, 4)
    W = vectors(g, 9, 4)
    before = streaming_attention(q, k, v, W, chunk=chunk)[:t]
    for x in (q, k, v):
        x[t:] = 3 * x[t:] + 1
    after = streaming_attention(q, k, v, W, chunk=chunk)[:t]
    torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)


def test_streaming_approaches_softmax():
    g = generator(2)
    q, k = vectors(g, 2, 60, 8, norm=0.8)
    v = vectors(g, 60, 3)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=1.0
    )[0]
    errors = []
    for d_r in (100, 20_000):
        W = vectors(g, d_r, 8)
        errors.append(float((streaming_attention(q, k, v, W) - want).abs().mean()))
    assert errors[1] < 0.006
    assert 7 < errors[0] / errors[1] < 28  # √200 is 14


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("order", [1, -1])
def test_streaming_with_keys_of_very_unequal_norms(chunk, order):
    g = generator(0)
    norms = torch.tensor([60.0, 0.1, 30.0, 5.0][::order] * 5, dtype=F64)[:, None]
    k = norms * vectors(g, 20, 6, norm=1.0)  # some first sums are e^-1800 of the last
    q, v = vectors(g, 2, 20, 6)
    W = vectors(g, 16, 6)
    got = streaming_attention(q, k, v, W, chunk=chunk)
    np.testing.assert_allclose(got, quadratic(q, k, v, W), atol=1e-10)


@pytest.mark.parametrize("bad", [1e160, math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_streaming_refuses_norms_beyond_the_range(which, bad):
    g = generator(0)
    W = vectors(g, 8, 2)
    for token in (0,) if bad == 1e160 and which else (0, 1, 3):
        inputs = vectors(g, 3, 4, 2)
        inputs[which][token, 0] = bad  # later keys may be so long that they vanish
        with pytest.raises(FloatingPointError):
            streaming_attention(*inputs, W, chunk=2)


def test_streaming_refuses_other_numbers_of_tokens():
    """Queries, keys and values that chunks of one size would cut alike."""
    q, k, v = vectors(generator(0), 3, 5, 4)
    W = torch.ones(3, 4, dtype=F64)
    for inputs in ((q, k[:4], v), (q, k, v[:4]), (q[:4], k, v), (q[:, :3], k, v)):
        with pytest.raises(ValueError, match="4"):
            unwrap(streaming_attention)(*inputs, W, chunk=2)


def test_the_dual_model_refuses():
    g = generator(0)
    k, v = vectors(g, 2, 5, 4)
    phi = log_features(k, vectors(g, 7, 4)).exp()
    W = v.mT @ phi
    with pytest.raises(ValueError, match="1"):  # would broadcast
        unwrap(contrastive_loss)(W, v[:1], phi, 1.0, 1.0)
    for eta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"{eta}"):
            contrastive_loss(W, v, phi, 1.0, eta)
    with pytest.raises(ValueError, match="D must be positive and finite, not -"):
        normaliser(phi, -phi[0])
    with pytest.raises(ValueError, match="inf"):
        normaliser(1e200 * phi, 1e200 * phi[0])
