"""A linear layer trained by gradient descent is linear attention: in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.duality import dual_prediction, linear_attention, step_weights, train_linear

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
