"""Weight updates as attention and attention as weight updates, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.duality import (
    attention_weight,
    dual_prediction,
    effective_rank,
    finetuning_weight,
    frobenius_cosine,
    linear_attention,
    split_attention,
    step_weights,
    subspace_overlap,
    train_linear,
)

F64 = torch.float64
LOSSES = {
    "squared": lambda F, Y: 0.5 * (F - Y).square().sum(-1).mean(),
    "cross-entropy": lambda F, Y: torch.nn.functional.cross_entropy(F, Y.softmax(-1)),
    "absolute": lambda F, Y: (F - Y).abs().sum(),
    "ratio": lambda F, Y: (F * Y).sum() / (1 + F.square().sum()),
}


def problem(seed, N, d_i, d_o):
    g = torch.Generator().manual_seed(seed)
    sizes = [(N, d_i), (N, d_o), (d_o, d_i), (5, d_i)]
    return [torch.randn(size, generator=g, dtype=F64) for size in sizes]


def torch_sgd(W_0, X, Y, loss, batches, learning_rate, momentum, weight_decay):
    """The same training by PyTorch's own layer, autograd and optimiser."""
    layer = torch.nn.Linear(X.shape[1], Y.shape[1], bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(W_0)
    sgd = torch.optim.SGD(
        layer.parameters(), learning_rate, momentum, weight_decay=weight_decay
    )
    for batch in batches:
        sgd.zero_grad()
        loss(layer(X[batch]), Y[batch]).backward()
        sgd.step()
    return layer.weight.detach()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 12),
    d_i=st.integers(1, 9),
    d_o=st.integers(1, 5),
    size=st.integers(1, 12),
    epochs=st.integers(1, 4),
    loss=st.sampled_from(sorted(LOSSES)),
    learning_rate=st.floats(1e-4, 0.1),
    momentum=st.floats(0, 0.99),
    weight_decay=st.floats(0, 0.5),
)
def test_training_is_attention(
    seed, N, d_i, d_o, size, epochs, loss, learning_rate, momentum, weight_decay
):
    X, Y, W_0, q = problem(seed, N, d_i, d_o)
    g = torch.Generator().manual_seed(seed)
    batches = [
        b for _ in range(epochs) for b in torch.randperm(N, generator=g).split(size)
    ]
    rule = learning_rate, momentum, weight_decay
    trained = train_linear(W_0, X, Y, LOSSES[loss], batches, *rule)
    want = torch_sgd(W_0, X, Y, LOSSES[loss], batches, *rule)
    torch.testing.assert_close(trained.weight, want, atol=1e-10, rtol=1e-10)
    a, c = step_weights(len(batches), *rule, dtype=F64)
    got = dual_prediction(W_0, trained, q, a, c)
    torch.testing.assert_close(got, q @ want.mT, atol=1e-9, rtol=1e-9)


def test_step_weights_closed_forms():
    T, lr, mu, wd = 40, 0.1, 0.8, 0.3
    n = torch.arange(T, 0, -1, dtype=F64)  # steps left, the current one included
    a, c = step_weights(T, lr, dtype=F64)
    assert a == 1
    assert torch.equal(c, torch.ones(T, dtype=F64))
    a, c = step_weights(T, lr, weight_decay=wd, dtype=F64)
    assert a.item() == pytest.approx((1 - lr * wd) ** T, abs=1e-12)
    torch.testing.assert_close(c, (1 - lr * wd) ** (n - 1))
    a, c = step_weights(T, lr, momentum=mu, dtype=F64)
    assert a == 1
    torch.testing.assert_close(c, (1 - mu**n) / (1 - mu))


def test_linear_attention_against_a_loop():
    X, E, _, q = problem(3, 7, 4, 3)
    want = np.zeros((5, 3))
    for b in range(5):
        for i in range(7):
            want[b] += E[i].numpy() * float(X[i] @ q[b])
    np.testing.assert_allclose(linear_attention(E, X, q), want, atol=1e-12)


def test_bad_shapes():
    X, E, _, q = problem(0, 6, 4, 3)
    with pytest.raises(ValueError, match="6 keys need as many values, not 5"):
        linear_attention(E[:5], X, q)
    with pytest.raises(ValueError, match="differ in width: 3 and 4"):
        linear_attention(E, X, q[:, :3])
    with pytest.raises(ValueError, match="no training examples"):
        linear_attention(E[:0], X[:0], q)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        step_weights(0, 0.1)


def tokens(seed, n, d, d_o, lead=(), scale=1.0):
    g = torch.Generator().manual_seed(seed)
    sizes = [(*lead, d), (*lead, n, d), (*lead, n, d_o)]
    q, K, V = [torch.randn(size, generator=g, dtype=F64) for size in sizes]
    return scale * q, scale * K, V


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 12),
    d=st.integers(1, 6),
    d_o=st.integers(1, 5),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    data=st.data(),
)
def test_softmax_attention_is_a_mixture_of_two(seed, n, d, d_o, lead, scale, data):
    q, K, V = tokens(seed, n, d, d_o, lead, scale)
    where = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if where.all() or not where.any():
        with pytest.raises(ValueError, match=f"of the {n} tokens {int(where.sum())}"):
            split_attention(q, K, V, where)
        return
    split = split_attention(q, K, V, where)
    whole, alone = softmax_loop(q, K, V), softmax_loop(q, K, V, ~where)
    inside = softmax_loop(q, K, V, where)
    m = split.mass.numpy()[..., None]
    np.testing.assert_allclose(split.rest, alone, atol=1e-12)
    np.testing.assert_allclose(split.demonstrations, inside, atol=1e-12)
    np.testing.assert_allclose(m * inside + (1 - m) * alone, whole, atol=1e-12)
    np.testing.assert_allclose(split.change, whole - alone, atol=1e-12)


