"""Attention with momentum across tokens, and what it is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import hardshrink, pad

from icl.attention.masks import relative_positions, repeat_kv, to_float64, upcast
from icl.attention.replace import (
    AttentionKind,
    NoDecayParameter,
    option,
    softmax_attention,
)

_CHUNK = 32  # tokens that one product of matrices sums


def in_unit_interval(rate):
    """Whether a number, or every entry of a tensor, lies in (0, 1)."""
    rate = torch.as_tensor(rate)
    return bool(((rate > 0) & (rate < 1)).all())


class WithRates(AttentionKind):
    """A kind with rates that heads may learn, from those of the option ``given`` on."""

    part, encode, decode = "rate_logits", torch.logit, torch.sigmoid  # what is learned

    learned: bool = option("let every head learn its own", default=False)

    def init_learned(self, model, layer):
        if not self.learned:
            return {}
        start = type(self).encode(self.initial(torch.device("cpu")))
        start = start.expand(model.config.num_attention_heads, *start.shape[1:])
        return {self.part: NoDecayParameter(start.float().clone().to(model.device))}

    def initial(self, device):
        return to_float64(getattr(self, self.given), device).reshape(-1)

    def rates(self, device, module=None):
        """The rates in float64, ``(1,)`` or ``(H,)``; of a convolution ``(..., J)``."""
        if not self.learned:
            return self.initial(device)
        learned = to_float64(self.get_learned(module, self.part), device)
        return type(self).decode(learned)


class _WithPast(WithRates):
    """Softmax attention plus ``past``, a sum of past values."""

    applies_dropout = True
    softmax = True

    def forward(self, query, key, value, mask, scaling=None, module=None, **options):
        past = self.past(query, value, mask, self.rates(value.device, module))
        past = past.to(value.dtype)
        if not self.softmax:
            return past
        own = softmax_attention(query, key, value, mask, scaling, module, **options)
        return own + past


class MomentumAttention(_WithPast, kind="momentum"):
    """Softmax attention plus momentum: ``Attn + Σ_{i<t} η^(t-i) v_i``.

    MoAttn of Dai et al. (2023, section 5): the sum leaves the current token out and
    is not normalised. Without a mask its cost is linear in the number of tokens.
    """

    given = "eta"
    eta: float | Float[Tensor, "*H"] = option("decay, in (0, 1)", in_unit_interval)
    normalise: bool = option("multiply the sum by 1 - eta", default=False)
    softmax: bool = option("False: the sum without softmax attention", default=True)

    def past(self, query, value, mask, eta):
        (heads, tokens), length = query.shape[1:3], value.shape[2]
        first = eta * (1 - eta) if self.normalise else eta
        if mask is None and tokens > 1:
            value = value if len(eta) == 1 else repeat_kv(value, heads)
            past = _Sums.apply(upcast(value), eta, first)
            return repeat_kv(past[:, :, length - tokens :], heads)
        distance = torch.arange(length - 1, device=value.device)
        weights = first[:, None] * eta[:, None] ** distance
        return _weighted_sum(weights, query, value, mask)


class HeavyBallAttention(_WithPast, kind="heavy_ball"):
    """Softmax attention whose memory is written by a heavy ball.

    In softmax attention every token is one gradient step (Ren & Liu 2023). With the
    momentum ``m_t = μ m_{t-1} + step`` it is repeated at all later tokens, each time μ
    times smaller: at distance s it has counted ``(1 - μ^(s+1))/(1 - μ)`` times.
    """

    given = "mu"
    mu: float | Float[Tensor, "*H"] = option("momentum, in (0, 1)", in_unit_interval)

    def forward(self, query, key, value, mask, scaling=None, module=None, **options):
        mu, length = self.rates(key.device, module), key.shape[2]
        times = torch.arange(1, length + 1, device=key.device) * mu.log()[:, None]
        times = torch.log(-torch.expm1(times))  # 1/(1 - μ) divides out in the softmax
        distance = relative_positions(mask, query.shape[2], length, key.device)
        bias = _look_up(times.to(query.dtype), distance)
        bias = bias.masked_fill(distance < 0, torch.finfo(query.dtype).min)
        return softmax_attention(query, key, value, bias, scaling, module, **options)


class ConvolutionAttention(_WithPast, kind="convolution"):
    """Softmax attention plus ``Σ_{s=1..J} w_s v_{t-s}``: a short causal convolution.

    A control for momentum: it too adds the last tokens' values without a softmax, but
    with a finite reach and, if learned, any weights. One weight is a shift by a token.
    """

    part = "convolution_weights"
    encode = decode = torch.positive

    eta: float | int = option("in (0, 1); the weights are its powers", in_unit_interval)
    reach: int = option("number of weights J, 1 or more", lambda reach: reach >= 1)

    def initial(self, device):
        distance = torch.arange(1, self.reach + 1)[None]
        return to_float64(self.eta ** distance.double(), device)

    def past(self, query, value, mask, weights):
        (heads, tokens), length = query.shape[1:3], value.shape[2]
        if mask is not None or tokens == 1:
            weights = pad(weights, (0, max(0, length - 1 - self.reach)))
            return _weighted_sum(weights[:, : length - 1], query, value, mask)
        values = pad(upcast(repeat_kv(value, heads)), (0, 0, self.reach, 0))
        weights = weights.to(values.dtype)[..., None, None]
        past = sum(
            weights[:, s] * values[:, :, self.reach - 1 - s :][:, :, :length]
            for s in range(self.reach)
        )
        return past[:, :, length - tokens :]


def _weighted_sum(weights, query, value, mask):
    """Values summed with the weights ``(1 or H, S - 1)`` of distances 1, 2, ..."""
    (batch, heads, tokens), (kv_heads, length) = query.shape[:3], value.shape[1:3]
    value = upcast(value)
    weights = pad(weights.to(value.dtype), (1, 0))
    weights = hardshrink(weights, torch.finfo(value.dtype).tiny)  # denormals are slow
    if mask is None and tokens == 1:  # a step of decoding
        weights = weights.flip(1)[None, :, None]
    else:
        distance = relative_positions(mask, tokens, length, value.device)
        weights = _look_up(weights, distance)
    weights = weights.expand(-1, heads, -1, -1)
    shared = weights.reshape(len(weights), kv_heads, -1, length)  # by heads of a value
    return (shared @ value).reshape(batch, heads, tokens, -1)


def _look_up(table, distance):
    """``table`` ``(H, D)`` at distances ``(B, 1, T, S)``: ``(B, H, T, S)``."""
    return table[:, distance[:, 0].clamp(min=0)].movedim(0, 1)


class _Sums(torch.autograd.Function):
    """``first · Σ_{i<t} decay^(t-1-i) x_i`` along the tokens, with its gradients.

    With S the sum, ``S_t = decay S_{t-1} + first x_{t-1}``, and G the sum of its
    gradient from the other end, the gradient of x is ``first G``, that of the decay
    ``Σ_t S_t·G_t``, that of ``first`` ``Σ_t x_t·G_t``. S is recomputed, not kept.
    """

    @staticmethod
    def forward(ctx, x, decay, first):
        ctx.save_for_backward(x, decay, first)
        return _scan(x, decay, first)

    @staticmethod
    @once_differentiable
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
    """``first · Σ_{i<t} decay^(t-1-i) x_i``, or if ``back`` ``Σ_{i>t}``.

    The tokens of a chunk are summed by one triangular matrix, and as a whole for the
    chunks to come; these sums are scanned likewise, with the decay of a whole chunk.
    All exponents are positive, so nothing grows.
    """
    tokens = x.shape[2]
    size = min(tokens, _CHUNK)
    place = torch.arange(size, device=x.device)
    age = place[:, None] - 1 - place
    weights = (decay[:, None, None] ** age.clamp(min=0)).masked_fill(age < 0, 0)
    weights = (first[:, None, None] * weights).to(x.dtype)
    weights = weights.mT if back else weights
    if tokens <= _CHUNK:
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
