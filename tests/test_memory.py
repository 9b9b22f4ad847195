"""Online learners against the recurrences of their papers, written here as loops."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from icl.attention.shared import distances
from icl.duality import linear_attention
from icl.memory import (
    State,
    chunkwise,
    conjugate_gradients,
    learn,
    linear,
    mesa,
    mlp,
    residual,
)

F64 = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def draw(T=23, d_k=5, d_v=4, B=2, H=3, seed=0, dtype=F64):
    """Queries, unit keys and values."""
    g = torch.Generator().manual_seed(seed)
    widths = (d_k, d_k, d_v)
    q, k, v = (torch.randn(B, H, T, d, generator=g, dtype=F64) for d in widths)
    return [x.to(dtype) for x in (q, normalize(k, dim=-1), v)]


def rate(low, high, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=g, dtype=F64)


# --- the table: layer, setting of the learner, recurrence of its paper ----------------

BETA = rate(0, 2, 2, 3, 23, seed=1)
DECAY = rate(0.3, 1, 2, 3, 23, seed=2)
MU = rate(0, 0.9, 2, 3, 23, seed=3)
LAMBDA, WIDTH = 0.3, 6


def linear_sum(q, k, v, b, a, mu):
    return [sum(v[i] * (k[i] @ q[t]) for i in range(t + 1)) for t in range(len(q))]


def retention(q, k, v, b, a, mu):
    """Its parallel form, with a constant decay."""
    return [
        sum(0.9 ** (t - i) * v[i] * (k[i] @ q[t]) for i in range(t + 1))
        for t in range(len(q))
    ]


def momentum_sum(q, k, v, b, a, mu):
    """Every step repeated, ever smaller: a closed sum with a constant momentum."""
    return [
        sum((1 - 0.8 ** (t - i + 1)) / 0.2 * v[i] * (k[i] @ q[t]) for i in range(t + 1))
        for t in range(len(q))
    ]


def states(step):
    """A paper's ``S_t`` from ``S_{t-1}``, ``(d_v, d_k)``, read by ``S_t q_t``."""

    def run(q, k, v, b, a, mu):
        S, out = torch.zeros(v.shape[1], k.shape[1], dtype=F64), []
        for t in range(len(q)):
            S = step(S, k[t], v[t], b[t], a[t])
            out.append(S @ q[t])
        return out

    return run


I5 = torch.eye(5, dtype=F64)
mamba2 = states(lambda S, k, v, b, a: a * S + b * torch.outer(v, k))
delta_net = states(
    lambda S, k, v, b, a: S @ (I5 - b * torch.outer(k, k)) + b * torch.outer(v, k)
)
gated_delta_net = states(
    lambda S, k, v, b, a: S @ (a * (I5 - b * torch.outer(k, k))) + b * torch.outer(v, k)
)
# the objective's normal equations; Longhorn's closed form is in the next
longhorn_objective = states(
    lambda S, k, v, b, a: torch.linalg.solve(
        I5 + b * torch.outer(k, k), S + b * torch.outer(v, k), left=False
    )
)


@states
def longhorn(S, k, v, b, a):
    delta = b / (1 + b * k @ k)
    return (1 - delta * k**2) * S + delta * torch.outer(v, k)


def titans(q, k, v, b, a, mu):
    S = M = torch.zeros(v.shape[1], k.shape[1], dtype=F64)
    out = []
    for t in range(len(q)):
        S = mu[t] * S - b[t] * torch.outer(M @ k[t] - v[t], k[t])
        M = a[t] * M + S  # their 1 - α
        out.append(M @ q[t])
    return out


def heavy_ball(q, k, v, b, a, mu):
    """Polyak's, with the difference of the last two weights."""
    W = last = torch.zeros(v.shape[1], k.shape[1], dtype=F64)
    out = []
    for t in range(len(q)):
        slope = torch.outer(W @ k[t] - v[t], k[t])
        W, last = W - b[t] * slope + 0.8 * (W - last), W
        out.append(W @ q[t])
    return out


def mesa_layer(q, k, v, b, a, mu):
    G, H = np.zeros((v.shape[1], k.shape[1])), np.zeros((k.shape[1], k.shape[1]))
    out = []
    for t in range(len(q)):
        G = a[t].item() * G + b[t].item() * np.outer(v[t], k[t])
        H = a[t].item() * H + b[t].item() * np.outer(k[t], k[t])
        x = np.linalg.solve(H + LAMBDA * np.eye(len(H)), q[t].numpy())
        out.append(torch.from_numpy(G @ x))
    return out


