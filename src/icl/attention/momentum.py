"""Attention with momentum across tokens, and what it is to be compared with."""

import torch
from torch.nn.functional import hardshrink, pad

from icl.attention.shared import (
    check_heads,
    distances,
    fine,
    repeated,
    softmax_attention,
    summable,
)

CHUNK = 32  # tokens that one product of matrices sums


def momentum_attention(
    query, key, value, eta, mask=None, scaling=None, normalise=False, softmax=True
):
    """Softmax attention plus momentum: ``Attn + Σ_{i<t} η^(t-i) v_i``.

    MoAttn of Dai et al. (2023, section 5): the sum leaves the current token out and
    is not normalised. Its cost is linear in the number of tokens without a mask.

    Args:
        query: ``(B, H, T, d_h)``.
        key, value: ``(B, H_kv, P + T, d_h)``; ``H_kv`` divides ``H``. The queries
            are those of the last T tokens.
        eta: in (0, 1); a number, or a tensor with one entry or one a head ``(H,)``.
        mask: ``(B or 1, 1, T, P + T)``, boolean (True is seen) or additive; causal.
            Distances count the tokens that a query sees, so they are right behind
            padding on the left and in rows that hold several sequences. Left out,
            a query sees all tokens up to its own.
        scaling: of the scores; left out, ``1/√d_h``.
        normalise: multiply the sum by ``1 - η``.
        softmax: False leaves the sum alone, a decay without attention.

    Returns:
        ``(B, H, T, d_h)``, of the dtype of ``value``.

    Raises:
        ValueError: ``eta`` outside (0, 1) or of another shape, heads or tokens that
            do not fit, a mask that is not causal or pads on the right.
    """
    eta = _rate("eta", eta, value, query.shape[1])
    check_heads(query, key, value, mask)
    past = decayed_sum(value, eta, query.shape[1:3], mask, normalise).to(value.dtype)
    return (
        softmax_attention(query, key, value, mask, scaling) + past if softmax else past
    )


def heavy_ball_attention(query, key, value, mu, mask=None, scaling=None):
    """Softmax attention whose memory is written by a heavy ball.

    Softmax attention reads a memory that every token enters by one gradient step on
    an inner-product loss (Ren & Liu 2023). With the momentum ``m_t = μ m_{t-1} + step``
    a step is repeated, ever smaller, at all later tokens, so that at distance s it
    counts ``(1 - μ^(s+1))/(1 - μ)`` times: the older a token, the more.

    Arguments, value and errors as :func:`momentum_attention`, ``mu`` for ``eta``.
    """
    mu = _rate("mu", mu, value, query.shape[1])
    check_heads(query, key, value, mask)
    bias = heavy_ball_bias(mu, query, key, mask)
    return softmax_attention(query, key, value, bias, scaling)


def convolution_attention(query, key, value, weights, mask=None, scaling=None):
    """Softmax attention plus ``Σ_{s=1..J} w_s v_{t-s}``: a short causal convolution.

    A control for momentum: it too lets the last tokens' values past the softmax, but
    with any weights and a finite reach. One weight is a shift by a token.

    Args:
        weights: ``(J,)`` or one row a head ``(H, J)``.

    The other arguments, value and errors as :func:`momentum_attention`.
    """
    weights = fine(weights, value.device)
    heads = query.shape[1]
    if weights.ndim not in (1, 2) or not weights.numel():
        raise ValueError(f"weights must be (J,) or (H, J), not {tuple(weights.shape)}")
    if weights.ndim == 2 and len(weights) != heads:
        raise ValueError(f"weights of {len(weights)} heads were given for {heads}")
    check_heads(query, key, value, mask)
    weights = weights.reshape(-1, weights.shape[-1])
    past = convolved(value, weights, query.shape[1:3], mask).to(value.dtype)
    return softmax_attention(query, key, value, mask, scaling) + past


def _rate(name, rate, value, heads):
    """``rate`` as a tensor ``(1,)`` or ``(H,)`` in which powers are taken."""
    rate = fine(rate, value.device).reshape(-1)
    if len(rate) not in (1, heads):
        raise ValueError(
            f"{name} must be one number or one a head, {heads}, not {len(rate)}"
        )
    if not ((rate > 0) & (rate < 1)).all():
        raise ValueError(f"{name} must lie in (0, 1), not {rate.tolist()}")
    return rate


def decayed_sum(value, eta, asked, mask=None, normalise=False):
    """``Σ_{i<t} η^(t-i) v_i`` for the last tokens, ``(B, H, T, d_h)``.

    Args:
        asked: heads H and tokens T of the queries.
    """
    heads, tokens = asked
    length = value.shape[2]
    first = eta * (1 - eta) if normalise else eta
    if mask is None and tokens > 1:
        value = value if len(eta) == 1 else repeated(value, heads)
        past = _Sums.apply(summable(value), eta, first)
        return repeated(past[:, :, length - tokens :], heads)
    place = torch.arange(length - 1, device=value.device)
    return _weighted(first[:, None] * eta[:, None] ** place, value, asked, mask)


