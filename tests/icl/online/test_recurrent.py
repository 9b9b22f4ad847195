"""The loop against the recurrences of the layers' papers, written here as loops."""

import math

import numpy as np
import pytest
import torch
from pairs import BETA, DECAY, F64, MU, W_1, W_2, close, copies, draw, initial

from icl.online import State, chunkwise, linear, mesa, mlp, recurrent, residual

LAMBDA, W_SQUARE = 0.3, initial(5, 5)


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
def test_a_layer_is_a_setting_of_the_loop(layer, recurrence, setting, fast):
    q, k, v = draw(d_v=5 if layer == "TTT-linear" else 4)
    expected = torch.zeros_like(v)
    for at in np.ndindex(2, 3):
        rows = (x[at] for x in (q, k, v, BETA, DECAY, MU))
        expected[at] = torch.stack(recurrence(*rows))
    found, _ = recurrent(q, k, v, **setting)
    assert (found - expected).abs().max() < 1e-10
    if fast:
        setting = {
            name: x
            for name, x in setting.items()
            if fast is chunkwise or name in ("beta", "decay", "ridge")
        }
        assert (fast(q, k, v, chunk=7, **setting)[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("loss", ["inner", "squared"])
def test_the_gradient_is_that_of_autograd(loss):
    q, k, v = draw()
    options = {"beta": BETA, "decay": DECAY, "momentum": MU, "loss": loss}
    same = lambda weights, x: linear(weights, x)  # noqa: E731  not known as linear
    start = copies(initial(4, 5))
    close(
        recurrent(q, k, v, state=start, **options),
        recurrent(q, k, v, state=start, model=same, **options),
    )


def test_the_separable_gradient_is_that_of_autograd():
    q, k, v = (x[:1, :1, :1] for x in draw())
    W = initial(1, 1, 4, 5).requires_grad_()
    loss = (W * k[:, :, 0, None] - v[:, :, 0, :, None]).square().sum() / 2
    (slope,) = torch.autograd.grad(loss, W)
    _, after = recurrent(q, k, v, 0.7, loss="separable", state=State((W.detach(),)))
    close(after.weights[0], (W - 0.7 * slope).detach())


def test_orthonormal_keys_are_recalled_exactly():
    _, _, v = draw(16)
    basis, _ = torch.linalg.qr(initial(16, 16))
    k = basis.expand(2, 3, 16, 16)
    back = torch.arange(15, -1, -1)
    for attend in (recurrent, chunkwise):
        _, state = attend(k, k, v, 1.0)
        close(attend(k[:, :, back], k, 0 * v, 0.0, state=state)[0], v[:, :, back])


def test_a_batch_of_all_tokens_is_linear_attention_and_of_one_delta():
    """Sun et al.: with W_0 = 0, gradients at the start are those of the values."""
    q, k, v = draw()
    summed, _ = recurrent(q, k, v, BETA, loss="inner")
    close(recurrent(q, k, v, BETA, minibatch=23)[0], summed)
    delta, _ = recurrent(q, k, v, BETA)
    assert (recurrent(q, k, v, BETA, minibatch=22)[0] - summed).abs().max() > 1e-3
    assert (recurrent(q, k, v, BETA, minibatch=2)[0] - delta).abs().max() > 1e-3


def test_a_token_several_times_is_a_longer_step():
    """n steps on a pair leave (1 - β)ⁿ of its error, for unit keys."""
    q, k, v = draw()
    again = (x.repeat_interleave(3, 2) for x in (q, k, v))
    found = recurrent(*again, 0.3)[0][:, :, 2::3]
    close(found, chunkwise(q, k, v, 1 - 0.7**3)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minibatch": 0}, "minibatch"),
        ({"precondition": "half"}, "half"),
        ({"precondition": "full", "ridge": math.inf}, "ridge"),
        ({"precondition": "full", "ridge": 0.0}, "ridge"),
        ({"precondition": "full", "iterations": 0}, "iterations"),
        ({"precondition": "diagonal", "beta": -0.1}, "-0.1"),
        ({"loss": "separable", "beta": 9.0}, "β"),
        ({"model": mlp}, "state"),
        ({"model": mlp, "state": copies(W_1, W_2), "implicit": True}, "implicit"),
        ({"model": mlp, "state": copies(W_1, W_2), "loss": "separable"}, "separable"),
        (
            {"model": mlp, "state": copies(W_1, W_2), "precondition": "full"},
            "precondition",
        ),
        ({"precondition": "diagonal", "ridge": 1e-6, "key": draw()[1] + 9}, "ridge"),
        ({"model": mlp, "state": copies(W_1, W_2), "beta": 1e300}, "diverges"),
    ],
)
def test_settings_that_are_refused(change, message):
    q, k, v = draw()
    with pytest.raises(ValueError, match=message):
        recurrent(**(dict(query=q, key=k, value=v) | change))
