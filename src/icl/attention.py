"""Attention with momentum: forms to call, and to put into a transformers model.

Dai et al. (2023, section 5) add to softmax attention a sum of the values before the
current token, with weights that decay with its distance; what a heavy ball would
really add, and a short convolution as a control, stand beside it. The paper leaves
open the value of ``eta``, whether it is learned and one or many, and where the sum is
added; here it joins each head's output, before the heads are mixed.

Importing this module registers ``icl_momentum``, ``icl_heavy_ball`` and
``icl_convolution`` with transformers, for ``attn_implementation=...`` and
``model.set_attn_implementation(...)``. :func:`equip` says with which numbers.
"""

import math

import torch
from torch.nn import Parameter
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from icl.heads import attention_modules

CHUNK = 32  # tokens that one product of matrices sums
BLOCK = 128  # rows of scores that are held at a time


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
    _check_heads(query, key, value, mask)
    past = _past(value, eta, query.shape[1:3], mask, normalise).to(value.dtype)
    return _softmax(query, key, value, mask, scaling) + past if softmax else past


def heavy_ball_attention(query, key, value, mu, mask=None, scaling=None):
    """Softmax attention whose memory is written by a heavy ball.

    Softmax attention reads a memory that every token enters by one gradient step on
    an inner-product loss (Ren & Liu 2023). With the momentum ``m_t = μ m_{t-1} + step``
    a step is repeated, ever smaller, at all later tokens, so that at distance s it
    counts ``(1 - μ^(s+1))/(1 - μ)`` times: the older a token, the more.

    Arguments, value and errors as :func:`momentum_attention`, ``mu`` for ``eta``.
    """
    mu = _rate("mu", mu, value, query.shape[1])
    _check_heads(query, key, value, mask)
    bias = _heavy_ball_bias(mu, query, key, mask)
    return _softmax(query, key, value, bias, scaling)


def convolution_attention(query, key, value, weights, mask=None, scaling=None):
    """Softmax attention plus ``Σ_{s=1..J} w_s v_{t-s}``: a short causal convolution.

    A control for momentum: it too lets the last tokens' values past the softmax, but
    with any weights and a finite reach. One weight is a shift by a token.

    Args:
        weights: ``(J,)`` or one row a head ``(H, J)``.

    The other arguments, value and errors as :func:`momentum_attention`.
    """
    weights = _fine(weights, value.device)
    heads = query.shape[1]
    if weights.ndim not in (1, 2) or not weights.numel():
        raise ValueError(f"weights must be (J,) or (H, J), not {tuple(weights.shape)}")
    if weights.ndim == 2 and len(weights) != heads:
        raise ValueError(f"weights of {len(weights)} heads were given for {heads}")
    _check_heads(query, key, value, mask)
    weights = weights.reshape(-1, weights.shape[-1])
    past = _convolved(value, weights, query.shape[1:3], mask).to(value.dtype)
    return _softmax(query, key, value, mask, scaling) + past


def regularised_attention(
    query, key, value, alpha, demonstrations=None, mask=None, scaling=None
):
    """Attention as a step on the contrastive loss with weight decay (Ren & Liu 2023).

    The decay ``(α/2η)|W|²`` shrinks the weight that the step starts from, and that is
    the query part's: its values are scaled by ``1 - α``. The normaliser stays.

    Args:
        query, key, value, mask, scaling: as of :func:`momentum_attention`.
        alpha: finite.
        demonstrations: which tokens are demonstrations, boolean ``(P + T,)`` or
            ``(B, P + T)``; the others are the query part. Left out, the query part of
            a token is the token itself, and the demonstrations all before it.

    Returns:
        ``(B, H, T, d_h)``.

    Raises:
        ValueError: ``alpha`` not finite, marks that do not fit or mark nothing; and
            see :func:`momentum_attention`.
    """
    _check_heads(query, key, value, mask)
    _check_finite(alpha=alpha)
    shrunk = (1 - alpha) * value
    if demonstrations is None:
        return _in_two_parts(query, key, value, key, shrunk, mask, scaling)
    shown = _marks(demonstrations, key)
    return _softmax(query, key, torch.where(shown, value, shrunk), mask, scaling)