def preconditioned_delta_net(q, k, v, b, a, mu):
    """With a diagonal of the curvature; the form of its abstract, not its text."""
    S, D = torch.zeros(v.shape[1], k.shape[1], dtype=F64), 1.0
    out = []
    for t in range(len(q)):
        D = D + b[t] / 2 * k[t] ** 2
        S = S + torch.outer(b[t] / 2 * (v[t] - S @ k[t]), k[t] / D)
        out.append(S @ q[t])
    return out


def initial(*shape):
    g = torch.Generator().manual_seed(9)
    return torch.randn(shape, generator=g, dtype=F64) / shape[-1] ** 0.5


W_1, W_2 = initial(WIDTH, 5), initial(4, WIDTH)
W_SQUARE = initial(5, 5)


def copies(*weights):
    return State(tuple(w.expand(2, 3, *w.shape) for w in weights))


def mlp_slopes(W_1, W_2, k, v):
    """Backpropagation by hand; the derivative of GELU is Φ(z) + z φ(z)."""
    z = W_1 @ k
    Phi = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    error = W_2 @ (z * Phi) - v
    dz = (W_2.mT @ error) * (Phi + z * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    return torch.outer(dz, k), torch.outer(error, z * Phi)


def titans_mlp(q, k, v, b, a, mu):
    first, second, out = W_1, W_2, []
    S_1, S_2 = torch.zeros_like(W_1), torch.zeros_like(W_2)
    for t in range(len(q)):
        slope_1, slope_2 = mlp_slopes(first, second, k[t], v[t])
        S_1, S_2 = (
            mu[t] * S_1 - b[t] / 9 * slope_1,
            mu[t] * S_2 - b[t] / 9 * slope_2,
        )
        first, second = a[t] * first + S_1, a[t] * second + S_2
        z = first @ q[t]
        out.append(second @ (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))))
    return out


def normed(z):
    centred = z - z.mean()
    spread = torch.sqrt((centred**2).mean() + 1e-5)
    return centred / spread, spread


def ttt_linear(q, k, v, b, a, mu):
    """Minibatches of 4, LayerNorm and residual; its gradient by hand."""
    W, out = W_SQUARE, []
    for t in range(len(q)):
        if t % 4 == 0:
            anchor = W
        z, spread = normed(anchor @ k[t])
        error = k[t] + z - v[t]
        error = (error - error.mean() - z * (error * z).mean()) / spread
        W = W - b[t] / 9 * torch.outer(error, k[t])
        out.append(q[t] + normed(W @ q[t])[0])
    return out


TABLE = [
    ("linear attention", linear_sum, {"loss": "inner"}, chunkwise),
    ("RetNet", retention, {"loss": "inner", "decay": 0.9}, chunkwise),
    ("Mamba-2", mamba2, {"loss": "inner", "beta": BETA, "decay": DECAY}, chunkwise),
    ("momentum attention", momentum_sum, {"loss": "inner", "momentum": 0.8}, chunkwise),
    ("DeltaNet", delta_net, {"beta": BETA}, chunkwise),
    ("Gated DeltaNet", gated_delta_net, {"beta": BETA, "decay": DECAY}, chunkwise),
    ("heavy ball", heavy_ball, {"beta": BETA, "momentum": 0.8}, chunkwise),
    (
        "Titans, linear",
        titans,
        {"beta": BETA, "decay": DECAY, "momentum": MU, "decayed": False},
        chunkwise,
    ),
    (
        "Longhorn, its objective",
        longhorn_objective,
        {"beta": BETA, "implicit": True},
        chunkwise,
    ),
    (
        "Longhorn, as published",
        longhorn,
        {"beta": BETA, "implicit": True, "loss": "separable"},
        None,
    ),
    (
        "Mesa",
        mesa_layer,
        {
            "beta": BETA,
            "decay": DECAY,
            "decayed": False,
            "precondition": "full",
            "ridge": LAMBDA,
        },
        mesa,
    ),
    (
        "Preconditioned DeltaNet",
        preconditioned_delta_net,
        {"beta": BETA / 2, "precondition": "diagonal"},
        None,
    ),
    (
        "Titans, MLP",
        titans_mlp,
        {
            "beta": BETA / 9,
            "decay": DECAY,
            "momentum": MU,
            "decayed": False,
            "model": mlp,
            "state": copies(W_1, W_2),
        },
        None,
    ),
    (
        "TTT-linear",
        ttt_linear,
        {
            "beta": BETA / 9,
            "minibatch": 4,
            "model": residual(linear),
            "state": copies(W_SQUARE),
        },
        None,
    ),
]