def softmax_loop(q, K, V, keep=None):
    """Attention one token at a time, with NumPy."""
    q, K, V = q.numpy(), K.numpy(), V.numpy()
    out = np.zeros((*q.shape[:-1], V.shape[-1]))
    for place in np.ndindex(q.shape[:-1]):
        rows = range(K.shape[-2]) if keep is None else np.flatnonzero(keep.numpy())
        scores = np.array([K[place][i] @ q[place] for i in rows])
        weights = np.exp(scores - scores.max())
        out[place] = sum(w * V[place][i] for w, i in zip(weights, rows, strict=True))
        out[place] /= weights.sum()
    return out


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 8),
    extra=st.integers(1, 8),
    d=st.integers(1, 6),
)
def test_linear_attention_over_both_parts_is_the_sum_of_two_weights(seed, n, extra, d):
    q, K, V = tokens(seed, n + extra, d, d + 1)
    W_zsl = attention_weight(V[n:], K[n:])
    dW_icl = attention_weight(V[:n], K[:n])
    outer = sum(torch.outer(v, k) for v, k in zip(V[:n], K[:n], strict=True))
    torch.testing.assert_close(dW_icl, outer)
    torch.testing.assert_close((W_zsl + dW_icl) @ q, linear_attention(V, K, q))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 8),
    d_i=st.integers(1, 6),
    d=st.integers(1, 5),
)
def test_finetuning_weight_expands_equation_13(seed, n, d_i, d):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(d_i, n, generator=g, dtype=F64)
    W_K, W_V, dW_K, dW_V = torch.randn(4, d, d_i, generator=g, dtype=F64)
    key, value = (W_K @ X).mT, (W_V @ X).mT
    parts = finetuning_weight(value, key, ((W_V + dW_V) @ X).mT, ((W_K + dW_K) @ X).mT)
    whole = (W_V + dW_V) @ X @ X.mT @ (W_K + dW_K).mT
    torch.testing.assert_close(
        sum(parts), whole - attention_weight(value, key), atol=1e-10, rtol=1e-10
    )
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(parts.by_value, dW_V @ X @ X.mT @ W_K.mT, **close)
    torch.testing.assert_close(parts.by_key, W_V @ X @ X.mT @ dW_K.mT, **close)
    torch.testing.assert_close(parts.by_both, dW_V @ X @ X.mT @ dW_K.mT, **close)


def test_effective_rank_of_known_matrices():
    Q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=torch.manual_seed(0)))
    equal = Q @ torch.diag(torch.tensor([3.0, 3, 3, 0, 0, 0], dtype=F64))
    assert effective_rank(equal).item() == pytest.approx(3, abs=1e-6)
    outer = torch.outer(Q[0], Q[1])
    assert effective_rank(outer).item() == pytest.approx(1, abs=1e-6)
    # singular values 3 and 1: entropy of (3/4, 1/4)
    two = torch.diag(torch.tensor([3.0, 1.0], dtype=F64))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert effective_rank(two).item() == pytest.approx(np.exp(entropy))


def test_cosine_and_overlap_of_known_matrices():
    I = torch.eye(4, dtype=F64)  # noqa: E741
    A = torch.outer(I[0], I[1]) * 5 + torch.outer(I[1], I[2]) * 3
    B = torch.outer(I[1], I[1]) * 4 + torch.outer(I[0], I[3]) * 2
    assert frobenius_cosine(A, -2 * A).item() == pytest.approx(-1)
    assert frobenius_cosine(A, B).item() == pytest.approx(0)
    left, right = subspace_overlap(A, B, 1)  # e0 and e1 on the left, e1 twice right
    assert (left.item(), right.item()) == pytest.approx((0, 1))
    left, right = subspace_overlap(A, B, 2)  # {e0, e1} twice; {e1, e2} and {e1, e3}
    assert (left.item(), right.item()) == pytest.approx((1, 0.5))


def test_overlap_of_random_subspaces_is_rank_over_dimension():
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 500, 12, 12, generator=g, dtype=F64)
    for part in subspace_overlap(A, B, 3):
        standard_error = part.std() / 500**0.5
        assert abs(part.mean() - 3 / 12) < 4 * standard_error


def test_bad_attention():
    q, K, V = tokens(0, 5, 4, 3)
    where = torch.tensor([True, True, False, False, False])
    with pytest.raises(ValueError, match=r"given were \(3,\), \(5, 4\) and \(5, 3\)"):
        split_attention(q[:3], K, V, where)
    with pytest.raises(ValueError, match=r"given were \(4,\), \(5, 4\) and \(4, 3\)"):
        split_attention(q, K, V[:4], where)
    with pytest.raises(ValueError, match=r"booleans \(5,\), one a key, not"):
        split_attention(q, K, V, where[:4])
    with pytest.raises(ValueError, match="booleans"):
        split_attention(q, K, V, where.long())
    K[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        split_attention(q, K, V, where)
    with pytest.raises(ValueError, match=r"as many: \(4, 3\) and \(5, 4\)"):
        attention_weight(V[:4], K)
    with pytest.raises(ValueError, match="no tokens"):
        attention_weight(V[:0], K[:0])
    with pytest.raises(ValueError, match="rank must be 1 to 3, not 4"):
        subspace_overlap(V.mT @ V, V.mT @ V, 4)