def augmented_attention(
    query,
    key,
    value,
    of_value,
    of_key,
    demonstrations=None,
    mask=None,
    scaling=None,
):
    """Attention whose demonstrations are augmented before they are paired.

    ``[g_1(V_D), V_T] softmax([g_2(K_D), K_T]ᵀ q)``: the two views of a demonstration
    that the contrastive loss draws together, each changed by a map (Ren & Liu 2023).

    Args:
        of_value, of_key: ``g_1`` and ``g_2``, functions from ``(B, H_kv, P + T, d_h)``
            to the same shape that act on every token by itself.

    The other arguments, value and errors as :func:`regularised_attention`.
    """
    _check_heads(query, key, value, mask)
    views = of_key(key), of_value(value)
    for name, view, like in zip(
        ("of_key", "of_value"), views, (key, value), strict=True
    ):
        if view.shape != like.shape:
            raise ValueError(
                f"{name} must keep the shape {tuple(like.shape)}, but returned "
                f"{tuple(view.shape)}"
            )
    if demonstrations is None:
        return _in_two_parts(query, *views, key, value, mask, scaling)
    shown = _marks(demonstrations, key)
    views = (torch.where(shown, a, b) for a, b in zip(views, (key, value), strict=True))
    return _softmax(query, *views, mask, scaling)


def negative_attention(
    query,
    key,
    value,
    beta,
    k,
    demonstrations=None,
    by="keys",
    mask=None,
    scaling=None,
):
    """Attention as a step on the contrastive loss with negatives (Ren & Liu 2023).

    A demonstration is also pushed away from the ``k`` that are least like it, so its
    value becomes ``v_i - (β/k) Σ_{j in N(i)} v_j``. The paper leaves open what "like"
    is.

    Args:
        beta: finite.
        k: 1 or more. A token with fewer candidates takes those there are.
        demonstrations: as of :func:`regularised_attention`. Marked demonstrations
            choose among each other. Left out, all tokens choose among those before
            them, so that no token learns of a later one.
        by: ``"keys"``, the inner product of two keys, or ``"scores"``, of a token's
            query with the other's key (then ``query`` must hold all tokens).

    The other arguments, value and errors as :func:`regularised_attention`; besides,
    ``k`` larger than the number of other demonstrations, or another ``by``.
    """
    _check_heads(query, key, value, mask)
    _check_finite(beta=beta)
    length = key.shape[2]
    if by not in ("keys", "scores"):
        raise ValueError(f"by must be 'keys' or 'scores', not {by!r}")
    if by == "scores" and query.shape[2] != length:
        raise ValueError("by='scores' needs the queries of all tokens")
    shown = None if demonstrations is None else _marks(demonstrations, key)
    others = length if shown is None else int(shown.sum(2).min())
    if not 1 <= k < others:
        raise ValueError(f"k must be 1 to {others - 1}, the other tokens; not {k}")
    if by == "scores":
        key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    chosen = _least_like(query if by == "scores" else key, key, k, shown, mask)
    pushed = value - beta * _mean_of(value, *chosen)
    if shown is None:
        return _in_two_parts(query, key, pushed, key, value, mask, scaling)
    return _softmax(query, key, torch.where(shown, pushed, value), mask, scaling)


def _rate(name, rate, value, heads):
    """``rate`` as a tensor ``(1,)`` or ``(H,)`` in which powers are taken."""
    rate = _fine(rate, value.device).reshape(-1)
    if len(rate) not in (1, heads):
        raise ValueError(
            f"{name} must be one number or one a head, {heads}, not {len(rate)}"
        )
    if not ((rate > 0) & (rate < 1)).all():
        raise ValueError(f"{name} must lie in (0, 1), not {rate.tolist()}")
    return rate


def _fine(rate, device):
    """In float64 where there is one: float32 is too coarse for powers of 0.9999."""
    exact = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(rate, dtype=exact, device=device)


def _summable(value):
    return value if value.dtype == torch.float64 else value.float()


def _check_heads(query, key, value, mask):
    (_, heads, tokens, _), (_, kv_heads, length, _) = query.shape, key.shape
    if value.shape[1:3] != key.shape[1:3] or heads % kv_heads or tokens > length:
        raise ValueError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)} do not fit: keys and values need the same heads, "
            "a divisor of the queries', and at least as many tokens"
        )
    if mask is not None and (mask.ndim != 4 or mask.shape[1:] != (1, tokens, length)):
        raise ValueError(
            f"the mask must be (batch, 1, {tokens}, {length}), the same for all "
            f"heads, not {tuple(mask.shape)}"
        )


