"""The loop by chunks of tokens: the same numbers, in linear memory, and stable."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import BETA, F64, close, draw, initial, rate
from torch.nn.functional import normalize

from icl.online import State, chunkwise, linear, mesa, recurrent


def shapes(B, H, T):
    """Which a rate may have."""
    return st.sampled_from([(), (H, 1), (T,), (B, 1, 1), (B, H, T)])


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_chunks_are_the_recurrence(data):
    T, chunk = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 30))
    q, k, v = inputs = draw(T, B=2, H=2, seed=data.draw(st.integers(0, 999)))
    shape = shapes(2, 2, T)
    lowest = data.draw(st.sampled_from([1e-300, 1e-30, 1e-3, 0.5, 0.999]))
    beta = rate(0, 2, *data.draw(shape), seed=1)
    decay = lowest ** rate(0, 1, *data.draw(shape), seed=2)
    options = data.draw(
        st.fixed_dictionaries(
            {
                "loss": st.sampled_from(["inner", "squared"]),
                "implicit": st.booleans(),
                "decayed": st.booleans(),
            }
        )
    )
    learned = [*inputs, beta, decay, initial(2, 2, 4, 5)]
    start = {"weights": (learned[-1],)}
    options |= {"beta": beta, "decay": decay}
    if data.draw(st.booleans()):
        mu = rate(0, 0.95, *data.draw(shape), seed=3)
        mu = mu * data.draw(st.sampled_from([0.0, 1.0]))
        learned += [mu, initial(2, 2, 4, 5)]
        start["velocity"] = (learned[-1],)
        options["momentum"] = mu
    for x in learned:
        x.requires_grad_()
    found, after = chunkwise(q, k, v, chunk=chunk, state=State(**start), **options)
    expected, last = recurrent(q, k, v, state=State(**start), **options)
    close(found, expected)
    close(after, last)
    g = torch.Generator().manual_seed(5)
    heads = [
        torch.randn(x.shape, generator=g, dtype=F64)
        for x in (expected, last.weights[0], last.velocity[0])
    ]
    gradients = [
        torch.autograd.grad((x, s.weights[0], s.velocity[0]), learned, heads)
        for x, s in ((found, after), (expected, last))
    ]
    close(*gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "inner"},
        {"loss": "inner", "decay": 0.99, "momentum": 0.9},
        {"beta": 2.0},
        {"beta": 1.0, "decay": 1e-20 ** rate(0, 1, 200)},
        {"beta": 1.0, "decay": 0.97, "momentum": 0.5, "decayed": False},
    ],
)
def test_in_single_precision(options):
    inputs = [x.requires_grad_() for x in draw(200, 16, 8, dtype=torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact[1] = normalize(exact[1], dim=-1)
    expected, _ = recurrent(*exact, **options)
    of_expected = torch.autograd.grad(expected.square().sum(), exact)
    for chunk in (1, 13, 64, 200):
        found, _ = chunkwise(*inputs, chunk=chunk, **options)
        of_found = torch.autograd.grad(found.square().sum(), inputs)
        for a, b in zip((found, *of_found), (expected, *of_expected), strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_equal_keys_at_the_edge_of_stability():
    """The triangular system is then as far from diagonal as can be."""
    q, k, v = draw(300)
    k = k[:, :, :1].expand_as(k)
    for beta in (1.0, 2.0, BETA[:, :, :1]):
        close(chunkwise(q, k, v, beta)[0], recurrent(q, k, v, beta)[0])


def test_memory_of_the_parallel_forms_is_linear():
    """What autograd keeps for backward, in numbers a token."""

    def kept(tokens, attend):
        inputs = [x.requires_grad_() for x in draw(tokens, 16, 16, 1, 1)]
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attend(*inputs)[0]
        total = sum(seen.values())
        assert out.requires_grad
        return total / tokens

    for attend in (chunkwise, partial(mesa, ridge=10.0)):
        assert kept(2048, attend) < 1.05 * kept(512, attend)


def test_linear_attention_is_a_sum_of_values():
    q, k, v = draw()
    found, state = chunkwise(q, k, v, loss="inner", chunk=8)
    for t in range(23):
        keys, values = (x[1, 2, : t + 1] for x in (k, v))
        close(found[1, 2, t], (q[1, 2, t] @ keys.T) @ values)
    close(state.weights[0], v.mT @ k)
    age = torch.arange(23)[:, None] - torch.arange(23)
    weights = (0.7 ** age.double()).masked_fill(age < 0, 0)
    decayed, _ = chunkwise(q, k, v, loss="inner", decay=0.7, chunk=8)
    close(decayed, (weights * (q @ k.mT)) @ v)


def test_an_endless_implicit_step_projects():
    """On the weights that fit the pair, W k = v, and as near as these are."""
    q, k, v = draw(1)
    k, W = 3 * k, initial(2, 3, 4, 5)
    _, after = chunkwise(q, k, v, 1e14, implicit=True, state=State((W,)))
    found, k, v = after.weights[0], k[:, :, 0, :, None], v[:, :, 0, :, None]
    close(found @ k, v)
    close(found, W + (v - W @ k) @ torch.linalg.pinv(k))


def test_any_implicit_step_is_stable():
    """It leaves 1/(1 + β|k|²) of the error on the pair."""
    q, k, v = (x.repeat(1, 1, 9, 1) for x in draw())
    k, strength = 30 * k, 1 + 50 * 900
    _, before = chunkwise(*(x[:, :, :-1] for x in (q, k, v)), 50.0, implicit=True)
    found, _ = chunkwise(k, k, v, 50.0, implicit=True)
    error = linear(before.weights, k[:, :, -1]) - v[:, :, -1]
    close(strength * (found - v)[:, :, -1], error, rtol=1e-8, atol=1e-8)
    assert found.abs().max() < 2 * v.abs().max()


def test_with_momentum_what_a_step_adds_up_to_must_be_stable():
    """At β = 2 (1 - μ), and not above it; a single key would allow 2 (1 + μ)."""
    _, k, v = draw(2000, 16, 16, 1, 1)
    largest = {}
    for beta in (1.0, 1.2):
        out, _ = chunkwise(k, k, v, beta, momentum=0.5)
        largest[beta] = out[:, :, 1000:].abs().max() / v.abs().max()
    assert largest[1.0] < 5
    assert largest[1.2] > 1e3
    one = k[:, :, :1].expand_as(k)
    assert chunkwise(one, one, v, 1.9, momentum=0.5)[0].abs().max() < 10 * v.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"chunk": 0}, "chunk"), ({"loss": "separable"}, "separable")],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        chunkwise(*draw(), **change)


def test_a_learner_that_diverges_is_refused():
    inputs = draw(600, 16, 16, 1, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="momentum"):
        chunkwise(*inputs, 1.9, momentum=0.9)


def test_a_state_with_curvature_is_refused():
    q, k, v = draw()
    _, state, *_ = mesa(q, k, v, beta=BETA)
    with pytest.raises(ValueError, match="curvature"):
        chunkwise(q, k, v, state=state)
