"""The loop by chunks of tokens: linear attention, decay, delta rule, momentum."""

import torch
from torch.nn.functional import pad

from icl.online import state as states
from icl.online.state import Keys, Rate, State, Values


def chunkwise(
    query: Keys,
    key: Keys,
    value: Values,
    beta: Rate = 1.0,
    *,
    loss="squared",
    implicit=False,
    momentum: Rate = 0.0,
    decay: Rate = 1.0,
    decayed=True,
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Values, State]:
    r""":func:`recurrent` with a linear memory, by chunks of tokens.

    Weights are sums of steps :math:`u_s k_s^\top`, where :math:`u_s = \beta_s v_s` for
    the inner-product loss and :math:`u_s = \beta_s (v_s - \tilde W_s k_s)` for the
    squared one. Decay and momentum only weight the steps: with :math:`D_{ts}
    = \gamma_{s+1} \cdots \gamma_t`, :math:`E_{ts}` the same product of μ, and weights W
    and velocity M before a chunk,

    .. math:: W_t = D_{t0} W + \sum_{r=1}^t D_{tr} E_{r0} M + \sum_{s=1}^t (DE)_{ts}
       u_s k_s^\top.

    With the squared loss the steps of a chunk then solve one triangular system, without
    decay and momentum the UT form of the delta rule (Yang et al. 2024). Nothing is
    divided by a decay. Time and memory are linear in T.

    The loss is ``"inner"`` or ``"squared"``, ``chunk`` the number of tokens. The other
    arguments and errors are those of :func:`recurrent`; the state has no curvature.
    """
    states.check_inputs(query, key, value)
    states.check_choice("loss", loss, ("inner", "squared"))
    states.check_positive(chunk=chunk)
    beta, mu, gamma = states.check_rates(key, beta, momentum, decay)
    states.check_step(beta, key, loss, implicit)
    squared = loss == "squared"
    if implicit and squared:
        beta = beta / (1 + beta * key.square().sum(-1))
    mu = None if isinstance(momentum, int | float) and momentum == 0 else mu
    if state is not None and state.curvature is not None:
        raise ValueError("this state is of a learner with curvature, such as Mesa's")
    (W,), (M,), _ = states.init_state(state, key, value)
    X = W.mT if mu is None else torch.cat([W.mT, (M + torch.zeros_like(W)).mT], -2)
    outputs, last = [], key.shape[2] // chunk * chunk
    for part in (slice(0, last), slice(last, None)):
        given = [x[:, :, part] for x in (query, key, value)]
        if size := min(chunk, given[0].shape[2]):
            rates = [_split(x, part, size) for x in (beta, mu, gamma)]
            given = [x.unflatten(2, (-1, size)) for x in given]
            out, X, M = _chunks(*given, *rates, squared, decayed, X)
            outputs.append(out.flatten(2, 3))
    outputs = torch.cat(outputs, 2)
    states.check_finite(outputs)
    return outputs, State((X[..., : key.shape[-1], :].mT,), (M,))


def _chunks(q, k, v, beta, mu, gamma, squared, decayed, X):
    """Outputs of chunks ``(B, H, n, C, ·)``, the last ``[W, M]ᵀ``, and the last M."""
    counts, of_X = _products(gamma), [gamma.cumprod(-1)[..., None]]
    into, stay = [counts], of_X[0][..., -1:, :]
    if mu is not None:
        pushed, m = _products(mu), mu.cumprod(-1)[..., None]
        counts, of_X = counts @ pushed, [*of_X, counts @ m]
        into = [counts, pushed]
        a, b, m = torch.broadcast_tensors(*(x[..., -1:, :] for x in (*of_X, m)))
        stay = torch.cat([torch.cat([a, b], -1), pad(m, (1, 0))], -2)
    written = torch.cat([x[..., -1, :, None] * k for x in into], -1).mT
    own, seen = beta[..., None] * v, None
    if squared:
        before = [  # a token, so one row down
            pad(x[..., :-1, :], (0, 0, 1, 0), value=first)
            for x, first in zip([counts, *of_X], (0.0, 1.0, 0.0), strict=False)
        ]
        if decayed:
            before = [gamma[..., None] * x for x in before]
        system = (beta[..., None] * before[0]) * (k @ k.mT)
        seen = [beta[..., None] * x * k for x in before[1:]]
        both = torch.linalg.solve_triangular(
            system, torch.cat([own, *seen], -1), upper=False, unitriangular=True
        )
        own, seen = both.split([v.shape[-1], both.shape[-1] - v.shape[-1]], -1)
    u, begin, X = _through(stay, written, own, seen, X)
    reads = torch.cat([x * q for x in of_X], -1)
    out = reads @ begin + (counts * (q @ k.mT)) @ u
    if mu is None:
        return out, X, u[:, :, -1, -1, :, None] * k[:, :, -1, -1, None]
    return out, X, X[..., k.shape[-1] :, :].mT


def _through(stay, written, own, seen, X):
    """From chunk to chunk: all steps u, what each begins with, and the last ``X``."""
    heads, n, parts = X.shape[:2], own.shape[2], stay.shape[-1]
    stay, written, own, seen = (
        [None] * n if x is None else x.expand(*heads, n, -1, -1).flatten(0, 1).unbind(1)
        for x in (stay, written, own, seen)
    )
    X, steps, starts = X.flatten(0, 1), [], []
    for a, w, u, s in zip(stay, written, own, seen, strict=True):
        u = u if s is None else torch.baddbmm(u, s, X, alpha=-1)
        steps.append(u)
        starts.append(X)
        left = a * X if parts == 1 else (a @ X.view(len(X), parts, -1)).view_as(X)
        X = torch.baddbmm(left, w, u)
    u, begin = (torch.stack(x, 1).unflatten(0, heads) for x in (steps, starts))
    return u, begin, X.unflatten(0, heads)


def _products(rates):
    """``rate_{s+1} ... rate_t`` of ``(..., C)``, at row t and column s <= t."""
    size = rates.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=rates.device).tril(-1)
    return torch.where(later, rates[..., None], 1.0).cumprod(-2).tril()


def _split(rate, part, size):
    """The rates of some tokens by chunks, ``(·, ·, n or 1, C)``."""
    if rate is None or rate.shape[2] == 1:
        return rate if rate is None else rate.expand(-1, -1, size)[:, :, None]
    return rate[:, :, part].unflatten(2, (-1, size))