def _softmax(query, key, value, mask, scaling):
    tokens, length = query.shape[2], key.shape[2]
    if mask is None and 1 < tokens < length:
        mask = _distances(None, tokens, length, query.device) >= 0
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _check_finite(**numbers):
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, not {number}")


def _marks(demonstrations, key):
    """``(B or 1, 1, P + T, 1)`` from marks ``(P + T,)`` or ``(B, P + T)``."""
    marks = torch.as_tensor(demonstrations, device=key.device)
    batch, _, length, _ = key.shape
    if marks.dtype != torch.bool or marks.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"demonstrations must be booleans ({length},) or ({batch}, {length}), not "
            f"{marks.dtype} {tuple(marks.shape)}"
        )
    marks = marks.reshape(-1, length)
    if not marks.any(1).all():
        raise ValueError("demonstrations marks no token of some sequence")
    return marks[:, None, :, None]


def _in_two_parts(query, key, value, own_key, own_value, mask, scaling):
    """Causal attention in which a query's own token has a key and value of its own.

    What came before is summed up by its normaliser, so that the own token joins by
    the logistic function of how far its score is above.
    """
    tokens, length = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = query.shape[1]
    own_key, own_value = (
        _repeated(x[:, :, length - tokens :], heads) for x in (own_key, own_value)
    )
    score = (query * own_key).sum(-1) * scale
    if mask is None and tokens == length > 1:
        before = scaled_dot_product_attention(
            query[:, :, 1:],
            key[:, :, :-1],
            value[:, :, :-1],
            is_causal=True,
            scale=scale,
            enable_gqa=heads != key.shape[1],
        )
        before = pad(before, (0, 0, 1, 0))
        total = _LogNormaliser.apply(query, _repeated(key, heads), scale)
    else:
        seen = _distances(mask, tokens, length, query.device) > 0
        scores = query @ _repeated(key, heads).mT * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        total = scores.logsumexp(-1)
        weights = scores - total.clamp(min=torch.finfo(scores.dtype).min)[..., None]
        before = weights.exp() @ _repeated(value, heads)
    own = torch.sigmoid(score - total)[..., None]
    return before + own * (own_value - before)