def convolved(value, weights, asked, mask=None):
    """``Σ_s w_s v_{t-s}`` for the last tokens, ``(B, H, T, d_h)``."""
    heads, tokens = asked
    length, reach = value.shape[2], weights.shape[1]
    if mask is None and tokens > 1:
        late = pad(summable(repeated(value, heads)), (0, 0, reach, 0))
        weights = weights.to(late.dtype)
        terms = [
            weights[:, s - 1, None, None] * late[:, :, reach - s : reach - s + length]
            for s in range(1, reach + 1)
        ]
        return sum(terms)[:, :, length - tokens :]
    weights = pad(weights, (0, max(0, length - 1 - reach)))[:, : length - 1]
    return _weighted(weights, value, asked, mask)


def heavy_ball_bias(mu, query, key, mask):
    """Added to the scores, ``(B, 1 or H, T, P + T)``: log of how often steps count."""
    length = key.shape[2]
    times = torch.arange(1, length + 1, device=key.device) * mu.log()[:, None]
    times = torch.log(-torch.expm1(times))  # 1/(1 - μ) divides out in the softmax
    distance = distances(mask, query.shape[2], length, key.device)
    bias = _looked_up(times.to(query.dtype), distance.clamp(min=0))
    return bias.masked_fill(distance < 0, torch.finfo(query.dtype).min)


class _Sums(torch.autograd.Function):
    """``first · Σ_{i<t} decay^(t-1-i) x_i`` along the tokens, with its gradients.

    With S the sum, ``S_t = decay S_{t-1} + first x_{t-1}``, and G the sum of its
    gradient from the other end, the gradient of x is ``first G``, that of the decay
    ``Σ_t S_t·G_t``, that of ``first`` ``Σ_t x_t·G_t``. S is made again, not kept.
    """

    @staticmethod
    def forward(ctx, x, decay, first):
        ctx.save_for_backward(x, decay, first)
        return _scan(x, decay, first)

    @staticmethod
    def backward(ctx, gradient):
        x, decay, first = ctx.saved_tensors
        of_decay = of_first = None
        later = _scan(gradient, decay, torch.ones_like(first), back=True)
        if any(ctx.needs_input_grad[1:]):
            of_first = _by_head(x, later, first)
            of_decay = _by_head(_scan(x, decay, first), later, first)
        return later.mul_(first[:, None, None].to(x.dtype)), of_decay, of_first


def _by_head(x, y, like):
    """Inner products of the heads of x and y, in the shape of ``like``."""
    products = torch.einsum("bhtd,bhtd->bht", x, y).sum((0, 2), dtype=like.dtype)
    return products if len(like) > 1 else products.sum(0, keepdim=True)


def _scan(x, decay, first, back=False):
    """``first · Σ_{i<t} decay^(t-1-i) x_i``, or ``Σ_{i>t}``, by matrix products.

    A chunk's tokens are summed by one triangular matrix, and as a whole for the
    chunks to come; these sums are scanned likewise, with the decay of a whole chunk.
    All exponents are positive, so nothing grows.

    Args:
        x: ``(B, H, T, d)``.
        decay, first: ``(1,)`` or ``(H,)``.
        back: sum what comes after.
    """
    tokens = x.shape[2]
    size = min(tokens, CHUNK)
    place = torch.arange(size, device=x.device)
    age = place[:, None] - 1 - place
    weights = (decay[:, None, None] ** age.clamp(min=0)).masked_fill(age < 0, 0)
    weights = (first[:, None, None] * weights).to(x.dtype)
    weights = weights.mT if back else weights
    if tokens <= CHUNK:
        return weights @ x
    chunks = -(-tokens // size)
    x = pad(x, (0, 0, 0, chunks * size - tokens)) if tokens % size else x
    x = x.unflatten(2, (chunks, size))
    powers = decay[:, None] ** place
    leaving, entering = (powers, powers.flip(1)) if back else (powers.flip(1), powers)
    whole = (leaving.to(x.dtype)[:, None, None] @ x)[:, :, :, 0]
    outside = _scan(whole, decay**size, torch.ones_like(decay), back)
    entering = (first[:, None] * entering).to(x.dtype)
    sums = weights[:, None] @ x
    sums.addcmul_(entering[:, None, :, None], outside[:, :, :, None])
    return sums.flatten(2, 3)[:, :, :tokens]


def _weighted(weights, value, asked, mask):
    """Values summed with weights by their distance from each query.

    Args:
        weights: at distance 1, 2, ... ``(1 or H, P + T - 1)``.
        value: ``(B, H_kv, P + T, d_h)``.
    """
    heads, tokens = asked
    batch, kv_heads, length, width = value.shape
    value = summable(value)
    weights = pad(weights.to(value.dtype), (1, 0))
    weights = hardshrink(weights, torch.finfo(value.dtype).tiny)  # denormals are slow
    if mask is None and tokens == 1:  # a step of decoding
        weights = weights.flip(1)[None, :, None]
    else:
        distance = distances(mask, tokens, length, value.device)
        weights = _looked_up(weights, distance.clamp(min=0))
    weights = weights.expand(-1, heads, -1, -1)
    shared = weights.reshape(len(weights), kv_heads, -1, length)  # by heads of a value
    past = shared @ value
    return past.reshape(batch, heads, tokens, width)


def _looked_up(table, distance):
    """``table`` ``(H, D)`` at distances ``(B, 1, T, P + T)``: ``(B, H, T, P + T)``."""
    return table[:, distance[:, 0]].movedim(0, 1)