@pytest.mark.parametrize(("layer", "recurrence", "setting", "fast"), TABLE)
def test_a_layer_is_a_setting_of_the_learner(layer, recurrence, setting, fast):
    q, k, v = draw(d_v=5 if layer == "TTT-linear" else 4)
    expected = torch.zeros_like(v)
    for at in np.ndindex(2, 3):
        rows = (x[at] for x in (q, k, v, BETA, DECAY, MU))
        expected[at] = torch.stack(recurrence(*rows))
    found, _ = learn(q, k, v, **setting)
    difference = (found - expected).abs().max().item()
    print(f"{layer}: {difference:.1e}")
    assert difference < 1e-10
    if fast:
        setting = {
            name: x
            for name, x in setting.items()
            if fast is chunkwise or name in ("beta", "decay", "ridge")
        }
        assert (fast(q, k, v, chunk=7, **setting)[0] - expected).abs().max() < 1e-10


# --- by chunks ------------------------------------------------------------------------


def shapes(B, H, T):
    """Which a rate may have."""
    return st.sampled_from([(), (H, 1), (T,), (B, 1, 1), (B, H, T)])


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_chunks_are_the_recurrence(data):
    T, chunk = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 50))
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
    expected, last = learn(q, k, v, state=State(**start), **options)
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