class _LogNormaliser(torch.autograd.Function):
    """``log Σ_{i<t} exp(q_t·k_i scale)`` for all t at once, ``(B, H, T)``, by blocks.

    No more than a block of the scores is held at a time; backward makes them again.
    """

    @staticmethod
    def forward(ctx, query, key, scale):
        ctx.scale, tokens = scale, query.shape[2]
        total = torch.empty_like(query[..., 0])
        for start in range(0, tokens, BLOCK):
            scores = _earlier(query, key, scale, start)
            total[:, :, start : start + BLOCK] = scores.logsumexp(-1)
        ctx.save_for_backward(query, key, total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        query, key, total = ctx.saved_tensors
        of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
        total = total.clamp(min=torch.finfo(total.dtype).min)  # nothing came before
        for start in range(0, query.shape[2], BLOCK):
            rows = slice(start, start + BLOCK)
            weights = _earlier(query, key, ctx.scale, start)
            weights = (weights - total[:, :, rows, None]).exp_()
            weights *= gradient[:, :, rows, None] * ctx.scale
            end = weights.shape[-1]
            of_query[:, :, rows] = weights @ key[:, :, :end]
            of_key[:, :, :end] += weights.mT @ query[:, :, rows]
        return of_query, of_key, None


def _earlier(left, right, scale, start):
    """Scores of a block of tokens with those before them, the rest at -inf."""
    end = min(start + BLOCK, left.shape[2])
    scores = left[:, :, start:end] @ right[:, :, :end].mT * scale
    place = torch.arange(end, device=left.device)
    return scores.masked_fill_(place >= place[start:, None], -torch.inf)


@torch.no_grad()
def _least_like(left, key, k, shown, mask):
    """The k tokens with the least ``left_i·k_j`` for every i, and which of them count.

    Returns:
        indices and booleans ``(B, H, P + T, k)``.
    """
    length = left.shape[2]
    indices, valid = [], []
    seen = None if mask is None else _seen_by_all(mask, length)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        like = left[:, :, start:end] @ key.mT
        place = torch.arange(length, device=key.device)
        if shown is None:
            out = place >= place[start:end, None]
        else:
            out = (place == place[start:end, None]) | ~shown[..., 0][:, :, None]
        if seen is not None:
            out = out | ~seen[:, :, start:end]
        like, index = like.masked_fill_(out, torch.inf).topk(k, largest=False)
        indices.append(index)
        valid.append(like < torch.inf)
    return torch.cat(indices, 2), torch.cat(valid, 2)


def _seen_by_all(mask, length):
    """What every token may look at, ``(B, 1, P + T, P + T)``: a mask has rows for the
    last T tokens, and those before them stood in causal rows."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    start = length - mask.shape[2]
    rows = seen.any(2, keepdim=True).expand(-1, -1, start, -1)
    return torch.cat([rows, seen], 2)


def _mean_of(value, index, valid):
    """Mean of the chosen values, nought where there are none."""
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    shares = valid.to(value.dtype) / count
    total = torch.zeros_like(value)
    for n in range(index.shape[-1]):
        rows = index[..., n, None].expand(-1, -1, -1, value.shape[-1])
        total = total + shares[..., n, None] * value.gather(2, rows)
    return total


def _past(value, eta, asked, mask=None, normalise=False):
    """``Σ_{i<t} η^(t-i) v_i`` for the last tokens, ``(B, H, T, d_h)``.

    Args:
        asked: heads H and tokens T of the queries.
    """
    heads, tokens = asked
    length = value.shape[2]
    first = eta * (1 - eta) if normalise else eta
    if mask is None and tokens > 1:
        value = value if len(eta) == 1 else _repeated(value, heads)
        past = _Sums.apply(_summable(value), eta, first)
        return _repeated(past[:, :, length - tokens :], heads)
    place = torch.arange(length - 1, device=value.device)
    return _weighted(first[:, None] * eta[:, None] ** place, value, asked, mask)


def _convolved(value, weights, asked, mask=None):
    """``Σ_s w_s v_{t-s}`` for the last tokens, ``(B, H, T, d_h)``."""
    heads, tokens = asked
    length, reach = value.shape[2], weights.shape[1]
    if mask is None and tokens > 1:
        late = pad(_summable(_repeated(value, heads)), (0, 0, reach, 0))
        weights = weights.to(late.dtype)
        terms = [
            weights[:, s - 1, None, None] * late[:, :, reach - s : reach - s + length]
            for s in range(1, reach + 1)
        ]
        return sum(terms)[:, :, length - tokens :]
    weights = pad(weights, (0, max(0, length - 1 - reach)))[:, : length - 1]
    return _weighted(weights, value, asked, mask)


def _heavy_ball_bias(mu, query, key, mask):
    """Added to the scores, ``(B, 1 or H, T, P + T)``: log of how often steps count."""
    length = key.shape[2]
    times = torch.arange(1, length + 1, device=key.device) * mu.log()[:, None]
    times = torch.log(-torch.expm1(times))  # 1/(1 - μ) divides out in the softmax
    distance = _distances(mask, query.shape[2], length, key.device)
    bias = _looked_up(times.to(query.dtype), distance.clamp(min=0))
    return bias.masked_fill(distance < 0, torch.finfo(query.dtype).min)


class _Sums(torch.autograd.Function):
    """``first · Σ_{i<t} decay^(t-1-i) x_i`` along the tokens, with its gradients.

    The gradient of x is the same sum from the other end. With F the sum and G its
    gradient's, that of the decay is ``first · Σ_t F_t·G_t``, as the adjoint of
    ``F_t = decay F_{t-1} + x_{t-1}``; F is made again and need not be kept.
    """

    @staticmethod
    def forward(ctx, x, decay, first):
        ctx.save_for_backward(x, decay, first)
        return _scan(x, decay, first)

    @staticmethod
    def backward(ctx, gradient):
        x, decay, first = ctx.saved_tensors
        one = torch.ones_like(first)
        of_decay = of_first = None
        of_x = _scan(gradient, decay, one, back=True)
        if any(ctx.needs_input_grad[1:]):
            of_decay, of_first = torch.zeros_like(first), torch.zeros_like(first)
            for part in zip(*(t.chunk(4) for t in (x, gradient, of_x)), strict=True):
                sums = _scan(part[0], decay, one)  # of a part, to need little memory
                of_first += _by_head(sums * part[1], first)
                of_decay += first * _by_head(sums.mul_(part[2]), first)
        return of_x.mul_(first[:, None, None].to(x.dtype)), of_decay, of_first


def _by_head(x, like):
    x = x.sum((0, 2, 3), dtype=like.dtype)
    return x if len(like) > 1 else x.sum(0, keepdim=True)


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
    value = _summable(value)
    weights = pad(weights.to(value.dtype), (1, 0))
    if mask is None and tokens == 1:  # a step of decoding
        weights = weights.flip(1)[None, :, None]
    else:
        distance = _distances(mask, tokens, length, value.device)
        weights = _looked_up(weights, distance.clamp(min=0))
    weights = weights.expand(-1, heads, -1, -1)
    shared = weights.reshape(len(weights), kv_heads, -1, length)  # by heads of a value
    past = shared @ value
    return past.reshape(batch, heads, tokens, width)


def _looked_up(table, distance):
    """``table`` ``(H, D)`` at distances ``(B, 1, T, P + T)``: ``(B, H, T, P + T)``."""
    return table[:, distance[:, 0]].movedim(0, 1)


def _distances(mask, tokens, length, device):
    """How many tokens that a query sees come after each; -1 for what it does not.

    ``(B, 1, T, P + T)``, 0 at the query's own token.
    """
    if mask is None:
        place = torch.arange(length, device=device)
        return (place[length - tokens :, None] - place).clamp(min=-1)[None, None]
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    after = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) - 1
    row, column = (torch.arange(n, device=mask.device) for n in (tokens, length))
    last = torch.where(mask, column, -1).amax(-1)  # (B, 1, T)
    own = last - row
    if not (own.amax(-1, keepdim=True) == own)[last >= 0].all():
        raise ValueError(
            "the last token that a query sees must be its own: this mask is not "
            "causal, or pads on the right; pad on the left"
        )
    return after.long().masked_fill(~mask, -1)


def _repeated(x, heads):
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


# --- in a model ---------------------------------------------------------------------

#: What each kind of attention is told; None stands for what has no default.
KINDS = {
    "momentum": {"eta": None, "normalise": False, "softmax": True},
    "heavy_ball": {"mu": None},
    "convolution": {"eta": None, "reach": None},
}


def equip(model, kind, learned=False, **options):
    """Give all layers of a model one of the attentions of this module.

    Args:
        model: a gpt2, opt, gpt_neox, llama or qwen of transformers. It is changed.
        kind: ``"momentum"``, ``"heavy_ball"`` or ``"convolution"``.
        learned: let every head of every layer learn its own rate, from the given one
            on. The parameters are called ``momentum`` and live in the attention
            modules: the logits of ``eta`` or ``mu``, or a convolution's weights.
        options: ``eta``, ``normalise`` and ``softmax`` as of
            :func:`momentum_attention`; ``mu`` as of :func:`heavy_ball_attention`; a
            convolution's ``reach``, J, and ``eta``, whose powers are its weights.

    Returns:
        the model. Its configuration keeps the choices as ``icl_attention``, so that a
        saved model with a fixed rate comes back with them.

    Raises:
        ValueError: an unknown kind or option, one that is missing, a rate outside
            (0, 1), or an architecture whose attention cannot be replaced.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    settings = KINDS[kind] | options
    missing = [name for name, value in settings.items() if value is None]
    if missing or len(settings) > len(KINDS[kind]):
        raise ValueError(
            f"{kind} is told {', '.join(KINDS[kind])}; given were "
            f"{', '.join(options) or 'none'}"
        )
    for name in {"eta", "mu"} & {*settings}:
        if not 0 < settings[name] < 1:
            raise ValueError(f"{name} must lie in (0, 1), not {settings[name]}")
    if settings.get("reach", 1) < 1:
        raise ValueError(f"reach is 1 token or more, not {settings['reach']}")
    if not model._supports_attention_backend:
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be replaced: it does not "
            "go through transformers' attention interface; that of gpt2, opt, "
            "gpt_neox, llama and qwen does"
        )
    settings |= {"kind": kind, "learned": learned}
    model.config.icl_attention = settings
    for module in attention_modules(model):
        if hasattr(module, "momentum"):  # of what it was equipped with before
            del module.momentum
        if learned:
            start = _given(settings)
            start = start if kind == "convolution" else start.logit()
            start = start.repeat(model.config.num_attention_heads, 1).squeeze(1)
            module.momentum = Parameter(start.float().to(model.device))
    model.set_attn_implementation(f"icl_{kind}")
    return model


