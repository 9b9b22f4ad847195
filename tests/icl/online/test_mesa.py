"""The Mesa layer as ridge regression, and the solver below it."""

from functools import partial

import numpy as np
import pytest
import torch
from pairs import F64, close, draw, initial, rate

from icl.online import conjugate_gradients, mesa, recurrent


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
    for attend in (partial(mesa, chunk=4), partial(recurrent, **full)):
        out, state, *_ = attend(q, k, v, **options)
        total = (out**3).sum() + (state.curvature**2).sum()
        close(torch.autograd.grad(total, inputs), expected)


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


def test_conjugate_gradients_say_that_they_did_not_converge():
    q, k, v = draw(60, 24)
    with pytest.warns(RuntimeWarning, match="after 3 iterations"):
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
    with pytest.warns(RuntimeWarning, match="after 5 iterations"):
        x, off = conjugate_gradients(lambda x: x @ A, q, None, 5)
    close(off, (q - x @ A).norm(dim=-1) / q.norm(dim=-1))


def test_nothing_to_solve_is_solved():
    zero = torch.zeros(2, 3, dtype=F64)
    x, off = conjugate_gradients(lambda x: 2 * x, zero)
    assert not x.any()
    assert not off.any()


@pytest.mark.parametrize(
    "change", [{"chunk": -1}, {"iterations": 0}, {"ridge": 0.0}, {"beta": -1.0}]
)
def test_settings_that_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        mesa(*draw(), **change)
