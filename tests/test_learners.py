"""Constructed learners equal the algorithms they are built to be, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl import learners, synthetic

F64 = torch.float64


def problem(seed, N, d, size=1.0, B=3):
    g = torch.Generator().manual_seed(seed)
    sizes = [(B, N, d), (B, N), (B, d), (d,)]
    X, y, x, w_0 = (torch.randn(s, generator=g, dtype=F64) for s in sizes)
    return size * X, y, size * x, w_0, g


def attention_layer(tokens, W_K, W_Q, W_V, project):
    """Linear self-attention token by token; the last one is not attended to."""
    new = tokens.copy()
    for j, query in enumerate(tokens):
        for key in tokens[:-1]:
            new[j] = new[j] + project @ W_V @ key * ((W_K @ key) @ (W_Q @ query))
    return new


def descend(X, y, x, eta, w):
    """The prediction after gradient descent on ½ mean squared error, by autograd."""
    w = w.clone().requires_grad_(True)
    for rate in eta:
        loss = 0.5 * (y - X @ w).square().mean()
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - rate * gradient).detach().requires_grad_(True)
    return (x @ w).item()


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 8),
    d=st.integers(1, 6),
    layers=st.integers(1, 4),
    size=st.sampled_from([0.01, 1.0]),
    start=st.booleans(),
)
def test_construction_is_gradient_descent(seed, N, d, layers, size, start):
    """One layer is one step; stacked layers are as many, from any w_0."""
    X, y, x, w_0, g = problem(seed, N, d, size)
    eta = 0.3 * torch.rand(layers, generator=g, dtype=F64)
    w_0 = w_0 if start else torch.zeros_like(w_0)
    model = learners.LinearTransformer(*learners.gd_weights(d, eta, w_0=w_0))
    got = (model(X, y, x) + x @ w_0).detach()
    want = [descend(*task, eta, w_0) for task in zip(X, y, x, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), N=st.integers(1, 6), d=st.integers(1, 4))
def test_ahn_form_holds_von_oswalds_layer(seed, N, d):
    """The layer written with W_K, W_Q, W_V and a projection, token by token."""
    X, y, x, w_0, _ = problem(seed, N, d)
    eta, w_0 = 0.7, w_0.numpy()
    W_K = np.diag([1.0] * d + [0.0])
    W_V = np.zeros((d + 1, d + 1))
    W_V[-1] = [*w_0, -1]
    model = learners.LinearTransformer(
        *learners.gd_weights(d, torch.tensor([eta], dtype=F64), w_0=torch.tensor(w_0))
    )
    got = model(X, y, x)
    for b, rows in enumerate(learners.tokens(X, y, x).numpy()):
        new = attention_layer(rows, W_K, W_K, W_V, eta / N * np.eye(d + 1))
        assert got[b].item() == pytest.approx(-new[-1, -1], rel=1e-10, abs=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 6),
    d=st.integers(1, 4),
    layers=st.integers(1, 3),
)
def test_linear_transformer_against_loops(seed, N, d, layers):
    """Z ← Z + (1/N) P Z M (Zᵀ Q Z), tokens as columns, any P and Q."""
    X, y, x, _, g = problem(seed, N, d)
    P, Q = (w.double() for w in learners.random_weights(g, layers, d, 0.3))
    got = learners.LinearTransformer(P, Q)(X, y, x)
    M = np.diag([1.0] * N + [0.0])
    for b, rows in enumerate(learners.tokens(X, y, x).numpy()):
        Z = rows.T
        for p, q in zip(P.numpy(), Q.numpy(), strict=True):
            Z = Z + p @ Z @ M @ (Z.T @ q @ Z) / N
        assert got[b].item() == pytest.approx(-Z[-1, -1], rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 8),
    d=st.integers(1, 5),
    layers=st.integers(1, 4),
)
def test_gd_plus_plus_is_linear_attention(seed, N, d, layers):
    X, y, x, _, g = problem(seed, N, d)
    eta, gamma = 0.2 * torch.rand(2, layers, generator=g, dtype=F64)
    model = learners.LinearTransformer(*learners.gd_weights(d, eta, gamma))
    want = synthetic.gradient_descent(X, y, x, eta, gamma)
    torch.testing.assert_close(model(X, y, x).detach(), want, atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 8),
    d=st.integers(1, 5),
    layers=st.integers(1, 5),
    name=st.sampled_from(sorted(synthetic.KERNELS)),
)
def test_stacked_attention_is_functional_gradient_descent(seed, N, d, layers, name):
    """The function as explicit coefficients on the kernels of the examples."""
    X, y, x, _, g = problem(seed, N, d)
    eta = 0.1 * torch.rand(layers, generator=g, dtype=F64)
    kernel = synthetic.KERNELS[name]
    got = learners.functional_gd(X, y, x, kernel, eta)
    K, k = kernel(X, X).numpy(), kernel(X, x[:, None]).numpy()
    for b in range(len(X)):
        alpha = np.zeros(N)
        for rate in eta.numpy():
            errors = [y[b, i].item() - alpha @ K[b, :, i] for i in range(N)]
            alpha = alpha + rate * np.array(errors)
        assert got[b].item() == pytest.approx(alpha @ k[b, :, 0], rel=1e-10, abs=1e-10)


def test_functional_gd_with_a_linear_kernel_is_gradient_descent():
    X, y, x, _, _ = problem(3, 7, 4)
    eta = torch.tensor([0.3, 0.2, 0.1], dtype=F64)
    got = learners.functional_gd(X, y, x, synthetic.linear_kernel, eta / 7)
    torch.testing.assert_close(got, synthetic.gradient_descent(X, y, x, eta))


def test_functional_gd_goes_to_kernel_interpolation():
    X, y, x, _, _ = problem(3, 4, 5)
    X = X / X.norm(dim=-1, keepdim=True) * 5**0.5
    eta = torch.full((5_000,), 0.05, dtype=F64)  # stable: k(x, x) = e^√5, N = 4
    got = learners.functional_gd(X, y, x, synthetic.exp_kernel, eta)
    want = synthetic.kernel_ridge(X, y, x, synthetic.exp_kernel, 1e-12)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_softmax_attention():
    X, y, x, _, _ = problem(1, 6, 3)
    weights = learners.softmax_attention(x[:, None], X)
    for b, i in itertools.product(range(3), range(6)):
        scores = [math.exp(x[b] @ X[b, j] / 3**0.5) for j in range(6)]
        assert weights[b, 0, i].item() == pytest.approx(scores[i] / sum(scores))
    one = learners.functional_gd(X, y, x, learners.softmax_attention, [1.0])
    want = synthetic.nadaraya_watson(X, y, x, synthetic.exp_kernel)
    torch.testing.assert_close(one, want)


@pytest.fixture(scope="module")
def regressor():
    return learners.InContextRegressor(3, 5, width=16, layers=2, heads=2, seed=4)


def test_regressor_is_causal_and_does_not_see_the_label(regressor):
    X, y, _, _, g = problem(0, 5, 3)
    X, y = X.float(), y.float()
    with torch.no_grad():
        before = regressor(X, y)
        for i in range(5):
            other_X, other_y = X.clone(), y.clone()
            other_y[:, i:] = torch.randn(3, 5 - i, generator=g)
            other_X[:, i + 1 :] = torch.randn(3, 4 - i, 3, generator=g)
            after = regressor(other_X, other_y)
            torch.testing.assert_close(after[:, : i + 1], before[:, : i + 1])
            if i < 4:
                assert ((after - before)[:, i + 1 :].abs() > 1e-6).any()


def test_regressor_reads_shorter_sequences_alike(regressor):
    X, y, _, _, _ = problem(0, 5, 3)
    X, y = X.float(), y.float()
    with torch.no_grad():
        torch.testing.assert_close(
            regressor(X[:, :3], y[:, :3]), regressor(X, y)[:, :3]
        )


def test_a_paired_regressor_reads_rows_and_not_the_last_label():
    model = learners.PairedRegressor(2, 4, 8, 1, 2, seed=3)
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(3, 4, 2, generator=g), torch.randn(3, 4, generator=g)
    rows = torch.tensor(
        [
            [[*x.tolist(), label if i < 3 else 0.0] for i, (x, label) in enumerate(own)]
            for own in (zip(X[b], y[b].tolist(), strict=True) for b in range(3))
        ]
    )
    with torch.no_grad():
        states = model.body(inputs_embeds=model.read_in(rows)).last_hidden_state
        want = model.read_out(states[:, 3])
        torch.testing.assert_close(model(X, y), want)
        y[:, 3] = 100.0
        torch.testing.assert_close(model(X, y), want)
        y[0, 0] = 100.0
        assert (model(X, y) != want)[0].item()


def test_regressor_is_seeded():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    a, b, other = (
        torch.cat([p.flatten() for p in model.parameters()])
        for model in (
            learners.InContextRegressor(2, 3, 8, 1, 1, seed=seed) for seed in (1, 1, 2)
        )
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_finds_the_closed_form():
    """One linear layer on N(0, I): its loss is that of the best step."""
    g, d, N = torch.Generator().manual_seed(0), 3, 6
    P, Q = learners.random_weights(g, 1, d, 0.1)
    model = learners.LinearTransformer(P.double(), Q.double())

    def loss():
        X = synthetic.sample_inputs(g, 1000, N + 1, d, dtype=F64)
        y = synthetic.linear_labels(g, X)
        return 0.5 * (model(X[:, :-1], y[:, :-1], X[:, -1]) - y[:, -1]).square().mean()

    losses = learners.train(
        loss, model.parameters(), 200, 0.05, schedule=learners.warm_cosine
    )
    assert len(losses) == 200
    eta, best = synthetic.one_step_optimum(d, N)
    with torch.no_grad():
        assert np.mean([loss().item() for _ in range(80)]) == pytest.approx(best, 0.02)
    effective = -(model.P[0, -1, -1] * model.Q[0, :d, :d]).detach()
    torch.testing.assert_close(
        effective, eta * torch.eye(d, dtype=F64), atol=0.05, rtol=0
    )


def test_train_is_adam():
    """Three steps, written out."""
    w = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    target = torch.tensor([0.5, 3.0], dtype=F64)
    losses = learners.train(
        lambda: (w - target).square().sum(), [w], 3, 0.1, (0.8, 0.9)
    )
    v, m, s, want = np.array([1.0, -2.0]), 0.0, 0.0, []
    for t in range(1, 4):
        want.append(((v - target.numpy()) ** 2).sum())
        gradient = 2 * (v - target.numpy())
        m, s = 0.8 * m + 0.2 * gradient, 0.9 * s + 0.1 * gradient**2
        v = v - 0.1 * m / (1 - 0.8**t) / (np.sqrt(s / (1 - 0.9**t)) + 1e-8)
    np.testing.assert_allclose(losses, want, rtol=1e-12)
    np.testing.assert_allclose(w.detach(), v, rtol=1e-12)


def test_schedule():
    assert learners.warm_cosine(0.05) == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(0.05 * math.pi))
    )
    assert learners.warm_cosine(0.5) == pytest.approx(0.5)
    assert learners.warm_cosine(1.0) == pytest.approx(0.0)


def test_minimise_a_quadratic_in_any_basis():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=g, dtype=F64)
    A, b = A @ A.mT + 0.1 * torch.eye(6), torch.randn(6, generator=g, dtype=F64)
    w = torch.zeros(6, dtype=F64, requires_grad=True)
    loss = learners.minimise(lambda: 0.5 * w @ A @ w - b @ w, [w], 100)
    want = torch.linalg.solve(A, b)
    torch.testing.assert_close(w.detach(), want, atol=1e-5, rtol=1e-5)
    assert loss == pytest.approx((-0.5 * b @ want).item(), rel=1e-9)


def test_minimise_keeps_the_best_point():
    """A cliff beyond 1.2: the first step of L-BFGS falls off it."""
    w = torch.zeros((), dtype=F64, requires_grad=True)

    def cliff():
        return (w - 3).square() if w < 1.2 else w * math.nan

    loss = learners.minimise(cliff, [w], 20)
    assert math.isfinite(w.item())
    assert loss == pytest.approx((w.item() - 3) ** 2)
    assert loss <= 9


def test_bad_input():
    X, y, x, _, g = problem(0, 4, 3)
    for bad in [(X, y[:, :3], x), (X, y, x[:, :2]), (X[:, :0], y[:, :0], x)]:
        with pytest.raises(ValueError, match="N at least 1; given are"):
            learners.functional_gd(*bad, synthetic.exp_kernel, [0.1])
    P, Q = learners.gd_weights(2, torch.ones(1, dtype=F64))
    with pytest.raises(ValueError, match="width 2 are given inputs of width 3"):
        learners.LinearTransformer(P, Q)(X, y, x)
    with pytest.raises(ValueError, match=r"\(L, d \+ 1, d \+ 1\) each, not"):
        learners.LinearTransformer(P, Q[:, :2])
    with pytest.raises(ValueError, match="2 layers need as many gamma, not 1"):
        learners.gd_weights(3, torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match="both must be positive"):
        learners.random_weights(g, 0, 3, 0.1)
    model = learners.InContextRegressor(3, 3, 8, 1, 1)
    with pytest.raises(ValueError, match="4 examples are more than the 3"):
        model(X.float(), y.float())
    with pytest.raises(ValueError, match=r"X must be \(B, N, 3\)"):
        model(X[..., :2].float(), y.float())
    w = torch.ones(1, requires_grad=True)
    for fit in (
        lambda f, n: learners.train(f, [w], n, 0.1),
        lambda f, n: learners.minimise(f, [w], n),
    ):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            fit(lambda: w.sum(), 0)
        with pytest.raises(ValueError, match="the loss is inf at step 0"):
            fit(lambda: w.sum() / 0, 2)