def rates(model):
    """What each head of an equipped model uses: ``(L, H)``, a convolution's
    ``(L, H, J)``."""
    heads = model.config.num_attention_heads
    found = [_settled(m, model.device) for m in attention_modules(model)]
    return torch.stack([rate.detach().expand(heads, *rate.shape[1:]) for rate in found])


def layerwise_momentum(model, mu):
    """Nesterov's momentum from block to block of a transformers model.

    A residual network moves its hidden state ``x_l`` by one step a block. Here block
    l starts from ``x_l + μ (x_l - x_{l-1})``: momentum across layers, where
    :func:`momentum_attention` has it across tokens.

    Args:
        model: as for :func:`equip`; hooks are put on its blocks.
        mu: in (0, 1).

    Returns:
        the hooks; ``remove()`` of each takes the momentum away again.

    Raises:
        ValueError: ``mu`` outside (0, 1).
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must lie in (0, 1), not {mu}")
    ours = {id(module) for module in attention_modules(model)}
    blocks = [
        block
        for block in model.modules()
        if any(id(child) in ours for child in block.children())
    ]
    last = {}

    def ahead(block, inputs):
        x, *rest = inputs
        start = x if block is blocks[0] else x + mu * (x - last["x"])
        last["x"] = x if block is not blocks[-1] else None
        return start, *rest

    return [block.register_forward_pre_hook(ahead) for block in blocks]


def _given(settings):
    """The rate ``(1,)``, or a convolution's weights ``(J,)``."""
    if "reach" in settings:
        distance = torch.arange(1, settings["reach"] + 1)
        return settings["eta"] ** distance.double()
    rate = settings["mu"] if settings["kind"] == "heavy_ball" else settings["eta"]
    return torch.tensor([rate], dtype=torch.float64)


