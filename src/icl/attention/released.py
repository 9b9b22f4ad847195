"""Momentum attention as released: a learned convolution of the values."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, softplus

from icl.attention.masks import relative_positions, repeat_kv, to_float64, upcast
from icl.attention.replace import (
    AttentionKind,
    NoDecayParameter,
    option,
    softmax_attention,
)

_CHUNK = 32  # tokens that one product of matrices sums
_ENTRIES = 2**22  # of a kernel's values that are held at a time

Channels = Float[Tensor, "B d T"]
Rates = Float[Tensor, "d N"]


class ReleasedMomentumAttention(AttentionKind, kind="released_momentum"):
    """Softmax attention plus a convolution along the tokens: MoAttn as released.

    The code that the authors of Dai et al. (2023) posted adds to channel c of the
    ``d = H d_v`` that all heads' values have side by side ``Σ_{s=0..t} κ[c,s] v_{t-s}``
    with ``κ[c,s] = d^(-1/2) Σ_n γ[c,n] σ(δ[c,n])^s``: a diagonal state-space layer. δ
    (``ema_logits``, N(0, 0.2²) at first) and γ (``ema_weights``, N(0, 1)) are learned.
    Values that heads share are convolved for each head.
    """

    applies_dropout = True

    exponentials: int = option("per channel, 1 or more", lambda n: n >= 1, default=8)
    positive: bool = option("weights γ > 0 only", default=False)
    current: bool = option("sum the current token too, s = 0", default=True)
    seed: int = option("of δ and γ", lambda seed: seed >= 0, default=0)

    def init_learned(self, model, layer):
        config, heads = model.config, model.config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        g = torch.Generator().manual_seed(1000 * self.seed + layer)
        logits, weights = torch.randn(2, heads * width, self.exponentials, generator=g)
        if self.positive:  # |γ|, of softplus
            weights = weights.abs().clamp(min=1e-3).expm1().log()
        parts = {"ema_logits": 0.2 * logits, "ema_weights": weights}
        return {n: NoDecayParameter(part.to(model.device)) for n, part in parts.items()}

    def parameters(self, module) -> tuple[Rates, Rates]:
        """Decays ``σ(δ)`` and weights ``γ/√d`` of a layer, in float64."""
        logits, weights = (
            to_float64(self.get_learned(module, name), module.ema_logits.device)
            for name in ("ema_logits", "ema_weights")
        )
        weights = softplus(weights) if self.positive else weights
        return logits.sigmoid(), weights * len(weights) ** -0.5

    def forward(self, query, key, value, mask, scaling=None, module=None, **options):
        decay, weight = options.pop("parameters", None) or self.parameters(module)
        own = softmax_attention(query, key, value, mask, scaling, module, **options)
        with torch.autocast(query.device.type, enabled=False):  # sums need all digits
            past = self._past(upcast(value), query.shape, mask, decay, weight, module)
        return own + past.to(value.dtype)

    def _past(self, value, shape, mask, decay, weight, module):
        (heads, tokens), length = shape[1:3], value.shape[2]
        if mask is None and tokens == 1:
            kernel = self._kernel(decay, weight, length, heads, value.dtype, module)
            last = value[:, :, length - kernel.shape[1] :]
            return (repeat_kv(last, heads) * kernel).sum(2, keepdim=True)
        x, end = repeat_kv(value, heads).mT, length  # (B, H, d_v, S)
        if mask is not None:
            distance = relative_positions(mask, tokens, length, value.device)[:, 0]
            hidden, end = _before_and_end(distance)
            if hidden is None:
                kernel = self._kernel(decay, weight, length, heads, x.dtype, module)
                kernel = kernel.flip(1).mT.flatten(0, 1)
                out = _convolve_masked(x.flatten(1, 2), kernel, distance)
                return out.unflatten(1, (heads, -1)).mT
            x = x[..., :end].masked_fill(hidden[:, None, None, :end], 0)
        if not self.current:
            x, weight = pad(x, (1, -1)), weight * decay
        return convolve_chunked(x, decay, weight)[..., end - tokens :].mT

    def _kernel(self, decay, weight, length, heads, dtype, module):
        """κ from the oldest token on, ``(H, R, d_v)``, without a tail below rounding.

        Without gradients it is cached: a step of decoding needs no new kernel.
        """
        kept = module is not None and not (weight.requires_grad or decay.requires_grad)
        last = getattr(module, "icl_kernel", None) if kept else None
        if last is None or not self._is_of(last, (decay, weight), dtype, length):
            longest = reach = 2 ** (length - 1).bit_length()
            slowest = max(decay.amax().item(), torch.finfo(decay.dtype).tiny)
            if slowest < 1:  # what is left of the sum is below rounding
                small = math.log(torch.finfo(dtype).eps / 16 * (1 - slowest))
                reach = min(longest, math.ceil(small / math.log(slowest)))
            kernel = ema_kernel(decay, weight, reach)
            if not self.current:
                kernel = pad(kernel[:, 1:], (1, 0))
            kernel = kernel.flip(1).unflatten(0, (heads, -1)).mT.to(dtype).contiguous()
            longest = math.inf if reach < longest else longest
            last = kernel, self, decay, weight, longest
            if kept:
                module.icl_kernel = last
        return last[0][:, max(0, last[0].shape[1] - length) :]

    def _is_of(self, last, rates, dtype, length):
        """Whether a kernel that was kept is of this kind and its rates, and as long."""
        kernel, kind, *known, longest = last
        same = kind == self and kernel.dtype == dtype
        same = same and kernel.device == rates[0].device and longest >= length
        return same and all(map(torch.equal, known, rates))


def ema_kernel(decay: Rates, weight: Rates, length: int) -> Float[Tensor, "d L"]:
    """``κ[c,s] = Σ_n weight[c,n] decay[c,n]^s`` for s = 0 .. length - 1."""
    powers = decay[..., None] ** torch.arange(length, device=decay.device)
    return (weight[:, None] @ powers)[:, 0]


def convolve_fft(x: Channels, kernel: Float[Tensor, "d T"]) -> Channels:
    """``Σ_{s=0..t} κ[c,s] x[c,t-s]`` by FFT over 2T, as the released code does it."""
    size = 2 * x.shape[-1]
    product = torch.fft.rfft(x, size) * torch.fft.rfft(kernel.to(x.dtype), size)
    return torch.fft.irfft(product, size)[..., : x.shape[-1]]


def convolve_recurrent(x: Channels, decay: Rates, weight: Rates) -> Channels:
    """The same token by token, ``m ← decay m + x``: N states per channel."""
    decay, weight = decay.to(x.dtype), weight.to(x.dtype)
    state, out = torch.zeros_like(decay), []
    for token in x.unbind(-1):
        state = decay * state + token[..., None]
        out.append((weight * state).sum(-1))
    return torch.stack(out, -1)


def convolve_chunked(
    x: Float[Tensor, "B *d T"], decay: Rates, weight: Rates
) -> Float[Tensor, "B *d T"]:
    """The same in time linear in T: a matrix inside chunks, states between them."""
    batch, *shape, tokens = x.shape
    size = min(_CHUNK, tokens)
    chunks = -(-tokens // size)
    if chunks * size > tokens:
        x = pad(x, (0, chunks * size - tokens))
    x = x.unflatten(-1, (chunks, size)).movedim(0, -1).transpose(-3, -2)
    x = x.reshape(len(decay), size, chunks * batch)
    place = torch.arange(size, device=x.device)
    age = place[:, None] - place
    inside = ema_kernel(decay, weight, size)[:, age.clamp(min=0)]
    out = inside.masked_fill(age < 0, 0).to(x.dtype) @ x
    if chunks > 1:
        powers = decay[..., None] ** place
        added = (powers.flip(-1).to(x.dtype) @ x).unflatten(2, (chunks, batch))
        whole = (decay**size)[..., None].to(x.dtype)
        states = [torch.zeros_like(added[:, :, 0])]  # before each chunk
        for n in range(chunks - 1):
            states.append(whole * states[-1] + added[:, :, n])
        leaving = ((weight * decay)[..., None] * powers).mT.to(x.dtype)
        out.baddbmm_(leaving, torch.stack(states, 2).flatten(2))
    out = out.unflatten(2, (chunks, batch)).unflatten(0, shape)
    out = out.transpose(-3, -2).movedim(-1, 0).flatten(-2)
    return out[..., :tokens]


def _convolve_masked(x, kernel, distance):
    """The same over the tokens that a query attends to, for any mask.

    Of x ``(B, d, S)`` with κ ``(d, R)``, 0 beyond R, at ``distance (_, T, S)``.
    """
    kernel = pad(kernel, (0, 1))  # where nothing counts
    index = torch.where(distance < 0, kernel.shape[1] - 1, distance)
    index = index.clamp(max=kernel.shape[1] - 1)
    size, out = max(1, _ENTRIES // index.numel()), []
    unseen = (distance < 0).all(1)[:, None]  # padding may hold anything
    x = x.masked_fill(unseen, 0)
    for own, part in zip(kernel.split(size), x.split(size, 1), strict=True):
        weights = own[:, index].expand(-1, len(x), -1, -1)
        out.append(torch.einsum("cbts,bcs->bct", weights, part))
    return torch.cat(out, 1)


def _before_and_end(distance):
    """Keys before a text and where it ends, if nothing else is hidden from queries.

    This covers padding on the left and caches of fixed size. Returns ``(B, S)`` and
    the number of keys up to the last query, or None twice for another mask.
    """
    tokens, length = distance.shape[1:]
    last = (distance[:, -1] == 0).int().argmax(-1)
    end = int(last[0]) + 1
    place = torch.arange(length, device=distance.device)
    hidden = distance[:, -1] < 0
    begin = (~hidden).int().argmax(-1)
    own = torch.arange(end - tokens, end, device=distance.device)[:, None]
    plain = own - place
    plain = plain.masked_fill((plain < 0) | (place < begin[:, None, None]), -1)
    if (last + 1 != end).any() or not torch.equal(plain, distance):
        return None, None
    return hidden, end
