"""Tasks and classical answers against NumPy loops; networks against algorithms."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl import regression

F64 = torch.float64
TASK = dict(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    d=st.integers(1, 6),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed, N, d, size=1.0, B=3):
    g = generator(seed)
    X, x = (torch.randn(s, generator=g, dtype=F64) for s in [(B, N, d), (B, d)])
    return size * X, torch.randn(B, N, generator=g, dtype=F64), size * x


def each(function, X, y, x):
    """Apply a NumPy function to the tasks one by one."""
    rows = zip(X.numpy(), y.numpy(), x.numpy(), strict=True)
    return np.array([function(*row) for row in rows])


def spd(seed, d):
    A = torch.randn(d, d, generator=generator(seed), dtype=F64)
    return A @ A.mT + 0.1 * torch.eye(d, dtype=F64)


# --- sampling ----------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["normal", "uniform", "sphere"])
def test_inputs_have_the_covariance_asked_for(distribution):
    sigma = spd(1, 3)
    X = regression.sample_inputs(generator(), 400, 500, 3, sigma, distribution, F64)
    assert X.shape == (400, 500, 3)
    flat = X.reshape(-1, 3)
    assert flat.mean(0).abs().max() < 0.03
    torch.testing.assert_close(flat.mT @ flat / len(flat), sigma, atol=0.05, rtol=0.02)


def test_distributions_are_what_they_are_called():
    uniform = regression.sample_inputs(generator(), 9, 9, 4, distribution="uniform")
    assert uniform.abs().max() < 3**0.5
    sphere = regression.sample_inputs(generator(), 9, 9, 4, distribution="sphere")
    torch.testing.assert_close(sphere.norm(dim=-1), torch.full((9, 9), 2.0))


def test_von_oswald_draws_from_minus_half_to_half():
    X = regression.sample_inputs(
        generator(), 200, 100, 2, torch.eye(2) / 12, "uniform"
    ).flatten()
    assert 0.49 < X.max() <= 0.5
    assert X.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert X.pow(4).mean().item() == pytest.approx(1 / 80, rel=0.03)


def test_linear_labels():
    X = regression.sample_inputs(generator(), 5, 7, 3, dtype=F64)
    y = regression.linear_labels(generator(1), X)
    w = np.stack([np.linalg.lstsq(a, b)[0] for a, b in zip(X, y, strict=True)])
    np.testing.assert_allclose(np.einsum("bnd,bd->bn", X, w), y, atol=1e-12)
    many = regression.sample_inputs(generator(), 20_000, 1, 3, dtype=F64)
    y = regression.linear_labels(generator(1), many, 4 * torch.eye(3, dtype=F64), 2.0)
    assert y.var().item() == pytest.approx(4 * 3 + 2**2, rel=0.05)


@pytest.mark.parametrize("name", ["linear", "sine", "exponential"])
def test_function_labels(name):
    X = regression.sample_inputs(generator(), 40_000, 2, 3, dtype=F64)
    y = regression.function_labels(generator(1), X, name)
    assert y.mean().item() == pytest.approx(0, abs=0.02)
    assert y.var().item() == pytest.approx(1, rel=0.03)
    noisy = regression.function_labels(generator(1), X, name, noise=0.5)
    assert (noisy - y).std().item() == pytest.approx(0.5, rel=0.02)
    # a task in one dimension shows its function: w is 1 or -1
    X = regression.sample_inputs(generator(), 3, 9, 1, dtype=F64)
    y = regression.function_labels(generator(1), X, name).numpy()
    raw = {"linear": np.positive, "sine": lambda u: np.sin(2 * u)}
    raw = raw.get(name, lambda u: np.exp(u / 2))
    for x, labels in zip(X[:, :, 0].numpy(), y, strict=True):
        fits = [np.corrcoef(raw(sign * x), labels)[0, 1] for sign in (1, -1)]
        assert max(fits) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", regression.KERNELS)
def test_kernel_labels_have_the_kernel_as_covariance(name):
    kernel = regression.KERNELS[name]
    X = regression.sample_inputs(generator(), 1, 4, 3, dtype=F64)
    K = kernel(X, X)[0]
    y = regression.kernel_labels(generator(2), X.repeat(100_000, 1, 1), kernel)
    got = y.mT @ y / len(y)
    spread = (K.diagonal()[:, None] * K.diagonal() + K**2).sqrt() / len(y) ** 0.5
    assert ((got - K).abs() < 5 * spread).all()


@pytest.mark.parametrize("own", [True, False])
def test_keys_of_a_sequence_have_the_cosine_asked_for(own):
    g = generator()
    common = None if own else torch.eye(400)[3]
    keys = regression.correlated_keys(g, 300, 6, 400, 0.6, common)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(300, 6))
    within = (keys[:, 0] * keys[:, 1]).sum(-1).mean()
    between = (keys[:-1, 0] * keys[1:, 1]).sum(-1).mean()
    assert within.item() == pytest.approx(0.6, abs=0.02)
    assert between.item() == pytest.approx(0.0 if own else 0.6, abs=0.02)


# --- kernels -----------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(**TASK)
def test_kernels_against_loops(seed, N, d, size):
    X, _, x = problem(seed, N, d, min(size, 3.0))
    U, V = X.numpy(), x.numpy()[:, None]
    for b, i in itertools.product(range(len(U)), range(N)):
        u, v = U[b, i], V[b, 0]
        cosine = np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1)
        angle = np.arccos(cosine)
        arc = np.sin(angle) + (np.pi - angle) * np.cos(angle)
        want = {
            "linear": u @ v,
            "exp": np.exp(u @ v / np.sqrt(d)),
            "relu": np.linalg.norm(u) * np.linalg.norm(v) * arc / np.pi,
        }
        for name, kernel in regression.KERNELS.items():
            got = kernel(X, x[:, None])[b, i, 0].item()
            assert got == pytest.approx(want[name], rel=1e-6, abs=1e-10 * size**2)


def test_relu_kernel_is_the_mean_of_random_features():
    u, v = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.5, 1.0, 1.0]])
    w = torch.randn(2_000_000, 3, generator=generator())
    mean = 2 * ((w @ u[0]).relu() * (w @ v[0]).relu()).mean()
    assert regression.KERNELS["relu"](u, v).item() == pytest.approx(
        mean.item(), rel=0.01
    )
    assert regression.KERNELS["relu"](u, u).item() == pytest.approx(6, rel=1e-3)


# --- one step in closed form -------------------------------------------------


@pytest.mark.parametrize(("N", "d"), [(1, 1), (1, 3), (2, 2), (3, 2), (2, 3)])
def test_one_step_optimum_by_enumeration(N, d):
    """All inputs with entries ±c: variance c², fourth moment c⁴. No sampling."""
    c = 0.7
    a = b = 0.0
    signs = list(itertools.product([-c, c], repeat=N * d))
    for entries in signs:
        S = np.reshape(entries, (N, d)).T @ np.reshape(entries, (N, d))
        a += np.trace(S) / len(signs)
        b += np.trace(S @ S) / len(signs)
    eta, loss = regression.one_step_optimum(d, N, c**2, c**4)
    assert eta == pytest.approx(N * a / b, rel=1e-12)
    assert loss == pytest.approx(c**2 / 2 * (d - a**2 / b), rel=1e-12, abs=1e-15)


def test_one_step_optimum_known_values():
    eta, loss = regression.one_step_optimum(10, 10, 1 / 12, 1 / 80)
    assert (round(eta, 3), round(loss, 4)) == (6.061, 0.2062)
    eta, loss = regression.one_step_optimum(10, 10)
    assert (round(eta, 3), round(loss, 3)) == (0.476, 2.619)


def test_preconditioner_of_the_identity_is_the_learning_rate():
    A, loss = regression.one_step_preconditioner(torch.eye(4, dtype=F64), 7)
    eta, same = regression.one_step_optimum(4, 7)
    torch.testing.assert_close(A, eta * torch.eye(4, dtype=F64))
    assert loss == pytest.approx(same)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), N=st.integers(1, 30), d=st.integers(1, 5))
def test_preconditioner_is_the_minimum(seed, N, d):
    """The loss is quadratic in A; its value by moments of a Wishart matrix."""
    sigma = spd(seed, d)
    A, loss = regression.one_step_preconditioner(sigma, N)

    def half_error(A):
        first = N * sigma
        second = N * (N + 1) * sigma @ sigma + N * torch.trace(sigma) * sigma
        value = sigma - 2 * sigma @ A.mT @ first / N
        return (0.5 * torch.trace(value + sigma @ A.mT @ second @ A / N**2)).item()

    assert half_error(A) == pytest.approx(loss, rel=1e-9)
    for step in torch.randn(10, d, d, generator=generator(seed), dtype=F64):
        assert half_error(A + 0.1 * step) >= loss * (1 - 1e-9)


# --- predictors --------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(**TASK)
def test_predictors_against_numpy(seed, N, d, size):
    X, y, x = problem(seed, N, d, size)

    def close(got, want):
        scale = 1 + np.abs(want).max()
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-9)

    close(
        regression.least_squares(X, y, x),
        each(lambda X, y, x: np.linalg.lstsq(X, y)[0] @ x, X, y, x),
    )

    def augmented(X, y, x):  # ridge as least squares with d more rows
        rows = np.vstack([X, 0.3**0.5 * np.eye(d)])
        return np.linalg.lstsq(rows, np.append(y, np.zeros(d)))[0] @ x

    close(regression.ridge(X, y, x, 0.3), each(augmented, X, y, x))
    close(
        regression.nearest_neighbours(X, y, x, 3),
        each(lambda X, y, x: y[np.argsort(((X - x) ** 2).sum(1))[:3]].mean(), X, y, x),
    )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    d=st.integers(1, 6),
    steps=st.integers(1, 5),
    plus=st.booleans(),
)
def test_gradient_descent_against_a_loop(seed, N, d, steps, plus):
    X, y, x = problem(seed, N, d)
    rates = torch.rand(2, steps, generator=generator(seed), dtype=F64)
    eta, gamma = rates[0], 0.1 * rates[1] if plus else None

    def loop(X, y, x):
        f = 0.0
        for t in range(steps):
            w = sum(r * z for r, z in zip(y, X, strict=True)) * float(eta[t]) / N
            f, y = f + w @ x, np.array([r - w @ z for r, z in zip(y, X, strict=True)])
            if plus:
                C = sum(np.outer(z, z) for z in X) * float(gamma[t]) / N
                X, x = np.array([z - C @ z for z in X]), x - C @ x
        return f

    want = each(loop, X, y, x)
    got = regression.gradient_descent(X, y, x, eta, gamma)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    d=st.integers(1, 6),
    penalty=st.floats(1e-3, 10),
)
def test_kernel_ridge(seed, N, d, penalty):
    X, y, x = problem(seed, N, d)
    linear = regression.kernel_ridge(X, y, x, regression.KERNELS["linear"], penalty)
    torch.testing.assert_close(
        linear, regression.ridge(X, y, x, penalty), rtol=1e-8, atol=1e-8
    )

    def posterior_mean(X, y, x):
        both = np.vstack([X, x])
        K = np.exp(both @ both.T / np.sqrt(d))
        return K[-1, :-1] @ np.linalg.inv(K[:-1, :-1] + penalty * np.eye(N)) @ y

    got = regression.kernel_ridge(X, y, x, regression.KERNELS["exp"], penalty)
    want = each(posterior_mean, X, y, x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_nadaraya_watson_is_softmax_attention_to_labels():
    X, y, x = problem(4, 6, 3)
    want = ((x[:, None] @ X.mT / 3**0.5).softmax(-1) @ y[..., None]).flatten()
    got = regression.nadaraya_watson(X, y, x, regression.KERNELS["exp"])
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="negative values"):
        regression.nadaraya_watson(X, y, x, regression.KERNELS["linear"])


def test_noise_free_limits():
    X, _, x = problem(5, 8, 4)
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    truth = x @ w
    torch.testing.assert_close(regression.least_squares(X, X @ w, x), truth)
    eta = torch.full((5000,), 0.3, dtype=F64)
    torch.testing.assert_close(regression.gradient_descent(X, X @ w, x, eta), truth)


def test_prefixes_see_only_what_came_before():
    X, y, _ = problem(6, 7, 3)
    got = regression.at_every_prefix(regression.least_squares, X, y)
    assert got.shape == y.shape
    assert (got[:, 0] == 0).all()
    for i in range(1, 7):
        want = each(
            lambda X, y, x: np.linalg.lstsq(X, y)[0] @ x, X[:, :i], y[:, :i], X[:, i]
        )
        np.testing.assert_allclose(got[:, i], want, atol=1e-9)


# --- attention that learns in context ----------------------------------------


def started(seed, N, d, size=1.0, B=3):
    """A problem, a weight to start from, and the generator that drew it."""
    g = generator(seed)
    sizes = [(B, N, d), (B, N), (B, d), (d,)]
    X, y, x, w_0 = (torch.randn(s, generator=g, dtype=F64) for s in sizes)
    return size * X, y, size * x, w_0, g


def tokens(X, y, x):
    """Rows ``(x_i, y_i)`` and, last, ``(x, 0)``."""
    inputs = np.concatenate([X, x[:, None]], 1)
    labels = np.concatenate([y, np.zeros((len(y), 1))], 1)
    return np.concatenate([inputs, labels[..., None]], 2)


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
    X, y, x, w_0, g = started(seed, N, d, size)
    eta = 0.3 * torch.rand(layers, generator=g, dtype=F64)
    w_0 = w_0 if start else torch.zeros_like(w_0)
    model = regression.LinearTransformer(*regression.gd_weights(d, eta, w_0=w_0))
    got = (model(X, y, x) + x @ w_0).detach()
    want = [descend(*task, eta, w_0) for task in zip(X, y, x, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), N=st.integers(1, 6), d=st.integers(1, 4))
def test_ahn_form_holds_von_oswalds_layer(seed, N, d):
    """The layer written with W_K, W_Q, W_V and a projection, token by token."""
    X, y, x, w_0, _ = started(seed, N, d)
    eta, w_0 = 0.7, w_0.numpy()
    W_K = np.diag([1.0] * d + [0.0])
    W_V = np.zeros((d + 1, d + 1))
    W_V[-1] = [*w_0, -1]
    model = regression.LinearTransformer(
        *regression.gd_weights(d, torch.tensor([eta], dtype=F64), w_0=torch.tensor(w_0))
    )
    got = model(X, y, x)
    for b, rows in enumerate(tokens(X, y, x)):
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
    X, y, x, _, g = started(seed, N, d)
    P, Q = (w.double() for w in regression.random_weights(g, layers, d, 0.3))
    got = regression.LinearTransformer(P, Q)(X, y, x)
    M = np.diag([1.0] * N + [0.0])
    for b, rows in enumerate(tokens(X, y, x)):
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
    X, y, x, _, g = started(seed, N, d)
    eta, gamma = 0.2 * torch.rand(2, layers, generator=g, dtype=F64)
    model = regression.LinearTransformer(*regression.gd_weights(d, eta, gamma))
    want = regression.gradient_descent(X, y, x, eta, gamma)
    torch.testing.assert_close(model(X, y, x).detach(), want, atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 8),
    d=st.integers(1, 5),
    layers=st.integers(1, 5),
    name=st.sampled_from(sorted(regression.KERNELS)),
)
def test_stacked_attention_is_functional_gradient_descent(seed, N, d, layers, name):
    """The function as explicit coefficients on the kernels of the examples."""
    X, y, x, _, g = started(seed, N, d)
    eta = 0.1 * torch.rand(layers, generator=g, dtype=F64)
    kernel = regression.KERNELS[name]
    got = regression.functional_gd(X, y, x, kernel, eta)
    K, k = kernel(X, X).numpy(), kernel(X, x[:, None]).numpy()
    for b in range(len(X)):
        alpha = np.zeros(N)
        for rate in eta.numpy():
            errors = [y[b, i].item() - alpha @ K[b, :, i] for i in range(N)]
            alpha = alpha + rate * np.array(errors)
        assert got[b].item() == pytest.approx(alpha @ k[b, :, 0], rel=1e-10, abs=1e-10)


def test_functional_gd_with_a_linear_kernel_is_gradient_descent():
    X, y, x = problem(3, 7, 4)
    eta = torch.tensor([0.3, 0.2, 0.1], dtype=F64)
    got = regression.functional_gd(X, y, x, regression.KERNELS["linear"], eta / 7)
    torch.testing.assert_close(got, regression.gradient_descent(X, y, x, eta))


def test_functional_gd_goes_to_kernel_interpolation():
    X, y, x = problem(3, 4, 5)
    X = X / X.norm(dim=-1, keepdim=True) * 5**0.5
    eta = torch.full((5_000,), 0.05, dtype=F64)  # stable: k(x, x) = e^√5, N = 4
    got = regression.functional_gd(X, y, x, regression.KERNELS["exp"], eta)
    want = regression.kernel_ridge(X, y, x, regression.KERNELS["exp"], 1e-12)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_softmax_attention():
    X, y, x = problem(1, 6, 3)
    weights = regression.softmax_weights(x[:, None], X)
    for b, i in itertools.product(range(3), range(6)):
        scores = [math.exp(x[b] @ X[b, j] / 3**0.5) for j in range(6)]
        assert weights[b, 0, i].item() == pytest.approx(scores[i] / sum(scores))
    one = regression.functional_gd(X, y, x, regression.softmax_weights, [1.0])
    want = regression.nadaraya_watson(X, y, x, regression.KERNELS["exp"])
    torch.testing.assert_close(one, want)


@pytest.fixture(scope="module")
def regressor():
    return regression.InContextRegressor(3, 5, width=16, layers=2, heads=2, seed=4)


def test_regressor_is_causal_and_does_not_see_the_label(regressor):
    X, y, _, _, g = started(0, 5, 3)
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
    X, y, _ = problem(0, 5, 3)
    X, y = X.float(), y.float()
    with torch.no_grad():
        torch.testing.assert_close(
            regressor(X[:, :3], y[:, :3]), regressor(X, y)[:, :3]
        )


def test_a_paired_regressor_reads_rows_and_not_the_last_label():
    model = regression.PairedRegressor(2, 4, 8, 1, 2, seed=3)
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
            regression.InContextRegressor(2, 3, 8, 1, 1, seed=seed)
            for seed in (1, 1, 2)
        )
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_finds_the_closed_form():
    """One linear layer on N(0, I): its loss is that of the best step."""
    g, d, N = torch.Generator().manual_seed(0), 3, 6
    P, Q = regression.random_weights(g, 1, d, 0.1)
    model = regression.LinearTransformer(P.double(), Q.double())

    def loss():
        X = regression.sample_inputs(g, 1000, N + 1, d, dtype=F64)
        y = regression.linear_labels(g, X)
        return 0.5 * (model(X[:, :-1], y[:, :-1], X[:, -1]) - y[:, -1]).square().mean()

    losses = regression.fit_adam(
        loss, model.parameters(), 200, 0.05, schedule=regression.warm_up_cosine
    )
    assert len(losses) == 200
    eta, best = regression.one_step_optimum(d, N)
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
    losses = regression.fit_adam(
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
    assert regression.warm_up_cosine(0.05) == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(0.05 * math.pi))
    )
    assert regression.warm_up_cosine(0.5) == pytest.approx(0.5)
    assert regression.warm_up_cosine(1.0) == pytest.approx(0.0)


def test_minimise_a_quadratic_in_any_basis():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=g, dtype=F64)
    A, b = A @ A.mT + 0.1 * torch.eye(6), torch.randn(6, generator=g, dtype=F64)
    w = torch.zeros(6, dtype=F64, requires_grad=True)
    loss = regression.fit_lbfgs(lambda: 0.5 * w @ A @ w - b @ w, [w], 100)
    want = torch.linalg.solve(A, b)
    torch.testing.assert_close(w.detach(), want, atol=1e-5, rtol=1e-5)
    assert loss == pytest.approx((-0.5 * b @ want).item(), rel=1e-9)


def test_minimise_keeps_the_best_point():
    """A cliff beyond 1.2: the first step of L-BFGS falls off it."""
    w = torch.zeros((), dtype=F64, requires_grad=True)

    def cliff():
        return (w - 3).square() if w < 1.2 else w * math.nan

    loss = regression.fit_lbfgs(cliff, [w], 20)
    assert math.isfinite(w.item())
    assert loss == pytest.approx((w.item() - 3) ** 2)
    assert loss <= 9


# --- bad input ---------------------------------------------------------------


def bare(function):
    """What a reader calls: without the checks of annotations that tests add."""
    return inspect.unwrap(function)


PREDICTORS = {
    regression.least_squares: {},
    regression.nearest_neighbours: {},
    regression.ridge: dict(penalty=1.0),
    regression.gradient_descent: dict(eta=[0.1]),
    regression.kernel_ridge: dict(kernel=regression.KERNELS["exp"], penalty=1.0),
    regression.nadaraya_watson: dict(kernel=regression.KERNELS["exp"]),
    regression.functional_gd: dict(attention=regression.KERNELS["exp"], eta=[0.1]),
}


@pytest.mark.parametrize("predict", PREDICTORS)
def test_bad_tasks(predict):
    (X, y, x), options = problem(0, 5, 3), PREDICTORS[predict]
    wrong = [(X, y[:, :4], x), (X, y, x[:, :2]), (X[:, :0], y[:, :0], x)]
    wrong += [(X, y[:1], x), (X, y, x[:1]), (X, y[:, :1], x)]  # these would broadcast
    for bad in wrong:
        with pytest.raises(ValueError, match=r"B, N, d"):
            bare(predict)(*bad, **options)
    with pytest.raises(ValueError, match="not finite"):
        predict(X, y / 0, x, **options)


def test_bad_covariances():
    g, X = generator(), torch.ones(2, 4, 3)
    skew = torch.eye(3) + torch.ones(3, 3).triu(1)
    nan, inf = (torch.full((3, 3), value) for value in (math.nan, math.inf))
    for bad in (-torch.eye(3), skew, nan, inf, torch.eye(3) / 0):
        with pytest.raises(ValueError, match="positive definite"):
            regression.sample_inputs(g, 2, 2, 3, bad)
        with pytest.raises(ValueError, match="positive definite"):
            regression.linear_labels(g, X, bad)
        with pytest.raises(ValueError, match="positive definite"):
            regression.one_step_preconditioner(bad, 3)
    with pytest.raises((RuntimeError, TypeError)):
        regression.linear_labels(g, X, torch.eye(2))


def test_bad_options():
    X, y, x = problem(0, 5, 3)
    g, kernels = generator(), regression.KERNELS
    with pytest.raises(ValueError, match="cauchy"):
        regression.sample_inputs(g, 2, 2, 3, distribution="cauchy")
    for noise in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"noise .* {noise}"):
            regression.linear_labels(g, X, noise=noise)
        with pytest.raises(ValueError, match=f"noise .* {noise}"):
            regression.function_labels(g, X, "sine", noise)
    with pytest.raises(ValueError, match="cosine"):
        regression.function_labels(g, X, "cosine")
    with pytest.raises(ValueError, match="positive semi-definite"):
        regression.kernel_labels(g, X, lambda U, V: -kernels["exp"](U, V))
    for correlation in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"correlation .* {correlation}"):
            regression.correlated_keys(g, 2, 3, 4, correlation)
    moments = [(0.0, None), (-1.0, None), (math.nan, None), (1.0, 0.5), (1.0, math.inf)]
    for variance, fourth in moments:
        with pytest.raises(ValueError, match=f"variance {variance}"):
            regression.one_step_optimum(3, 3, variance, fourth)
    for penalty in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"penalty .* {penalty}"):
            regression.ridge(X, y, x, penalty)
        with pytest.raises(ValueError, match=f"penalty .* {penalty}"):
            regression.kernel_ridge(X, y, x, kernels["exp"], penalty)
    with pytest.raises(ValueError, match="k .* 0"):
        regression.nearest_neighbours(X, y, x, 0)
    for gamma in ([0.1], [0.1] * 3):
        with pytest.raises(ValueError, match="shorter|longer"):
            regression.gradient_descent(X, y, x, [0.1, 0.1], gamma)
    with pytest.raises(ValueError, match="2 layers .* 1"):
        regression.gd_weights(3, torch.ones(2), torch.ones(1))


def test_networks_refuse_what_does_not_fit():
    X, y, x = problem(0, 4, 3)
    P, Q = regression.gd_weights(2, torch.ones(1, dtype=F64))
    with pytest.raises(RuntimeError):
        regression.LinearTransformer(P, Q)(X, y, x)
    model = regression.InContextRegressor(3, 3, 8, 1, 1)
    X, y, forward = X.float(), y.float(), bare(type(model).forward)
    with pytest.raises(ValueError, match="N ≤ 3"):
        forward(model, X, y)
    for short in (y[:, :1], y[:, :2]):
        with pytest.raises(ValueError, match=r"y \(B, N\)"):
            forward(model, X[:, :3], short)
    with pytest.raises(RuntimeError):
        model(X[:, :3, :2], y[:, :3])


def test_a_loss_that_is_not_finite_stops_a_fit():
    w = torch.ones(1, requires_grad=True)
    for fit in (
        lambda loss: regression.fit_adam(loss, [w], 2, 0.1),
        lambda loss: regression.fit_lbfgs(loss, [w], 2),
    ):
        with pytest.raises(ValueError, match="inf at step 0"):
            fit(lambda: w.sum() / 0)