def _settled(module, device):
    """The rate ``(1,)`` or ``(H,)`` of a layer, or a convolution's ``(1 or H, J)``."""
    settings = getattr(module.config, "icl_attention", None)
    if settings is None:
        raise ValueError(
            "this attention has not been told its numbers: call "
            "icl.attention.equip(model, kind, ...)"
        )
    if not settings["learned"]:
        rate = _given(settings)
        return _fine(rate[None] if "reach" in settings else rate, device)
    if not hasattr(module, "momentum"):
        raise ValueError(
            "this model learned its rates, and they are not loaded: call "
            "icl.attention.equip first, then load its weights"
        )
    rate = _fine(module.momentum, device)
    return rate if "reach" in settings else rate.sigmoid()


def _attend(kind):
    def attend(module, query, key, value, attention_mask, **options):
        tokens, length = query.shape[2], key.shape[2]
        if attention_mask is None and 1 < tokens < length:  # a cache to be filled
            key, value = key[:, :, :tokens], value[:, :, :tokens]
        asked, mask = query.shape[1:3], attention_mask
        rate, settings = _settled(module, value.device), module.config.icl_attention
        if kind == "heavy_ball":
            mask = _heavy_ball_bias(rate, query, key, mask)
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        if kind == "convolution":
            past = _convolved(value, rate, asked, mask)
        else:
            past = _past(value, rate, asked, mask, settings["normalise"])
        past = past.transpose(1, 2).to(value.dtype)
        if kind == "momentum" and not settings["softmax"]:
            return past, None
        usual, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return usual + past, None

    return attend


for _kind in KINDS:
    AttentionInterface.register(f"icl_{_kind}", _attend(_kind))
    AttentionMaskInterface.register(f"icl_{_kind}", sdpa_mask)