@pytest.mark.parametrize("chunk", [1, 13, 64, 300])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "inner"},
        {"loss": "inner", "decay": 0.99, "momentum": 0.9},
        {"beta": 2.0},
        {"beta": 1.0, "decay": 1e-20 ** rate(0, 1, 300)},
        {"beta": 1.0, "decay": 0.97, "momentum": 0.5, "decayed": False},
    ],
)
def test_in_single_precision(options, chunk):
    inputs = [x.requires_grad_() for x in draw(300, 16, 8, dtype=torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact[1] = normalize(exact[1], dim=-1)
    found, _ = chunkwise(*inputs, chunk=chunk, **options)
    expected, _ = learn(*exact, **options)
    of_found = torch.autograd.grad(found.square().sum(), inputs)
    of_expected = torch.autograd.grad(expected.square().sum(), exact)
    for a, b in zip((found, *of_found), (expected, *of_expected), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_equal_keys_at_the_edge_of_stability():
    """The triangular system is then as far from diagonal as can be."""
    q, k, v = draw(500)
    k = k[:, :, :1].expand_as(k)
    for beta in (1.0, 2.0, BETA[:, :, :1]):
        close(chunkwise(q, k, v, beta)[0], learn(q, k, v, beta)[0])


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


# --- what must be true of them --------------------------------------------------------

FORMS = [
    partial(learn, beta=BETA, decay=DECAY, momentum=MU),
    partial(learn, beta=BETA, implicit=True, loss="separable", decay=DECAY),
    partial(learn, beta=BETA / 2, precondition="diagonal", decay=DECAY),
    partial(learn, beta=BETA, precondition="full", decay=DECAY, decayed=False),
    partial(learn, beta=BETA / 9, model=mlp, momentum=MU, state=copies(W_1, W_2)),
    partial(learn, beta=BETA, decay=DECAY, minibatch=5),
    partial(chunkwise, beta=BETA, decay=DECAY, momentum=MU, chunk=4),
    partial(chunkwise, beta=BETA, decay=DECAY, chunk=6),
    partial(mesa, beta=BETA, decay=DECAY, chunk=7),
]


def cut(form, tokens):
    """The form told the rates of some tokens."""
    told = {
        name: x[:, :, tokens] if isinstance(x, torch.Tensor) else x
        for name, x in form.keywords.items()
    }
    return partial(form.func, **told)


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_nothing(form):
    q, k, v = draw()
    other = draw(seed=7)
    mixed = [
        torch.cat([a[:, :, :11], b[:, :, 11:]], 2)
        for a, b in zip((q, k, v), other, strict=True)
    ]
    close(form(*mixed)[0][:, :, :11], form(q, k, v)[0][:, :, :11])
    assert (form(*mixed)[0][:, :, 11] - form(q, k, v)[0][:, :, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_what_is_continued_is_one_pass(form):
    q, k, v = draw()
    whole, state, *_ = form(q, k, v)
    parts, then = [], {}
    for tokens in (slice(0, 10), slice(10, 15), slice(15, 23)):
        given_ = (x[:, :, tokens] for x in (q, k, v))
        out, after, *_ = cut(form, tokens)(*given_, **then)
        parts.append(out)
        then = {"state": after}
    close(torch.cat(parts, 2), whole)
    close(after, state)


def test_the_forms_of_a_layer_share_their_states():
    q, k, v = draw()
    setting = {"beta": BETA[:, :, :12], "decay": DECAY[:, :, :12], "ridge": 0.5}
    full = {"precondition": "full", "decayed": False, "ridge": 0.5}
    first, second = (
        [x[:, :, t] for x in (q, k, v)] for t in (slice(12), slice(12, 23))
    )
    _, from_loop = learn(*first, **setting | full)
    _, from_mesa, _ = mesa(*first, **setting)
    close(from_loop, from_mesa._replace(velocity=from_loop.velocity))
    ahead, _ = learn(*second, state=from_mesa, **full)
    close(mesa(*second, ridge=0.5, state=from_loop)[0], ahead)


def test_linear_attention_is_that_of_the_book():
    q, k, v = draw()
    found, state = chunkwise(q, k, v, loss="inner", chunk=8)
    for t in range(23):
        seen = v[1, 2, : t + 1], k[1, 2, : t + 1], q[1, 2, t]
        close(found[1, 2, t], linear_attention(*seen))
    close(state.weights[0], v.mT @ k)
    counts = distances(None, 23, 23, q.device)[0]
    weights = (0.7 ** counts.double()).masked_fill(counts < 0, 0)
    decayed, _ = chunkwise(q, k, v, loss="inner", decay=0.7, chunk=8)
    close(decayed, (weights * (q @ k.mT)) @ v)


@pytest.mark.parametrize("loss", ["inner", "squared"])
def test_the_gradient_is_that_of_autograd(loss):
    q, k, v = draw()
    options = {"beta": BETA, "decay": DECAY, "momentum": MU, "loss": loss}
    same = lambda weights, x: linear(weights, x)  # noqa: E731  not known as linear
    start = copies(initial(4, 5))
    close(
        learn(q, k, v, state=start, **options),
        learn(q, k, v, state=start, model=same, **options),
    )


def test_the_separable_gradient_is_that_of_autograd():
    q, k, v = (x[:1, :1, :1] for x in draw())
    W = initial(1, 1, 4, 5).requires_grad_()
    loss = (W * k[:, :, 0, None] - v[:, :, 0, :, None]).square().sum() / 2
    (slope,) = torch.autograd.grad(loss, W)
    _, after = learn(q, k, v, 0.7, loss="separable", state=State((W.detach(),)))
    close(after.weights[0], (W - 0.7 * slope).detach())


def test_orthonormal_keys_are_recalled_exactly():
    _, _, v = draw(16)
    basis, _ = torch.linalg.qr(initial(16, 16))
    k = basis.expand(2, 3, 16, 16)
    back = torch.arange(15, -1, -1)
    for attend in (learn, chunkwise):
        _, state = attend(k, k, v, 1.0)
        close(attend(k[:, :, back], k, 0 * v, 0.0, state=state)[0], v[:, :, back])


def test_mesa_is_ridge_regression():
    q, k, v = draw(40)
    found, state, _ = mesa(q, k, v, ridge=0.2)
    for at in np.ndindex(2, 3):
        X, Y = k[at].numpy(), v[at].numpy()
        W = np.linalg.lstsq(
            np.concatenate([X, np.sqrt(0.2) * np.eye(5)]),
            np.concatenate([Y, np.zeros((5, 4))]),
            rcond=None,
        )[0]
        close(found[at][-1], torch.from_numpy(W.T) @ q[at][-1])
        close(state.weights[0][at], torch.from_numpy(W.T))


def test_an_endless_implicit_step_projects():
    """On the weights that fit the pair, W k = v, and as near as these are."""
    q, k, v = draw(1)
    k, W = 3 * k, initial(2, 3, 4, 5)
    _, after = chunkwise(q, k, v, 1e14, implicit=True, state=State((W,)))
    found, k, v = after.weights[0], k[:, :, 0, :, None], v[:, :, 0, :, None]
    close(found @ k, v)
    close(found, W + (v - W @ k) @ torch.linalg.pinv(k))


def test_a_batch_of_all_tokens_is_linear_attention_and_of_one_delta():
    """Sun et al.: with W_0 = 0, gradients at the start are those of the values."""
    q, k, v = draw()
    summed, _ = learn(q, k, v, BETA, loss="inner")
    close(learn(q, k, v, BETA, minibatch=23)[0], summed)
    delta, _ = learn(q, k, v, BETA)
    assert (learn(q, k, v, BETA, minibatch=22)[0] - summed).abs().max() > 1e-3
    assert (learn(q, k, v, BETA, minibatch=2)[0] - delta).abs().max() > 1e-3


def test_a_token_several_times_is_a_longer_step():
    """n steps on a pair leave (1 - β)ⁿ of its error, for unit keys."""
    q, k, v = draw()
    again = (x.repeat_interleave(3, 2) for x in (q, k, v))
    found = learn(*again, 0.3)[0][:, :, 2::3]
    close(found, chunkwise(q, k, v, 1 - 0.7**3)[0])


def test_conjugate_gradients_solve_and_differentiate():
    root = initial(3, 6, 6)
    A = (root @ root.mT + 0.1 * torch.eye(6, dtype=F64)).requires_grad_()
    b = initial(3, 6).requires_grad_()
    x, found = conjugate_gradients(lambda x: (A @ x[..., None])[..., 0], b)
    exact = torch.linalg.solve(A, b)
    close(x, exact)
    assert found.max() < 1e-13
    gradients = [torch.autograd.grad(y.pow(3).sum(), (A, b)) for y in (x, exact)]
    symmetric = [((of_A + of_A.mT) / 2, of_b) for of_A, of_b in gradients]
    close(*symmetric)


def regression(q, k, v, beta, decay, ridge):
    """Mesa with dense sums and solves, all that it needs: ``o, x, H, G``."""
    H = G = torch.zeros(1, dtype=F64)
    out, solved = [], []
    for t in range(q.shape[2]):
        b, a = beta[:, :, t, None, None], decay[:, :, t, None, None]
        row, column = k[:, :, t, None], v[:, :, t, :, None]
        H, G = a * H + b * row.mT * row, a * G + b * column * row
        A = H + ridge * torch.eye(q.shape[-1], dtype=F64)
        solved.append(torch.linalg.solve(A, q[:, :, t]))
        out.append((G @ solved[-1][..., None])[..., 0])
    return torch.stack(out, 2), torch.stack(solved, 2), H, G


def test_gradients_of_mesa():
    inputs = [*draw(9), rate(0.1, 2, 2, 3, 9), rate(0.5, 1, 2, 3, 9)]
    q, k, v, beta, decay = inputs = [x.requires_grad_() for x in inputs]
    out, _, H, _ = regression(*inputs, 0.4)
    expected = torch.autograd.grad((out**3).sum() + (H**2).sum(), inputs)
    options = {"beta": beta, "decay": decay, "ridge": 0.4}
    full = {"precondition": "full", "decayed": False}
    for attend in (partial(mesa, chunk=4), partial(learn, **full)):
        out, state, *_ = attend(q, k, v, **options)
        total = (out**3).sum() + (state.curvature**2).sum()
        close(torch.autograd.grad(total, inputs), expected)


def test_conjugate_gradients_say_that_they_did_not_converge():
    q, k, v = draw(60, 24)
    with pytest.warns(RuntimeWarning, match="did not converge in 3 iterations: the "):
        found, _, off = mesa(q, k, v, ridge=1e-3, iterations=3)
    one = torch.ones(2, 3, 60, dtype=F64)
    exact, x, _, _ = regression(q, k, v, one, one, 1e-3)
    assert (found - exact).abs().max() > 1e-2
    assert off.max() > 1e-2
    assert off[:, :, :2].max() < 1e-12  # no more eigenvalues than iterations
    found, _, off = mesa(q, k, v, ridge=1e-3, iterations=99)
    assert off.max() < 1e-13
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)  # condition 1e4
    A = torch.diag(torch.logspace(0, 4, 24, dtype=F64))
    with pytest.warns(RuntimeWarning, match="more iterations or a larger ridge"):
        x, off = conjugate_gradients(lambda x: x @ A, q, None, 5)
    close(off, (q - x @ A).norm(dim=-1) / q.norm(dim=-1))


def test_nothing_to_solve_is_solved():
    zero = torch.zeros(2, 3, dtype=F64)
    x, off = conjugate_gradients(lambda x: 2 * x, zero)
    assert not x.any()
    assert not off.any()


# --- what is refused ------------------------------------------------------------------


LONG = draw(600, 16, 16, 1, 1, dtype=torch.float32)


@pytest.mark.parametrize("attend", [learn, chunkwise])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"beta": 2.1},
            r"stable in \[0, 2\], not at 2.1, .*Normalise the keys and keep",
        ),
        ({"beta": -0.1}, r"stable in \[0, 2\], not at -0.1"),
        ({"key": 3 * draw()[1]}, r"not at 9, of β\|k\|², where \|k\|² is up to 9"),
        ({"beta": -0.1, "implicit": True}, "beta must be 0 or more, not -0.1"),
        ({"beta": math.nan}, "beta must be finite for every token, not nan"),
        ({"loss": "inner", "beta": math.inf}, "beta must be finite"),
        (
            {"beta": torch.ones(2, 3)},
            r"broadcast to \(B, H, T\), here \(2, 3, 23\); its",
        ),
        ({"beta": torch.ones(1, 2, 3, 23)}, "broadcast to"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\] for every token, not 0"),
        ({"decay": 1.01}, r"decay must be in \(0, 1\] for every token, not 1.01"),
        ({"decay": DECAY - 0.5}, r"decay must be in \(0, 1\]"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) for every token, not 1"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\)"),
        ({"loss": "hinge"}, "loss is one of 'inner', 'squared'.*, not 'hinge'"),
        (
            {"query": draw(22)[0]},
            r"none of them empty, not \(2, 3, 22, 5\), \(2, 3, 23",
        ),
        ({"value": draw(22)[2]}, "none of them empty"),
        ({"value": draw()[2][0]}, "none of them empty"),
        (
            {"key": draw()[1].float()},
            "be float32 or all float64, not torch.float64, ",
        ),
        ({"value": draw()[2] / 0}, "some value is not finite"),
        ({"key": draw()[1] * math.nan}, "some key is not finite"),
        (
            {"state": copies(W_1)},
            r"one weight \(2, 3, 4, 5\), and .* not \(2, 3, 6, 5\)",
        ),
        ({"state": copies(W_2, W_2)}, r"not \(2, 3, 4, 6\), \(2, 3, 4, 6\)"),
    ],
)
def test_bad_input_is_refused(attend, change, message):
    q, k, v = draw()
    with pytest.raises(ValueError, match=message):
        attend(**(dict(query=q, key=k, value=v) | change))


@pytest.mark.parametrize(
    ("attend", "change", "message"),
    [
        (chunkwise, {"chunk": 0}, "chunk is 1 or more, not 0"),
        (
            chunkwise,
            {"loss": "separable"},
            "is one of 'inner', 'squared', not 'separab",
        ),
        (mesa, {"chunk": -1}, "chunk is 1 or more, not -1"),
        (mesa, {"iterations": 0}, "iterations is 1 or more, not 0"),
        (mesa, {"ridge": 0.0}, "ridge must be positive and finite, not 0.0"),
        (mesa, {"beta": -1.0}, "beta must be 0 or more, not -1"),
        (learn, {"minibatch": 0}, "minibatch is 1 or more, not 0"),
        (
            learn,
            {"precondition": "half"},
            "one of None, 'diagonal', 'full', not 'half'",
        ),
        (learn, {"precondition": "full", "ridge": math.inf}, "ridge must be positive"),
        (learn, {"model": mlp}, "needs a state with its weights"),
        (
            learn,
            {"model": mlp, "state": copies(W_1, W_2), "implicit": True},
            "are for the linear model alone",
        ),
        (
            learn,
            {"precondition": "diagonal", "ridge": 1e-6, "key": draw()[1] + 9},
            r"stable in \[0, 2\], not at .*Raise the ridge, or take implicit=True",
        ),
        (
            learn,
            {"model": mlp, "state": copies(W_1, W_2), "beta": 1e300},
            "the learner diverges: take a smaller beta",
        ),
        (
            chunkwise,
            {"beta": 1.9, "momentum": 0.9}
            | dict(zip(("query", "key", "value"), LONG, strict=True)),
            r"the learner diverges: .* at most 2 \(1 - momentum\)",
        ),
    ],
)
def test_bad_settings_are_refused(attend, change, message):
    q, k, v = draw()
    with pytest.raises(ValueError, match=message):
        attend(**(dict(query=q, key=k, value=v) | change))


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
